"""What Python needs to launch kernels: struct layouts and variant rows, read from the source."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from .lexer import MslError
from .parse import Unit

C_TYPES: dict[str, Any] = {
    "long": ctypes.c_int64,
    "ulong": ctypes.c_uint64,
    "int": ctypes.c_int32,
    "uint": ctypes.c_uint32,
    "float": ctypes.c_float,
}


def structure(unit: Unit, name: str) -> type[ctypes.Structure]:
    """A ctypes structure with the fields of a params struct, in the same places."""
    fields = []
    for type_, field in unit.structs[name]:
        if type_ not in C_TYPES:
            raise MslError(unit.file, 1, f"struct {name}: field {field} has type {type_}")
        fields.append((field, C_TYPES[type_]))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@dataclass(frozen=True)
class SvdVariant:
    """One row of SVD_VARIANTS."""

    name: str
    function: str
    storage: str
    n: int
    columns: int
    simdgroups: int

    @property
    def vectors(self) -> bool:
        return self.function.endswith("vectors")

    @property
    def block(self) -> bool:
        """One threadgroup a matrix."""
        return "block" in self.function

    @property
    def matrices(self) -> int:
        """Matrices a threadgroup works on."""
        return 1 if self.block else self.simdgroups * 32 * self.columns // self.n

    @property
    def threads(self) -> int:
        return 32 * self.simdgroups

    @property
    def scratch_bytes(self) -> int:
        if not self.block:
            return self.matrices * self.n * (self.n + 1) * 4 if self.vectors else 0
        exchange = self.n * self.n // 2
        if not self.vectors:
            return 4 * exchange
        return 4 * max(exchange * (2 if self.n <= 64 else 1), 32 * (self.n + 1))


def _number(text: str) -> int:
    """A number, or a quotient of two as the table may write it."""
    top, _, bottom = text.partition("/")
    return int(top) // int(bottom or 1)


def svd_variants(unit: Unit) -> list[SvdVariant]:
    return [
        SvdVariant(r[0], r[1], r[2], _number(r[3]), _number(r[4]), _number(r[5]))
        for r in unit.variants["SVD_VARIANTS"]
    ]
