"""Every import of private JAX or jaxlib code, and every difference between supported versions.

Supported: jax 0.10 to 0.12. Nothing outside this file imports ``jax._src`` or ``jaxlib``.
"""

from __future__ import annotations

import contextlib
import functools
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax._src import config as _config
from jax._src import core as _core
from jax._src import dispatch as _dispatch
from jax._src import lib as _lib
from jax._src.interpreters import mlir as _mlir
from jax.interpreters import ad
from jax.sharding import PartitionSpec

_xla_client: Any = _lib.xla_client  # type: ignore[attr-defined]
_xla: Any = getattr(_xla_client, "_xla", None)


# --- thread-local state that is part of jit's cache key --------------------------------------


def cache_key_state(name: str, help_text: str) -> Any:
    """A thread-local JAX configuration state, default ``None``, that retraces ``jit``.

    Returns an object with ``.value`` and, called with a value, a context manager that sets it.
    """
    return _config.State(
        name, None, help_text, include_in_jit_key=True, include_in_trace_context=True
    )


# --- primitives ------------------------------------------------------------------------------

Primitive = _core.Primitive
LoweringRuleContext = _mlir.LoweringRuleContext
lower_fun = _mlir.lower_fun
register_lowering = _mlir.register_lowering


def apply_primitive(prim: Any) -> Callable[..., Any]:
    """The implementation rule that compiles and runs one primitive, cached on its parameters."""
    return functools.partial(_dispatch.apply_primitive, prim)


def zero_tangent(x: Any) -> Any:
    """The symbolic zero tangent of ``x``: float0 for an integer."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def jaxprs_in(value: Any) -> Iterator[Any]:
    """The jaxprs held by one parameter of an equation."""
    if isinstance(value, _core.Jaxpr):
        yield value
    elif isinstance(getattr(value, "jaxpr", None), _core.Jaxpr):  # closed, before jax 0.12
        yield value.jaxpr
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from jaxprs_in(item)


def is_concrete(shape: Sequence[Any]) -> bool:
    """Whether no dimension of a shape is symbolic (``jax.export`` shape polymorphism)."""
    return bool(_core.is_constant_shape(tuple(shape)))


def batched_result(aval: Any, core_ndim: int, core_shape: Sequence[Any], dtype: Any) -> Any:
    """The abstract value of a result ``[batch..., *core_shape]`` of an operand ``aval``.

    The batch dimensions keep the operand's sharding, and the result varies over the same manual
    mesh axes (``shard_map``) as the operand.
    """
    nb = len(aval.shape) - core_ndim
    shape = (*aval.shape[:nb], *core_shape)
    changes: dict[str, Any] = {}
    layout = getattr(_core, "AutoLayout", None)
    if layout is not None and hasattr(aval, "layout"):
        changes["layout"] = layout
    sharding = aval.sharding
    if sharding is None or sharding.mesh.empty:
        return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=None, **changes)
    spec = PartitionSpec(*tuple(sharding.spec)[:nb], *(None,) * len(core_shape))
    return aval.update(
        shape=shape, dtype=dtype, weak_type=False, sharding=sharding.update(spec=spec), **changes
    )


def same_variance(*operands: Any) -> Sequence[Any]:
    """The operands, varying over the same manual mesh axes (``shard_map``) all of them."""
    # The later name is jax 0.12's.
    insert: Any = (
        getattr(_core, "standard_insert_pvary", None) or vars(_core)["auto_insert_reshard"]
    )
    return tuple(insert(*operands))


def core_dims_sharded(aval: Any, core_ndim: int) -> bool:
    """Whether explicit sharding (sharding in types) splits one of the last dimensions."""
    sharding = aval.sharding
    if sharding is None or sharding.mesh.empty:
        return False
    return any(s is not None for s in tuple(sharding.spec)[len(aval.shape) - core_ndim :])


def sharding_type_error(text: str) -> Exception:
    """JAX's own error class for shardings in types that an operation cannot take."""
    return _core.ShardingTypeError(text)


# --- lowering --------------------------------------------------------------------------------


@contextlib.contextmanager
def _local_semantics() -> Iterator[None]:
    # Inside a lowering the values are plain arrays: no varying-axes types to keep in step.
    with _config._check_vma(False):
        yield


def lower_local(ctx: Any, fun: Callable[..., Any], *operands: Any) -> Any:
    """Lowers ``fun``, plain JAX code, in place of the primitive that ``ctx`` describes.

    ``fun`` is traced on avals without shardings or varying axes, and independent of the caller's
    ``jax_numpy_*`` strictness and precision settings, so that it may be written as ordinary code.
    """
    avals = [_core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
    with (
        _local_semantics(),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        return lower_fun(fun, multiple_results=True)(ctx.replace(avals_in=avals), *operands)


def _aval_types(ctx: Any, avals: Sequence[Any]) -> list[Any]:
    # jax 0.10 converts an aval alone; from 0.12 the module context comes first.
    convert: Any = _mlir.aval_to_ir_types
    try:
        types = [convert(a) for a in avals]
    except TypeError:
        types = [convert(ctx.module_context, a) for a in avals]
    flat: list[Any] = []
    for t in types:
        flat.extend(t) if isinstance(t, (list, tuple)) else flat.append(t)
    return flat


def _sdy_rule(ctx: Any, num_batch_dims: int, avals_in: Any, avals_out: Any) -> Any:
    from jax._src.custom_partitioning_sharding_rule import (
        sdy_sharding_rule_to_mlir,
        str_to_sdy_sharding_rule,
    )

    letters = iter(string.ascii_letters)

    def term(aval: Any) -> str:
        own = " ".join(next(letters) for _ in range(len(aval.shape) - num_batch_dims))
        return ("... " if num_batch_dims else "") + own

    text = ", ".join(map(term, avals_in)) + " -> " + ", ".join(map(term, avals_out))
    return sdy_sharding_rule_to_mlir(
        str_to_sdy_sharding_rule(text), _aval_types(ctx, avals_in), _aval_types(ctx, avals_out)
    )


def ffi_lowering(ctx: Any, target: str, *operands: Any, core_ndim: int, **attributes: Any) -> Any:
    """Emits one typed-FFI custom call with row-major buffers, partitionable over the batch.

    Every operand and result is ``[batch..., core dims]``; ``core_ndim`` is the operand's number of
    core dimensions. A symbolic batch (``jax.export``) is passed on, but then not partitioned.
    """
    avals = (*ctx.avals_in, *ctx.avals_out)
    nb = len(ctx.avals_in[0].shape) - core_ndim
    extra: dict[str, Any] | None = None
    if all(is_concrete(a.shape) for a in avals):
        extra = {"mhlo.frontend_attributes": _mlir.ir_attribute({"num_batch_dims": str(nb)})}
        if _config.use_shardy_partitioner.value:
            extra["sdy.sharding_rule"] = _sdy_rule(ctx, nb, ctx.avals_in, ctx.avals_out)
    rule = jax.ffi.ffi_lowering(target, extra_attributes=extra)
    return rule(ctx, *operands, **attributes)


# --- registration of native handlers ---------------------------------------------------------


def register_cpu_target(
    name: str, handlers: dict[str, Any], state_name: str | None, state: dict[str, Any] | None
) -> None:
    """Registers an FFI target of the cpu platform, its state type first.

    jaxlib's Python queue replays handlers before types when the cpu backend starts, and a handler
    whose state type is unknown stops that backend from starting. So before the backend exists the
    queue is passed by, and both go straight to the runtime in the right order.
    """
    platform = _xla_client.xla_platform_names.get("cpu", "cpu")
    queued = platform not in getattr(_xla_client, "_custom_callback_handler", {})
    if queued and _xla is not None and hasattr(_xla, "register_custom_type"):
        if state_name is not None:
            _xla.register_custom_type(state_name, state)
        traits = _xla_client.CustomCallTargetTraits.DEFAULT
        _xla.register_custom_call_target(name, handlers, platform, 1, traits)
    else:
        if queued:
            jax.devices("cpu")
        if state_name is not None:
            jax.ffi.register_ffi_type(state_name, state, platform="cpu")  # type: ignore[arg-type]
        jax.ffi.register_ffi_target(name, handlers, platform="cpu", api_version=1)
    jax.ffi.register_ffi_target_as_batch_partitionable(name)


def register_stateless_target(name: str, platform: str, handlers: dict[str, Any]) -> None:
    """Registers an FFI target without a state, which waits for its platform's plugin if need be.

    Its handlers only launch, so that XLA may capture them into a command buffer.
    """
    traits = _xla_client.CustomCallTargetTraits.COMMAND_BUFFER_COMPATIBLE
    jax.ffi.register_ffi_target(name, handlers, platform=platform, api_version=1, traits=traits)


def plugin_takes_ffi(platform: str) -> bool:
    """Whether the plugin of a platform has said how to register FFI handlers and state types."""
    name = _xla_client.xla_platform_names.get(platform, platform)
    tables = ("_custom_callback_handler", "_custom_type_id_handler")
    return all(name in getattr(_xla_client, table, {}) for table in tables)


def register_plugin_target(
    platform: str,
    name: str,
    handlers: dict[str, Any],
    state_name: str | None,
    state: dict[str, Any] | None,
) -> None:
    """Registers an FFI target, its state type first, with a plugin that takes them."""
    if state_name is not None:
        jax.ffi.register_ffi_type(state_name, state, platform=platform)  # type: ignore[arg-type]
    jax.ffi.register_ffi_target(name, handlers, platform=platform, api_version=1)


def lowering_platforms(ctx: Any) -> tuple[str, ...]:
    """The platforms that a lowering rule is asked for, under the names that lowerings go by."""
    return tuple(ctx.platforms or ctx.module_context.platforms)


def has_platform(name: str) -> bool:
    """Whether JAX has a backend of this platform; starts the backends."""
    try:
        return bool(jax.devices(name))
    except RuntimeError:
        return False


def default_device(platform: str) -> Any:
    """A context manager: new arrays and jitted calls go to the platform's first device."""
    return jax.default_device(jax.local_devices(backend=platform)[0])


def default_platform() -> str:
    """The platform that a jitted call is lowered for now, under the name that lowerings go by."""
    chosen: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(chosen, str):
        chosen = jax.devices(chosen)[0]
    device = chosen if chosen is not None else jax.local_devices()[0]
    return str(getattr(device.client, "_raw_platform", device.platform))


def declare_stable_target(name: str) -> bool:
    """Adds a target to those that ``jax.export`` accepts without a disabled check."""
    try:
        from jax._src.export import _export

        _export._CUSTOM_CALL_TARGETS_GUARANTEED_STABLE.add(name)
    except (ImportError, AttributeError):
        return False
    return True
