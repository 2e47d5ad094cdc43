"""Singular value decomposition of every matrix in a batch.

The derivative. With A = U S V^H (k = min(m, n) columns), P = U^H dA V, H and K the Hermitian and
anti-Hermitian parts of P, the rotations inside the two bases are, for i != j,

    (U^H dU)_ij = H_ij / (s_j - s_i) + K_ij / (s_j + s_i)
    (V^H dV)_ij = H_ij / (s_j - s_i) - K_ij / (s_j + s_i)

and dS = Re diag P. On the diagonal only K_ii / s_i (imaginary, complex matrices) is determined, as
the difference of the two; it is given to U, as JAX does. Out of the bases, dU gains
(I - U U^H) dA V / S and dV gains (I - V V^H) dA^H U / S. With full matrices U = [U1 U2], the
complement follows without turning in itself: dU2 = -U1 (U2^H dU1)^H. Nothing is squared and all
singular values are divided by the largest first, so the rule has no scale of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from jaxmetal_linalg import (
    _compat,
    _cuda,
    _device,
    _metal,
    _native,
    _portable,
    _registry,
    _tuning,
)
from jaxmetal_linalg._accuracy import ACC_RATIO, GRAD_GAP_EPS
from jaxmetal_linalg._errors import (
    DeviceUnavailableError,
    device_absent,
    type_error,
    value_error,
    wrong_platform,
)
from jaxmetal_linalg._portable import finfo
from jaxmetal_linalg._registry import Plan

TARGET = "jml_svd_v1"

Method: TypeAlias = Literal["auto", "jacobi", "block_jacobi", "lapack", "xla"]
Gradient: TypeAlias = Literal["safe", "strict"]
METHODS: tuple[str, ...] = get_args(Method)
GRADIENTS: tuple[str, ...] = get_args(Gradient)
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")

CONVERGED, SECOND_ALGORITHM, NOT_CONVERGED, NON_FINITE = 0, 1, 2, 3


class SVDResult(NamedTuple):
    """``a = U[..., :k] @ diag(S) @ Vh[..., :k, :]``, with k = min(m, n)."""

    U: jax.Array
    S: jax.Array
    Vh: jax.Array


class SVDInfo(NamedTuple):
    """How each matrix of the batch went.

    Attributes:
      status: int32 ``[...]``: 0 converged, 1 converged by the second algorithm, 2 not converged
        (outputs NaN), 3 non-finite input (outputs NaN).
      sweeps: int32 ``[...]``, Jacobi sweeps used; 0 where LAPACK did the work.
      off_norm: float32 ``[...]``, the largest |cosine| between two columns that the last sweep saw
        before it removed it; 0 where LAPACK did the work.
    """

    status: jax.Array
    sweeps: jax.Array
    off_norm: jax.Array


# So that jax.export can serialise functions that return them.
for _result_type in (SVDResult, SVDInfo):
    export.register_namedtuple_serialization(
        _result_type, serialized_name=f"jaxmetal_linalg.{_result_type.__name__}"
    )


@dataclasses.dataclass(frozen=True)
class Spec:
    """All options of a call, resolved once; the primitive's only parameter."""

    full_matrices: bool
    compute_uv: bool
    method: str
    gradient: str
    device: str
    variant: str
    host_tuning: tuple[tuple[str, float], ...]
    sim_tuning: tuple[tuple[str, float], ...]
    metal_tuning: tuple[tuple[str, float], ...]
    cuda_tuning: tuple[tuple[str, float], ...]
    xla_tuning: tuple[tuple[str, float], ...]
    sim_options: tuple[tuple[str, bool | int | str], ...]

    def problem(self, shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
        """What the native library plans from, here and again in the custom call's attribute."""
        if self.device == "sim":
            options = dict(self.sim_options)
            return {
                **self._problem(shape, dtype),
                "device": "sim",
                **options,
                **dict(self.sim_tuning),
            }
        return {**self._problem(shape, dtype), **dict(self.host_tuning)}

    def problem_on(self, caps: str, shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
        """The same on the GPU called ``caps``, present or not."""
        row = _native.caps_row(caps, "svd: caps")
        tuning = dict(self.cuda_tuning if row["device"] == "cuda" else self.metal_tuning)
        return {
            **self._problem(shape, dtype),
            "device": row["device"],
            "caps": caps,
            "max_sweeps": tuning["max_sweeps"],
        }

    def _problem(self, shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
        *batch, m, n = shape
        return {
            "batch": _registry.planned_number(batch),
            "m": m,
            "n": n,
            "dtype": np.dtype(dtype).name,
            "compute_uv": self.compute_uv,
            "full_matrices": self.full_matrices,
            "method": self.method,
            "variant": self.variant,
        }


# --- public functions ------------------------------------------------------------------------


def svd(
    a: Any,
    full_matrices: bool = True,
    compute_uv: bool = True,
    *,
    method: Method = "auto",
    return_info: bool = False,
    gradient: Gradient = "safe",
) -> Any:
    """Singular value decomposition ``a = U[:, :k] @ diag(S) @ Vh[:k, :]`` of each matrix.

    Args:
      a: ``[..., m, n]``, float16, bfloat16, float32, float64, complex64 or complex128. Integers and
        booleans are promoted as ``jnp.linalg.svd`` does. k = min(m, n) below.
      full_matrices: static. Whether U and Vh are square.
      compute_uv: static. Whether U and Vh are computed at all.
      method: static. ``auto`` (the route measured to be fastest), ``jacobi``, ``block_jacobi``,
        ``lapack`` (cpu platform only) or ``xla`` (plain XLA operations, whatever the device).
      return_info: static. Whether to return an ``SVDInfo`` too.
      gradient: static. ``safe`` or ``strict``; see Differentiability.

    Returns:
      ``SVDResult(U, S, Vh)``: U ``[..., m, m]`` (``[..., m, k]`` if not ``full_matrices``), S
      ``[..., k]`` real, descending and >= 0, Vh ``[..., n, n]`` (``[..., k, n]``). Only S if not
      ``compute_uv``. With ``return_info``, the pair ``(result, SVDInfo(status, sweeps,
      off_norm))``. Signs (phases) of the columns of U are free. U and V are orthonormal for
      rank-deficient input too.

    Raises:
      TypeError: unsupported dtype, or an option that is not a boolean.
      ValueError: rank < 2, or an unknown method or gradient.
      DeviceUnavailableError: the chosen device is absent, cannot serve the array's platform, or has
        no kernel for the matrix.

    Failure:
      A matrix with a non-finite entry (status 3), or one that the second algorithm could not
      finish either (status 2), yields NaN in all its own outputs. Others are not affected. Nothing
      is raised at run time.

    Accuracy:
      LAPACK's test ratios (residual, orthogonality of U and of V) stay below ``ACC_RATIO``. On the
      Jacobi routes every singular value is within ``ACC_SIGMA_ULP`` ulp of the largest one, and for
      ``a = b @ diag(d)`` with well-conditioned b within ``ACC_RELATIVE_SIGMA_ULP * n`` ulp of
      itself. float16 and bfloat16 are computed in float32 and rounded once at the end.

    Differentiability:
      jvp and vjp to any order, full matrices with m != n included (gauge: the complement does not
      turn within itself). ``safe`` replaces 1/(s_j - s_i) by 0 where the gap is at most
      ``GRAD_GAP_EPS`` eps of the largest singular value, and 1/(s_i + s_j), 1/s_i by 0 where they
      are at most max(m, n) eps of it: derivatives are finite for repeated and zero singular values,
      and exact for functions that do not depend on the undetermined bases. ``strict`` is the
      textbook rule, NaN or inf there. The rule does not depend on the scale of ``a``. Derivatives
      of a NaN matrix are NaN in that matrix only.

    Devices:
      host (native code on the cpu platform, with XLA's LAPACK where that is faster), xla
      (everywhere), sim (the GPU kernels on a simulator on the cpu platform: float32, float16,
      bfloat16 and complex64 of any size, float64 and complex128 with m and n up to 32 if
      ``JAXMETAL_SIM_CAPS`` names a GPU that has them, not ``lapack``; no second algorithm, and a
      run in which the simulator finds a fault raises), metal (the same kernels on an Apple GPU,
      which has no 64-bit types; host for everything else), cuda (the same on an NVIDIA GPU, 64-bit
      types included; plain XLA or cuSOLVER by way of XLA for everything else). ``explain`` shows
      the choice.
    """
    spec = _spec("svd", full_matrices, compute_uv, method, gradient)
    a = _operand("svd", a)
    outputs = svd_p.bind(a, spec=spec)
    result = SVDResult(*outputs[:3]) if spec.compute_uv else outputs[0]
    if not _flag("svd", "return_info", return_info):
        return result
    return result, SVDInfo(*outputs[-3:])


def svdvals(
    a: Any, *, method: Method = "auto", return_info: bool = False, gradient: Gradient = "safe"
) -> Any:
    """Singular values of each matrix: ``svd(a, compute_uv=False, ...)``.

    Args:
      a: ``[..., m, n]``, dtypes as ``svd``.
      method: static, as ``svd``.
      return_info: static. Whether to return an ``SVDInfo`` too.
      gradient: static, as ``svd``. The first derivative of singular values needs no reciprocal;
        the choice tells from the second derivative on.

    Returns:
      S ``[..., min(m, n)]`` real, descending and >= 0; with ``return_info`` the pair ``(S,
      SVDInfo)``.

    Raises:
      TypeError, ValueError, DeviceUnavailableError: as ``svd``.

    Failure, accuracy, devices: as ``svd``.
    """
    spec = _spec("svdvals", False, False, method, gradient)
    outputs = svd_p.bind(_operand("svdvals", a), spec=spec)
    if not _flag("svdvals", "return_info", return_info):
        return outputs[0]
    return outputs[0], SVDInfo(*outputs[-3:])


def _flag(function: str, name: str, value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise type_error(function, name, "a static bool", _describe(value), "Under jit, mark it static")


def _describe(value: Any) -> str:
    return f"{value!r} of type {type(value).__name__}"


def _choice(function: str, name: str, value: Any, choices: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise type_error(function, name, f"one of {', '.join(choices)}", _describe(value))
    if value not in choices:
        raise value_error(function, name, f"one of {', '.join(choices)}", repr(value))
    return value


def _spec(function: str, full_matrices: Any, compute_uv: Any, method: Any, gradient: Any) -> Spec:
    method = _choice(function, "method", method, METHODS)
    gradient = _choice(function, "gradient", gradient, GRADIENTS)
    compute_uv = _flag(function, "compute_uv", compute_uv)
    full_matrices = _flag(function, "full_matrices", full_matrices) and compute_uv
    device = _device.requested()
    if method == "lapack" and device not in ("auto", "host"):
        raise value_error(
            function,
            "method",
            f"auto, jacobi, block_jacobi or xla on device {device!r}",
            "'lapack'",
            "LAPACK runs on the cpu platform: use_device('host') or 'auto'",
        )
    _tuning.check_environment()
    return Spec(
        full_matrices=full_matrices,
        compute_uv=compute_uv,
        method=method,
        gradient=gradient,
        device=device,
        variant=_tuning.forced_variant("svd"),
        host_tuning=_tuning.resolve("host", "svd", _native.isa()),
        sim_tuning=_tuning.resolve("sim", "svd"),
        metal_tuning=_tuning.resolve("metal", "svd", _metal.family()),
        cuda_tuning=_tuning.resolve("cuda", "svd"),
        xla_tuning=_tuning.resolve("xla", "svd"),
        sim_options=_device.sim_options() if device == "sim" else (),
    )


def _holds_text(value: Any) -> bool:
    # jnp.asarray takes a text for the name of a dtype on its way to refusing it.
    return any(isinstance(leaf, (str, bytes)) for leaf in jax.tree_util.tree_leaves(value))


def _promoted(function: str, name: str, x: jax.Array) -> jax.Array:
    """The operand in a supported dtype: integers and booleans become floating point."""
    if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == np.bool_:
        x = x.astype(jnp.float64 if x.dtype.itemsize == 8 else jnp.float32)
    if x.dtype.name not in DTYPES:
        raise type_error(function, name, f"dtype {', '.join(DTYPES)}", f"dtype {x.dtype.name}")
    return x


def _operand(function: str, a: Any) -> jax.Array:
    try:
        if _holds_text(a):
            raise TypeError("text is not a number")
        x = jnp.asarray(a)
    except (TypeError, ValueError) as e:
        raise type_error(
            function, "a", "an array [..., m, n] of numbers", type(a).__name__, str(e)
        ) from None
    x = _promoted(function, "a", x)
    if x.ndim < 2:
        raise value_error(
            function,
            "a",
            "shape [..., m, n] (rank >= 2)",
            f"shape {x.shape} (rank {x.ndim})",
            "Use a[None, :] or a[:, None] for one row or column",
        )
    return x


# --- shape and dtype rule --------------------------------------------------------------------


def _compute_dtype(dtype: Any) -> Any:
    return jnp.float32 if dtype.name in ("float16", "bfloat16") else dtype


def _core_shape(function: str, a: Any) -> tuple[int, int]:
    """The sizes m and n of the abstract operand ``[..., m, n]``, once it has been checked."""
    if len(a.shape) < 2 or a.dtype.name not in DTYPES:
        raise type_error(function, "a", "[..., m, n] of a supported dtype", a.str_short())
    if _compat.core_dims_sharded(a, 2):
        raise _compat.sharding_type_error(
            f"{function}: argument a: expected m and n unsharded, got {a.sharding.spec}. "
            "Reshard with jax.sharding.reshard first; batch dimensions may stay sharded"
        )
    m, n = a.shape[-2:]
    if not _compat.is_concrete((m, n)):
        raise value_error(
            function,
            "a",
            "static m and n",
            f"shape {a.shape}",
            "Only batch dimensions may be symbolic in jax.export",
        )
    return m, n


def _abstract_eval(a: Any, *, spec: Spec) -> list[Any]:
    m, n = _core_shape("svd", a)
    k = min(m, n)
    real = np.dtype(finfo(a.dtype).dtype)

    def result(shape: tuple[int, ...], dtype: Any) -> Any:
        return _compat.batched_result(a, 2, shape, np.dtype(dtype))

    s = result((k,), real)
    info = [result((), np.int32), result((), np.int32), result((), np.float32)]
    if not spec.compute_uv:
        return [s, *info]
    ku, kv = (m, n) if spec.full_matrices else (k, k)
    return [result((m, ku), a.dtype), s, result((kv, n), a.dtype), *info]


# --- JVP -------------------------------------------------------------------------------------

_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _adjoint(x: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(x, -1, -2))


def _reciprocal(x: jax.Array, drop: jax.Array) -> jax.Array:
    # Twice `where`: the branch not taken must not divide by zero in the second derivative either.
    return jnp.where(drop, 0, 1 / jnp.where(drop, 1, x))


def rotations(
    p: jax.Array, s: jax.Array, side: int, gradient: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The rotations inside both bases that belong to ``p = U^H dA V``; see the top of this file.

    Args:
      p: ``[..., k, k]``.
      s: ``[..., k]``, the k singular values whose vectors turn.
      side: max(m, n), which sets what counts as a zero singular value.
      gradient: ``safe`` or ``strict``.

    Returns:
      ``U^H dU`` and ``V^H dV`` ``[..., k, k]``; the largest singular value ``[..., 1]`` (1 where it
      is 0) and, in units of it, the reciprocals of ``s`` as ``[..., 1, k]``, 0 where dropped.
    """
    eps = float(finfo(s.dtype).eps)
    # The result does not depend on `top`, so its own derivative is rightly left out; with it, a
    # second derivative would square the scale of the matrix.
    top = lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True, initial=0))
    top = jnp.where(top > 0, top, 1)
    sigma = s / top
    row, col = sigma[..., None, :], sigma[..., :, None]
    gap, total = row - col, row + col
    eye = jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=bool), gap.shape)
    is_complex = jnp.issubdtype(p.dtype, jnp.complexfloating)
    if gradient == "safe":
        drop_gap = eye | (jnp.abs(gap) <= GRAD_GAP_EPS * eps)
        drop_total = total <= side * eps
        drop_sigma = sigma <= side * eps
    else:
        drop_gap = eye
        drop_total = jnp.zeros_like(eye) if is_complex else eye
        drop_sigma = jnp.zeros_like(sigma, dtype=bool)

    q = p / top[..., None]
    q_adjoint = _adjoint(q)
    by_gap = (q + q_adjoint) / 2 * _reciprocal(gap, drop_gap)
    by_total = (q - q_adjoint) / 2 * _reciprocal(total, drop_total)
    turn_u, turn_v = by_gap + by_total, by_gap - by_total
    if is_complex:
        phase = jnp.where(eye, by_total, 0)
        turn_u, turn_v = turn_u + phase, turn_v + phase
    return turn_u, turn_v, top, _reciprocal(sigma, drop_sigma)[..., None, :]


@functools.partial(jax.jit, static_argnums=(4,))
def _tangents_uv(
    da: jax.Array, u: jax.Array, s: jax.Array, vh: jax.Array, gradient: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    (m, n), k = da.shape[-2:], s.shape[-1]
    u1, vh1 = u[..., :, :k], vh[..., :k, :]
    v1 = _adjoint(vh1)
    av = _dot(da, v1)
    p = _dot(_adjoint(u1), av)
    ds = jnp.diagonal(p, axis1=-2, axis2=-1).real
    turn_u, turn_v, top, inverse = rotations(p, s, max(m, n), gradient)
    du, dv = _dot(u1, turn_u), _dot(v1, turn_v)

    if m > n:
        du = _with_complement(du, u1, u[..., :, k:], av, p, top, inverse)
    if n > m:
        au = _dot(_adjoint(da), u1)
        dv = _with_complement(dv, v1, _adjoint(vh[..., k:, :]), au, _adjoint(p), top, inverse)
    return du, ds, _adjoint(dv)


def _with_complement(
    dq: jax.Array,
    q1: jax.Array,
    q2: jax.Array,
    image: jax.Array,
    inside: jax.Array,
    top: jax.Array,
    inverse: jax.Array,
) -> jax.Array:
    """Adds to dq what leaves span(q1), and appends the derivative of q2 if there is a q2."""
    scale = top[..., None]
    if q2.shape[-1] == 0:
        return dq + (image - _dot(q1, inside)) / scale * inverse
    out = _dot(_adjoint(q2), image) / scale * inverse
    return jnp.concatenate([dq + _dot(q2, out), -_dot(q1, _adjoint(out))], axis=-1)


@jax.jit
def _tangents_s(da: jax.Array, u: jax.Array, vh: jax.Array) -> jax.Array:
    return jnp.sum(jnp.conj(u) * _dot(da, _adjoint(vh)), axis=-2).real


def _jvp(primals: Any, tangents: Any, *, spec: Spec) -> tuple[list[Any], list[Any]]:
    (a,), (da,) = primals, tangents
    narrow = _compute_dtype(a.dtype) != a.dtype
    dtype = a.dtype
    if narrow:
        # Rounding U, S, V to 16 bits before the tangents are formed would cost them their accuracy.
        a, da = a.astype(jnp.float32), da.astype(jnp.float32)
    if spec.compute_uv:
        out = svd_p.bind(a, spec=spec)
        u, s, vh = out[:3]
        moved = list(_tangents_uv(da, u, s, vh, spec.gradient))
        values = [u, s, vh]
    else:
        out = svd_p.bind(a, spec=dataclasses.replace(spec, compute_uv=True))
        u, s, vh = out[:3]
        moved, values = [_tangents_s(da, u, vh)], [s]
    if narrow:
        moved, values = ([x.astype(dtype) for x in xs] for xs in (moved, values))
    info = list(out[3:])
    return values + info, [*moved, *(_compat.zero_tangent(x) for x in info)]


# --- plan ------------------------------------------------------------------------------------


def _plan(
    platform: str, shape: Sequence[Any], dtype: Any, params: dict[str, Any], caps: str = ""
) -> Plan:
    spec: Spec = params["spec"]
    if _registry.is_empty(shape):
        return Plan("xla", "empty", launches=0, reason="there is nothing to decompose")
    device = "xla" if spec.method == "xla" else spec.device
    if caps and spec.method != "xla":

        def on_gpu(shape: Sequence[Any]) -> Plan:
            return _registry.kernel_plan("svd", spec.problem_on(caps, shape, dtype))

        cuda = _native.caps_row(caps, "svd: caps")["device"] == "cuda"
        return _triangle_first(spec, shape, dtype, on_gpu) if cuda else on_gpu(shape)
    if platform != "cpu" and (device in ("host", "metal", "sim") or spec.method == "lapack"):
        what = "method 'lapack'" if spec.method == "lapack" else f"device {device!r}"
        raise wrong_platform("svd", what, "cpu", platform)
    if platform == "cuda" and device in ("auto", "cuda"):
        return _triangle_first(spec, shape, dtype, lambda of: _cuda_direct(spec, of, dtype))
    if device == "cuda":
        raise wrong_platform("svd", "device 'cuda'", "cuda", platform)
    if device == "sim":
        return _registry.sim_plan("svd", spec.problem(shape, dtype))
    missing = _native.missing() if device != "xla" and platform == "cpu" else ""
    if device == "xla" or platform != "cpu":
        return _portable_plan(platform, spec, device)
    if missing:
        if spec.method in ("auto", "lapack"):
            return Plan("xla", "lapack", "gesdd", reason=f"XLA's LAPACK, because {missing}")
        return Plan("xla", "portable", _portable.VARIANT, reason=f"plain XLA, because {missing}")
    why_not = ""
    if device == "metal" or (device == "auto" and not _metal.missing()):
        metal, why_not = _metal_plan(spec, shape, dtype)
        if metal is not None:
            return metal
    return _registry.host_plan("svd", spec.problem(shape, dtype), why_not)


def _metal_plan(spec: Spec, shape: Sequence[Any], dtype: Any) -> tuple[Plan | None, str]:
    """The plan on the Apple GPU, or None and why the host takes the call."""
    if spec.method == "lapack":
        return None, ""
    plan, why_not = _registry.metal_plan("svd", spec, shape, dtype)
    if plan is None or spec.device == "metal" or spec.variant:
        return plan, why_not
    tuning, (*dims, m, n) = dict(spec.metal_tuning), shape
    if plan.variant == "grid":  # one matrix fills the GPU
        size = f"min(m, n) = {min(m, n)}"
        if min(m, n) < tuning["auto_min_grid_n"]:
            least = f"auto_min_grid_n = {tuning['auto_min_grid_n']}"
            return None, f"not on the Apple GPU: {size} is below {least}"
        return dataclasses.replace(plan, reason=f"{size}: worth a dispatch; {plan.reason}"), ""
    if plan.variant == "pairs" and min(m, n) > tuning["auto_max_pairs_n"]:
        most = f"auto_max_pairs_n = {tuning['auto_max_pairs_n']}"
        return None, f"not on the Apple GPU: min(m, n) = {min(m, n)} is above {most}"
    batch = _registry.planned_number(dims)
    work = batch * m * n * min(m, n)
    enough = f"auto_min_work = {tuning['auto_min_work']}"
    if batch < tuning["auto_min_matrices"]:
        least = f"auto_min_matrices = {tuning['auto_min_matrices']}"
        return None, f"not on the Apple GPU: {batch} matrices are fewer than {least}"
    if work < tuning["auto_min_work"]:
        return None, f"not on the Apple GPU: batch * m * n * min(m, n) = {work} is below {enough}"
    why = f"{batch} matrices, batch * m * n * min(m, n) = {work}: worth a dispatch"
    return dataclasses.replace(plan, reason=f"{why}; {plan.reason}"), ""


def _triangle_first(
    spec: Spec, shape: Sequence[Any], dtype: Any, direct: Callable[[Sequence[Any]], Plan]
) -> Plan:
    """On CUDA: the triangle of a QR in place of tall and wide matrices, where a kernel serves it.

    ``direct`` is the plan of matrices as they are.
    """
    *batch, m, n = shape
    longest, k = max(m, n), min(m, n)
    tuning = dict(spec.cuda_tuning)
    few = _registry.planned_number(batch) < tuning["tall_batched_from"]
    least = tuning["tall_min_m" if few else "tall_min_m_batched"]
    tall = longest >= max(tuning["tall_aspect"] * k, least)
    asked = spec.variant or spec.method != "auto"
    wide = finfo(dtype).bits == 64  # no kernel of ours has its QR
    if asked or wide or not tall or (spec.compute_uv and spec.full_matrices):
        return direct(shape)
    inner = direct((*batch, k, k))
    grid = inner.variant in ("grid", "quarters", "pairs") and k < tuning["tall_grid_n"]
    if inner.route != "kernel" or (grid and longest < tuning["tall_aspect_grid"] * k):
        return direct(shape)
    why = f"max(m, n) / min(m, n) = {longest / k:.3g} (tall_aspect): qr first; then"
    return dataclasses.replace(inner, route="qr", reason=f"{why} {inner.reason}")


def _cuda_direct(spec: Spec, shape: Sequence[Any], dtype: Any) -> Plan:
    """Our kernels where one serves the matrix, else what XLA has got, by size."""
    missing = _cuda.missing_to_lower()
    reason = missing
    if not missing and spec.method in ("auto", "jacobi"):
        plan = _registry.kernel_plan("svd", spec.problem_on(_cuda.caps(), shape, dtype))
        asked = spec.method != "auto" or spec.variant
        slower = "" if asked else _cuda_slower(spec, shape, dtype, plan.variant)
        if plan.route == "kernel" and not slower:
            return plan
        reason = slower if plan.route == "kernel" else plan.reason
    if spec.method != "auto":
        if spec.device == "cuda":
            raise DeviceUnavailableError(
                reason
                or f"svd: argument method: expected auto or jacobi on device 'cuda', got "
                f"{spec.method!r}. Use device 'auto' or 'xla'"
            )
        return Plan("xla", "portable", _portable.VARIANT, reason=f"plain XLA, because {reason}")
    if missing and spec.device == "cuda":
        raise device_absent("svd", "cuda", missing)
    device = "cuda" if not missing else "xla"
    tuning, (*dims, m, n) = dict(spec.cuda_tuning), shape
    batch = _registry.planned_number(dims)
    why = f"because {reason}"
    if min(m, n) <= tuning["portable_max_n"] and batch >= tuning["portable_min_batch"]:
        # XLA hands cuSOLVER one matrix after the other.
        return Plan(device, "portable", _portable.VARIANT, reason=f"a batch in plain XLA, {why}")
    square = m == n or not spec.full_matrices
    if min(m, n) >= tuning["polar_min_n"] and spec.compute_uv and square:
        text = f"XLA's polar decomposition, checked, with QR iterations in reserve, {why}"
        return Plan(device, "cusolver", "polar", reason=text)
    # Its Jacobi routines, XLA's default, were measured up to 17 in the test ratios.
    return Plan(device, "cusolver", "gesvd", reason=f"cuSOLVER's QR iterations, {why}")


def _cuda_slower(spec: Spec, shape: Sequence[Any], dtype: Any, variant: str) -> str:
    """What of the tuning says that XLA is faster than the kernel, or ``""``."""
    tuning, (*dims, m, n) = dict(spec.cuda_tuning), shape
    batch = _registry.planned_number(dims)
    if variant == "pairs":  # a matrix has but one multiprocessor
        limit, square = tuning["pairs_max_n"], tuning["pairs_square"]
        if min(m, n) > limit:
            return f"min(m, n) is above pairs_max_n = {limit}"
        few = min(m, n) ** 2 > square * batch
        return f"min(m, n)^2 / batch is above pairs_square = {square}" if few else ""
    if finfo(dtype).bits < 64:
        limit = tuning["kernel_max_n"]
        return f"min(m, n) is above kernel_max_n = {limit}" if min(m, n) > limit else ""
    if max(m, n) > tuning["wide_max_n"]:
        return f"max(m, n) is above wide_max_n = {tuning['wide_max_n']}, for {dtype}"
    if batch < tuning["wide_min_batch"]:
        return f"fewer matrices than wide_min_batch = {tuning['wide_min_batch']}, for {dtype}"
    return ""


def _portable_plan(platform: str, spec: Spec, device: str) -> Plan:
    if spec.method == "xla":
        why = "method 'xla' was asked for"
    elif device == "xla":
        why = "device 'xla' was asked for"
    else:
        why = f"platform {platform!r} has no native handler"
    if spec.method == "block_jacobi":
        why += "; there is one portable Jacobi variant, used for 'block_jacobi' too"
    return Plan("xla", "portable", _portable.VARIANT, reason=why)


# --- lowering --------------------------------------------------------------------------------


def _lower(platform: str, ctx: Any, a: Any, *, spec: Spec) -> Any:
    (aval,) = ctx.avals_in
    plan = _plan(platform, aval.shape, aval.dtype, {"spec": spec})
    if plan.route == "empty":
        return _compat.lower_local(ctx, functools.partial(_empty, ctx.avals_out, spec), a)
    if plan.route in ("lapack", "cusolver"):
        run = functools.partial(_library, spec, plan.route, plan.variant, plan.device == "host")
        return _compat.lower_local(ctx, run, a)
    if plan.route == "portable":
        return _compat.lower_local(ctx, functools.partial(_run_portable, spec), a)
    if plan.route == "qr":
        return _compat.lower_local(ctx, functools.partial(_by_qr, spec), a)
    return _registry.custom_call(TARGET, plan, spec, ctx, (a,), aval.shape, aval.dtype)


def _run_portable(spec: Spec, a: jax.Array) -> list[jax.Array]:
    return _portable.svd(
        a,
        full_matrices=spec.full_matrices,
        compute_uv=spec.compute_uv,
        **{key: int(value) for key, value in spec.xla_tuning},
    )


def _empty(avals_out: Sequence[Any], spec: Spec, a: jax.Array) -> list[jax.Array]:
    """U and Vh are identities (all zero columns of an empty product), everything else is empty."""
    del a

    def fill(i: int, aval: Any) -> jax.Array:
        if spec.compute_uv and i in (0, 2):
            rows, columns = aval.shape[-2:]
            eye = jnp.eye(rows, columns, dtype=aval.dtype)
            return jnp.broadcast_to(eye, aval.shape)
        return jnp.zeros(aval.shape, aval.dtype)

    return [fill(i, aval) for i, aval in enumerate(avals_out)]


def _by_qr(spec: Spec, a: jax.Array) -> list[jax.Array]:
    """A = Q R and R = U S Vh, of the adjoint where A is wide."""
    from jaxmetal_linalg.primitives import qr as _qr  # it imports this module

    dtype = a.dtype
    x = a.astype(_compute_dtype(dtype))  # Q and R are not rounded to 16 bits
    wide = x.shape[-2] < x.shape[-1]
    mode = "reduced" if spec.compute_uv else "r"
    qr_spec = dataclasses.replace(_qr._spec("qr", mode, "auto"), device=spec.device)
    *q, r = _qr.qr_p.bind(_adjoint(x) if wide else x, spec=qr_spec)
    *values, status, sweeps, off_norm = svd_p.bind(r, spec=spec)
    if spec.compute_uv:
        u, s, vh = values
        u = _dot(q[0], u)
        values = [_adjoint(vh), s, _adjoint(u)] if wide else [u, s, vh]
    if x.dtype != dtype:
        values = [v.astype(dtype) for v in values]
    return [*values, status, sweeps, off_norm]


def _svd_of_xla(spec: Spec, algorithm: str, x: jax.Array) -> list[jax.Array]:
    """XLA's own decomposition: ``(u, s, vh)`` or ``(s,)``."""
    out = lax.linalg.svd(
        x,
        full_matrices=spec.full_matrices,
        compute_uv=spec.compute_uv,
        algorithm=lax.linalg.SvdAlgorithm[algorithm],
    )
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _checked_polar(spec: Spec, x: jax.Array) -> list[jax.Array]:
    """XLA's polar decomposition where it passes the tests that we promise, else QR iterations.

    It is up to four times as fast, and on an H200 it returned matrices far from orthonormal for one
    batch in ten.
    """
    polar = _svd_of_xla(spec, "POLAR", x)
    u, s, vh = polar
    eps = finfo(x.dtype).eps * ACC_RATIO * max(x.shape[-2:])

    def norm(y: jax.Array) -> jax.Array:
        return jnp.abs(y).sum(-2).max(-1)

    def strays(gram: jax.Array) -> jax.Array:
        return norm(gram - jnp.eye(gram.shape[-1], dtype=gram.dtype))

    error = norm(x - _dot(u * s[..., None, :].astype(u.dtype), vh))
    good = (
        (error < eps * norm(x))
        & (strays(_dot(_adjoint(u), u)) < eps)
        & (strays(_dot(vh, _adjoint(vh))) < eps)
    )

    def again(old: list[jax.Array]) -> list[jax.Array]:
        new = _svd_of_xla(spec, "QR", x)
        return [_where(good, a, b) for a, b in zip(old, new, strict=True)]

    return list(lax.cond(jnp.all(good), lambda old: old, again, polar))


def _where(mask: jax.Array, new: jax.Array | float, old: jax.Array) -> jax.Array:
    return jnp.where(mask.reshape(mask.shape + (1,) * (old.ndim - mask.ndim)), new, old)


def _library(spec: Spec, route: str, variant: str, retry: bool, a: jax.Array) -> list[jax.Array]:
    """LAPACK or cuSOLVER by way of XLA, with our NaN and status rules.

    With ``retry``, Jacobi for what LAPACK gives up.
    """
    dtype = a.dtype
    x = a.astype(_compute_dtype(dtype))
    # XLA's threads flush denormals, LAPACK's intermediate ones too: keep away from them.
    scaled, exponent, finite = _portable.scale(x, 0)
    # An infinity can keep LAPACK busy for ever.
    scaled = jnp.where(finite[..., None, None], scaled, 0)
    if route == "cusolver" and variant == "polar":
        values = _checked_polar(spec, scaled)
    else:
        values = _svd_of_xla(spec, "QR" if route == "cusolver" else "DEFAULT", scaled)
    at = 1 if spec.compute_uv else 0
    s = values[at]
    values[at] = _portable.unscale(s, exponent)
    failed = finite & jnp.any(jnp.isnan(s), axis=-1)

    values = [_where(~finite, jnp.nan, v) for v in values]
    status = jnp.where(finite, jnp.where(failed, NOT_CONVERGED, CONVERGED), NON_FINITE)
    state = [
        *values,
        status.astype(jnp.int32),
        jnp.zeros(status.shape, jnp.int32),
        jnp.zeros(status.shape, jnp.float32),
    ]
    if retry:

        def again(old: list[jax.Array]) -> list[jax.Array]:
            new = svd_p.bind(x, spec=dataclasses.replace(spec, method="jacobi", variant=""))
            code = jnp.where(new[-3] == CONVERGED, SECOND_ALGORITHM, new[-3])
            new = [*new[:-3], code, *new[-2:]]
            return [_where(failed, a, b) for a, b in zip(new, old, strict=True)]

        state = lax.cond(jnp.any(failed), again, lambda old: old, state)
    if x.dtype != dtype:
        state[:-3] = [v.astype(dtype) for v in state[:-3]]
    return state


svd_p = _registry.linalg_primitive(
    "svd",
    abstract_eval=_abstract_eval,
    jvp=_jvp,
    plan=_plan,
    lower=_lower,
    native_platforms=("cpu", "cuda"),
)
