"""Tuning numbers: shipped file < file named by ``JAXMETAL_PARAMS`` < ``JAXMETAL_TUNING``.

A file is ``{device: {op: {isa or "default": {key: number}}}}``; the row of the active instruction
set (host) or GPU family (metal) is laid over ``default``. ``JAXMETAL_TUNING`` is
``device.op.key=number``, comma separated. What is resolved here at trace time travels inside the
primitive's parameters, so that an executable is fixed once lowered.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, TypeAlias

Number: TypeAlias = int | float
Row: TypeAlias = dict[str, Number]

SHIPPED = Path(__file__).with_name("hardware_params.json")


def _number(text: str) -> Number:
    value = float(text)
    return int(value) if value.is_integer() else value


def _parse_environment(text: str) -> dict[tuple[str, str], Row]:
    out: dict[tuple[str, str], Row] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, sep, value = item.partition("=")
        parts = name.strip().split(".")
        try:
            if not sep or len(parts) != 3:
                raise ValueError
            out.setdefault((parts[0], parts[1]), {})[parts[2]] = _number(value)
        except ValueError:
            raise ValueError(
                "environment JAXMETAL_TUNING: expected device.op.key=number[,...] such as "
                f"host.svd.max_sweeps=2, got {item!r}"
            ) from None
    return out


@functools.lru_cache(maxsize=16)
def _load(path: str, stamp: int) -> dict[str, Any]:
    del stamp  # only part of the cache key
    try:
        data = json.loads(Path(path).read_text())
    except OSError as e:
        raise ValueError(
            f"environment JAXMETAL_PARAMS: expected a readable JSON file, got {path!r} ({e})"
        ) from None
    except ValueError as e:
        raise ValueError(f"tuning file {path!r}: expected JSON, got an error: {e}") from None
    if not isinstance(data, dict):
        raise ValueError(f"tuning file {path!r}: expected a JSON object, got {type(data).__name__}")
    return data


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _rows(data: dict[str, Any], device: str, op: str, where: str) -> dict[str, Row]:
    rows: dict[str, Row] = data.get(device, {}).get(op, {})
    for name, row in rows.items():
        for key, value in row.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(
                    f"{where}: {device}.{op}.{name}.{key}: expected a number, got {value!r}"
                )
    return rows


def known_keys(device: str, op: str) -> tuple[str, ...]:
    """The tuning keys of one op on one device, sorted."""
    rows = _rows(_load(str(SHIPPED), 0), device, op, str(SHIPPED))
    return tuple(sorted({key for row in rows.values() for key in row}))


def _check(keys: Any, device: str, op: str, where: str) -> None:
    known = known_keys(device, op)
    for key in keys:
        if key not in known:
            expected = ", ".join(known) or "no keys at all"
            raise ValueError(f"{where}: {device}.{op}: expected one of {expected}, got {key!r}")


def resolve(device: str, op: str, isa: str = "default") -> tuple[tuple[str, Number], ...]:
    """The tuning of ``op`` on ``device`` at instruction set ``isa``, as sorted pairs.

    Raises:
      ValueError: an override names an unknown key, or is not a number.
    """
    params = os.environ.get("JAXMETAL_PARAMS", "")
    stamp = _stamp(Path(params)) if params else 0
    return _resolve(device, op, isa, params, stamp, os.environ.get("JAXMETAL_TUNING", ""))


@functools.lru_cache(maxsize=64)
def _resolve(
    device: str, op: str, isa: str, params: str, stamp: int, environment: str
) -> tuple[tuple[str, Number], ...]:
    merged: Row = {}
    layers = [(_load(str(SHIPPED), 0), str(SHIPPED))]
    if params:
        layers.append((_load(params, stamp), f"environment JAXMETAL_PARAMS={params}"))
    for data, where in layers:
        rows = _rows(data, device, op, where)
        for name in ("default", isa):
            _check(rows.get(name, {}), device, op, where)
            merged.update(rows.get(name, {}))
    row = _parse_environment(environment).get((device, op), {})
    _check(row, device, op, "environment JAXMETAL_TUNING")
    merged.update(row)
    return tuple(sorted(merged.items()))


def check_environment() -> None:
    """Raises ``ValueError`` where ``JAXMETAL_TUNING`` names no device or op that exists."""
    text = os.environ.get("JAXMETAL_TUNING", "")
    if not text:
        return
    known = sorted((d, op) for d, ops in _load(str(SHIPPED), 0).items() for op in ops)
    for device, op in _parse_environment(text):
        if (device, op) not in known:
            names = ", ".join(f"{d}.{o}" for d, o in known)
            raise ValueError(
                f"environment JAXMETAL_TUNING: expected one of {names}, got {device}.{op}"
            )


def forced_variant(op: str) -> str:
    """The row that ``JAXMETAL_VARIANT`` (``op:row``, comma separated) forces for ``op``, if any."""
    for item in filter(None, os.environ.get("JAXMETAL_VARIANT", "").split(",")):
        name, sep, row = item.strip().partition(":")
        if not sep or not name or not row:
            raise ValueError(
                f"environment JAXMETAL_VARIANT: expected op:row such as svd:column, got {item!r}"
            )
        if name == op:
            return row
    return ""
