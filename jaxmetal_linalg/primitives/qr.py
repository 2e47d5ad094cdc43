"""QR decomposition of every matrix in a batch.

The derivative. With A = Q R, A1 the first k = min(m, n) columns, R1 the triangle they give, and
L = Q^H dA1 R1^-1, the part of L below the diagonal can only come from Q, so

    W = Q^H dQ = tril(L, -1) - tril(L, -1)^H + i Im diag(L)
    dR = triu(Q^H dA - W R)
    dQ = Q W + (I - Q Q^H) dA1 R1^-1        (the last term where Q is not square)

In mode "complete" Q is square: L has m rows, and what is left open of W, the turn of the complement
within itself, is zero. Columns are divided by the largest entry of R's column first, so the rule
has no scale of its own. A column of A that depends on those before it, R_jj at most max(m, n) eps
of that entry, determines no direction: its column of dA1 R1^-1 is set to zero, so that derivatives
are finite, and right wherever the column does not matter.
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
    _native,
    _portable,
    _registry,
    _tuning,
)
from jaxmetal_linalg._errors import (
    DeviceUnavailableError,
    device_absent,
    value_error,
    wrong_platform,
)
from jaxmetal_linalg._portable import finfo
from jaxmetal_linalg._registry import Plan
from jaxmetal_linalg.primitives import svd as _svd

TARGET = "jml_qr_v1"

Mode: TypeAlias = Literal["reduced", "complete", "r"]
Method: TypeAlias = Literal["auto", "householder", "tsqr", "cholesky", "lapack", "xla"]
MODES: tuple[str, ...] = get_args(Mode)
METHODS: tuple[str, ...] = get_args(Method)

# Platforms for which XLA itself brings a QR; others get reflectors in plain operations.
XLA_QR_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

# The variant of the route of the same name: two Cholesky factorisations.
CHOLESKY = "cholesky2"


class QRResult(NamedTuple):
    """``a = Q @ R``, R upper triangular with a real diagonal >= 0."""

    Q: jax.Array
    R: jax.Array


# So that jax.export can serialise functions that return it.
export.register_namedtuple_serialization(QRResult, serialized_name="jaxmetal_linalg.QRResult")


@dataclasses.dataclass(frozen=True)
class Spec:
    """All options of a call, resolved once; the primitive's only parameter."""

    mode: str
    method: str
    device: str
    variant: str
    host_tuning: tuple[tuple[str, float], ...]
    cuda_tuning: tuple[tuple[str, float], ...]
    sim_options: tuple[tuple[str, bool | int | str], ...]

    def problem(self, shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
        """What the native library plans from, here and again in the custom call's attribute."""
        if self.device == "sim":
            return {**self._problem(shape, dtype), "device": "sim", **dict(self.sim_options)}
        return {**self._problem(shape, dtype), "device": "host", **dict(self.host_tuning)}

    def problem_on(self, caps: str, shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
        """The same on the GPU called ``caps``."""
        row = _native.caps_row(caps, "qr: caps")
        return {**self._problem(shape, dtype), "device": row["device"], "caps": caps}

    def _problem(self, shape: Sequence[Any], dtype: Any) -> dict[str, Any]:
        *batch, m, n = shape
        return {
            "batch": _registry.planned_number(batch),
            "m": m,
            "n": n,
            "dtype": np.dtype(dtype).name,
            "mode": self.mode,
            "method": self.method,
            "variant": self.variant,
        }


# --- public functions ------------------------------------------------------------------------


def qr(a: Any, mode: Mode = "reduced", *, method: Method = "auto") -> Any:
    """QR decomposition ``a = Q @ R`` of each matrix, with R's diagonal real and >= 0.

    Args:
      a: ``[..., m, n]``, float16, bfloat16, float32, float64, complex64 or complex128. Integers and
        booleans are promoted as ``jnp.linalg.qr`` does. k = min(m, n) below.
      mode: static. ``reduced``, ``complete`` or ``r``.
      method: static. ``auto`` (the route measured to be fastest), ``householder`` and ``tsqr`` (our
        own rows; ``tsqr`` needs m >= n and not mode ``complete`` unless m = n), ``cholesky``
        (two Cholesky factorisations of Gram matrices, or a QR by reflectors where one of the
        matrices has columns too dependent for that; for the same shapes as ``tsqr``, in XLA on
        every device), ``lapack`` (XLA's LAPACK, cpu platform only) or ``xla`` (reflectors in plain
        XLA operations, whatever the device).

    Returns:
      ``QRResult(Q, R)``. ``reduced``: Q ``[..., m, k]``, R ``[..., k, n]``. ``complete``: Q
      ``[..., m, m]``, R ``[..., m, n]``. ``r``: only R ``[..., k, n]``. Q^H Q = I, for
      rank-deficient input too; R is zero below the diagonal. Where ``a`` has full column rank, the
      reduced factors are unique.

    Raises:
      TypeError: unsupported dtype, or a mode or method that is not a string.
      ValueError: rank < 2, an unknown mode or method, or a method that cannot serve the shape.
      DeviceUnavailableError: the chosen device is absent, cannot serve the array's platform, or has
        no kernel for the matrix.

    Failure:
      A matrix with a non-finite entry yields NaN in all its own outputs. Others are not affected.

    Accuracy:
      ``|A - Q R| / (|A| max(m, n) ulp)`` and ``|I - Q^H Q| / (m ulp)``, LAPACK's test ratios, stay
      below ``ACC_RATIO``. On our own rows the residual of every column is small against that
      column. float16 and bfloat16 are computed in float32 and rounded once at the end. The results
      do not depend on the number of threads, nor those of a kernel on the batch.

    Differentiability:
      jvp and vjp to any order, in all modes and shapes. m < n: the rule of the leading square
      block. ``complete``: the complement of the range does not turn within itself. A column that
      depends on those before it (R_jj at most max(m, n) eps of the largest entry of R's column j)
      is taken to determine no direction: derivatives are finite there. Derivatives of a NaN matrix
      are NaN in that matrix only.

    Devices:
      host (native code on the cpu platform, with XLA's LAPACK where that is faster), cuda
      (``cholesky`` for tall matrices, the GPU kernels where they should win, else XLA's own QR),
      sim (the kernels, simulated), xla (everywhere: XLA's own QR where the platform has one, else
      plain operations). The kernels take float16, bfloat16, float32 and complex64 of any size.
      Device metal runs them on request, host takes the rest; ``auto`` leaves qr to host there.
      ``explain`` shows the choice.

    Source: Householder (1958), in blocks by Schreiber, Van Loan (1989); tall matrices by TSQR,
    Demmel, Grigori, Hoemmen, Langou (2012), or by CholeskyQR2 with a shift, Fukaya, Kannan,
    Nakatsukasa, Yamamoto, Yanagisawa (2020).
    """
    spec = _spec("qr", mode, method)
    outputs = qr_p.bind(_svd._operand("qr", a), spec=spec)
    return QRResult(*outputs) if spec.mode != "r" else outputs[0]


def _spec(function: str, mode: Any, method: Any) -> Spec:
    mode = _svd._choice(function, "mode", mode, MODES)
    method = _svd._choice(function, "method", method, METHODS)
    device = _device.requested()
    allowed = {"lapack": ("auto", "host"), "tsqr": ("auto", "host", "metal", "cuda", "sim")}
    if device not in allowed.get(method, (device,)):
        raise value_error(
            function,
            "method",
            f"auto, householder or xla on device {device!r}",
            repr(method),
            "use_device('host') or 'auto' serve it",
        )
    _tuning.check_environment()
    return Spec(
        mode=mode,
        method=method,
        device=device,
        variant=_tuning.forced_variant("qr"),
        host_tuning=_tuning.resolve("host", "qr", _native.isa()),
        cuda_tuning=_tuning.resolve("cuda", "qr"),
        sim_options=_device.sim_options() if device == "sim" else (),
    )


# --- shape and dtype rule --------------------------------------------------------------------


def _abstract_eval(a: Any, *, spec: Spec) -> list[Any]:
    m, n = _svd._core_shape("qr", a)
    kq = m if spec.mode == "complete" else min(m, n)
    shapes = ((kq, n),) if spec.mode == "r" else ((m, kq), (kq, n))
    return [_compat.batched_result(a, 2, shape, a.dtype) for shape in shapes]


# --- JVP -------------------------------------------------------------------------------------


@jax.jit
def _tangents(da: jax.Array, q: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
    m, n = da.shape[-2:]
    k, kq = min(m, n), q.shape[-1]
    if k == 0:
        return jnp.zeros_like(q), jnp.zeros_like(r)
    dot, adjoint = _svd._dot, _svd._adjoint
    r1, da1 = r[..., :k, :k], da[..., :, :k]
    # What follows does not depend on the scale, so its derivative is rightly left out.
    top = lax.stop_gradient(jnp.max(jnp.abs(r1), axis=-2, keepdims=True))
    top = jnp.where(top > 0, top, 1).astype(r1.real.dtype)
    triangle = r1 / top
    diagonal = jnp.diagonal(triangle, axis1=-2, axis2=-1).real
    drop = (diagonal <= max(m, n) * float(finfo(r.dtype).eps))[..., None, :]
    eye = jnp.broadcast_to(jnp.eye(k, dtype=r.dtype), triangle.shape)
    image = lax.linalg.triangular_solve(
        jnp.where(drop, eye, triangle), jnp.where(drop, 0, da1 / top)
    )
    inside = dot(adjoint(q), image)
    low = jnp.tril(inside, -1)
    turn = jnp.pad(low, [(0, 0)] * (low.ndim - 1) + [(0, kq - k)])
    turn = turn - adjoint(turn)
    if jnp.iscomplexobj(inside):
        phase = 1j * jnp.diagonal(inside, axis1=-2, axis2=-1).imag
        phase = jnp.pad(phase, [(0, 0)] * (phase.ndim - 1) + [(0, kq - k)])
        own = jnp.broadcast_to(jnp.eye(kq, dtype=bool), turn.shape)
        turn = turn + jnp.where(own, phase[..., None, :], 0)
    dq = dot(q, turn)
    if kq < m:
        dq = dq + image - dot(q, inside)
    dr = jnp.triu(dot(adjoint(q), da) - dot(turn, r))
    if jnp.iscomplexobj(dr):
        on_diagonal = jnp.broadcast_to(jnp.eye(kq, n, dtype=bool), dr.shape)
        dr = jnp.where(on_diagonal, dr.real.astype(dr.dtype), dr)
    return dq, dr


def _jvp(primals: Any, tangents: Any, *, spec: Spec) -> tuple[list[Any], list[Any]]:
    (a,), (da,) = primals, tangents
    dtype = a.dtype
    # Rounding Q and R to 16 bits before the tangents are formed would cost them their accuracy.
    wide = _svd._compute_dtype(dtype)
    a, da = a.astype(wide), da.astype(wide)
    mode = "reduced" if spec.mode == "r" else spec.mode
    q, r = qr_p.bind(a, spec=dataclasses.replace(spec, mode=mode))
    dq, dr = _tangents(da, q, r)
    values, moved = ([r], [dr]) if spec.mode == "r" else ([q, r], [dq, dr])
    return [x.astype(dtype) for x in values], [x.astype(dtype) for x in moved]


# --- plan ------------------------------------------------------------------------------------


def _plan(
    platform: str, shape: Sequence[Any], dtype: Any, params: dict[str, Any], caps: str = ""
) -> Plan:
    spec: Spec = params["spec"]
    if _registry.is_empty(shape):
        return Plan("xla", "empty", launches=0, reason="there is nothing to decompose")
    if spec.method == "xla":
        return Plan("xla", "portable", "householder", reason="method 'xla' was asked for")
    if spec.method == "cholesky" and not caps:
        *_, m, n = shape
        if m < n or (spec.mode == "complete" and m != n):
            raise value_error(
                "qr",
                "method",
                f"one that serves mode {spec.mode} at {m}x{n}",
                "cholesky, which needs m >= n and gives reduced factors",
            )
        return Plan("xla", "cholesky", CHOLESKY, reason="method 'cholesky' was asked for")
    if caps:
        return _registry.kernel_plan("qr", spec.problem_on(caps, shape, dtype))
    if platform == "cuda" and spec.device in ("auto", "cuda") and spec.method != "lapack":
        return _cuda_plan(spec, shape, dtype)
    native_only = spec.method in ("tsqr", "lapack")
    if platform != "cpu" and (spec.device in ("host", "sim", "metal") or native_only):
        what = f"method {spec.method!r}" if native_only else f"device {spec.device!r}"
        raise wrong_platform("qr", what, "cpu", platform)
    if spec.device == "cuda":
        raise wrong_platform("qr", "device 'cuda'", "cuda", platform)
    if spec.device == "sim":
        return _registry.sim_plan("qr", spec.problem(shape, dtype))
    if spec.device == "xla" or platform != "cpu":
        given = f"device {spec.device!r} was asked for"
        why = given if spec.device == "xla" else f"platform {platform!r} has no native handler"
        if platform in XLA_QR_PLATFORMS and spec.method == "auto":
            return Plan("xla", "lapack", "geqrf", reason=f"XLA's own QR, because {why}")
        return Plan("xla", "portable", "householder", reason=f"plain XLA, because {why}")
    missing = _native.missing()
    if missing:
        if spec.method == "householder":
            return Plan("xla", "portable", "householder", reason=f"plain XLA, because {missing}")
        return Plan("xla", "lapack", "geqrf", reason=f"XLA's LAPACK, because {missing}")
    why_not = ""
    if spec.device == "metal":
        on_gpu, why_not = _registry.metal_plan("qr", spec, shape, dtype)
        if on_gpu is not None:
            return on_gpu
    return _registry.host_plan("qr", spec.problem(shape, dtype), why_not)


def _cuda_plan(spec: Spec, shape: Sequence[Any], dtype: Any) -> Plan:
    """Products and Cholesky factorisations for tall matrices, else what reflectors take."""
    plan = _cuda_reflectors(spec, shape, dtype)
    *_, m, n = shape
    tuning = dict(spec.cuda_tuning)
    # A panel of reflectors would leave most of a GPU idle, which products do not.
    tall = m >= tuning["cholesky_aspect"] * n and m * n * n >= tuning["cholesky_min_work"]
    asked = spec.variant or spec.method != "auto"
    if asked or spec.mode == "complete" or not tall or n > tuning["cholesky_max_n"]:
        return plan
    rest = _tsqr_spec(spec, shape, dtype)
    why = (
        "tall matrices (cholesky_aspect, cholesky_min_work, cholesky_max_n): products with them, "
        f"measured faster than reflectors. {'kernel/tsqr' if rest else 'lapack/geqrf'} where "
        "columns are too dependent"
    )
    return Plan(plan.device, "cholesky", CHOLESKY, reason=why)


def _tsqr_spec(spec: Spec, shape: Sequence[Any], dtype: Any) -> Spec | None:
    """What asks for our kernels instead of cuSOLVER's QR, where they serve the matrix.

    cuSOLVER's loses orthogonality: on an H200 |I - Q^T Q| was 1.3 for 30000x32 ones.
    """
    if spec.device not in ("auto", "cuda") or _cuda.missing_to_lower():
        return None
    tsqr = dataclasses.replace(spec, method="tsqr", variant="")
    plan = _registry.kernel_plan("qr", tsqr.problem_on(_cuda.caps(), shape, dtype))
    return tsqr if plan.route == "kernel" else None


def _cuda_reflectors(spec: Spec, shape: Sequence[Any], dtype: Any) -> Plan:
    """Our kernels where one serves the matrix and was measured to win, else XLA's own QR."""
    missing = _cuda.missing_to_lower()
    if missing and (spec.device == "cuda" or spec.method == "tsqr"):
        raise device_absent("qr", "cuda", missing)
    why = missing
    if not missing:
        plan = _registry.kernel_plan("qr", spec.problem_on(_cuda.caps(), shape, dtype))
        tuning, (*dims, m, n) = dict(spec.cuda_tuning), shape
        few = _registry.planned_number(dims) < tuning["batched_from"]
        key = "kernel_max_n" if few else "kernel_max_n_batched"
        asked = spec.variant or spec.method != "auto"
        above = ""
        if not asked and min(m, n) > tuning[key]:
            above = f"min(m, n) is above {key} = {tuning[key]}"
        elif not asked and few and max(m, n) > tuning["kernel_max_m"]:
            above = f"max(m, n) is above kernel_max_m = {tuning['kernel_max_m']}"
        if plan.route == "kernel" and not above:
            return plan
        why = above or plan.reason
        if spec.method == "tsqr":
            raise DeviceUnavailableError(why)
    device = "xla" if missing else "cuda"
    if spec.method == "householder":
        return Plan(device, "portable", "householder", reason=f"plain XLA, because {why}")
    return Plan(device, "lapack", "geqrf", reason=f"XLA's own QR, because {why}")


# --- lowering --------------------------------------------------------------------------------


def _lower(platform: str, ctx: Any, a: Any, *, spec: Spec) -> Any:
    (aval,) = ctx.avals_in
    plan = _plan(platform, aval.shape, aval.dtype, {"spec": spec})
    if plan.route == "empty":
        return _compat.lower_local(ctx, functools.partial(_empty, ctx.avals_out, spec), a)
    if plan.route == "lapack":
        return _compat.lower_local(ctx, functools.partial(_lapack, spec), a)
    if plan.route == "portable":
        return _compat.lower_local(ctx, functools.partial(_reflectors, spec), a)
    if plan.route == "cholesky":
        run = functools.partial(_cholesky, spec, _dependent(platform, spec, aval))
        return _compat.lower_local(ctx, run, a)
    return _registry.custom_call(TARGET, plan, spec, ctx, (a,), aval.shape, aval.dtype)


def _empty(avals_out: Sequence[Any], spec: Spec, a: jax.Array) -> list[jax.Array]:
    """Q is the identity (or has no columns), R has no entries or is zero."""
    del a
    *q, r = avals_out
    eyes = [jnp.eye(v.shape[-2], v.shape[-1], dtype=v.dtype) for v in q]
    return [
        *(jnp.broadcast_to(e, v.shape) for e, v in zip(eyes, q, strict=True)),
        jnp.zeros(r.shape, r.dtype),
    ]


def _reflectors(spec: Spec, a: jax.Array) -> list[jax.Array]:
    """Reflectors in plain XLA operations."""
    return _portable.qr(a, complete=spec.mode == "complete", want_q=spec.mode != "r")


def gram_factor(gram: jax.Array, shift: float) -> tuple[jax.Array, jax.Array]:
    """r, upper triangular with a positive diagonal, and its inverse: gram = r^H r.

    Args:
      gram: ``[..., n, n]``, Hermitian. Rows and columns are brought to a diagonal of ones first.
      shift: then added to the diagonal. NaN where the sum is not positive definite.
    """
    norm = jnp.sqrt(jnp.diagonal(gram, axis1=-2, axis2=-1).real)
    norm = jnp.where(norm > 0, norm, 1)
    row, column = norm[..., None, :], norm[..., :, None]
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    lower = lax.linalg.cholesky(gram / row / column + shift * eye, symmetrize_input=False)
    inverse = lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
    return _svd._adjoint(lower) * row, _svd._adjoint(inverse) / column


def _dependent(platform: str, spec: Spec, aval: Any) -> Callable[[jax.Array], Any]:
    """What serves matrices whose columns are too dependent for Cholesky factorisations."""
    if platform not in XLA_QR_PLATFORMS:
        return functools.partial(_reflectors, spec)
    if platform == "cuda" and (tsqr := _tsqr_spec(spec, aval.shape, aval.dtype)) is not None:
        return functools.partial(qr_p.bind, spec=tsqr)
    return functools.partial(_lapack, spec)


def _cholesky(spec: Spec, dependent: Callable[[jax.Array], Any], a: jax.Array) -> list[jax.Array]:
    """CholeskyQR2 where the first step leaves columns that are nearly orthonormal."""
    x = a.astype(_svd._compute_dtype(a.dtype))
    n = x.shape[-1]
    dot, adjoint = _svd._dot, _svd._adjoint
    # A shift of a few ulp: without it rounding may leave the Gram matrix indefinite.
    r, inverse = gram_factor(dot(adjoint(x), x), 4 * n * float(finfo(x.dtype).eps))
    y = dot(x, inverse)
    gram = dot(adjoint(y), y)
    # Then the second step leaves rounding only. NaN, and a norm whose square over- or underflows,
    # fail the test.
    off = jnp.sum(jnp.abs(gram - jnp.eye(n, dtype=gram.dtype)), axis=-1)
    nearly = jnp.all(off < 0.5)

    def second(_: jax.Array) -> list[jax.Array]:
        correction, inverse = gram_factor(gram, 0)
        triangle = [jnp.triu(dot(correction, r)).astype(a.dtype)]
        return triangle if spec.mode == "r" else [dot(y, inverse).astype(a.dtype), *triangle]

    return list(lax.cond(nearly, second, lambda a: list(dependent(a)), a))


def _lapack(spec: Spec, a: jax.Array) -> list[jax.Array]:
    """XLA's own QR with our signs and NaN rule; scaled where it would leave the normal numbers."""
    dtype = a.dtype
    x = a.astype(_svd._compute_dtype(dtype))
    info = finfo(x.dtype)

    def factor(x: jax.Array) -> Any:
        return lax.linalg.qr(x, full_matrices=spec.mode == "complete")

    def signed(factors: Any) -> list[jax.Array]:
        q, r = _portable.positive_diagonal(*factors)
        return [r] if spec.mode == "r" else [q, r]

    def scaled(_: Any) -> list[jax.Array]:
        y, exponent, finite = _portable.scale(x, 0)
        at = finite[..., None, None]
        *q, r = signed(factor(jnp.where(at, y, 0)))
        return [jnp.where(at, z, jnp.nan) for z in (*q, _portable.unscale_signed(r, exponent))]

    # Each norm of a column is in R, so R tells of all that is not finite, tiny or huge. Sums by a
    # product with ones: XLA's CPU code for a maximum took a tenth of LAPACK's time at 128x128.
    first = factor(x)
    entries = jnp.abs(first[1])
    ones = jnp.ones((*entries.shape[:-2], 1, entries.shape[-2]), entries.dtype)
    size = jnp.max(jnp.matmul(ones, entries), axis=(-2, -1))
    low, high = float(info.tiny) / float(info.eps) ** 1.5, float(info.max) * float(info.eps)
    normal = jnp.all((size > low) & (size < high))
    # The signs within the branch: what a branch hands through is copied.
    out = lax.cond(normal, signed, scaled, first)
    return [y.astype(dtype) for y in out]


qr_p = _registry.linalg_primitive(
    "qr",
    abstract_eval=_abstract_eval,
    jvp=_jvp,
    plan=_plan,
    lower=_lower,
    native_platforms=("cpu", "cuda"),
)
