"""The rows "grid" and "fused" of kernels/svd.metal: sequences of dispatches, judged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import hard_matrices, launch_steps, shipped
from test_kernels import (
    CONVERGED,
    NON_FINITE,
    NOT_CONVERGED,
    ULP,
    UNIT,
    UNTOUCHED,
    Outcome,
    assert_each,
    assert_svd,
    decode,
    encode,
    gaussian,
    ratios,
)

from tools.msl.layout import (
    MAX_SWEEPS,
    TAGS,
    FusedVariant,
    GridPlan,
    fused_variants,
    grid_params,
    structure,
)
from tools.msl.simulate import Simulator

PARAMS = {name: structure(UNIT, name) for name in ("SvdGridParams", "SvdPairsParams")}
FUSED = {v.name: v for v in fused_variants(UNIT) if not v.quarters}
(QUARTERS,) = (v for v in fused_variants(UNIT) if v.quarters)


@pytest.fixture(scope="session")
def grid() -> Simulator:
    return shipped()


def run(
    sim: Simulator,
    a: np.ndarray,
    *,
    u_cols: int | None = None,
    vectors: bool = True,
    storage: str = "float",
    sweeps: int = MAX_SWEEPS,
    slices: int = 1,
    cores: int = 0,
    transposed: bool = False,
    fused: FusedVariant | None = None,
    rounds: int = 0,
    less: dict[str, int] | None = None,
    **options: Any,
) -> Outcome:
    """All dispatches on a [batch, m, n] array. ``less``: threadgroup bytes taken from a kernel."""
    batch, m, n = a.shape
    sizes = (batch, m, n, u_cols or n, vectors, storage, sweeps, slices, slices, cores)
    plan = GridPlan(*sizes, fused, rounds)
    stored = encode(np.swapaxes(a, 1, 2) if transposed else a, storage)

    def out(*shape: int) -> np.ndarray:
        return encode(np.full(shape, UNTOUCHED, np.float32), storage)

    buffers = {k: np.full(size // 4, np.nan, np.float32) for k, size in plan.scratch.items()}
    buffers |= {"a": stored, "u": out(batch, m, plan.u_cols), "s": out(batch, n)}
    buffers |= {"vt": out(batch, n, n), "off_norm": np.full(batch, UNTOUCHED, np.float32)}
    buffers |= {k: np.full(batch, -7, np.int32) for k in ("status", "sweeps")}
    findings = launch_steps(
        sim,
        plan.steps(),
        buffers,
        lambda step: PARAMS[step.params](**grid_params(plan, step, transposed)),
        lambda kernel: (less or {}).get(kernel, 0),
        **options,
    )
    u, s, vt = (decode(buffers[k]) for k in ("u", "s", "vt"))
    tail = (buffers[k] for k in ("status", "sweeps", "off_norm"))
    return Outcome(u, s, vt, *tail, findings)


@pytest.mark.parametrize("n", [1, 2, 33])
def test_hard_matrices(grid: Simulator, n: int) -> None:
    with np.errstate(under="ignore"):
        cases = {k: a.astype(np.float32) for k, a in hard_matrices(n).items()}
    names = sorted(cases)
    a = np.stack([cases[k] for k in names])
    assert_each(names, a, run(grid, a), 9)


@pytest.mark.parametrize(
    ("shape", "u_cols", "slices", "cores", "transposed", "seed"),
    [
        ((2, 40, 33), 40, 1, 0, False, None),
        ((1, 70, 65), 65, 2, 2, True, 5),  # all numbers of columns that are reflected together
        ((1, 130, 3), 129, 1, 4, True, 2),
        ((1, 133, 132), 133, 3, 8, False, None),
        ((1, 2100, 2), 2, 1, 0, False, None),  # more rows than a panel has in registers
    ],
)
def test_shapes(
    grid: Simulator,
    shape: tuple[int, int, int],
    u_cols: int,
    slices: int,
    cores: int,
    transposed: bool,
    seed: int | None,
) -> None:
    a = gaussian(*shape)
    options = {"slices": slices, "cores": cores, "transposed": transposed, "seed": seed}
    o = run(grid, a, u_cols=u_cols, **options)
    assert_svd(a, o)
    assert np.array_equal(run(grid, a, u_cols=u_cols, **{**options, "seed": None}).u, o.u)
    values = run(grid, a, vectors=False, **options)
    assert values.findings == []
    np.testing.assert_allclose(values.s, o.s, rtol=0, atol=5 * 2.0**-23 * o.s.max())


@pytest.mark.parametrize("storage", sorted(set(TAGS) - {"float"}))
def test_storage_types(grid: Simulator, storage: str) -> None:
    a = decode(encode(gaussian(2, 35, 5), storage))
    o = run(grid, a, storage=storage)
    assert_svd(a, o, ULP[storage])
    values = run(grid, a, storage=storage, vectors=False)
    np.testing.assert_allclose(values.s, o.s, rtol=0, atol=ULP[storage] * o.s.max())


@pytest.mark.parametrize(
    ("row", "m", "missing", "sweeps"),
    [
        (None, 40, np.nan, MAX_SWEEPS),
        (FUSED["svd_fused_n512"], 38, np.inf, 40),
        (QUARTERS, 38, np.inf, 12),
    ],
    ids=["grid", "fused", "quarters"],
)
def test_a_batch_is_its_matrices(
    grid: Simulator, row: FusedVariant | None, m: int, missing: float, sweeps: int
) -> None:
    """Also where one is not finite, one has columns that vanish and one is done at once."""
    a = gaussian(4, m, 36)
    a[1, 3, 4] = missing
    a[2, :, 5:9] = 0.0
    a[3] = np.eye(m, 36)
    options: dict[str, Any] = {"u_cols": m, "fused": row, "sweeps": sweeps}
    o = run(grid, a, **options)
    assert o.findings == []
    assert o.status.tolist() == [CONVERGED, NON_FINITE, CONVERGED, CONVERGED]
    assert all(np.isnan(x[1]).all() for x in (o.u, o.s, o.vt))
    assert o.sweeps[[1, 3]].tolist() == [0, 1]
    assert np.array_equal(o.s[3], np.ones(36, np.float32))
    for i in (0, 2, 3):
        alone = run(grid, a[i : i + 1], **options)
        assert_svd(a[i : i + 1], alone)
        assert np.array_equal(alone.u[0], o.u[i])
        assert np.array_equal(alone.vt[0], o.vt[i])


def test_columns_whose_squares_underflow(grid: Simulator) -> None:
    """Long columns that noise turns among each other do not keep them from being done."""
    ones = np.ones((1, 40, 40), np.float32)
    assert_svd(ones, run(grid, ones))
    assert_svd(ones, run_fused(grid, FUSED["svd_fused_n256"], ones))
    ones = ones[:, :23, :23]
    assert_svd(ones, run_fused(grid, FUSED["svd_fused_n256"], ones))


def test_values_alone(grid: Simulator) -> None:
    """Without V, the lengths of the columns that were turned were off by 5.2 ulp."""
    a = hard_matrices(64)["repeated"].astype(np.float32)[None]
    o = run(grid, a, vectors=False)
    assert o.findings == []
    assert ratios(a, o)["sigma"] < 2.5


def test_not_converged_says_so(grid: Simulator) -> None:
    o = run(grid, gaussian(1, 40, 40), sweeps=2)
    assert o.findings == []
    assert o.status[0] == NOT_CONVERGED
    assert o.sweeps[0] == 2
    assert o.off_norm[0] > 1e-3
    assert all(np.isnan(x).all() for x in (o.u, o.s, o.vt))


@pytest.mark.parametrize(
    ("kernel", "slices", "taken"),
    [
        ("scan_f32", 1, 4),
        ("load_f32", 1, 8),  # the pad at the end of a turned square is never touched
        ("rank", 1, 4),
        ("panel", 1, 4),
        ("reflect_32", 1, 8),  # nor is that at the end of a triangle
        ("merge", 1, 8),
        ("back_32", 1, 8),
        ("start", 1, 8),
        ("gram", 2, 4),
        ("solve", 2, 4),
        ("turn", 2, 48),  # nor that of the rotations
        ("factors_f32", 1, 8),
    ],
)
def test_scratch_is_what_the_kernel_uses(
    grid: Simulator, kernel: str, slices: int, taken: int
) -> None:
    # These two do nothing before the rounds have converged.
    late = kernel in ("merge", "back_32")
    a, sweeps = (gaussian(1, 40, 33), 14) if late else (gaussian(1, 160, 130), 1)
    o = run(grid, a, sweeps=sweeps, slices=slices, less={f"svd_grid_{kernel}": taken})
    assert {f.kind for f in o.findings} == {"out_of_bounds"}
    assert "threadgroup argument tile" in o.findings[0].text


@pytest.mark.slow
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("n", [129, 256])
def test_large(n: int, slices: int) -> None:
    """Sweeps as in the table of the design, and V that does not drift."""
    hard = hard_matrices(n)
    names = ("geometric_1e6", "clusters", "graded_rows", "graded_columns", "ones", "hilbert")
    a = np.stack([gaussian(n, n), *(hard[k].astype(np.float32) for k in names)])
    o = run(shipped(), a, slices=slices, checked=False)
    assert_svd(a, o)
    assert o.sweeps.max() <= 10
    assert o.sweeps[0] <= 9
    gram = o.vt.astype(np.float64) @ np.swapaxes(o.vt, 1, 2).astype(np.float64)
    assert np.abs(gram - np.eye(n)).max() <= 2e-6


@pytest.mark.slow
def test_repeated_singular_values() -> None:
    """The slowest to converge; what grows with n leaves room below the bound."""
    a = hard_matrices(200)["repeated"][None].astype(np.float32)
    o = run(shipped(), a, checked=False)
    assert_svd(a, o)
    assert o.sweeps[0] <= MAX_SWEEPS - 5
    assert ratios(a, run(shipped(), a, vectors=False, checked=False))["sigma"] < 5


# --- "fused": one threadgroup a matrix in place of the rounds -------------------------------------


class Narrow(FusedVariant):
    """With two simdgroups, which take several steps a round."""

    def simdgroups(self, n: int) -> int:
        return 2


def run_fused(sim: Simulator, row: FusedVariant, a: np.ndarray, **options: Any) -> Outcome:
    return run(sim, a, fused=row, **{"sweeps": 40, **options})


@pytest.mark.parametrize(
    ("n", "row", "part"),
    [
        (2, "", 5),
        (33, "", 5),
        pytest.param(32, "svd_fused_n256", 1, marks=pytest.mark.slow),
    ],
)
def test_hard_matrices_of_fused(grid: Simulator, n: int, row: str, part: int) -> None:
    """Each row with some, or all of them in one."""
    with np.errstate(under="ignore"):
        cases = {k: a.astype(np.float32) for k, a in hard_matrices(n).items()}
    for i, v in enumerate([FUSED[row]] if row else FUSED.values()):
        names = sorted(cases)[i::part]
        a = np.stack([cases[k] for k in names])
        assert_each(names, a, run_fused(grid, v, a), 9)


@pytest.mark.parametrize(("n", "name"), [(36, "scaled_1e-37"), (40, "repeated")])
def test_singular_values_of_fused(grid: Simulator, n: int, name: str) -> None:
    """By the lengths of the columns that it turned they were off by 5.1 and 5.8 ulp."""
    a = hard_matrices(n)[name].astype(np.float32)[None]
    for v in FUSED.values():
        o = run_fused(grid, v, a)
        assert_svd(a, o)
        assert ratios(a, o)["sigma"] < 2.5


@pytest.mark.slow
def test_singular_values_of_many_of_fused() -> None:
    """As near as those of "grid"."""
    for n in (36, 40):
        a = gaussian(60, n, n)
        for v in FUSED.values():
            assert ratios(a, run_fused(shipped(), v, a, checked=False))["sigma"] < 2.5


@pytest.mark.parametrize(
    ("row", "shape", "u_cols", "options"),
    [
        ("svd_fused_n256", (2, 40, 33), 40, {"seed": 7}),
        ("svd_fused_n512", (1, 70, 50), 50, {"rounds": 60, "transposed": True}),
        ("svd_fused_n1024", (1, 64, 64), 64, {"rounds": 17, "seed": 2}),  # no padding
        ("svd_fused_n2048", (1, 45, 3), 45, {"rounds": 1, "transposed": True, "seed": 5}),
        ("svd_fused16_n2048", (1, 40, 40), 40, {"seed": 3}),
    ],
)
def test_shapes_of_fused(
    grid: Simulator, row: str, shape: tuple[int, int, int], u_cols: int, options: dict[str, Any]
) -> None:
    """Also the order in which threads run, where dispatches end and steps change no bit."""
    a, v = gaussian(*shape), FUSED[row]
    o = run_fused(grid, v, a, u_cols=u_cols, **options)
    assert_svd(a, o)
    plain = run_fused(grid, Narrow(v.name, v.function, v.n, v.per_pair), a, u_cols=u_cols)
    for name in ("u", "s", "vt", "sweeps", "off_norm", "findings"):
        assert np.array_equal(getattr(o, name), getattr(plain, name)), name
    values = run_fused(grid, v, a, vectors=False, **options)
    assert values.findings == []
    assert np.array_equal(values.s, o.s)


@pytest.mark.parametrize(("sweeps", "rounds"), [(2, 0), (2, 50), (0, 0)])
def test_not_converged_says_so_of_fused(grid: Simulator, sweeps: int, rounds: int) -> None:
    v = FUSED["svd_fused_n256"]
    o = run_fused(grid, v, gaussian(1, 40, 36), sweeps=sweeps, rounds=rounds)
    assert o.findings == []
    assert o.status[0] == NOT_CONVERGED
    assert o.sweeps[0] == sweeps
    assert (o.off_norm[0] > 1e-3) == (sweeps > 0)
    assert all(np.isnan(x).all() for x in (o.u, o.s, o.vt))


@pytest.mark.parametrize("row", sorted(FUSED))
def test_scratch_is_what_fused_uses(grid: Simulator, row: str) -> None:
    o = run_fused(grid, FUSED[row], gaussian(1, 40, 36), sweeps=1, less={row: 4})
    assert {f.kind for f in o.findings} == {"out_of_bounds"}
    assert "threadgroup argument tile" in o.findings[0].text


@pytest.mark.slow
@pytest.mark.parametrize("row", sorted(FUSED))
def test_large_of_fused(row: str) -> None:
    """Pairs that fill the threads, and V that does not drift."""
    v = FUSED[row]
    n = 260 if v.n == 512 else 200
    hard = hard_matrices(n)
    names = ("geometric_1e6", "clusters", "graded_rows", "graded_columns", "ones", "hilbert")
    a = np.stack([gaussian(n, n), *(hard[k].astype(np.float32) for k in names)])
    o = run_fused(shipped(), v, a, checked=False)
    assert_svd(a, o)
    assert o.sweeps.max() <= 10
    assert o.sweeps[0] <= 9
    gram = o.vt.astype(np.float64) @ np.swapaxes(o.vt, 1, 2).astype(np.float64)
    assert np.abs(gram - np.eye(n)).max() <= 2e-6


# --- "quarters" -----------------------------------------------------------------------------------


def run_quarters(sim: Simulator, a: np.ndarray, **options: Any) -> Outcome:
    return run_fused(sim, QUARTERS, a, **{"sweeps": 12, **options})


@pytest.mark.parametrize("n", [1, 33])
def test_hard_matrices_of_quarters(grid: Simulator, n: int) -> None:
    """Some of them, judged; below all of them, at more sizes."""
    with np.errstate(under="ignore"):
        cases = {k: a.astype(np.float32) for k, a in hard_matrices(n).items()}
    names = sorted(cases)[n % 8 :: 8]
    a = np.stack([cases[k] for k in names])
    assert_each(names, a, run_quarters(grid, a), 9)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 64, 65, 130, 193, 255, 256])
def test_all_hard_matrices_of_quarters(n: int) -> None:
    with np.errstate(under="ignore"):
        cases = {k: a.astype(np.float32) for k, a in hard_matrices(n).items()}
    names = sorted(cases)
    a = np.stack([cases[k] for k in names])
    assert_each(names, a, run_quarters(shipped(), a, checked=False, sweeps=20), 12)


@pytest.mark.parametrize(
    ("shape", "u_cols", "options"),
    [
        ((1, 40, 33), 40, {"seed": 7}),
        ((1, 300, 3), 3, {"transposed": True}),  # more rows than "quarters" has
        pytest.param((1, 256, 256), 256, {"transposed": True}, marks=pytest.mark.slow),
    ],
)
def test_shapes_of_quarters(
    grid: Simulator, shape: tuple[int, int, int], u_cols: int, options: dict[str, Any]
) -> None:
    """Also the order in which threads run changes no bit, and vectors none of the values."""
    a = gaussian(*shape)
    o = run_quarters(grid, a, u_cols=u_cols, **options)
    assert_svd(a, o)
    again = run_quarters(grid, a, u_cols=u_cols, **{**options, "seed": 3})
    for name in ("u", "s", "vt", "sweeps", "off_norm", "findings"):
        assert np.array_equal(getattr(o, name), getattr(again, name)), name
    values = run_quarters(grid, a, vectors=False, **options)
    assert values.findings == []
    assert np.array_equal(values.s, o.s)


@pytest.mark.parametrize("storage", ["half", "bfloat"])
def test_storage_of_quarters(grid: Simulator, storage: str) -> None:
    a = decode(encode(gaussian(1, 36, 34), storage))
    assert_svd(a, run_quarters(grid, a, storage=storage), ULP[storage])


def test_sweeps_of_quarters_are_counted(grid: Simulator) -> None:
    """The last that is allowed may be the one that finds all columns orthogonal."""
    a = gaussian(1, 40, 36)
    whole = run_quarters(grid, a)
    count = int(whole.sweeps[0])
    for sweeps in (0, 1, count - 1, count):
        o = run_quarters(grid, a, sweeps=sweeps)
        assert o.findings == []
        assert o.sweeps.tolist() == [sweeps]
        if sweeps == count:
            assert all(np.array_equal(getattr(o, x), getattr(whole, x)) for x in ("u", "s", "vt"))
        else:
            assert o.status.tolist() == [NOT_CONVERGED]
            assert all(np.isnan(x).all() for x in (o.u, o.s, o.vt))
