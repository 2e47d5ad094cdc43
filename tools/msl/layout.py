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


QUARTERS_ROWS = 260  # kept of a sweep of "quarters" (kQuartersRows)
TWIN_KEPT = 12  # sweeps of "twin" whose rotations are kept (kTwinKept)
TWIN_SWEEPS = 24  # with vectors (kMostTwinSweeps)


@dataclass(frozen=True)
class SvdVariant:
    """One row of SVD_VARIANTS or SVD_DOUBLE_VARIANTS."""

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
        return "block" in self.function or self.twin

    @property
    def twin(self) -> bool:
        """With simdgroups of their own for V."""
        return "twin" in self.function

    @property
    def device_scratch_bytes(self) -> int:
        """Of device memory, a matrix: X and, for V, reflectors and rotations."""
        n = self.n
        parts = 1 if n <= 64 else 2 if n <= 128 else 4
        if not self.twin:
            return 0
        return 4 * (2 * n * n + 5 * n + 4 + TWIN_KEPT * (n + parts) * n if self.vectors else n * n)

    @property
    def rows_name(self) -> str:
        """The kernel that makes U of what this one of "twin" recorded."""
        return self.name.replace("_vectors_", "_rows_") if self.twin and self.vectors else ""

    @property
    def rows_scratch_bytes(self) -> int:
        height = self.simdgroups * (8 if self.n <= 128 else 4)  # see TwinRows in kernels/svd.metal
        return 4 * (2 * self.n + height * (self.n + 1)) if self.rows_name else 0

    def sweeps(self, max_sweeps: int, kept: int = TWIN_KEPT) -> list[dict[str, int]]:
        """What SvdParams has of the sweeps of each dispatch, a pair where there is rows_name."""
        if not self.rows_name:
            return [{"max_sweeps": max_sweeps}]
        most = min(max_sweeps, TWIN_SWEEPS)
        return [
            {"max_sweeps": most, "first": first, "last": min(most, first + kept)}
            for first in range(0, max(1, most), kept)
        ]

    @property
    def complex(self) -> bool:
        return "complex" in self.function

    @property
    def double(self) -> bool:
        """For GPUs that have 64-bit floating point."""
        return self.storage.startswith("double")

    @property
    def matrices(self) -> int:
        """Matrices a threadgroup works on."""
        lanes = 1 << (self.n // self.columns - 1).bit_length()  # from matrix to matrix
        return 1 if self.block else self.simdgroups * 32 // lanes

    @property
    def threads(self) -> int:
        return 32 * self.simdgroups

    @property
    def scratch_bytes(self) -> int:
        if "tile" in self.function:  # V lies there
            return self.simdgroups * 2 * self.n * 32 * 8
        if not self.block:
            real = 8 if self.double else 4
            return 0 if self.complex else self.matrices * self.n * (self.n + 1) * real
        if self.twin:
            slices = self.simdgroups * (2 if self.n <= 64 else 1)
            page = 16 * slices * (self.n + 1) if self.vectors else 0
            return max(_twin_bytes(self.n, self.simdgroups), page)
        rows = -(-self.n // 32) * 32
        exchange = self.n * rows // 2
        if not self.vectors:
            return 4 * exchange
        return 4 * max(exchange * (2 if self.n <= 64 else 1), 32 * (rows + 1))


def _twin_bytes(n: int, simdgroups: int) -> int:
    """Of threadgroup memory, for steps of "twin": see Twin in kernels/svd.metal."""
    columns = 4 if n <= 128 else 6  # of a lane
    turns = 4 * columns * (16 if n <= 64 else 32)
    sums = 0 if n <= 64 else 64 * columns * simdgroups
    return 4 * (turns + sums + 3 * n + 16)


def _number(text: str) -> int:
    """A number, or a quotient of two as the table may write it."""
    top, _, bottom = text.partition("/")
    return int(top) // int(bottom or 1)


def svd_variants(unit: Unit) -> list[SvdVariant]:
    return [
        SvdVariant(r[0], r[1], r[2], _number(r[3]), _number(r[4]), _number(r[5]))
        for table in ("SVD_VARIANTS", "SVD_DOUBLE_VARIANTS")
        for r in unit.variants[table]
        if not r[1].endswith("_rows")
    ]


# --- "grid": one matrix, many threadgroups ---------------------------------------------------

BLOCK, PAIR, ROWS, SQUARE, KEPT, TILE, REFLECTED = 16, 64, 64, 72, 544, 128, 4
TURN_PITCH, TURNS_PITCH = 40, 72
TAGS = {"float": "f32", "half": "f16", "bfloat": "bf16"}
SOLVE_BYTES = 4 * (PAIR * SQUARE + (PAIR // 2) ** 2 + 3 * PAIR)  # of svd_grid_solve
MAX_SWEEPS = 20  # of grid, however many are asked for
MERGED = 32  # reflections that svd_grid_back does at once
REFLECTED_TILES = (32, 16, 8)  # columns that a threadgroup reflects in tiles


def _up(a: int, b: int) -> int:
    return -(-a // b)


def reflected_columns(cores: int, batch: int, columns: int, back: bool) -> int:
    """Columns that a threadgroup reflects: many where enough threadgroups remain."""
    for c in REFLECTED_TILES:
        enough = 3 * cores if back or c == 32 else cores
        if 2 * batch * _up(columns, c) >= enough:
            return c
    return 8 if back else REFLECTED


def reflect_bytes(reflectors: int, columns: int) -> int:
    """Of threadgroup memory: the tile, or what its products are summed in, and the products."""
    both = reflectors + columns
    tile = max(both * (16 if both > 48 else 32) + both, 1024) * 4
    return 4 * (tile + both * (reflectors + 1))


@dataclass(frozen=True)
class Dispatch:
    """One dispatch: the buffers by name, in the order of the kernel's arguments."""

    kernel: str
    groups: int
    threads: int
    buffers: tuple[str, ...]
    threadgroup_bytes: tuple[int, ...]


@dataclass(frozen=True)
class SvdPlan:
    """What the sequences of dispatches for a batch of m x n matrices, m >= n, have in common."""

    batch: int
    m: int
    n: int
    u_cols: int
    vectors: bool

    @property
    def sweep_rounds(self) -> int:
        """Of a sweep by pairs of columns."""
        return self.n + self.n % 2 - 1

    @property
    def rows(self) -> int:
        return 32 * _up(self.m, 32)

    @property
    def side(self) -> int:
        return 32 * _up(self.n, 32)

    @property
    def height(self) -> int:
        return self.side * (2 if self.vectors else 1)

    def _bytes(self, words: dict[str, int]) -> dict[str, int]:
        """Of the batch, from the words of one matrix."""
        return {k: 4 * self.batch * w for k, w in words.items() if w}


def _simdgroups(needed: int) -> int:
    """So few that they take as many steps as with all that a threadgroup may have."""
    return _up(needed, _up(needed, 32))


@dataclass(frozen=True)
class FusedVariant:
    """One row of SVD_FUSED_VARIANTS."""

    name: str
    function: str
    n: int
    per_pair: int  # lanes

    @property
    def variant(self) -> str:
        """What JAXMETAL_VARIANT calls it: svd_<variant>_n<n>."""
        return self.name.split("_")[1]

    @property
    def quarters(self) -> bool:
        return self.variant == "quarters"

    def simdgroups(self, n: int) -> int:
        return self.per_pair if self.quarters else _simdgroups(_up(_up(n, 2) * self.per_pair, 32))


def fused_variants(unit: Unit) -> list[FusedVariant]:
    return [
        FusedVariant(r[0], r[1], int(r[2]), int(r[3])) for r in unit.variants["SVD_FUSED_VARIANTS"]
    ]


@dataclass(frozen=True)
class GridStep(Dispatch):
    """One dispatch of "grid" or "fused"."""

    step: int = 0
    inner: bool = False  # of the second QR: m, u_cols and rows are n, n and side
    slices: int = 0
    first: int = 0
    last: int = 0

    @property
    def params(self) -> str:
        """Which struct of parameters its kernel has."""
        return "SvdPairsParams" if self.kernel.startswith("svd_fused") else "SvdGridParams"


@dataclass(frozen=True)
class GridPlan(SvdPlan):
    """The dispatches of "grid", or of ``fused``.

    ``slices`` and ``turn_slices``: threadgroups that make a pair's Gram matrix, and that turn it.
    ``rounds``: how many of them a dispatch of ``fused`` has at most, all of them if 0.
    """

    storage: str
    sweeps: int
    slices: int
    turn_slices: int = 1
    cores: int = 0  # fewer of them, more columns a threadgroup
    fused: FusedVariant | None = None
    rounds: int = 0

    @classmethod
    def on(
        cls,
        cores: int,
        batch: int,
        m: int,
        n: int,
        u_cols: int,
        vectors: bool = True,
        storage: str = "float",
        sweeps: int = MAX_SWEEPS,
        fused: FusedVariant | None = None,
    ) -> GridPlan:
        """The plan for a GPU of so many cores."""
        side = PAIR * _up(n, PAIR)

        pairs = batch * (side // PAIR)

        def fill(each: int, tiles: int) -> int:
            room = max(each * max(cores, 1) // pairs, 1)
            return _up(tiles, _up(tiles, room))

        slices = fill(3, side // ROWS), fill(8, side * (2 if vectors else 1) // 32)
        return cls(batch, m, n, u_cols, vectors, storage, sweeps, *slices, max(cores, 1), fused)

    @property
    def quarters(self) -> bool:
        return self.fused is not None and self.fused.quarters

    @property
    def rows(self) -> int:
        return max(PAIR * _up(self.m, PAIR), self.side)

    @property
    def side(self) -> int:
        if self.fused is not None and self.quarters:
            return self.fused.n
        return PAIR * _up(self.n, PAIR)

    @property
    def scratch(self) -> dict[str, int]:
        """Bytes of each intermediate result."""
        pairs = self.side // PAIR
        blocks = {
            "slots": 3 * pairs,
            "grams": pairs * self.slices * 3 * 1024,
            "blocks": 2 * pairs * KEPT,
            "turns": pairs * PAIR * PAIR,
        }
        quarters = {
            "x": self.side * self.side,
            "slots": 24,
            "records": 2 * QUARTERS_ROWS * self.side,
        }
        words = {
            "keys": self.side,
            "origin": self.side,
            "order": self.side,
            "exponent": 1,
            "f": self.side * self.rows,
            "f_triangles": self.side // BLOCK * 256,
            "g": self.side * self.side,
            "g_triangles": self.side // BLOCK * 256,
            "w": self.side * self.height,
            **(quarters if self.quarters else {"state": 2} if self.fused else blocks),
            "work": 3 * self.side if self.vectors else 0,
            "f_merged": self.side * MERGED if self.vectors else 0,
            "g_merged": self.side * MERGED if self.vectors else 0,
            "left": 32 * _up(self.u_cols, 32) * self.rows if self.vectors else 0,
            "right": 32 * _up(self.n, 32) * self.side if self.vectors else 0,
        }
        return self._bytes(words)

    def steps(self) -> list[GridStep]:
        batch, n, rows, side = self.batch, self.n, self.rows, self.side
        tag = TAGS[self.storage]
        pairs = side // PAIR
        out: list[GridStep] = []

        def add(
            kernel: str, groups: int, threads: int, buffers: str, *more: int, **rest: Any
        ) -> None:
            names = tuple(buffers.split())
            out.append(GridStep(f"svd_grid_{kernel}", batch * groups, threads, names, more, **rest))

        add(f"scan_{tag}", side // 32, 1024, "a keys", 4096)
        add("rank", side // 32, 256, "keys origin exponent status sweeps off_norm", 2048)
        add(f"load_{tag}", side // 32 * _up(rows, TILE), 256, "a origin exponent status f", 4224)
        # QR, then QR of its R^T: its second R^T is what Jacobi works on.
        for height, f, inner in ((rows, "f", False), (side, "g", True)):
            for panel in range(_up(n, BLOCK)):
                below = height - panel * BLOCK
                tall = below > 2048
                threads = min(384 if tall else 512, 32 * _up(below, 128))
                size = 4 * (688 + threads // 2)
                buffers = f"{f} {f}_triangles status"
                kernel = "panel_tall" if tall else "panel"
                add(kernel, 1, threads, buffers, size, step=panel, inner=inner)
                behind = n - (panel + 1) * BLOCK
                if behind > 0:
                    buffers = f"{f} {f}_triangles {f} status"
                    c = reflected_columns(self.cores, batch, behind, False)
                    size = 4 * 64 * (256 // 32 + 1) if c == REFLECTED else reflect_bytes(BLOCK, c)
                    kernel = f"reflect_{c}"
                    add(kernel, _up(behind, c), 256, buffers, size, step=panel, inner=inner)
            to = "w" if inner else "g"
            add("start", (side // 32) ** 2, 256, f"{f} status {to}", 4224, inner=inner)
        if self.fused and self.quarters:
            rounds, simdgroups = 3 * self.sweeps, self.fused.simdgroups(n)
            named = ("w", "x", "records", "slots", "status", "sweeps", "off_norm")
            size = _twin_bytes(side // 2, simdgroups)
            # With V, which is a sweep behind.
            for i in range(rounds + 1):
                groups = batch * (4 if self.vectors and i > 0 and i % 3 == 0 else 2)
                step = (self.fused.name, groups, 32 * simdgroups, named, (size,))
                out.append(GridStep(*step, step=i, slices=rounds))
        elif self.fused:
            kernel, simdgroups = self.fused.name, self.fused.simdgroups(n)
            turned = ("w", "state", "status", "sweeps", "off_norm")
            launch = (kernel, batch, 32 * simdgroups, turned, (4 * simdgroups,))
            for i, j in _pieces(self.sweeps * self.sweep_rounds, self.rounds):
                out.append(GridStep(*launch, first=i, last=j))
        for _ in () if self.fused else range(self.sweeps):
            for turn in range(2 * pairs - 1):
                sliced = {"step": turn, "slices": self.slices}
                groups = pairs * self.slices * (1 if turn else 3)
                add("gram", groups, 128, "w grams status", 4 * PAIR * ROWS, **sliced)
                solved = "grams blocks turns slots status"
                add("solve", pairs, 288, solved, SOLVE_BYTES, **sliced)
                sliced["slices"] = self.turn_slices
                groups = pairs * self.turn_slices
                size = 4 * PAIR * (TURN_PITCH + TURNS_PITCH)
                add("turn", groups, 64, "w turns slots status", size, **sliced)
            add("check", 1, 32, "slots status sweeps off_norm")
        by_product = int(bool(self.fused) or not self.vectors)
        add("norms", side // 8, 256, "w keys status", step=by_product)
        if by_product:
            add("lengths", side // 32, 256, "w g keys status", 4 * 16 * (128 + 32 + 4), step=1)
        add("rank", side // 32, 256, "keys order exponent status sweeps off_norm", 2048, step=1)
        if self.vectors:
            add("complete", 1, 256, "w keys order status work", 32)
            for f, to, columns, inner in (
                ("f", "left", self.u_cols, False),
                ("g", "right", n, True),
            ):
                more = reflect_bytes(BLOCK, BLOCK) + 4 * BLOCK * (BLOCK + 1)
                buffers = f"{f} {f}_triangles status {f}_merged"
                add("merge", -(-n // MERGED), 256, buffers, more, inner=inner)
                c = reflected_columns(self.cores, batch, columns, True)
                buffers = f"{f} {f}_merged w order status {to}"
                size = reflect_bytes(MERGED, c)
                add(f"back_{c}", _up(columns, c), 256, buffers, size, step=int(inner), inner=inner)
        add(f"values_{tag}", _up(n, 256), 256, "keys order exponent status s")
        if self.vectors:
            squares = rows // 32 * _up(self.u_cols, 32) + (side // 32) ** 2
            add(f"factors_{tag}", squares, 256, "left right origin status u vt", 4224)
        return out


def grid_params(plan: GridPlan, step: GridStep, transposed: bool = False) -> dict[str, Any]:
    """The fields of the step's params; ``transposed`` reads A by swapped strides."""
    m, n, k = plan.m, plan.n, plan.u_cols
    square = step.kernel == "svd_grid_start" and not step.inner
    part = ("first", "last") if step.params == "SvdPairsParams" else ("step", "slices")
    return {
        **_strides(plan.batch, m, n, k, transposed),
        "m": n if step.inner else m,
        "u_cols": n if step.inner else k,
        "rows": plan.side if step.inner else plan.rows,
        "side": plan.side,
        "height": plan.side if square else plan.height,
        **{k: getattr(step, k) for k in part},
    }


def _strides(batch: int, m: int, n: int, u_cols: int, transposed: bool) -> dict[str, Any]:
    """What all params of an SVD have in common."""
    return {
        **{"a_batch": m * n, "u_batch": m * u_cols, "vt_batch": n * n, "batch": batch, "n": n},
        **{"a_row": 1 if transposed else n, "a_col": m if transposed else 1},
        **{"u_row": u_cols, "u_col": 1, "vt_row": n, "vt_col": 1},
        "tol": max(1.0, m**0.5 / 4) * 2.0**-23,
    }


# --- "pairs": one threadgroup a complex matrix, in device memory ------------------------------

BACK = 8  # columns of U that a threadgroup of svd_pairs_back makes


@dataclass(frozen=True)
class PairsStep(Dispatch):
    """One dispatch of "pairs"."""

    first: int = 0
    last: int = 0
    outer: bool = False  # the first QR: R^H has no V below it
    inner: bool = False  # the second QR: m and rows are n and side


@dataclass(frozen=True)
class PairsPlan(SvdPlan):
    """The dispatches of "pairs".

    ``columns`` and ``rounds``: how many of the QR and of the sweeps a dispatch has at most, all of
    them if 0.
    """

    vectors: bool = True
    sweeps: int = 40
    columns: int = 0
    rounds: int = 0

    @property
    def simdgroups(self) -> int:
        return _simdgroups(_up(self.n, 2))

    @property
    def scratch(self) -> dict[str, int]:
        """Bytes of each intermediate result."""
        n = self.n
        words = {
            **{"keys": n, "origin": n, "order": n, "exponent": 1, "state": 2},
            **{"f": 2 * n * self.rows, "f_reflectors": 5 * n},
            **{"g": 2 * n * self.side, "g_reflectors": 5 * n},
            **{"w": 2 * n * self.height, "fill": n, "work": 4 * n},
            "left": 2 * self.u_cols * self.rows if self.vectors else 0,
            "right": 2 * n * self.side if self.vectors else 0,
        }
        return self._bytes(words)

    def steps(self) -> list[PairsStep]:
        threads, tile = 32 * self.simdgroups, 4 * self.simdgroups
        out: list[PairsStep] = []

        def add(kernel: str, buffers: str, *more: int, **rest: Any) -> None:
            names = tuple(buffers.split())
            out.append(PairsStep(f"svd_pairs_{kernel}", self.batch, threads, names, more, **rest))

        add("load", "a keys origin exponent status sweeps off_norm f")
        for i, j in _pieces(self.n, self.columns):
            add("factor", "f f_reflectors g status", first=i, last=j, outer=True)
        for i, j in _pieces(self.n, self.columns):
            add("factor", "g g_reflectors w status", first=i, last=j, inner=True)
        for i, j in _pieces(self.sweeps * self.sweep_rounds, self.rounds):
            add("turn", "w state status sweeps off_norm", tile, first=i, last=j)
        add("finish", "w keys order exponent status fill work s", tile)
        if self.vectors:
            groups = self.batch * _up(self.u_cols + self.n, BACK)
            names = ("f", "f_reflectors", "g", "g_reflectors", "w", "origin", "order", "status")
            more = ("left", "right", "u", "vt")
            out.append(PairsStep("svd_pairs_back", groups, 32 * BACK, (*names, *more), ()))
        return out


def _pieces(count: int, most: int) -> list[tuple[int, int]]:
    most = most or max(count, 1)
    return [(i, min(i + most, count)) for i in range(0, count, most)]


def pairs_params(plan: PairsPlan, step: PairsStep, transposed: bool = False) -> dict[str, Any]:
    """The fields of SvdPairsParams; ``transposed`` reads A by swapped strides."""
    return {
        **_strides(plan.batch, plan.m, plan.n, plan.u_cols, transposed),
        "m": plan.n if step.inner else plan.m,
        "u_cols": plan.u_cols,
        "rows": plan.side if step.inner else plan.rows,
        "side": plan.side,
        "height": plan.side if step.outer else plan.height,
        **{"first": step.first, "last": step.last},
    }


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


# --- qr --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QrVariant:
    """One row of QR_SMALL_VARIANTS."""

    name: str
    function: str
    storage: str
    width: int  # floats a number: 2 where it is complex
    n: int
    simdgroups: int

    @property
    def with_q(self) -> bool:
        return self.function.endswith("q")

    @property
    def matrices(self) -> int:
        return self.simdgroups * 32 // self.n

    @property
    def threads(self) -> int:
        return 32 * self.simdgroups

    @property
    def scratch_bytes(self) -> int:
        return 4 * self.matrices * self.width * self.n * (self.n + 1) if self.with_q else 0


def qr_variants(unit: Unit) -> list[QrVariant]:
    return [
        QrVariant(r[0], r[1], r[2], *map(int, r[3:6])) for r in unit.variants["QR_SMALL_VARIANTS"]
    ]


@dataclass(frozen=True)
class QrStep(Dispatch):
    """One dispatch of "tsqr"."""

    params: dict[str, int]


@dataclass(frozen=True)
class QrPlan:
    """The dispatches of "tsqr" for a batch of m x n matrices."""

    batch: int
    m: int
    n: int
    mode: str
    storage: str
    lanes: int  # L of the row
    rows: int  # B
    simdgroups: int
    piece: int  # rows of a piece of level 0
    fan: int  # pieces of a level that are one of the next
    width: int = 1  # floats a number: 2 where it is complex

    @classmethod
    def on(
        cls,
        unit: Unit,
        cores: int,
        batch: int,
        m: int,
        n: int,
        mode: str = "reduced",
        storage: str = "float",
        width: int = 1,
    ) -> QrPlan:
        """The plan for a GPU of so many cores."""
        rows_of = unit.variants["QR_TSQR_VARIANTS"]
        table = [tuple(map(int, r[3:6])) for r in rows_of if int(r[2]) == width]
        fits = [r for r in sorted(set(table)) if r[0] >= n]
        lanes, rows, simdgroups = fits[0] if fits else max(table)
        share = m // (16 * (cores or 64) * (32 // lanes))
        piece = lanes + rows * max(4, _up(share - lanes, rows))
        fan = 1 + 2 * rows // lanes
        return cls(batch, m, n, mode, storage, lanes, rows, simdgroups, piece, fan, width)

    @property
    def k(self) -> int:
        return min(self.m, self.n)

    @property
    def q_cols(self) -> int:
        """And the rows of R."""
        return self.m if self.mode == "complete" else self.k

    @property
    def parts(self) -> int:
        return min(_up(self.m, 1024), 1024)

    @property
    def scratch(self) -> dict[str, int]:
        """Bytes of each intermediate result."""
        words = {
            "largest": self.parts * self.n,
            "exponent": self.n,
            "status": 1,
            "f": self.width * self.m * self.n,
            "y": self.m * self.q_cols if self.mode != "r" and self.storage != "float" else 0,
        }
        return {k: 4 * self.batch * w for k, w in words.items() if w}

    def levels(self, base: int) -> list[dict[str, int]]:
        """What differs between the levels of the panel that begins at ``base``."""
        width = min(self.lanes, self.n - base)
        panel = {"base": base, "width": width, "reflectors": min(width, self.m - base)}
        rows, piece, spacing = self.m - base, self.piece, self.lanes
        out: list[dict[str, int]] = []
        while True:
            pieces = max(1, rows // piece + (rows % piece >= self.lanes))
            longest = max(min(rows, piece), rows - (pieces - 1) * piece)
            blocks = _up(max(longest - self.lanes, 0), self.rows)
            out.append(
                {
                    **panel,
                    **{"level": len(out), "spacing": spacing, "rows": rows, "piece": piece},
                    **{"pieces": pieces, "blocks": blocks},
                }
            )
            if pieces == 1:
                return out
            spacing = self.piece if len(out) == 1 else spacing * self.fan
            rows, piece = pieces * self.lanes, self.fan * self.lanes

    def steps(self) -> list[QrStep]:
        batch, m, n, lanes = self.batch, self.m, self.n, self.lanes
        tag = "c64" if self.width == 2 else TAGS[self.storage]
        row = f"{'c64_' if self.width == 2 else ''}l{lanes}"
        together = 32 // lanes * self.simdgroups
        out: list[QrStep] = []
        sizes = {"batch": batch, "m": m, "n": n, "q_cols": self.q_cols, "parts": self.parts}

        def add(kernel: str, groups: int, buffers: str, *more: int, **rest: int) -> None:
            threads = 32 * self.simdgroups if kernel[:6] in ("factor", "apply_") else 256
            names = tuple(buffers.split())
            params = {**sizes, **rest}
            out.append(QrStep(f"qr_tsqr_{kernel}", groups, threads, names, more, params))

        def apply(
            level: dict[str, int], buffers: str, columns: int, first: int, **rest: int
        ) -> None:
            chunks = _up(columns - first, lanes)
            size = 4 * self.width * together * lanes * (lanes + self.rows + 4)
            where = {"columns": columns, "first": first, "chunks": chunks}
            groups = _up(batch * level["pieces"] * chunks, together)
            add(f"apply_{row}", groups, buffers, size, **level, **where, **rest)

        across = _up(n, lanes)
        add(f"scan_{tag}", batch * self.parts * across, "a largest", 1024, width=lanes)
        add("scale", batch, "largest exponent status", 1024)
        add(f"load_{tag}", batch * _up(m * n, 1024), "a exponent status f")
        panels = range(0, self.k, lanes)
        for base in panels:
            for level in self.levels(base):
                groups = _up(batch * level["pieces"], together)
                size = 4 * self.width * together * (lanes * lanes + 2 * (self.rows + 4))
                add(f"factor_{row}", groups, "f", size, **level, chunks=1)
            if (first := base + lanes) < n:
                for level in self.levels(base):
                    apply(level, "f f status", n, first)
        add(f"triangle_{tag}", batch * _up(self.q_cols * n, 1024), "f exponent status r")
        if self.mode == "r":
            return out
        q = "q" if self.storage == "float" else "y"
        every = batch * _up(m * self.q_cols, 1024)
        add(f"start_{'c64' if self.width == 2 else 'f32'}", every, f"f status {q}")
        for base in reversed(panels):
            for level in reversed(self.levels(base)):
                apply(level, f"f {q} status", self.q_cols, base, reverse=1)
        if self.storage != "float":
            add(f"store_{tag}", every, "y q")
        return out
