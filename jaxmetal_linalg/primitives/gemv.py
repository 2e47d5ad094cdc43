"""Matrix times vector, with everything that usually follows it, in one pass over the matrix.

    z = alpha op(a) x + beta y + bias,    out = activation(z) + residual

The primitive takes `nrhs` vectors a matrix, so that mapping over x alone reads the matrix once; a
batch of matrices is a batch of calls in one. The derivative. z is bilinear in a and x, and linear
in y, bias and residual:

    dz = alpha (op(da) x + op(a) dx) + beta dy + dbias,    dout = activation'(z) dz + dresidual

and each product in it is this primitive again, bare. Transposed in x it is the primitive with the
other orientation of the same stored matrix (a conjugated one stays conjugated); in a it is an outer
product.
"""

from __future__ import annotations

import cmath
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad, batching

from jaxmetal_linalg import _compat, _cuda, _device, _metal, _native, _registry, _tuning
from jaxmetal_linalg._errors import device_absent, type_error, value_error, wrong_platform
from jaxmetal_linalg._registry import Plan
from jaxmetal_linalg.primitives import svd as _svd

TARGET = "jml_gemv_v1"

Trans: TypeAlias = Literal["N", "T", "C"]
Activation: TypeAlias = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"]
TRANS: tuple[str, ...] = get_args(Trans)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """All options of a call, resolved once; the primitive's only parameter."""

    transpose: bool
    conjugate: bool
    alpha: complex
    beta: complex
    y: bool
    bias: bool
    residual: bool
    activation: str
    out: str  # dtype of the result
    device: str
    variant: str
    host_tuning: tuple[tuple[str, float], ...]
    metal_tuning: tuple[tuple[str, float], ...]
    cuda_tuning: tuple[tuple[str, float], ...]
    sim_options: tuple[tuple[str, bool | int | str], ...]

    def bare(self, out: Any) -> Spec:
        """The product alpha op(a) x alone, in another dtype."""
        return dataclasses.replace(
            self, y=False, bias=False, residual=False, activation="none", out=np.dtype(out).name
        )

    def problem(self, avals: Sequence[Any]) -> dict[str, Any]:
        """What the native library plans from, here and again in the custom call's attribute."""
        if self.device == "sim":
            return {**self._problem(avals), "device": "sim", **dict(self.sim_options)}
        return {**self._problem(avals), **dict(self.host_tuning)}

    def problem_on(self, caps: str, avals: Sequence[Any]) -> dict[str, Any]:
        """The same on the GPU called ``caps``."""
        row = _native.caps_row(caps, "gemv: caps")
        return {**self._problem(avals), "device": row["device"], "caps": caps}

    def _problem(self, avals: Sequence[Any]) -> dict[str, Any]:
        a, x = avals[:2]
        *batch, m, n = a.shape
        nrhs = x.shape[-2]
        return {
            "batch": _registry.planned_number(batch),
            "m": m,
            "n": n,
            "nrhs": _registry.planned_number((nrhs,)),
            "transpose": self.transpose,
            "conjugate": self.conjugate,
            "a_dtype": np.dtype(a.dtype).name,
            "x_dtype": np.dtype(x.dtype).name,
            "out_dtype": self.out,
            "alpha_re": self.alpha.real,
            "alpha_im": self.alpha.imag,
            "beta_re": self.beta.real,
            "beta_im": self.beta.imag,
            "y": self.y,
            "bias": self.bias,
            "residual": self.residual,
            "activation": self.activation,
            "variant": self.variant,
        }


# --- public functions ------------------------------------------------------------------------


def gemv(
    a: Any,
    x: Any,
    y: Any = None,
    *,
    alpha: Any = 1,
    beta: Any = 0,
    trans: Trans = "N",
    bias: Any = None,
    activation: Activation | None = None,
    residual: Any = None,
) -> jax.Array:
    """Matrix times vector: ``activation(alpha * op(a) @ x + beta * y + bias) + residual``.

    Args:
      a: ``[..., m, n]``, float16, bfloat16, float32, float64, complex64 or complex128. Integers and
        booleans are promoted as ``jnp.linalg`` does.
      x: ``[..., n]``, or ``[..., m]`` where ``trans`` is T or C; dtypes as ``a``. The two need not
        agree: the result has the dtype that jnp promotes to, and no converted copy of ``a`` is
        made. Leading dimensions broadcast. Those that ``a`` has not (or has of size 1), as under
        ``vmap`` over x alone, become further vectors on the same read of the matrix.
      y: ``[..., m]`` (``[..., n]``), or None. Not read where ``beta`` is the number 0, so that it
        may hold anything then.
      alpha, beta: Python or NumPy scalars, which take no part in dtype promotion, or traced scalars
        (JAX arrays of rank 0), which do.
      trans: static. N: op(a) = a. T: its transpose. C: its conjugate transpose. No copy is made.
      bias: like ``y``; None: nothing is added.
      activation: static; None, relu, gelu, gelu_tanh, silu, tanh or sigmoid, as in ``jax.nn``. Real
        dtypes only.
      residual: like ``y``; None: nothing is added.

    Returns:
      ``[..., m]`` (``[..., n]`` where ``trans`` is T or C) of the promoted dtype.

    Raises:
      TypeError: unsupported dtype, a scalar that is not one, an activation of complex numbers.
      ValueError: ranks or shapes that do not fit, an unknown option, ``beta`` without ``y``.
      DeviceUnavailableError: the chosen device is absent, cannot serve the array's platform, or has
        no kernel for the call.

    Failure:
      None: NaN and infinities propagate as in the formula.

    Accuracy:
      Sums are accumulated in float32, in float64 where an operand is float64 or complex128. Before
      activation and residual, with k terms a sum, eps of the result's dtype and eps32 of the
      accumulator's,
      ``|error| <= (ACC_GEMV_OUT_EPS * eps + ACC_GEMV_SUM_EPS * k * eps32) * scale`` elementwise,
      ``scale = |alpha| |op(a)| |x| + |beta y| + |bias|``. On device host the same matrix, vector
      and options give the same bits, whatever the batch, the vectors beside it (up to where
      ``explain`` names XLA's matmul) and the number of threads.

    Differentiability:
      jvp and vjp to any order in every array and in traced scalars; ``jax.linear_transpose`` in
      each argument that the result is linear in.

    Devices:
      host (native code on the cpu platform), metal, sim and cuda (kernels: float32, float16,
      bfloat16, complex64; cuBLAS by way of XLA for the rest of cuda), xla (everywhere). ``explain``
      shows the choice.
    """
    if trans not in TRANS:
        raise value_error("gemv", "trans", f"one of {', '.join(TRANS)}", repr(trans))
    if activation is not None and activation not in ACTIVATIONS:
        expected = f"None or one of {', '.join(ACTIVATIONS)}"
        raise value_error("gemv", "activation", expected, repr(activation))
    a = _operand("a", a, 2, "[..., m, n]")
    outs, depth = a.shape[-2:] if trans == "N" else a.shape[:-3:-1]
    letters = ("m", "n") if trans == "N" else ("n", "m")
    x = _operand("x", x, 1, f"[..., {letters[1]}]")
    if x.shape[-1] != depth:
        raise value_error(
            "gemv",
            "x",
            f"[..., {letters[1]}] with {letters[1]} = {depth} for a of shape {a.shape} and "
            f"trans={trans!r}",
            f"shape {x.shape}",
            "Several vectors a matrix are a leading dimension of x, not a trailing one",
        )
    alpha, traced_alpha = _scalar("alpha", alpha)
    beta, traced_beta = _scalar("beta", beta)
    if not traced_beta and beta == 0:
        beta, y = 0, None
    elif y is None:
        raise value_error("gemv", "y", f"an array [..., {letters[0]}] where beta is given", "None")
    more = {
        name: _operand(name, value, 1, f"[..., {letters[0]}]")
        for name, value in (("y", y), ("bias", bias), ("residual", residual))
        if value is not None
    }
    for name, value in more.items():
        if value.shape[-1] != outs:
            expected = f"[..., {letters[0]}] with {letters[0]} = {outs}"
            raise value_error("gemv", name, expected, f"shape {value.shape}")

    traced = [s for s, is_traced in ((alpha, traced_alpha), (beta, traced_beta)) if is_traced]
    out = jnp.result_type(a, x, *more.values(), *(s.dtype for s in traced))
    if any(isinstance(s, complex) for s in (alpha, beta)):
        out = jnp.promote_types(out, jnp.complex64)
    is_complex = jnp.issubdtype(out, jnp.complexfloating)
    if is_complex and activation is not None:
        raise type_error("gemv", "activation", "None for complex numbers", repr(activation))
    wide = _compute_dtype(a, x, out)
    if traced_alpha:
        # Not in x's dtype: a product may leave the range of float16.
        x = x.astype(_compute_dtype(x, alpha)) * alpha.astype(_compute_dtype(x, alpha))
        alpha = 1
    if traced_beta:
        more["y"] = more["y"].astype(wide) * beta.astype(wide)
        beta = 1
    if is_complex and not any(jnp.issubdtype(v.dtype, jnp.complexfloating) for v in (a, x)):
        x = x.astype(out)
    more = {name: value.astype(out) for name, value in more.items()}

    device = _device.requested()
    _tuning.check_environment()
    spec = Spec(
        transpose=trans != "N",
        conjugate=trans == "C",
        alpha=complex(alpha),
        beta=complex(beta) if "y" in more else 0j,
        y="y" in more,
        bias="bias" in more,
        residual="residual" in more,
        activation=activation or "none",
        out=np.dtype(out).name,
        device=device,
        variant=_tuning.forced_variant("gemv"),
        host_tuning=_tuning.resolve("host", "gemv", _native.isa()),
        metal_tuning=_tuning.resolve("metal", "gemv", _metal.family()),
        cuda_tuning=_tuning.resolve("cuda", "gemv"),
        sim_options=_device.sim_options() if device == "sim" else (),
    )
    return _bind_folded(spec, a, x, list(more.values()))


def _bind_folded(spec: Spec, a: jax.Array, x: jax.Array, more: list[jax.Array]) -> jax.Array:
    """Binds the primitive; leading dimensions that ``a`` lacks become vectors a matrix."""
    try:
        batch = jnp.broadcast_shapes(a.shape[:-2], x.shape[:-1], *(v.shape[:-1] for v in more))
    except ValueError:
        rest = ", ".join(str(v.shape) for v in (x, *more))
        raise value_error(
            "gemv", "x", f"leading dimensions that broadcast with those of a {a.shape}", rest
        ) from None
    nb = len(batch)
    given = (1,) * (nb - a.ndim + 2) + a.shape[:-2]
    shared = [i for i in range(nb) if _is_one(given[i]) and not _is_one(batch[i])]
    kept = [i for i in range(nb) if i not in shared]
    lead = tuple(batch[i] for i in kept)
    nrhs = math.prod(batch[i] for i in shared)

    def vectors(v: jax.Array) -> jax.Array:
        v = jnp.broadcast_to(v, (*batch, v.shape[-1]))
        v = jnp.transpose(v, (*kept, *shared, nb))
        return v.reshape(*lead, nrhs, v.shape[-1])

    a = a.reshape(*lead, *a.shape[-2:])
    (out,) = gemv_p.bind(*_compat.same_variance(a, vectors(x), *map(vectors, more)), spec=spec)
    out = out.reshape(*lead, *(batch[i] for i in shared), out.shape[-1])
    return jnp.transpose(out, (*np.argsort([*kept, *shared]).tolist(), nb))


def _is_one(size: Any) -> bool:
    return _compat.is_concrete((size,)) and size == 1


def _operand(name: str, value: Any, rank: int, shape: str) -> jax.Array:
    try:
        if value is None or _svd._holds_text(value):
            raise TypeError("it is not a number")
        v = jnp.asarray(value)
    except (TypeError, ValueError) as e:
        raise type_error(
            "gemv", name, f"an array {shape} of numbers", type(value).__name__, str(e)
        ) from None
    v = _svd._promoted("gemv", name, v)
    if v.ndim < rank:
        raise value_error(
            "gemv", name, f"shape {shape} (rank >= {rank})", f"shape {v.shape} (rank {v.ndim})"
        )
    return v


def _scalar(name: str, value: Any) -> tuple[Any, bool]:
    """The number and whether it is traced."""
    if isinstance(value, (bool, int, float, complex, np.number)) and not isinstance(value, bool):
        number = value.item() if isinstance(value, np.number) else value
        if cmath.isfinite(number):
            return number, False
        value = jnp.asarray(number)
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.number):
        raise type_error("gemv", name, "a number or a scalar array", type(value).__name__)
    if jnp.ndim(value) != 0:
        raise value_error(
            "gemv", name, "a scalar", f"shape {jnp.shape(value)}", "Use jax.vmap for one a vector"
        )
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.integer):
        value = value.astype(jnp.float32)
    return value, True


def _compute_dtype(*values: Any) -> Any:
    """What the kernels accumulate in: float32 or float64, or pairs of them."""
    names = [np.dtype(getattr(v, "dtype", v)).name for v in values]
    double = any(n in ("float64", "complex128") for n in names)
    if any(n.startswith("complex") for n in names):
        return jnp.complex128 if double else jnp.complex64
    return jnp.float64 if double else jnp.float32


# --- shape and dtype rule --------------------------------------------------------------------


def _abstract_eval(a: Any, x: Any, *more: Any, spec: Spec) -> list[Any]:
    for name, aval in (("a", a), ("x", x)):
        if _compat.core_dims_sharded(aval, 2):
            raise _compat.sharding_type_error(
                f"gemv: argument {name}: expected only dimensions that a and x share to be "
                f"sharded, got {aval.sharding.spec}. Reshard with jax.sharding.reshard first"
            )
    if not _compat.is_concrete(a.shape[-2:]):
        raise value_error(
            "gemv",
            "a",
            "static m and n",
            f"shape {a.shape}",
            "Only leading dimensions may be symbolic in jax.export",
        )
    outs, depth = a.shape[:-3:-1] if spec.transpose else a.shape[-2:]
    nrhs = x.shape[-2]
    want = (*a.shape[:-2], nrhs, outs)
    flags = (spec.y, spec.bias, spec.residual)
    if (
        x.shape != (*a.shape[:-2], nrhs, depth)
        or len(more) != sum(flags)
        or any(v.shape != want or v.dtype.name != spec.out for v in more)
    ):
        shapes = ", ".join(v.str_short() for v in (a, x, *more))
        raise type_error("gemv", "a", "operands that fit together", shapes)
    return [_compat.batched_result(a, 2, (nrhs, outs), np.dtype(spec.out))]


# --- batching --------------------------------------------------------------------------------


def _batch(args: Any, dims: Any, *, spec: Spec) -> tuple[list[Any], tuple[int, ...]]:
    size = next(v.shape[d] for v, d in zip(args, dims, strict=True) if d is not None)
    if dims[0] is not None:
        moved = [batching.bdim_at_front(v, d, size) for v, d in zip(args, dims, strict=True)]
        return gemv_p.bind(*moved, spec=spec), (0,)
    # The matrix is the same for all: more vectors for each.
    a, *rest = args
    at = a.ndim - 2

    def vectors(v: jax.Array, d: int | None) -> jax.Array:
        v = batching.bdim_at_front(v, d, size)
        v = jnp.moveaxis(v, 0, at)
        return v.reshape(*v.shape[:at], size * v.shape[at + 1], v.shape[-1])

    (out,) = gemv_p.bind(
        a, *(vectors(v, d) for v, d in zip(rest, dims[1:], strict=True)), spec=spec
    )
    nrhs = rest[0].shape[-2] if dims[1] is None else np.delete(rest[0].shape, dims[1])[-2]
    return [out.reshape(*out.shape[:at], size, nrhs, out.shape[-1])], (at,)


# --- JVP -------------------------------------------------------------------------------------


def _scaled(number: complex, v: jax.Array) -> jax.Array:
    if number == 1:
        return v
    return v * (number if jnp.issubdtype(v.dtype, jnp.complexfloating) else number.real)


def _as(v: jax.Array, dtype: Any) -> jax.Array:
    """``v`` in a dtype, as the transpose of a conversion from it would: complex drops to real."""
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        v = jnp.real(v)
    return v.astype(dtype)


def _jvp(primals: Any, tangents: Any, *, spec: Spec) -> tuple[list[Any], list[Any]]:
    a, x, *more = primals
    da, dx, *dmore = tangents
    out_dtype = np.dtype(spec.out)
    flags = [name for name in ("y", "bias", "residual") if getattr(spec, name)]
    moved = dict(zip(flags, dmore, strict=True))
    linear = spec.activation == "none"
    dtype = out_dtype if linear else np.dtype(_compute_dtype(a, x, out_dtype))

    terms = []
    if not isinstance(da, ad.Zero):
        terms += gemv_p.bind(da, x, spec=spec.bare(dtype))
    if not isinstance(dx, ad.Zero):
        terms += gemv_p.bind(a, dx, spec=spec.bare(dtype))
    for name, factor in (("y", spec.beta), ("bias", 1)):
        if name in moved and not isinstance(moved[name], ad.Zero):
            terms.append(_scaled(factor, moved[name].astype(dtype)))
    shift = moved.get("residual", ad.Zero)
    shift = None if shift is ad.Zero or isinstance(shift, ad.Zero) else shift

    if linear:
        (out,) = gemv_p.bind(a, x, *more, spec=spec)
        if shift is not None:
            terms.append(shift)
        if not terms:
            return [out], [_compat.zero_tangent(out)]
        return [out], [functools.reduce(jnp.add, terms)]

    # Through the activation in the accumulator's dtype: z rounded to 16 bits would cost accuracy.
    inner = [v.astype(dtype) for v, name in zip(more, flags, strict=True) if name != "residual"]
    z_spec = dataclasses.replace(spec.bare(dtype), y=spec.y, bias=spec.bias)
    (z,) = gemv_p.bind(a, x, *inner, spec=z_spec)
    dz = functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(z)
    out, dout = jax.jvp(ACTIVATIONS[spec.activation], (z,), (dz,))
    if spec.residual:
        out = out + more[-1].astype(dtype)
    if shift is not None:
        dout = dout + shift.astype(dtype)
    return [out.astype(out_dtype)], [dout.astype(out_dtype)]


def _transpose(cotangents: Any, a: Any, x: Any, *more: Any, spec: Spec) -> list[Any]:
    (ct,) = cotangents
    operands = (a, x, *more)
    if isinstance(ct, ad.Zero):
        return [ad.Zero(v.aval) if ad.is_undefined_primal(v) else None for v in operands]
    flags = [name for name in ("y", "bias", "residual") if getattr(spec, name)]
    out: list[Any] = [None] * len(operands)
    if ad.is_undefined_primal(a):
        out[0] = _transpose_matrix(ct, a.aval, x, spec)
    elif ad.is_undefined_primal(x):
        # The same stored matrix, read the other way; conjugated still if it was.
        dtype = jnp.result_type(a, ct) if jnp.iscomplexobj(ct) else x.aval.dtype
        back = dataclasses.replace(spec.bare(dtype), transpose=not spec.transpose)
        out[1] = _as(gemv_p.bind(a, ct, spec=back)[0], x.aval.dtype)
    for i, name in enumerate(flags):
        if ad.is_undefined_primal(more[i]):
            out[2 + i] = _scaled(spec.beta, ct) if name == "y" else ct
    return out


def _transpose_matrix(ct: jax.Array, aval: Any, x: jax.Array, spec: Spec) -> jax.Array:
    """Sum of alpha ct x^T over the vectors of each matrix; conjugated if the matrix was."""
    dtype = _compute_dtype(ct, x)
    rows, columns = (x, ct) if spec.transpose else (ct, x)
    rows, columns = rows.astype(dtype), columns.astype(dtype)
    if _is_one(ct.shape[-2]):
        product = jnp.swapaxes(rows, -1, -2) * columns
    else:
        nb = ct.ndim - 2
        lead = tuple(range(nb))
        numbers = (((nb,), (nb,)), (lead, lead))
        product = lax.dot_general(rows, columns, numbers, precision=lax.Precision.HIGHEST)
    product = _scaled(spec.alpha, product)
    return _as(jnp.conj(product) if spec.conjugate else product, aval.dtype)


# --- plan ------------------------------------------------------------------------------------


def _plan(
    platform: str, shape: Sequence[Any], dtype: Any, params: dict[str, Any], caps: str = ""
) -> Plan:
    del dtype
    spec: Spec = params["spec"]
    avals = params["operands"]
    if _registry.is_empty((*shape, avals[1].shape[-2])):
        return Plan("xla", "empty", launches=0, reason="there is nothing to multiply")
    if caps:
        return _registry.kernel_plan("gemv", spec.problem_on(caps, avals))
    device = spec.device
    if platform != "cpu" and device in ("host", "metal", "sim"):
        raise wrong_platform("gemv", f"device {device!r}", "cpu", platform)
    if platform == "cuda" and device in ("auto", "cuda"):
        return _cuda_plan(spec, avals)
    if device == "cuda":
        raise wrong_platform("gemv", "device 'cuda'", "cuda", platform)
    if device == "sim":
        return _registry.sim_plan("gemv", spec.problem(avals))
    if device == "xla":
        return Plan("xla", "portable", reason="device 'xla' was asked for")
    if platform != "cpu":
        why = f"platform {platform!r} has no native handler"
        return Plan("xla", "portable", reason=why)
    if _native.missing():
        return Plan("xla", "portable", reason=f"plain XLA, because {_native.missing()}")
    why_not = ""
    if device == "metal" or (device == "auto" and not _metal.missing()):
        on_gpu, why_not = _metal_plan(spec, avals)
        if on_gpu is not None:
            return on_gpu
    plan = _registry.host_plan("gemv", spec.problem(avals), why_not)
    if plan.route == "matmul":
        return Plan("xla", "portable", reason=plan.reason)
    return plan


def _metal_plan(spec: Spec, avals: Sequence[Any]) -> tuple[Plan | None, str]:
    """The plan on the Apple GPU, or None and why the host takes the call."""
    plan, why_not = _registry.metal_plan("gemv", spec, avals)
    if plan is None or spec.device == "metal" or spec.variant:
        return plan, why_not
    tuning, problem = dict(spec.metal_tuning), spec.problem_on(_metal.caps(), avals)
    size = problem["batch"] * problem["m"] * problem["n"] * np.dtype(avals[0].dtype).itemsize
    nrhs, most = problem["nrhs"], tuning["auto_max_nrhs"]
    if nrhs > most:
        return None, f"not on the Apple GPU: {nrhs} vectors exceed auto_max_nrhs = {most}"
    if size < tuning["auto_min_bytes"]:
        least = f"auto_min_bytes = {tuning['auto_min_bytes']}"
        return None, f"not on the Apple GPU: {size} bytes of matrices are below {least}"
    why = f"{size} bytes of matrices: worth a dispatch"
    return dataclasses.replace(plan, reason=f"{why}; {plan.reason}"), ""


def _cuda_plan(spec: Spec, avals: Sequence[Any]) -> Plan:
    """Our kernels up to as many vectors as they were measured to win with, else XLA's cuBLAS."""
    missing = _cuda.missing_to_lower()
    if missing and spec.device == "cuda":
        raise device_absent("gemv", "cuda", missing)
    if missing:
        return Plan("xla", "portable", reason=f"plain XLA, because {missing}")
    plan = _registry.kernel_plan("gemv", spec.problem_on(_cuda.caps(), avals))
    half = np.dtype(avals[0].dtype).itemsize == 2
    key = "max_nrhs_transposed" if spec.transpose else "max_nrhs_half" if half else "max_nrhs"
    limit, nrhs = dict(spec.cuda_tuning)[key], avals[1].shape[-2]
    above = not spec.variant and (not _compat.is_concrete((nrhs,)) or nrhs > limit)
    if plan.route == "kernel" and not above:
        return plan
    why = f"more vectors than {key} = {limit}" if above else plan.reason
    return Plan("cuda", "portable", reason=f"XLA's cuBLAS, because {why}")


# --- lowering --------------------------------------------------------------------------------


def _lower(platform: str, ctx: Any, *operands: Any, spec: Spec) -> Any:
    aval = ctx.avals_in[0]
    params = {"spec": spec, "operands": tuple(ctx.avals_in)}
    plan = _plan(platform, aval.shape, aval.dtype, params)
    if plan.route in ("portable", "empty"):
        return _compat.lower_local(ctx, functools.partial(_portable, spec), *operands)
    return _registry.custom_call(TARGET, plan, spec, ctx, operands, ctx.avals_in)


def _portable(spec: Spec, a: jax.Array, x: jax.Array, *more: jax.Array) -> list[jax.Array]:
    """The same in plain XLA operations."""
    out = np.dtype(spec.out)
    dtype = _compute_dtype(a, x, out)
    narrow = jnp.promote_types(a.dtype, x.dtype)
    a = jnp.conj(a) if spec.conjugate else a
    nb = a.ndim - 2
    lead = tuple(range(nb))
    numbers = (((nb + 1,), (nb if spec.transpose else nb + 1,)), (lead, lead))
    z = lax.dot_general(
        x.astype(narrow),
        a.astype(narrow),
        numbers,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    z = _scaled(spec.alpha, z)
    rest = iter(more)
    if spec.y:
        z = z + _scaled(spec.beta, next(rest).astype(dtype))
    if spec.bias:
        z = z + next(rest).astype(dtype)
    if spec.activation != "none":
        z = ACTIVATIONS[spec.activation](z)
    if spec.residual:
        z = z + next(rest).astype(dtype)
    return [z.astype(out)]


gemv_p = _registry.linalg_primitive(
    "gemv",
    abstract_eval=_abstract_eval,
    jvp=_jvp,
    plan=_plan,
    lower=_lower,
    batch=_batch,
    transpose=_transpose,
    native_platforms=("cpu", "cuda"),
)
