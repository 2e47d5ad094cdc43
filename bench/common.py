"""What the benchmarks share: their matrices, command lines and output, and the clock of a GPU."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Json = dict[str, Any]


def matrices(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Standard normal matrices ``[batch, m, n]``, the same in every run."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        a = a + 1j * rng.standard_normal(shape)
    return jnp.asarray(a, dtype=dtype)


def label(shape: tuple[int, ...]) -> str:
    """``10000x8x8``; a single matrix without its batch."""
    return "x".join(map(str, shape[1:] if shape[0] == 1 else shape))


def parse_shape(text: str) -> tuple[int, ...]:
    """``label`` backwards: ``MxN`` or ``BATCHxMxN``."""
    sizes = tuple(int(x) for x in text.split("x"))
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected MxN or BATCHxMxN, got {text!r}")
    return sizes if len(sizes) == 3 else (1, *sizes)


def emit(row: Json) -> Json:
    """Prints a row as a line of JSON, and gives it back."""
    print(json.dumps(row), flush=True)
    return row


def write(path: Path, found: Json) -> None:
    """Writes everything that a benchmark found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def aligned(lines: list[list[str]]) -> str:
    """Cells as text, the columns under one another."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


# --- the clock of a GPU -----------------------------------------------------------------------

SLOW_MS = 1e3  # who takes longer for a single call is timed once


class GpuTimes(NamedTuple):
    """Medians: a call among others enqueued back to back, and one call with its wait."""

    device_ms: float
    wall_ms: float


def milliseconds(
    run: Callable[[Any], Any], a: Any, calls: int, wait: Callable[[Any], Any]
) -> float:
    """The time of one of ``calls`` calls, enqueued back to back with one wait at the end."""
    start = time.perf_counter()
    for _ in range(calls):
        out = run(a)
    wait(out)
    return 1e3 * (time.perf_counter() - start) / calls


def torch_array(a: jax.Array) -> Any:
    """A copy of ``a`` on torch's GPU."""
    import torch

    return torch.from_numpy(np.array(a)).cuda()


def wait(out: Any) -> None:
    """Waits for a result of JAX's, or for all that torch's GPU has to do."""
    if isinstance(out[0], jax.Array):
        jax.block_until_ready(out)
    else:
        import torch

        torch.cuda.synchronize()


def gpu_times(
    clocks: Sequence[Callable[[int], float]], first_ms: Sequence[float], rounds: int
) -> list[GpuTimes]:
    """Times contenders in turn; each clock is ``milliseconds`` by the number of calls.

    ``first_ms`` is what one call of each took after the one that compiled it.
    """
    device: list[list[float]] = [[] for _ in clocks]
    wall = [[ms] for ms in first_ms]
    for _ in range(rounds):
        for clock, d, w in zip(clocks, device, wall, strict=True):
            if w[0] >= SLOW_MS:
                continue
            d.append(clock(int(np.clip(20 / w[-1], 2, 20))))
            # Straight after, while clocks are up: the first call after another library is not what
            # repeats.
            w.append(clock(1))
    return [
        GpuTimes(statistics.median(d or w), statistics.median(w[1:] or w))
        for d, w in zip(device, wall, strict=True)
    ]
