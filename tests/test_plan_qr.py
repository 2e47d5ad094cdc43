"""Plans of qr for devices, swept over shapes, dtypes, modes and every GPU of the table."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from jaxmetal_linalg import _native
from tools.msl.layout import QrPlan, qr_variants
from tools.msl.parse import parse_file
from tools.msl.simulate import ROOT

UNIT = parse_file(ROOT / "kernels" / "qr.metal", "kernels/qr.metal")
ROWS = {v.name: v for v in qr_variants(UNIT)}
STORAGE = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}
SIZES = [1, 2, 4, 5, 8, 9, 16, 17, 31, 32, 33, 64, 65, 200]
SHAPES = [
    *itertools.product(SIZES, SIZES),
    *((65_536, 8), (400_000, 2), (1_000_000, 32), (1_000_000, 4), (4096, 300), (7, 5000)),
]
pytestmark = pytest.mark.usefixtures("sim")


def plan(caps: str, m: int, n: int, dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    problem = {
        **{"batch": 1, "m": m, "n": n, "dtype": dtype, "mode": "reduced", "method": "auto"},
        **{"variant": "", "device": "sim", "caps": caps, **changes},
    }
    return _native.plan("qr", problem)


def check(
    answer: dict[str, Any], caps: dict[str, Any], m: int, n: int, dtype: str, **more: Any
) -> list[str]:
    """The plan is that of tools/msl/layout.py, which launches the kernels in other tests."""
    assert answer["route"] == "kernel", answer
    batch, mode = more.get("batch", 1), more.get("mode", "reduced")
    assert answer["threadgroup_bytes"] <= caps["max_threadgroup_bytes"]
    if answer["variant"] == "small":
        (name,) = answer["kernels"]
        row = ROWS[name]
        assert name in answer["reason"]
        assert max(m, n) <= row.n
        # The smallest that holds it, of its dtype and mode.
        assert all(max(m, n) > v.n for v in ROWS.values() if v.n < row.n)
        assert row.with_q == (mode != "r")
        assert row.width == (2 if dtype == "complex64" else 1)
        assert row.storage == STORAGE.get(dtype, "float")
        assert answer["launches"] == 1
        assert answer["grid"] == [-(-batch // row.matrices), 1, 1]
        assert answer["group"] == [row.threads, 1, 1]
        assert answer["threadgroup_bytes"] == -(-row.scratch_bytes // 16) * 16
        assert answer["scratch_bytes"] == 0
        return [name]
    assert max(m, n) > 32 or more.get("variant") == "tsqr" or more.get("method") == "tsqr"
    width = 2 if dtype == "complex64" else 1
    storage = STORAGE.get(dtype, "float")
    want = QrPlan.on(UNIT, caps["cores"], batch, m, n, mode, storage, width)
    steps = want.steps()
    assert answer["launches"] == len(steps)
    assert answer["kernels"] == list(dict.fromkeys(s.kernel for s in steps))
    largest = max(steps, key=lambda s: sum(s.threadgroup_bytes))
    assert answer["grid"] == [largest.groups, 1, 1]
    assert answer["group"] == [largest.threads, 1, 1]
    assert answer["threadgroup_bytes"] == sum(largest.threadgroup_bytes)
    assert answer["scratch_bytes"] == sum(-(-b // 256) * 256 for b in want.scratch.values())
    # Every row of A belongs to one piece, and to one only, of all levels.
    for level in want.levels(0):
        lengths = [level["piece"]] * (level["pieces"] - 1)
        last = level["rows"] - sum(lengths)
        assert want.lanes <= last or level["pieces"] == 1
        assert max([*lengths, last]) <= want.lanes + level["blocks"] * want.rows
    assert level["pieces"] == 1
    return list(answer["kernels"])


def test_sweep() -> None:
    reached: set[str] = set()
    for caps, (m, n), dtype in itertools.product(
        ("apple-m1", "nvidia-h200"), SHAPES, [*STORAGE, "complex64"]
    ):
        for mode in ("reduced", "complete", "r") if m < 5000 else ("reduced", "r"):
            answer = plan(caps, m, n, dtype, mode=mode)
            reached |= set(check(answer, _native.caps()[caps], m, n, dtype, mode=mode))
    assert reached == {i.host_name for i in UNIT.instances}


def test_every_gpu_and_batch() -> None:
    for (name, caps), (m, n) in itertools.product(_native.caps().items(), ((12, 7), (900, 40))):
        for batch in (1, 3, 1000):
            check(plan(name, m, n, batch=batch), caps, m, n, "float32", batch=batch)


def test_by_name() -> None:
    caps = _native.caps()["apple-m1"]
    for more in ({"variant": "tsqr"}, {"method": "tsqr"}):
        answer = plan("apple-m1", 9, 5, **more)
        assert answer["variant"] == "tsqr"
        check(answer, caps, 9, 5, "float32", **more)
    assert plan("apple-m1", 9, 5, variant="small")["variant"] == "small"
    assert plan("apple-m1", 9, 5, method="householder")["variant"] == "small"


@pytest.mark.parametrize("size", [(60_000, 8), (5000, 40)])
def test_pieces_depend_on_the_matrix_alone(size: tuple[int, int]) -> None:
    """So that the same input has the same bits whatever the batch."""
    assert len({plan("nvidia-h200", *size, batch=b)["reason"] for b in (1, 7, 100)}) == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": "float64"}, "argument a: expected dtype float16"),
        ({"dtype": "complex128"}, "got complex128"),
        ({"dtype": "complex64", "variant": "small", "m": 33}, "m and n up to 32 for row small"),
        ({"variant": "interleaved"}, "argument variant: expected one of small, tsqr"),
        ({"variant": "small", "n": 33}, "m and n up to 32 for row small"),
        ({"method": "lapack"}, "argument method: expected auto, householder or tsqr"),
        ({"method": "tsqr", "n": 9}, "which needs m >= n"),
        ({"method": "tsqr", "mode": "complete", "n": 3}, "gives reduced factors"),
        ({"batch": 2**31}, "at most 2147483647 matrices"),
        ({"m": 2**30, "n": 2}, "at most 2147483647 matrices"),
        ({"m": 2**20, "n": 40, "batch": 2**20}, "a smaller batch"),
        ({"m": 1024, "n": 1024, "batch": 4096}, "before the GPU's watchdog ends it"),
    ],
)
def test_no_kernel(changes: dict[str, Any], text: str) -> None:
    answer = plan("apple-m1", **{"m": 8, "n": 8, **changes})
    assert answer["route"] == "none"
    assert answer["launches"] == 0
    assert text in answer["reason"]
    assert "Use device host" in answer["reason"]
