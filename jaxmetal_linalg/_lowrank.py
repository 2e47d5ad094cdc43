"""What ``rsvd`` and ``lanczos_svd`` share: operators, bases, derivative, certificate, arguments.

The derivative of a truncated SVD. With A = U S V^H + R, where U^H R = 0 and R V = 0, the turns
inside the two bases are those of ``primitives/svd.py``. Out of them, with
X = (I - U U^H) dA V and Y = (I - V V^H) dA^H U, column i of the rest solves

    s_i u_i - R v_i = x_i,    s_i v_i - R^H u_i = y_i

so (s_i^2 I - R^H R) v_i = s_i y_i + R^H x_i: one positive definite system a column, since
s_i > |R|. Without R's terms, as plain differentiation of a randomised SVD has it in the limit
(pytorch#69531), the derivative is wrong as soon as anything was truncated. The systems are solved
by conjugate gradients, k of them side by side, whose products with A are those of the SVD itself;
nothing larger than [m, k] and [n, k] is ever held, so there is nothing to cut into bands. Singular
triplets past the k kept ones, where there are some, precondition them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmetal_linalg import _portable
from jaxmetal_linalg._accuracy import (
    CERTIFICATE_FAILURE,
    CERTIFICATE_ULP,
    GRAD_BOUNDARY_GAP,
    GRAD_GAP_EPS,
)
from jaxmetal_linalg._errors import type_error, value_error
from jaxmetal_linalg._portable import finfo
from jaxmetal_linalg.primitives import svd as _svd
from jaxmetal_linalg.primitives.qr import gram_factor
from jaxmetal_linalg.primitives.svd import rotations

dot = _svd._dot
adjoint = _svd._adjoint

#: Conjugate gradients stop here at the latest; a tail as flat as white noise takes some 100 steps.
MAX_CG_STEPS = 300


# --- operators -------------------------------------------------------------------------------


class Operator(NamedTuple):
    """A linear map on blocks of columns: ``[..., n, j]`` to ``[..., m, j]``, and its adjoint."""

    forward: Callable[[jax.Array], jax.Array]
    backward: Callable[[jax.Array], jax.Array]

    @property
    def H(self) -> Operator:
        """The adjoint."""
        return Operator(self.backward, self.forward)


# Of a matrix from so many entries on, 16-bit numbers are widened in so many blocks of rows, so that
# there is never a copy of all of it.
WIDENED_ENTRIES, WIDENED_BLOCKS = 2**24, 16


def matrix_operator(a: jax.Array, center: bool = False, dtype: Any = None) -> Operator:
    """``a``, or ``a - mean(a, axis=-2)`` without forming it; linear in ``a`` either way.

    ``dtype`` (None: that of ``a``) is what the products are computed in.
    """
    m, n = a.shape[-2:]
    if dtype is not None and a.dtype != dtype and m * n >= WIDENED_ENTRIES:
        op = _by_blocks(a, dtype)
    else:
        x = a if dtype is None else a.astype(dtype)

        def transposed(y: jax.Array) -> jax.Array:
            # conj(a) would be a copy of a.
            return jnp.conj(dot(jnp.swapaxes(x, -1, -2), jnp.conj(y)))

        op = Operator(lambda y: dot(x, y), transposed)
    if not center:
        return op
    # The sum itself might overflow.
    ones = jnp.full((1,) * (a.ndim - 2) + (m, 1), 1 / m, dtype or a.dtype)
    mean = adjoint(op.backward(ones))

    def centred(x: jax.Array) -> jax.Array:
        return op.forward(x) - dot(mean, x)

    def centred_backward(y: jax.Array) -> jax.Array:
        return op.backward(y) - adjoint(mean) * jnp.sum(y, axis=-2, keepdims=True)

    return Operator(centred, centred_backward)


def _by_blocks(a: jax.Array, dtype: Any) -> Operator:
    m, n = a.shape[-2:]
    rows = -(-m // WIDENED_BLOCKS)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]

    def block(x: jax.Array, i: Any) -> tuple[jax.Array, Any]:
        start = jnp.minimum(i * rows, m - rows)  # the last ones begin early, to be as long
        return lax.dynamic_slice_in_dim(x, start, rows, x.ndim - 2), start

    def zeros(x: jax.Array, size: int) -> jax.Array:
        batch = jnp.broadcast_shapes(a.shape[:-2], x.shape[:-2])
        return jnp.zeros((*batch, size, x.shape[-1]), dtype)

    def forward(x: jax.Array) -> jax.Array:
        def step(i: Any, y: jax.Array) -> jax.Array:
            piece, start = block(a, i)
            part = dot(piece.astype(dtype), x)
            return lax.dynamic_update_slice_in_dim(y, part, start, y.ndim - 2)

        return jnp.asarray(lax.fori_loop(0, WIDENED_BLOCKS, step, zeros(x, m)))

    def backward(y: jax.Array) -> jax.Array:
        def step(i: Any, z: jax.Array) -> jax.Array:
            (piece, start), (part, _) = block(a, i), block(y, i)
            part = jnp.where(start + row >= i * rows, part, 0)  # rows that are new
            return z + dot(jnp.swapaxes(piece.astype(dtype), -1, -2), part)

        return jnp.asarray(lax.fori_loop(0, WIDENED_BLOCKS, step, zeros(y, n)))

    return Operator(forward, backward)


def power_of_two(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An exponent that brings a matrix to where squares neither overflow nor vanish.

    Returns: e ``[...]``, for ``a * 2**e``, and whether ``a`` is finite ``[...]``.
    """
    # No further than this: what multiplies `a` must keep its own precision.
    reach = 90 if finfo(a.dtype).bits <= 32 else 700
    top = jnp.max(jnp.abs(a.real), axis=(-2, -1), initial=0)
    if jnp.iscomplexobj(a):
        top = jnp.maximum(top, jnp.max(jnp.abs(a.imag), axis=(-2, -1), initial=0))
    top = top.astype(finfo(_svd._compute_dtype(top.dtype)).dtype)
    _, e, finite = _portable.scale(top[..., None, None], 0)
    return jnp.clip(e, -reach, reach), finite


def scaled(op: Operator, e: jax.Array, dtype: Any) -> Operator:
    """``op * 2**e``."""
    f = jnp.ldexp(jnp.ones((), finfo(dtype).dtype), e)[..., None, None]
    return Operator(lambda x: op.forward(x * f), lambda y: op.backward(y * f))


# --- bases -----------------------------------------------------------------------------------


def _columns_scaled(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``y`` with columns of unit norm (zero columns stay zero), and their norms ``[..., 1, q]``."""
    top = jnp.max(jnp.abs(y), axis=-2, keepdims=True, initial=0)
    safe = jnp.where(top > 0, top, 1)
    unit = y / safe
    norm = jnp.sqrt(jnp.sum((unit * jnp.conj(unit)).real, axis=-2, keepdims=True))
    norm = jnp.where(norm > 0, norm, 1)
    return unit / norm, norm * safe


def cholesky_basis(y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A basis p of the columns of y by one Cholesky factorisation, y = p r, with |p|_2 <= 1.

    It is orthonormal to rounding where the columns of y, each brought to norm 1, are well
    conditioned, as those of a converging subspace iteration are however their norms are graded.
    Elsewhere a shift of a few ulp keeps the factorisation going, and p is only better conditioned
    than y: good for the next step of an iteration, not as a result.

    Returns: p ``[..., m, q]``, r ``[..., q, q]`` and its inverse.
    """
    unit, norm = _columns_scaled(y)
    shift = 4 * y.shape[-1] * float(finfo(y.dtype).eps)
    r, inverse = gram_factor(dot(adjoint(unit), unit), shift)
    return dot(unit, inverse), r * norm, inverse / jnp.swapaxes(norm, -1, -2)


# By 16th powers the bound is at most q^(1/32) below: 14 % for q = 100, as all singular values tie.
_SQUARINGS = 4


def smallest_singular_value(r: jax.Array, inverse: jax.Array) -> jax.Array:
    """A lower bound ``[..., 1]`` of the smallest singular value of r ``[..., q, q]``.

    With G = r^-1 r^-H and p a power of two, ``sigma_q^-2 = |G|_2 <= tr(G^p)^(1/p)``: a few
    products, where an SVD would be one of the most expensive parts of a step.
    """
    top = jnp.max(jnp.abs(inverse), axis=(-2, -1), keepdims=True)
    x = inverse / jnp.where(top > 0, top, 1)
    power, log = dot(x, adjoint(x)), jnp.zeros(top.shape, top.dtype)
    for i in range(_SQUARINGS + 1):
        # G^(2^i) = exp(log) power, whose trace is 1.
        trace = jnp.trace(power, axis1=-2, axis2=-1).real[..., None, None]
        power, log = power / trace, log + jnp.log(trace)
        if i < _SQUARINGS:
            power, log = dot(power, power), 2 * log
    least = jnp.exp(-log / 2 ** (_SQUARINGS + 1)) / top
    # What rounding may have added, to r and to its inverse.
    slack = 8 * float(finfo(r.dtype).eps) * jnp.linalg.norm(r, axis=(-2, -1))[..., None]
    return jnp.maximum(least[..., 0] - slack, 0)


def flip_signs(u: jax.Array, vh: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Makes the entry of largest modulus in each column of u real and positive."""
    if jnp.iscomplexobj(u):
        at = jnp.argmax(jnp.abs(u), axis=-2, keepdims=True)
        pivot = jnp.take_along_axis(u, at, axis=-2)
        size = jnp.abs(pivot)
        phase = jnp.where(size > 0, pivot / jnp.where(size > 0, size, 1), 1).astype(u.dtype)
    else:
        low, high = (f(u, axis=-2, keepdims=True) for f in (jnp.min, jnp.max))
        phase = jnp.where(-low > high, -1, 1).astype(u.dtype)
    return u * jnp.conj(phase), vh * jnp.swapaxes(phase, -1, -2)


# --- derivative ------------------------------------------------------------------------------


def truncated_tangents(
    op: Operator,
    d_op: Operator,
    u: jax.Array,
    s: jax.Array,
    v: jax.Array,
    s_rest: jax.Array,
    v_rest: jax.Array,
    side: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dU, dS and dV of the k leading singular triplets; see the top of this file.

    Args:
      op: A, ``[..., m, n]`` with m >= n for speed's sake.
      d_op: dA.
      u: ``[..., m, k]``.
      s: ``[..., k]``.
      v: ``[..., n, k]``.
      s_rest: ``[..., p]`` singular values next to those kept, however rough.
      v_rest: ``[..., n, p]``, their vectors, orthogonal to v.
      side: max(m, n).
    """
    av, au = d_op.forward(v), d_op.backward(u)
    p = dot(adjoint(u), av)
    ds = jnp.diagonal(p, axis1=-2, axis2=-1).real
    turn_u, turn_v, top, inverse = rotations(p, s, side, "safe")
    scale = top[..., None]
    x = (av - dot(u, p)) / scale
    y = (au - dot(v, adjoint(p))) / scale
    kept = inverse != 0
    sigma = jnp.where(kept, (s / top)[..., None, :], 1)

    def off(basis: jax.Array, z: jax.Array) -> jax.Array:
        return z - dot(basis, dot(adjoint(basis), z))

    def residual(z: jax.Array) -> jax.Array:
        return off(u, op.forward(off(v, z)) / scale)

    def residual_adjoint(z: jax.Array) -> jax.Array:
        return off(v, op.backward(off(u, z)) / scale)

    def system(z: jax.Array) -> jax.Array:
        return sigma**2 * z - residual_adjoint(residual(z))

    known = tuple(map(lax.stop_gradient, (sigma, s_rest / top, v_rest)))

    def solve(apply: Callable[[jax.Array], jax.Array], b: jax.Array) -> jax.Array:
        return _conjugate_gradients(apply, b, *known)

    def solve_transposed(apply: Callable[[jax.Array], jax.Array], b: jax.Array) -> jax.Array:
        # The transpose of a Hermitian map is its conjugate.
        conjugated = lambda z: jnp.conj(apply(jnp.conj(z)))  # noqa: E731
        return jnp.conj(solve(conjugated, jnp.conj(b)))

    b = jnp.where(kept, sigma * y + residual_adjoint(x), 0)
    out_v = lax.custom_linear_solve(system, b, solve, solve_transposed)
    out_u = (x + residual(out_v)) * inverse
    return dot(u, turn_u) + out_u, ds, dot(v, turn_v) + out_v


def oriented_tangents(
    op: Operator,
    d_op: Operator,
    shape: tuple[int, int],
    u: jax.Array,
    s: jax.Array,
    v: jax.Array,
    u_rest: jax.Array,
    s_rest: jax.Array,
    v_rest: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``truncated_tangents`` on the shorter side of an operator of any ``shape``."""
    m, n = shape
    if m >= n:
        return truncated_tangents(op, d_op, u, s, v, s_rest, v_rest, m)
    dv, ds, du = truncated_tangents(op.H, d_op.H, v, s, u, s_rest, u_rest, n)
    return du, ds, dv


def _conjugate_gradients(
    apply: Callable[[jax.Array], jax.Array],
    b: jax.Array,
    sigma: jax.Array,
    s_rest: jax.Array,
    v_rest: jax.Array,
) -> jax.Array:
    """Solves one system a column, all in step.

    It is preconditioned by the exact inverse for an R that consists of nothing but the triplets
    that are known. Where one of them ties with the kept singular value no derivative exists, and
    its direction is left out, as the safe rule does for two kept ones. A column stops when its
    residual is down to rounding, or the curvature along its direction, which is an unknown tie.
    """
    eps = float(finfo(b.dtype).eps)
    rest = s_rest[..., :, None]
    gap = sigma - rest
    least = max(GRAD_GAP_EPS * eps, GRAD_BOUNDARY_GAP)
    tie = gap <= least
    inverse = _svd._reciprocal(gap, tie) / (sigma + rest)

    def inner(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum((jnp.conj(x) * y).real, axis=-2, keepdims=True)

    def precondition(z: jax.Array) -> jax.Array:
        within = dot(adjoint(v_rest), z)
        return z / sigma**2 + dot(v_rest, within * (inverse - 1 / sigma**2))

    b, norm = _columns_scaled(b)
    b = b - dot(v_rest, jnp.where(tie, dot(adjoint(v_rest), b), 0))
    z = precondition(b)
    rho = inner(b, z)
    target = (8 * eps / sigma) ** 2

    def unfinished(state: Any) -> Any:
        return (state[0] < MAX_CG_STEPS) & jnp.any(state[-1])

    def step(state: Any) -> Any:
        i, x, r, d, rho, active = state
        image = apply(d)
        curvature = inner(d, image)
        active &= curvature > least * inner(d, d) * sigma**2
        alpha = jnp.where(active, rho / jnp.where(active, curvature, 1), 0)
        x, r = x + alpha * d, r - alpha * image
        z = precondition(r)
        new = inner(r, z)
        beta = jnp.where(active, new / jnp.where(active, rho, 1), 0)
        d = jnp.where(active, z + beta * d, d)
        return i + 1, x, r, d, jnp.where(active, new, rho), active & (new > target)

    start = (jnp.int32(0), jnp.zeros_like(b), b, z, rho, rho > target)
    return jnp.asarray(lax.while_loop(unfinished, step, start)[1] * norm)


# --- certificate -----------------------------------------------------------------------------

PROBES = 8
_PROBE_POWER = 2


def error_bound(op: Operator, u: jax.Array, s: jax.Array, v: jax.Array, key: Any) -> jax.Array:
    """An upper estimate ``[...]`` of ``|A - U S V^H|_2``; fails with ``CERTIFICATE_FAILURE``.

    For E the difference and w a Gaussian vector, y = E (E^H E)^j w has
    ``|y| >= |E|^(2j+1) |g|``, g standard normal, because y's part along the leading singular vector
    is that alone. So ``|E|^(2j+1) <= c sqrt(2/pi) max |y_i|`` over r independent vectors, but for a
    probability of at most c^-r (Halko, Martinsson and Tropp 2011, lemma 4.1, for j = 0).
    """

    def forward(x: jax.Array) -> jax.Array:
        return op.forward(x) - dot(u, s[..., None] * dot(adjoint(v), x))

    def backward(y: jax.Array) -> jax.Array:
        return op.backward(y) - dot(v, s[..., None] * dot(adjoint(u), y))

    dtype = u.dtype
    y = gaussian(key, (v.shape[-2], PROBES), dtype)
    y = y.reshape((1,) * (v.ndim - 2) + y.shape)
    log = jnp.zeros(s.shape[:-1], s.dtype)
    for i in range(2 * _PROBE_POWER + 1):
        y = backward(y) if i % 2 else forward(y)
        top = jnp.max(jnp.abs(y), axis=(-2, -1), initial=0)
        top = jnp.where(top > 0, top, 1)
        y, log = y / top[..., None, None], log + jnp.log(top)
    longest = jnp.max(jnp.sum((y * jnp.conj(y)).real, axis=-2), axis=-1)
    c = CERTIFICATE_FAILURE ** (-1 / PROBES)
    exponent = 2 * _PROBE_POWER + 1
    log = (log + jnp.log(c * math.sqrt(2 / math.pi)) + jnp.log(longest) / 2) / exponent
    first = s[..., 0] if s.shape[-1] else jnp.zeros_like(log)
    # What the products above may have rounded away.
    rounding = CERTIFICATE_ULP * float(finfo(dtype).eps) * first
    return lax.stop_gradient(jnp.exp(log) + rounding)


# --- random numbers --------------------------------------------------------------------------


def gaussian(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Standard normal numbers, drawn in single precision whatever the dtype."""
    single = jnp.complex64 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float32
    return jax.random.normal(key, shape, single).astype(dtype)


def random_key(function: str, key: Any) -> Any:
    """A typed key from what the caller gave; ``jax.random.key(0)`` for None."""
    if key is None:
        return jax.random.key(0)
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if shape == ():
            return key
    elif dtype == np.uint32 and shape == jax.random.PRNGKey(0).shape:
        return jax.random.wrap_key_data(key)
    got = f"{dtype}{list(shape or ())}"
    if dtype is None:
        got = f"{key!r} of type {type(key).__name__}"
    raise type_error(
        function,
        "key",
        "one JAX PRNG key or None",
        got,
        "Make one with jax.random.key(seed), and map over several with jax.vmap",
    )


# --- arguments -------------------------------------------------------------------------------


def integer(function: str, name: str, value: Any, low: int, high: int | None, why: str = "") -> int:
    """A static integer in low..high."""
    span = f">= {low}" if high is None else f"from {low} to {high}"
    expected = f"a static integer {span}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        got = f"{value!r} of type {type(value).__name__}"
        raise type_error(function, name, expected, got)
    if value < low or (high is not None and value > high):
        raise value_error(function, name, expected, repr(int(value)), why)
    return int(value)
