"""Times ``qr`` beside ``jnp.linalg.qr``, in one run.

    python -m bench.qr                       the shapes that it must reach
    python -m bench.qr --quick               a smoke test of a few seconds
    python -m bench.qr --shapes 10000x8x8,1000000x32 --dtype complex64

Prints one JSON row a line. Both are called in turn; the ratio is the peer's median over ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmetal_linalg as jml
from bench.common import Json, label, matrices
from jaxmetal_linalg import _measure

SHAPES = (
    (10000, 8, 8),
    (10000, 16, 16),
    (1000, 32, 32),
    (256, 64, 64),
    (1, 32, 32),
    (1, 512, 512),
    (1, 65536, 8),
    (1, 400000, 2),
    (1, 1000000, 32),
    (1, 40000, 128),
)
QUICK = ((100, 8, 8), (1, 5000, 4))


def measure(shape: tuple[int, ...], dtype: str, repeats: int) -> Json:
    """One row: ours and jnp's, interleaved, and LAPACK's test ratios of both."""
    a = matrices(shape, dtype)
    runs = {"ours": jml.qr, "jnp": jnp.linalg.qr}
    compiled = [jax.jit(lambda x, f=f: tuple(f(x))) for f in runs.values()]
    times = _measure.interleaved(compiled, (a,), repeats)
    (call,) = jml.explain(jml.qr, a).calls
    row: Json = {"op": "qr", "shape": label(shape), "dtype": dtype, "route": call.route}
    row["variant"] = call.variant
    for name, run, timing in zip(runs, compiled, times, strict=True):
        warm = timing.warm_ms
        row[name] = {"median_ms": round(timing.median_ms, 4), "min_ms": round(min(warm), 4)}
        ratios = _measure.qr_ratios(np.asarray(a), *run(a))
        row[name] |= {k: round(v, 3) for k, v in ratios._asdict().items()}
    row["ratio"] = round(row["jnp"]["median_ms"] / row["ours"]["median_ms"], 2)
    return row


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(x) for x in text.split("x"))
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected MxN or BATCHxMxN, got {text!r}")
    return sizes if len(sizes) == 3 else (1, *sizes)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.qr", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds")
    parser.add_argument("--shapes", help="MxN or BATCHxMxN, comma separated")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    args: Any = parser.parse_args(argv)
    if args.dtype in ("float64", "complex128"):
        jax.config.update("jax_enable_x64", True)
    shapes: tuple[tuple[int, ...], ...] = QUICK if args.quick else SHAPES
    if args.shapes:
        shapes = tuple(_shape(text) for text in args.shapes.split(","))
    for shape in shapes:
        print(json.dumps(measure(shape, args.dtype, 2 if args.quick else args.repeats)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
