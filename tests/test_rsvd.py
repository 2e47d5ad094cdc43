"""rsvd: accuracy, certificate, derivative, options, and what it must refuse."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import hard_matrices, launching, random_matrix, spectrum, x64_for
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmetal_linalg as jml
from jaxmetal_linalg import _lowrank
from jaxmetal_linalg._device import arrays_for
from jaxmetal_linalg._measure import sigma_error_ulp, svd_ratios, ulp

SPECTRA = {
    "exponential": lambda i: np.exp(-i / 10),
    "one_over_i": lambda i: 1 / i,
    "slow": lambda i: i**-0.5,
}


def error_norm(a: Any, result: Any) -> Any:
    """|a - U S Vh|_2 in double precision."""
    u, s, vh = (np.asarray(x, np.complex128) for x in result)
    return np.linalg.norm(np.asarray(a) - (u * s[..., None, :]) @ vh, 2, axis=(-2, -1))


def check_orthonormal(a: Any, result: Any, label: str = "") -> None:
    u, s, vh = map(np.asarray, result)
    assert np.all(s >= 0), label
    assert np.all(np.diff(s, axis=-1) <= 0), label
    ratios = svd_ratios(a, u, s, vh)
    assert max(ratios.orthogonality_u, ratios.orthogonality_v) < jml.ACC_RATIO, f"{label} {ratios}"


def check_near_optimal(a: Any, result: Any, error: Any, sigma: Any, label: str = "") -> None:
    """Everything the docstring promises of the defaults, for a matrix of known sigma."""
    k = result.S.shape[-1]
    check_orthonormal(a, result, label)
    found = error_norm(a, result)
    assert found <= jml.ACC_RSVD_OPTIMAL * sigma[k], f"{label}: {found / sigma[k]} of the best"
    half = slice(k // 2)
    relative = np.abs(np.float64(result.S[half]) - sigma[half]) / sigma[half]
    assert relative.max() < jml.ACC_RSVD_SIGMA, label
    assert found <= error <= 2.5 * found, f"{label}: certificate {error / found}"


# --- accuracy --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "name", "shape", "k"),
    [
        ("host", "exponential", (300, 200), 20),
        pytest.param("host", "one_over_i", (300, 200), 20, marks=pytest.mark.slow),
        ("host", "one_over_i", (200, 300), 20),
        pytest.param("host", "slow", (300, 200), 20, marks=pytest.mark.slow),
        pytest.param("host", "one_over_i", (600, 600), 50, marks=pytest.mark.slow),
        ("xla", "one_over_i", (200, 300), 20),
        ("sim", "exponential", (60, 80), 10),
    ],
    indirect=["device"],
)
@pytest.mark.once
def test_near_optimal_with_defaults(device: str, name: str, shape: tuple[int, int], k: int) -> None:
    sigma = SPECTRA[name](np.arange(1.0, min(shape) + 1))
    a = spectrum(shape, sigma).astype(np.float32)
    run = jax.jit(lambda a: jml.rsvd(a, k, return_error=True))
    (result, error), kernels = launching(run, a)
    check_near_optimal(a, result, error, sigma, name)
    if device == "sim":
        assert {kernel.split("_")[0] for kernel in kernels} == {"rsvd", "svd"}


@pytest.mark.once
def test_shifts_make_an_iteration_count_for_more(host: None) -> None:
    sigma = SPECTRA["slow"](np.arange(1.0, 301))
    a = spectrum((300, 300), sigma).astype(np.float32)
    errors = {
        (name, t): error_norm(a, jml.rsvd(a, 40, n_iter=t, power_iteration_normalizer=name))
        for name, t in (("auto", 4), ("LU", 4), ("QR", 4), ("none", 1), ("LU", 1))
    }
    best = sigma[40]
    assert errors["auto", 4] - best < 0.3 * (errors["LU", 4] - best)
    assert errors["LU", 4] == pytest.approx(errors["QR", 4], rel=1e-3)
    assert errors["none", 1] == pytest.approx(errors["LU", 1], rel=1e-3)
    assert errors["LU", 4] < errors["LU", 1]


@pytest.mark.parametrize("shape", ["square", "tall", "wide"])
@pytest.mark.once
def test_hard_matrices(host: None, shape: str) -> None:
    n, k = 48, 8
    # Products flush denormal numbers, which is what many entries of the one left out are.
    named = {name: a for name, a in hard_matrices(n).items() if name != "scaled_1e-37"}
    a = np.stack(list(named.values())).astype(np.float32)
    if shape != "square":
        a = np.concatenate([a, a], axis=1 if shape == "tall" else 2)
    result, bound = jax.jit(lambda a: jml.rsvd(a, k, return_error=True))(a)
    for i, name in enumerate(named):
        own = jml.SVDResult(*(x[i] for x in result))
        check_orthonormal(a[i], own, name)
        sigma = np.linalg.svd(np.float64(a[i]), compute_uv=False)
        found, eps = error_norm(a[i], own), ulp("float32") * sigma[0]
        assert found <= 1.05 * sigma[k] + 20 * eps, name
        assert found <= bound[i] + 4 * eps, name
        # Values come from a subspace: from below, but for rounding.
        assert np.all(own.S - sigma[:k] <= 20 * eps), name


@pytest.mark.once
def test_hard_matrices_portably() -> None:
    a = np.stack([hard_matrices(24)[n] for n in ("zero", "ones", "rank_1", "scaled_1e37")])
    a = a.astype(np.float32)
    with jml.use_device("xla"):
        result = jml.rsvd(a, 5, n_iter=1)
    for i in range(len(a)):
        check_orthonormal(a[i], [x[i] for x in result])


@pytest.mark.once
def test_float64_reaches_rounding(host: None, x64: None) -> None:
    a = spectrum((60, 40), 0.5 ** np.arange(40.0))
    result = jml.rsvd(a, 12, n_iter=3)
    assert sigma_error_ulp(result.S, 0.5 ** np.arange(12.0)) < 20
    check_orthonormal(a, result)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64", "complex128", "int32"])
def test_dtypes(host: None, dtype: str) -> None:
    with x64_for(dtype):
        a = jnp.asarray(10 * random_matrix((30, 20), dtype if dtype[0] == "c" else "float32"))
        a = a.astype(dtype)
        u, s, vh = jml.rsvd(a, 4, n_iter=6)
        want = jnp.float32 if dtype == "int32" else a.dtype
        assert u.dtype == vh.dtype == want
        assert s.dtype == jnp.finfo(want).dtype
        wide = np.asarray(a, np.complex128)
        sigma = np.linalg.svd(wide, compute_uv=False)
        slack = 0.1 if dtype in ("float16", "bfloat16") else 1e-3
        assert error_norm(wide, (u, s, vh)) <= (1.05 + slack) * sigma[4]
        at = np.argmax(np.abs(np.asarray(u, np.complex128)), axis=0)
        pivots = np.asarray(u, np.complex128)[at, np.arange(4)]
        assert np.all(pivots.real > 0)
        assert np.all(np.abs(pivots.imag) < 1e-6)


@settings(max_examples=8)  # each is a shape to compile
@given(m=st.integers(1, 9), n=st.integers(1, 9), data=st.data())
@pytest.mark.once
def test_full_rank_is_the_svd(m: int, n: int, data: Any) -> None:
    """With k + n_oversamples >= min(m, n) nothing is left to chance."""
    k = data.draw(st.integers(1, min(m, n)))
    a = random_matrix((m, n), "float32")
    with jml.use_device("host"):
        result = jml.rsvd(a, k)
    sigma = np.linalg.svd(np.float64(a), compute_uv=False)
    assert sigma_error_ulp(result.S, sigma[:k]) < 20
    check_orthonormal(a, result)


# --- transformations -------------------------------------------------------------------------


def test_batch_vmap_and_jit_agree(wide_device: str) -> None:
    a = random_matrix((2, 3, 14, 10), "float32")
    f = functools.partial(jml.rsvd, k=3, n_oversamples=2, n_iter=1)
    whole = f(a)
    moved = jnp.moveaxis(a, (0, 1), (3, 1))  # [14, 3, 10, 2]
    nested = jax.jit(jax.vmap(jax.vmap(f, in_axes=1), in_axes=3))
    for x, y in zip(whole, nested(moved), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    calls = jml.explain(nested, moved).calls
    parts = ("qr", "svd") if calls[0].route == "composite" else ()
    assert {(c.op, c.batch) for c in calls} == {(op, 6) for op in ("rsvd", *parts)}
    assert calls[0].shape == (14, 10)


def test_keys(host: None) -> None:
    a = random_matrix((2, 14, 10), "float32")
    f = functools.partial(jml.rsvd, k=3, n_oversamples=2, n_iter=0)
    default = f(a)
    np.testing.assert_array_equal(default.S, f(a, key=jax.random.key(0)).S)
    np.testing.assert_array_equal(default.S, f(a, key=jax.random.PRNGKey(0)).S)
    keys = jax.random.split(jax.random.key(1), 3)
    each = jax.vmap(lambda key: f(a, key=key))(keys)
    assert each.S.shape == (3, 2, 3)
    assert len(np.unique(each.S[:, 0, 0])) == 3
    paired = jax.vmap(lambda a, key: f(a, key=key))(a, keys[:2])
    np.testing.assert_allclose(paired.S, [each.S[0, 0], each.S[1, 1]], rtol=1e-5)
    crossed = jax.vmap(lambda a: jax.vmap(lambda key: f(a, key=key))(keys))(a)
    np.testing.assert_allclose(crossed.S, jnp.swapaxes(each.S, 0, 1), rtol=1e-5)


@pytest.mark.parametrize("sketch", ["gaussian", "sparse_sign"])
@pytest.mark.once
def test_same_key_same_sketch(sketch: str) -> None:
    """On every device and in every precision: without iterations the result shows the sketch."""
    a = random_matrix((14, 10), "float32")
    key = jax.random.key(5)
    found = []
    for device in jml.devices():
        with arrays_for(device):
            found.append(jml.rsvd(a, 3, key=key, n_oversamples=1, n_iter=0, sketch=sketch))
    with jax.enable_x64(True), arrays_for("host"):
        wide = np.float64(a)
        found.append(jml.rsvd(wide, 3, key=key, n_oversamples=1, n_iter=0, sketch=sketch))
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            np.testing.assert_allclose(x, y, atol=3e-5)
    other = jml.rsvd(a, 3, key=jax.random.key(6), n_oversamples=1, n_iter=0, sketch=sketch)
    assert np.abs(other.S - found[0].S).max() > 1e-3


@pytest.mark.once
def test_sparse_sign_finds_the_range(host: None) -> None:
    sigma = SPECTRA["one_over_i"](np.arange(1.0, 101))
    a = spectrum((120, 100), sigma).astype(np.float32)
    result, error = jml.rsvd(a, 10, sketch="sparse_sign", return_error=True)
    check_near_optimal(a, result, error, sigma)


def test_empty_batch() -> None:
    result, error = jml.rsvd(jnp.zeros((0, 5, 4)), 2, return_error=True)
    assert [x.shape for x in (*result, error)] == [(0, 5, 2), (0, 2), (0, 2, 4), (0,)]
    _, rank = jml.rsvd(jnp.zeros((0, 5, 4)), tol=0.1)
    assert rank.shape == (0,)


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.once
def test_center_is_never_formed(host: None, shape: tuple[int, int]) -> None:
    a = random_matrix(shape, "float32") + 3
    f = functools.partial(jml.rsvd, k=4, n_iter=3, n_oversamples=4, center=True, return_error=True)
    result, error = f(a)
    centred = a - a.mean(axis=0, keepdims=True)
    plain = jml.rsvd(centred, 4, n_iter=3, n_oversamples=4)
    for x, y in zip(result, plain, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)
    assert error_norm(centred, result) <= error
    for size in _results(jax.make_jaxpr(f)(a).jaxpr, "sub"):
        assert size != shape


def _results(jaxpr: Any, name: str) -> list[tuple[int, ...]]:
    from jaxmetal_linalg import _compat

    found = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == name]
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            for inner in _compat.jaxprs_in(value):
                found += _results(inner, name)
    return found


def test_flip_sign_can_be_left_out(host: None) -> None:
    a = random_matrix((12, 9), "float32")
    raw = jml.rsvd(a, 4, flip_sign=False)
    fixed = jml.rsvd(a, 4)
    assert np.all(np.take_along_axis(fixed.U, jnp.argmax(jnp.abs(fixed.U), 0)[None], 0) > 0)
    np.testing.assert_allclose(np.abs(raw.U), np.abs(fixed.U), atol=1e-6)
    np.testing.assert_allclose((raw.U * raw.S[None]) @ raw.Vh, (fixed.U * fixed.S[None]) @ fixed.Vh)


@pytest.mark.once
def test_tolerance(host: None) -> None:
    """Ranks under vmap and jit with a traced tolerance, and zeros past them."""
    sigma = 0.3 ** np.arange(20.0)
    a = np.stack([spectrum((30, 20), s).astype(np.float32) for s in (sigma, sigma**2, 0 * sigma)])

    @jax.jit
    def f(a: Any, tol: Any) -> Any:
        return jax.vmap(lambda a: jml.rsvd(a, tol=tol, max_rank=8, return_error=True))(a)

    for tol in (0.2, 0.02, 1e-3):
        result, rank, error = f(a, tol)
        assert rank.dtype == jnp.int32
        assert result.U.shape == (3, 30, 8)
        for i, power in ((0, 1), (1, 2)):
            needed = int((sigma**power > tol).sum())
            assert needed <= rank[i] <= needed + 1
            assert error_norm(a[i], [x[i] for x in result]) <= min(tol, float(error[i]))
            assert np.all(result.S[i, rank[i] :] == 0)
            assert np.all(result.S[i, : rank[i]] > 0)
            assert np.all(result.U[i, :, rank[i] :] == 0)
            assert np.all(result.Vh[i, rank[i] :] == 0)
        assert rank[2] == 0
        assert error[2] == 0
    result, rank, error = f(a, 0.0)  # cannot be reached: all there is room for
    assert rank[0] == 8
    assert error[0] > 0


@pytest.mark.slow
@pytest.mark.once
def test_gradient_with_tolerance(host: None) -> None:
    a = spectrum((30, 20), 0.3 ** np.arange(20.0)).astype(np.float32)
    low = lambda u, s, vh: ((u * jnp.sin(s)[None]) @ vh * random_matrix((30, 20), "float32")).sum()  # noqa: E731
    _, rank = jml.rsvd(a, tol=0.02, max_rank=8)
    got = jax.grad(lambda a: low(*jml.rsvd(a, tol=0.02, max_rank=8)[0]))(a)
    want = jax.grad(lambda a: low(*jml.rsvd(a, int(rank), n_iter=6)))(a)
    np.testing.assert_allclose(got, want, atol=1e-3)


# --- certificate -----------------------------------------------------------------------------


def random_spectra(count: int, m: int, n: int) -> np.ndarray:
    """Matrices of all kinds of decay; every seventh of rank 3."""
    g = np.random.default_rng(0)
    index = np.arange(n) / n
    sigma = 10.0 ** (-g.uniform(0, 5, (count, 1)) * index ** g.uniform(0.2, 3, (count, 1)))
    sigma[::7, 3:] = 0
    u = np.linalg.qr(g.standard_normal((count, m, n)))[0]
    v = np.linalg.qr(g.standard_normal((count, n, n)))[0]
    return ((u * sigma[:, None]) @ v).astype(np.float32)


@pytest.mark.once
def test_certificate_holds_on_a_thousand_spectra(host: None) -> None:
    a = random_spectra(1000, 24, 18)
    keys = jax.random.split(jax.random.key(3), len(a))
    f = lambda a, key: jml.rsvd(a, 4, n_oversamples=2, n_iter=1, key=key, return_error=True)  # noqa: E731
    result, bound = jax.jit(jax.vmap(f))(a, keys)
    true = error_norm(a, result)
    # 0.1 failures are expected; two happen once in two hundred runs.
    assert (bound < true).sum() <= 1
    above_rounding = true > 1e-5 * np.asarray(result.S[:, 0])
    assert above_rounding.sum() > 800
    assert (bound / true)[above_rounding].max() < 2.5


def test_certificate_fails_as_rarely_as_it_says(
    host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One probe, and a stated probability large enough to be counted, on a tail of one value."""
    monkeypatch.setattr(_lowrank, "CERTIFICATE_FAILURE", 0.3)
    monkeypatch.setattr(_lowrank, "PROBES", 1)
    u, s, v = (jnp.zeros(x, jnp.float32) for x in ((8, 1), (1,), (6, 1)))
    a = jnp.zeros((8, 6)).at[2, 3].set(2.0)
    op = _lowrank.matrix_operator(a)
    keys = jax.random.split(jax.random.key(0), 4000)
    bound = jax.vmap(lambda key: _lowrank.error_bound(op, u, s, v, key))(keys)
    failed = float((bound < 2.0).mean())
    assert 0.2 < failed < 0.3  # P(|g| < 0.376) = 0.293


# --- derivative ------------------------------------------------------------------------------

W = random_matrix((24, 16), "complex128", 7)


def truncated(a: Any, k: int, center: bool = False) -> Any:
    """A smooth function of the exact rank-k truncation, by NumPy."""
    if center:
        a = a - a.mean(axis=0, keepdims=True)
    u, s, vh = np.linalg.svd(a, full_matrices=False)
    return float((((u[:, :k] * np.sin(s[:k])) @ vh[:k]) * W[: a.shape[0], : a.shape[1]]).sum().real)


def loss(result: Any) -> Any:
    u, s, vh = result
    w = W[: u.shape[0], : vh.shape[1]]
    return (((u * jnp.sin(s)[None]) @ vh) * w).sum().real


@pytest.mark.parametrize(
    ("shape", "dtype", "center"),
    [
        ((24, 16), "float64", False),
        pytest.param((16, 16), "float64", True, marks=pytest.mark.slow),
        pytest.param((14, 16), "float64", False, marks=pytest.mark.slow),
        ((24, 16), "complex128", True),
        pytest.param((12, 16), "complex128", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.once
def test_derivative_against_differences(
    host: None, x64: None, shape: tuple[int, int], dtype: str, center: bool
) -> None:
    k = 4
    sigma = 0.8 ** np.arange(min(shape))
    u, _, vh = np.linalg.svd(random_matrix(shape, dtype), full_matrices=False)
    a = jnp.asarray((u * sigma) @ vh)
    da = random_matrix(shape, dtype, 3)
    step = 1e-6
    ahead, behind = np.asarray(a) + step * da, np.asarray(a) - step * da
    want = (truncated(ahead, k, center) - truncated(behind, k, center)) / (2 * step)
    f = jax.jit(lambda a: loss(jml.rsvd(a, k, n_iter=12, n_oversamples=6, center=center)))
    forward = jax.jvp(f, (a,), (da,))[1]
    reverse = (jax.grad(f)(a) * da).sum().real
    assert forward == pytest.approx(want, rel=1e-6)
    assert reverse == pytest.approx(want, rel=1e-6)


@pytest.mark.once
def test_neglecting_the_residual_is_wrong(host: None, x64: None) -> None:
    """pytorch#69531: what one gets from triplets alone, without A's own remainder."""
    k, a = 4, spectrum((24, 16), 0.9 ** np.arange(16.0))
    da = random_matrix((24, 16), "float64", 3)
    u, s, vh = (x[..., :k] if i < 2 else x[:k] for i, x in enumerate(np.linalg.svd(a, False)))
    known = tuple(map(jnp.asarray, (u, s, vh.T)))
    none = jnp.zeros(0), jnp.zeros((16, 0))
    step = 1e-6
    want = (truncated(a + step * da, k) - truncated(a - step * da, k)) / (2 * step)

    def slope(op: Any) -> Any:
        d_op = _lowrank.matrix_operator(jnp.asarray(da))
        du, ds, dv = _lowrank.truncated_tangents(op, d_op, *known, *none, 24)
        point = jml.SVDResult(known[0], known[1], known[2].T)
        return jax.jvp(loss, (point,), (jml.SVDResult(du, ds, dv.T),))[1]

    right = slope(_lowrank.matrix_operator(jnp.asarray(a)))
    wrong = slope(_lowrank.matrix_operator(jnp.asarray((u * s) @ vh)))
    assert right == pytest.approx(want, rel=1e-6)
    assert abs(wrong - want) > 0.1 * abs(want)
    ours = jax.jvp(lambda a: loss(jml.rsvd(a, k, n_iter=40)), (jnp.asarray(a),), (da,))[1]
    assert ours == pytest.approx(want, rel=1e-6)


@pytest.mark.once
def test_higher_derivatives(host: None, x64: None) -> None:
    """Second and third, forward and reverse, against those of the full decomposition."""
    a = jnp.asarray(spectrum((8, 6), 0.8 ** np.arange(6.0)))
    f = lambda a: loss(jml.rsvd(a, 2, n_oversamples=2, n_iter=30))  # noqa: E731

    def exact(a: Any) -> Any:
        u, s, vh = jml.svd(a, False)
        return loss((u[:, :2], s[:2], vh[:2]))

    hessian = jax.jit(jax.hessian(f))(a).reshape(48, 48)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-9)
    np.testing.assert_allclose(hessian, jax.jit(jax.hessian(exact))(a).reshape(48, 48), atol=1e-7)
    da = jnp.asarray(random_matrix((8, 6), "float64", 2))

    def along(g: Any) -> Any:
        return lambda x: jax.jvp(g, (x,), (da,))[1]

    third = jax.jit(along(along(along(f))))(a)
    assert third == pytest.approx(float(jax.jit(along(along(along(exact))))(a)), rel=1e-6)
    both = jax.jit(jax.vmap(jax.grad(f)))(jnp.stack([a, 2 * a]))
    np.testing.assert_allclose(both[1], jax.grad(f)(2 * a), atol=1e-9)


TIED = {
    "identity": np.eye(10, 8),
    "zero": np.zeros((10, 8)),
    "ones": np.ones((10, 8)),
    "pairs": np.diag([3.0, 3, 3, 3, 1, 1, 0, 0, 0, 0])[:, :8],
}


@pytest.mark.parametrize(
    "dtype",
    ["float32", *(pytest.param(d, marks=pytest.mark.slow) for d in ("complex64", "float64"))],
)
@pytest.mark.once
def test_gradients_are_finite_at_ties(host: None, dtype: str) -> None:
    with x64_for(dtype):
        a = jnp.asarray(np.stack(list(TIED.values())).astype(dtype))

        def f(a: Any) -> Any:
            u, s, vh = jml.rsvd(a, 3, n_oversamples=2)
            return jnp.abs(u + 0.1).sum() + s.sum() + jnp.abs(vh - 0.2).sum()

        gradient, second = jax.jvp(jax.jit(jax.grad(f)), (a,), (jnp.ones_like(a),))
        assert np.all(np.isfinite(gradient))
        assert np.all(np.isfinite(second))
        # Where kept and cut-off values tie, rounding decides: up to 52 over 30 keys (12 with
        # LAPACK's QR in place of ours), most of them 1. Undropped gaps would give 1e9 and more.
        assert np.abs(gradient).max() < 1e3
        # The sum of the leading singular values has a (one-sided) derivative even there.
        g = jax.grad(lambda a: jml.rsvd(a, 3, n_oversamples=2).S.sum())(a[0])
        assert np.linalg.norm(np.asarray(g)) == pytest.approx(3**0.5, rel=1e-5)


def test_gradient_has_no_scale_of_its_own(host: None) -> None:
    a = spectrum((20, 12), 0.7 ** np.arange(12.0)).astype(np.float32)
    f = jax.jit(
        jax.grad(lambda a: (lambda r: (r.U @ r.Vh * W[:20, :12].real).sum())(jml.rsvd(a, 3)))
    )
    base = f(a)
    for power in (2.0**97, 2.0**-97):
        np.testing.assert_allclose(f(a * np.float32(power)) * np.float32(power), base, atol=1e-4)


@pytest.mark.once
def test_nan_stays_in_its_matrix(wide_device: str) -> None:
    a = random_matrix((3, 14, 10), "float32")
    a[1, 2, 3] = np.nan
    (u, s, vh), error = jml.rsvd(a, 3, n_oversamples=2, n_iter=1, return_error=True)
    for x in (u, s, vh, error):
        assert np.all(np.isnan(x[1]))
        assert np.all(np.isfinite(x[::2]))
    a[1, 2, 3] = np.inf
    result, rank = jml.rsvd(a, tol=0.1, max_rank=3, n_oversamples=2, n_iter=1)
    for x in result:
        assert np.all(np.isnan(x[1]))
        assert np.all(np.isfinite(x[::2]))
    assert rank[1] == 3
    g = jax.grad(lambda a: jnp.nansum(jml.rsvd(a, 3, n_oversamples=2, n_iter=1).S))(a)
    assert np.all(np.isfinite(g[::2]))


# --- explain and errors ----------------------------------------------------------------------


def test_explain(device: str) -> None:
    a = jax.ShapeDtypeStruct((4, 100, 80), jnp.float32)
    explanation = jml.explain(lambda a: jml.rsvd(a, 5, n_iter=2), a)
    first, *others = explanation.calls
    assert (first.op, first.shape, first.batch) == ("rsvd", (100, 80), 4)
    if device in ("sim", "metal"):
        assert (first.device, first.route, first.variant) == (device, "kernel", "cholesky")
        assert others == []
    else:
        assert first.route == "composite"
        assert {c.op for c in others} == {"svd", "qr"}
        assert {c.device for c in others} == {device}
        assert {c.shape for c in others if c.op == "svd"} == {(15, 15)}
        assert [c.shape for c in others if c.op == "qr"] == [(100, 15), (80, 15)]
    assert first.route in str(explanation)
    gradient = jax.grad(lambda a: jml.rsvd(a, 5, n_iter=2).S.sum())
    assert [c.op for c in jml.explain(gradient, a).calls].count("rsvd") == 1


# --- the one call ----------------------------------------------------------------------------


def test_what_one_call_serves(sim: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(k: int, dtype: Any = jnp.float32, **options: Any) -> Any:
        # On the simulator qr takes complex matrices up to 32 rows, and so does the composite.
        shape = (30, 20) if dtype == jnp.complex64 else (300, 200)
        a = jax.ShapeDtypeStruct(shape, dtype)
        return jml.explain(lambda a: jml.rsvd(a, k, **options), a).calls[0]

    assert first(118).route == "kernel"
    for dtype in (jnp.float16, jnp.bfloat16):
        assert first(118, dtype, center=True, n_iter=0).route == "kernel"
    for call, why in (
        (first(119), "k + n_oversamples up to 128 in one call"),
        (first(5, jnp.complex64), "dtype float16, bfloat16 or float32"),
        (first(5, power_iteration_normalizer="QR"), "auto or LU"),
        (first(5, power_iteration_normalizer="none"), "auto or LU"),
    ):
        assert call.route == "composite"
        assert why in call.reason
    on_gpu = jml.explain(lambda a: jml.rsvd(a, 9), np.ones((50, 40), np.float32), caps="apple-m3")
    assert [(c.op, c.device, c.route) for c in on_gpu.calls] == [("rsvd", "metal", "kernel")]
    (call,) = jml.explain(
        lambda a: jml.rsvd(a, 9), jax.ShapeDtypeStruct((600, 600), jnp.float32), caps="nvidia-h200"
    ).calls
    assert (call.device, call.route, call.variant) == ("cuda", "kernel", "library")
    assert "with A in 16 bits, by a library" in call.reason
    monkeypatch.setenv("JAXMETAL_VARIANT", "rsvd:cholesky")
    assert "asked for by name" in first(5).reason
    with pytest.raises(jml.DeviceUnavailableError, match="up to 128 in one call"):
        first(119)


@pytest.mark.parametrize("row", ["cholesky", "library"])
def test_one_call_on_hard_matrices(sim: None, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    """Orthonormal whatever the matrix; rank-deficient, zero and badly scaled ones among them."""
    monkeypatch.setenv("JAXMETAL_SIM", "fast")
    monkeypatch.setenv("JAXMETAL_VARIANT", f"rsvd:{row}")
    n, k = 40, 8
    named = hard_matrices(n)
    a = np.stack(list(named.values())).astype(np.float32)
    a = np.concatenate([a, a], axis=2)
    # Where R's largest entries are scaled back to just above 2^-22, and where Gram matrices of
    # columns that are all the same have errors in one direction.
    more = {"tiny": a[list(named).index("geometric_1e4")] * 2.0**-23, "nan": a[0] * np.nan}
    named = {**named, **more}
    a = np.concatenate([a, np.stack(list(more.values()))]).astype(np.float32)
    run = jax.jit(lambda a: jml.rsvd(a, k, n_oversamples=7, n_iter=2))
    result, kernels = launching(run, a)
    assert sum(x for kernel, x in kernels.items() if "factor" in kernel) == 2 * 2 + 2 * 8
    assert any(kernel.startswith("gemm") for kernel in kernels) == (row == "library")
    for i, name in enumerate(named):
        own = jml.SVDResult(*(x[i] for x in result))
        if name == "nan":
            assert all(np.isnan(x).all() for x in own)
            continue
        check_orthonormal(a[i], own, name)
        sigma = np.linalg.svd(np.float64(a[i]), compute_uv=False)
        eps = ulp("float32") * sigma[0]
        assert error_norm(a[i], own) <= 1.2 * sigma[k] + 20 * eps, name
        assert np.all(own.S - sigma[:k] <= 20 * eps), name


@pytest.mark.parametrize(
    ("shape", "k", "dtype", "options", "row"),
    [
        # 31 columns, and 33
        ((2, 70, 41), 26, "float16", {"center": True}, "cholesky"),
        ((2, 70, 41), 26, "float16", {"center": True}, "library"),
        pytest.param(
            *((41, 70), 28, "bfloat16", {"center": True}, "cholesky"), marks=pytest.mark.slow
        ),
        ((41, 70), 28, "bfloat16", {"center": True}, "library"),
        ((300, 90), 59, "float32", {"n_iter": 1}, "cholesky"),
        # More than the library sums at once, in one part and in several.
        ((2, 2070, 30), 9, "float32", {"n_iter": 1}, "library"),
        ((30, 2070), 9, "float32", {"n_iter": 1}, "library"),
        pytest.param(
            *((90, 80), 60, "float32", {"n_iter": 0, "power_iteration_normalizer": "LU"}),
            "cholesky",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.once
def test_one_call_is_the_composite(
    sim: None,
    monkeypatch: pytest.MonkeyPatch,
    shape: Any,
    k: int,
    dtype: str,
    options: Any,
    row: str,
) -> None:
    monkeypatch.setenv("JAXMETAL_SIM", "fast")
    monkeypatch.setenv("JAXMETAL_VARIANT", f"rsvd:{row}")
    m, n = shape[-2:]
    a = spectrum((m, n), 0.9 ** np.arange(float(min(m, n))))
    a = jnp.asarray(np.broadcast_to(a + 0.1, shape)).astype(dtype)
    f = functools.partial(jml.rsvd, k=k, n_oversamples=5, return_error=True, **options)
    (result, error), kernels = launching(jax.jit(f), a)
    assert any(name.startswith("rsvd_product") for name in kernels)
    assert ("rsvd_gather" in kernels) == (row == "library")
    monkeypatch.delenv("JAXMETAL_VARIANT")
    with jml.use_device("host"):
        want, _ = f(a)
    wide = np.float64(a.astype(jnp.float32))
    wide = wide - wide.mean(-2, keepdims=True) if options.get("center") else wide
    slack = 4 * float(jnp.finfo(dtype).eps) * float(want.S.max())
    np.testing.assert_allclose(np.float64(result.S), np.float64(want.S), atol=slack)
    excess = error_norm(wide, result) - error_norm(wide, want)
    assert np.all(excess <= slack)
    assert np.all(error_norm(wide, result) <= np.float64(error) + slack)
    assert result.U.dtype == dtype


def test_one_call_differentiates_and_maps(sim: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMETAL_SIM", "fast")
    a = np.stack([spectrum((24, 16), s * 0.7 ** np.arange(16.0)) for s in (1.0, 3.0)])
    a, da = a.astype(np.float32), random_matrix((2, 24, 16), "float32", 3)
    f = functools.partial(jml.rsvd, k=3, n_oversamples=4)

    def slopes() -> Any:
        g = jax.jit(jax.vmap(lambda a, da: jax.jvp(lambda a: loss(f(a)), (a,), (da,))))
        return (*g(a, da), jax.jit(jax.vmap(jax.grad(lambda a: loss(f(a)))))(a))

    ours = slopes()
    with jml.use_device("host"):
        want = slopes()
    for x, y in zip(ours, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4)
    keys = jax.random.split(jax.random.key(1), 3)
    each = jax.vmap(lambda key: f(a, key=key))(keys)
    for i, key in enumerate(keys):
        np.testing.assert_allclose(each.S[i], f(a, key=key).S, rtol=1e-6)


A = np.ones((6, 4), np.float32)


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (ValueError, r"k: expected a static integer from 1 to 4, got 5", lambda: jml.rsvd(A, 5)),
        (ValueError, r"k: .* from 1 to 4, got 0", lambda: jml.rsvd(A, 0)),
        (TypeError, r"k: .*got 2.0 of type float", lambda: jml.rsvd(A, 2.0)),
        (TypeError, r"k: .*got True", lambda: jml.rsvd(A, True)),
        (TypeError, r"exactly one of them, got neither", lambda: jml.rsvd(A)),
        (TypeError, r"got k=2 and tol=0.1", lambda: jml.rsvd(A, 2, tol=0.1)),
        (TypeError, r"max_rank: expected None", lambda: jml.rsvd(A, 2, max_rank=3)),
        (ValueError, r"max_rank: .*got 5", lambda: jml.rsvd(A, tol=0.1, max_rank=5)),
        (ValueError, r"tol: expected a number >= 0, got -1", lambda: jml.rsvd(A, tol=-1)),
        (TypeError, r"tol: ", lambda: jml.rsvd(A, tol="small")),
        (TypeError, r"tol: ", lambda: jml.rsvd(A, tol=np.ones(2))),
        (ValueError, r"n_oversamples: .*>= 0, got -1", lambda: jml.rsvd(A, 2, n_oversamples=-1)),
        (ValueError, r"n_iter: .*got -2", lambda: jml.rsvd(A, 2, n_iter=-2)),
        (ValueError, r"n_iter: .*'many'", lambda: jml.rsvd(A, 2, n_iter="many")),
        (TypeError, r"n_iter: ", lambda: jml.rsvd(A, 2, n_iter=1.5)),
        (
            TypeError,
            r"key: expected one JAX PRNG key or None, got 3",
            lambda: jml.rsvd(A, 2, key=3),
        ),
        (
            TypeError,
            r"key: .*\[2\]",
            lambda: jml.rsvd(A, 2, key=jax.random.split(jax.random.key(0))),
        ),
        (
            ValueError,
            r"power_iteration_normalizer: expected one of auto, QR, LU, none, got 'qr'",
            lambda: jml.rsvd(A, 2, power_iteration_normalizer="qr"),
        ),
        (ValueError, r"sketch: .*got 'dct'", lambda: jml.rsvd(A, 2, sketch="dct")),
        (TypeError, r"center: ", lambda: jml.rsvd(A, 2, center=None)),
        (TypeError, r"return_error: ", lambda: jml.rsvd(A, 2, return_error="yes")),
        (TypeError, r"flip_sign: ", lambda: jml.rsvd(A, 2, flip_sign=2)),
        (ValueError, r"a: expected shape \[..., m, n\]", lambda: jml.rsvd(A[0], 1)),
        (TypeError, r"a: expected an array", lambda: jml.rsvd("text", 1)),
        (ValueError, r"k: .*from 1 to 0", lambda: jml.rsvd(np.ones((3, 0)), 1)),
    ],
)
def test_bad_input(error: type[Exception], text: str, call: Any) -> None:
    with pytest.raises(error, match=r"^rsvd: argument.*" + text):
        call()
    with pytest.raises(error, match="rsvd: "):
        jax.jit(lambda: call())()
