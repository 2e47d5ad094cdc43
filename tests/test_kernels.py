"""Every row of the variant table of kernels/svd.metal, run by the simulator in checked mode."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import hard_matrices, part_of, reference_sigma, shipped, sigma_bound, spectrum

from tools.msl.layout import TWIN_KEPT, SvdVariant, structure, svd_variants
from tools.msl.parse import Unit, parse_file
from tools.msl.simulate import ROOT, Finding, Limits, Simulator, compiler

UNIT = parse_file(ROOT / "kernels" / "svd.metal", "kernels/svd.metal")
Params = structure(UNIT, "SvdParams")
VARIANTS = {v.name: v for v in svd_variants(UNIT)}
TABLE_ROWS = sum(len(UNIT.variants[t]) for t in ("SVD_VARIANTS", "SVD_DOUBLE_VARIANTS"))
ULP = {
    **{"float": 2.0**-23, "float2": 2.0**-23, "half": 2.0**-10, "bfloat": 2.0**-7},
    **{"double": 2.0**-52, "double2": 2.0**-52},
}
PLAIN = {
    "float": np.float32,
    "float2": np.complex64,
    "double": np.float64,
    "double2": np.complex128,
}
CONVERGED, NOT_CONVERGED, NON_FINITE = 0, 2, 3
UNTOUCHED = 77.0  # what outputs hold before a launch


def encode(a: np.ndarray, storage: str) -> np.ndarray:
    """Values as the storage type's bits; what NumPy has as it is."""
    if storage in PLAIN:
        return np.ascontiguousarray(a, PLAIN[storage])
    if storage == "half":
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(a.astype(np.float16))
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(a: np.ndarray) -> np.ndarray:
    if a.dtype == np.uint16:
        return (a.astype(np.uint32) << 16).view(np.float32)
    return a.astype(np.float32) if a.dtype == np.float16 else a


@dataclass
class Outcome:
    u: np.ndarray
    s: np.ndarray
    vt: np.ndarray
    status: np.ndarray
    sweeps: np.ndarray
    off_norm: np.ndarray
    findings: list[Finding]


def run(
    sim: Simulator,
    variant: SvdVariant,
    a: np.ndarray,
    *,
    u_cols: int | None = None,
    max_sweeps: int = 40,
    transposed: bool = False,
    scratch_less: int = 0,
    rows_scratch_less: int = 0,
    kept: int = TWIN_KEPT,
    **options: Any,
) -> Outcome:
    """All launches on a [batch, m, n] array. ``transposed``: A, U and Vt have swapped strides."""
    batch, m, n = a.shape
    k = n if u_cols is None else u_cols
    stored = encode(np.swapaxes(a, 1, 2) if transposed else a, variant.storage)

    def out(*shape: int) -> np.ndarray:
        return encode(np.full(shape, UNTOUCHED, np.float32), variant.storage)

    u, s, vt = out(batch, m, k), out(batch, n), out(batch, n, n)
    if variant.complex:
        s = np.ascontiguousarray(s.real)
    status, sweeps = np.full(batch, -7, np.int32), np.full(batch, -7, np.int32)
    off = np.full(batch, UNTOUCHED, np.float32)
    p = Params(
        a_batch=m * n,
        u_batch=m * k,
        vt_batch=n * n,
        batch=batch,
        m=m,
        n=n,
        u_cols=k,
        a_row=1 if transposed else n,
        a_col=m if transposed else 1,
        u_row=1 if transposed else k,
        u_col=m if transposed else 1,
        vt_row=1 if transposed else n,
        vt_col=n if transposed else 1,
        tol=max(1.0, math.sqrt(m) / 4) * (2.0**-52 if variant.double else 2.0**-23),
    )
    factors = [u, s, vt] if variant.vectors else [s]
    outputs = [stored, *factors, status, sweeps, off]
    memory = np.full(variant.device_scratch_bytes // 4 * batch, np.nan, np.float32)
    outputs += [memory] if memory.size else []
    findings = []

    def launch(name: str, buffers: Sequence[np.ndarray], threadgroup_bytes: int) -> None:
        # What no launch wrote is undefined: NaN where there are several.
        undefined = (len(buffers) - 1,) if memory.size and not variant.rows_name else ()
        findings.extend(
            sim.launch(
                name,
                grid=-(-batch // variant.matrices),
                threads=variant.threads,
                buffers=dict(enumerate(buffers)),
                params=(len(buffers), p),
                threadgroup_bytes=[threadgroup_bytes] if threadgroup_bytes else [],
                undefined=undefined,
                **options,
            )
        )

    if variant.rows_name:
        del outputs[1]  # U
    for sweeps_of_it in variant.sweeps(max_sweeps, kept):
        for name, value in sweeps_of_it.items():
            setattr(p, name, value)
        launch(variant.name, outputs, variant.scratch_bytes - scratch_less)
        if variant.rows_name:
            used = variant.rows_scratch_bytes - rows_scratch_less
            launch(variant.rows_name, [u, status, sweeps, memory], used)
    if transposed:
        u, vt = np.swapaxes(u.reshape(batch, k, m), 1, 2), np.swapaxes(vt, 1, 2)
    return Outcome(decode(u), decode(s), decode(vt), status, sweeps, off, findings)


def ratios(a: np.ndarray, o: Outcome, ulp: float = 2.0**-23) -> dict[str, float]:
    """The worst LAPACK test ratios of a batch, and sigma's error in ulps of sigma1."""
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    a, u, vt = (np.asarray(x, wide) for x in (a, o.u, o.vt))
    s = np.asarray(o.s, np.float64)
    m, n = a.shape[-2:]
    with np.errstate(under="ignore"):
        reference = np.linalg.svd(a, compute_uv=False)
        norm = np.maximum(reference[:, :1], 1e-45)
        product = (u[..., :n] * (s / norm)[..., None, :]) @ vt
        residual = np.linalg.norm(a / norm[..., None] - product, axis=(1, 2)) / (m * ulp)
        left = np.swapaxes(u, 1, 2).conj() @ u - np.eye(u.shape[-1])
        right = vt @ np.swapaxes(vt, 1, 2).conj() - np.eye(n)
        sigma = np.abs(s - reference) / (norm * ulp)
    return {
        "residual": float(np.max(residual)),
        "left": float(np.max(np.linalg.norm(left, axis=(1, 2)))) / (m * ulp),
        "right": float(np.max(np.linalg.norm(right, axis=(1, 2)))) / (n * ulp),
        "sigma": float(np.max(sigma)),
    }


def assert_svd(a: np.ndarray, o: Outcome, ulp: float = 2.0**-23) -> None:
    assert o.findings == []
    assert (o.status == CONVERGED).all()
    assert (np.diff(o.s, axis=1) <= 0).all()
    assert (o.s >= 0).all()
    worst = ratios(a, o, ulp)
    assert max(worst.values()) < 5, worst


def assert_each(
    names: list[str],
    a: np.ndarray,
    o: Outcome,
    most: float = math.inf,
    judge: Callable[[np.ndarray, Outcome], dict[str, float]] = ratios,
) -> None:
    """Each matrix by its name: converged in so many sweeps at most, and within the ratios."""
    assert o.findings == []
    failed = {}
    for i, name in enumerate(names):
        one = Outcome(o.u[i : i + 1], o.s[i : i + 1], o.vt[i : i + 1], *(None,) * 3, [])  # type: ignore[arg-type]
        worst = judge(a[i : i + 1], one)
        if o.status[i] or o.sweeps[i] > most or not max(worst.values()) < 5:
            failed[name] = (int(o.status[i]), int(o.sweeps[i]), worst)
    assert not failed


def small(v: SvdVariant) -> bool:
    """Quick enough to run every time: most of float32, else one kernel a size."""
    if v.storage != "float":
        return not v.block or (v.n == 64 and v.columns == 8)
    return v.n not in (48, 96 if v.twin else 80, 112, 192)


def only(*names: str) -> Unit:
    return part_of(UNIT, lambda name: name.replace("_rows_", "_vectors_") in names)


@pytest.fixture(scope="session")
def sim() -> Simulator:
    return shipped()


def f32(kind: str, n: int) -> SvdVariant:
    return VARIANTS[f"svd_{kind}_f32_n{n}"]


def f32_for(kind: str, n: int) -> SvdVariant:
    """The smallest that holds n columns."""
    rows = (v for name, v in VARIANTS.items() if name.startswith(f"svd_{kind}_f32_"))
    return min((v for v in rows if v.n >= n), key=lambda v: v.n)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def check_variant(sim: Simulator, v: SvdVariant) -> None:
    # One matrix more than a threadgroup holds: the second is mostly past the end of the batch.
    shape = (v.matrices + 1, v.n, v.n) if not v.block else (2, v.n - 5, v.n - 27)
    a = decode(encode(gaussian(*shape), v.storage))
    o = run(sim, v, a)
    assert o.findings == []
    assert (o.status == CONVERGED).all()
    assert (o.sweeps <= 11).all()
    if v.vectors:
        assert_svd(a, o, ULP[v.storage])
    else:
        reference = np.linalg.svd(a.astype(np.float64), compute_uv=False)
        error = np.abs(o.s - reference).max() / reference.max()
        assert error < 5 * ULP[v.storage]


@pytest.mark.parametrize(
    "name", sorted(v.name for v in VARIANTS.values() if small(v) and not v.complex)
)
def test_every_variant(sim: Simulator, name: str) -> None:
    check_variant(sim, VARIANTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(v.name for v in VARIANTS.values() if not small(v)))
def test_every_variant_left(sim: Simulator, name: str) -> None:
    check_variant(sim, VARIANTS[name])


@pytest.mark.parametrize(
    ("kind", "size", "n", "names"),
    [
        ("block8_vectors", 64, 64, ("ones", "zero_rows", "graded_rows", "mixed_scales")),
        ("block8_vectors", 40, 33, ("zero", "rank_1", "duplicate_columns", "clusters")),
        ("block8_vectors", 56, 49, ("rank_1", "graded_rows")),
        ("block8_vectors", 96, 81, ("clusters",)),
        ("block16_vectors", 64, 64, ("zero_columns", "scaled_2^-24", "scaled_1e-37", "identity")),
        ("block8_vectors", 128, 128, ("clusters", "graded_rows")),
        ("block16_vectors", 128, 128, ("scaled_1e30",)),
        ("twin_vectors", 64, 64, ("ones", "zero_rows", "graded_rows", "scaled_1e-37")),
        ("twin_vectors", 40, 33, ("zero", "rank_1", "duplicate_columns", "zero_columns")),
        ("twin_vectors", 56, 49, ("rank_1", "clusters", "scaled_2^-24")),
        ("twin_vectors", 80, 78, ("ones", "mixed_scales")),
        ("twin_vectors", 128, 128, ("clusters", "graded_rows")),
        ("twin_vectors", 144, 139, ("clusters", "zero_columns")),
    ],
)
def test_hard_matrices_of_blocks(
    sim: Simulator, kind: str, size: int, n: int, names: tuple[str, ...]
) -> None:
    v = f32(kind, size)
    with np.errstate(under="ignore"):
        a = np.stack([hard_matrices(n)[k].astype(np.float32) for k in names])
    assert_svd(a, run(sim, v, a))


@pytest.mark.slow
@pytest.mark.parametrize(
    "row", sorted(n for n, v in VARIANTS.items() if v.block and "_vectors_f32" in n)
)
def test_every_hard_matrix_of_blocks(sim: Simulator, row: str) -> None:
    v = VARIANTS[row]
    with np.errstate(under="ignore"):
        matrices = {k: a.astype(np.float32)[None] for k, a in hard_matrices(v.n).items()}
    for name, a in matrices.items():
        o = run(sim, v, a)
        assert o.findings == []
        assert o.status[0] == CONVERGED, name
        assert o.sweeps[0] <= 10, name
        worst = ratios(a, o)
        assert worst.pop("sigma") < sigma_bound(name), name
        assert max(worst.values()) < 5, (name, worst)


# Sweeps to convergence of Jacobi behind a QR with column pivoting, as published for this method.
SWEEPS = {64: {"gaussian": 7.0, "condition_1e6": 7.5}, 128: {"gaussian": 8.0, "condition_1e6": 8.0}}


@pytest.mark.parametrize("row", ["block8", "twin"])
@pytest.mark.parametrize("size", sorted(SWEEPS))
@pytest.mark.parametrize("kind", sorted(SWEEPS[64]))
def test_sweeps_of_blocks(sim: Simulator, row: str, size: int, kind: str) -> None:
    """Within one of the table; without the QR condition 1e6 took 18 and 22."""
    a = gaussian(2, size, size, seed=2)
    if kind == "condition_1e6":
        u, _, vt = np.linalg.svd(a.astype(np.float64))
        a = ((u * np.logspace(0, -6, size)) @ vt).astype(np.float32)
    o = run(sim, f32(f"{row}_vectors", size), a)
    assert_svd(a, o)
    assert np.all(np.abs(o.sweeps.mean() - SWEEPS[size][kind]) <= 1)


@pytest.mark.parametrize("row", ["block8", "twin"])
def test_tall_and_wide_in_blocks(sim: Simulator, row: str) -> None:
    """U has more columns than A, some of A's vanish, and both orders of the strides."""
    v = f32(f"{row}_vectors", 40)
    a = gaussian(2, 40, 34)
    a[0, :, 5:8] = 0.0
    a[1, :, 3] = a[1, :, 30]
    straight = run(sim, v, a, u_cols=40)
    assert_svd(a, straight)
    swapped = run(sim, v, a, u_cols=40, transposed=True)
    assert swapped.findings == []
    assert np.array_equal(swapped.u, straight.u)
    assert np.array_equal(swapped.vt, straight.vt)
    single = gaussian(1, 40, 1)
    assert_svd(single, run(sim, v, single, u_cols=40))


@pytest.mark.parametrize("row", ["block8", "twin"])
def test_rank_1_of_denormals(sim: Simulator, row: str) -> None:
    """Denormals are whole numbers inside: columns of rank 1 are as far apart as they can be."""
    a = np.stack([np.full((40, 40), x, np.float32) for x in (1e-39, 1.1e-38, 3e-45)])
    o = run(sim, f32(f"{row}_vectors", 40), a)
    assert o.findings == []
    assert o.status.tolist() == [CONVERGED] * 3
    worst = ratios(a, o)
    assert max(worst["left"], worst["right"]) < 5, worst
    np.testing.assert_allclose(o.s[:, 0], 40 * a[:, 0, 0].astype(np.float64), rtol=2e-7)


@pytest.mark.parametrize("row", ["block8", "twin"])
def test_relative_accuracy_in_blocks(sim: Simulator, row: str) -> None:
    """A = B D: each singular value to a few ulps of itself, also behind the QR."""
    rng = np.random.default_rng(5)
    b = np.linalg.qr(rng.standard_normal((40, 40)))[0] + 0.05 * rng.standard_normal((40, 40))
    a = (b * np.logspace(0, -12, 40)).astype(np.float32)[None]
    o = run(sim, f32(f"{row}_vectors", 40), a)
    error = np.abs(o.s[0] / reference_sigma(a[0].astype(np.float64)) - 1)
    assert error.max() < 50 * 40 * 2.0**-23


@pytest.mark.parametrize(("kind", "size"), [("block8", 56), ("block16", 64), ("twin", 56)])
def test_blocks_of_other_shapes(sim: Simulator, kind: str, size: int) -> None:
    v = f32(f"{kind}_vectors", size)
    a = gaussian(2, 50, 34)
    assert_svd(a, run(sim, v, a, u_cols=50, seed=3))
    a[1, 2, 3] = np.inf
    a[0] = np.eye(50, 34)
    o = run(sim, v, a)
    assert o.findings == []
    assert o.status.tolist() == [CONVERGED, NON_FINITE]
    assert np.isnan(o.u[1]).all()
    assert np.isnan(o.vt[1]).all()
    assert np.array_equal(o.s[0], np.ones(34, np.float32))
    values = run(sim, f32(f"{kind}_values", size), gaussian(1, 50, 34))
    assert np.array_equal(values.s, run(sim, v, gaussian(1, 50, 34)).s)
    short = run(sim, v, gaussian(1, size, size), max_sweeps=2)
    assert short.status[0] == NOT_CONVERGED
    assert np.isnan(short.u).all()


@pytest.mark.parametrize(
    ("kind", "n"),
    [
        *((f"{kind}_vectors", n) for kind in ("xor", "ring") for n in (1, 2, 3, 7, 8, 13, 16, 31)),
        ("xor_vectors", 32),
        *(("ring_vectors", n) for n in (9, 11, 12, 17, 24, 32)),
    ],
)
def test_hard_matrices(sim: Simulator, kind: str, n: int) -> None:
    v = f32_for(kind, n)
    with np.errstate(under="ignore"):
        cases = {k: a.astype(np.float32) for k, a in hard_matrices(n).items()}
    names = sorted(cases)
    a = np.stack([cases[k] for k in names])
    o = run(sim, v, a)
    assert_each(names, a, o, most=10)


@pytest.mark.parametrize("n", [5, 8, 12, 16, 24, 31])
@pytest.mark.parametrize("kind", ["xor_vectors", "ring_vectors"])
def test_scales_beyond_what_squares_hold(sim: Simulator, kind: str, n: int) -> None:
    """Columns so short that their dot products underflow end up as good as rounding allows."""
    cases = far_apart(n)
    names = sorted(cases)
    a = np.stack([cases[k] for k in names]).astype(np.float32)
    o = run(sim, f32_for(kind, n), a)
    assert_each(names, a, o, most=10)
    diagonal = [i for i, k in enumerate(names) if "diagonal" in k]
    assert np.array_equal(o.s[diagonal], [np.diag(x) for x in a[diagonal]])


def far_apart(n: int) -> dict[str, np.ndarray]:
    """Rows and columns over 15 to 30 decades, and zero rows."""
    rng = np.random.default_rng(n)
    cases = {}
    for decades in (15, 16, 18, 20, 30):
        t = 10.0 ** np.linspace(0, -decades, n)
        half = np.where(np.arange(n) < n // 2, 1.0, 10.0**-decades)
        for what, scale in (("graded", t), ("split", half)):
            g = rng.standard_normal((n, n))
            cases[f"{what}_columns_{decades}"] = g * scale
            cases[f"{what}_rows_{decades}"] = g * scale[:, None]
            cases[f"{what}_both_{decades}"] = g * scale * scale[:, None]
            cases[f"{what}_diagonal_{decades}"] = np.diag(scale)
    for i in range(4):
        cases[f"zero_rows_{i}"] = rng.standard_normal((n, n)) * (np.arange(n) % 3 != 0)[:, None]
    return cases


# Sweeps of Jacobi behind a QR with column pivoting, by NumPy in float32: Gaussian matrices, and a
# condition number of 1e6. 12 and 24 lie between their neighbours.
QRCP_SWEEPS = {8: (4.3, 4.2), 12: (4.8, 4.9), 16: (5.2, 5.5), 24: (5.6, 5.8), 32: (6.0, 6.0)}


@pytest.mark.parametrize(
    ("kind", "n"),
    [*(("xor_vectors", n) for n in (8, 16, 32)), *(("ring_vectors", n) for n in QRCP_SWEEPS)],
)
def test_sweeps(sim: Simulator, kind: str, n: int) -> None:
    """On average within one of what the algorithm needs, however the singular values lie."""
    count = 192 // n
    t = np.arange(n) / (n - 1)

    def sweeps(a: np.ndarray) -> float:
        o = run(sim, f32(kind, n), np.asarray(a, np.float32))
        assert_svd(np.asarray(a, np.float32), o)
        return float(o.sweeps.mean())

    gauss, conditioned = QRCP_SWEEPS[n]
    assert sweeps(gaussian(count, n, n)) <= gauss + 1
    for sigma in (10.0 ** (-6 * t), 1 - t * (1 - 1e-6)):
        a = np.stack([spectrum((n, n), sigma, seed) for seed in range(count)])
        assert sweeps(a) <= conditioned + 1


@pytest.mark.parametrize("kind", ["xor_vectors", "ring_vectors"])
@pytest.mark.parametrize(
    "shape",
    [(8, 5), (6, 1), (3, 3), (11, 10), (12, 4), (16, 9), (32, 17), (31, 8), (20, 16), (24, 17)],
)
@pytest.mark.parametrize("full", [False, True])
def test_shapes(sim: Simulator, kind: str, shape: tuple[int, int], full: bool) -> None:
    m, n = shape
    a = gaussian(3, m, n)
    assert_svd(a, run(sim, f32_for(kind, m), a, u_cols=m if full else n))


def test_wide_is_tall_with_strides_swapped(sim: Simulator) -> None:
    a = gaussian(3, 12, 7)
    v = f32("ring_vectors", 16)
    straight, swapped = run(sim, v, a), run(sim, v, a, transposed=True)
    assert np.array_equal(straight.u, swapped.u)
    assert_svd(a, swapped)


@pytest.mark.parametrize(("kind", "n"), [("xor", 16), ("ring", 16), ("ring", 12), ("ring", 24)])
def test_values_agree_with_vectors(sim: Simulator, kind: str, n: int) -> None:
    a = np.concatenate([gaussian(3, n, n), gaussian(1, n, n) * 0])
    with_vectors = run(sim, f32(f"{kind}_vectors", n), a)
    alone = run(sim, f32(f"{kind}_values", n), a)
    assert np.array_equal(with_vectors.s, alone.s)
    assert np.array_equal(with_vectors.sweeps, alone.sweeps)


@pytest.mark.parametrize(
    ("kind", "n"),
    [("xor_vectors", 8), *((f"ring_{kind}", n) for kind in ("vectors", "values") for n in (8, 12))],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_stays_in_its_matrix(sim: Simulator, kind: str, n: int, value: float) -> None:
    a = gaussian(5, n, n)
    good = run(sim, f32(kind, n), a)
    a[2, 3, 4] = value
    o = run(sim, f32(kind, n), a)
    assert o.findings == []
    assert o.status.tolist() == [0, 0, NON_FINITE, 0, 0]
    assert np.isnan(o.s[2]).all()
    others = [0, 1, 3, 4]
    assert np.array_equal(o.s[others], good.s[others])
    if "vectors" in kind:
        assert np.isnan(o.u[2]).all()
        assert np.isnan(o.vt[2]).all()
        assert np.array_equal(o.u[others], good.u[others])
        assert np.array_equal(o.vt[others], good.vt[others])


def test_not_converged_says_so(sim: Simulator) -> None:
    a = np.concatenate([gaussian(1, 16, 16), np.eye(16, dtype=np.float32)[None]])
    o = run(sim, f32("ring_vectors", 16), a, max_sweeps=1)
    assert o.status.tolist() == [NOT_CONVERGED, CONVERGED]
    assert o.sweeps.tolist() == [1, 1]
    assert np.isnan(o.u[0]).all()
    assert np.isnan(o.s[0]).all()
    assert o.off_norm[0] > 0.1
    assert np.array_equal(o.s[1], np.ones(16, np.float32))


def check_results_of_their_own(sim: Simulator, v: SvdVariant, a: np.ndarray) -> None:
    """The same in any order of threads, and of the last matrix alone."""
    o = run(sim, v, a)
    for seed in (1, 2, 3):
        again = run(sim, v, a, seed=seed)
        assert again.findings == []
        assert np.array_equal(o.u, again.u)
        assert np.array_equal(o.vt, again.vt)
    alone = run(sim, v, a[-1:])
    assert np.array_equal(o.u[-1:], alone.u)
    assert np.array_equal(o.s[-1:], alone.s)


@pytest.mark.parametrize(
    ("kind", "n"), [("xor_vectors", 8), *(("ring_vectors", n) for n in (8, 12, 24))]
)
def test_results_depend_on_nothing_else(sim: Simulator, kind: str, n: int) -> None:
    """Neither on the order in which threads run nor on the other matrices of the batch."""
    a = np.concatenate([gaussian(9, n, n), np.ones((1, n, n), np.float32)])
    check_results_of_their_own(sim, f32(kind, n), a)


def test_relative_accuracy_on_scaled_columns(sim: Simulator) -> None:
    """A = B D: each singular value to a few ulps of itself, which LAPACK cannot promise."""
    rng = np.random.default_rng(5)
    b = np.linalg.qr(rng.standard_normal((16, 16)))[0] + 0.1 * rng.standard_normal((16, 16))
    a = (b * np.logspace(0, -12, 16)).astype(np.float32)[None]
    o = run(sim, f32("xor_vectors", 16), a)
    # Columns scaled back: the reference then needs no more than float64 itself.
    exact = np.linalg.svd(a[0].astype(np.longdouble).astype(np.float64), compute_uv=False)
    relative = np.abs(o.s[0] - exact) / exact
    assert relative.max() < 50 * 16 * 2.0**-23


@pytest.mark.parametrize("n", [40, 128, 144])
def test_sweeps_in_several_dispatches(sim: Simulator, n: int) -> None:
    """The same bits; of a batch some matrices are done earlier than others."""
    v = f32("twin_vectors", n)
    a = gaussian(3, n, n - 1)
    a[1] = np.eye(n, n - 1)
    a[2] = np.inf
    whole = run(sim, v, a, u_cols=n)
    for kept, sweeps in ((3, 40), (2, 5), (6, 12)):
        parts = run(sim, v, a, u_cols=n, max_sweeps=sweeps, kept=kept)
        assert not parts.findings
        assert parts.sweeps.tolist() == [min(whole.sweeps[0], sweeps), *whole.sweeps[1:]]
        good = slice(0 if sweeps >= whole.sweeps[0] else 1, None)
        for of in ("u", "s", "vt", "status", "off_norm"):
            np.testing.assert_array_equal(getattr(parts, of)[good], getattr(whole, of)[good])
        if sweeps < whole.sweeps[0]:
            assert parts.status[0] == 2
            assert all(np.isnan(x[0]).all() for x in (parts.u, parts.s, parts.vt))


def check_scratch(sim: Simulator, v: SvdVariant) -> None:
    """With the last word in use taken away, the judge objects."""
    # The pad at the end of a turned tile is never touched.
    turned = not v.block or (v.vectors and (v.twin or v.scratch_bytes == 4 * 32 * (v.n + 1)))
    a = gaussian(v.matrices, v.n, v.n)
    o = run(sim, v, a, scratch_less=8 if turned else 4, max_sweeps=1)
    assert {f.kind for f in o.findings} == {"out_of_bounds"}
    assert "threadgroup argument tile" in o.findings[0].text
    if v.rows_name:
        o = run(sim, v, a, rows_scratch_less=8, max_sweeps=1)
        assert {f.kind for f in o.findings} == {"out_of_bounds"}


SCRATCH = [v for v in VARIANTS.values() if v.storage == "float" and v.scratch_bytes]


@pytest.mark.parametrize("name", sorted(v.name for v in SCRATCH if small(v)))
def test_scratch_is_what_the_kernel_uses(sim: Simulator, name: str) -> None:
    check_scratch(sim, VARIANTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(v.name for v in SCRATCH if not small(v)))
def test_scratch_is_what_the_kernels_left_use(sim: Simulator, name: str) -> None:
    check_scratch(sim, VARIANTS[name])


def test_limits_name_the_numbers(sim: Simulator) -> None:
    v, a = f32("ring_vectors", 32), gaussian(1, 32, 32)
    with pytest.raises(ValueError, match=r"threads per threadgroup: 64 exceed the 32"):
        run(sim, v, a, limits=Limits(threads=32))
    with pytest.raises(ValueError, match=r"threadgroup bytes: 16896 exceed the 16384"):
        run(sim, v, a, limits=Limits(threadgroup_bytes=16384))
    with pytest.raises(ValueError, match=r"buffers: 8 exceed the 7"):
        run(sim, v, a, limits=Limits(buffers=7))


def test_table_fits_every_apple_gpu() -> None:
    for v in VARIANTS.values():
        assert v.threads <= 1024
        assert v.scratch_bytes <= 32768
        if v.twin:
            assert v.simdgroups == v.columns
            assert v.rows_scratch_bytes <= 32768
        elif v.block:
            assert v.n == v.simdgroups * v.columns


def test_unchecked_mode_gives_the_same_bits(sim: Simulator) -> None:
    a = gaussian(9, 8, 8)
    judged = run(sim, f32("ring_vectors", 8), a)
    plain = run(sim, f32("ring_vectors", 8), a, checked=False)
    assert np.array_equal(judged.u, plain.u)
    assert np.array_equal(judged.vt, plain.vt)


def test_host_reads_the_table(tmp_path: Path) -> None:
    """C++ includes the kernel file itself: params struct and variant table, nothing else."""
    source = tmp_path / "table.cc"
    source.write_text(
        "#define JM_HOST\n"
        f'#include "{ROOT}/kernels/svd.metal"\n'
        "struct Row { const char* name; int n, columns, simdgroups; };\n"
        "#define ROW(name, function, T, N, C, S) {#name, N, C, S},\n"
        "constexpr Row rows[] = {SVD_VARIANTS(ROW) SVD_DOUBLE_VARIANTS(ROW)};\n"
        f"static_assert(sizeof(rows) / sizeof(rows[0]) == {TABLE_ROWS});\n"
        f"static_assert(sizeof(SvdParams) == {_size()});\n"
        "static_assert(kSvdNonFinite == 3);\n"
    )
    command = [compiler(), "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def _size() -> int:
    import ctypes

    return ctypes.sizeof(Params)


# --- complex ------------------------------------------------------------------------------------


def c64(kind: str, n: int) -> SvdVariant:
    """The smallest that holds n columns."""
    return VARIANTS[f"svd_{kind}_c64_n{8 if n <= 8 else 16 if n <= 16 else 32}"]


def complex_gaussian(*shape: int) -> np.ndarray:
    return (gaussian(*shape) + 1j * gaussian(*shape, seed=1)).astype(np.complex64)


def phases(n: int) -> np.ndarray:
    """Factors that turn each element of a matrix by the phases of its row and its column."""
    row, column = np.exp(1j * np.random.default_rng(n).uniform(0, 7, (2, n)))
    return row[:, None] * column


def sigma_only(a: np.ndarray, o: Outcome) -> dict[str, float]:
    return {"sigma": ratios(a, o)["sigma"]}


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 13, 16, 31, 32])
@pytest.mark.parametrize("kind", ["xor", "ring"])
def test_hard_complex_matrices(sim: Simulator, kind: str, n: int) -> None:
    """The hard matrices turned by phases, and some as they are and imaginary."""
    cases = hard_matrices(n)
    turned = {k: x * phases(n) for k, x in cases.items()}
    few = ("clusters", "duplicate_columns", "graded_rows", "identity", "rank_1", "zero")
    for k in few:
        turned[f"{k}, real"] = cases[k] + 0j
        turned[f"{k}, imaginary"] = cases[k] * 1j
    names = sorted(turned)
    with np.errstate(under="ignore"):
        a = np.stack([turned[k] for k in names]).astype(np.complex64)
    values = run(sim, c64(f"{kind}_values", n), a)
    assert_each(names, a, values, most=10, judge=sigma_only)
    if (kind, n > 16) != ("ring", True):
        o = run(sim, c64(f"{kind}_vectors", n), a)
        assert_each(names, a, o, most=10)
        assert np.array_equal(values.s, o.s)
        assert np.array_equal(values.sweeps, o.sweeps)


@pytest.mark.parametrize(
    ("kind", "n"),
    [
        *(("xor_vectors", n) for n in (8, 24)),
        *(("ring_vectors", n) for n in (5, 8, 13, 16)),
        ("ring_values", 24),
    ],
)
def test_complex_scales_beyond_what_squares_hold(sim: Simulator, kind: str, n: int) -> None:
    cases = far_apart(n)
    names = sorted(cases)
    a = (np.stack([cases[k] for k in names]) * phases(n)).astype(np.complex64)
    v = c64(kind, n)
    o = run(sim, v, a)
    assert_each(names, a, o, most=10, judge=ratios if v.vectors else sigma_only)
    diagonal = [i for i, k in enumerate(names) if "diagonal" in k]
    exact = [np.abs(np.diag(x)) for x in a[diagonal]]
    np.testing.assert_allclose(o.s[diagonal], exact, rtol=3 * 2.0**-23)


@pytest.mark.parametrize("name", sorted(k for k, v in VARIANTS.items() if v.complex and v.vectors))
def test_complex_sweeps(sim: Simulator, name: str) -> None:
    """As in test_sweeps; double takes one more to its tolerance."""
    v = VARIANTS[name]
    n = v.n
    count, more = (96 // n, 2) if v.double else (192 // n, 1)
    rng = np.random.default_rng(n)
    gauss, conditioned = QRCP_SWEEPS[n]
    sigmas = (10.0 ** (-6 * np.arange(n) / (n - 1)), np.linspace(1, 1e-6, n))
    a = rng.standard_normal((3, count, n, n)) + 1j * rng.standard_normal((3, count, n, n))
    for i, sigma in enumerate(sigmas, 1):
        left, _, right = np.linalg.svd(a[i])
        a[i] = (left * sigma) @ right
    for x, most in zip(a, (gauss, conditioned, conditioned), strict=True):
        x = encode(x, v.storage)
        o = run(sim, v, x)
        assert_svd(x, o, ULP[v.storage])
        assert o.sweeps.mean() <= most + more


@pytest.mark.parametrize(
    "name", sorted(k for k, v in VARIANTS.items() if v.storage == "float2" and v.vectors)
)
def test_complex_shapes(sim: Simulator, name: str) -> None:
    v = VARIANTS[name]
    n = v.n
    a = complex_gaussian(v.matrices + 1, n - 1, n - 3)
    o = run(sim, v, a, u_cols=n - 1, seed=4)
    assert_svd(a, o)
    # Wide by strides: the transpose, not the adjoint.
    assert np.array_equal(run(sim, v, a, u_cols=n - 1, transposed=True).u, o.u)
    a[1, 2, 3] = complex(0, np.nan)
    bad = run(sim, v, a)
    assert bad.findings == []
    assert bad.status.tolist()[:3] == [CONVERGED, NON_FINITE, CONVERGED]
    assert np.isnan(bad.u[1]).all()
    assert np.isnan(bad.s[1]).all()
    assert np.array_equal(bad.s[2:], o.s[2:])
    short = run(sim, v, complex_gaussian(1, n, n), max_sweeps=1)
    assert short.status[0] == NOT_CONVERGED
    assert np.isnan(short.vt).all()


@pytest.mark.parametrize(
    "name", sorted(k for k, v in VARIANTS.items() if v.storage == "float2" and not v.vectors)
)
def test_complex_values_alone(sim: Simulator, name: str) -> None:
    """One matrix more than a threadgroup holds, one not finite, and any order of threads."""
    v = VARIANTS[name]
    a = complex_gaussian(v.matrices + 1, v.n - 1, v.n - 3)
    a[0] = 0.0
    o = run(sim, v, a, seed=6)
    assert_each([str(i) for i in range(len(a))], a, o, most=10, judge=sigma_only)
    a[1, 2, 3] = complex(np.inf, 0)
    bad = run(sim, v, a, transposed=True)
    assert bad.findings == []
    assert bad.status.tolist() == [CONVERGED, NON_FINITE, *[CONVERGED] * (v.matrices - 1)]
    assert np.isnan(bad.s[1]).all()
    assert np.array_equal(bad.s[2:], o.s[2:])


@pytest.mark.parametrize("kind", ["xor_vectors", "ring_vectors"])
def test_complex_relative_accuracy(sim: Simulator, kind: str) -> None:
    """A = B D: each singular value to a few ulps of itself."""
    b = np.linalg.qr(complex_gaussian(16, 16))[0] + 0.1 * complex_gaussian(16, 16, 1)[..., 0]
    a = (b * np.logspace(0, -12, 16)).astype(np.complex64)
    o = run(sim, c64(kind, 16), a[None])
    assert o.findings == []
    exact = reference_sigma(a)
    assert np.max(np.abs(o.s[0] - exact) / exact) < 50 * 16 * 2.0**-23


@pytest.mark.parametrize("kind", ["xor_vectors", "ring_vectors"])
def test_complex_results_depend_on_nothing_else(sim: Simulator, kind: str) -> None:
    """Neither on the order in which threads run nor on the other matrices of the batch."""
    a = np.concatenate([complex_gaussian(9, 8, 8), np.full((1, 8, 8), 1j, np.complex64)])
    check_results_of_their_own(sim, c64(kind, 8), a)


# --- double -------------------------------------------------------------------------------------


def double_ratios(a: np.ndarray, o: Outcome) -> dict[str, float]:
    """The ratios of one matrix in ulps of float64, products and reference in extended precision."""
    ulp, norm = np.longdouble(2.0**-52), np.max(np.abs(a)) or 1.0
    wide = np.clongdouble if np.iscomplexobj(a) else np.longdouble
    x, s = a.astype(wide) / norm, o.s[0].astype(np.longdouble) / norm
    u, vt = (y[0].astype(wide) for y in (o.u, o.vt))
    reference = reference_sigma(x)
    m, n = a.shape
    top = reference[0] or np.longdouble(1)
    left = u.conj().T @ u - np.eye(u.shape[1])
    right = vt @ vt.conj().T - np.eye(n)
    with np.errstate(under="ignore"):
        error = np.abs((u[:, :n] * s) @ vt - x)
    # Singular values of denormal size are whole multiples of the least number.
    least = np.nextafter(0.0, 1.0).astype(np.longdouble) / norm
    error, off = np.maximum(error - n * least, 0), np.maximum(np.abs(s - reference) - least, 0)
    found = {
        "residual": np.sqrt((error**2).sum()) / top / (m * ulp),
        "left": np.sqrt((np.abs(left) ** 2).sum()) / (m * ulp),
        "right": np.sqrt((np.abs(right) ** 2).sum()) / (n * ulp),
        "sigma": np.max(off) / top / ulp,
    }
    return {k: float(v) for k, v in found.items()}


def wide_range(n: int) -> dict[str, np.ndarray]:
    """The hard matrices, and what only float64 holds."""
    gauss = np.random.default_rng(n).standard_normal((n, n))
    powers = np.random.default_rng(n + 1).integers(-140, 140, (n, n))
    return {
        **hard_matrices(n),
        "scaled_1e300": gauss * 1e300,
        "scaled_2^-53": gauss * 2.0**-53,
        "scaled_1e-300": gauss * 1e-300,
        "denormal": gauss * 1e-315,
        "mixed_to_1e140": gauss * 10.0**powers,
    }


@pytest.mark.parametrize(
    ("storage", "n"),
    [("f64", n) for n in (1, 3, 8, 13, 16, 32)] + [("c128", n) for n in (3, 8, 16, 32)],
)
def test_hard_matrices_in_double(sim: Simulator, storage: str, n: int) -> None:
    size = 8 if n <= 8 else 16 if n <= 16 else 32
    cases = wide_range(n)
    names = sorted(cases) if n < 16 else ["clusters", "denormal", "graded_rows", "mixed_to_1e140"]
    a = np.stack([cases[k] for k in names])
    if storage == "c128":
        a = a * phases(n)
    o = run(sim, VARIANTS[f"svd_xor_vectors_{storage}_n{size}"], a)
    assert o.s.dtype == np.float64
    assert_each(names, a, o, judge=lambda a, o: double_ratios(a[0], o))
    values = run(sim, VARIANTS[f"svd_xor_values_{storage}_n{size}"], a)
    assert values.findings == []
    assert np.array_equal(values.s, o.s)
    assert np.array_equal(values.sweeps, o.sweeps)


@pytest.mark.parametrize(("storage", "n"), [("f64", 16), ("c128", 16), ("c128", 32)])
def test_shapes_in_double(sim: Simulator, storage: str, n: int) -> None:
    v = VARIANTS[f"svd_xor_vectors_{storage}_n{n}"]
    a = np.random.default_rng(7).standard_normal((v.matrices + 1, n - 1, n - 5))
    a = a * np.exp(1j * np.arange(n - 5)) if v.complex else a
    a[-1, :, 3:6] = 0.0
    o = run(sim, v, a, u_cols=n - 1, seed=4)
    assert_svd(a, o, 2.0**-52)
    assert np.array_equal(run(sim, v, a, u_cols=n - 1, transposed=True).u, o.u)
    a[1, 2, 3] = np.nan
    bad = run(sim, v, a)
    assert bad.findings == []
    assert bad.status.tolist() == [CONVERGED, NON_FINITE, *[CONVERGED] * (v.matrices - 1)]
    assert np.isnan(bad.u[1]).all()
    assert np.array_equal(bad.s[2:], o.s[2:])
    short = run(sim, v, a[:1], max_sweeps=1)
    assert short.status[0] == NOT_CONVERGED
    assert np.isnan(short.vt).all()


@pytest.mark.parametrize(("storage", "n"), [("f64", 16), ("c128", 16), ("c128", 32)])
def test_decades_that_only_double_holds(sim: Simulator, storage: str, n: int) -> None:
    """Graded rows and columns take no more sweeps than others, and are as accurate."""
    rng = np.random.default_rng(n)
    cases = {}
    for decades in (15, 100, 290):
        scale = 10.0 ** np.linspace(0, -decades, n)
        g = rng.standard_normal((n, n)) * (phases(n) if storage == "c128" else 1)
        cases[f"rows_{decades}"] = g * scale[:, None]
        cases[f"shuffled_{decades}"] = g * rng.permutation(scale)[:, None]
        cases[f"both_{decades}"] = g * np.sqrt(scale) * np.sqrt(rng.permutation(scale))[:, None]
    names, a = sorted(cases), np.stack([cases[k] for k in sorted(cases)])
    o = run(sim, VARIANTS[f"svd_xor_vectors_{storage}_n{n}"], a)
    assert_each(names, a, o, most=8, judge=lambda a, o: double_ratios(a[0], o))


def test_relative_accuracy_in_double(sim: Simulator) -> None:
    """A = B D over 135 decades: each singular value to a few ulps of itself."""
    rng = np.random.default_rng(5)
    b = np.linalg.qr(rng.standard_normal((16, 16)))[0] + 0.1 * rng.standard_normal((16, 16))
    scales = np.logspace(100, -35, 16)
    o = run(sim, VARIANTS["svd_xor_vectors_f64_n16"], (b * scales)[None])
    # So far apart, singular values are the diagonal of R, up to the square of their ratio: 1e-18.
    exact = np.abs(np.diag(np.linalg.qr(b)[1])) * scales
    assert np.max(np.abs(o.s[0] / exact - 1)) < 50 * 16 * 2.0**-52
