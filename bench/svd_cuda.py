"""Times ``svd`` on an NVIDIA GPU through JAX, beside every peer that is installed, in one run.

    python -m bench.svd_cuda --json bench/results/FILE.json     needs JAX with cuda; torch if there
    python -m bench.svd_cuda --publish bench/results/FILE.json  README.md's table and the plots
    python -m bench.svd_cuda --shapes 1x512x512 --peers 'jnp,torch gesvda' --json FILE

Per shape, U and V in float32. ``device_ms`` is the time of a call among calls enqueued back to back
with one wait at the end, so the host's part is hidden wherever the GPU is the slower of the two.
Where that takes less than ``HOST_MS`` the host may be the slower one: then it is ``enqueued_ms``,
and ``device_ms`` is the lesser of it and the time of a call among ``TOGETHER`` in one program, on
as many inputs: for JAX one jitted function, for torch a CUDA graph where it can be captured.
``wall_ms`` is one jitted call with its wait; ``cold_ms`` is the first call, tracing and compiling
included. Medians, contenders in turn. Ratios are the fastest peer's device time over ours, first
among all peers, then among those whose accuracy also holds (test ratios below 5). Accuracy is the
worst test ratio of a few matrices, Gaussian and of condition 1e6. A contender whose single call
takes longer than ``SLOW_MS`` is timed once.

cuSolverDx is no peer. Neither 0.2.0, in nvidia-mathdx 25.6.0 (the newest on PyPI on 2026-11-21),
nor the C interface of nvidia-libmathdx-cu13 0.4.1 has an SVD; the latter ends at Hermitian
eigenvalues (heev), which singular values reach only squared or in a matrix of twice the size.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmetal_linalg as jml
from bench import report
from bench.common import (
    SLOW_MS,
    Json,
    emit,
    gpu_times,
    label,
    matrices,
    milliseconds,
    parse_shape,
    torch_array,
    wait,
)
from jaxmetal_linalg import _cuda, _measure
from jaxmetal_linalg._accuracy import ACC_RATIO

SHAPES = (
    (10000, 8, 8),
    (10000, 16, 16),
    (10000, 32, 32),
    (1024, 64, 64),
    (64, 128, 128),
    (1024, 128, 128),
    (64, 256, 256),
    (1, 512, 512),
    (1, 1024, 1024),
    (1, 2048, 2048),
    (1, 4096, 4096),
    (1, 4096, 2048),
    (1, 4096, 11008),
    (10000, 64, 8),
    (64, 2048, 64),
    (1, 100000, 64),
    (1, 1000000, 32),
)
# Fixed n^2 batch, for the plot of time against n; then doubling batches.
BY_N = tuple(
    (max(1, 2**21 // n**2), n, n) for n in (8, 12, 16, 24, 32, 40, 48, 64, 96, 128, 192, 256)
)
BY_BATCH = tuple((2**k, 32, 32) for k in range(0, 17, 2)) + tuple((2**k, 64, 64) for k in range(12))
# Of the other types, beside jnp alone.
BY_TYPE = {
    "float64": ((10000, 8, 8), (10000, 16, 16), (10000, 32, 32), (64, 32, 32), (10000, 32, 16)),
    "complex128": ((10000, 8, 8), (10000, 16, 16), (10000, 32, 32), (64, 32, 32)),
    "complex64": (
        *((1024, 33, 33), (1024, 64, 64), (64, 128, 128), (64, 256, 256), (64, 512, 512)),
        *((1, 64, 64), (8, 256, 256), (64, 300, 64)),
    ),
}
MIXED = 4  # matrices judged a kind
HOST_MS, TOGETHER = 1.0, 16


def _thin(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    @jax.jit
    def run(a: jax.Array) -> Any:
        return tuple(function(a, full_matrices=False, **options))

    return run


def contenders(torch_too: bool) -> dict[str, Callable[[Any], Any]]:
    """Ours first; JAX functions take a JAX array, torch's a tensor of its own."""
    found: dict[str, Callable[[Any], Any]] = {
        "ours": _thin(jml.svd),
        "jnp": _thin(jnp.linalg.svd),
    }
    for name in ("QR", "JACOBI", "POLAR"):
        algorithm = jax.lax.linalg.SvdAlgorithm[name]
        found[f"lax {name.lower()}"] = _thin(jax.lax.linalg.svd, algorithm=algorithm)
    if torch_too:
        import torch

        for driver in ("gesvdj", "gesvda", "gesvd"):
            found[f"torch {driver}"] = functools.partial(
                torch.linalg.svd, full_matrices=False, driver=driver
            )
    return found


def _ms(run: Callable[[Any], Any], a: Any, calls: int = 1) -> float:
    return milliseconds(run, a, calls, wait)


def cond1e6(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Matrices with singular values from 1 to 1e-6, evenly in the logarithm."""
    b, m, n = shape
    k = min(m, n)
    rng = np.random.default_rng(1)
    u = np.linalg.qr(rng.standard_normal((b, m, k)))[0]
    v = np.linalg.qr(rng.standard_normal((b, n, k)))[0]
    a = (u * np.logspace(0, -6, k)) @ np.swapaxes(v, -1, -2)
    return jnp.asarray(a, dtype)


def _ratio(run: Callable[[Any], Any], a: jax.Array, is_torch: bool) -> float:
    out = run(torch_array(a) if is_torch else a)
    parts = [x.cpu().numpy() if is_torch else np.asarray(x) for x in out]
    return max(_measure.svd_ratios(np.asarray(a), *parts))


def _together(run: Callable[[Any], Any], a: Any) -> Callable[[int], float]:
    """The clock of a call among TOGETHER in one program."""
    program: Callable[[Any], Any]
    if isinstance(a, jax.Array):
        inputs = [jnp.roll(a, i, axis=0) for i in range(TOGETHER)]
        program = jax.jit(lambda xs: tuple(part for x in xs for part in run(x)))
    else:
        import torch

        inputs = [torch.roll(a, i, 0) for i in range(TOGETHER)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [run(x) for x in inputs]

        def program(_: Any) -> Any:
            graph.replay()
            return kept[0]

    _ms(program, inputs)
    return lambda calls: _ms(program, inputs, calls) / TOGETHER


def _device_ms(run: Callable[[Any], Any], a: Any, enqueued_ms: float) -> Json:
    """What of a contender's row says how long the device takes."""
    if enqueued_ms >= HOST_MS:
        return {"device_ms": round(enqueued_ms, 4)}
    found: Json = {"enqueued_ms": round(enqueued_ms, 4)}
    try:
        clock = _together(run, a)
        found["together_ms"] = round(statistics.median(clock(5) for _ in range(5)), 4)
    except Exception as e:  # this driver of torch waits for the GPU: nothing that a graph can hold
        found["together_gap"] = f"{type(e).__name__}: {e}".splitlines()[0][:120]
    return {**found, "device_ms": min(found["enqueued_ms"], found.get("together_ms", enqueued_ms))}


def measure(
    shape: tuple[int, ...],
    names: list[str],
    accuracy: bool,
    seconds: float,
    dtype: str = "float32",
) -> Json:
    """One row: every contender at one shape."""
    a = matrices(shape, dtype)
    runs = {k: v for k, v in contenders(_has_torch()).items() if k in names}
    inputs: dict[str, Any] = {k: torch_array(a) if k.startswith("torch") else a for k in runs}
    rows: dict[str, Json] = {}
    first: dict[str, float] = {}
    for name, run in runs.items():
        try:
            cold = _ms(run, inputs[name])
            warm = _ms(run, inputs[name])
        except Exception as e:  # a peer that cannot do a shape is a gap in the table
            rows[name] = {"gap": f"{type(e).__name__}: {e}".splitlines()[0][:120]}
            continue
        rows[name] = {"cold_ms": round(cold, 2)}
        first[name] = warm
    quick = {k: ms < SLOW_MS for k, ms in first.items()}
    cost = sum(ms / 1e3 for k, ms in first.items() if quick[k]) or 1e-3
    rounds = int(np.clip(seconds / (4 * cost), 3, 9))
    clocks = [functools.partial(_ms, runs[k], inputs[k]) for k in first]
    for k, times in zip(first, gpu_times(clocks, list(first.values()), rounds), strict=True):
        rows[k] |= {"wall_ms": round(times.wall_ms, 4)}
        rows[k] |= _device_ms(runs[k], inputs[k], times.device_ms)
    if accuracy:
        few = (min(shape[0], MIXED), *shape[1:])
        kinds = {"gaussian": matrices(few, dtype), "cond1e6": cond1e6(few, dtype)}
        for k in first:
            if quick[k]:
                rows[k]["ratios"] = {
                    kind: round(_ratio(runs[k], x, k.startswith("torch")), 2)
                    for kind, x in kinds.items()
                }
    (call,) = jml.explain(lambda x: jml.svd(x, full_matrices=False), a).calls
    row: Json = {"op": "svd", "shape": label(shape), "dtype": dtype, "device": call.device}
    row |= {"route": call.route, "variant": call.variant, "launches": call.launches}
    return {**row, "rounds": rounds, "ours": rows.pop("ours"), "peers": rows}


def _has_torch() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def fastest(row: Json, accurate: bool) -> tuple[str, float]:
    """The fastest peer of a row (that keeps the test ratios), and its time over ours."""
    ours = row["ours"]["device_ms"]
    found = [
        (p["device_ms"] / ours, name)
        for name, p in row["peers"].items()
        if "gap" not in p and (not accurate or max(p.get("ratios", {"": 99}).values()) < ACC_RATIO)
    ]
    ratio, name = min(found, default=(float("nan"), "-"))
    return name, ratio


def dispatch_us(repeats: int = 300) -> Json:
    """Host time of a small jitted call that is waited for: ours, and XLA's own smallest kernel."""
    a = matrices((1, 8, 8), "float32")
    calls: dict[str, Callable[[Any], Any]] = {
        "svd 8x8": _thin(jml.svd),
        "x + 1": jax.jit(lambda x: (x + 1,)),
    }
    out: Json = {}
    for name, run in calls.items():
        _ms(run, a)
        out[name] = round(1e3 * statistics.median(_ms(run, a) for _ in range(repeats)), 1)
    return out


def markdown(result: Json, path: Path) -> str:
    """README.md's table."""
    m = result["machine"]
    lines = [
        f"{result['date']}, {m['gpu']}, driver for CUDA {m['driver']}, jax {m['jax']}, "
        f"torch {m['torch']}; milliseconds on the device, medians; numbers, wall and first-call "
        f"times in `bench/results/{path.name}`. Accuracy is the worst LAPACK test ratio on "
        "Gaussian / condition 1e6 matrices.",
        "",
        "| shape | route | ms | accuracy | fastest peer | its ms, accuracy | ratio "
        "| fastest accurate peer | ratio | jnp ratio |",
        "|" + "---|" * 10,
    ]
    for r in result["rows"]:
        any_name, any_ratio = fastest(r, accurate=False)
        good_name, good_ratio = fastest(r, accurate=True)
        peer = r["peers"].get(any_name, {})
        jnp_row = r["peers"]["jnp"]
        jnp_ratio = jnp_row["device_ms"] / r["ours"]["device_ms"] if "gap" not in jnp_row else 0
        accurate = f"{good_name} | {good_ratio:.3g}x" if good_name != "-" else "- | -"
        lines.append(
            f"| {r['shape']} | {r['route']}/{r['variant']} | {r['ours']['device_ms']:.3g} "
            f"| {_ratios(r['ours'])} | {any_name} "
            f"| {peer.get('device_ms', float('nan')):.3g}, {_ratios(peer)} | **{any_ratio:.2f}x** "
            f"| {accurate} | {jnp_ratio:.3g}x |"
        )
    us = result["dispatch_us"]
    lines += ["", "A jitted call that is waited for, in microseconds: "]
    lines[-1] += ", ".join(f"{k} {v:g}" for k, v in us.items()) + "."
    lines += ["", "![Time against n and against the batch](docs/bench-cuda.png)", ""]
    return "\n".join(lines)


def _ratios(peer: Json) -> str:
    return " / ".join(f"{x:.2g}" for x in peer.get("ratios", {}).values()) or "-"


def draw(result: Json, path: Path) -> None:
    """Time against n at fixed work, time against the batch, and error against time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    by_n = [(int(r["shape"].split("x")[-1]), r) for r in result["by_n"]]
    for name, colour in (("ours", "#c2410c"), ("jnp", "#1d4ed8"), ("torch gesvda", "#6b7280")):
        points = [(n, r["ours"] if name == "ours" else r["peers"].get(name, {})) for n, r in by_n]
        kept = [(n, p["device_ms"]) for n, p in points if "device_ms" in p]
        left.plot(*zip(*kept, strict=True), "o-", ms=3, color=colour, label=name)
    left.set_title("ms against n, n² · batch = 2²¹", loc="left", fontsize=9)
    for n, colour in ((32, "#c2410c"), (64, "#1d4ed8")):
        kept = []
        for r in result["by_batch"]:
            sizes = [int(x) for x in r["shape"].split("x")]
            if sizes[-1] == n:
                kept.append((sizes[0] if len(sizes) == 3 else 1, r["ours"]["device_ms"]))
        middle.plot(*zip(*kept, strict=True), "o-", ms=3, color=colour, label=f"ours, n = {n}")
    middle.set_title("ms against the batch", loc="left", fontsize=9)
    for name in ("ours", "jnp", "lax polar", "torch gesvda", "torch gesvdj"):
        rows = [r["ours"] if name == "ours" else r["peers"].get(name, {}) for r in result["rows"]]
        kept = [(p["device_ms"], max(p["ratios"].values())) for p in rows if "ratios" in p]
        right.plot(*zip(*kept, strict=True), "o", ms=4, label=name, alpha=0.7)
    right.axhline(ACC_RATIO, color="#1b1f24", lw=0.8)
    right.set_title("worst test ratio against ms (bound 5)", loc="left", fontsize=9)
    for axis in (left, middle, right):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.legend(frameon=False, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def publish(path: Path) -> None:
    """Puts the table between README.md's markers; draws docs/bench-cuda.png, given its rows."""
    result = json.loads(path.read_text())
    report.replace_between("bench-cuda", markdown(result, path))
    if "by_batch" in result:
        draw(result, report.ROOT / "docs" / "bench-cuda.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--publish", type=Path, help="write README.md and plots from this result")
    parser.add_argument("--seconds", type=float, default=4.0, help="about this long a shape")
    parser.add_argument("--shapes", help="BATCHxMxN, comma separated, and nothing else")
    parser.add_argument("--peers", help="comma separated; those that are slow take minutes")
    options = parser.parse_args()
    if options.publish:
        publish(options.publish)
        return 0
    if _cuda.missing():
        print(f"bench.svd_cuda: {_cuda.missing()}", file=sys.stderr)
        return 1
    names = list(contenders(_has_torch()))
    if options.peers:
        names = ["ours", *options.peers.split(",")]
    shapes_asked = tuple(map(parse_shape, options.shapes.split(","))) if options.shapes else SHAPES
    result: Json = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    state = _cuda.state()
    torch_version = "none"
    if _has_torch():
        import torch

        torch_version = torch.__version__
    result["machine"] = {
        **_measure.machine(),
        "gpu": state["gpus"][0]["name"],
        "driver": state["driver"],
        "nvrtc": state["nvrtc"],
        "torch": torch_version,
    }
    result["dispatch_us"] = dispatch_us()
    print(result["dispatch_us"], flush=True)
    few = ["ours", "jnp", "torch gesvda"]

    def add(key: str, row: Json) -> None:
        result.setdefault(key, []).append(row)
        emit(row)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")

    for key, shapes, kept, seconds, accuracy in (
        ("rows", shapes_asked, names, options.seconds, True),
        ("by_n", () if options.shapes else BY_N, few, 0.5, False),
        ("by_batch", () if options.shapes else BY_BATCH, ["ours"], 0.2, False),
    ):
        for shape in shapes:
            # One matrix after the other is what these do: seconds to minutes for thousands.
            loops = shape[0] > 64
            wanted = [k for k in kept if not (loops and k in SERIAL)]
            add(key, measure(shape, wanted, accuracy, seconds))
    with jax.enable_x64(True):
        for dtype, of_type in ({} if options.shapes else BY_TYPE).items():
            for shape in of_type:
                add("by_type", measure(shape, few[:2], True, 0.5, dtype))
    return 0


SERIAL = ("lax qr", "lax polar", "torch gesvd")

if __name__ == "__main__":
    sys.exit(main())
