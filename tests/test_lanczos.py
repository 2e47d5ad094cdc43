"""lanczos_svd: slow decay, residual bounds, breakdown, callables, derivative, bad input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import hard_matrices, random_matrix, spectrum
from test_rsvd import check_orthonormal, error_norm, loss, truncated

import jaxmetal_linalg as jml
from jaxmetal_linalg._measure import sigma_error_ulp, ulp

ULP = ulp("float32")


@pytest.mark.parametrize(
    ("device", "shape", "decay"),
    [
        ("host", (500, 400), lambda i: i**-0.5),
        ("host", (400, 500), lambda i: np.exp(-i / 10)),
        ("sim", (60, 50), lambda i: i**-0.5),
    ],
    indirect=["device"],
)
@pytest.mark.once
def test_reaches_rounding(device: str, shape: tuple[int, int], decay: Any) -> None:
    """Where ``rsvd`` with its default iterations is still a hundred ulp away."""
    k, sigma = 12, decay(np.arange(1.0, min(shape) + 1))
    a = spectrum(shape, sigma).astype(np.float32)
    result, info = jml.lanczos_svd(a, k, return_info=True)
    assert info.converged
    assert np.all(info.residual <= jml.ACC_LANCZOS_ULP * ULP * sigma[0])
    check_orthonormal(a, result)
    assert sigma_error_ulp(result.S, sigma[:k]) < 5
    assert error_norm(a, result) <= 1.0001 * sigma[k]
    left = np.float64(a).T @ np.float64(result.U) - np.float64(result.Vh).T * np.float64(result.S)
    right = np.float64(a) @ np.float64(result.Vh).T - np.float64(result.U) * np.float64(result.S)
    # The bounds are those of the recurrence; products and rotations add their own rounding.
    rounding = 20 * ULP * sigma[0]
    assert np.all(np.linalg.norm(left, axis=0) < info.residual + rounding)
    assert np.all(np.linalg.norm(right, axis=0) < info.residual + rounding)


@pytest.mark.once
def test_given_steps_and_honest_bounds(host: None) -> None:
    """Too few steps: not converged, bounds that say so, and a value within each of them."""
    sigma = np.arange(1.0, 201) ** -0.5
    a = spectrum((200, 200), sigma).astype(np.float32)
    result, info = jml.lanczos_svd(a, 10, n_iter=14, return_info=True)
    assert not info.converged
    assert info.products == 14
    assert info.residual.max() > 1e-3
    nearest = np.abs(np.float64(result.S)[:, None] - sigma).min(axis=1)
    assert np.all(nearest <= info.residual + 20 * ULP)
    check_orthonormal(a, result)
    more, later = jml.lanczos_svd(a, 10, n_iter=28, return_info=True)
    assert later.residual.max() < info.residual.max()
    assert error_norm(a, more) < error_norm(a, result)


@pytest.mark.once
def test_hard_matrices_stay_orthonormal(host: None) -> None:
    named = {n: x for n, x in hard_matrices(40).items() if not n.endswith("37")}
    a = np.stack(list(named.values())).astype(np.float32)
    result, info = jax.jit(lambda a: jml.lanczos_svd(a, 4, return_info=True))(a)
    assert np.all(info.converged)
    for i, name in enumerate(named):
        own = [x[i] for x in result]
        check_orthonormal(a[i], own, name)
        sigma = np.linalg.svd(np.float64(a[i]), compute_uv=False)
        assert sigma_error_ulp(own[1], sigma[:4]) < 10, name


@pytest.mark.once
def test_nan_stays_in_its_matrix(host: None) -> None:
    a = random_matrix((3, 12, 9), "float32")
    a[1, 2, 3] = np.inf
    result, info = jml.lanczos_svd(a, 2, return_info=True)
    for x in result:
        assert np.all(np.isnan(x[1]))
        assert np.all(np.isfinite(x[::2]))
    np.testing.assert_array_equal(info.converged, [True, False, True])


@pytest.mark.once
def test_dtypes_batch_and_vmap(host: None) -> None:
    a = random_matrix((2, 2, 12, 9), "complex64")
    whole = jml.lanczos_svd(a, 3)
    nested = jax.jit(jax.vmap(jax.vmap(lambda a: jml.lanczos_svd(a, 3))))
    for x, y in zip(whole, nested(a), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    sigma = np.linalg.svd(a.astype(np.complex128), compute_uv=False)
    assert sigma_error_ulp(whole.S, sigma[..., :3]) < 20
    for half in (jnp.float16, jnp.bfloat16):
        assert jml.lanczos_svd(a[0, 0].real.astype(half), 3).S.dtype == half
    empty = jml.lanczos_svd(np.zeros((0, 12, 9), np.complex64), 3)
    assert [x.shape for x in empty] == [(0, 12, 3), (0, 3), (0, 3, 9)]
    calls = jml.explain(nested, a).calls
    assert [(c.op, c.batch, c.shape) for c in calls] == [
        ("lanczos_svd", 4, (12, 9)),
        ("svd", 4, (9, 9)),
    ]


# --- callables -------------------------------------------------------------------------------


def operator(m: Any) -> jml.LinearOperator:
    return jml.LinearOperator(lambda x: m @ x, lambda y: m.conj().T @ y, m.shape, np.dtype(m.dtype))


@pytest.mark.parametrize("shape", [(30, 20), pytest.param((20, 30), marks=pytest.mark.slow)])
@pytest.mark.once
def test_callables_agree_with_the_array(host: None, shape: tuple[int, int]) -> None:
    a = random_matrix(shape, "complex64")
    whole = jml.lanczos_svd(a, 3)
    for given in (operator(a), tuple(operator(a))):
        for x, y in zip(whole, jml.lanczos_svd(given, 3), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.once
def test_a_matrix_that_could_not_be_stored(host: None) -> None:
    """Circulant, applied by FFT; its singular values are the moduli of the transform."""
    n = 1 << 15
    g = np.random.default_rng(0)
    transfer = np.r_[n // 8 : 0 : -1, np.zeros(n - n // 8)].astype(np.float32)
    transfer = transfer[g.permutation(n)] * np.float32(8 / n)

    def matvec(x: Any) -> Any:
        return jnp.fft.ifft(transfer * jnp.fft.fft(x))

    op = jml.LinearOperator(matvec, matvec, (n, n), np.complex64)
    result, info = jax.jit(lambda: jml.lanczos_svd(op, 2, n_iter=30, return_info=True))()
    top = np.sort(transfer)[::-1][:2]
    assert np.all(np.abs(result.S - top) <= info.residual + 1e-4)
    overlap = np.asarray(result.U) @ np.asarray(result.U).conj().T if n < 100 else None
    assert overlap is None
    np.testing.assert_allclose(np.abs(result.U.conj().T @ result.U), np.eye(2), atol=1e-5)


# --- derivative ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 12), pytest.param((12, 16), marks=pytest.mark.slow)])
@pytest.mark.once
def test_derivative_against_differences(host: None, x64: None, shape: tuple[int, int]) -> None:
    k, a = 3, spectrum(shape, 0.8 ** np.arange(12.0))
    da = random_matrix(shape, "float64", 3)
    step = 1e-6
    want = (truncated(a + step * da, k) - truncated(a - step * da, k)) / (2 * step)
    of_array = lambda a: loss(jml.lanczos_svd(a, k))  # noqa: E731
    of_callables = lambda a: loss(jml.lanczos_svd(operator(a), k))  # noqa: E731
    for f in (of_array, of_callables):
        assert jax.jvp(f, (jnp.asarray(a),), (da,))[1] == pytest.approx(want, rel=1e-6)
        gradient = jax.jit(jax.grad(f))(jnp.asarray(a))
        assert (gradient * da).sum() == pytest.approx(want, rel=1e-6)
    along = jax.jit(lambda x: jax.jvp(jax.grad(of_array), (x,), (da,))[1])
    exact = lambda x: (lambda r: loss((r.U[:, :k], r.S[:k], r.Vh[:k])))(jml.svd(x, False))  # noqa: E731
    second = jax.jit(lambda x: jax.jvp(jax.grad(exact), (x,), (da,))[1])
    np.testing.assert_allclose(along(jnp.asarray(a)), second(jnp.asarray(a)), atol=1e-6)


@pytest.mark.once
def test_derivative_by_a_parameter(host: None, x64: None) -> None:
    """Of callables, by a number deep inside them."""
    a = jnp.asarray(spectrum((16, 12), 0.8 ** np.arange(12.0)))
    b = jnp.asarray(random_matrix((16, 12), "float64", 5))

    def f(t: Any) -> Any:
        return loss(jml.lanczos_svd(operator(a + jnp.sin(t) * b), 2))

    step = 1e-6
    want = (truncated(a + np.sin(0.1 + step) * b, 2) - truncated(a + np.sin(0.1 - step) * b, 2)) / (
        2 * step
    )
    assert jax.grad(f)(0.1) == pytest.approx(float(want), rel=1e-6)


# --- errors ----------------------------------------------------------------------------------

A = np.ones((6, 4), np.float32)


def pair(out: int = 6, back: int = 4, shape: Any = (6, 4), dtype: Any = np.float32) -> Any:
    return jml.LinearOperator(
        lambda x: jnp.zeros(out, np.float32), lambda y: jnp.zeros(back, np.float32), shape, dtype
    )


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (ValueError, r"k: .*from 1 to 4, got 5", lambda: jml.lanczos_svd(A, 5)),
        (TypeError, r"k: .*'2' of type str", lambda: jml.lanczos_svd(A, "2")),
        (ValueError, r"n_iter: .*>= 3, got 2", lambda: jml.lanczos_svd(A, 3, n_iter=2)),
        (TypeError, r"n_iter: ", lambda: jml.lanczos_svd(A, 3, n_iter=4.0)),
        (TypeError, r"key: .*got 1 ", lambda: jml.lanczos_svd(A, 3, key=1)),
        (ValueError, r"a: expected shape", lambda: jml.lanczos_svd(A[0], 1)),
        (TypeError, r"a: .*\(matvec, rmatvec, shape", lambda: jml.lanczos_svd((len, len), 1)),
        (TypeError, r"a: .*tuple of", lambda: jml.lanczos_svd((len, 3, (2, 2)), 1)),
        (ValueError, r"a: .*shape \(m, n\).*got 6", lambda: jml.lanczos_svd(pair(shape=6), 1)),
        (
            ValueError,
            r"matvec to take \[4\] to \[6\].*got \(5,\)",
            lambda: jml.lanczos_svd(pair(5), 1),
        ),
        (ValueError, r"rmatvec to take \[6\] to \[4\]", lambda: jml.lanczos_svd(pair(6, 6), 1)),
        (
            TypeError,
            r"matvec to return dtype complex64",
            lambda: jml.lanczos_svd(pair(dtype=np.complex64), 1),
        ),
        (TypeError, r"a: .*got float16", lambda: jml.lanczos_svd(pair(dtype=np.float16), 1)),
        (TypeError, r"return_info: ", lambda: jml.lanczos_svd(A, 1, return_info="no")),
    ],
)
def test_bad_input(error: type[Exception], text: str, call: Any) -> None:
    with pytest.raises(error, match=r"^lanczos_svd: argument.*" + text):
        call()
