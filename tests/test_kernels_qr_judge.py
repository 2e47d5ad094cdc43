"""Mutants of kernels/qr.metal: the simulator notices every barrier, bound and address space."""

from __future__ import annotations

import numpy as np
import pytest
from harness import Kernels, check_mutants_of_kernels, mutants_of, part_of, random_matrix
from test_kernels_qr import (
    UNIT,
    VARIANTS,
    Outcome,
    check,
    decode,
    encode,
    plan_for,
    run_small,
    run_tsqr,
)

from tools.msl.simulate import ROOT, workshop

SOURCE = (ROOT / "kernels" / "qr.metal").read_text()
CODE_START = SOURCE.index("#ifndef JM_HOST\n", SOURCE.index("#define QR_TSQR_VARIANTS("))
# The smallest kernels that together run all code there is.
SMALL = ("qr_small_q_c64_n8", "qr_small_r_f16_n8")
TREE = (
    *("qr_tsqr_scan_f32", "qr_tsqr_scale", "qr_tsqr_load_f32", "qr_tsqr_factor_l8"),
    *("qr_tsqr_apply_l8", "qr_tsqr_triangle_f32", "qr_tsqr_start_f32"),
    *("qr_tsqr_scan_c64", "qr_tsqr_load_c64", "qr_tsqr_factor_c64_l8"),
    *("qr_tsqr_apply_c64_l8", "qr_tsqr_triangle_c64", "qr_tsqr_start_c64"),
    *("qr_tsqr_scan_f16", "qr_tsqr_load_f16", "qr_tsqr_triangle_f16", "qr_tsqr_store_f16"),
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
        "if (units < 8388608.0f) return as_type<float>(sign | uint(units + 0.5f));",
        "return as_type<float>(sign | (as_type<uint>(units) - (149u << 23)));",
    ): "both give the smallest normal number",
    (
        "for (int i = 0; i < N; ++i) {",
        "head_re = i == j ? x[0][i] : head_re;",
    ): "j is less than N",
    ("for (int j = 0; j < N; ++j) {", "if (j < steps) {"): "steps is at most N",
    ("if (j < steps) {", "float w[W][N];"): "one more reflection, by a column of zeros",
    (
        "for (int i = 0; i < N; ++i) {",
        "if (active && i < p.q_cols && own < p.n) {",
    ): "q_cols is at most N",
    (
        "for (int first = 0; first < p.n; first += 32) {",
        "int column = first + int(lane);",
    ): "one more round, of no columns",
    (
        "for (int i = j; i < L; ++i) {",
        "w[i] = top[i * L + own];",
    ): "one more number, which nobody reads",
    (
        "for (int b = 0; b < p.blocks; ++b) {",
        "const int v = at.begin + L + b * B;",
    ): "one more block, of no rows",
    (
        "for (int i = j + 1; i < L; ++i) {",
        "s[0] = fma(w[i], top[i * L + own], s[0]);",
    ): "in qr_tsqr_apply: w[L] is zero",
}


def trial(kernels: Kernels) -> str | None:
    """What is wrong, by judge or numbers, where these kernels run."""
    small = small_verdict() if set(SMALL) & set(kernels) else None
    return small or (tree_verdict() if set(TREE) & set(kernels) else None)


def verdict(a: np.ndarray, o: Outcome, storage: str = "float") -> str | None:
    if o.findings:
        return "judge"
    bad = ~np.isfinite(a).all((-1, -2))
    for x in (o.q, o.r):
        if x is not None and not np.array_equal(np.isnan(x).all((-1, -2)), bad):
            return "numbers"
    try:
        q = None if o.q is None else o.q[~bad]
        check(a[~bad], Outcome(q, o.r[~bad], []), storage)
    except AssertionError:
        return "numbers"
    if o.q is None:
        # Against numpy, where there is no Q to multiply with.
        want = np.abs(np.linalg.qr(a[~bad].astype(np.float64), mode="r"))
        return None if np.allclose(np.abs(o.r[~bad]), want, atol=0.02) else "numbers"
    return None


def small_verdict() -> str | None:
    v = VARIANTS[SMALL[0]]
    for shape in ((v.matrices + 1, 8, 5), (2, 5, 8)):
        a = random_matrix(shape, np.complex64) * np.float32(1e-39)
        a[1, 2, 3] = np.inf
        a[0, :, 1] = 0
        for complete in (False, True):
            if what := verdict(a, run_small(workshop(), v, a, complete=complete)):
                return what
    a = decode(encode(random_matrix((3, 6, 8), np.float32), "half"))
    return verdict(a, run_small(workshop(), VARIANTS[SMALL[1]], a), "half")


def tree_verdict() -> str | None:
    """Three levels and panels; 1030 rows are two parts of a scan, 1025 entries two threadgroups."""
    a = random_matrix((2, 300, 7), np.float32)
    a[:, :, 3] *= np.float32(1e-39)
    a[1, 250, 6] = np.inf
    what = verdict(a, run_tsqr(workshop(), plan_for(2, 300, 7, piece=21, fan=3), a))
    if what:
        return what
    a = random_matrix((2, 50, 12), np.complex64)
    a[:, :, 3] *= np.float32(1e-39)
    a[1, 40, 6] = np.inf
    what = verdict(
        a, run_tsqr(workshop(), plan_for(2, 50, 12, width=2, lanes=8, rows=32, piece=21, fan=3), a)
    )
    if what:
        return what
    for m, n, mode, storage in ((1030, 1, "reduced", "float"), (34, 33, "complete", "half"),
                                (7, 30, "reduced", "float"), (30, 12, "r", "float")):  # fmt: skip
        a = decode(encode(random_matrix((2, m, n), np.float32), storage))
        plan = plan_for(2, m, n, mode=mode, storage=storage, lanes=8, rows=64, piece=77, fan=3)
        if what := verdict(a, run_tsqr(workshop(), plan, a), storage):
            return what
    return None


@pytest.mark.slow
def test_mutants_are_caught(capsys: pytest.CaptureFixture[str]) -> None:
    unit = part_of(UNIT, lambda name: name in (*SMALL, *TREE))
    check_mutants_of_kernels("qr", mutants(), SOURCE, unit, trial, EQUIVALENT, capsys)
