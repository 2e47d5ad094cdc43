"""Times every row of ``gemv`` beside jitted ``w @ v``, in one run.

    python -m bench.gemv                         the shapes of LLM decoders, one vector
    python -m bench.gemv --vectors 1,2,4,8,16 --trans N,T
    python -m bench.gemv --quick                 a smoke test of a few seconds
    python -m bench.gemv --shapes 9728x896 --dtypes bfloat16,float32 --json FILE

Prints one JSON row a line, then a table and the winner of each problem. Every row of the variant
table runs on every shape, the plan's own choice among them; a row that cannot run is printed as a
gap with the reason. Rows and peer are called in turn, each on the next of so many matrices that no
cache holds them; the smallest time of all turns counts, because others may use the machine. Ratios
are the peer's time over ours: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmetal_linalg as jml
from bench.common import Json, aligned, emit, write
from bench.routes import forced_row
from jaxmetal_linalg import _measure, _native
from jaxmetal_linalg._portable import finfo

# Qwen2.5's projections, larger models', and odd ones: m x n of the matrix.
SHAPES = (
    (9728, 896),
    (896, 4864),
    (896, 896),
    (151936, 896),
    (1152, 896),
    (4096, 4096),
    (11008, 4096),
    (8192, 8192),
    (28672, 8192),
    (1001, 1003),
    (77, 4099),
)
WITH_BIAS = ((1152, 896),)
QUICK = ((64, 48), (33, 65))
DTYPES = ("float32", "bfloat16", "float16")
ROWS = {"N": ("rows8", "rows4"), "T": ("columns8", "columns4")}
CACHE_BYTES = 96 << 20  # beyond any processor's last level that this was run on


def _operands(shape: tuple[int, int], dtype: str, vectors: int, trans: str) -> tuple[Any, ...]:
    m, n = shape
    depth, outs = (n, m) if trans == "N" else (m, n)
    rng = np.random.default_rng(0)
    first = jnp.asarray(rng.standard_normal((m, n), np.float32), dtype)
    copies = 1 + CACHE_BYTES // first.nbytes
    matrices = [first] + [first + jnp.asarray(i + 1, dtype) for i in range(min(copies, 64) - 1)]
    x = rng.standard_normal((depth,) if vectors == 1 else (vectors, depth), np.float32)
    bias = jnp.asarray(rng.standard_normal(outs, np.float32), dtype) if shape in WITH_BIAS else None
    return matrices, jnp.asarray(x, dtype), bias


def _peer(trans: str, vectors: int, bias: Any) -> Callable[[Any, Any], Any]:
    def f(w: Any, v: Any) -> Any:
        op = w if trans == "N" else w.T
        out = op @ v if vectors == 1 else v @ op.T
        return out if bias is None else out + jnp.broadcast_to(bias, out.shape)

    return f


def error(w: Any, v: Any, bias: Any, trans: str, out: Any) -> float:
    """Largest error in units of the documented bound."""
    op = np.asarray(w).astype(np.float64)
    op = op if trans == "N" else op.T
    x = np.asarray(v).astype(np.float64)
    want, scale = x @ op.T, np.abs(x) @ np.abs(op).T
    if bias is not None:
        want, scale = want + np.float64(bias), scale + np.abs(np.float64(bias))
    eps = float(finfo(w.dtype).eps)
    terms = op.shape[1] * _measure.ulp(w.dtype)
    bound = jml.ACC_GEMV_OUT_EPS * eps + jml.ACC_GEMV_SUM_EPS * terms
    return float(np.max(np.abs(np.asarray(out).astype(np.float64) - want) / (bound * scale)))


def _turn_s(f: Callable[..., Any], matrices: Sequence[Any], x: Any, seconds: float) -> float:
    """The smallest mean over a pass through all matrices."""
    best, start = np.inf, time.perf_counter()
    while True:
        begin = time.perf_counter()
        for w in matrices:
            f(w, x).block_until_ready()
        end = time.perf_counter()
        best = min(best, (end - begin) / len(matrices))
        if end - start > seconds:
            return float(best)


def measure(
    shape: tuple[int, int], dtype: str, vectors: int, trans: str, seconds: float, emit: Any
) -> list[Json]:
    """All rows of one problem: the plan's choice, each row of the table, and the peer."""
    matrices, x, bias = _operands(shape, dtype, vectors, trans)
    ours = functools.partial(jml.gemv, trans=trans, bias=bias)  # type: ignore[arg-type]
    runs: dict[str, Any] = {"jnp": jax.jit(_peer(trans, vectors, bias)).lower(matrices[0], x)}
    gaps: dict[str, str] = {}
    for row in ("auto", *ROWS[trans]):
        try:
            with forced_row("gemv", "" if row == "auto" else row):
                runs[row] = jax.jit(lambda w, v: ours(w, v)).lower(matrices[0], x)
        except (ValueError, RuntimeError) as e:
            gaps[row] = str(e)
    compiled = {name: lowered.compile() for name, lowered in runs.items()}
    best = dict.fromkeys(compiled, np.inf)
    for _ in range(3):
        for name, f in compiled.items():
            best[name] = min(best[name], _turn_s(f, matrices, x, seconds / 3))
    (call,) = jml.explain(ours, matrices[0], x).calls
    common = {
        **{"op": "gemv", "shape": f"{shape[0]}x{shape[1]}", "dtype": dtype, "trans": trans},
        **{"vectors": vectors, "bias": bias is not None, "matrices": len(matrices)},
    }
    rows = []
    for name, f in compiled.items():
        found: Json = {
            **common,
            "row": name,
            "device": call.device,
            "us": round(best[name] * 1e6, 2),
        }
        found["gb_per_s"] = round(matrices[0].nbytes / best[name] / 1e9, 2)
        found["ratio"] = round(best["jnp"] / best[name], 3)
        found["error"] = round(error(matrices[0], x, bias, trans, f(matrices[0], x)), 3)
        if name == "auto":
            found["picked"] = call.variant or call.route
        rows.append(emit(found))
    rows += [emit({**common, "row": name, "gap": reason}) for name, reason in gaps.items()]
    return rows


def winners(rows: list[Json]) -> list[Json]:
    """The fastest row of each problem and what it gains over the plan's choice."""
    problems: dict[tuple[Any, ...], dict[str, Json]] = {}
    for r in rows:
        if "gap" not in r:
            key = (r["device"], r["shape"], r["dtype"], r["trans"], r["vectors"])
            problems.setdefault(key, {})[r["row"]] = r
    out = []
    for (device, shape, dtype, trans, vectors), found in problems.items():
        named = {k: r["us"] for k, r in found.items() if k not in ("auto", "jnp")}
        # Where a share of the work goes to XLA, its matmul is a row like any other.
        named["matmul"] = found["jnp"]["us"]
        best = min(named, key=named.__getitem__)
        gain = found["auto"]["us"] / named[best]
        out.append(
            {
                **{"device": device, "shape": shape, "dtype": dtype, "trans": trans},
                **{"vectors": vectors, "winner": best, "gain_over_plan": round(gain, 3)},
            }
        )
    return out


def table(rows: list[Json]) -> str:
    """Rows as aligned text."""
    names = ("shape", "dtype", "trans", "vectors", "row", "us", "gb_per_s", "ratio", "error")
    lines = [list(names)]
    for r in rows:
        lines.append([str(r.get(n, "gap" if n == "us" else "-")) for n in names])
    return aligned(lines)


def _shape(text: str) -> tuple[int, int]:
    sizes = tuple(int(s) for s in text.split("x"))
    if len(sizes) != 2 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected MxN, got {text!r}")
    return sizes[0], sizes[1]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gemv", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds")
    parser.add_argument("--shapes", help="MxN, comma separated")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--vectors", default="1", help="vectors a matrix, comma separated")
    parser.add_argument("--trans", default="N", help="N, T or N,T")
    parser.add_argument("--seconds", type=float, default=1.0, help="time of one row of one shape")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args(argv)
    shapes: Sequence[tuple[int, int]] = QUICK if args.quick else SHAPES
    if args.shapes:
        shapes = [_shape(text) for text in args.shapes.split(",")]
    seconds = 0.03 if args.quick else args.seconds
    rows: list[Json] = []
    for dtype in args.dtypes.split(","):
        for trans in args.trans.split(","):
            for vectors in map(int, args.vectors.split(",")):
                for shape in shapes:
                    rows += measure(shape, dtype, vectors, trans, seconds, emit)
    won = [emit(w) for w in winners(rows)]
    print(table(rows))
    if args.json:
        found = {
            "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}",
            "machine": {**_measure.machine(), "isa": _native.isa()},
            "rows": rows,
            "winners": won,
        }
        write(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
