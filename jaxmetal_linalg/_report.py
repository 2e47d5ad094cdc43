"""``doctor --report``: the self-checks and some timings of this machine, to attach to an issue.

The project has no Apple hardware of its own: what is known of it comes from such reports.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmetal_linalg import _device, _doctor, _metal, _native
from jaxmetal_linalg._explain import explain
from jaxmetal_linalg.primitives.svd import svd

SHAPES = (
    (10000, 8, 8),
    (4096, 16, 16),
    (1024, 32, 32),
    (256, 64, 64),
    (64, 128, 128),
    (1, 512, 512),
)
SECONDS = 1.0  # of a row
PEER = "jnp on cpu"
FORMAT = "jaxmetal_linalg report 1"

# The simulator is for finding faults; its times say nothing.
TIMED = ("host", "metal", "cuda")


def _thin(a: Any) -> Any:
    return svd(a, full_matrices=False)


def _jnp(a: Any) -> Any:
    return jnp.linalg.svd(a, full_matrices=False)


def _times(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each, called in turn so that the machine's drift meets all alike."""
    for f in functions.values():
        jax.block_until_ready(f())
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, f in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(f())
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _row(shape: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """The times of a shape, or ``{"shape", "dtype", "error"}``: a report is most wanted then."""
    try:
        return _timed_row(shape, seconds)
    except Exception as e:
        return {"shape": list(shape), "dtype": "float32", "error": f"{type(e).__name__}: {e}"}


def _timed_row(shape: tuple[int, ...], seconds: float) -> dict[str, Any]:
    a = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    runs: dict[str, Callable[[], Any]] = {}
    routes: dict[str, str] = {}
    for device in (d for d in _device.devices() if d in TIMED):
        with _device.arrays_for(device):
            (call,) = explain(_thin, a).calls
            compiled = jax.jit(_thin).lower(a).compile()
            x = jax.device_put(a)
        routes[device] = f"{call.device}/{call.route}/{call.variant}"
        runs[device] = lambda f=compiled, x=x: f(x)  # type: ignore[misc]
    x = jax.device_put(a, jax.devices("cpu")[0])
    peer = jax.jit(_jnp).lower(x).compile()
    runs[PEER] = lambda: peer(x)
    times = _times(runs, seconds)
    return {
        "shape": list(shape),
        "dtype": "float32",
        "routes": routes,
        "median_ms": {k: statistics.median(v) for k, v in times.items()},
        "min_ms": {k: min(v) for k, v in times.items()},
        "calls": {k: len(v) for k, v in times.items()},
    }


def collect(seconds: float = SECONDS) -> dict[str, Any]:
    """The report as JSON-ready values.

    ``{"format", "date", "doctor", "rows", "metal", "launches", "environment"}``: when, what
    ``doctor`` found, times, the Apple GPU with counts of what was done on it, launches by kernel,
    and the variables that may explain a surprise. The home folder's name is not in it.
    """
    report = {
        "format": FORMAT,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "doctor": _doctor.doctor().to_dict(),
        "rows": [_row(shape, seconds) for shape in SHAPES],
        "metal": _native.metal() if _native.available() else _metal.state(),
        "launches": _native.launches(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("JAX", "XLA_"))},
    }
    home = json.dumps(str(Path.home()))[1:-1]
    found: dict[str, Any] = json.loads(json.dumps(report).replace(home, "~"))
    return found


def markdown(report: dict[str, Any]) -> str:
    """The same for people."""
    doctor, machine = report["doctor"], report["doctor"]["machine"]
    failed = [c for c in doctor["checks"] if not c["ok"]]
    gpu = report["metal"].get("name") or f"none: {report['metal']['problem']}"
    lines = [
        f"# jaxmetal_linalg report, {report['date']}",
        "",
        f"- machine: {machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        f"- versions: Python {machine['python']}, jax {machine['jax']}, jaxlib {machine['jaxlib']}",
        f"- Apple GPU: {gpu}",
        f"- self-checks: {len(doctor['checks']) - len(failed)} of {len(doctor['checks'])} passed",
        *(f"  - FAILED {c['op']} on {c['device']}, {c['name']}: {c['detail']}" for c in failed),
        "",
        "svd of float32, thin factors; median milliseconds of a call:",
        "",
        *table(report["rows"]),
    ]
    for row in report["rows"]:
        if "error" in row:
            shape = "x".join(map(str, row["shape"]))
            lines += ["", f"{shape} FAILED:", "", "```", row["error"], "```"]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of the medians, one column a device, and what metal gains on jnp."""
    columns = list(dict.fromkeys(k for row in rows for k in row.get("median_ms", ())))
    ratio = {"metal", PEER} <= set(columns)
    heads = ["shape", *columns, *([f"{PEER} / metal"] if ratio else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        ms = row.get("median_ms", {})
        cells = [f"{ms[c]:.3g}" if c in ms else "-" for c in columns]
        if ratio:
            both = {"metal", PEER} <= set(ms)
            cells.append(f"{ms[PEER] / ms['metal']:.2f}x" if both else "-")
        lines.append("| " + " | ".join(["x".join(map(str, row["shape"])), *cells]) + " |")
    return lines


def write(folder: Path, seconds: float = SECONDS) -> tuple[Path, Path, bool]:
    """Writes both files; returns their paths and whether every self-check and shape passed."""
    report = collect(seconds)
    stem = f"jaxmetal-report-{report['date'][:19].replace(':', '')}"
    folder.mkdir(parents=True, exist_ok=True)
    data, text = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text.write_text(markdown(report), encoding="utf-8")
    ok = report["doctor"]["ok"] and not any("error" in row for row in report["rows"])
    return data, text, bool(ok)
