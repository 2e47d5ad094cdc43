"""Mutants of kernels/gemv.metal: the simulator notices every barrier, bound and address space."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from harness import Kernels, check_mutants_of_kernels, mutants_of, part_of
from test_kernels_gemv import UNIT, VARIANTS, Params, case, product, run

from tools.msl.simulate import ROOT, workshop

SOURCE = (ROOT / "kernels" / "gemv.metal").read_text()
CODE_START = SOURCE.index("#ifndef JM_HOST\n", SOURCE.index("#define GEMV_V("))
# The smallest kernels that together run all code there is.
BY_ROWS = ("gemv_rows_f32_m2", "gemv_any_c64_m1", "gemv_anysplit_c64_m4")
BY_COLUMNS = ("gemv_column_c64_m1", "gemv_pair_f16_m4", "gemv_wideread_bf16_m1")
CONVERT = "gemv_convert_f16c64"
HELPERS = ("gemv_finish_f16", "gemv_finish_bf16", "gemv_finish_c64", CONVERT)


def bounds(row: str) -> Iterator[tuple[re.Match[str], str]]:
    for m in re.finditer(r" <=? (?!0\.)", row):
        if "<<" not in row and "x < " not in row[: m.end()]:
            yield m, " <= " if m[0] == " < " else " < "


def mutants() -> dict[str, str]:
    return mutants_of(SOURCE, CODE_START, bounds, once=True)


# Mutants that change nothing that matters: the mutated line and the one after it, and the reason.
EQUIVALENT = {
    (
        "for (int e = 0; e + 1 < V; e += 2) {",
        "float ai = conjugate * a[e + 1];",
    ): "V is even",
    (
        "for (; c + U * lanes <= end; c += U * lanes)",
        "add_chunks<T, X, KIND, XKIND, W, WORDS, R, U, M, false>"
        "(from, x, row, vector, c + lane, lanes,",
    ): "the last full step is taken with guards instead",
    (
        "if (c < end)",
        "add_chunks<T, X, KIND, XKIND, W, WORDS, R, U, M, true>"
        "(from, x, row, vector, c + lane, lanes,",
    ): "one more step, behind the end for every lane, adds nothing",
    (
        "for (int first = 0; first < R * M; first += L) {",
        "float own_re = 0.0f;",
    ): "outputs past the last one are not stored",
    (
        "for (int i = 0; i < L; ++i) {",
        "if (first + i < R * M) {",
    ): "no lane takes sum L",
    (
        "if (first + i < R * M) {",
        "float sum = lanes_sum<L>(re[(first + i) / R % M][(first + i) % R]);",
    ): "the first sum again, for a lane that stores nothing",
    (
        "for (int top = begin; top < end; top += 32 * S) {",
        "int k = top + int(simdgroup) * 32;",
    ): "one more round, of no rows",
}


def trial(kernels: Kernels) -> str | None:
    """What is wrong, by judge or numbers, where these kernels run."""
    finish = any(k.startswith("gemv_finish_") for k in kernels)
    for name in (*BY_ROWS, *BY_COLUMNS):
        tried = name in kernels or (finish and VARIANTS[name].splits)
        if tried and (what := verdict(name)):
            return what
    return converts() if CONVERT in kernels else None


def verdict(name: str) -> str | None:
    v = VARIANTS[name]
    unit = v.chunk // v.width
    if v.transposed:
        # Half of a simdgroup's columns, and more rows than one round of all simdgroups.
        shapes = [(16 * unit, 32 * v.simdgroups + 19, 1), (unit * 33, 37, 2)]
    else:
        long = 32 * v.unroll * (v.simdgroups if v.splits else 1)
        shapes = [(v.outputs + 1, (long + 3) * unit, 1), (3, long * unit, 2)]
    for outputs, depth, parts in shapes:
        a, x = case(v, 2, outputs, depth, v.vectors + 1)
        y, bias = (case(v, 2, outputs, outputs, v.vectors + 1, seed=s)[1] for s in (3, 4))
        o = run(workshop(), v, a, x, y=y, bias=bias, residual=y, beta=2.0,
                parts=parts if v.splits else 1)  # fmt: skip
        if o.findings:
            return "judge"
        want = product(v, a, x) + 3 * y + bias
        eps = 2.0**-8 if v.x_storage == "bfloat" else 2.0**-10
        if not np.allclose(o.out, want, rtol=3 * eps, atol=40 * eps):
            return "numbers"
    return None


def converts() -> str | None:
    x, out = np.arange(300).astype(np.float16), np.full(600, 77.0, np.float32)
    found = workshop().launch(
        CONVERT,
        grid=2,
        threads=256,
        buffers={0: x, 1: out},
        params=(2, Params(outputs=300)),
    )
    if found:
        return "judge"
    return None if np.array_equal(out.view(np.complex64), x.astype(np.complex64)) else "numbers"


# A third is what there is time for every time.
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_mutants_are_caught(every: int, capsys: pytest.CaptureFixture[str]) -> None:
    unit = part_of(UNIT, lambda name: name in (*BY_ROWS, *BY_COLUMNS, *HELPERS))
    some = dict(list(mutants().items())[::every])
    check_mutants_of_kernels("gemv", some, SOURCE, unit, trial, EQUIVALENT, capsys)
