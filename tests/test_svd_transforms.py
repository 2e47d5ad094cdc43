"""svd under jit, vmap, jvp, vjp and their compositions; the derivative's edge cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import check_svd, lowered_text, random_matrix, x64_for
from jax.test_util import check_grads

import jaxmetal_linalg as jml

SHAPES = [(5, 5), (7, 4), (4, 7)]


def adjoint(x: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def abs2(x: jax.Array) -> jax.Array:
    return (x * jnp.conj(x)).real


def rebuild(u: Any, s: Any, vh: Any) -> Any:
    return (u * s[..., None, :]) @ vh


def weights(shape: tuple[int, ...], seed: int = 7) -> np.ndarray:
    return random_matrix(shape, np.float64, seed)


# --- jit and vmap ----------------------------------------------------------------------------


def test_jit_agrees_with_eager(device: str) -> None:
    a = random_matrix((3, 6, 4), "float32")
    for x, y in zip(jml.svd(a), jax.jit(jml.svd)(a), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("axes", [(0, 0), (1, 2), (2, 0), (3, 1), (-1, -1)])
def test_vmap_of_vmap_is_one_call(device: str, axes: tuple[int, int]) -> None:
    a = random_matrix((2, 3, 5, 4), "float32")
    outer, inner = axes
    moved = np.moveaxis(np.moveaxis(a, 1, 1 + inner % 3), 0, outer % 4)
    f = jax.vmap(jax.vmap(jml.svd, in_axes=inner), in_axes=outer)
    for x, y in zip(f(moved), jml.svd(a), strict=True):
        np.testing.assert_array_equal(x, y)
    (call,) = jml.explain(f, moved).calls
    assert call.batch == 6
    assert call.shape == (5, 4)
    text = lowered_text(f, moved)
    assert text.count("jml_svd_v1") == (0 if device == "xla" else 1)


def test_vmap_out_axes_and_unbatched(device: str) -> None:
    a = random_matrix((3, 4, 4), "float32")
    s = jax.vmap(jml.svdvals, out_axes=1)(a)
    assert s.shape == (4, 3)
    np.testing.assert_array_equal(s.T, jml.svdvals(a))
    both = jax.vmap(lambda x, y: jml.svdvals(x) * y, in_axes=(None, 0))(a[0], jnp.arange(3.0))
    assert both.shape == (3, 4)


def test_loops_and_branches(device: str) -> None:
    a = jnp.asarray(random_matrix((4, 5, 5), "float32"))
    _, s = jax.lax.scan(lambda c, x: (c, jml.svdvals(x)), 0.0, a)
    np.testing.assert_allclose(s, jml.svdvals(a), rtol=1e-5)
    t = jax.lax.cond(a[0, 0, 0] > 0, jml.svdvals, lambda x: jml.svdvals(2 * x), a[0])
    assert t.shape == (5,)
    r = jax.checkpoint(lambda x: jml.svd(x).S.sum())
    assert np.all(np.isfinite(jax.grad(r)(a[0])))


# --- derivatives against finite differences and against jnp ----------------------------------


def gauge_free(full: bool) -> Callable[[Any], Any]:
    """A function of U, S and Vh that no choice of signs or phases changes."""

    def f(a: Any) -> Any:
        u, s, vh = jml.svd(a, full)
        m, n = a.shape[-2:]
        k = min(m, n)
        left = abs2(u[..., :, :k]) * weights((m, k))
        right = abs2(vh[..., :k, :]) * weights((k, n))
        joint = rebuild(u[..., :, :k], jnp.cos(s), vh[..., :k, :])
        out = left.sum() + right.sum() + (joint * weights((m, n), 3)).real.sum() + (s**2).sum()
        if full:
            # Projectors onto the complements, written with the complements themselves.
            u2, v2 = u[..., :, k:], vh[..., k:, :]
            out = out + ((u2 @ adjoint(u2)) * weights((m, m), 4)).real.sum()
            out = out + ((adjoint(v2) @ v2) * weights((n, n), 5)).real.sum()
        return out

    return f


# The rule is the same code on every device; the portable SVD compiles slowly, so it takes a few.
DIFFERENCES = [
    # Each of shape, dtype and full with each other; all three together are many to compile.
    pytest.param(
        *("host", shape, dtype, full),
        marks=[pytest.mark.slow] if (i + (dtype == "float64") + full) % 2 else [],
    )
    for i, shape in enumerate(SHAPES)
    for dtype in ("float64", "complex128")
    for full in (False, True)
] + [("xla", (7, 4), "float64", True), ("xla", (4, 7), "complex128", False)]


@pytest.mark.parametrize(("device", "shape", "dtype", "full"), DIFFERENCES, indirect=["device"])
@pytest.mark.once
def test_derivatives_by_finite_differences(
    device: str, shape: tuple[int, int], dtype: str, full: bool
) -> None:
    with x64_for(dtype):
        a = jnp.asarray(random_matrix(shape, dtype))
        order = 2 if device == "host" else 1
        f = jax.jit(gauge_free(full))
        check_grads(f, (a,), order=order, modes=["fwd", "rev"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("device", "shape"),
    [*(("host", s) for s in SHAPES), pytest.param("xla", (4, 7), marks=pytest.mark.slow)],
    indirect=["device"],
)
def test_svdvals_derivatives(device: str, shape: tuple[int, int], x64: None) -> None:
    a = jnp.asarray(random_matrix(shape, "float64"))
    w = weights((min(shape),))
    f = jax.jit(lambda a: (jml.svdvals(a) ** 2 * w).sum())
    check_grads(f, (a,), order=2, modes=["fwd", "rev"])
    for options in ({}, {"gradient": "strict"}):
        g = jax.grad(lambda a, o=options: (jml.svdvals(a, **o) * w).sum())(a)
        h = jax.grad(lambda a: (jnp.linalg.svd(a, compute_uv=False) * w).sum())(a)
        np.testing.assert_allclose(g, h, atol=1e-12)


AGREE = [
    ("host", shape, dtype, gradient)
    for shape in SHAPES
    for dtype in ("float64", "complex128")
    for gradient in ("safe", "strict")
] + [("xla", (7, 4), "complex128", "safe")]


@pytest.mark.parametrize(("device", "shape", "dtype", "gradient"), AGREE, indirect=["device"])
def test_jvp_agrees_with_jnp(
    device: str, shape: tuple[int, int], dtype: str, gradient: str
) -> None:
    """The tangents themselves, phases included: same gauge as jnp's rule."""
    with x64_for(dtype):
        a = jnp.asarray(random_matrix((2, *shape), dtype, 1))
        da = jnp.asarray(random_matrix((2, *shape), dtype, 2))
        mine, dmine = jax.jvp(lambda a: jml.svd(a, False, gradient=gradient), (a,), (da,))
        theirs, dtheirs = jax.jvp(lambda a: jnp.linalg.svd(a, False), (a,), (da,))
        np.testing.assert_allclose(dmine.S, dtheirs.S, atol=1e-11)
        # Undo the free phases between the two decompositions.
        phase = jnp.sum(jnp.conj(mine.U) * theirs.U, axis=-2, keepdims=True)
        np.testing.assert_allclose(dmine.U * phase, dtheirs.U, atol=1e-10)
        back = jnp.swapaxes(jnp.conj(phase), -1, -2)
        np.testing.assert_allclose(dmine.Vh * back, dtheirs.Vh, atol=1e-10)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_full_matrices_stay_orthonormal_to_first_order(
    wide_device: str, shape: tuple[int, int], x64: None
) -> None:
    a = jnp.asarray(random_matrix(shape, "float64"))
    da = jnp.asarray(random_matrix(shape, "float64", 2))
    (u, s, vh), (du, ds, dvh) = jax.jvp(jml.svd, (a,), (da,))
    k = min(shape)
    np.testing.assert_allclose(u.T @ du + du.T @ u, 0, atol=1e-12)
    np.testing.assert_allclose(vh @ dvh.T + dvh @ vh.T, 0, atol=1e-12)
    rebuilt = (
        rebuild(du[:, :k], s, vh[:k])
        + rebuild(u[:, :k], ds, vh[:k])
        + rebuild(u[:, :k], s, dvh[:k])
    )
    np.testing.assert_allclose(rebuilt, da, atol=1e-12)
    # The complement does not turn within itself.
    np.testing.assert_allclose(u[:, k:].T @ du[:, k:], 0, atol=1e-12)
    np.testing.assert_allclose(vh[k:] @ dvh[k:].T, 0, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "gradient"),
    [("host", "safe"), ("host", "strict"), ("xla", "safe")],
    indirect=["device"],
)
def test_transforms_of_derivatives(device: str, gradient: str, x64: None) -> None:
    a = jnp.asarray(random_matrix((3, 5, 4), "float64"))

    def f(a: Any) -> Any:
        u, s, vh = jml.svd(a, False, gradient=gradient)
        return (rebuild(u, jnp.sin(s), vh) * weights((5, 4))).sum()

    gradient_of = jax.jit(jax.grad(f))
    each = jnp.stack([gradient_of(x) for x in a])
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(f)))(a), each, atol=1e-11)
    summed = jax.jit(jax.grad(lambda a: jax.vmap(f)(a).sum()))
    np.testing.assert_allclose(summed(a), each, atol=1e-11)
    forward = jax.jit(jax.vmap(jax.jacfwd(f)))(a)
    np.testing.assert_allclose(forward, each, atol=1e-11)
    hessian = jax.jit(jax.hessian(f))(a[0]).reshape(20, 20)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-9)

    def along(g: Any) -> Any:
        return lambda x: jax.jvp(g, (x,), (a[1],))[1]

    assert np.isfinite(jax.jit(along(along(along(f))))(a[0]))


def test_gradient_calls_svd_once(device: str) -> None:
    a = random_matrix((6, 6), "float32")
    for f in (lambda a: jml.svd(a).U.sum(), lambda a: jml.svdvals(a).sum()):
        assert len(jml.explain(jax.value_and_grad(f), a).calls) == 1


def test_info_has_no_derivative(device: str) -> None:
    a = jnp.asarray(random_matrix((2, 6, 5), "float32"))

    def f(a: Any) -> Any:
        (_, s, _), info = jml.svd(a, return_info=True)
        return s.sum(), info

    grad, info = jax.grad(f, has_aux=True)(a)
    assert np.all(np.isfinite(grad))
    assert np.all(info.status == 0)
    _, tangents = jax.jvp(f, (a,), (a,))
    assert tangents[1].status.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(tangents[1].off_norm, 0)
    only = jax.grad(lambda a: jml.svd(a, return_info=True)[1].off_norm.sum())(a)
    np.testing.assert_array_equal(only, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_gradients_are_formed_in_float32(device: str, dtype: str) -> None:
    a = jnp.asarray(random_matrix((6, 4), "float32")).astype(dtype)

    def f(a: Any) -> Any:
        u, s, vh = jml.svd(a, False)
        return rebuild(u, s**2, vh).astype(jnp.float32).sum()

    g = jax.grad(f)(a)
    assert g.dtype == a.dtype
    want = jax.grad(f)(a.astype(jnp.float32))
    scale = float(np.max(np.abs(want)))
    eps = float(jnp.finfo(dtype).eps)
    assert np.max(np.abs(np.asarray(g, np.float32) - want)) < 12 * eps * scale


# --- safe gradients --------------------------------------------------------------------------

DEGENERATE = {
    "identity": np.eye(5, 4),
    "zero": np.zeros((5, 4)),
    "ones": np.ones((5, 4)),
    "rank_2": np.outer(np.arange(5.0), np.ones(4)) + np.outer(np.ones(5), np.arange(4.0)),
    "pairs": np.diag([3.0, 3.0, 1.0, 1.0, 0.0])[:, :4],
}


SAFE = [
    ("host", dtype, shape, full)
    for dtype in ("float32", "complex64")
    for shape in ("tall", "wide", "square")
    for full in (False, True)
] + [("xla", "float32", "tall", True), ("xla", "complex64", "wide", False)]


@pytest.mark.parametrize(("device", "dtype", "shape", "full"), SAFE, indirect=["device"])
@pytest.mark.once
def test_safe_gradients_are_finite(device: str, dtype: str, shape: str, full: bool) -> None:
    a = np.stack(list(DEGENERATE.values())).astype(dtype)
    a = {"tall": a, "wide": a.swapaxes(1, 2), "square": a[:, :4]}[shape]

    def f(a: Any) -> Any:
        u, s, vh = jml.svd(a, full)
        return (jnp.abs(u.real + 0.1).sum() + s.sum() + jnp.abs(vh.real - 0.2).sum()).real

    def both(a: Any) -> Any:
        return jax.jvp(jax.grad(f), (a,), (jnp.ones_like(a),))

    first, second = jax.jit(jax.vmap(both))(a)
    for i, name in enumerate(DEGENERATE):
        assert np.all(np.isfinite(first[i])), name
        assert np.all(np.isfinite(second[i])), name


def test_polar_factor_gradient_is_right_for_repeated_values(wide_device: str, x64: None) -> None:
    """U Vh does not depend on the bases, so masking their rotations must not show."""
    a = jnp.asarray(np.diag([2.0, 2.0, 2.0, 1.0]))
    da = jnp.asarray(random_matrix((4, 4), "float64"))
    _, d = jax.jvp(lambda a: (lambda r: r.U @ r.Vh)(jml.svd(a)), (a,), (da,))
    h = 1e-6
    polar = [(lambda r: r[0] @ r[2])(np.linalg.svd(a + sign * h * da)) for sign in (1, -1)]
    np.testing.assert_allclose(d, (polar[0] - polar[1]) / (2 * h), atol=1e-8)


def test_strict_is_the_textbook_rule(device: str) -> None:
    g = jax.grad(lambda a: (jml.svd(a, gradient="strict").U * weights((3, 3))).sum())
    assert not np.all(np.isfinite(g(np.eye(3, dtype=np.float32))))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_does_not_depend_on_scale(device: str, shape: tuple[int, int]) -> None:
    a = random_matrix(shape, "float32")
    m, n = shape
    left, right = (weights((k, k)).astype(np.float32) for k in (m, n))

    @jax.jit
    @jax.grad
    def g(a: Any) -> Any:
        u, _, vh = jml.svd(a)
        return (u * left).sum() + (vh * right).sum()

    base = np.asarray(g(a), np.float64)
    assert np.all(np.isfinite(base))
    for scale in (1e-30, 1e-20, 1e20, 1e30):
        # A power of two changes no digit of U and Vh, nor of the derivative times the scale.
        power = np.float32(2.0 ** np.round(np.log2(scale)))
        scaled = np.asarray(g(a * power), np.float64) * np.float64(power)
        np.testing.assert_allclose(scaled, base, rtol=1e-5, atol=1e-5 * np.abs(base).max())


def test_second_derivative_does_not_square_the_scale(device: str) -> None:
    a = random_matrix((5, 5), "float32")
    w = weights((5, 5)).astype(np.float32)

    def f(a: Any) -> Any:
        return (jml.svd(a).U * w).sum()

    second = jax.jit(lambda x: jax.jvp(lambda x: jax.jvp(f, (x,), (x,))[1], (x,), (x[::-1],))[1])
    base = second(a)
    assert np.isfinite(base)
    for power in (2.0**60, 2.0**-60):
        np.testing.assert_allclose(second(a * np.float32(power)), base, rtol=1e-3, atol=1e-4)


def test_nan_matrix_spoils_its_own_gradient_only(device: str) -> None:
    a = random_matrix((3, 5, 5), "float32")
    a[1, 2, 2] = np.nan
    for f in (
        lambda a: jnp.nansum(jml.svd(a).U @ jml.svd(a).Vh * 2),
        lambda a: jml.svdvals(a).sum(),
        lambda a: jml.svd(a).S.sum(),
    ):
        g = np.asarray(jax.grad(f)(a))
        assert np.all(np.isfinite(g[[0, 2]]))
        if f(a) != f(a):
            assert np.all(np.isnan(g[1]))


def test_debug_nans_and_precision_settings_do_not_matter(device: str) -> None:
    a = random_matrix((9, 9), "float32")
    with jax.default_matmul_precision("bfloat16"), jax.numpy_dtype_promotion("strict"):
        check_svd(a, jml.svd(a), full_matrices=True)
        g = jax.grad(lambda a: jml.svd(a).S.sum())(a)
    np.testing.assert_allclose(g, jax.grad(lambda a: jml.svd(a).S.sum())(a), atol=1e-5)
