"""Times ``rsvd`` beside scikit-learn's ``randomized_svd`` and ``jnp``, at equal error, in one run.

    python -m bench.rsvd                         4096x4096, 8192x1024 and 30522x384, k = 100
    python -m bench.rsvd --quick                 a smoke test of a few seconds
    python -m bench.rsvd --shapes 2000x500 --k 20 --json FILE

The matrices have singular values 1/i and exp(-i/50) (above 1e-6) and random vectors. scikit-learn
runs with its defaults and is optional. Ours runs with its defaults, and once more with the fewest
power iterations whose error ``|A - U S Vh|_2`` is no larger than scikit-learn's: that row is the
comparison at equal error. All are called in turn; ratios are the peer's time over ours.
"""

from __future__ import annotations

import argparse
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
from bench.common import Json, emit, write
from jaxmetal_linalg import _measure

SHAPES = ((4096, 4096), (8192, 1024), (30522, 384))
QUICK = ((300, 200),)
SPECTRA: dict[str, Callable[[Any], Any]] = {
    "1/i": lambda i: 1 / i,
    "exp(-i/50)": lambda i: np.maximum(np.exp(-i / 50), 1e-6),
}


def matrix(shape: tuple[int, int], spectrum: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """A float32 matrix with known singular values, and these."""
    rng = np.random.default_rng(0)
    k = min(shape)
    # float32 throughout: what counts is the matrix that comes of it, not its ancestors.
    u, v = (np.linalg.qr(rng.standard_normal((n, k), np.float32))[0] for n in shape)
    sigma = SPECTRA[spectrum](np.arange(1.0, k + 1))
    return (u * np.float32(sigma)) @ v.T, sigma


def error(a: NDArray[Any], result: Any) -> float:
    """|A - U S Vh|_2 by power iteration in double precision; from below, by a percent or less."""
    u, s, vh = map(_measure.widen, result)
    x = np.random.default_rng(1).standard_normal((a.shape[1], 4))
    size = 0.0
    for _ in range(30):
        x, _ = np.linalg.qr(x)
        y = a @ np.float32(x) - u @ (s[:, None] * (vh @ x))
        x = a.T @ np.float32(y) - vh.T @ (s[:, None] * (u.T @ y))
        size = float(np.linalg.norm(y, 2))
    return size


def _ours(a: jax.Array, k: int, **options: Any) -> Callable[[], Any]:
    compiled = jax.jit(lambda x: tuple(jml.rsvd(x, k, **options)))
    return lambda: compiled(a)


def _sklearn(a: NDArray[Any], k: int) -> Callable[[], Any] | None:
    try:
        from sklearn.utils.extmath import randomized_svd
    except ImportError:
        return None
    return lambda: randomized_svd(a, k, random_state=0)


def measure(shape: tuple[int, int], spectrum: str, k: int, seconds: float) -> Json:
    """One row: our defaults, ours at equal error, and the peers, interleaved."""
    host, sigma = matrix(shape, spectrum)
    a = jnp.asarray(host)
    runs = {"ours": _ours(a, k)}
    peer = _sklearn(host, k)
    best = float(sigma[k])
    row: Json = {"op": "rsvd", "shape": "x".join(map(str, shape)), "spectrum": spectrum, "k": k}
    if peer is not None:
        runs["sklearn"] = peer
        goal = error(host, peer())
        for n_iter in range(8):
            equal = _ours(a, k, n_iter=n_iter)
            if error(host, equal()) <= goal * (1 + 1e-6):
                break
        runs["ours, equal error"] = equal
        row["equal_error_n_iter"] = n_iter
    trial = _measure.interleaved(list(runs.values()), (), 1)
    round_ms = sum(_measure.turn_ms(t.warm_ms[0]) for t in trial)
    repeats = int(np.clip(seconds * 1e3 / round_ms, 3, 15))
    warm = _measure.interleaved(list(runs.values()), (), repeats)
    row["repeats"] = repeats
    for (name, run), timing in zip(runs.items(), warm, strict=True):
        row[name] = {
            "median_ms": round(statistics.median(timing.warm_ms), 2),
            "min_ms": round(min(timing.warm_ms), 2),
            "error_over_best": round(error(host, run()) / best, 5),
        }
    if peer is not None:
        for name in ("ours", "ours, equal error"):
            for kind in ("median", "min"):
                ratio = row["sklearn"][f"{kind}_ms"] / row[name][f"{kind}_ms"]
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
    shapes: Any = QUICK if args.quick else SHAPES
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
