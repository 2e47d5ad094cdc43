"""Times ``qr`` beside ``jnp.linalg.qr``, in one run.

    python -m bench.qr                       the shapes that it must reach
    python -m bench.qr --quick               a smoke test of a few seconds
    python -m bench.qr --shapes 10000x8x8,1000000x32 --dtype complex64

Prints one JSON row a line. Both are called in turn; the ratio is the peer's median over ours. Where
JAX's default backend is an NVIDIA GPU, it runs there, on other shapes: ``device_ms`` is the time of
a call among calls enqueued back to back with one wait at the end, ``wall_ms`` that of one call with
its wait, and the ratio is that of device times.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmetal_linalg as jml
from bench.common import Json, emit, gpu_times, label, matrices, milliseconds, parse_shape
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
CUDA_SHAPES = (
    (8192, 16, 16),
    (8192, 32, 32),
    (1, 1000000, 32),
    (1, 65536, 8),
    (1, 400000, 2),
    (1, 8192, 110),
    (8, 8192, 110),
    (16, 2048, 256),
    (1, 2048, 512),
    (1000, 40, 12),
    (256, 64, 64),
    (16, 256, 256),
    (1, 256, 256),
    (1, 512, 512),
)
QUICK = ((100, 8, 8), (1, 5000, 4))


def measure(shape: tuple[int, ...], dtype: str, repeats: int) -> Json:
    """One row: ours and jnp's, interleaved, and LAPACK's test ratios of both."""
    a = matrices(shape, dtype)
    runs = {"ours": jml.qr, "jnp": jnp.linalg.qr}
    compiled = [jax.jit(lambda x, f=f: tuple(f(x))) for f in runs.values()]
    (call,) = jml.explain(jml.qr, a).calls
    row: Json = {"op": "qr", "shape": label(shape), "dtype": dtype, "device": call.device}
    row |= {"route": call.route, "variant": call.variant, "launches": call.launches}
    key = "device_ms" if on_gpu() else "median_ms"
    times = _gpu_times(compiled, a, repeats) if on_gpu() else _host_times(compiled, a, repeats)
    for name, run, timing in zip(runs, compiled, times, strict=True):
        row[name] = {k: round(ms, 4) for k, ms in timing.items()}
        ratios = _measure.qr_ratios(np.asarray(a), *map(np.asarray, run(a)))
        row[name] |= {k: round(v, 3) for k, v in ratios._asdict().items()}
    row["ratio"] = round(row["jnp"][key] / row["ours"][key], 2)
    return row


def on_gpu() -> bool:
    """Whether JAX's default backend is a GPU."""
    return jax.default_backend() == "gpu"


Run = Callable[[jax.Array], Any]


def _host_times(runs: Sequence[Run], a: jax.Array, repeats: int) -> list[dict[str, float]]:
    times = _measure.interleaved(runs, (a,), repeats)
    return [{"median_ms": t.median_ms, "min_ms": min(t.warm_ms)} for t in times]


def _gpu_times(runs: Sequence[Run], a: jax.Array, repeats: int) -> list[dict[str, float]]:
    wait = jax.block_until_ready
    clocks = [functools.partial(milliseconds, run, a, wait=wait) for run in runs]
    cold = [clock(1) for clock in clocks]
    times = gpu_times(clocks, [clock(1) for clock in clocks], repeats)
    return [{**t._asdict(), "cold_ms": c} for c, t in zip(cold, times, strict=True)]


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
    if on_gpu() and not args.quick:
        shapes = CUDA_SHAPES
    if args.shapes:
        shapes = tuple(parse_shape(text) for text in args.shapes.split(","))
    for shape in shapes:
        emit(measure(shape, args.dtype, 2 if args.quick else args.repeats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
