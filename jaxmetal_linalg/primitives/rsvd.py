"""Randomised singular value decomposition of every matrix in a batch.

A Gaussian (or sparse sign) block W is drawn, and the range of A (A^H A)^t W found by subspace
iteration, re-orthonormalised at each half step; then A is projected on it and the small remainder
decomposed (Halko, Martinsson and Tropp 2011, section 5).

With the normalizer ``auto`` the iteration is accelerated: step j multiplies by A^H A - f_j alpha
instead of A^H A, where the f_j are the Chebyshev roots on [0, 1] and alpha is the square of the
smallest singular value of A on the current subspace, a lower bound of the square of the q-th
singular value of A. The t shifted steps make up a Chebyshev polynomial that is small on everything
below it. Two products a step, as without shifts; where the spectrum decays slowly three steps do
more than seven plain ones.

A wide matrix is worked on as its adjoint; nothing is transposed in memory, A is only read, 2 t + 2
times, and all that is held besides has max(m, n) q entries at most.

The primitive takes A and W and gives q triplets. It is one custom call where the kernels serve it
(csrc/rsvd.cc), else a composite of XLA's products, ``qr`` and ``svd``: ``_decompose``, which says
the algorithm in full. Its derivative is in ``_lowrank.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from jaxmetal_linalg import (
    _compat,
    _cuda,
    _device,
    _lowrank,
    _metal,
    _native,
    _portable,
    _registry,
    _tuning,
)
from jaxmetal_linalg._errors import (
    DeviceUnavailableError,
    device_absent,
    type_error,
    value_error,
    wrong_platform,
)
from jaxmetal_linalg._lowrank import adjoint, dot
from jaxmetal_linalg._portable import finfo
from jaxmetal_linalg._registry import Plan
from jaxmetal_linalg.primitives import qr as _qr
from jaxmetal_linalg.primitives import svd as _svd
from jaxmetal_linalg.primitives.svd import SVDResult, svd_p

TARGET = "jml_rsvd_v1"

Normalizer: TypeAlias = Literal["auto", "QR", "LU", "none"]
Sketch: TypeAlias = Literal["gaussian", "sparse_sign"]
NORMALIZERS: tuple[str, ...] = get_args(Normalizer)
SKETCHES: tuple[str, ...] = get_args(Sketch)

#: Nonzeros in each row of a sparse sign sketch (Martinsson and Tropp 2020, section 9.2).
SPARSE_SIGNS = 8


@dataclasses.dataclass(frozen=True)
class Spec:
    """All options of a call, resolved once; the primitive's only parameter.

    ``small`` and ``basis`` are what the small ``svd`` and ``qr`` of the composite will do.
    """

    k: int
    q: int
    n_iter: int
    normalizer: str
    center: bool
    device: str
    variant: str
    small: _svd.Spec
    basis: _qr.Spec
    metal_tuning: tuple[tuple[str, float], ...]
    cuda_tuning: tuple[tuple[str, float], ...]
    sim_options: tuple[tuple[str, bool | int | str], ...]

    def problem(self, shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
        """What the native library plans from, here and again in the custom call's attribute."""
        return {**self._problem(shape, dtype, "sim"), "device": "sim", **dict(self.sim_options)}

    def problem_on(
        self, caps: str, shape: Sequence[Any], dtype: Any, *, elsewhere: bool = False
    ) -> dict[str, Any]:
        """The same on the GPU called ``caps``; ``elsewhere``: one not here, which has cuBLAS."""
        device = _native.caps_row(caps, "rsvd: caps")["device"]
        problem = {**self._problem(shape, dtype, device), "device": device, "caps": caps}
        if device == "cuda":
            problem["library"] = self.for_library(shape) and (
                elsewhere or not _cuda.without_cublas()
            )
        return problem

    def for_library(self, shape: Sequence[Any]) -> bool:
        """Whether products with matrices of this size are cuBLAS's on CUDA, where it is there."""
        *_, m, n = shape
        return not self.variant and m * n >= dict(self.cuda_tuning)["library_min_entries"]

    def _problem(self, shape: Sequence[Any], dtype: Any, device: str) -> dict[str, Any]:
        *batch, m, n = shape
        return {
            "batch": _registry.planned_number(batch),
            "m": m,
            "n": n,
            "q": self.q,
            "n_iter": self.n_iter,
            "normalizer": self.normalizer,
            "center": self.center,
            "max_sweeps": int(dict(getattr(self.small, f"{device}_tuning"))["max_sweeps"]),
            "dtype": np.dtype(dtype).name,
            "variant": self.variant,
        }


# --- public functions ------------------------------------------------------------------------


def rsvd(
    a: Any,
    k: int | None = None,
    *,
    tol: Any = None,
    max_rank: int | None = None,
    key: Any = None,
    n_oversamples: int = 10,
    n_iter: int | Literal["auto"] = "auto",
    power_iteration_normalizer: Normalizer = "auto",
    flip_sign: bool = True,
    center: bool = False,
    sketch: Sketch = "gaussian",
    return_error: bool = False,
) -> Any:
    """The k leading singular triplets of each matrix, by randomised subspace iteration.

    Either ``k`` is given, or ``tol``, for the smallest rank that reaches an accuracy. The options
    are those of scikit-learn's ``randomized_svd``, with its defaults.

    Args:
      a: ``[..., m, n]``, dtypes as ``svd``; float16 and bfloat16 are computed in float32.
      k: static, 1 <= k <= min(m, n).
      tol: number >= 0, may be traced: the rank is the smallest r with
        ``|a - U[:, :r] S[:r] Vh[:r]|_2 <= tol * |a|_2`` according to the certificate (below), and
        ``max_rank`` if that is not enough. The error of what is returned is then only known with
        ``return_error``.
      max_rank: static, with ``tol``: columns of the result; min(m, n) if None.
      key: one JAX PRNG key; None is ``jax.random.key(0)``. The same key gives the same sketch on
        every device and for every dtype, and one sketch for all matrices of the batch; map over
        keys for independent ones. (Keys of other implementations than threefry are only as
        reproducible across platforms as JAX makes them.)
      n_oversamples: static, >= 0: columns of the sketch beyond k, cut where k + n_oversamples
        passes min(m, n). If it reaches that, the decomposition is deterministic and exact.
      n_iter: static, >= 0: power iterations. ``auto`` is 7 if k < 0.1 min(m, n), else 4.
      power_iteration_normalizer: static. ``QR``: a Householder-grade QR each half step. ``LU``:
        scikit-learn's cheap normaliser; here one Cholesky factorisation of the Gram matrix in its
        place. ``none``: only scaled, which loses the smaller singular values from n_iter = 2 or 3
        on. ``auto``: as ``LU``, with Chebyshev shifts, so that n_iter counts for more: never
        ``none``, which it is in scikit-learn for n_iter <= 2.
      flip_sign: static: the entry of largest modulus in each column of U is real and positive.
      center: static: decompose ``a - mean(a, axis=-2)``, without forming it. Where the mean is
        large against the rest, the rest is known to the rounding of the mean.
      sketch: static. ``gaussian``, or ``sparse_sign``: each row has 8 entries +-1/sqrt(8), one in
        each of 8 blocks of columns.
      return_error: static: also return the certificate.

    Returns:
      ``SVDResult(U [..., m, k], S [..., k], Vh [..., k, n])``, S descending and >= 0. With ``tol``
      ``(result, rank)``: k is max_rank, the columns of U, entries of S and rows of Vh from ``rank``
      (int32 ``[...]``) on are zero. With ``return_error`` an upper estimate ``[...]`` of
      ``|a - U S Vh|_2`` (float32, or float64 for 64-bit input) follows as the last item.

    Raises:
      TypeError: dtype, an option of the wrong type, neither or both of ``k`` and ``tol``.
      ValueError: rank < 2, k or max_rank out of range, negative n_oversamples, n_iter or tol, an
        unknown normalizer or sketch.
      DeviceUnavailableError: as ``svd``.

    Failure:
      A matrix with a non-finite entry yields NaN in all its own outputs (and ``rank`` max_rank).

    Accuracy:
      U and V are orthonormal to LAPACK's ratios (``ACC_RATIO``) whatever the matrix. With the
      defaults, ``|a - U S Vh|_2`` is within ``ACC_RSVD_OPTIMAL`` of the best possible on spectra
      like 1/i and steeper, and the leading k/2 singular values within ``ACC_RSVD_SIGMA`` of
      themselves. The certificate is below the true error with probability at most
      ``CERTIFICATE_FAILURE``, and rarely above 2.5 times it, where the error is above rounding.

    Differentiability:
      jvp and vjp to any order, by the derivative of the exact truncated SVD, residual term
      included; accurate as far as the result is. Repeated and zero singular values are treated as
      by ``svd``'s safe rule. Where the k-th and the next one tie, no derivative exists; it is
      finite then. Rank and certificate are constants. Costs two products with a for each step of
      conjugate gradients, more of them the closer the k-th singular value is to those cut off.

    Devices:
      One custom call, everything but the sketch and ``flip_sign`` in our kernels: on device sim,
      on metal (on request, and for large matrices by itself), and on cuda from some size on where
      it was measured faster than the composite; ``JAXMETAL_VARIANT=rsvd:cholesky`` asks for it by
      name. It takes float16, bfloat16 and float32, k + n_oversamples up to 128 and the normalizers
      ``auto`` and ``LU``. On cuda its products with large matrices are cuBLAS's in 16 bits
      (``rsvd:library``): a float32 matrix is cut into two halves first, which take as much memory
      as it does, a panel into two pieces, sums are float32, and what is left out is below 2^-21 of
      |a| times |panel|. Without cuBLAS, and for small ones, they are our kernels'. Everywhere and
      for everything else a composite: products and factorisations in XLA, ``qr`` and the small
      ``svd`` on the device chosen. ``explain`` shows which, and lists the calls of a composite.

    Source:
      Halko, Martinsson and Tropp, SIAM Review 53 (2011).
    """
    name = "rsvd"
    a = _svd._operand(name, a)
    m, n = a.shape[-2:]
    full = min(m, n)
    columns = _columns(full, k, tol, max_rank)
    return_error = _svd._flag(name, "return_error", return_error)
    flip_sign = _svd._flag(name, "flip_sign", flip_sign)
    spec = _spec(full, columns, n_oversamples, n_iter, power_iteration_normalizer, center)
    sketch_name = _svd._choice(name, "sketch", sketch, SKETCHES)
    for_sketch, for_probes, for_rank = jax.random.split(_lowrank.random_key(name, key), 3)

    dtype = a.dtype
    if 0 in a.shape:
        u, s, v, bases = *_empty(a, spec), None
    else:
        # The sketch is only needed where it is not the whole space.
        omega = _sketch(for_sketch, sketch_name, (full, spec.q), full, _svd._compute_dtype(dtype))
        every = rsvd_p.bind(*_compat.same_variance(a, omega), spec=spec)
        (u, s, v), bases = _kept(every, spec.k), _rest(every, spec.k)
    vh = adjoint(v)
    if flip_sign:
        u, vh = _lowrank.flip_signs(u, vh)

    extra: list[jax.Array] = []
    if tol is not None:
        rank = _rank(a, spec, tol, for_rank, u, s, vh, bases)
        number = jnp.arange(columns, dtype=jnp.int32).reshape((1,) * rank.ndim + (columns,))
        keep = number < rank[..., None]
        keep |= jnp.isnan(s)
        u, s = jnp.where(keep[..., None, :], u, 0), jnp.where(keep, s, 0)
        vh = jnp.where(keep[..., :, None], vh, 0)
        extra.append(rank)
    if return_error:
        extra.append(_bound(a, spec, for_probes, u, s, adjoint(vh)))
    result = SVDResult(u.astype(dtype), s.astype(finfo(dtype).dtype), vh.astype(dtype))
    return (result, *extra) if extra else result


# --- arguments -------------------------------------------------------------------------------


def _columns(full: int, k: Any, tol: Any, max_rank: Any) -> int:
    if (k is None) == (tol is None):
        got = "neither" if k is None else f"k={k!r} and tol={tol!r}"
        raise type_error("rsvd", "k or tol", "exactly one of them", got)
    if tol is None:
        if max_rank is not None:
            raise type_error("rsvd", "max_rank", "None, without tol", repr(max_rank))
        return _lowrank.integer("rsvd", "k", k, 1, full, "k is at most min(m, n)")
    number = isinstance(tol, (int, float)) and not isinstance(tol, bool)
    if not number and not (
        hasattr(tol, "dtype") and jnp.issubdtype(tol.dtype, jnp.floating) and jnp.ndim(tol) == 0
    ):
        raise type_error("rsvd", "tol", "one real number >= 0", repr(tol))
    if isinstance(tol, (int, float)) and not 0 <= tol < math.inf:
        raise value_error("rsvd", "tol", "a number >= 0", repr(tol))
    if max_rank is None:
        return full
    return _lowrank.integer("rsvd", "max_rank", max_rank, 1, full, "It is at most min(m, n)")


def _spec(full: int, k: int, n_oversamples: Any, n_iter: Any, normalizer: Any, center: Any) -> Spec:
    name = "rsvd"
    p = _lowrank.integer(name, "n_oversamples", n_oversamples, 0, None)
    if isinstance(n_iter, str):
        _svd._choice(name, "n_iter", n_iter, ("auto", "an integer"))
        n_iter = 7 if k < 0.1 * full else 4
    steps = _lowrank.integer(name, "n_iter", n_iter, 0, None)
    q = min(k + p, full)
    argument = "power_iteration_normalizer"
    device = _device.requested()
    return Spec(
        k=k,
        q=q,
        n_iter=steps if q < full else 0,
        normalizer=_svd._choice(name, argument, normalizer, NORMALIZERS),
        center=_svd._flag(name, "center", center),
        device=device,
        variant=_tuning.forced_variant(name),
        small=_svd._spec(name, False, True, "auto", "safe"),
        basis=_qr._spec(name, "reduced", "auto"),
        metal_tuning=_tuning.resolve("metal", name, _metal.family()),
        cuda_tuning=_tuning.resolve("cuda", name),
        sim_options=_device.sim_options() if device == "sim" else (),
    )


def _sketch(key: Any, sketch: str, shape: tuple[int, int], full: int, dtype: Any) -> jax.Array:
    """The test matrix ``[min(m, n), q]``; the identity where it would span everything."""
    rows, q = shape
    if q == full:
        return jnp.eye(full, dtype=dtype)
    if sketch == "gaussian":
        return _lowrank.gaussian(key, shape, dtype)
    blocks = min(SPARSE_SIGNS, q)
    starts = jnp.array([i * q // blocks for i in range(blocks + 1)])
    place, sign = jax.random.split(key)
    # The type is named, as are the others here, so that 64-bit mode draws the same numbers.
    at = jax.random.randint(place, (rows, blocks), starts[:-1][None], starts[1:][None], jnp.int32)
    bits = jax.random.bits(sign, (rows, blocks), jnp.uint32)
    signs = jnp.where(bits & 1, jnp.float32(1), jnp.float32(-1)) / math.sqrt(blocks)
    out = jnp.zeros(shape, jnp.float32)
    out = out.at[jnp.arange(rows)[:, None], at].set(signs)
    return out.astype(dtype)


def _empty(a: jax.Array, spec: Spec) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For a batch of no matrices."""
    *batch, m, n = a.shape
    dtype = _svd._compute_dtype(a.dtype)
    return (
        jnp.zeros((*batch, m, spec.k), dtype),
        jnp.zeros((*batch, spec.k), finfo(dtype).dtype),
        jnp.zeros((*batch, n, spec.k), dtype),
    )


def _kept(every: Sequence[jax.Array], k: int) -> list[jax.Array]:
    return [x[..., :k] for x in every]


def _rest(every: Sequence[jax.Array], k: int) -> list[jax.Array]:
    return [x[..., k:] for x in every]


# --- the algorithm ---------------------------------------------------------------------------


def _oriented(a: jax.Array, center: bool, dtype: Any) -> _lowrank.Operator:
    """``a`` as an operator with no more columns than rows."""
    op = _lowrank.matrix_operator(a, center, dtype)
    return op.H if a.shape[-2] < a.shape[-1] else op


def _decompose(spec: Spec, a: jax.Array, omega: jax.Array) -> list[jax.Array]:
    """The composite: ``u, s, v`` of q columns."""
    omega = omega.reshape((1,) * (a.ndim - omega.ndim) + omega.shape)
    e, finite = _lowrank.power_of_two(a)
    op = _lowrank.scaled(_oriented(a, spec.center, omega.dtype), e, omega.dtype)
    y = op.forward(_iterate(op, omega, spec))
    y, _ = _orthonormalise(y, spec)
    z, r = _orthonormalise(op.backward(y), spec)
    # y^H a = (z r)^H, so a = y r^H z^H on the subspace.
    u, s, vh = svd_p.bind(adjoint(r), spec=spec.small)[:3]
    s = _portable.unscale(s, e)
    u, v = dot(y, u), dot(z, adjoint(vh))
    if a.shape[-2] < a.shape[-1]:
        u, v = v, u
    nan = ~finite[..., None]
    u, v = (jnp.where(nan[..., None], jnp.nan, x) for x in (u, v))
    return [u, jnp.where(nan, jnp.nan, s), v]


def _orthonormalise(y: jax.Array, spec: Spec) -> list[jax.Array]:
    """q, r with y = q r and q orthonormal always, zero and dependent columns included."""
    return list(_qr.qr_p.bind(y, spec=spec.basis))


def _iterate(op: _lowrank.Operator, x: jax.Array, spec: Spec) -> jax.Array:
    """Subspace iteration from the sketch: a basis that ``op`` takes to the wanted range."""
    steps = spec.n_iter
    if steps == 0:
        return x
    if spec.normalizer in ("QR", "none"):

        def plain(_: Any, x: jax.Array) -> jax.Array:
            return _normalise(op.backward(_normalise(op.forward(x), spec)), spec)

        # The first step apart: the sketch may lack batch dimensions.
        return jnp.asarray(lax.fori_loop(1, steps, plain, plain(0, x)))

    y, _, _ = _lowrank.cholesky_basis(op.forward(x))
    x, _, _ = _lowrank.cholesky_basis(op.backward(y))

    def step(j: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, bound = carry
        y, r, inverse = _lowrank.cholesky_basis(op.forward(x))
        z = op.backward(y)
        if spec.normalizer == "auto":
            # Now |x|_2 <= 1, so the singular values of r are no larger than those of a. The first
            # root is near 0, where there was no bound yet, the last near 1, where it is best.
            bound = jnp.maximum(bound, _lowrank.smallest_singular_value(r, inverse))
            root = (1 - jnp.cos((2 * j + 1).astype(bound.dtype) * (math.pi / (2 * steps)))) / 2
            shift = bound[..., None]
            z = z - root * dot(x * shift, inverse * shift)
        x, _, _ = _lowrank.cholesky_basis(z)
        return x, bound

    bound = jnp.zeros((*x.shape[:-2], 1), x.real.dtype)  # of the q-th singular value, from below
    return jnp.asarray(lax.fori_loop(jnp.int32(1), jnp.int32(steps), step, (x, bound))[0])


def _normalise(y: jax.Array, spec: Spec) -> jax.Array:
    if spec.normalizer == "QR":
        return _orthonormalise(y, spec)[0]
    top = jnp.max(jnp.abs(y), axis=(-2, -1), keepdims=True)
    return jnp.asarray(y / jnp.where(top > 0, top, 1))


# --- what is known of the error --------------------------------------------------------------


def _bound(
    x: jax.Array, spec: Spec, key: Any, u: jax.Array, s: jax.Array, v: jax.Array
) -> jax.Array:
    x, u, s, v = map(lax.stop_gradient, (x, u, s, v))
    if 0 in x.shape:
        return jnp.zeros(x.shape[:-2], s.dtype)
    e, _ = _lowrank.power_of_two(x)
    op = _lowrank.scaled(_lowrank.matrix_operator(x, spec.center, u.dtype), e, u.dtype)
    f = jnp.ldexp(jnp.ones((), s.dtype), e)
    return _portable.unscale(_lowrank.error_bound(op, u, s * f[..., None], v, key)[..., None], e)[
        ..., 0
    ]


def _rank(
    x: jax.Array,
    spec: Spec,
    tol: Any,
    key: Any,
    u: jax.Array,
    s: jax.Array,
    vh: jax.Array,
    rest: Any,
) -> jax.Array:
    """The smallest rank whose error is at most ``tol |x|_2``.

    The error of rank r consists of what the q columns leave of x and of what they have beyond r,
    whose ranges are orthogonal to one another: the squares of the two norms bound its square.
    """
    if rest is None:
        return jnp.zeros(x.shape[:-2], jnp.int32)
    u_all = jnp.concatenate([u, rest[0]], axis=-1)
    s_all = jnp.concatenate([s, rest[1]], axis=-1)
    v_all = jnp.concatenate([adjoint(vh), rest[2]], axis=-1)
    left = _bound(x, spec, key, u_all, s_all, v_all)[..., None]
    s_all = lax.stop_gradient(s_all)
    beyond = jnp.pad(s_all, [(0, 0)] * (s.ndim - 1) + [(0, 1)])[..., : spec.k + 1]
    top = jnp.where(s_all[..., :1] > 0, s_all[..., :1], 1)
    enough = jnp.hypot(left / top, beyond / top) <= jnp.asarray(tol, s.dtype) * (
        s_all[..., :1] / top
    )
    rank = jnp.where(jnp.any(enough, axis=-1), jnp.argmax(enough, axis=-1), spec.k)
    return rank.astype(jnp.int32)


# --- shape and dtype rule --------------------------------------------------------------------


def _abstract_eval(a: Any, omega: Any, *, spec: Spec) -> list[Any]:
    m, n = _svd._core_shape("rsvd", a)
    dtype = np.dtype(_svd._compute_dtype(a.dtype))
    real = np.dtype(finfo(dtype).dtype)
    shapes = ((m, spec.q), dtype), ((spec.q,), real), ((n, spec.q), dtype)
    return [_compat.batched_result(a, 2, shape, kind) for shape, kind in shapes]


def _batch(args: Any, dims: Any, *, spec: Spec) -> Any:
    """A leading dimension more; a sketch that is not mapped stays one for all."""
    (a, omega), (at, sketch_at) = args, dims
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    a = jnp.broadcast_to(a, (size, *a.shape)) if at is None else jnp.moveaxis(a, at, 0)
    if sketch_at is not None:
        omega = jnp.moveaxis(omega, sketch_at, 0)
        missing = (1,) * (a.ndim - omega.ndim)
        omega = omega.reshape((size, *missing, *omega.shape[1:]))
    return rsvd_p.bind(a, omega, spec=spec), (0, 0, 0)


# --- JVP -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(8,))
def _tangents(
    a: jax.Array,
    da: jax.Array,
    u: jax.Array,
    s: jax.Array,
    v: jax.Array,
    u_rest: jax.Array,
    s_rest: jax.Array,
    v_rest: jax.Array,
    spec: Spec,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    op = _lowrank.matrix_operator(a, spec.center)
    d_op = _lowrank.matrix_operator(da, spec.center)
    shape = (a.shape[-2], a.shape[-1])
    return _lowrank.oriented_tangents(op, d_op, shape, u, s, v, u_rest, s_rest, v_rest)


def _jvp(primals: Any, tangents: Any, *, spec: Spec) -> tuple[list[Any], list[Any]]:
    (a, omega), (da, _) = primals, tangents
    every = rsvd_p.bind(a, omega, spec=spec)
    if isinstance(da, ad.Zero):
        return every, [_compat.zero_tangent(x) for x in every]
    wide = _svd._compute_dtype(a.dtype)
    kept, rest = _kept(every, spec.k), _rest(every, spec.k)
    moved = _tangents(a.astype(wide), da.astype(wide), *kept, *rest, spec)
    return every, [
        jnp.concatenate([dx, jnp.zeros_like(x)], axis=-1) for dx, x in zip(moved, rest, strict=True)
    ]


# --- plan ------------------------------------------------------------------------------------


def _composite_plan(reason: str) -> Plan:
    return Plan("xla", "composite", launches=0, reason=f"a composite of the calls below: {reason}")


def _plan(
    platform: str, shape: Sequence[Any], dtype: Any, params: dict[str, Any], caps: str = ""
) -> Plan:
    spec: Spec = params["spec"]
    if caps:
        plan = _registry.kernel_plan("rsvd", spec.problem_on(caps, shape, dtype, elsewhere=True))
        return plan if plan.route == "kernel" else _composite_plan(plan.reason)
    if platform != "cpu" and spec.device in ("host", "sim", "metal"):
        raise wrong_platform("rsvd", f"device {spec.device!r}", "cpu", platform)
    if platform != "cuda" and spec.device == "cuda":
        raise wrong_platform("rsvd", "device 'cuda'", "cuda", platform)
    if platform == "cuda" and spec.device in ("auto", "cuda"):
        return _cuda_plan(spec, shape, dtype)
    if platform != "cpu":
        return _composite_plan(f"platform {platform!r} has no native handler")
    if spec.device == "sim":
        plan = _registry.kernel_plan("rsvd", spec.problem(shape, dtype))
        return _or_composite(dataclasses.replace(plan, device="sim"), spec)
    on_metal = spec.device == "metal" or (spec.device == "auto" and not _metal.missing())
    if not on_metal:
        return _composite_plan(f"device {spec.device!r} has no kernels of its own for all of it")
    plan = _registry.kernel_plan("rsvd", spec.problem_on(_metal.caps(), shape, dtype))
    *_, m, n = shape
    least = dict(spec.metal_tuning)["auto_min_entries"]
    if spec.device == "auto" and not spec.variant and m * n < least:
        return _composite_plan(f"m n = {m * n} is below auto_min_entries = {least} of metal")
    return _or_composite(plan, spec)


def _or_composite(plan: Plan, spec: Spec) -> Plan:
    if plan.route == "kernel":
        return plan
    if spec.variant:
        raise DeviceUnavailableError(f"{plan.reason}, not {spec.variant!r}")
    return _composite_plan(plan.reason)


def _cuda_plan(spec: Spec, shape: Sequence[Any], dtype: Any) -> Plan:
    missing = _cuda.missing_to_lower()
    if missing and spec.device == "cuda":
        raise device_absent("rsvd", "cuda", missing)
    if missing:
        return _composite_plan(missing)
    tuning, (*batch, m, n) = dict(spec.cuda_tuning), shape
    entries = _registry.planned_number(batch) * m * n
    if not spec.variant and entries < tuning["kernel_min_entries"]:
        return _composite_plan(f"{entries} numbers, below kernel_min_entries of cuda")
    if not spec.variant and spec.q > tuning["wide_q"] and m * n > tuning["wide_max_entries"]:
        # Where XLA's products are faster than ours; in 16 bits they are not.
        single = np.dtype(dtype) == _svd._compute_dtype(dtype)
        if single and (problem := _cuda.without_cublas()):
            return _composite_plan(f"m n = {m * n} is above wide_max_entries, and {problem}")
    if spec.variant == "library" and (problem := _cuda.without_cublas()):
        raise DeviceUnavailableError(f"rsvd: row library: {problem}")
    plan = _registry.kernel_plan("rsvd", spec.problem_on(_cuda.caps(), shape, dtype))
    if spec.for_library(shape) and (problem := _cuda.without_cublas()):
        reason = f"{plan.reason}; products by our own kernels: {problem}"
        plan = dataclasses.replace(plan, reason=reason)
    return _or_composite(plan, spec)


# --- lowering --------------------------------------------------------------------------------


def _lower(platform: str, ctx: Any, a: Any, omega: Any, *, spec: Spec) -> Any:
    aval, sketch = ctx.avals_in
    plan = _plan(platform, aval.shape, aval.dtype, {"spec": spec})
    if plan.route == "composite":
        return _compat.lower_local(ctx, functools.partial(_decompose, spec), a, omega)
    # One sketch for each matrix: the call is partitioned over the batch.
    batched = _compat.batched_result(aval, 2, sketch.shape[-2:], sketch.dtype)
    if batched.shape != sketch.shape:
        (omega,) = _compat.lower_local(
            ctx.replace(avals_in=[sketch], avals_out=[batched]),
            lambda omega: [jnp.broadcast_to(omega, batched.shape)],
            omega,
        )
    ctx = ctx.replace(avals_in=[aval, batched])
    return _registry.custom_call(TARGET, plan, spec, ctx, (a, omega), aval.shape, aval.dtype)


def _parts(a: Any, omega: Any, *, spec: Spec) -> Any:
    """The jaxpr of the composite, for ``explain``."""
    return jax.make_jaxpr(functools.partial(_decompose, spec))(
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (a, omega))
    ).jaxpr


rsvd_p = _registry.linalg_primitive(
    "rsvd",
    abstract_eval=_abstract_eval,
    jvp=_jvp,
    plan=_plan,
    lower=_lower,
    native_platforms=("cpu", "cuda"),
    batch=_batch,
    parts=_parts,
)
