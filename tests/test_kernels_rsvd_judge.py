"""Mutants of kernels/rsvd.metal: the simulator notices every barrier, bound and address space."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness import Kernels, check_mutants_of_kernels, mutants_of, part_of
from test_kernels_rsvd import (
    KERNELS,
    SOURCE,
    UNIT,
    check_bases,
    check_halves,
    check_products,
    check_scan,
    check_triangle,
)

from tools.msl.simulate import Simulator, workshop

CODE_START = SOURCE.index("#ifndef JM_HOST\n", SOURCE.index("#define RSVD_SQUARE_VARIANTS("))


# What is judged together, by which trial.
PRODUCTS = (*(k for k in KERNELS if "product" in k and "bf16" not in k), "rsvd_sum")
SCANS = (
    *("rsvd_scan_f32", "rsvd_scan_f16", "rsvd_scan_bf16", "rsvd_scale"),
    *("rsvd_ones", "rsvd_values"),
)
BASES = tuple(k for k in KERNELS if "factor" in k or "bound" in k)
TRIALS: tuple[tuple[tuple[str, ...], Callable[[Simulator], str | None]], ...] = (
    (PRODUCTS, lambda sim: check_products(sim, small=True)),
    (SCANS, check_scan),
    (BASES, check_bases),
    (("rsvd_triangle",), check_triangle),
    (("rsvd_split", "rsvd_pieces_f16", "rsvd_pieces_bf16", "rsvd_gather"), check_halves),
)


def mutants() -> dict[str, str]:
    return mutants_of(SOURCE, CODE_START, once=True)


# Mutants that change nothing that matters: the mutated line and the one after it, and the reason.
EQUIVALENT = {
    (
        "y = k < 23 ? 0.0f : y;",
        "return (bits >> 31) != 0u ? -y : y;",
    ): "a denormal is nothing beside 2^104",
    (
        "if (units < 8388608.0f) return as_type<float>(uint(units + 0.5f));",
        "return as_type<float>(as_type<uint>(units) - (149u << 23));",
    ): "both give the smallest normal number",
    (
        "const long end = begin + share < quads ? begin + share : quads;",
        "uint top = 0u;",
    ): "both are the size then",
    (
        "for (int k0 = begin - kDepth; k0 < end; k0 += kDepth) {",
        "if (k0 >= begin) {",
    ): "one more round, of no depth",
    (
        "const long last = end * each < size ? end * each : size;",
        "for (long i = begin * each + long(thread_index); i < last; i += long(threads))",
    ): "both are the size then",
    ("if (next < end) {", "#pragma unroll"): "every load has the bound of its own",
    (
        "for (int first = 0; first < parts; first += 4) {",
        "// Four loads are under way at a time.",
    ): "one more round, of no loads",
    (
        "for (int i = int(thread_index); i < l; i += int(threads)) {",
        "if (pivot[i] < 0.0f) missing = 1.0f;",
    ): "one more number, of a row that is not there",
    (
        "for (int h = 0; h < 4; ++h) {",
        "const int j = int(lane) + 32 * h;",
    ): "columns from 128 on are not there",
    (
        "for (int i = int(thread_index); i < N; i += int(threads)) {",
        "float square = over_norm[i];",
    ): "one more number, where the first pivot is put after it",
    (
        "const bool near = basis && off < kNearEnough;",
        "const float shift = near ? 0.0f : p.alpha;",
    ): "no distance is the limit itself",
    (
        "for (int block = 0; 8 * block < l; ++block) {",
        "// Two buffers: the next rows are put while these are still read.",
    ): "one more block, of rows that are not there",
    (
        "for (int r = 0; r < 8; ++r) {",
        "#pragma unroll",
    ): "one more row of the diagonal block has no columns from its diagonal on",
    (
        "for (int first = 0; first < l; first += 32) {",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
    ): "one more round, of no rows",
}


def trial(kernels: Kernels) -> str | None:
    """What is wrong, by judge or numbers, where these kernels run."""
    for names, check in TRIALS:
        if set(names) & set(kernels) and (what := check(workshop())):
            return "judge" if ".metal" in what else "numbers"
    return None


@pytest.mark.slow
def test_mutants_are_caught(capsys: pytest.CaptureFixture[str]) -> None:
    unit = part_of(UNIT, lambda name: any(name in names for names, _ in TRIALS))
    check_mutants_of_kernels("rsvd", mutants(), SOURCE, unit, trial, EQUIVALENT, capsys)
