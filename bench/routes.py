"""Where the host routes cross: times every variant over n and recommends tuning numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

import jaxmetal_linalg as jml
from bench.common import Json, label, matrices
from jaxmetal_linalg import _measure

SIZES = (2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
VARIANTS = {"interleaved": 64, "column": 1024, "block": 1024, "lapack": 1024}  # name: largest n
MARGIN = 1.02  # LAPACK must lose by this much before work is taken from it


@contextmanager
def forced_row(op: str, row: str) -> Iterator[None]:
    """Traces inside the block use this row of the op's variant table; ``""``: the plan's own."""
    before = os.environ.get("JAXMETAL_VARIANT")
    os.environ["JAXMETAL_VARIANT"] = f"{op}:{row}" if row else ""
    try:
        yield
    finally:
        del os.environ["JAXMETAL_VARIANT"]
        if before is not None:
            os.environ["JAXMETAL_VARIANT"] = before


def many(n: int) -> int:
    """A batch that keeps every core busy: about a million numbers, at least 8 matrices."""
    return max(8, min(10000, 2**20 // (n * n)))


def sweep(dtype: str, quick: bool, emit: Callable[[Json], Json]) -> Json:
    """Times every variant at every size, alone and in a batch.

    Returns:
      ``sweep`` rows and ``recommended`` numbers for hardware_params.json.
    """
    rows = []
    for n in (4, 8, 16) if quick else SIZES:
        repeats = 3 if quick or n > 256 else 9
        for batch, uv in ((1, True), (many(n), True), (1, False), (many(n), False)):
            rows.append(emit(_time(batch, n, dtype, uv, repeats)))
    return {"sweep": rows, "recommended": emit(recommend(rows, dtype))}


def _time(batch: int, n: int, dtype: str, uv: bool, repeats: int) -> Json:
    a = matrices((batch, n, n), dtype)
    names = [name for name, largest in VARIANTS.items() if n <= largest]

    def make(variant: str) -> Callable[[], Any]:
        compiled = jax.jit(lambda x: jml.svd(x, full_matrices=False, compute_uv=uv))
        with forced_row("svd", variant):
            executable = compiled.lower(a).compile()
        return lambda: executable(a)

    times = _measure.interleaved([make(name) for name in names], (), repeats)
    ms = {name: round(t.median_ms, 4) for name, t in zip(names, times, strict=True)}
    shape = label((batch, n, n))
    op = "svd" if uv else "svdvals"
    return {"op": op, "shape": shape, "batch": batch, "n": n, "dtype": dtype, "ms": ms}


def recommend(rows: list[Json], dtype: str) -> Json:
    """The largest n up to which each route wins at every measured size."""
    wide = "" if dtype == "float32" else "_wide"

    def crossing(rows: list[Json], wins: Callable[[dict[str, float]], bool]) -> int:
        best = 0
        for row in sorted(rows, key=lambda r: r["n"]):
            if not wins(row["ms"]):
                break
            best = row["n"]
        return best

    def beats_lapack(ms: dict[str, float]) -> bool:
        native = [ms[k] for k in ("interleaved", "column") if k in ms]
        return min(native) * MARGIN <= ms["lapack"]

    def interleaved_wins(ms: dict[str, float]) -> bool:
        return "interleaved" in ms and ms["interleaved"] <= ms["column"]

    found: Json = {}
    for op, values in (("svd", ""), ("svdvals", "_values")):
        for single in ("", "_single"):
            some = [r for r in rows if r["op"] == op and (r["batch"] == 1) == bool(single)]
            found[f"jacobi_max_n{single}{wide}{values}"] = crossing(some, beats_lapack)
    batched = [r for r in rows if r["op"] == "svd" and r["batch"] > 1]
    found["interleaved_max_n"] = crossing(batched, interleaved_wins)
    return found


def table(report: Json) -> str:
    """The sweep as aligned text, the fastest of each line marked."""
    lines = []
    for row in report["sweep"]:
        best = min(row["ms"], key=lambda name: row["ms"][name])
        cells = [f"{k} {v:.3f}{'*' if k == best else ''}" for k, v in row["ms"].items()]
        lines.append(f"{row['op']:<8}{row['shape']:<14}" + "".join(f"{c:<26}" for c in cells))
    lines.append("recommended for hardware_params.json: " + str(report["recommended"]))
    return "\n".join(lines)
