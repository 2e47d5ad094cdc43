"""``explain``: what each primitive call of a function would run, without compiling anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax

from jaxmetal_linalg import _compat, _native, _registry


@dataclass(frozen=True)
class Call:
    """One primitive call: what it computes and how.

    Attributes:
      op: name of the operation, e.g. ``svd``.
      device: host, metal, cuda, sim or xla.
      route: the code that does the work, e.g. host, kernel, lapack, portable, empty; none where
        ``caps`` were asked about and no kernel serves the call.
      variant: row of the op's variant table.
      grid, group: launch sizes of a GPU kernel, else ``()``.
      threadgroup_bytes: threadgroup memory of a launch.
      launches: kernels or custom calls that one call runs.
      reason: one sentence that says why.
      shape: ``(m, n)``.
      batch: number of matrices (None where it is symbolic).
      dtype: of the first operand.
    """

    op: str
    device: str
    route: str
    variant: str
    grid: tuple[int, ...]
    group: tuple[int, ...]
    threadgroup_bytes: int
    launches: int
    reason: str
    shape: tuple[int, ...]
    batch: int | None
    dtype: str


@dataclass(frozen=True)
class Explanation:
    """All primitive calls of a function, in program order; ``str`` is a table."""

    calls: tuple[Call, ...]
    platform: str
    caps: str = ""

    def __str__(self) -> str:
        where = f"GPU {self.caps}" if self.caps else f"platform {self.platform}"
        if not self.calls:
            return f"no jaxmetal_linalg primitive is called ({where})"
        names = [f.name for f in fields(Call)]
        order = ["op", "batch", "shape", "dtype", *names[1:-3]]
        rows = [order] + [[_cell(getattr(c, name)) for name in order] for c in self.calls]
        widths = [max(len(row[i]) for row in rows) for i in range(len(order))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([where, *lines])


def _cell(value: Any) -> str:
    if value is None:
        return "?"
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "-"
    return str(value) or "-"


def explain(f: Callable[..., Any], *args: Any, caps: str = "", **kwargs: Any) -> Explanation:
    """Shows how each primitive call in ``f(*args, **kwargs)`` would run on the default device.

    Args:
      f: any function that JAX can trace, jitted, mapped or differentiated ones included.
      *args: what ``f`` takes. Arrays may be ``jax.ShapeDtypeStruct``; everything without
        shape and dtype (numbers, strings, booleans) is passed to ``f`` as it is.
      caps: name of a GPU, e.g. ``apple-m3-max`` or ``nvidia-h200``: shows what would run there
        instead. The GPU need not be present; a call that no kernel serves has route ``none`` and
        the reason.
      **kwargs: likewise; ``f`` cannot be given a keyword argument ``caps``.

    Returns:
      An ``Explanation``. ``.calls`` has one record per call site in the traced program: a call in
      a loop or in both branches of a condition is listed once per site. ``str`` is a table.

    Raises:
      What tracing ``f`` raises, and ``DeviceUnavailableError`` where a call could not be lowered.
      ValueError: no GPU is called ``caps``; the text lists the names.

    It traces ``f`` abstractly: nothing is compiled and nothing runs.
    """
    return explain_on(_compat.default_platform(), f, *args, caps=caps, **kwargs)


def explain_on(
    platform: str, f: Callable[..., Any], *args: Any, caps: str = "", **kwargs: Any
) -> Explanation:
    """``explain`` for a platform other than the default backend, present or not."""
    if caps:
        _native.caps_row(caps, "explain: argument caps")
    leaves, tree = jax.tree.flatten((args, kwargs))
    traced = [i for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")]

    def closed(*arrays: Any) -> Any:
        filled = list(leaves)
        for i, x in zip(traced, arrays, strict=True):
            filled[i] = x
        own_args, own_kwargs = jax.tree.unflatten(tree, filled)
        return f(*own_args, **own_kwargs)

    jaxpr = jax.make_jaxpr(closed)(*(leaves[i] for i in traced))
    return Explanation(tuple(_calls(platform, caps, jaxpr.jaxpr)), platform, caps)


def _calls(platform: str, caps: str, jaxpr: Any) -> Iterator[Call]:
    for op, eqn in _find(jaxpr):
        if isinstance(op, str):
            yield _composite(op, eqn)
            continue
        call = _call(platform, caps, op, eqn)
        yield call
        if call.route == "composite" and op.parts is not None:
            parts = op.parts(*(v.aval for v in eqn.invars), **eqn.params)
            yield from _calls(platform, caps, parts)


def _find(jaxpr: Any) -> Iterator[tuple[_registry.Op | str, Any]]:
    """Primitives with their equations, and composites (by name) before what they consist of."""
    for eqn in jaxpr.eqns:
        op = _registry.OPS.get(eqn.primitive)
        if op is not None:
            yield op, eqn
            continue
        name = _registry.COMPOSITES.get(str(eqn.params.get("name")))
        if name is not None:
            yield name, eqn
        for value in eqn.params.values():
            for inner in _compat.jaxprs_in(value):
                yield from _find(inner)


def _call(platform: str, caps: str, op: _registry.Op, eqn: Any) -> Call:
    aval = eqn.invars[0].aval
    params = {**eqn.params, "operands": tuple(v.aval for v in eqn.invars)}
    plan = op.plan(platform, aval.shape, aval.dtype, params, caps)
    return _record(op.name, plan, aval.shape, aval.dtype)


def _composite(name: str, eqn: Any) -> Call:
    u, _, v = (x.aval for x in eqn.outvars[:3])
    reason = "plain JAX around the calls below; no device has one kernel for all of it"
    plan = _registry.Plan("xla", "composite", launches=0, reason=reason)
    return _record(name, plan, (*u.shape[:-1], v.shape[-2]), u.dtype)


def _record(op: str, plan: _registry.Plan, shape: Sequence[Any], dtype: Any) -> Call:
    *batch, m, n = shape
    return Call(
        op=op,
        **vars(plan),
        shape=(m, n),
        batch=math.prod(batch) if _compat.is_concrete(batch) else None,
        dtype=str(dtype),
    )
