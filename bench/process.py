"""What needs a process of its own: peak memory of a call, and the time that import adds."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from bench.common import Json

SHAPES = ((200000, 8, 8), (8192, 32, 32), (512, 128, 128), (1, 2048, 2048), (1, 4096, 2048))
QUICK = ((20000, 8, 8),)

# Linux only: writing 5 to clear_refs resets the high-water mark that VmHWM reports.
_MEMORY = """
import json, sys
import jax, jax.numpy as jnp
import jaxmetal_linalg as jml

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

name, shape = sys.argv[1], tuple(map(int, sys.argv[2].split("x")))
svd = jml.svd if name == "ours" else jnp.linalg.svd
f = jax.jit(lambda x: svd(x, full_matrices=False))
a = jax.random.normal(jax.random.key(0), shape, jnp.float32)
jax.block_until_ready(f(a[:, :2, :2]))  # code and thread pools are not what is measured
compiled = f.lower(a).compile()
jax.block_until_ready(a)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
out = jax.block_until_ready(compiled(a))
extra = status("VmHWM") - before
outputs = sum(x.nbytes for x in out)
print(json.dumps({"input": a.nbytes, "outputs": outputs, "extra": extra}))
"""

_IMPORT = """
import time
start = time.perf_counter()
import jax
middle = time.perf_counter()
import jaxmetal_linalg
print(middle - start, time.perf_counter() - middle)
"""


def _python(code: str, *args: str) -> str:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def memory(quick: bool) -> list[Json]:
    """Peak memory of one warm call beyond its input, ours and jnp's.

    ``copies`` is that peak without the outputs, in units of the input.
    """
    rows = []
    for shape in QUICK if quick else SHAPES:
        text = "x".join(map(str, shape))
        row: Json = {"op": "svd memory", "shape": text}
        for name in ("ours", "jnp"):
            found = json.loads(_python(_MEMORY, name, text))
            copies = (found["extra"] - found["outputs"]) / found["input"]
            row |= {f"{name}_extra_bytes": found["extra"], f"{name}_copies": round(copies, 2)}
            row |= {"input_bytes": found["input"], "output_bytes": found["outputs"]}
        rows.append(row)
    return rows


def import_time(repeats: int) -> Json:
    """Milliseconds that ``import jaxmetal_linalg`` adds to ``import jax``; medians."""
    pairs = [tuple(map(float, _python(_IMPORT).split())) for _ in range(repeats + 1)][1:]
    return {
        "op": "import",
        "jax_ms": round(statistics.median(p[0] for p in pairs) * 1e3, 1),
        "added_ms": round(statistics.median(p[1] for p in pairs) * 1e3, 1),
        "repeats": repeats,
    }
