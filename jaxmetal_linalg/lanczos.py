"""Leading singular triplets by Golub-Kahan bidiagonalisation, from an array or two callables.

From a random unit vector v_1, A v_j and A^H u_j in turn give orthonormal U and V with
A V = U B and A^H U = V B^H + beta v_{L+1} e_L^H, B upper bidiagonal; each new vector is
orthogonalised against all before it, twice. The triplets of the small B are Ritz triplets of A,
whose residuals are beta times the last row of B's left vectors and so cost nothing. Where they are
too large after L steps, the best of them are kept, U and V rotated to them, and the process goes
on from v_{L+1} (thick restart, Baglama and Reichel 2005): memory stays at L vectors a side. All of
U^H A V is recorded as it is computed, so B needs no assumption about its own shape.

A vector that vanishes is replaced by a random one, orthogonal to its basis, with a zero in B: that
is how copies of repeated singular values are found, and how U and V stay orthonormal always.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from jaxmetal_linalg import _lowrank, _registry
from jaxmetal_linalg._accuracy import ACC_LANCZOS_ULP
from jaxmetal_linalg._errors import type_error, value_error
from jaxmetal_linalg._lowrank import adjoint, dot
from jaxmetal_linalg._portable import finfo
from jaxmetal_linalg.primitives import svd as _svd
from jaxmetal_linalg.primitives.svd import SVDResult, svd

#: Cycles of expansion and restart before giving up on the residual bounds.
MAX_CYCLES = 100

CALLABLE_DTYPES = ("float32", "float64", "complex64", "complex128")


class LinearOperator(NamedTuple):
    """A matrix known by its products only; a plain tuple of the same items will do.

    Attributes:
      matvec: ``x [n] -> A x [m]``.
      rmatvec: ``y [m] -> A^H y [n]``.
      shape: ``(m, n)``.
      dtype: float32, float64, complex64 or complex128.
    """

    matvec: Callable[[jax.Array], jax.Array]
    rmatvec: Callable[[jax.Array], jax.Array]
    shape: tuple[int, int]
    dtype: Any = np.float32


class LanczosInfo(NamedTuple):
    """How each matrix of the batch went.

    Attributes:
      residual: real ``[..., k]``: ``|A^H U_i - S_i V_i|`` or ``|A V_i - S_i U_i|``, whichever is
        not zero to rounding; some singular value of A is within it of S_i.
      converged: bool ``[...]``: whether all of them are at most ``ACC_LANCZOS_ULP`` ulp of the
        largest singular value.
      products: int32 ``[...]``: products with A, and as many with its adjoint.
    """

    residual: jax.Array
    converged: jax.Array
    products: jax.Array


export.register_namedtuple_serialization(LanczosInfo, serialized_name="jaxmetal_linalg.LanczosInfo")


@dataclasses.dataclass(frozen=True)
class Spec:
    """All options of a call, resolved once. ``inner`` is what the small ``svd`` will do."""

    k: int
    steps: int
    cycles: int
    inner: _svd.Spec


# --- public function -------------------------------------------------------------------------


def lanczos_svd(
    a: Any, k: int, *, n_iter: int | None = None, key: Any = None, return_info: bool = False
) -> Any:
    """The k leading singular triplets, by Lanczos bidiagonalisation with full orthogonalisation.

    Compared with ``rsvd`` it takes many narrow products in place of few wide ones, and reaches
    rounding where the spectrum decays slowly.

    Args:
      a: ``[..., m, n]``, dtypes as ``svd`` (float16 and bfloat16 are computed in float32), or a
        ``LinearOperator(matvec, rmatvec, shape, dtype=float32)``, or a tuple of the same items.
        The callables take and give one vector; JAX must be able to trace them.
      k: static, 1 <= k <= min(m, n).
      n_iter: static, k <= n_iter: exactly this many steps (at most min(m, n)), without restart.
        None: until the residual bounds hold, restarting from min(m, n, max(2 k + 10, k + 30))
        vectors, at most ``MAX_CYCLES`` times.
      key: one JAX PRNG key, of the start vector; None is ``jax.random.key(0)``.
      return_info: static. Whether to return a ``LanczosInfo`` too.

    Returns:
      ``SVDResult(U [..., m, k], S [..., k], Vh [..., k, n])``, S descending and >= 0, the entry of
      largest modulus in each column of U real and positive. With ``return_info``, the pair
      ``(result, info)``.

    Raises:
      TypeError: dtype, k, n_iter or key of the wrong type, ``a`` neither an array nor callables
        with a shape, callables whose results have another dtype than the operator.
      ValueError: rank < 2, k or n_iter out of range, callables whose results have another shape.

    Failure:
      A matrix with a non-finite entry, or a callable that returns one, yields NaN in all its own
      outputs. A run that ends before the bounds hold returns what it has; ``info`` tells.

    Accuracy:
      U and V are orthonormal to LAPACK's ratios (``ACC_RATIO``) whatever the matrix. Once
      converged, residuals are at most ``ACC_LANCZOS_ULP`` ulp of the largest singular value (and
      what rounding adds). A vector process sees one copy of a repeated singular value until it
      breaks down; a copy may be missed and the next value returned in its place. The matrix is not
      scaled: float32 entries are to be between 1e-30 and 1e30 or so.

    Differentiability:
      As ``rsvd``: jvp and vjp to any order, by the derivative of the exact truncated SVD. With
      callables, derivatives are those with respect to what the callables close over, and rmatvec
      is taken at its word.

    Devices:
      A composite, as ``rsvd``.

    Source:
      Golub and Kahan 1965; Baglama and Reichel, SIAM J. Sci. Comput. 27 (2005).
    """
    name = "lanczos_svd"
    return_info = _svd._flag(name, "return_info", return_info)
    key = _lowrank.random_key(name, key)
    if isinstance(a, tuple) and a and callable(a[0]):
        a = _callables(a)
        spec = _spec(min(a.shape), k, n_iter)
        outputs = _of_callables(a, spec, key)
        dtype = np.dtype(a.dtype)
    else:
        x = _svd._operand(name, a)
        dtype = x.dtype
        spec = _spec(min(x.shape[-2:]), k, n_iter)
        outputs = _of_array(x.astype(_svd._compute_dtype(dtype)), spec, key)
    u, s, v, _, _, _, *info = outputs
    u, vh = _lowrank.flip_signs(u, adjoint(v))
    result = SVDResult(u.astype(dtype), s.astype(finfo(dtype).dtype), vh.astype(dtype))
    return (result, LanczosInfo(*info)) if return_info else result


# --- arguments -------------------------------------------------------------------------------


def _spec(full: int, k: Any, n_iter: Any) -> Spec:
    name = "lanczos_svd"
    k = _lowrank.integer(name, "k", k, 1, full, "k is at most min(m, n)")
    if n_iter is None:
        steps, cycles = min(full, max(2 * k + 10, k + 30)), MAX_CYCLES
    else:
        steps = min(_lowrank.integer(name, "n_iter", n_iter, k, None, "n_iter >= k"), full)
        cycles = 1
    return Spec(k, steps, cycles, _svd._spec(name, False, True, "auto", "safe"))


def _callables(a: tuple[Any, ...]) -> LinearOperator:
    name, expected = "lanczos_svd", "an array, or (matvec, rmatvec, shape, dtype=float32)"
    if not 3 <= len(a) <= 4 or not callable(a[1]):
        raise type_error(name, "a", expected, f"a tuple of {[type(x).__name__ for x in a]}")
    op = LinearOperator(*a)
    shape = op.shape
    if (
        not isinstance(shape, (tuple, list))
        or len(shape) != 2
        or not all(isinstance(d, (int, np.integer)) and d > 0 for d in shape)
    ):
        raise value_error(name, "a", "callables with a shape (m, n), m and n >= 1", repr(shape))
    try:
        dtype = jax.dtypes.canonicalize_dtype(op.dtype)
    except TypeError as e:
        raise type_error(name, "a", "callables with a dtype", repr(op.dtype), str(e)) from None
    if dtype.name not in CALLABLE_DTYPES:
        what = f"callables with dtype {', '.join(CALLABLE_DTYPES)}"
        raise type_error(name, "a", what, dtype.name)
    m, n = map(int, shape)
    for label, function, size, given in (
        ("matvec", op.matvec, m, n),
        ("rmatvec", op.rmatvec, n, m),
    ):
        out = jax.eval_shape(function, jax.ShapeDtypeStruct((given,), dtype))
        what = f"{label} to take [{given}] to [{size}] for shape ({m}, {n})"
        if not hasattr(out, "shape") or out.shape != (size,):
            raise value_error(name, "a", what, f"{getattr(out, 'shape', out)}")
        if out.dtype != dtype:
            raise type_error(name, "a", f"{label} to return dtype {dtype.name}", out.dtype.name)
    return LinearOperator(op.matvec, op.rmatvec, (m, n), dtype)


# --- the algorithm ---------------------------------------------------------------------------


def _norm(x: jax.Array) -> jax.Array:
    """|x| without overflow or underflow on the way."""
    top = jnp.max(jnp.abs(x), initial=0)
    safe = jnp.where(top > 0, top, 1)
    y = x / safe
    return jnp.sqrt(jnp.sum((y * jnp.conj(y)).real)) * safe


def _orthogonalised(basis: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What x has outside the span of the basis (two passes), and the coefficients of that part."""
    # Classical Gram-Schmidt twice: as orthogonal as the modified kind, and a pass is two products
    # (Giraud, Langou, Rozloznik and van den Eshof, Numer. Math. 101, 2005). They are XLA's: with
    # `gemv` in their place a call for 4096x600 in float32 took 1.14 times as long on one core.
    # conj(basis) would be a copy of it.
    once = jnp.conj(dot(jnp.conj(x), basis))
    x = x - dot(basis, once)
    again = jnp.conj(dot(jnp.conj(x), basis))
    return x - dot(basis, again), once + again


def _next(
    basis: jax.Array, x: jax.Array, scale: jax.Array, key: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The next basis vector from the product x.

    Returns: the unit vector; x's coefficients on the basis and on it; the largest |x| so far.
    """
    scale = jnp.maximum(scale, _norm(x))
    rest, part = _orthogonalised(basis, x)
    size = _norm(rest)
    # No smaller part can be told from the rounding of the product.
    lost = size <= 4 * float(finfo(size.dtype).eps) * scale

    def drawn() -> jax.Array:
        random, _ = _orthogonalised(basis, _lowrank.gaussian(key, x.shape, x.dtype))
        return random / _norm(random)

    # Dividing by `size` may leave a part of the basis where most of x was in it: once more.
    unit = rest / jnp.where(size > 0, size, 1)
    unit = lax.cond(lost, drawn, lambda: unit)
    unit, _ = _orthogonalised(basis, unit)
    # Nothing is left where the basis is complete already; that vector is not used.
    length = _norm(unit)
    unit = unit / jnp.where(length > 0, length, 1)
    return unit, part, jnp.where(lost, 0, size), scale


class _State(NamedTuple):
    """A cycle's outcome: bases rotated to the Ritz vectors, so that B is the diagonal of s."""

    u: jax.Array  # [m, L]
    s: jax.Array  # [L]
    v: jax.Array  # [n, L + 1], the last one to go on from
    residual: jax.Array  # [L]
    scale: jax.Array
    products: jax.Array
    cycle: jax.Array
    done: jax.Array


def _cycle(op: _lowrank.Operator, spec: Spec, key: Any, state: _State) -> _State:
    """Cuts the bases down to the best Ritz vectors, fills them up and rotates them."""
    steps, k = spec.steps, spec.k
    kept = jnp.where(state.cycle == 0, 0, k + (steps - k) // 2)
    number = jnp.arange(steps + 1, dtype=jnp.int32)
    cut = number < kept
    last = state.v[:, steps]
    u = jnp.where(cut[None, :steps], state.u, 0)
    v = jnp.where(cut[None], state.v, jnp.where((number == kept)[None], last[:, None], 0))
    b = jnp.diag(jnp.where(cut[:steps], state.s, 0)).astype(u.dtype)
    key = jax.random.fold_in(key, state.cycle + 1)

    def step(j: jax.Array, carry: Any) -> Any:
        u, v, b, scale, _ = carry
        for_u, for_v = jax.random.split(jax.random.fold_in(key, j))
        left, part, size, scale = _next(u, op.forward(v[:, j][:, None])[:, 0], scale, for_u)
        u, b = u.at[:, j].set(left), b.at[:, j].set(part.at[j].set(size.astype(part.dtype)))
        right, _, beta, scale = _next(v, op.backward(left[:, None])[:, 0], scale, for_v)
        return u, v.at[:, j + 1].set(right), b, scale, beta

    start = (u, v, b, state.scale, jnp.zeros_like(state.scale))
    u, v, b, scale, beta = lax.fori_loop(kept, steps, step, start)
    ub, s, vbh = svd(b, full_matrices=False)
    residual = beta * jnp.abs(ub[-1])
    bound = ACC_LANCZOS_ULP * float(finfo(s.dtype).eps) * s[0]
    return _State(
        u=dot(u, ub),
        s=s,
        v=jnp.concatenate([dot(v[:, :steps], adjoint(vbh)), v[:, steps:]], axis=1),
        residual=residual,
        scale=scale,
        products=state.products + (steps - kept).astype(jnp.int32),
        cycle=state.cycle + 1,
        done=jnp.all(residual[:k] <= bound),
    )


def _bidiagonalise(
    op: _lowrank.Operator, shape: tuple[int, int], dtype: Any, spec: Spec, key: Any
) -> tuple[jax.Array, ...]:
    """``u, s, v`` of k columns, of the others, and the info, of one matrix."""
    m, n = shape
    if m < n:  # the start vector belongs to the shorter side: L of them are then a whole basis
        u, s, v, *rest = _bidiagonalise(op.H, (n, m), dtype, spec, key)
        return v, s, u, rest[2], rest[1], rest[0], *rest[3:]
    steps, k = spec.steps, spec.k
    real = finfo(dtype).dtype
    first = _lowrank.gaussian(key, (n,), dtype)
    state = _State(
        u=jnp.zeros((m, steps), dtype),
        s=jnp.zeros(steps, real),
        v=jnp.zeros((n, steps + 1), dtype).at[:, steps].set(first / _norm(first)),
        residual=jnp.zeros(steps, real),
        scale=jnp.zeros((), real),
        products=jnp.int32(0),
        cycle=jnp.int32(0),
        done=jnp.array(False),
    )

    def unfinished(state: _State) -> jax.Array:
        return (state.cycle < spec.cycles) & ~state.done & jnp.isfinite(state.s[0])

    state = lax.while_loop(unfinished, functools.partial(_cycle, op, spec, key), state)
    u, s, v = state.u, state.s, state.v[:, :steps]
    info = state.residual[:k], state.done, state.products
    return u[:, :k], s[:k], v[:, :k], u[:, k:], s[k:], v[:, k:], *info


def _build(
    make: Callable[[Any], _lowrank.Operator],
    shape: tuple[int, int],
    dtype: Any,
    spec: Spec,
    implementation: Any,
) -> Callable[[Any, jax.Array], tuple[jax.Array, ...]]:
    """``_bidiagonalise`` of ``make(parameters)``, with its derivative by the parameters."""

    def jml_lanczos_svd(parameters: Any, key_data: jax.Array) -> tuple[jax.Array, ...]:
        key = jax.random.wrap_key_data(key_data, impl=implementation)
        return _bidiagonalise(make(parameters), shape, dtype, spec, key)

    compiled = jax.jit(_registry.composite("lanczos_svd", jml_lanczos_svd))

    @jax.custom_jvp
    def core(parameters: Any, key_data: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(compiled(parameters, key_data))

    @core.defjvp
    def jvp(primals: Any, tangents: Any) -> Any:
        (parameters, key_data), (moving, _) = primals, tangents
        out = core(parameters, key_data)

        def along(apply: Callable[[Any, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
            return lambda x: jax.jvp(lambda p: apply(p, x), (parameters,), (moving,))[1]

        d_op = _lowrank.Operator(
            along(lambda p, x: make(p).forward(x)), along(lambda p, y: make(p).backward(y))
        )
        moved = _lowrank.oriented_tangents(make(parameters), d_op, shape, *out[:6])
        still = [
            jnp.zeros_like(x)
            if jnp.issubdtype(x.dtype, jnp.inexact)
            else np.zeros(x.shape, jax.dtypes.float0)
            for x in out[3:]
        ]
        return out, (*moved, *still)

    return core


_built = functools.cache(_build)


def _of_array(x: jax.Array, spec: Spec, key: Any) -> tuple[jax.Array, ...]:
    *batch, m, n = x.shape
    data, implementation = jax.random.key_data(key), jax.random.key_impl(key)
    core = _built(_lowrank.matrix_operator, (m, n), x.dtype, spec, implementation)
    if not batch:
        return core(x, data)
    if 0 in batch:
        shapes = jax.eval_shape(core, jax.ShapeDtypeStruct((m, n), x.dtype), data)
        return tuple(jnp.zeros((*batch, *s.shape), s.dtype) for s in shapes)
    out = jax.vmap(core, in_axes=(0, None))(x.reshape(math.prod(batch), m, n), data)
    return tuple(o.reshape(*batch, *o.shape[1:]) for o in out)


def _of_callables(op: LinearOperator, spec: Spec, key: Any) -> tuple[jax.Array, ...]:
    m, n = op.shape
    # What the callables close over becomes an argument, so that it can be differentiated by.
    forward, forward_values = jax.closure_convert(op.matvec, jnp.zeros(n, op.dtype))
    backward, backward_values = jax.closure_convert(op.rmatvec, jnp.zeros(m, op.dtype))

    def columns(function: Callable[..., jax.Array], values: Any) -> Callable[..., jax.Array]:
        return jax.vmap(lambda x: function(x, *values), in_axes=1, out_axes=1)

    def make(values: Any) -> _lowrank.Operator:
        return _lowrank.Operator(columns(forward, values[0]), columns(backward, values[1]))

    data, implementation = jax.random.key_data(key), jax.random.key_impl(key)
    core = _build(make, op.shape, op.dtype, spec, implementation)
    return core((tuple(forward_values), tuple(backward_values)), data)
