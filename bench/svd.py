"""Times ``svd`` and ``svdvals`` beside their peers, in one run.

    python -m bench.svd                          the table of README.md
    python -m bench.svd --publish                the same, into bench/results/ and README.md
    python -m bench.svd --quick                  a smoke test of a few seconds
    python -m bench.svd --shapes 1024x32x32,512x512 --dtype complex64 --json FILE
    python -m bench.svd --route-sweep            where the routes cross; recommends tuning numbers

Prints one JSON row a line, then a table. Ours and the peers are called in turn (A B C A B C), so
that the machine's drift meets all of them alike; the first, compiling call is timed apart. Ratios
are peer's median over ours: above 1, ours is faster. The input is a device array; scipy and torch
get the same numbers in their own array type before the clock starts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jaxmetal_linalg as jml
from bench import process, report, routes
from bench.common import Json, aligned, emit, label, matrices, parse_shape, write
from jaxmetal_linalg import _measure, _native

SHAPES = (
    (10000, 4, 4),
    (10000, 8, 8),
    (4096, 16, 16),
    (1024, 32, 32),
    (256, 64, 64),
    (64, 128, 128),
    (1, 512, 512),
    (1, 1024, 1024),
    (1, 2048, 2048),
    (1, 4096, 2048),
)
QUICK = ((100, 8, 8), (16, 32, 32), (1, 96, 64))
LOOP_LIMIT = 256  # scipy knows no batch: at most this many matrices are looped over, and scaled up

Run = Callable[[], Any]


# --- peers ------------------------------------------------------------------------------------


def _jax(function: Callable[..., Any], a: jax.Array) -> Run:
    compiled = jax.jit(function)
    return lambda: compiled(a)


def _scipy(a: jax.Array, uv: bool) -> Run | None:
    try:
        from scipy.linalg import get_lapack_funcs
    except ImportError:
        return None
    stack = np.asarray(a)[:LOOP_LIMIT]
    gesdd: Callable[..., Any]
    (gesdd,) = get_lapack_funcs(("gesdd",), (stack,))

    def run() -> Any:
        done = [gesdd(x, full_matrices=0, compute_uv=int(uv))[:3] for x in stack]
        u, s, vh = (np.stack(x) for x in zip(*done, strict=True))
        return (u, s, vh) if uv else s

    return run


def _torch(a: jax.Array, uv: bool) -> Run | None:
    try:
        import torch
    except ImportError:
        return None
    x = torch.from_numpy(np.array(a))
    if uv:
        return lambda: tuple(torch.linalg.svd(x, full_matrices=False))
    return lambda: torch.linalg.svdvals(x)


def _ours(uv: bool) -> Callable[[Any], Any]:
    if uv:
        return lambda x: tuple(jml.svd(x, full_matrices=False))
    return jml.svdvals


def _jnp(uv: bool) -> Callable[[Any], Any]:
    if uv:
        return lambda x: tuple(jnp.linalg.svd(x, full_matrices=False))
    return lambda x: jnp.linalg.svd(x, compute_uv=False)


def _runs(a: jax.Array, uv: bool) -> dict[str, Run]:
    runs = {
        "ours": _jax(_ours(uv), a),
        "jnp": _jax(_jnp(uv), a),
        "scipy gesdd": _scipy(a, uv),
        "torch": _torch(a, uv),
    }
    return {name: run for name, run in runs.items() if run is not None}


# --- one row ----------------------------------------------------------------------------------


def accuracy(a: NDArray[Any], result: Any, reference: NDArray[Any]) -> Json:
    """Error of the singular values in ulp and, with vectors, LAPACK's test ratios."""
    parts = [np.asarray(x) for x in (result if isinstance(result, tuple) else (result,))]
    s = parts[len(parts) // 2]
    out = {"sigma_ulp": _measure.sigma_error_ulp(s, reference[: len(s)])}
    if len(parts) == 3:
        out |= _measure.svd_ratios(a[: len(s)], *parts)._asdict()
    return {k: round(v, 3) for k, v in out.items()}


def measure(shape: tuple[int, ...], dtype: str, uv: bool, seconds: float) -> Json:
    """One row: ours and every peer that is installed, interleaved."""
    a = matrices(shape, dtype)
    runs = _runs(a, uv)
    trial = _measure.interleaved(list(runs.values()), (), 1)
    round_ms = sum(_measure.turn_ms(t.warm_ms[0]) for t in trial)
    repeats = int(np.clip(seconds * 1e3 / round_ms, 3, 25))
    warm = _measure.interleaved(list(runs.values()), (), repeats)

    given = np.asarray(a)
    reference = np.linalg.svd(_measure.widen(given), compute_uv=False)
    rows: dict[str, Json] = {}
    for (name, run), first, timing in zip(runs.items(), trial, warm, strict=True):
        scale = max(shape[0] / LOOP_LIMIT, 1.0) if name.startswith("scipy") else 1.0
        rows[name] = {
            "median_ms": round(statistics.median(timing.warm_ms) * scale, 4),
            "min_ms": round(min(timing.warm_ms) * scale, 4),
            "max_ms": round(max(timing.warm_ms) * scale, 4),
            "cold_ms": round(first.cold_ms * scale, 2),
            **accuracy(given, run(), reference),
        }
        if scale != 1.0:
            rows[name]["scaled_from"] = LOOP_LIMIT
    mine = rows.pop("ours")
    for row in rows.values():
        row["ratio"] = round(row["median_ms"] / mine["median_ms"], 3)
    (call,) = jml.explain(_ours(uv), a).calls
    return {
        "op": "svd" if uv else "svdvals",
        "shape": label(shape),
        "dtype": dtype,
        "device": call.device,
        "route": call.route,
        "variant": call.variant,
        "repeats": repeats,
        **mine,
        "peers": rows,
    }


def table(rows: list[Json]) -> str:
    """Rows as aligned text, one line a peer."""
    names = ("op", "shape", "dtype", "device", "route", "variant", "median", "min", "max", "peer")
    lines = [[*names, "peer median", "ratio", "residual", "ortho", "sigma ulp", "(peer's)"]]
    for r in rows:
        for name, peer in r["peers"].items():
            lines.append(
                [
                    *(str(r[k]) for k in names[:6]),
                    *(f"{r[k]:.3f}" for k in ("median_ms", "min_ms", "max_ms")),
                    name + (" (scaled)" if "scaled_from" in peer else ""),
                    f"{peer['median_ms']:.3f}",
                    f"{peer['ratio']:.2f}x",
                    *_quality(r),
                    " / ".join(_quality(peer)),
                ]
            )
    return aligned(lines)


def _quality(row: Json) -> list[str]:
    if "residual" not in row:
        return ["-", "-", f"{row['sigma_ulp']:.2f}"]
    ortho = max(row["orthogonality_u"], row["orthogonality_v"])
    return [f"{row['residual']:.2f}", f"{ortho:.2f}", f"{row['sigma_ulp']:.2f}"]


# --- command ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.svd", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds")
    parser.add_argument("--shapes", help="MxN or BATCHxMxN, comma separated")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=6.0, help="time budget of one row")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument(
        "--publish", action="store_true", help="write bench/results/ and README.md's tables"
    )
    parser.add_argument("--route-sweep", action="store_true", help="where the routes cross")
    args = parser.parse_args(argv)
    if args.dtype in ("float64", "complex128"):
        jax.config.update("jax_enable_x64", True)
    shapes: Sequence[tuple[int, ...]] = QUICK if args.quick else SHAPES
    if args.shapes:
        shapes = [parse_shape(text) for text in args.shapes.split(",")]
    seconds = 0.2 if args.quick else args.seconds
    now = datetime.now(UTC)
    found: Json = {
        "date": f"{now:%Y-%m-%d %H:%M UTC}",
        "machine": {**_measure.machine(), "isa": _native.isa()},
    }
    if args.route_sweep:
        found |= routes.sweep(args.dtype, args.quick, emit)
        print(routes.table(found))
    else:
        problems = [(shape, uv) for uv in (True, False) for shape in shapes]
        found["rows"] = [emit(measure(shape, args.dtype, uv, seconds)) for shape, uv in problems]
        if not args.shapes:
            found["memory"] = [emit(r) for r in process.memory(args.quick)]
            found["import"] = emit(process.import_time(3 if args.quick else 9))
        print(table(found["rows"]))
    if args.publish:
        kind = "routes" if args.route_sweep else "svd"
        args.json = report.RESULTS / f"{now:%Y-%m-%d}-{kind}-{args.dtype}.json"
    if args.json:
        write(args.json, found)
    if args.publish and not args.route_sweep:
        report.publish(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
