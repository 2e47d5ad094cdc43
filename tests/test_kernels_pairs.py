"""The row "pairs" of kernels/svd.metal: complex matrices of any size, judged by the simulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import hard_matrices, launch_steps, random_matrix, reference_sigma, shipped
from test_kernels import (
    CONVERGED,
    NON_FINITE,
    NOT_CONVERGED,
    UNIT,
    UNTOUCHED,
    Outcome,
    assert_each,
    assert_svd,
    ratios,
)

from tools.msl.layout import PairsPlan, pairs_params, structure
from tools.msl.simulate import Simulator

Params = structure(UNIT, "SvdPairsParams")


@pytest.fixture(scope="session")
def pairs() -> Simulator:
    return shipped()


def run(
    sim: Simulator,
    a: np.ndarray,
    *,
    u_cols: int | None = None,
    transposed: bool = False,
    less: str = "",
    plan: dict[str, Any] | None = None,
    **options: Any,
) -> Outcome:
    """All dispatches on a [batch, m, n] array. ``less``: a kernel that gets a word too little."""
    batch, m, n = a.shape
    of = PairsPlan(batch, m, n, u_cols or n, **(plan or {}))
    stored = np.ascontiguousarray(np.swapaxes(a, 1, 2) if transposed else a, np.complex64)

    def out(*shape: int) -> np.ndarray:
        return np.full(shape, UNTOUCHED, np.complex64)

    buffers = {k: np.full(size // 4, np.nan, np.float32) for k, size in of.scratch.items()}
    buffers |= {"a": stored, "u": out(batch, m, of.u_cols), "vt": out(batch, n, n)}
    buffers |= {"s": np.full((batch, n), UNTOUCHED, np.float32)}
    buffers |= {"off_norm": np.full(batch, UNTOUCHED, np.float32)}
    buffers |= {k: np.full(batch, -7, np.int32) for k in ("status", "sweeps")}
    findings = launch_steps(
        sim,
        of.steps(),
        buffers,
        lambda step: Params(**pairs_params(of, step, transposed)),
        lambda kernel: 4 if kernel == less else 0,
        **options,
    )
    names = ("u", "s", "vt", "status", "sweeps", "off_norm")
    return Outcome(*(buffers[k] for k in names), findings)


def phased(a: np.ndarray) -> np.ndarray:
    """The same singular values; no row and no column is real."""
    m, n = a.shape
    phase = np.exp(1j * np.random.default_rng(n).uniform(0, 7, m + n))
    with np.errstate(under="ignore"):
        return (a * phase[:m, None] * phase[m:]).astype(np.complex64)


def check_hard(sim: Simulator, n: int, names: list[str], most: int) -> None:
    a = np.stack([phased(hard_matrices(n)[k]) for k in names])
    assert_each(names, a, run(sim, a), most)


@pytest.mark.parametrize("n", [1, 2, 33])
def test_hard_matrices(pairs: Simulator, n: int) -> None:
    check_hard(pairs, n, sorted(hard_matrices(n)), 8)


@pytest.mark.parametrize(
    ("shape", "u_cols", "transposed", "plan", "seed"),
    [
        ((2, 40, 33), 40, False, {}, 7),
        ((1, 70, 50), 50, True, {"columns": 24, "rounds": 60}, None),
        ((1, 64, 36), 64, False, {"columns": 1, "rounds": 17}, 2),  # sides without padding
        ((1, 45, 3), 45, True, {}, 5),
    ],
)
def test_shapes(
    pairs: Simulator,
    shape: tuple[int, int, int],
    u_cols: int,
    transposed: bool,
    plan: dict[str, int],
    seed: int | None,
) -> None:
    """Also the order in which threads run, and where dispatches end, change no bit."""
    a = random_matrix(shape, "complex64")
    o = run(pairs, a, u_cols=u_cols, transposed=transposed, plan=plan, seed=seed)
    assert_svd(a, o)
    plain = run(pairs, a, u_cols=u_cols)
    for name in ("u", "s", "vt", "sweeps", "off_norm"):
        assert np.array_equal(getattr(o, name), getattr(plain, name)), name
    values = run(pairs, a, transposed=transposed, plan={**plan, "vectors": False}, seed=seed)
    assert values.findings == []
    np.testing.assert_allclose(values.s, o.s, rtol=0, atol=5 * 2.0**-23 * o.s.max())


def test_a_batch_is_its_matrices(pairs: Simulator) -> None:
    """Also where one is not finite, one has zero columns, one is denormal and one diagonal."""
    a = random_matrix((5, 38, 35), "complex64")
    a[1, 3, 4] = complex(0, np.nan)
    a[2, :, 5:9] = 0.0
    a[3] *= np.float32(1e-41)
    a[4] = np.eye(38, 35) * 1j
    o = run(pairs, a, u_cols=38)
    assert o.findings == []
    assert o.status.tolist() == [CONVERGED, NON_FINITE, CONVERGED, CONVERGED, CONVERGED]
    assert all(np.isnan(x[1].view(np.float32)).all() for x in (o.u, o.s, o.vt))
    assert o.sweeps[[1, 4]].tolist() == [0, 1]
    assert np.array_equal(o.s[4], np.ones(35, np.float32))
    for i in (0, 2, 3, 4):
        alone = run(pairs, a[i : i + 1], u_cols=38)
        if i != 3:  # singular values that are denormal have few bits
            assert_svd(a[i : i + 1], alone)
        assert np.array_equal(alone.u[0], o.u[i])
        assert np.array_equal(alone.s[0], o.s[i])
        assert np.array_equal(alone.vt[0], o.vt[i])
    exact = np.linalg.svd(a[3].astype(complex), compute_uv=False)
    assert np.abs(o.s[3] - exact).max() <= 0.51 * 2.0**-149 + 5 * 2.0**-23 * exact[0]
    one = Outcome(o.u[3:4], exact[None], o.vt[3:4], *(None,) * 3, [])  # type: ignore[arg-type]
    assert max(ratios(a[3:4], one).values()) < 5


def test_not_converged_says_so(pairs: Simulator) -> None:
    a = random_matrix((1, 40, 36), "complex64")
    for plan in ({"sweeps": 2}, {"sweeps": 2, "rounds": 50}, {"sweeps": 0}):
        o = run(pairs, a, plan=plan)
        assert o.findings == []
        assert o.status[0] == NOT_CONVERGED
        assert o.sweeps[0] == plan["sweeps"]
        assert (o.off_norm[0] > 1e-3) == (plan["sweeps"] > 0)
        assert all(np.isnan(x.view(np.float32)).all() for x in (o.u, o.s, o.vt))


def test_relative_accuracy_on_scaled_columns(pairs: Simulator) -> None:
    """A = B D: each singular value to a few ulps of itself."""
    b = np.linalg.qr(random_matrix((34, 34), "complex128"))[0]
    b += 0.1 * random_matrix((34, 34), "complex128", 1) / 34
    a = (b * np.logspace(0, -12, 34)).astype(np.complex64)
    o = run(pairs, a[None])
    assert o.findings == []
    exact = reference_sigma(a)
    assert np.max(np.abs(o.s[0] - exact) / exact) < 50 * 34 * 2.0**-23


@pytest.mark.parametrize("kernel", ["svd_pairs_turn", "svd_pairs_finish"])
def test_scratch_is_what_the_kernel_uses(pairs: Simulator, kernel: str) -> None:
    a = random_matrix((1, 40, 36), "complex64")
    o = run(pairs, a * np.eye(40, 36), less=kernel)
    assert {f.kind for f in o.findings} == {"out_of_bounds"}
    assert "threadgroup argument tile" in o.findings[0].text


@pytest.mark.slow
def test_large() -> None:
    """Sweeps stay few, more simdgroups than a threadgroup has, and V does not drift."""
    hard = hard_matrices(129)
    names = ("geometric_1e6", "clusters", "graded_rows", "graded_columns", "ones", "kahan")
    a = np.stack([random_matrix((129, 129), "complex64"), *(phased(hard[k]) for k in names)])
    o = run(shipped(), a, checked=False)
    assert_svd(a, o)
    assert o.sweeps.max() <= 12
    assert o.sweeps[0] <= 9
