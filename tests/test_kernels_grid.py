"""The row "grid" of kernels/svd.metal: a sequence of dispatches, judged by the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import hard_matrices, launch_steps, part_of
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
)

from tools.msl.layout import TAGS, GridPlan, grid_params, structure
from tools.msl.simulate import Simulator, simulator

Params = structure(UNIT, "SvdGridParams")
KERNELS = part_of(UNIT, lambda name: name.startswith("svd_grid_"))


@pytest.fixture(scope="session")
def grid() -> Simulator:
    simulator().load(KERNELS)
    return simulator()


def run(
    sim: Simulator,
    a: np.ndarray,
    *,
    u_cols: int | None = None,
    vectors: bool = True,
    storage: str = "float",
    sweeps: int = 14,
    slices: int = 1,
    cores: int = 0,
    transposed: bool = False,
    less: dict[str, int] | None = None,
    **options: Any,
) -> Outcome:
    """All dispatches on a [batch, m, n] array. ``less``: threadgroup bytes taken from a kernel."""
    batch, m, n = a.shape
    plan = GridPlan(batch, m, n, u_cols or n, vectors, storage, sweeps, slices, slices, cores)
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
        lambda step: Params(**grid_params(plan, step, transposed)),
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


def test_a_batch_is_its_matrices(grid: Simulator) -> None:
    """Also where one is not finite, one has columns that vanish and one is done at once."""
    a = gaussian(4, 40, 36)
    a[1, 3, 4] = np.nan
    a[2, :, 5:9] = 0.0
    a[3] = np.eye(40, 36)
    o = run(grid, a, u_cols=40)
    assert o.findings == []
    assert o.status.tolist() == [CONVERGED, NON_FINITE, CONVERGED, CONVERGED]
    assert all(np.isnan(x[1]).all() for x in (o.u, o.s, o.vt))
    assert o.sweeps[3] == 1
    assert np.array_equal(o.s[3], np.ones(36, np.float32))
    for i in (0, 2, 3):
        alone = run(grid, a[i : i + 1], u_cols=40)
        assert_svd(a[i : i + 1], alone)
        assert np.array_equal(alone.u[0], o.u[i])
        assert np.array_equal(alone.vt[0], o.vt[i])


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
    simulator().load(KERNELS, checked=False, optimize="-O2")
    hard = hard_matrices(n)
    names = ("geometric_1e6", "clusters", "graded_rows", "graded_columns", "ones", "hilbert")
    a = np.stack([gaussian(n, n), *(hard[k].astype(np.float32) for k in names)])
    o = run(simulator(), a, slices=slices, checked=False)
    assert_svd(a, o)
    assert o.sweeps.max() <= 10
    assert o.sweeps[0] <= 9
    gram = o.vt.astype(np.float64) @ np.swapaxes(o.vt, 1, 2).astype(np.float64)
    assert np.abs(gram - np.eye(n)).max() <= 2e-6
