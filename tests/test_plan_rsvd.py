"""Plans of rsvd for devices, swept over shapes, options and every GPU of the table."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from jaxmetal_linalg import _native
from tools.msl.parse import parse_file
from tools.msl.simulate import ROOT

UNIT = parse_file(ROOT / "kernels" / "rsvd.metal", "kernels/rsvd.metal")
GEMM = parse_file(ROOT / "kernels" / "gemm.metal", "kernels/gemm.metal")
pytestmark = pytest.mark.usefixtures("sim")


def plan(caps: str, m: int, n: int, q: int, **changes: Any) -> dict[str, Any]:
    problem = {
        **{"batch": 1, "m": m, "n": n, "q": q, "n_iter": 4, "normalizer": "auto"},
        **{"center": False, "max_sweeps": 40, "dtype": "float32", "variant": ""},
        **{"device": "sim", "caps": caps, **changes},
    }
    return _native.plan("rsvd", problem)


def test_sweep() -> None:
    reached: set[str] = set()
    shapes = [(5, 3), (300, 200), (200, 300), (4096, 4096), (30522, 384), (100, 1_000_000)]
    for caps, (m, n), dtype in itertools.product(
        _native.caps(), shapes, ("float32", "float16", "bfloat16")
    ):
        limits = _native.caps()[caps]
        for q in (1, 3, 32, 33, 64, 65, 128):
            if q > min(m, n):
                continue
            for center in (False, True):
                answer = plan(caps, m, n, q, dtype=dtype, center=center, batch=1 + 2 * (q < 9))
                assert answer["route"] == "kernel", answer
                assert answer["threadgroup_bytes"] <= limits["max_threadgroup_bytes"]
                width = 32 if q <= 32 else 64 if q <= 64 else 128
                names = [k for k in answer["kernels"] if "_n" in k and k.startswith("rsvd")]
                assert {int(k.rpartition("_n")[2]) for k in names} <= {32, width}
                assert ("rsvd_ones" in answer["kernels"]) == center
                # Nothing is held that grows as the matrix does.
                panel = 4 * 40 * (max(m, n) + 4 * q + 99) * (q + 9)
                parts = 4 * 4 * 132 * 128 * q
                assert answer["scratch_bytes"] <= 3 * panel + parts
                reached |= set(answer["kernels"])
                if min(m, n) < 8 or limits["device"] != "cuda":
                    continue
                answer = plan(caps, m, n, q, dtype=dtype, center=center, library=True)
                reached |= set(answer["kernels"])
                assert answer["variant"] == "library", answer
                assert any(k.startswith("gemm") for k in answer["kernels"])
                assert ("rsvd_split" in answer["kernels"]) == (dtype == "float32")
                # Two halves of a matrix of single precision are all of it that is held.
                halves = 4 * m * (n + 8) if dtype == "float32" else 0
                assert answer["scratch_bytes"] <= halves + 2**25 + panel + parts
    assert {i.host_name for i in UNIT.instances + GEMM.instances} <= reached


def test_steps_grow_with_iterations() -> None:
    launches = [plan("apple-m1", 100, 80, 20, n_iter=t)["launches"] for t in range(4)]
    assert launches[1] - launches[0] == 8  # two products with A, two bases of three dispatches
    # And the bound, from four products, and a product with it, from the second on.
    assert launches[2] - launches[1] == launches[3] - launches[2] == 14
    plain = plan("apple-m1", 100, 80, 20, n_iter=3, normalizer="LU")["launches"]
    assert plain == launches[3] - 2 * 6


def test_watchdog_cuts_products() -> None:
    whole = plan("nvidia-h200", 60_000, 60_000, 128)
    cut = plan("apple-m1", 60_000, 60_000, 128)
    assert cut["route"] == "kernel"
    assert cut["launches"] > whole["launches"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"q": 129}, "k + n_oversamples up to 128 in one call"),
        ({"dtype": "float64"}, "dtype float16, bfloat16 or float32"),
        ({"dtype": "complex64"}, "got complex64"),
        ({"normalizer": "QR"}, "auto or LU"),
        ({"variant": "small"}, "argument variant: expected one of cholesky, library"),
        ({"variant": "library", "device": "metal"}, "argument variant: expected cholesky"),
        ({"variant": "library", "n": 7, "q": 5}, "sides of at least 8 for library"),
        ({"batch": 2**31}, "at most 2147483647 matrices"),
        ({"m": 2**25}, "of sides up to"),
        ({"batch": 2**28}, "a smaller batch"),
    ],
)
def test_no_kernel(changes: dict[str, Any], text: str) -> None:
    answer = plan("apple-m1", **{"m": 500, "n": 300, "q": 20, **changes})
    assert answer["route"] == "none"
    assert text in answer["reason"]


def test_not_on_the_host() -> None:
    problem = {
        **{"batch": 1, "m": 9, "n": 9, "q": 3, "n_iter": 4, "normalizer": "auto"},
        **{"center": False, "max_sweeps": 40, "dtype": "float32", "variant": "", "device": "host"},
    }
    with pytest.raises(ValueError, match="a composite of other primitives"):
        _native.plan("rsvd", problem)
    with pytest.raises(ValueError, match=r"q: expected at most min\(m, n\) = 4"):
        plan("apple-m1", 9, 4, 5)
