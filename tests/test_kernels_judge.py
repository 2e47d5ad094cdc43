"""Proof that the simulator judges: planted faults, and mutants of every shipped kernel."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import (
    build_mutant,
    caught_by,
    check_mutants,
    hard_matrices,
    kernels_by_line,
    line_pairs,
    mutant_line,
    mutants_of,
    random_matrix,
)
from test_kernels import UNIT, VARIANTS, Outcome, gaussian, only, ratios, run
from test_kernels_grid import FUSED as FUSED_ROWS
from test_kernels_grid import PARAMS as GRID_PARAMS
from test_kernels_grid import QUARTERS as QUARTERS_ROW
from test_kernels_grid import run as run_grid
from test_kernels_grid import run_fused, run_quarters
from test_kernels_pairs import run as run_pairs

from tools.msl.layout import KEPT, SOLVE_BYTES
from tools.msl.parse import parse_file
from tools.msl.simulate import ROOT, CompileError, Limits, Workshop, workshop

PLANTED = """\
#include <metal_stdlib>
using namespace metal;
struct P { int n; };
constant int kStride [[function_constant(0)]];
[[kernel]] void clean(device const float* a [[buffer(0)]], device float* b [[buffer(1)]],
                      constant P& p [[buffer(2)]], threadgroup float* t [[threadgroup(0)]],
                      uint g [[threadgroup_position_in_grid]],
                      uint i [[thread_index_in_threadgroup]],
                      uint n [[threads_per_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                      uint3 g3 [[threadgroup_position_in_grid]]) {
  t[i] = a[g3.x * n + i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float x = t[n - 1u - i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  t[i] = simd_sum(x) + simd_broadcast(x, ushort(3)) + simd_max(x) - simd_min(x);
  x = simd_shuffle_up(x, ushort(1)) + simd_shuffle_down(x, ushort(2)) + t[i] * float(p.n);
  b[g * n + i] = simd_all(lane < 32u) ? x * float(kStride) : 0.0f;
}
[[kernel]] void out_of_bounds(device float* b [[buffer(0)]],
                              uint i [[thread_index_in_threadgroup]]) {
  b[i + 1u] = 1.0f;
}
[[kernel]] void before_the_start(device float* b [[buffer(0)]],
                                 uint i [[thread_index_in_threadgroup]]) {
  b[int(i) - 1] = 1.0f;
}
[[kernel]] void misaligned(device char* b [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  device float* f = (device float*)(b + 1);
  if (i == 5u) f[0] = 1.0f;
}
[[kernel]] void uninitialised(device float* b [[buffer(0)]],
                              threadgroup float* t [[threadgroup(0)]],
                              uint i [[thread_index_in_threadgroup]]) {
  if (i != 7u) t[i] = 1.0f;
  b[i] = t[i];
}
[[kernel]] void undefined_memory(device float* b [[buffer(0)]],
                                 uint i [[thread_index_in_threadgroup]]) {
  if (i != 7u) b[i] = 1.0f;
  threadgroup_barrier(mem_flags::mem_device);
  float x = b[i ^ 1u];
  threadgroup_barrier(mem_flags::mem_device);
  b[i] = x;
}
[[kernel]] void race_same_simdgroup(device float* b [[buffer(0)]],
                                    threadgroup float* t [[threadgroup(0)]],
                                    uint i [[thread_index_in_threadgroup]]) {
  t[i] = 1.0f;
  b[i] = t[i ^ 1u];
}
[[kernel]] void race_across_simdgroups(device float* b [[buffer(0)]],
                                       threadgroup float* t [[threadgroup(0)]],
                                       uint i [[thread_index_in_threadgroup]]) {
  t[i] = 1.0f;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  b[i] = t[i ^ 32u];
}
[[kernel]] void race_read_then_write(device float* b [[buffer(0)]],
                                     threadgroup float* t [[threadgroup(0)]],
                                     uint i [[thread_index_in_threadgroup]]) {
  t[i] = 1.0f;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float x = t[i ^ 33u];
  t[i] = x;
  b[i] = x;
}
[[kernel]] void barrier_of_the_wrong_memory(device float* b [[buffer(0)]],
                                            threadgroup float* t [[threadgroup(0)]],
                                            uint i [[thread_index_in_threadgroup]]) {
  t[i] = 1.0f;
  threadgroup_barrier(mem_flags::mem_device);
  b[i] = t[i ^ 1u];
}
[[kernel]] void race_between_threadgroups(device float* b [[buffer(0)]],
                                          uint i [[thread_index_in_threadgroup]]) {
  b[i] = 1.0f;
}
[[kernel]] void race_on_reads_between_threadgroups(device float* b [[buffer(0)]],
                                                   uint g [[threadgroup_position_in_grid]],
                                                   uint i [[thread_index_in_threadgroup]]) {
  if (g == 0u) b[i] = 1.0f;
  float x = b[i];
  if (x > 5.0f) b[i] = x;
}
inline bool half_of_them(uint i) { return i % 32u < 16u; }
[[kernel]] void divergent_simd(device float* b [[buffer(0)]],
                               uint i [[thread_index_in_threadgroup]]) {
  float x[1];
  x[0] = float(i);
  for (int j = 0; j < (half_of_them(uint(x[0])) ? 1 : 0); ++j) x[0] = simd_sum(x[0]);
  b[i] = x[0];
}
inline float meet_here(float x) { return simd_sum(x); }
inline float or_there(float x) { return simd_max(x); }
inline float choose(float x) { return half_of_them(uint(x)) ? meet_here(x) : or_there(x); }
[[kernel]] void two_places(device float* b [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  b[i] = choose(float(i));
}
inline void wait_if(bool some) {
  if (some) threadgroup_barrier(mem_flags::mem_threadgroup);
}
[[kernel]] void divergent_barrier(device float* b [[buffer(0)]],
                                  uint i [[thread_index_in_threadgroup]]) {
  wait_if(i < 40u);
  b[i] = 1.0f;
}
[[kernel]] void register_array(device float* b [[buffer(0)]],
                               uint i [[thread_index_in_threadgroup]]) {
  float x[4];
  for (int j = 0; j <= 4; ++j) x[j] = float(j);
  b[i] = x[i % 4u];
}
[[kernel]] void element_of_struct(device float* b [[buffer(0)]],
                                  uint i [[thread_index_in_threadgroup]]) {
  float2 x[4];
  for (int j = 0; j <= 4; ++j) x[j] = float2();
  b[i] = x[i % 4u].x;
}
inline void set(thread float& x) { x = 0.0f; }
[[kernel]] void reference_to_element(device float* b [[buffer(0)]],
                                     uint i [[thread_index_in_threadgroup]]) {
  float x[4];
  for (int j = 0; j <= 4; ++j) set(x[j]);
  b[i] = x[i % 4u];
}
template <typename T, int N>
inline T last(thread const T (&x)[N]) { return x[N - 1]; }
[[kernel]] void row_of_array(device float* b [[buffer(0)]],
                             uint i [[thread_index_in_threadgroup]]) {
  float x[4][2];
  for (int j = 0; j < 8; ++j) x[j / 2][j % 2] = 0.0f;
  b[i] = last(x[4u - i / 64u]);
}
template <typename T>
struct Pair { T of[2]; };
[[kernel]] void array_in_struct(device float* b [[buffer(0)]],
                                uint i [[thread_index_in_threadgroup]]) {
  Pair<float> x[1];
  for (int j = 0; j < 2; ++j) x[0].of[j] = 0.0f;
  b[i] = x[0].of[int(i) - 1];
}
constant float kTable[3] = {1.0f, 2.0f, 3.0f};
[[kernel]] void table_of_constants(device float* b [[buffer(0)]],
                                   uint i [[thread_index_in_threadgroup]]) {
  b[i] = kTable[i % 4u];
}
[[kernel]] void shuffle_from_nowhere(device float* b [[buffer(0)]],
                                     uint i [[thread_index_in_threadgroup]]) {
  b[i] = simd_shuffle(float(i), ushort(i + 1u));
}
"""
LINES = PLANTED.split("\n")


def line_of(text: str, after: str = "") -> int:
    start = next((i for i, row in enumerate(LINES) if f"void {after}(" in row), 0)
    return next(i for i, row in enumerate(LINES, 1) if i > start and text in row)


class _P(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int32)]


@pytest.fixture(scope="module")
def judge() -> Workshop:
    workshop().load(parse_file(Path("planted.metal"), "planted.metal", PLANTED))
    return workshop()


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_clean_kernel_is_clean_and_right(judge: Workshop, seed: int | None) -> None:
    a = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    b = np.zeros(128, np.float32)
    found = judge.launch(
        "clean",
        grid=2,
        threads=64,
        buffers={0: a, 1: b},
        params=(2, _P(3)),
        threadgroup_bytes=[256],
        constants={0: 2},
        seed=seed,
    )
    assert found == []
    x = a.reshape(2, 64)[:, ::-1].reshape(4, 32)
    up = np.concatenate([x[:, :1], x[:, :-1]], axis=1)
    down = np.concatenate([x[:, 2:], x[:, -2:]], axis=1)
    total = x.sum(1) + x[:, 3] + x.max(1) - x.min(1)
    expected = 2 * (up + down + 3 * total[:, None])
    np.testing.assert_allclose(b.reshape(4, 32), expected, rtol=1e-4, atol=1e-4)


# kernel: kind of finding, text of its line, what the finding says
FAULTS = {
    "out_of_bounds": ("out_of_bounds", "b[i + 1u]", "byte 256 of 256"),
    "before_the_start": ("out_of_bounds", "b[int(i) - 1]", "byte -4 of 256"),
    "misaligned": ("misaligned", "f[0]", "lane 5 of simdgroup 0 writes 4 bytes"),
    "uninitialised": ("uninitialised", "b[i] = t[i]", "lane 7 of simdgroup 0 reads"),
    "race_same_simdgroup": ("race_lanes", "", "lane 0 of simdgroup 0"),
    "race_across_simdgroups": ("race_lanes", "", "of simdgroup 1"),
    "race_read_then_write": ("race_lanes", "t[i] = x", "threadgroup argument t"),
    "barrier_of_the_wrong_memory": ("race_lanes", "", "threadgroup argument t"),
    "race_between_threadgroups": ("race_threadgroups", "b[i] = 1.0f", "of threadgroup 0 wrote"),
    "race_on_reads_between_threadgroups": ("race_threadgroups", "", "device argument b"),
    "divergent_simd": ("divergent_simd", "simd_sum(x[0])", "the end of the kernel"),
    "two_places": ("divergent_simd", "", "simd reduction"),
    "divergent_barrier": ("divergent_barrier", "", "threads 0-39 at threadgroup_barrier"),
    "register_array": ("array_out_of_bounds", "x[j] =", "index 4"),
    "element_of_struct": ("array_out_of_bounds", "x[j] =", "index 4"),
    "reference_to_element": ("array_out_of_bounds", "set(x[j])", "index 4"),
    "row_of_array": ("array_out_of_bounds", "last(x[", "index 4"),
    "array_in_struct": ("array_out_of_bounds", ".of[int(i) - 1]", "index -1"),
    "table_of_constants": ("array_out_of_bounds", "kTable[i", "index 3"),
    "shuffle_from_nowhere": ("shuffle_lane", "b[i] = simd_shuffle", "lane 32 of 32"),
}


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("kernel", sorted(FAULTS))
def test_planted_fault_is_found(judge: Workshop, kernel: str, seed: int | None) -> None:
    kind, text, says = FAULTS[kernel]
    scratch = [256] if f"void {kernel}(" in PLANTED and _has_scratch(kernel) else []
    found = judge.launch(
        kernel,
        grid=2 if "threadgroups" in kernel else 1,
        threads=64,
        buffers={0: np.zeros(64, np.float32)},
        threadgroup_bytes=scratch,
        seed=seed,
    )
    # In a race the reader may also come first, and read what nothing wrote.
    also = (
        {"uninitialised"} if kernel in ("race_same_simdgroup", "race_across_simdgroups") else set()
    )
    assert {f.kind for f in found} - also == {kind}
    assert all(f.text.startswith(f"planted.metal:{f.line}: {kernel}, threadgroup ") for f in found)
    if text:
        assert line_of(text, kernel) in {f.line for f in found}
    if seed is None:
        assert any(says in f.text for f in found), found


@pytest.mark.parametrize("seed", [None, 7])
def test_memory_that_nothing_wrote_is_found(judge: Workshop, seed: int | None) -> None:
    """In a call's results and scratch memory; what the caller filled may be read."""
    given: dict[str, Any] = {"grid": 1, "threads": 64, "seed": seed}
    b = np.zeros(64, np.float32)
    assert judge.launch("undefined_memory", buffers={0: b}, **given) == []
    (found,) = judge.launch("undefined_memory", buffers={0: b}, undefined=[0], **given)
    assert (found.kind, found.line) == ("uninitialised", line_of("b[i ^ 1u]", "undefined_memory"))
    assert (
        "lane 6 of simdgroup 0 reads what nothing wrote: device argument b, byte 28" in found.text
    )


def _has_scratch(kernel: str) -> bool:
    start = PLANTED.index(f"void {kernel}(")
    return "[[threadgroup(0)]]" in PLANTED[start : PLANTED.index(") {", start)]


def test_memory_bound_twice_has_one_history(judge: Workshop) -> None:
    both = np.zeros(64, np.float32)
    found = judge.launch(
        "clean",
        grid=1,
        threads=64,
        buffers={0: both, 1: both},
        params=(2, _P(3)),
        threadgroup_bytes=[256],
        constants={0: 1},
    )
    assert found == []  # each element is read and written by one thread only


def test_launch_is_checked(judge: Workshop) -> None:
    def launch(threads: int = 64, scratch: int = 256, **changes: object) -> None:
        arguments: dict[str, object] = {
            "grid": 1,
            "buffers": {0: np.zeros(64, np.float32), 1: np.zeros(64, np.float32)},
            "params": (2, _P(3)),
            "threadgroup_bytes": [scratch],
        }
        judge.launch("clean", threads=threads, **{**arguments, **changes})  # type: ignore[arg-type]

    launch()
    for message, changes in {
        "threads per threadgroup: 2048 exceed the 1024": {"threads": 2048},
        "no multiple of the simdgroup's 32": {"threads": 48},
        "threadgroup bytes: 40000 exceed the 32768": {"scratch": 40000},
        "buffers: 3 exceed the 2": {"limits": Limits(buffers=2)},
        "argument b: no buffer bound at 1": {"buffers": {0: np.zeros(64, np.float32)}},
        "argument p: params must be bound at 2": {"params": (3, _P(3))},
        "argument t: no size": {"threadgroup_bytes": []},
        "empty grid": {"grid": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            launch(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no kernel named nothing"):
        judge.launch("nothing", grid=1, threads=32, buffers={})


MIXED = {
    "assign": "device float* q = t;",
    "pass": "use(t);",
    "cast": "device float* q = (device float*)t;",
    "through const": "a[0] = 1.0f;",
    "to params": "p.n = 1;",
}


@pytest.mark.parametrize("how", sorted(MIXED))
def test_address_spaces_do_not_mix(judge: Workshop, how: str) -> None:
    text = (
        "struct P { int n; }; inline void use(device float* x) { x[0] = 1.0f; }\n"
        "[[kernel]] void mix(device const float* a [[buffer(0)]],\n"
        " constant P& p [[buffer(1)]], threadgroup float* t [[threadgroup(0)]]) {\n"
        + MIXED[how]
        + "\n}"
    )
    with pytest.raises(CompileError, match=r"mixed.metal:4"):
        judge.load(parse_file(Path("mixed.metal"), "mixed.metal", text))


# --- mutants ------------------------------------------------------------------------------------

SOURCE = (ROOT / "kernels" / "svd.metal").read_text()
CODE_START = SOURCE.index("#ifndef JM_HOST\n", SOURCE.index("#define SVD_VARIANTS"))
COMPLEX_LINE = SOURCE[: SOURCE.index("// --- complex, N <= 32")].count("\n") + 1
BLOCK_LINE = SOURCE[: SOURCE.index("// --- one threadgroup a matrix")].count("\n") + 1
TWIN_LINE = SOURCE[: SOURCE.index("// --- A first, then V")].count("\n") + 1
GRID_LINE = SOURCE[: SOURCE.index("// --- many threadgroups a matrix")].count("\n") + 1
QUARTERS_LINE = SOURCE[: SOURCE.index("// --- half of the columns a threadgroup")].count("\n") + 1
PAIRS_LINE = SOURCE[: SOURCE.index("// --- complex of any size")].count("\n") + 1
# The smallest kernels that together run all code there is; each mutant runs those that it changes.
SMALL = ("svd_xor_vectors_f32_n8", "svd_ring_vectors_f32_n8")
# Code that only sizes above 8 have, and lanes without columns.
BEHIND = ("svd_xor_vectors_f32_n16", "svd_ring_vectors_f32_n12")
BLOCK = ("svd_block8_vectors_f32_n40",)
COMPLEX = ("svd_xor_vectors_c64_n8", "svd_ring_vectors_c64_n8", "svd_xor_vectors_c128_n32")
LARGE = ("svd_block8_vectors_f32_n80", "svd_block16_vectors_f32_n128")  # of three and four parts
TWIN = ("svd_twin_vectors_f32_n40", "svd_twin_vectors_f32_n80")  # of one simdgroup and of four
# Of six columns a lane, and where the page of Vt takes most threadgroup memory.
TWIN_LARGE = tuple(f"svd_twin_{kind}_f32_n{n}" for n in (144, 64) for kind in ("vectors", "rows"))
GRID = tuple(
    i.host_name
    for i in UNIT.instances
    if i.host_name.startswith("svd_grid_") and not i.host_name.endswith("f16")
)
PAIRS = tuple(i.host_name for i in UNIT.instances if i.host_name.startswith("svd_pairs_"))
FUSED = tuple(FUSED_ROWS)  # of which all but the rounds are in GRID
QUARTERS = (QUARTERS_ROW.name, *GRID)
KINDS = (SMALL, BLOCK, TWIN, COMPLEX, GRID, QUARTERS, PAIRS)
VERDICTS = {
    **{SMALL: "small_verdict", BEHIND: "behind_verdict", BLOCK: "block_verdict"},
    **{
        LARGE: "large_verdict",
        TWIN: "twin_verdict",
        TWIN_LARGE: "twin_large_verdict",
        GRID: "grid_verdict",
        COMPLEX: "complex_verdict",
    },
    **{PAIRS: "pairs_verdict", FUSED: "fused_verdict", QUARTERS: "quarters_verdict"},
}


def bounds(row: str) -> Iterator[tuple[re.Match[str], str]]:
    """Comparisons of sizes; floating point ones are no bounds."""
    for m in re.finditer(
        r" < (?!0\.|4\.|tol|p\.tol|least|[0-9.e-]+f|5\.|F\(|exponent_bits|kFlat|kLeastNorm)", row
    ):
        if not re.search(r"(part|units|h|g|weight|norm|largest|bits|k) < ", row[: m.end()]):
            yield m, " <= "


def mutants() -> dict[str, str]:
    return mutants_of(SOURCE, CODE_START, bounds)


# Mutants that change nothing that matters: the mutated line and the one after it, and the reason.
EQUIVALENT = {
    (
        "for (int c = 0; c < C; ++c) {",
        "if (c == chosen) {",
    ): "there is no further column to choose",
    (
        "const ushort other = ushort(own < lanes ? (odd ? left : right) : lane);",
        "threadgroup float4* turns =",
    ): "a lane without columns gets those of another",
    (
        "const bool live = own < lanes && !(odd && last && which == uint(pairs - 1));",
        "const Rotation<float> r = rotation_facing(f, g, live, tol);",
    ): "a lane without columns finds no angle between them",
    (
        "for (int c = 0; c < C; ++c) present += speaker && rank[c] < p.n && !missing[c] ? 1 : 0;",
        "// The flags' place; all slices but one count nothing.",
    ): "the column of rank n is missing",
    (
        "if (simd_any(good && present < p.n)) {",
        "if (there) {",
    ): "nothing is completed where no column is missing",
    (
        "if (rank[c] < p.n) wm[rank[c] * N + slice * H + i] = x[c][i];",
        "}",
    ): "one more column, inside of its place and never read",
    (
        "if (rank[c] < p.n) x[c][i] = wm[rank[c] * N + slice * H + i];",
        "}",
    ): "the column of rank n is not stored",
    (
        "for (int step = 0; step < N; step += 2) {",
        "rotate_pair<N, C, VECTORS>(x, v, norm, weight, live, tol, max_cos, max_tan);",
    ): "two more steps only rotate more pairs",
    (
        "for (int r = 0; r < u_cols; ++r) {",
        "bool here = false;",
    ): "no column of rank u_cols is ever missing",
    (
        "for (int i = 8; i < L; ++i) {",
        "x[c][i - 8] = x[c][i];",
    ): "the register behind the last is not read again, or written after this",
    (
        "for (int pass = 0; pass < 2; ++pass) {",
        "F along[C];",
    ): "a third orthogonalisation changes only rounding",
    (
        "const bool there = int(lane) % int(Place::kSpan) < int(Place::kLanes);",
        "bool taken[C];",
    ): "a lane without columns has zeros, which are never reflected along",
    (
        "if (at < min(end, F)) next[i] = from[at];",
        "}",
    ): "a four more, which has the factor 0 or is not used",
    (
        "for (int i = 0; i < K; ++i) {",
        "const int at = int(thread_index) + 32 * G * i;",
    ): "the next bound guards the access",
    (
        "fetch_fours<F, G>(from, step + C < steps ? F : 0, next, thread_index);",
        "from += F;",
    ): "what is fetched behind the last step is not used",
    (
        "for (int first = 0; first < int(Place::kApart); first += height) {",
        "const int top = int(Place::kApart) * r + first;",
    ): "rows that are written anew, or behind p.m",
    (
        "for (int r = 0; r < R; ++r) {",
        "const int row = int(thread_index) / P + int(Place::kApart) * r;",
    ): "row < N guards the access",
    (
        "if (row < N) rows[row * (N / 4) + which * (W / 4) + j] = four_from(v[r], 4 * j);",
        "}",
    ): "the first of the factors of reflectors, which are not used any more",
    (
        "for (int i = 0; i < N; ++i) {",
        "if (rank[c] < p.n && i < p.n) corner[rank[c] * pitch + i] = x[c][i];",
    ): "i < p.n guards the access, and p.n <= N",
    (
        "if (rank[c] < p.n && i < p.n) corner[rank[c] * pitch + i] = x[c][i];",
        "}",
    ): "one more row or column of the tile, inside of it and never read",
    (
        "for (int i = 0; i < N; ++i) {",
        "if (i < p.m) to[i * p.u_row] = T(or_nan(v[c][i], good));",
    ): "i < p.m guards the access, and p.m <= N",
    (
        "for (int j = 0; j < WIDTH / 2; ++j) {",
        "float low = g[j % W];",
    ): "changes a value that the next halving leaves out",
    (
        "for (int target = 0; target < u_cols; ++target) {",
        "if (absent[target] == 0.0f) continue;",
    ): "no column of rank u_cols is ever missing",
    (
        "for (int pass = 0; pass < 3; ++pass) {",
        "float part[R];",
    ): "a third orthogonalisation changes only rounding",
    (
        "for (int r = 0; r < R; ++r) least = r * 32 + int(lane) < m ? min(least, part[r]) : least;",
        "least = simd_min(least);",
    ): "the row's own bound guards the access",
    (
        "for (int r = 0; r < R; ++r) {",
        "int at = r * 32 + int(lane);",
    ): "the row's own bound guards the access",
    (
        "row = at < m && part[r] == least ? min(row, at) : row;",
        "}",
    ): "a row above row m has the least, and the first such row is taken",
    (
        "for (uint round = 0u; round < simdgroups; ++round) {",
        "rotate_across<C, R, VECTORS>(x, v, norm, p.tol, lane, max_cos, max_tan);",
    ): "one more round only rotates more pairs",
    (
        "for (int r = 0; r < R; ++r) {",
        "int i = r * 32 + int(lane);",
    ): "i < p.m or i < p.n guards the access",
    (
        "if (place >= 0 && place < 32) tile[place * pitch + r * 32 + int(lane)] = v[c][r];",
        "}",
    ): "one more column of the tile, inside of it and never read",
    (
        "missing[c] = missing[c] && good && rank[c] < p.n;",
        "any_missing = any_missing || missing[c];",
    ): "a column of rank n is neither completed nor stored",
    (
        "missing[c] = missing[c] && good && rank[c] < p.n;",
        "any_missing = missing[c] ? 1.0f : any_missing;",
    ): "a column of rank n is neither completed nor stored",
    (
        "for (int b = 0; b < R; ++b) {",
        "const int last = min(steps, 32 * b + 32);",
    ): "there are no steps beyond 32 R",
    (
        "for (int s = 0; s < (R > 2 ? 4 : 2); ++s) {",
        "const int across = block ^ s;",
    ): "one more round, of squares that are not there",
    (
        "for (int target = 0; target < u_cols; ++target) {",
        "bool here = false;",
    ): "no column of rank u_cols is ever missing",
    (
        "for (int pass = 0; pass < 2; ++pass) {",
        "F ar[C];",
    ): "a third orthogonalisation changes only rounding",
    (
        "if (TILE) simdgroup_barrier(mem_flags::mem_none);",
        "}",
    ): "lanes share nothing of a tile; the barrier is for registers' sake",
    (
        "for (int i = 0; i < N; ++i) {",
        "if (i < p.n) to[i * p.vt_col] = complex_or_nan<T>(x[c][i], x[c][N + i], good);",
    ): "i < p.n guards the access, and p.n <= N",
    (
        "for (int first = int(simdgroup); first < p.m; first += 8 * int(simdgroups)) {",
        "#pragma unroll",
    ): "each row has a bound of its own",
    (
        "for (int i = 0; i < 8; ++i) {",
        "int r = first + i * int(simdgroups);",
    ): "an entry is looked at twice",
    (
        "for (int e = int(thread_index); e < 672; e += int(threads)) tile[e] = 0.0f;",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
    ): "one more word, which is written before it is read",
    (
        "for (int row = first; row < rows; row += quads * 4) {",
        "#pragma unroll",
    ): "one more tile, of no rows",
    (
        "if (r < diagonal + K) {",
        "#pragma unroll",
    ): "all of these rows are below all diagonals",
    (
        "if (p.height > p.side) w[at + long(p.side)] = r == column + c && r < p.n ? 1.0f : 0.0f;",
        "}",
    ): "a column of V behind the last, never read",
    (
        "for (int r = int(lane); r < side; r += 128) {",
        "#pragma unroll",
    ): "the element has a bound of its own",
    (
        "for (int c = 0; c < present; ++c) {",
        "float y = x[long(IN_ORDER ? c : column[c]) * long(height) + long(r)];",
    ): "columns that vanished are zeros by then",
    (
        "for (int pass = 0; pass < 2; ++pass) {",
        "if (pass > 0) {",
    ): "a third orthogonalisation changes only rounding",
    (
        "for (int of = int(simdgroup); of < target; of += int(simdgroups)) {",
        "device const float* from = x + long(IN_ORDER ? of : column[of]) * long(height);",
    ): "columns that vanished are zeros by then",
    (
        "if (good && column + c < last_column && row + int(lane) < last_row) {",
        "x = from[long(column + c) * height + long(row + int(lane))];",
    ): "the store has the same bound",
    (
        "for (int four = 0; four < parts; four += 4) {",
        "#pragma unroll",
    ): "each slice has a bound of its own",
    (
        "for (int first = int(lane); first < height; first += 128) {",
        "float fr[4];",
    ): "each row has a bound of its own",
    (
        "const int together = L < 4 ? 4 : (L < 16 ? 16 / L : 1);",
        "for (int first = part; first < height / 4; first += L * together) {",
    ): "the same number either way",
    (
        "for (int of = int(simdgroup); of * together < seats / 2; of += int(simdgroups)) {",
        "const int pair = of * together + int(lane) / L;",
    ): "one more step, of lanes that have no pair",
    (
        "for (int top = 0; top < p.n; top += kLengthsRows) {",
        "float total[4][4];",
    ): "rows behind the last have no columns",
    (
        "for (int c = 1; c < C; c += 2) {",
        "#pragma unroll",
    ): "C is even",
    (
        "if (present < n) {",
        "for (int r = int(thread_index); r < n; r += int(threads)) {",
    ): "nothing reads the lengths of rows where no column is missing",
    (
        "for (int c = 0; c < present; ++c) {",
        "float2 z = x[long(column[c]) * long(height) + long(r)];",
    ): "columns that vanished are zeros by then",
    (
        "for (int of = int(simdgroup); of < target; of += int(simdgroups)) {",
        "float g[2] = {0.0f, 0.0f};",
    ): "columns that vanished are zeros by then",
}


def section(name: str) -> tuple[str, ...]:
    """The kernels that a mutant changes."""
    starts = {
        PAIRS: PAIRS_LINE,
        QUARTERS: QUARTERS_LINE,
        GRID: GRID_LINE,
        TWIN: TWIN_LINE,
        BLOCK: BLOCK_LINE,
        COMPLEX: COMPLEX_LINE,
    }
    return next((k for k, first in starts.items() if mutant_line(name) > first), SMALL)


def build(text: str, kernels: tuple[str, ...]) -> Path | str:
    return build_mutant("svd", text, kernels)


def caught(built: Path | str, kernels: tuple[str, ...]) -> str | None:
    """What caught the mutant: generator, compiler, judge or numbers; None if nothing did."""
    return caught_by(built, globals()[VERDICTS[kernels]])


def small_verdict() -> str | None:
    a = np.concatenate(
        [gaussian(9, 7, 6), np.ones((2, 7, 6), np.float32), np.zeros((1, 7, 6), np.float32)]
    )
    for name in SMALL:
        v = VARIANTS[name]
        square = gaussian(v.matrices, 8, 8)
        full = run(workshop(), v, a, u_cols=7)
        short = run(workshop(), v, np.ascontiguousarray(a[:9, :6]), max_sweeps=1)
        what = judged([(a, full), (square, run(workshop(), v, square))], short)
        if what:
            return what
    return None


def behind_verdict() -> str | None:
    """More rows than eight, and no more columns."""
    for name in BEHIND:
        v = VARIANTS[name]
        a, square = gaussian(3, v.n - 3, 6), gaussian(2, v.n, v.n)
        full = run(workshop(), v, a, u_cols=v.n - 3)
        short = run(workshop(), v, a, max_sweeps=1)
        what = judged([(a, full), (square, run(workshop(), v, square))], short)
        if what:
            return what
    return None


def complex_verdict() -> str | None:
    a = (gaussian(5, 7, 6) + 1j * gaussian(5, 7, 6, seed=1)).astype(np.complex64)
    a[3, :, 2:4] = 0.0
    a[4] = 1 + 1j  # with no zeros where vectors are made up
    square = a[:4, :6]
    for name in COMPLEX[:2]:
        v = VARIANTS[name]
        full = run(workshop(), v, a, u_cols=7)
        short = run(workshop(), v, np.ascontiguousarray(square), max_sweeps=1)
        larger = gaussian(v.matrices, 8, 8).astype(np.complex64)
        what = judged([(a, full), (larger, run(workshop(), v, larger))], short)
        if what:
            return what
    # The same, with V in a tile and in double; both simdgroups have a matrix.
    v = VARIANTS[COMPLEX[2]]
    full = run(workshop(), v, a[2:4], u_cols=7)
    short = run(workshop(), v, square[:1], max_sweeps=1)
    larger = gaussian(1, 32, 32).astype(np.complex128)
    return judged([(a[2:4], full), (larger, run(workshop(), v, larger))], short)


def block_verdict() -> str | None:
    v = VARIANTS[BLOCK[0]]
    # Columns that vanish, one that the QR leaves nothing of, and an odd number of sweeps.
    a, square = gaussian(2, 37, 33), gaussian(1, 40, 40)
    a[0, :, 5:8] = 0.0
    a[0, :, 20] = a[0, :, 3]
    a[1] = np.eye(37, 33)
    full = run(workshop(), v, a, u_cols=37)
    if full.findings:
        return "judge"
    short = run(workshop(), v, square, max_sweeps=1)
    return judged([(a, full), (square, run(workshop(), v, square))], short)


def large_verdict() -> str | None:
    """Barriers that only larger sizes have, and bounds that no padding follows."""
    for name in LARGE:
        v = VARIANTS[name]
        a = gaussian(1, v.n, v.n)
        o = run(workshop(), v, a)
        if o.findings or not right(a, o):
            return "judge" if o.findings else "numbers"
    return None


def twin_verdict() -> str | None:
    """Columns that vanish, one that the QR leaves nothing of, padding and none, more of U."""
    a, rank1 = gaussian(2, 37, 33), np.outer(gaussian(80), gaussian(68)).astype(np.float32)[None]
    a[0, :, 5:8] = 0.0
    a[0, :, 20] = a[0, :, 3]
    a[1] = np.eye(37, 33)
    cases = [(a, run(workshop(), VARIANTS[TWIN[0]], a, u_cols=37))]
    cases.append((rank1, run(workshop(), VARIANTS[TWIN[1]], rank1)))
    # Rows that the QR does not reach, weights that have to be made smaller, denormals.
    clusters = hard_matrices(40)["clusters"][:, :36].astype(np.float32)[None]
    cases.append((clusters, run(workshop(), VARIANTS[TWIN[0]], clusters)))
    small = np.full((1, 40, 40), 1e-39, np.float32)
    cases.append((small, run(workshop(), VARIANTS[TWIN[0]], small)))
    if any(o.findings for _, o in cases):
        return "judge"
    for name in TWIN:
        v = VARIANTS[name]
        square = gaussian(1, v.n, v.n)
        whole = run(workshop(), v, square)
        cases.append((square, whole))
        short = run(workshop(), v, square, max_sweeps=1)
        if what := judged(cases, short):
            return what
        # Three sweeps a dispatch.
        parts = run(workshop(), v, square, kept=3)
        if parts.findings or not np.array_equal(parts.u, whole.u):
            return "judge" if parts.findings else "numbers"
        if not np.array_equal(parts.vt, whole.vt):
            return "numbers"
    return None


def twin_large_verdict() -> str | None:
    for name in TWIN_LARGE[::2]:
        v = VARIANTS[name]
        a = gaussian(1, v.n, v.n)
        for transposed in (False, True):
            o = run(workshop(), v, a, transposed=transposed)
            if o.findings or not right(a, o):
                return "judge" if o.findings else "numbers"
    return None


def grid_verdict() -> str | None:
    """Sizes that fill the padding and leave some, slices, columns that vanish, more of U."""
    sim = workshop()
    a, tall = gaussian(2, 72, 64), gaussian(1, 160, 16)
    a[0, :, 5:8] = 0.0
    full = run_grid(sim, a, u_cols=72, slices=2)
    values = run_grid(sim, a, vectors=False)
    one_sweep = run_grid(sim, gaussian(1, 128, 128), sweeps=1)  # whole tiles, no padding
    few_columns = run_grid(sim, gaussian(1, 64, 64), sweeps=1, cores=8)  # no padding either
    if any(o.findings for o in (full, values, one_sweep, few_columns)):
        return "judge"
    # Several pairs, more rows than a tile, all numbers of columns that are reflected together.
    square, zero = gaussian(1, 70, 70), np.zeros((1, 40, 20), np.float32)
    cases = [(a, full), (tall, run_grid(sim, tall, u_cols=18, transposed=True))]
    cases.append((zero, run_grid(sim, zero)))
    cases.append((square, run_grid(sim, square, slices=2, cores=4)))
    taller = gaussian(1, 2100, 2)  # more rows than a panel has in registers
    cases.append((taller, run_grid(sim, taller)))
    if not np.array_equal(solved_slices(5), solved_slices(1)):
        return "numbers"
    if not np.allclose(values.s, full.s, rtol=1e-5, atol=1e-5):
        return "numbers"
    return judged(cases, one_sweep)


def solved_slices(slices: int) -> np.ndarray:
    """The rotations by svd_grid_solve of one Gram matrix in so many parts; their sum is exact."""
    whole = np.random.default_rng(0).integers(-9, 9, 1024)
    parts = np.zeros((slices, 1024), np.float32)
    for i in range(slices):
        parts[i] = (whole + i) // slices / 64.0
    blocks = np.zeros((2, KEPT), np.float32)
    blocks[:, :32] = 1.0
    turns = np.zeros((64, 64), np.float32)
    found = workshop().launch(
        "svd_grid_solve",
        grid=1,
        threads=288,
        buffers={
            **{0: parts, 1: blocks, 2: turns, 3: np.zeros(3, np.float32)},
            4: np.full(1, 2, np.int32),
        },
        params=(5, GRID_PARAMS["SvdGridParams"](side=64, n=64, slices=slices, step=1, tol=1e-6)),
        threadgroup_bytes=[SOLVE_BYTES],
    )
    return turns if found == [] else np.full_like(turns, np.nan)


def pairs_verdict() -> str | None:
    """Sizes that fill the padding and leave some, columns that vanish, more of U, pieces."""
    sim = workshop()
    a, whole = random_matrix((2, 40, 33), "complex64"), random_matrix((1, 36, 32), "complex64")
    a[:, :, 5:8] = 0.0
    a[1, :, 3] *= np.float32(1e-14)
    full = run_pairs(sim, a, u_cols=40, plan={"columns": 20, "rounds": 50})
    if full.findings:
        return "judge"
    values = run_pairs(sim, a, plan={"vectors": False})
    # More rows than a lane has at a time, more pairs than simdgroups.
    one_sweep = run_pairs(sim, random_matrix((1, 66, 66), "complex64"), plan={"sweeps": 1})
    if values.findings or one_sweep.findings:
        return "judge"
    tall, zero = random_matrix((1, 45, 3), "complex64"), np.zeros((1, 4, 3), np.complex64)
    cases = [(a, full), (whole, run_pairs(sim, whole)), (zero, run_pairs(sim, zero))]
    cases.append((tall, run_pairs(sim, tall, u_cols=9, transposed=True)))
    two = run_pairs(sim, random_matrix((1, 3, 2), "complex64"), plan={"sweeps": 1})
    if two.sweeps.tolist() != [1]:  # of one round each
        return "numbers"
    if not np.allclose(values.s, full.s, rtol=1e-5, atol=1e-5):
        return "numbers"
    return judged(cases, one_sweep)


def fused_verdict() -> str | None:
    """Pairs that fill simdgroups and that do not, an odd number of columns, pieces of sweeps."""
    sim = workshop()
    a, square = gaussian(2, 40, 33), gaussian(1, 64, 64)
    a[0, :, 5:8] = 0.0
    full = np.eye(64, dtype=np.float32)[None]  # no padding
    cases = [(full, run_fused(sim, FUSED_ROWS["svd_fused_n512"], full))]
    for row in FUSED_ROWS.values():
        cases.append((a, run_fused(sim, row, a, u_cols=40, rounds=50)))
        one_sweep = run_fused(sim, row, square, sweeps=1)
        if what := judged(cases, one_sweep):
            return what
    whole = run_fused(sim, FUSED_ROWS["svd_fused_n256"], a, u_cols=40)
    values = run_fused(sim, FUSED_ROWS["svd_fused_n256"], a, vectors=False)
    if whole.findings or values.findings:
        return "judge"
    first = cases[1][1]
    same = np.array_equal(first.u, whole.u) and np.array_equal(first.s, values.s)
    return None if same else "numbers"


def quarters_verdict() -> str | None:
    """Columns that vanish, matrices that are done before others, padding and none, more of U."""
    sim = workshop()
    a, square = gaussian(3, 40, 33), gaussian(1, 256, 256)
    a[0, :, 5:8] = 0.0
    a[1] = np.eye(40, 33)
    a[2, 3, 4] = np.nan
    full = run_quarters(sim, a, u_cols=40)
    values = run_quarters(sim, a, vectors=False)
    if full.findings or values.findings:
        return "judge"
    if full.status.tolist() != [0, 0, 3] or not np.array_equal(values.s[:2], full.s[:2]):
        return "numbers"
    full = Outcome(*(x[:2] for x in (full.u, full.s, full.vt)), full.status[:2], *(None,) * 2, [])  # type: ignore[arg-type]
    cases = [(a[:2], full), (square, run_quarters(sim, square))]
    return judged(cases, run_quarters(sim, gaussian(1, 40, 40), sweeps=1))


def judged(cases: list[tuple[np.ndarray, Outcome]], short: Outcome) -> str | None:
    """``short`` had one sweep, which is not enough."""
    if short.findings or any(o.findings for _, o in cases):
        return "judge"
    if not all(right(a, o) for a, o in cases):
        return "numbers"
    one_sweep = (short.status == 2).all() and (short.sweeps == 1).all()
    return None if one_sweep else "numbers"


def right(a: np.ndarray, o: Outcome) -> bool:
    if o.status.any() or not all(np.isfinite(x).all() for x in (o.u, o.s, o.vt)):
        return False
    return max(ratios(a, o).values()) < 5


@pytest.mark.parametrize(
    ("kernels", "every"),
    # A sixth of those of the smallest kernels is what there is time for every time.
    [
        (SMALL, 6),
        *(pytest.param(k, 1, marks=pytest.mark.slow) for k in KINDS),
    ],
    ids=["sixth", "small", "block", "twin", "complex", "grid", "quarters", "pairs"],
)
def test_mutants_are_caught(
    kernels: tuple[str, ...], every: int, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {k: t for k, t in mutants().items() if section(k) == kernels}
    mine = {}
    for kind in ("barrier", "bound", "space"):
        of_kind = [(k, t) for k, t in named.items() if k.startswith(f"{kind}:")]
        assert of_kind
        mine |= dict(of_kind[::every])

    # Beside the kernels as they are, those that the line is in.
    unit = only(*kernels)
    workshop().load(only(*kernels, *GRID) if kernels in (PAIRS, TWIN) else unit)
    of_line = kernels_by_line(SOURCE, unit)

    def build_changed(name: str) -> Path | str:
        return build(mine[name], of_line(mutant_line(name)))

    def verdict(name: str, built: Path | str) -> str | None:
        what = caught(built, kernels)
        if what is None and kernels == SMALL:
            what = caught(build(mine[name], BEHIND), BEHIND)
        if what is None and kernels == SMALL:  # what complex columns share
            what = caught(build(mine[name], COMPLEX), COMPLEX)
        if what is None and kernels == BLOCK:
            what = caught(build(mine[name], LARGE), LARGE)
        if what is None and kernels == TWIN:
            what = caught(build(mine[name], TWIN_LARGE), TWIN_LARGE)
        if what is None and kernels == TWIN:  # code that both use
            what = caught(build(mine[name], GRID), GRID)
        if what is None and kernels == GRID:  # code that both use
            what = caught(build(mine[name], PAIRS), PAIRS)
        if what is None and kernels == TWIN:  # code that both use
            what = caught(build(mine[name], QUARTERS), QUARTERS)
        if what is None and kernels == PAIRS:  # the same, with lanes that have no pair
            what = caught(build(mine[name], FUSED), FUSED)
        return what

    check_mutants(mine, SOURCE, build_changed, verdict, EQUIVALENT, capsys)
    # Unchanged, the same trial passes.
    assert caught(build(SOURCE, kernels), kernels) is None


@pytest.mark.parametrize("stem", ["svd", "gemv", "qr", "rsvd"])
def test_every_equivalent_mutant_is_a_mutant(stem: str) -> None:
    judge = import_module("test_kernels_judge" if stem == "svd" else f"test_kernels_{stem}_judge")
    pairs = line_pairs(judge.SOURCE)
    assert set(judge.EQUIVALENT) <= {pairs[mutant_line(name) - 1] for name in judge.mutants()}
