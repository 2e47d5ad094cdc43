"""SVD and QR in plain ``lax`` operations, for any XLA platform: no custom call, no ``lax.linalg``.

Householder QR with column pivoting, A P = Q R, then one-sided Jacobi on L = R^H: rotations W make
the columns of L W orthogonal, L W = V1 S, so A = (Q W) S (P V1)^H. W is a product of rotations and
Q of reflectors, so U is orthonormal whatever the rank; V1's zero columns are completed by another
QR. The matrix is scaled by a power of two first, read from the bits so that denormal numbers count
where the platform flushes them.

Columns are held as rows, ``[batch, column, entry]``, so that every pass runs along memory. Pairs
meet in round-robin order; sorting inside that order would break its convergence. A rotation is
applied in Rutishauser's form, x -= s (y + tau x), y += s (x - tau y), which does not let W drift
from unitary. A sweep ends the iteration of a matrix when the cosines it met, or what it must have
left of them, are below tolerance: never after a fixed count. A matrix that this order does not
finish goes on in cyclic order, one pair after the other, for which convergence is proved (Forsythe
and Henrici 1960).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

VARIANT = "jacobi_qrcp"

# Entries are brought to about 2**HEADROOM, so that squares of columns 1e-30 below the largest stay
# normal numbers and sums of 1e6 squares of the largest do not overflow.
_HEADROOM = {"float32": 50, "float64": 400}
finfo: Any = jnp.finfo  # ml_dtypes leaves it untyped


def svd(
    a: jax.Array,
    *,
    full_matrices: bool,
    compute_uv: bool,
    max_sweeps: int,
    fallback_max_sweeps: int,
) -> list[jax.Array]:
    """``[u, s, vh, status, sweeps, off_norm]`` (``[s, ...]`` if not ``compute_uv``) of ``a``.

    Args:
      a: ``[..., m, n]``, m, n >= 1, of any dtype that the primitive takes.
      full_matrices: whether u and vh are square.
      compute_uv: whether u and vh are computed.
      max_sweeps: sweeps in round-robin order; a matrix that needs more goes on in serial order.
      fallback_max_sweeps: sweeps in serial order; a matrix that needs more is NaN, with status 2.
    """
    dtype = a.dtype
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    x = a.astype(jnp.float32) if dtype.name in ("float16", "bfloat16") else a
    x = x.reshape((math.prod(batch), m, n))
    wide = m < n
    if wide:
        x = jnp.conj(jnp.swapaxes(x, 1, 2))
    x, exponent, finite = scale(x, _HEADROOM[x.real.dtype.name])
    x = jnp.where(_at(finite, x), x, 0)

    u, s, v, sweeps, off, first, converged = _tall_svd(
        x, full_matrices, compute_uv, max_sweeps, fallback_max_sweeps
    )

    s = unscale(s, exponent)
    ok = finite & converged
    status = jnp.where(first, 0, jnp.where(converged, 1, 2))
    status = jnp.where(finite, status, 3).astype(jnp.int32)
    off = jnp.where(finite, off, jnp.nan).astype(jnp.float32)
    results = [s]
    if compute_uv:
        if wide:
            u, v = v, u
        results = [u, s, jnp.conj(jnp.swapaxes(v, 1, 2))]
    results = [jnp.where(_at(ok, r), r, jnp.nan) for r in results]
    out = [
        r.astype(dtype) if jnp.iscomplexobj(r) == jnp.issubdtype(dtype, jnp.complexfloating) else r
        for r in results
    ]
    return [r.reshape((*batch, *r.shape[1:])) for r in (*out, status, sweeps, off)]


def qr(a: jax.Array, *, complete: bool, want_q: bool) -> list[jax.Array]:
    """``[q, r]`` (``[r]`` if not ``want_q``) of ``a`` ``[..., m, n]``, m, n >= 1, by reflectors.

    ``complete``: q is square. R's diagonal is real and >= 0; a matrix that is not finite gives NaN.
    """
    dtype = a.dtype
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    k = min(m, n)
    x = a.astype(jnp.float32) if dtype.name in ("float16", "bfloat16") else a
    x = x.reshape((math.prod(batch), m, n))
    x, exponent, finite = scale(x, _HEADROOM[x.real.dtype.name])
    columns = jnp.swapaxes(jnp.where(_at(finite, x), x, 0), 1, 2)
    done, vs, taus, _ = _qr(columns[:, :k], pivot=False)
    if n > k:
        done = jnp.concatenate([done, _apply_q(vs, taus, columns[:, k:], adjoint=True)], axis=1)
    kq = m if complete else k
    r = jnp.triu(jnp.swapaxes(done, 1, 2)[:, :kq])
    eye = jnp.broadcast_to(jnp.eye(kq, m, dtype=x.dtype), (x.shape[0], kq, m))
    q = jnp.swapaxes(_apply_q(vs, taus, eye), 1, 2) if want_q else jnp.zeros((1, 1, kq), x.dtype)
    q, r = positive_diagonal(q, r)
    results = [q, unscale_signed(r, exponent)] if want_q else [unscale_signed(r, exponent)]
    results = [jnp.where(_at(finite, y), y, jnp.nan).astype(dtype) for y in results]
    return [y.reshape((*batch, *y.shape[1:])) for y in results]


def positive_diagonal(q: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q ``[..., m, j]`` and r ``[..., j, n]`` with a phase moved from each row of r to q's column.

    The diagonal of r is real and >= 0 then.
    """
    k = min(r.shape[-2:])
    d = jnp.diagonal(r, axis1=-2, axis2=-1)
    size = jnp.abs(d)
    phase = jnp.where(size > 0, d / jnp.where(size > 0, size, 1), 1)
    # One Newton step: a phase off the unit circle would leave q off orthogonal.
    phase = phase * (1.5 - 0.5 * _abs2(phase))
    pad = [(0, 0)] * (phase.ndim - 1) + [(0, r.shape[-2] - k)]
    phase = jnp.pad(phase, pad, constant_values=1)
    r = r * jnp.conj(phase)[..., None]
    i, j = (lax.broadcasted_iota(jnp.int32, r.shape, r.ndim + axis) for axis in (-2, -1))
    own = jnp.pad(size, [*pad[:-1], (0, r.shape[-2] - k)])[..., None].astype(r.dtype)
    return q * phase[..., None, :], jnp.where(i == j, own, r)


def _at(mask: jax.Array, like: jax.Array) -> jax.Array:
    """A per-matrix mask ``[batch]``, ready to broadcast against ``like``."""
    return mask.reshape((mask.shape[0],) + (1,) * (like.ndim - 1))


def _sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis, in two stages when it is long: one running sum would lose digits."""
    length = x.shape[-1]
    if length <= 2048:
        return jnp.sum(x, axis=-1)
    block = 256
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -length % block)])
    parts = jnp.sum(x.reshape((*x.shape[:-1], -1, block)), axis=-1)
    # The barrier keeps XLA from folding the two sums into one.
    return _sum(lax.optimization_barrier(parts))


def _abs2(x: jax.Array) -> jax.Array:
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


# --- scaling by powers of two, by way of the bits ---------------------------------------------


def _layout(dtype: Any) -> tuple[Any, int, int]:
    return (jnp.int32, 23, 127) if dtype == jnp.float32 else (jnp.int64, 52, 1023)


def _pow2(e: jax.Array, dtype: Any) -> jax.Array:
    ints, mantissa, bias = _layout(dtype)
    e = jnp.clip(e, 1 - bias, bias).astype(ints)
    return lax.bitcast_convert_type((e + bias) << mantissa, dtype)


def _times_pow2(x: jax.Array, e: jax.Array) -> jax.Array:
    # No single power of two spans the whole range of exponents; three do.
    a = e // 3
    b = (e - a) // 2
    return x * _pow2(a, x.dtype) * _pow2(b, x.dtype) * _pow2(e - a - b, x.dtype)


def scale(x: jax.Array, headroom: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales each matrix so that its largest entry is near ``2**headroom``.

    Returns: ``x * 2**e``, e ``[...]``, and whether the matrix is finite ``[...]``.
    """
    parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    real = parts[0].dtype
    ints, mantissa, bias = _layout(real)
    sign = np.array(np.iinfo(ints).min, ints)
    bits = [lax.bitcast_convert_type(p, ints) & ~sign for p in parts]
    # Positive floats are ordered as their bits are.
    top = functools.reduce(jnp.maximum, [jnp.max(b, axis=(-2, -1)) for b in bits])
    leading = jnp.array(8 * real.itemsize - 1, ints) - lax.clz(jnp.maximum(top, 1))
    binary = jnp.where(top >> mantissa > 0, (top >> mantissa) - bias, leading + 1 - bias - mantissa)
    e = headroom - binary
    by = e[..., None, None]

    def scaled(p: jax.Array, b: jax.Array) -> jax.Array:
        denormal = jnp.where(lax.bitcast_convert_type(p, ints) < 0, -b, b).astype(real)
        return jnp.where(
            b >> mantissa > 0,
            _times_pow2(p, by),
            _times_pow2(denormal, by + 1 - bias - mantissa),
        )

    out = [scaled(p, b) for p, b in zip(parts, bits, strict=True)]
    finite = (top >> mantissa) <= 2 * bias
    return (lax.complex(*out) if len(out) == 2 else out[0]), e, finite


def unscale(s: jax.Array, e: jax.Array) -> jax.Array:
    """``s * 2**-e`` for s ``[..., k]``; one rounding where the result is denormal, else exact."""
    ints, mantissa, bias = _layout(s.dtype)
    e = e[..., None]
    normal = _times_pow2(s, -e)
    units = _times_pow2(s, bias + mantissa - 1 - e)
    is_denormal = units < 2.0**mantissa
    steps = jnp.round(jnp.where(is_denormal, units, 0)).astype(ints)
    return jnp.where(is_denormal, lax.bitcast_convert_type(steps, s.dtype), normal)


def unscale_signed(x: jax.Array, e: jax.Array) -> jax.Array:
    """``x * 2**-e`` for x ``[..., m, n]`` of any sign, real or complex."""
    if jnp.iscomplexobj(x):
        return lax.complex(unscale_signed(x.real, e), unscale_signed(x.imag, e))
    return jnp.copysign(unscale(jnp.abs(x).reshape((*x.shape[:-2], -1)), e).reshape(x.shape), x)


def _is_null(squared_norm: jax.Array, entries: int) -> jax.Array:
    """Whether a column is so small that its squares, partly underflowed, tell no direction."""
    info = finfo(squared_norm.dtype)
    return squared_norm <= entries * float(info.tiny / info.eps)


# --- Householder ------------------------------------------------------------------------------


def _reflector(x: jax.Array, j: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """v, tau, beta with (I - tau v v^H) x = x[:j] + beta e_j; x ``[batch, entry]``, tau >= 0."""
    index = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    tail = jnp.where(index >= j, x, 0)
    squares = _sum(_abs2(tail))
    norm = jnp.sqrt(squares)
    alive = ~_is_null(squares, x.shape[1])
    safe = jnp.where(alive, norm, 1)
    tail = tail / safe[:, None]
    alpha = jnp.sum(jnp.where(index == j, tail, 0), axis=1)
    size = jnp.abs(alpha)
    phase = jnp.where(size > 0, alpha / jnp.where(size > 0, size, 1), 1)
    v = jnp.where(index == j, tail + phase[:, None], tail)
    turn = alive & (j < x.shape[1] - 1)  # else there is nothing below
    tau = jnp.where(turn, 1 / (1 + size), 0)
    beta = jnp.where(turn, -phase, alpha) * norm
    return v, tau, jnp.where(alive, beta, 0)


def _reflect(c: jax.Array, v: jax.Array, tau: jax.Array) -> jax.Array:
    """(I - tau v v^H) applied to every row (a column of the matrix) of ``c``."""
    inner = _sum(c * jnp.conj(v)[:, None, :]) * tau[:, None]
    return c - inner[..., None] * v[:, None, :]


def _qr(c: jax.Array, pivot: bool) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """QR of the matrix whose columns are the rows of ``c`` ``[batch, n, m]``, m >= n.

    Returns: the reflected columns ``[batch, n, m]``, reflectors ``[batch, n, m]`` and their tau
    ``[batch, n]``, and the order ``[batch, n]`` in which columns were taken.
    """
    b, n, _ = c.shape
    real = c.real.dtype
    column = lax.broadcasted_iota(jnp.int32, (b, n), 1)

    def step(j: Any, state: Any) -> Any:
        c, vs, taus, order, taken = state
        j = jnp.asarray(j, jnp.int32)
        if pivot:
            index = lax.broadcasted_iota(jnp.int32, c.shape, 2)
            norms = _sum(jnp.where(index >= j, _abs2(c), 0))
            p = jnp.argmax(jnp.where(taken, -1, norms), axis=1).astype(jnp.int32)
        else:
            p = jnp.full((b,), j, jnp.int32)
        hit = column == p[:, None]
        x = jnp.take_along_axis(c, p[:, None, None], axis=1)[:, 0]
        v, tau, beta = _reflector(x, j)
        # Columns already taken end at their own step, so reflecting them changes rounding only.
        new = _reflect(c, v, tau)
        index = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        done = jnp.where(index < j, x, jnp.where(index == j, beta[:, None], 0))
        c = jnp.where(hit[..., None], done[:, None, :], jnp.where(taken[..., None], c, new))
        vs = lax.dynamic_update_slice_in_dim(vs, v[:, None, :], j, 1)
        taus = lax.dynamic_update_slice_in_dim(taus, tau[:, None], j, 1)
        order = jnp.where(column == j, p[:, None], order)
        return c, vs, taus, order, taken | hit

    state = (
        c,
        jnp.zeros_like(c),
        jnp.zeros((b, n), real),
        jnp.zeros((b, n), jnp.int32),
        jnp.zeros((b, n), bool),
    )
    c, vs, taus, order, _ = lax.fori_loop(0, n, step, state)
    return c, vs, taus, order


def _apply_q(vs: jax.Array, taus: jax.Array, c: jax.Array, adjoint: bool = False) -> jax.Array:
    """Q (or Q^H) times the matrix whose columns are the rows of ``c`` ``[batch, cols, m]``."""
    n = vs.shape[1]

    def step(i: Any, c: jax.Array) -> jax.Array:
        j = i if adjoint else n - 1 - i
        v = lax.dynamic_index_in_dim(vs, j, 1, keepdims=False)
        return _reflect(c, v, lax.dynamic_index_in_dim(taus, j, 1, keepdims=False))

    out: jax.Array = lax.fori_loop(0, n, step, c)
    return out


# --- Jacobi -----------------------------------------------------------------------------------


def _rotation(x: jax.Array, y: jax.Array, active: jax.Array) -> Any:
    """For pairs of rows x, y ``[batch, pairs, entry]``: s, tau, phase, |cosine|, |tangent|."""
    xx, yy = _sum(_abs2(x)), _sum(_abs2(y))
    norm_x, norm_y = jnp.sqrt(xx), jnp.sqrt(yy)
    eps = finfo(norm_x.dtype).eps
    both = ~(_is_null(xx, x.shape[-1]) | _is_null(yy, x.shape[-1]))
    nx, ny = jnp.where(both, norm_x, 1), jnp.where(both, norm_y, 1)
    cosine = jnp.where(both, _sum(jnp.conj(x) * y) / nx / ny, 0)
    size = jnp.abs(cosine)
    # Below 2 eps a cosine is rounding noise; turning equal columns by it would only add more.
    turn = active & (size > 2 * eps)
    safe = jnp.where(turn, size, 1)
    phase = jnp.where(turn, cosine / safe, 1)
    # (|y|^2 - |x|^2) / (2 |x^H y|), arranged so that nothing under- or overflows.
    zeta = (ny - nx) / nx * ((ny + nx) / ny) / (2 * safe)
    far = jnp.abs(zeta) > 1 / eps
    near = jnp.where(far, 1, jnp.abs(zeta))
    tangent = jnp.where(
        far, 0.5 / jnp.where(far, jnp.abs(zeta), 1), 1 / (near + jnp.sqrt(1 + near * near))
    )
    tangent = jnp.where(turn, tangent, 0)
    c = lax.rsqrt(1 + tangent * tangent)
    s = jnp.where(zeta < 0, -1, 1) * tangent * c
    return s, s / (1 + c), phase, size, tangent


def _settled(cos_max: jax.Array, tan_max: jax.Array, n: int) -> jax.Array:
    """Whether a sweep that met these cosines and tangents leaves columns orthogonal."""
    root = math.sqrt(max(n, 1))
    tol = root * float(finfo(cos_max.dtype).eps) / 2
    # Rotations leave cosines of about c t between columns of like size, c c if one is tiny.
    return (cos_max <= tol) | (cos_max * jnp.maximum(cos_max, tan_max) * root <= tol)


def _turn(x: jax.Array, y: jax.Array, entries: int, active: jax.Array) -> Any:
    """Rotates pairs of rows ``[batch, pairs, length]``: x, y, and |cosine|, |tangent| found."""
    s, tau, phase, cosine, tangent = _rotation(x[..., :entries], y[..., :entries], active[:, None])
    s, tau, phase = s[..., None], tau[..., None], phase[..., None]
    new_x = x - s * (jnp.conj(phase) * y + tau * x)
    return new_x, y + s * (phase * x - tau * y), cosine, tangent


def _jacobi(x: jax.Array, entries: int, max_sweeps: int) -> Any:
    """Rotates rows of ``x`` ``[batch, n, length]`` until their first ``entries`` are orthogonal.

    Returns: the rotated rows, and per matrix sweeps, largest |cosine| of its last sweep, converged.
    """
    b, n, length = x.shape
    real = x.real.dtype
    odd = n % 2
    if odd:
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))  # a zero row meets all others and turns none
    half = (n + odd) // 2
    rounds = 2 * half - 1

    def running(state: Any) -> Any:
        step, _, _, _, sweeps, _, done = state
        del step
        return jnp.any(~done & (sweeps < max_sweeps))

    def one_round(state: Any) -> Any:
        step, x, cos_max, tan_max, sweeps, off, done = state
        active = ~done & (sweeps < max_sweeps)
        top, low = x[:, 0], x[:, 1]
        new_top, new_low, cosine, tangent = _turn(top, low, entries, active)
        # The first row stays, all others move one seat on.
        x = jnp.stack(
            [
                jnp.concatenate([new_top[:, :1], new_low[:, :1], new_top[:, 1:-1]], axis=1)
                if half > 1
                else new_top,
                jnp.concatenate([new_low[:, 1:], new_top[:, -1:]], axis=1) if half > 1 else new_low,
            ],
            axis=1,
        )
        cos_max = jnp.maximum(cos_max, jnp.max(cosine, axis=1))
        tan_max = jnp.maximum(tan_max, jnp.max(tangent, axis=1))
        step = step + 1
        last = step % rounds == 0
        close = active & last
        sweeps = jnp.where(close, sweeps + 1, sweeps)
        off = jnp.where(close, cos_max, off)
        done = done | (close & _settled(cos_max, tan_max, n))
        cos_max = jnp.where(last, 0, cos_max)
        tan_max = jnp.where(last, 0, tan_max)
        return step, x, cos_max, tan_max, sweeps, off, done

    zero = jnp.zeros((b,), real)
    state = (
        jnp.zeros((), jnp.int32),
        x.reshape((b, 2, half, length)) if half else x,
        zero,
        zero,
        jnp.zeros((b,), jnp.int32),
        zero,
        jnp.zeros((b,), bool),
    )
    _, x, _, _, sweeps, off, done = lax.while_loop(running, one_round, state)
    return x.reshape((b, 2 * half, length))[:, :n], sweeps, off, done


def _serial_jacobi(
    x: jax.Array, entries: int, max_sweeps: int, spent: jax.Array, off: jax.Array, done: jax.Array
) -> Any:
    """As ``_jacobi``, in cyclic order by rows, for the matrices that are not ``done``."""
    b, n, _ = x.shape

    def running(state: Any) -> Any:
        *_, sweep, _, _, done = state
        return jnp.any(~done) & (sweep < max_sweeps)

    def one_pair(state: Any) -> Any:
        p, q, x, cos_max, tan_max, sweep, spent, off, done = state
        new_p, new_q, cosine, tangent = _turn(
            lax.dynamic_slice_in_dim(x, p, 1, 1),
            lax.dynamic_slice_in_dim(x, q, 1, 1),
            entries,
            ~done,
        )
        x = lax.dynamic_update_slice_in_dim(x, new_p, p, 1)
        x = lax.dynamic_update_slice_in_dim(x, new_q, q, 1)
        cos_max = jnp.maximum(cos_max, cosine[:, 0])
        tan_max = jnp.maximum(tan_max, tangent[:, 0])
        last = p == n - 2
        close = last & ~done
        spent = jnp.where(close, spent + 1, spent)
        off = jnp.where(close, cos_max, off)
        done = done | (close & _settled(cos_max, tan_max, n))
        cos_max, tan_max = jnp.where(last, 0, cos_max), jnp.where(last, 0, tan_max)
        turn_row = q == n - 1
        p = jnp.where(last, 0, jnp.where(turn_row, p + 1, p))
        q = jnp.where(turn_row, p + 1, q + 1)
        return p, q, x, cos_max, tan_max, sweep + last.astype(jnp.int32), spent, off, done

    zero, index = jnp.zeros((b,), x.real.dtype), jnp.zeros((), jnp.int32)
    state = (index, index + 1, x, zero, zero, index, spent, off, done)
    _, _, x, _, _, _, spent, off, done = lax.while_loop(running, one_pair, state)
    return x, spent, off, done


def _tall_svd(
    x: jax.Array, full_matrices: bool, compute_uv: bool, max_sweeps: int, fallback_max_sweeps: int
) -> Any:
    """The SVD of scaled, finite x with m >= n: u, s, v, sweeps, off, and who converged.

    The last two tell of the first order and of either.
    """
    b, m, n = x.shape
    columns, vs, taus, order = _qr(jnp.swapaxes(x, 1, 2), pivot=True)
    # Row i of R, conjugated, is column i of L = R^H.
    r = jnp.take_along_axis(columns[..., :n], order[..., None], axis=1)
    low = jnp.conj(jnp.swapaxes(r, 1, 2))
    i = lax.broadcasted_iota(jnp.int32, low.shape, 1)
    low = jnp.where(lax.broadcasted_iota(jnp.int32, low.shape, 2) >= i, low, 0)
    if compute_uv:
        eye = jnp.broadcast_to(jnp.eye(n, dtype=x.dtype), (b, n, n))
        low = jnp.concatenate([low, eye], axis=2)
    rows, sweeps, off, first = _jacobi(low, n, max_sweeps)
    converged = first
    if n > 1:
        rows, sweeps, off, converged = _serial_jacobi(
            rows, n, fallback_max_sweeps, sweeps, off, first
        )

    squares = _sum(_abs2(rows[..., :n]))
    s = jnp.where(_is_null(squares, n), 0, jnp.sqrt(squares))
    index = lax.broadcasted_iota(jnp.int32, s.shape, 1)
    negative, rank = lax.sort((-s, index), dimension=1, num_keys=1)
    s = -negative
    if not compute_uv:
        return None, s, None, sweeps, off, first, converged
    rows = jnp.take_along_axis(rows, rank[..., None], axis=1)
    left = rows[..., n:]
    null = s == 0
    v = jnp.where(null[..., None], 0, rows[..., :n] / jnp.where(null, 1, s)[..., None])
    v = lax.cond(jnp.any(null), _complete, lambda v, null: v, v, null)
    # Undo the pivoting: entry j of these rows belongs to column order[j] of A.
    back = jnp.argsort(order, axis=1)
    v = jnp.take_along_axis(v, back[:, None, :], axis=2)

    u = jnp.pad(left, ((0, 0), (0, 0), (0, m - n)))
    if full_matrices and m > n:
        extra = jnp.eye(m, dtype=x.dtype)[n:]
        u = jnp.concatenate([u, jnp.broadcast_to(extra, (b, m - n, m))], axis=1)
    u = _apply_q(vs, taus, u)
    return jnp.swapaxes(u, 1, 2), s, jnp.swapaxes(v, 1, 2), sweeps, off, first, converged


def _complete(v: jax.Array, null: jax.Array) -> jax.Array:
    """Replaces the null rows of ``v`` (the last ones) so that all rows are orthonormal."""
    _, vs, taus, _ = _qr(v, pivot=False)
    eye = jnp.broadcast_to(jnp.eye(v.shape[1], dtype=v.dtype), v.shape)
    return jnp.where(null[..., None], _apply_q(vs, taus, eye), v)
