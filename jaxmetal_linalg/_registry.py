"""The contract of a primitive, and the one call that registers everything it consists of."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jax.interpreters import ad, batching

from jaxmetal_linalg import _compat, _device, _metal, _native
from jaxmetal_linalg._errors import DeviceUnavailableError


@dataclass(frozen=True)
class Plan:
    """How one call of a primitive is carried out; what ``explain`` prints.

    Attributes:
      device: host, metal, cuda, sim or xla.
      route: the code that does the work, e.g. host, kernel, lapack, portable, empty; none where
        ``caps`` were asked about and no kernel serves the call.
      variant: the row of the op's variant table, or ``""``.
      grid, group: launch sizes of a GPU kernel, ``()`` where nothing is launched.
      threadgroup_bytes: threadgroup memory of a launch.
      launches: how many kernels (or custom calls) run.
      reason: one sentence that says why this route.
    """

    device: str
    route: str
    variant: str = ""
    grid: tuple[int, ...] = ()
    group: tuple[int, ...] = ()
    threadgroup_bytes: int = 0
    launches: int = 1
    reason: str = ""


def is_empty(sizes: Sequence[Any]) -> bool:
    """Whether one of the sizes is known to be 0."""
    return any(_compat.is_concrete((d,)) and d == 0 for d in sizes)


def planned_number(sizes: Sequence[Any]) -> int:
    """How many matrices or vectors a plan is made for: symbolic ones are several, not one."""
    return math.prod(sizes) if _compat.is_concrete(sizes) else 2


def host_plan(op: str, problem: dict[str, Any], why_not: str = "") -> Plan:
    """The native plan on the host; ``why_not`` (no other device took the call) joins its reason."""
    answer = _native.plan(op, problem)
    return Plan(
        "host",
        str(answer["route"]),
        str(answer["variant"]),
        launches=int(answer["launches"]),
        reason="; ".join(filter(None, (str(answer["reason"]), why_not))),
    )


def kernel_plan(op: str, problem: dict[str, Any]) -> Plan:
    """The native plan on a device that runs kernels; route ``none`` where none serves the call."""
    answer = _native.plan(op, problem)
    return Plan(
        str(answer["device"]),
        str(answer["route"]),
        str(answer["variant"]),
        grid=tuple(answer.get("grid", ())),
        group=tuple(answer.get("group", ())),
        threadgroup_bytes=int(answer.get("threadgroup_bytes", 0)),
        launches=int(answer["launches"]),
        reason=str(answer["reason"]),
    )


def sim_plan(op: str, problem: dict[str, Any]) -> Plan:
    """The plan in the simulator, which never leaves a call to another device."""
    plan = kernel_plan(op, problem)
    if plan.route == "none":
        raise DeviceUnavailableError(f"{plan.reason}, not 'sim'")
    return dataclasses.replace(plan, device="sim")


def metal_plan(op: str, spec: Any, *about: Any) -> tuple[Plan | None, str]:
    """The plan on the Apple GPU, or None and why the host takes the call.

    ``spec.problem_on(caps, *about)`` is what the native library plans from.
    """
    plan = kernel_plan(op, spec.problem_on(_metal.caps(), *about))
    if plan.route != "none":
        return plan, ""
    if spec.device == "metal" and spec.variant:
        raise DeviceUnavailableError(f"{plan.reason}, not 'metal'")
    return None, f"not on the Apple GPU: {plan.reason.removeprefix(f'{op}: ')}"


def custom_call(
    target: str, plan: Plan, spec: Any, ctx: Any, operands: Sequence[Any], *about: Any
) -> Any:
    """Lowers to our custom call, whose attribute is the problem that the plan was made for."""
    caps = _device.gpu_caps(plan.device)
    problem = spec.problem_on(caps, *about) if caps else spec.problem(*about)
    config = json.dumps(problem, sort_keys=True)
    return _compat.ffi_lowering(ctx, target, *operands, core_ndim=2, config=config)


@dataclass(frozen=True)
class Op:
    """A registered primitive: its name, the JAX primitive, and its pure planning function.

    ``plan(platform, shape, dtype, params, caps)`` decides device, route and variant. Lowering and
    ``explain`` both call it, so they cannot disagree. ``caps``, where it is not ``""``, names a GPU
    to plan for, present or not. Shape and dtype are the first operand's; ``params["operands"]`` are
    the abstract values of all.
    """

    name: str
    primitive: Any
    plan: Callable[[str, Sequence[Any], Any, dict[str, Any], str], Plan]
    # (avals, **params) -> the jaxpr of what a call with the route "composite" consists of.
    parts: Callable[..., Any] | None = None


OPS: dict[Any, Op] = {}

# Functions composed of primitives, by the name of their jitted form: what ``explain`` calls them.
COMPOSITES: dict[str, str] = {}


def composite(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Names ``function``, so that once jitted ``explain`` finds it as the op ``name``.

    Its first three results are ``u [..., m, k]``, ``s [..., k]`` and ``v [..., n, k]``.
    """
    function.__name__ = function.__qualname__ = f"jml_{name}"
    COMPOSITES[function.__name__] = name
    return function


def linalg_primitive(
    name: str,
    *,
    abstract_eval: Callable[..., Any],
    jvp: Callable[..., Any],
    plan: Callable[[str, Sequence[Any], Any, dict[str, Any], str], Plan],
    lower: Callable[..., Any],
    native_platforms: Sequence[str] = ("cpu",),
    batch: Callable[..., Any] | None = None,
    transpose: Callable[..., Any] | None = None,
    parts: Callable[..., Any] | None = None,
) -> Any:
    """Makes the primitive ``jml_<name>`` of operands with the same leading batch dimensions.

    Args:
      name: the operation's name.
      abstract_eval: ``(aval, **params) -> avals`` of all results.
      jvp: ``(primals, tangents, **params) -> (results, tangents)``.
      plan: see ``Op``.
      lower: ``(platform, ctx, *operands, **params) -> results``; ``platform`` is ``"other"`` on
        every platform that is not in ``native_platforms``, plugins nobody has heard of included.
      native_platforms: platforms whose lowering may use a native handler.
      batch: ``(operands, dims, **params) -> results, dims``, where mapping all operands over a new
        leading dimension would waste work.
      transpose: ``(cotangents, *operands, **params) -> cotangents``, of a primitive that is linear
        in some of its operands.
      parts: see ``Op``.
    """
    prim = _compat.Primitive(f"jml_{name}")
    prim.multiple_results = True
    prim.def_impl(_compat.apply_primitive(prim))
    prim.def_abstract_eval(abstract_eval)

    def over_leading(args: Any, dims: Any, **params: Any) -> Any:
        sizes = [a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None]
        moved = [batching.bdim_at_front(a, d, sizes[0]) for a, d in zip(args, dims, strict=True)]
        out = prim.bind(*moved, **params)
        return out, (0,) * len(out)

    batching.primitive_batchers[prim] = batch or over_leading
    if transpose is not None:
        ad.primitive_transposes[prim] = transpose
    ad.primitive_jvps[prim] = jvp

    def rule(platform: str) -> Callable[..., Any]:
        return lambda ctx, *operands, **params: lower(platform, ctx, *operands, **params)

    def other(ctx: Any, *operands: Any, **params: Any) -> Any:
        # A plugin that takes our handlers is served like the cpu platform.
        at = ctx.avals_in[0]
        asked = {**params, "operands": tuple(ctx.avals_in)}
        same = all(map(_native.serves_plugin, _compat.lowering_platforms(ctx)))
        as_cpu = same and _is_custom_call(plan("cpu", at.shape, at.dtype, asked, ""))
        return lower("cpu" if as_cpu else "other", ctx, *operands, **params)

    def plan_for(
        platform: str, shape: Sequence[Any], dtype: Any, params: dict[str, Any], caps: str
    ) -> Plan:
        if not caps and _native.serves_plugin(platform):
            native = plan("cpu", shape, dtype, params, caps)
            if _is_custom_call(native):
                return native
        return plan(platform, shape, dtype, params, caps)

    _compat.register_lowering(prim, other)
    for platform in native_platforms:
        _compat.register_lowering(prim, rule(platform), platform=platform)
    OPS[prim] = Op(name, prim, plan_for, parts)
    return prim


def _is_custom_call(plan: Plan) -> bool:
    return plan.device in ("host", "metal") and plan.route in ("host", "kernel")
