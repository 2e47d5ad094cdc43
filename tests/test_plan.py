"""Plans for devices, swept over shapes, dtypes, flags and every GPU of the table."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxmetal_linalg import _native
from tools.msl.layout import (
    MAX_SWEEPS,
    Dispatch,
    FusedVariant,
    GridPlan,
    PairsPlan,
    fused_variants,
    svd_variants,
)
from tools.msl.parse import parse_file
from tools.msl.simulate import ROOT, compiler

UNIT = parse_file(ROOT / "kernels" / "svd.metal", "kernels/svd.metal")
ROWS = {v.name: v for v in svd_variants(UNIT)}
FUSED = fused_variants(UNIT)
(QUARTERS,) = (v for v in FUSED if v.quarters)
STORAGE = {"float32": "float", "float16": "half", "bfloat16": "bfloat"}
REGISTERS_ONLY = {"complex64": "float2", "float64": "double", "complex128": "double2"}
SIDES = (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 40, 41, 64, 65, 96, 97, 128)
pytestmark = pytest.mark.usefixtures("sim")


def plan(
    caps: str,
    m: int,
    n: int,
    dtype: str = "float32",
    uv: bool = True,
    full: bool = False,
    batch: int = 5,
    variant: str = "",
    **changes: Any,
) -> dict[str, Any]:
    problem = {
        **{"batch": batch, "m": m, "n": n, "dtype": dtype, "compute_uv": uv},
        **{"full_matrices": full, "method": "auto", "variant": variant, "max_sweeps": 40},
        **{"device": "sim", "caps": caps, **changes},
    }
    return _native.plan("svd", problem)


def check(answer: dict[str, Any], caps: dict[str, Any], m: int, n: int, batch: int) -> str:
    """The plan launches one row that holds the problem, within the limits; returns its kernel.

    In pieces of one size, the last of which may be smaller, where a watchdog guards the GPU.
    """
    assert answer["route"] == "kernel", answer
    kernel = answer["kernels"][0]
    row = ROWS[kernel]
    assert answer["kernels"][1:] == ([row.rows_name] if row.rows_name else [])
    assert kernel in answer["reason"]
    assert row.n >= max(m, n)
    # tools/msl/layout.py, which launches the kernels in other tests, says the same.
    assert answer["group"] == [row.threads, 1, 1]
    grid, launches = answer["grid"][0], answer["launches"]
    pieces, other = divmod(launches, 2 * len(row.sweeps(40)) if row.rows_name else 1)
    assert not other
    assert answer["grid"] == [grid, 1, 1]
    assert grid * (pieces - 1) < -(-batch // row.matrices) <= grid * pieces
    assert pieces == 1 or caps["max_submission_work"] > 0 or row.twin
    assert answer["threadgroup_bytes"] == max(row.scratch_bytes, row.rows_scratch_bytes)
    assert row.threads <= caps["max_threads_per_threadgroup"]
    assert row.threads % caps["simd_width"] == 0
    assert answer["threadgroup_bytes"] <= caps["max_threadgroup_bytes"]
    assert answer["scratch_bytes"] == grid * row.device_scratch_bytes <= 2**29
    return kernel


def test_sweep() -> None:
    reached = set()
    for name, caps in _native.caps().items():
        for m, n, dtype, uv in itertools.product(SIDES, SIDES, STORAGE, (True, False)):
            for full in (True, False) if uv else (False,):
                kernel = check(plan(name, m, n, dtype, uv, full), caps, m, n, 5)
                assert ROWS[kernel].storage == STORAGE[dtype]
                assert ROWS[kernel].vectors == uv
                # No smaller one of the same kind would do.
                smaller = [
                    r.n
                    for r in ROWS.values()
                    if r.name.rpartition("_")[0] == kernel.rpartition("_")[0]
                ]
                assert not any(max(m, n) <= s < ROWS[kernel].n for s in smaller)
                reached.add(kernel)
    # What auto leaves out is measured slower, and is reached by name.
    by_name = {
        check(plan("apple-m1", n, n, d, uv, variant=v), _native.caps()["apple-m1"], n, n, 5)
        for v in ("xor", "ring", "block8", "block16", "twin")
        for n in {r.n for r in ROWS.values() if r.name.startswith(f"svd_{v}_") and not r.complex}
        for d in STORAGE
        for uv in (True, False)
    }
    for name, caps in _native.caps().items():
        assert caps["float64"] == (caps["device"] == "cuda")
        dtypes = [*REGISTERS_ONLY] if caps["float64"] else ["complex64"]
        for dtype, uv in itertools.product(dtypes, (True, False)):
            for m, n in itertools.product((1, 7, 9, 16, 32), (2, 8, 17, 32)):
                kinds = ["", "xor"]
                if dtype == "complex64" and (max(m, n) <= 16 or not uv):
                    kinds.append("ring")
                for kind in kinds:
                    answer = plan(name, m, n, dtype, uv, uv, variant=kind)
                    kernel = check(answer, caps, m, n, 5)
                    assert ROWS[kernel].storage == REGISTERS_ONLY[dtype]
                    assert ROWS[kernel].vectors == uv
                    by_name.add(kernel)
    assert by_name == set(ROWS)
    assert {k.split("_")[1] for k in reached} == {"xor", "ring", "block8", "twin"}


def check_grid(
    answer: dict[str, Any], caps: dict[str, Any], m: int, n: int, batch: int, **options: Any
) -> set[str]:
    """The plan is the dispatches of "grid" as tools/msl/layout.py has them; its kernels."""
    assert answer["route"] == "kernel", answer
    grid = GridPlan.on(caps["cores"], batch, max(m, n), min(m, n), **options)
    assert answer["variant"] == (grid.fused.variant if grid.fused else "grid")
    assert answer["scratch_bytes"] == sum(-(-b // 256) * 256 for b in grid.scratch.values())
    check_steps(answer, caps, grid.steps())
    return set(answer["kernels"])


def test_sweep_of_larger_sizes() -> None:
    reached = set()
    shapes = ((129, 1), (193, 96), (1, 500), (300, 257), (257, 1000), (2048, 2048), (100_000, 3))
    for name, caps in _native.caps().items():
        for (m, n), batch in itertools.product(shapes, (1, 64)):
            for dtype, uv in itertools.product(STORAGE, (True, False)):
                full = uv and (m == n or max(m, n) < 1000)
                if max(m, n) > 1000 and dtype != "float32":
                    continue
                reached |= check_grid(
                    plan(name, m, n, dtype, uv, full, batch, max_submission_work=10**15),
                    *(caps, m, n, batch),
                    u_cols=max(m, n) if full else min(m, n),
                    vectors=uv,
                    storage=STORAGE[dtype],
                )
    kernels = {i.host_name for i in UNIT.instances if i.host_name.startswith("svd_grid_")}
    assert reached == kernels
    one = plan("nvidia-h200", 8, 8, variant="grid")
    assert "by name" in one["reason"]
    asked = plan("nvidia-h200", 40, 40, method="block_jacobi", batch=64)
    assert asked["variant"] == "grid"
    assert 'method="block_jacobi"' in asked["reason"]
    short, long = (plan("apple-m1", 200, 200, max_sweeps=k)["launches"] for k in (3, 40))
    # Of 7 rounds in three dispatches, and a check.
    assert long - short == (MAX_SWEEPS - 3) * (3 * (2 * 4 - 1) + 1)


def test_larger_sizes_in_pieces() -> None:
    """A round of all matrices that would hold an Apple GPU too long is done for some at a time."""
    whole, part, rest = (plan("apple-m1", 2048, 2048, batch=k)["launches"] for k in (100, 57, 43))
    assert whole == part + rest
    assert plan("nvidia-h200", 2048, 2048, batch=100)["launches"] < whole
    scratch = [plan("apple-m1", 2048, 2048, batch=k)["scratch_bytes"] for k in (57, 100, 200)]
    assert len(set(scratch)) == 1


def fused_row(variant: str, n: int) -> FusedVariant:
    """The smallest that holds so many columns."""
    return min((v for v in FUSED if v.variant == variant and v.n >= n), key=lambda v: v.n)


def test_sweep_of_fused() -> None:
    reached = set()
    kinds = ("fused", "fused16", "quarters")
    shapes = ((1, 1), (40, 33), (256, 300), (257, 257), (1024, 600), (1025, 3000), (2048, 2048))
    for name, caps in _native.caps().items():
        for (m, n), variant, uv in itertools.product(shapes, kinds, (True, False)):
            if variant == "quarters" and min(m, n) > QUARTERS.n:
                continue
            row = fused_row(variant, min(m, n))
            answer = plan(name, m, n, uv=uv, variant=variant, max_submission_work=10**15)
            options = {"u_cols": min(m, n), "vectors": uv, "fused": row}
            options |= {"sweeps": MAX_SWEEPS if row.quarters else 40}
            reached |= check_grid(answer, caps, m, n, 5, **options)
            assert row.name in answer["reason"]
            assert "by name" in answer["reason"]
    assert {v.name for v in FUSED} <= reached
    for dtype in STORAGE:
        assert plan("apple-m1", 300, 200, dtype, variant="fused")["route"] == "kernel"
    for variant, row in (("fused", FUSED[0]), ("quarters", QUARTERS)):
        assert plan("nvidia-h200", 40, 40, variant=variant, max_sweeps=0)["launches"] == len(
            GridPlan.on(132, 5, 40, 40, 40, fused=row, sweeps=0).steps()
        )


def test_rows_of_fused_fill_a_threadgroup() -> None:
    """The seed of this project names them: N, and lanes for each of the N / 2 pairs of a round."""
    table = {v.n: v.per_pair for v in FUSED if v.variant == "fused"}
    assert table == {256: 8, 512: 4, 1024: 2, 2048: 1}
    for v in set(FUSED) - {QUARTERS}:
        assert v.simdgroups(v.n) == 32


def test_fused_in_pieces() -> None:
    """No dispatch that would hold an Apple GPU too long, though but one core works on a matrix."""
    caps = _native.caps()["apple-m1"]

    def rounds(batch: int, **changes: Any) -> int:
        answers = [
            plan("apple-m1", 512, 512, batch=batch, variant="fused", max_sweeps=k, **changes)
            for k in (40, 0)
        ]
        return int(answers[0]["launches"] - answers[1]["launches"])

    each = 256 * (6 * 512 + 8 * 1024) * caps["cores"]
    most = int(caps["max_submission_work"] // each)
    assert rounds(1) == rounds(8) == -(-40 * 511 // most) > 1
    assert rounds(16) > rounds(8)
    assert rounds(1, max_submission_work=1) == 40 * 511
    assert plan("nvidia-h200", 512, 512, batch=5000, variant="fused")["launches"] < 200


def check_steps(answer: dict[str, Any], caps: dict[str, Any], steps: Sequence[Dispatch]) -> None:
    assert answer["launches"] == len(steps)
    assert answer["kernels"] == list(dict.fromkeys(s.kernel for s in steps))
    for s in steps:
        assert 0 < s.groups < 2**31
        assert s.threads % caps["simd_width"] == 0
        assert s.threads <= caps["max_threads_per_threadgroup"]
        assert sum(s.threadgroup_bytes) <= caps["max_threadgroup_bytes"]
        assert len(s.buffers) < caps["max_buffers"]
    largest = max(steps, key=lambda s: sum(s.threadgroup_bytes))
    assert answer["threadgroup_bytes"] == sum(-(-b // 16) * 16 for b in largest.threadgroup_bytes)
    assert answer["grid"] == [largest.groups, 1, 1]
    assert answer["group"] == [largest.threads, 1, 1]


def test_sweep_of_larger_complex_sizes() -> None:
    shapes = ((33, 1), (33, 33), (1, 40), (64, 50), (65, 65), (70, 300), (300, 256), (1024, 1000))
    for name, caps in _native.caps().items():
        for (m, n), batch, uv in itertools.product(shapes, (1, 64), (True, False)):
            full = uv and max(m, n) < 1000
            answer = plan(name, m, n, "complex64", uv, full, batch, max_submission_work=10**15)
            pairs = PairsPlan(batch, max(m, n), min(m, n), max(m, n) if full else min(m, n), uv)
            assert answer["route"] == "kernel", answer
            assert answer["variant"] == "pairs"
            check_steps(answer, caps, pairs.steps())
            scratch = sum(-(-b // 256) * 256 for b in pairs.scratch.values())
            assert answer["scratch_bytes"] == scratch
    one = plan("nvidia-h200", 8, 8, "complex64", variant="pairs")
    assert (one["variant"], "by name" in one["reason"]) == ("pairs", True)
    asked = plan("nvidia-h200", 8, 8, "complex64", method="block_jacobi")
    assert (asked["variant"], "was asked for" in asked["reason"]) == ("pairs", True)
    assert plan("nvidia-h200", 40, 40, "complex64", max_sweeps=0)["launches"] == 5


def test_larger_complex_sizes_in_pieces() -> None:
    """No dispatch that would hold an Apple GPU too long, though but one core works on a matrix."""
    caps = _native.caps()["apple-m1"]

    def pieces(n: int, batch: int) -> int:
        return int(plan("apple-m1", n, n, "complex64", batch=batch)["launches"])

    assert pieces(64, 64) == pieces(128, 1) == 6
    assert pieces(1024, 1) > 100
    # Eight cores do eight as fast as one; more take longer.
    assert pieces(1024, 8) == pieces(1024, 1) < pieces(1024, 16)
    # Where one round of all is too much, some matrices at a time.
    one_round = 512 * (16 + 64) * 1024
    most = int(caps["max_submission_work"] / one_round)
    assert pieces(1024, most + 5) == pieces(1024, most) + pieces(1024, 5)
    assert plan("nvidia-h200", 1024, 1024, "complex64", batch=5000)["launches"] == 6


@pytest.mark.parametrize("batch", [1, 2, 15, 16, 17, 10_000, 2**31 - 1])
def test_grid_covers_the_batch(batch: int) -> None:
    caps = _native.caps()["apple-m4-max"]
    for n in (4, 8, 12, 32, 60):
        check(plan("apple-m4-max", n, n, batch=batch), caps, n, n, batch)


def test_twin_above_the_other_rows() -> None:
    """Of many columns, for which it was measured faster than "grid"."""
    for name, caps in _native.caps().items():
        registers = caps["device"] == "cuda"
        for m, n, fits in (
            *((129, 129, 144), (144, 97, 144), (97, 130, 144), (145, 145, 192), (192, 97, 192)),
            *((144, 96, 0), (192, 96, 0), (193, 192, 0)),
        ):
            for uv, batch in itertools.product((True, False), (1, 500)):
                answer = plan(name, m, n, uv=uv, batch=batch)
                if registers and fits:
                    assert ROWS[check(answer, caps, m, n, batch)].n == fits
                else:
                    assert answer["variant"] == "grid", (name, m, n, batch)
        assert plan(name, 129, 129, method="block_jacobi")["variant"] == "grid"
        kind = plan(name, 144, 144, "bfloat16", batch=64)
        assert kind["kernels"][0] == "svd_twin_vectors_bf16_n192" or not registers


def test_quarters_above_twin() -> None:
    """Where it was measured faster than "grid"; for more columns registers do not suffice."""
    for name, caps in _native.caps().items():
        for m, n in ((193, 193), (256, 256), (1000, 256), (193, 300), (193, 192), (257, 257)):
            for dtype, uv, batch in itertools.product(STORAGE, (True, False), (1, 70)):
                answer = plan(name, m, n, dtype, uv, batch=batch, max_submission_work=10**15)
                row = QUARTERS if caps["device"] == "cuda" and 192 < min(m, n) <= 256 else None
                options = {"u_cols": min(m, n), "vectors": uv, "storage": STORAGE[dtype]}
                check_grid(answer, caps, m, n, batch, fused=row, **options)
        assert plan(name, 200, 200, method="block_jacobi")["variant"] == "grid"
        assert plan(name, 200, 200, "complex64")["variant"] == "pairs"


def test_large_batches_share_scratch_memory() -> None:
    """In pieces of two matrices a core, as often as they fit into 512 MB."""
    caps = _native.caps()["nvidia-h200"]
    for n, pieces in ((64, 1), (64, 3), (128, 3)):
        together = 2 * caps["cores"]
        row = ROWS[f"svd_twin_vectors_f32_n{n}"]
        piece = 2**29 // row.device_scratch_bytes // together * together
        for more in (0, 1):
            batch = pieces * piece + more
            answer = plan("nvidia-h200", n, n, batch=batch)
            check(answer, caps, n, n, batch)
            assert answer["launches"] == 4 * (pieces + more)
    # A sweep more than the first two launches have.
    for sweeps, launches in ((1, 2), (12, 2), (13, 4), (1000, 4)):
        assert plan("nvidia-h200", 128, 128, max_sweeps=sweeps)["launches"] == launches


def test_mapping_follows_the_caps() -> None:
    for name, caps in _native.caps().items():
        dear = "xor" if caps["device"] == "metal" else "ring"
        large = "block8" if caps["device"] == "metal" else "twin"
        # Where ring has a size between xor's, and is for real matrices.
        between = {9: "ring", 12: "ring", 17: "ring", 24: "ring"}
        small = (*between.items(), (8, "xor"), (13, dear), (16, dear), (25, "xor"), (32, "xor"))
        few = 2 * caps["cores"]  # or not known
        single = "block8" if few else large
        for n, row in (*small, (33, single), (64, single), (65, large), (128, large)):
            assert plan(name, n, n)["variant"] == row, (name, n)
            row = row if n <= 32 else "pairs"
            row = (dear if n <= 16 else "xor") if n in between else row
            assert plan(name, n, n, "complex64")["variant"] == row, (name, n)
        values = ((8, "xor"), (13, dear), (16, dear), (25, dear), (32, dear), (33, large))
        for n, row in (*between.items(), *values):
            assert plan(name, n, n, uv=False)["variant"] == row, (name, n)
            row = row if n <= 32 else "pairs"
            row = dear if n in between else row
            assert plan(name, n, n, "complex64", uv=False)["variant"] == row, (name, n)
        for batch, row in ((max(few, 1), single), (few + 1, large)):
            assert plan(name, 64, 64, batch=batch)["variant"] == row, (name, batch)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"m": 129, "variant": "block8"}, "up to 128 for variant block8 on the GPU kernels"),
        ({"n": 1000, "variant": "xor"}, "got 8x1000"),
        ({"dtype": "float64"}, "got float64"),
        ({"dtype": "complex64", "m": 33, "variant": "xor"}, "up to 32 for variant xor .*got 33x8"),
        ({"dtype": "complex64", "n": 17, "variant": "ring"}, "up to 16 for variant ring .*8x17"),
        ({"dtype": "complex64", "variant": "grid"}, "expected one of xor, ring, pairs"),
        (
            {"variant": "pairs"},
            "one of xor, ring, block8, block16, twin, grid, fused, fused16, quarters on",
        ),
        ({"dtype": "complex64", "variant": "fused"}, "expected one of xor, ring, pairs on"),
        (
            {"variant": "fused", "m": 2049, "n": 2100},
            r"min\(m, n\) up to 2048 for variant fused on .*got 2049x2100",
        ),
        ({"dtype": "complex64", "m": 4000, "n": 4000, "batch": 2**24}, "a smaller batch"),
        ({"dtype": "complex128"}, "float32 or complex64 .*got complex128"),
        ({"method": "lapack"}, "argument method: expected auto, jacobi or block_jacobi"),
        ({"variant": "column"}, "expected one of xor, ring, block8, block16, twin, grid, fused"),
        ({"m": 4000, "n": 4000, "batch": 2**20}, "a smaller batch"),
        ({"variant": "ring", "m": 33}, "up to 32 for variant ring"),
        ({"batch": 2**31}, "at most 2147483647 matrices"),
    ],
)
def test_no_kernel(changes: dict[str, Any], text: str) -> None:
    answer = plan("apple-m1", **{"m": 8, "n": 8, **changes})
    assert answer["route"] == "none"
    assert answer["launches"] == 0
    assert re.search(text, answer["reason"])
    assert "Use device host" in answer["reason"]


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_no_kernel_in_double(dtype: str) -> None:
    for changes, text in (
        ({"m": 33}, f"up to 32 for {dtype} .*got 33x8"),
        ({"method": "block_jacobi"}, "method block_jacobi"),
        ({"variant": "grid"}, "expected one of xor on"),
        ({"variant": "fused"}, "expected one of xor on"),
        ({"variant": "xor", "n": 33}, "up to 32 for variant xor"),
    ):
        answer = plan("nvidia-h200", **{"m": 8, "n": 8, "dtype": dtype, **changes})
        assert answer["route"] == "none"
        assert re.search(text, answer["reason"])


def test_table_of_gpus() -> None:
    caps = _native.caps()
    families = {row["family"] for row in caps.values() if row["device"] == "metal"}
    assert families == {"apple7", "apple8", "apple9", "apple10"}
    assert {"nvidia-a100", "nvidia-h200"} <= set(caps)
    for name, row in caps.items():
        assert row["name"] == name
        assert row["simd_width"] == 32
        assert row["cores"] > 0 or name == "nvidia"  # any of them
        if row["device"] == "metal":
            limits = [row[k] for k in ("max_threadgroup_bytes", "max_buffers", "max_params_bytes")]
            assert limits == [32768, 31, 4096]


PROGRAM = r"""
// Plans on a device that only writes down what it is asked.
#include "csrc/plan.h"

#include <cstdio>
#include <thread>

using namespace jml;
int failures = 0;
std::string log_text;
int now = 0, most = 0;

struct FakeKernel : Kernel {};
struct Fake : Device {
  Caps limits;
  FakeKernel kernel;
  std::vector<std::byte> memory;
  const Caps& caps() const override { return limits; }
  Result<const Kernel*> compile(const std::string& source,
                                const std::vector<ConstantValue>&) override {
    if (source == "missing") return {nullptr, "no kernel named missing"};
    log_text += "compile " + source + ";";
    return {&kernel, std::nullopt};
  }
  Result<Buffer> scratch(int64_t bytes) override {
    memory.resize(size_t(bytes));
    log_text += "scratch " + std::to_string(bytes) + ";";
    return {{0, memory.data(), bytes}, std::nullopt};
  }
  Status launch(const Kernel&, Size3 grid, Size3 group, const std::vector<Buffer>& buffers,
                const Params& params, void*) override {
    most = std::max(most, ++now);
    std::this_thread::yield();
    log_text += "launch " + std::to_string(grid.x) + "x" + std::to_string(group.x);
    for (const Buffer& b : buffers) {
      auto* at = static_cast<std::byte*>(b.data);
      const bool own = !memory.empty() && at >= memory.data() && at < memory.data() + memory.size();
      log_text += " " + std::to_string(b.index) + (own ? "=scratch+" : "=call+") +
                  std::to_string(own ? at - memory.data() : 0) + ":" + std::to_string(b.bytes);
    }
    log_text += " params " + std::to_string(params.index) + ":";
    log_text += std::to_string(params.bytes) + ";";
    --now;
    return grid.x == 99 ? Status("grid 99 refused") : std::nullopt;
  }
  Status synchronize() override {
    log_text += "sync;";
    return std::nullopt;
  }
};

void expect(const std::string& got, const std::string& want) {
  if (got == want) return;
  std::fprintf(stderr, "got  %s\nwant %s\n", got.c_str(), want.c_str());
  ++failures;
}

Step step(const char* kernel, uint32_t groups, uint32_t threads) {
  Step s;
  s.kernel = kernel;
  s.grid.x = groups;
  s.group.x = threads;
  s.args = {{0, 1, 8, 16}, {1, -1, 32, 64}};
  s.params_index = 2;
  s.params.resize(12);
  return s;
}

int main() {
  char first[4], second[64];
  const std::vector<CallBuffer> buffers = {{first, 4}, {second, 64}};
  auto device = std::make_unique<Fake>();
  device->limits.name = "small";
  device->limits.max_threads_per_threadgroup = 256;
  device->limits.max_threadgroup_bytes = 1000;
  device->limits.max_buffers = 3;
  device->limits.max_params_bytes = 16;
  const Caps caps = device->limits;
  Runner runner(std::move(device));

  DevicePlan plan;
  plan.steps = {step("a", 3, 64), step("b", 1, 32), step("a", 2, 64)};
  plan.scratch_bytes = 100;
  expect(runner.prepare(plan).value_or(""), "");
  expect(log_text, "compile a;compile b;");
  log_text.clear();
  expect(runner.run(plan, buffers).value_or(""), "");
  const std::string bound = " 0=call+0:16 1=scratch+32:64 params 2:12;";
  const std::string run =
      "launch 3x64" + bound + "launch 1x32" + bound + "launch 2x64" + bound + "sync;";
  expect(log_text, "scratch 100;" + run);
  log_text.clear();
  runner.run(plan, buffers);
  expect(log_text, run);  // neither compiled nor allocated again

  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) threads.emplace_back([&] { runner.run(plan, buffers); });
  for (std::thread& t : threads) t.join();
  expect(std::to_string(most), "1");
  expect(launches_json(), "{\"a\": 20, \"b\": 10}");

  auto refused = [&](auto change) {
    DevicePlan p = plan;
    change(p);
    return runner.run(p, buffers).value_or("");
  };
  using P = DevicePlan&;
  expect(refused([](P p) { p.steps[0].group.x = 512; }),
         "a: threads per threadgroup: 512 exceed the 256 of small");
  expect(refused([](P p) { p.steps[1].group.x = 40; }),
         "b: threads per threadgroup: 40 are no multiple of the simdgroup's 32 of small");
  expect(refused([](P p) { p.steps[0].threadgroup_bytes = {500, 497}; }),
         "a: threadgroup bytes: 1024 exceed the 1000 of small");
  expect(refused([](P p) { p.steps[0].params.resize(20); }),
         "a: params bytes: 20 exceed the 16 of small");
  expect(refused([](P p) { p.steps[0].args.push_back({3, 0, 0, 4}); }),
         "a: buffers: 4 exceed the 3 of small");
  expect(refused([](P p) { p.steps[0].grid.x = 0; }), "a: empty grid");
  expect(refused([](P p) { p.steps[0].kernel = "missing"; }), "no kernel named missing");
  expect(refused([](P p) { p.steps[0].args[0].operand = 2; }),
         "a: argument 0: the call has no operand 2");
  expect(refused([](P p) { p.steps[0].args[0].offset = 60; }),
         "a: argument 0: bytes 60 to 76 are outside of the 64 of its buffer");
  expect(refused([](P p) { p.scratch_bytes = 90; }),
         "a: argument 1: bytes 32 to 96 are outside of the 90 of its buffer");
  log_text.clear();
  expect(refused([](P p) { p.steps[1].grid.x = 99; }), "grid 99 refused");
  expect(log_text, "launch 3x64" + bound + "launch 99x32" + bound + "sync;");

  expect(make_device({"moon", caps, {}}).error.value_or(""),
         "device moon is not in this library");
  for (const std::string& name : device_names()) {
    if (make_device({name, caps, {}}).error && name == "sim") ++failures;
  }
  return failures;
}
"""


def test_steps_are_checked_and_carried_out(tmp_path: Path) -> None:
    source, program = tmp_path / "plan.cc", tmp_path / "plan"
    source.write_text(PROGRAM)
    # Of the devices only the simulator: the others need their vendors' libraries.
    files = [
        str(ROOT / "csrc" / f)
        for f in ("plan.cc", "json.cc", "device_sim.cc", "device_metal_absent.cc")
    ]
    command = [compiler(), "-std=c++20", "-O1", "-pthread", f"-I{ROOT}", str(source), *files]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
