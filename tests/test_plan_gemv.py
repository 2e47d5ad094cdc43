"""Plans of gemv for devices, swept over shapes, dtypes, flags and every GPU of the table."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from jaxmetal_linalg import _native
from tools.msl.layout import GemvVariant, gemv_parts, gemv_variants
from tools.msl.parse import parse_file
from tools.msl.simulate import ROOT

UNIT = parse_file(ROOT / "kernels" / "gemv.metal", "kernels/gemv.metal")
ROWS = {v.name: v for v in gemv_variants(UNIT)}
HELPERS = {i.host_name for i in UNIT.instances} - set(ROWS)
TAGS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "complex64": "c64"}
# a, x, result: all that the kernels serve.
DTYPES = [
    *((d, d, d) for d in TAGS),
    *(("float16", "float32", "float32"), ("bfloat16", "float16", "float32")),
    *(("float32", "bfloat16", "float32"), ("complex64", "float16", "complex64")),
    *(("complex64", "float32", "complex64"), ("complex64", "bfloat16", "complex64")),
    *(("float16", "float16", "float32"), ("bfloat16", "bfloat16", "float32")),
]
SHAPES = [
    *((1, 1), (3, 5), (1, 100_000), (100_000, 1), (16, 262_144), (100_000, 64), (33, 1)),
    *((9728, 896), (896, 4864), (151_936, 896), (1152, 896), (4095, 4097), (8192, 8192)),
    *((200, 8190), (64, 64), (4864, 900)),
]
pytestmark = pytest.mark.usefixtures("sim")


def plan(
    caps: str,
    m: int,
    n: int,
    dtypes: tuple[str, str, str] = ("float32", "float32", "float32"),
    **changes: Any,
) -> dict[str, Any]:
    problem = {
        **{"batch": 1, "m": m, "n": n, "nrhs": 1, "transpose": False, "conjugate": False},
        **{"a_dtype": dtypes[0], "x_dtype": dtypes[1], "out_dtype": dtypes[2]},
        **{"alpha_re": 1.0, "alpha_im": 0.0, "beta_re": 0.0, "beta_im": 0.0},
        **{"y": False, "bias": False, "residual": False, "activation": "none"},
        **{"variant": "", "device": "sim", "caps": caps, **changes},
    }
    return _native.plan("gemv", problem)


def check(answer: dict[str, Any], caps: dict[str, Any], problem: dict[str, Any]) -> GemvVariant:
    """The plan's steps are rows that can do the problem, within the limits; the one that counts."""
    assert answer["route"] == "kernel", answer
    (name,) = (k for k in answer["kernels"] if k in ROWS)
    assert set(answer["kernels"]) - {name} <= HELPERS
    row = ROWS[name]
    assert name in answer["reason"]
    a, x, out = problem["dtypes"]
    transpose, nrhs = problem.get("transpose", False), problem.get("nrhs", 1)
    outputs, depth = problem["m"], problem["n"]
    if transpose:
        outputs, depth = depth, outputs
    # Capabilities.
    assert name.split("_")[2] == TAGS[a] + (TAGS[out] if a != out else "")
    assert row.transposed == transpose
    assert row.fits(problem["n"])
    wanted = {"bias": "kGemvBias", "y": "kGemvAccumulate", "residual": "kGemvResidual"}
    assert {f for k, f in wanted.items() if problem.get(k)} <= row.flags
    assert problem.get("activation", "none") == "none" or "kGemvActivation" in row.flags
    bytes_ = depth * row.width * (4 if row.storage == "float" else 2)
    if not problem.get("variant"):
        assert not row.off
        assert transpose or bytes_ > 31 * 16 or "kGemvSmallK" in row.flags
        assert row.vectors >= min(nrhs, 8)
    # Geometry: tools/msl/layout.py, which launches the kernels in other tests, says the same.
    parts, _ = gemv_parts(row, outputs, depth, caps["cores"])
    blocks = -(-outputs // row.outputs)
    groups = problem.get("batch", 1) * -(-nrhs // row.vectors) * parts * blocks
    converts = x != out
    assert answer["launches"] == 1 + converts + (parts > 1)
    if not converts:
        assert answer["grid"] == [groups, 1, 1]
        assert answer["group"] == [row.threads, 1, 1]
        assert answer["threadgroup_bytes"] == -(-row.scratch_bytes // 16) * 16
    assert row.threads <= caps["max_threads_per_threadgroup"]
    assert row.scratch_bytes <= caps["max_threadgroup_bytes"]
    return row


def test_sweep() -> None:
    reached = set()
    for caps, (m, n), dtypes, transpose in itertools.product(
        ("apple-m1", "apple-m3-ultra", "nvidia-h200"), SHAPES, DTYPES, (False, True)
    ):
        for nrhs, bias in ((1, False), (1, True), *((k, False) for k in (2, 3, 5, 9, 16, 40))):
            more = {"transpose": transpose, "nrhs": nrhs, "bias": bias}
            answer = plan(caps, m, n, dtypes, **more)
            problem = {"m": m, "n": n, "dtypes": dtypes, **more}
            reached.add(check(answer, _native.caps()[caps], problem).name)
    assert reached == {v.name for v in ROWS.values() if not v.off}


def test_every_gpu_and_flag() -> None:
    for (name, caps), (m, n) in itertools.product(_native.caps().items(), ((30, 70), (640, 9000))):
        for flags in itertools.product((False, True), repeat=3):
            more: dict[str, Any] = dict(zip(("y", "bias", "residual"), flags, strict=True))
            more |= {"batch": 3, "nrhs": 2, "activation": "gelu" if flags[0] else "none"}
            answer = plan(name, m, n, **more)
            check(answer, caps, {"m": m, "n": n, "dtypes": ("float32",) * 3, **more})


@pytest.mark.parametrize("name", sorted(ROWS))
def test_rows_by_name(name: str) -> None:
    """Each row is reached by the name of its class, those that are off as well."""
    v = ROWS[name]
    tags = {t: d for d, t in TAGS.items()}
    tag = name.split("_")[2]
    a = next(t for t in ("bf16", "f32", "f16", "c64") if tag.startswith(t))
    out = tag[len(a) :] or a
    dtypes = (tags[a], tags[out], tags[out])
    more = {"transpose": v.transposed, "nrhs": v.vectors, "variant": v.variant}
    answer = plan("apple-m1", 320, 640, dtypes, **more)
    assert check(
        answer, _native.caps()["apple-m1"], {"m": 320, "n": 640, "dtypes": dtypes, **more}
    ) == (v)


@pytest.mark.parametrize("kind", ["rows", "split", "any", "wide", "pair", "column"])
def test_parts_depend_on_the_matrix_alone(kind: str) -> None:
    """So that the same input has the same bits whatever the batch and the number of vectors."""
    transpose = kind in ("wide", "pair", "column")
    dtypes = ("float16",) * 3
    parts = set()
    for batch, nrhs in ((1, 1), (7, 1), (1, 4), (3, 16)):
        more = {"transpose": transpose, "variant": kind, "batch": batch, "nrhs": nrhs}
        answer = plan("nvidia-h200", 80, 65_536, dtypes, **more)
        row = ROWS[next(k for k in answer["kernels"] if k in ROWS)]
        blocks = -(-(65_536 if transpose else 80) // row.outputs)
        parts.add(answer["grid"][0] / (batch * -(-nrhs // row.vectors) * blocks))
    assert len(parts) == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtypes": ("float64",) * 3}, "argument a: expected dtype float16"),
        ({"dtypes": ("float32", "float64", "float64")}, "argument x: expected dtype float16"),
        ({"dtypes": ("float32", "complex64", "complex64")}, "argument a: expected a dtype that"),
        ({"dtypes": ("complex128",) * 3}, "got complex128"),
        ({"variant": "rows8"}, "argument variant: expected one of rows, any, split, anysplit"),
        ({"variant": "wide"}, "got wide"),
        ({"variant": "rows", "n": 7}, "a row that reads float32 rows of 7"),
        ({"n": 2**25 + 4}, "m and n up to 33554432"),
        ({"batch": 2**31}, "at most 2147483647 threadgroups"),
    ],
)
def test_no_kernel(changes: dict[str, Any], text: str) -> None:
    answer = plan("apple-m1", **{"m": 8, "n": 8, **changes})
    assert answer["route"] == "none"
    assert answer["launches"] == 0
    assert text in answer["reason"]
    assert "Use device host" in answer["reason"]
