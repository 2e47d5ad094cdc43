"""Times ``rsvd`` beside a peer at equal error, in one run.

    python -m bench.rsvd                         4096x4096, 8192x1024 and 30522x384, k = 100
    python -m bench.rsvd --quick                 a smoke test of a few seconds
    python -m bench.rsvd --shapes 2000x500 --k 20 --json FILE

The peer is scikit-learn's ``randomized_svd`` with its defaults, or on an NVIDIA GPU, at 4096x4096,
8192x8192 and 10000x10000, ``torch.svd_lowrank`` with 10 columns more than k and two iterations;
either is optional. The matrices have singular values 1/i and exp(-i/50) (above 1e-6) and random
vectors. Ours runs with its defaults, and once more with the fewest power iterations whose error
``|A - U S Vh|_2`` is no larger than the peer's: that row is the comparison at equal error. All are
called in turn; ratios are the peer's time over ours. On a GPU ``median_ms`` and ``min_ms`` are of
calls enqueued back to back, ``wall_ms`` of one that is waited for.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jaxmetal_linalg as jml
from bench.common import Json, emit, gpu_times, milliseconds, torch_array, wait, write
from jaxmetal_linalg import _measure

SHAPES = ((4096, 4096), (8192, 1024), (30522, 384))
GPU_SHAPES = ((4096, 4096), (8192, 8192), (10000, 10000))
QUICK = ((300, 200),)
SPECTRA: dict[str, Callable[[Any], Any]] = {
    "1/i": lambda i: 1 / i,
    "exp(-i/50)": lambda i: np.maximum(np.exp(-i / 50), 1e-6),
}


def matrix(shape: tuple[int, int], spectrum: str) -> tuple[jax.Array, NDArray[Any]]:
    """A float32 matrix with known singular values, and these."""
    k = min(shape)
    # float32 throughout: what counts is the matrix that comes of it, not its ancestors.
    keys = jax.random.split(jax.random.key(0))
    u, v = (
        jnp.linalg.qr(jax.random.normal(key, (n, k)))[0] for key, n in zip(keys, shape, strict=True)
    )
    sigma = SPECTRA[spectrum](np.arange(1.0, k + 1))
    return jnp.matmul(u * np.float32(sigma), v.T, precision="highest"), sigma


def error(a: jax.Array, result: Any) -> float:
    """|A - U S Vh|_2 by power iteration; from below, by a percent or less."""
    factors = tuple(jnp.asarray(np.asarray(x)) for x in result)
    x = jax.random.normal(jax.random.key(1), (a.shape[1], 4))
    for _ in range(30):
        x, size = _power(a, factors, x)
    return float(size)


@jax.jit
def _power(a: jax.Array, factors: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    u, s, vh = factors
    with jax.default_matmul_precision("highest"):
        x = jnp.linalg.qr(x)[0]
        y = a @ x - u @ (s[:, None] * (vh @ x))
        return a.T @ y - vh.T @ (s[:, None] * (u.T @ y)), jnp.linalg.norm(y, 2)


Run = Callable[[], Any]


def _ours(a: jax.Array, k: int, **options: Any) -> Run:
    compiled = jax.jit(lambda x: tuple(jml.rsvd(x, k, **options)))
    return lambda: compiled(a)


def _peer(a: jax.Array, k: int) -> tuple[str, Run, Callable[[Any], Any]] | None:
    """Its name, a call, and what turns its result into u, s, vh."""
    try:
        if _on_gpu():
            import torch

            on_gpu = torch_array(a)

            def run() -> Any:
                torch.manual_seed(0)  # one sketch, so one error, in every call
                return torch.svd_lowrank(on_gpu, k + 10, niter=2)

            return (
                "torch",
                run,
                lambda r: (r[0][:, :k].cpu(), r[1][:k].cpu(), r[2][:, :k].T.cpu()),
            )
        from sklearn.utils.extmath import randomized_svd
    except ImportError:
        return None
    host, call = np.asarray(a), functools.partial(randomized_svd, random_state=0)
    return "sklearn", lambda: call(host, k), lambda r: r


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _clock(run: Run) -> Callable[[int], float]:
    return lambda calls: milliseconds(lambda _: run(), None, calls, wait)


def _times(runs: dict[str, Run], seconds: float) -> dict[str, Json]:
    names, calls = list(runs), list(runs.values())
    if _on_gpu():
        clocks = [_clock(run) for run in calls]
        first = [(clock(1), clock(1))[1] for clock in clocks]
        rounds = int(np.clip(seconds * 1e3 / (4 * sum(first)), 3, 15))
        found = gpu_times(clocks, first, rounds)
        return {
            name: {"median_ms": round(t.device_ms, 3), "wall_ms": round(t.wall_ms, 3)}
            for name, t in zip(names, found, strict=True)
        }
    trial = _measure.interleaved(calls, (), 1)
    round_ms = sum(_measure.turn_ms(t.warm_ms[0]) for t in trial)
    warm = _measure.interleaved(calls, (), int(np.clip(seconds * 1e3 / round_ms, 3, 15)))
    return {
        name: {
            "median_ms": round(statistics.median(t.warm_ms), 2),
            "min_ms": round(min(t.warm_ms), 2),
        }
        for name, t in zip(names, warm, strict=True)
    }


def measure(shape: tuple[int, int], spectrum: str, k: int, seconds: float) -> Json:
    """One row: our defaults, ours at equal error, and the peer, interleaved."""
    a, sigma = matrix(shape, spectrum)
    runs = {"ours": _ours(a, k)}
    convert = {"ours": lambda r: r}
    row: Json = {"op": "rsvd", "shape": "x".join(map(str, shape)), "spectrum": spectrum, "k": k}
    found = _peer(a, k)
    if found is not None:
        peer, run, convert[found[0]] = found
        runs[peer] = run
        goal = error(a, convert[peer](run()))
        for n_iter in range(8):
            equal = _ours(a, k, n_iter=n_iter)
            if error(a, equal()) <= goal * (1 + 1e-6):
                break
        runs["ours, equal error"] = equal
        row["equal_error_n_iter"] = n_iter
    times = _times(runs, seconds)
    for name, run in runs.items():
        of = error(a, convert.get(name, convert["ours"])(run()))
        row[name] = {**times[name], "error_over_best": round(of / float(sigma[k]), 5)}
    if found is not None:
        for name in ("ours", "ours, equal error"):
            for kind in ("median", "min"):
                if f"{kind}_ms" in row[name]:
                    ratio = row[peer][f"{kind}_ms"] / row[name][f"{kind}_ms"]
                    row[name][f"{kind}_ratio"] = round(ratio, 2)
    return row


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.rsvd", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, a few seconds")
    parser.add_argument("--shapes", help="MxN, comma separated")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=10.0, help="time budget of one row")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_args(argv)
    shapes: Any = QUICK if args.quick else GPU_SHAPES if _on_gpu() else SHAPES
    if args.shapes:
        shapes = [tuple(int(x) for x in text.split("x")) for text in args.shapes.split(",")]
    k = min(args.k, 20) if args.quick else args.k
    seconds = 0.2 if args.quick else args.seconds
    rows = []
    for shape in shapes:
        for spectrum in SPECTRA:
            rows.append(emit(measure(shape, spectrum, k, seconds)))
    if args.json:
        write(args.json, {"machine": _measure.machine(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
