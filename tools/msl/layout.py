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


@dataclass(frozen=True)
class GemvVariant:
    """One row of GEMV_VARIANTS."""

    name: str
    function: str
    storage: str
    x_storage: str
    width: int  # floats a number: 2 where it is complex
    words: int
    lanes: int
    rows: int
    unroll: int
    simdgroups: int
    vectors: int
    flags: frozenset[str]

    @property
    def variant(self) -> str:
        """What JAXMETAL_VARIANT calls it: gemv_<variant>_<dtypes>_m<vectors>."""
        return self.name.split("_")[1]

    @property
    def transposed(self) -> bool:
        return "columns" in self.function

    @property
    def off(self) -> bool:
        """Measured slower than another row, and taken only by name."""
        return "kGemvOff" in self.flags

    @property
    def splits(self) -> bool:
        """Simdgroups share the sums of an output; so may threadgroups."""
        return self.function != "gemv_rows"

    @property
    def chunk(self) -> int:
        """Floats in a chunk."""
        return self.words * (1 if self.storage == "float" else 2) if self.words else self.width

    @property
    def threads(self) -> int:
        return 32 * self.simdgroups

    @property
    def outputs(self) -> int:
        """Outputs of a threadgroup, for each of its vectors."""
        if self.transposed:
            return 32 * self.chunk // self.width
        return self.rows * (1 if self.splits else 32 // self.lanes * self.simdgroups)

    @property
    def scratch_bytes(self) -> int:
        if not self.splits:
            return 0
        if not self.transposed:
            return 4 * self.simdgroups * self.rows * self.vectors * self.width
        staged = self.width if self.function == "gemv_columns_shared" else 0
        return 4 * self.simdgroups * 32 * self.vectors * (self.chunk + staged)

    def fits(self, length: int) -> bool:
        """Whether rows of A with so many numbers can be read in chunks."""
        return length * self.width % self.chunk == 0

    def chunks(self, depth: int) -> int:
        """Pieces that parts share out: chunks of a row, or rows."""
        return depth if self.transposed else depth * self.width // self.chunk


def gemv_variants(unit: Unit) -> list[GemvVariant]:
    """The rows that multiply, without those that prepare x and add up the parts."""
    found = []
    for r in unit.variants["GEMV_VARIANTS"]:
        if r[1] not in ("gemv_finish", "gemv_convert"):
            width, words, lanes, rows, unroll, simdgroups, vectors = map(int, r[6:13])
            found.append(
                GemvVariant(
                    *(r[0], r[1], r[2], r[3]),
                    width=width,
                    words=words,
                    lanes=lanes,
                    rows=rows,
                    unroll=unroll,
                    simdgroups=simdgroups,
                    vectors=vectors,
                    flags=_flags(r[13]),
                )
            )
    return found


def _flags(text: str) -> frozenset[str]:
    every = {"kGemvBias", "kGemvAccumulate", "kGemvResidual"}
    names = set(text.replace("|", " ").split())
    if "kGemvReal" in names:
        names |= every | {"kGemvActivation"}
    if "kGemvComplex" in names:
        names |= every
    return frozenset(names - {"kGemvReal", "kGemvComplex"})


def gemv_parts(v: GemvVariant, outputs: int, depth: int, cores: int) -> tuple[int, int]:
    """How many threadgroups share a sum, and the chunks of each; csrc/gemv_device.cc says why."""
    chunks, unit = v.chunks(depth), 32 * v.simdgroups
    if not v.splits:
        return 1, chunks
    units = -(-chunks // unit)
    blocks = -(-outputs // v.outputs)
    parts = min(units, max(1, 4 * cores // blocks))
    part = -(-units // parts) * unit
    return -(-chunks // part), part
