"""simdgroup_float8x8: what the shims make of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from tools.msl import nvrtc
from tools.msl.emit import emit_cuda
from tools.msl.parse import parse_file
from tools.msl.simulate import Finding, Simulator, workshop

TEXT = """\
#include <metal_stdlib>
using namespace metal;
[[kernel]] void matrices(device const float* a [[buffer(0)]], device float* c [[buffer(1)]],
                         threadgroup float* t [[threadgroup(0)]],
                         uint i [[thread_index_in_threadgroup]],
                         uint simdgroup [[simdgroup_index_in_threadgroup]]) {
  for (uint e = i; e < 240u; e += 64u) t[e] = a[e];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_float8x8 x;
  simdgroup_float8x8 y;
  simdgroup_float8x8 z = make_filled_simdgroup_matrix<float, 8, 8>(0.5f);
  simdgroup_load(x, t, 10ul);
  simdgroup_load(y, t + 80, 10ul, ulong2(0), true);
  simdgroup_multiply_accumulate(z, x, y, z);
  simdgroup_store(z, c + 256u * simdgroup, 8ul);
  simdgroup_load(y, a + 160, 10ul);
  simdgroup_float8x8 left;
  simdgroup_multiply_accumulate(left, z, y, x);
  simdgroup_store(left, c + (256u * simdgroup + 64u), 8ul);
  simdgroup_multiply_accumulate(x, y, z, left);
  simdgroup_store(x, c + (256u * simdgroup + 128u), 8ul);
  x.thread_elements().x += z.thread_elements().x;
  x.thread_elements().y -= z.thread_elements().y;
  simdgroup_store(x, c + (256u * simdgroup + 192u), 8ul);
}
inline bool first_half(uint i) { return i < 16u; }
[[kernel]] void divergent(device const float* a [[buffer(0)]], device float* c [[buffer(1)]],
                          uint i [[thread_index_in_threadgroup]]) {
  float n[1];
  n[0] = float(i);
  simdgroup_float8x8 x;
  simdgroup_load(x, a, 8ul);
  for (int j = 0; j < (first_half(uint(n[0])) ? 1 : 0); ++j) {
    simdgroup_multiply_accumulate(x, x, x, x);
  }
  simdgroup_store(x, c, 8ul);
}
[[kernel]] void beyond(device const float* a [[buffer(0)]], device float* c [[buffer(1)]],
                       uint i [[thread_index_in_threadgroup]]) {
  simdgroup_float8x8 x;
  simdgroup_load(x, a, 35ul);
  simdgroup_store(x, c, 65ul);
}
"""
UNIT = parse_file(Path("matrices.metal"), "matrices.metal", TEXT)


@pytest.fixture(scope="module")
def judge() -> Simulator:
    workshop().load(UNIT)
    return workshop()


def launch(
    sim: Simulator, kernel: str, a: np.ndarray, c: np.ndarray, **options: bool
) -> list[Finding]:
    return sim.launch(
        kernel,
        grid=1,
        threads=64 if kernel == "matrices" else 32,
        buffers={0: a, 1: c},
        threadgroup_bytes=[960] if kernel == "matrices" else [],
        **options,
    )


@pytest.mark.parametrize("checked", [True, False])
def test_products(checked: bool) -> None:
    """Both simdgroups; transposed; sums from elsewhere; products as factors; elements."""
    sim = workshop()
    sim.load(UNIT, checked=checked)
    a = np.random.default_rng(0).standard_normal(240).astype(np.float32)
    c = np.zeros((2, 4, 8, 8), np.float32)
    assert launch(sim, "matrices", a, c, checked=checked) == []
    x, y, w = a.astype(np.float64).reshape(3, 8, 10)[:, :, :8]
    z = x @ y.T + 0.5
    left = z @ w + x
    last = w @ z + left
    sign = np.where(np.arange(8) % 2 == 0, 1, -1)
    expected = np.stack([z, left, last, last + sign * z])
    for simdgroup in c:
        np.testing.assert_allclose(simdgroup, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_lanes_that_stay_away_are_found(judge: Simulator) -> None:
    found = launch(judge, "divergent", np.ones(64, np.float32), np.zeros(64, np.float32))
    assert {f.kind for f in found} == {"divergent_simd"}
    assert "simdgroup matrix function" in found[0].text


def test_what_lies_beyond_is_found(judge: Simulator) -> None:
    c = np.zeros(65 * 7 + 7, np.float32)
    found = launch(judge, "beyond", np.zeros(35 * 7 + 7, np.float32), c)
    assert {f.kind for f in found} == {"out_of_bounds"}
    lines = [i for i, row in enumerate(TEXT.split("\n"), 1) if "35ul" in row or "65ul" in row]
    assert sorted({f.line for f in found}) == lines


def test_nvrtc_compiles_it(compiler: nvrtc.Nvrtc) -> None:
    """On tensor cores, and for GPUs whose ones have no TF32."""
    for arch, name in itertools.product(("sm_75", "sm_90"), ("matrices", "beyond")):
        cubin, _ = compiler.compile(emit_cuda(UNIT), arch, [f"-DJM_ENTRY_{name}"])
        assert name.encode() in cubin
