"""Times every row of kernels/gemv.metal on an NVIDIA GPU against cuBLAS, and checks its error.

Needs torch with CUDA and NVRTC (both come with the torch wheel); no network, nothing built before.

    PYTHONPATH=. python3 bench/gpu_gemv.py [--json FILE] [--table] [--budget SECONDS]

Times are device times of one call: the best of several replays of a CUDA graph that holds the call
on each of as many copies of the matrix as fill four times the L2, divided by their number. cuBLAS
is timed the same way. % of copy: bytes read and written, over what copying a
GiB within the device moves in the same time. Error: the worst of |result - exact| / (|A| |x|), in
units of the bound 2 eps + k eps32. A row that fails, or for which no time was left, is a gap.
Rows that are in no table are timed too, to find better ones, unless --table is given.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import gpu_launch  # noqa: E402
from tools.msl.emit import emit_cuda  # noqa: E402
from tools.msl.layout import GemvVariant, gemv_parts, gemv_variants, structure  # noqa: E402
from tools.msl.parse import Unit, parse_file  # noqa: E402

SOURCE = ROOT / "kernels" / "gemv.metal"
TAGS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
STORAGE = {"f16": ("half", 1), "bf16": ("bfloat", 2), "f32": ("float", 0)}
AHEAD = int(re.findall(r"kGemvAhead = (\d+)", SOURCE.read_text())[0])
EPS = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24}
# outputs, depth, vectors, transposed, epilogue
SHAPES = [
    *((9728, 896, 1, False, ""), (896, 4864, 1, False, ""), (896, 896, 1, False, "")),
    *((151936, 896, 1, False, ""), (1152, 896, 1, False, "bias"), (8192, 8192, 1, False, "")),
    *((28672, 8192, 1, False, ""), (4096, 4096, 1, False, ""), (11008, 4096, 1, False, "")),
    *((896, 896, 1, False, "all"), (9728, 896, 1, False, "all"), (896, 4864, 1, False, "all")),
    *((4095, 4097, 1, False, ""), (16, 262144, 1, False, ""), (100000, 64, 1, False, "")),
    *((9728, 896, n, False, "") for n in (2, 4, 8, 16)),
    *((4096, 4096, n, False, "") for n in (2, 4, 8, 16)),
    *((4096, 4096, 1, True, ""), (896, 4864, 1, True, ""), (9728, 896, 1, True, "")),
    *((4095, 4097, 1, True, ""), (4096, 4096, 8, True, "")),
]
# function, words, lanes, rows, unroll, simdgroups; words 1 is for 16-bit numbers, 0 for others
EXPLORE = [
    *(("gemv_columns", w, 32, 1, u, s) for w in (4, 1) for u in (8, 16) for s in (8, 16, 32)),
    *(("gemv_rows", 4, lanes, r, u, 4) for lanes in (4, 8) for r in (1, 2, 4) for u in (1, 2)),
    *(("gemv_rows", 4, 32, 2, u, g) for u in (2, 4) for g in (1, 2, 8)),
    *(("gemv_split", 4, 32, r, u, s) for r in (1, 2) for u in (2, 4) for s in (2, 4, 8)),
    *(("gemv_split", 0, 32, r, u, s) for r in (2, 4) for u in (4, 8) for s in (4, 8)),
]


class Gpu(gpu_launch.Gpu):
    """Kernels of gemv, compiled side by side."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.unit = unit
        self.source = emit_cuda(unit)
        self.params = structure(unit, "GemvParams")
        self.functions: dict[str, Any] = {}
        self.errors: dict[str, str] = {}

    def compile_all(self, names: list[str]) -> None:
        """Side by side; what fails is in ``errors``."""
        groups = [names[i::32] for i in range(32) if names[i::32]]

        def one(group: list[str]) -> tuple[list[str], bytes | str]:
            try:
                options = [f"-DJM_ENTRY_{n}" for n in group]
                return group, self.nvrtc.compile(self.source, self.arch, options)[0]
            except RuntimeError as e:
                return group, str(e)[:500]

        with ThreadPoolExecutor(16) as pool:
            for group, cubin in pool.map(one, groups):
                try:
                    if isinstance(cubin, str):
                        raise RuntimeError(cubin)
                    self.functions.update(zip(group, self.load(cubin, group), strict=True))
                except RuntimeError as e:
                    self.errors.update(dict.fromkeys(group, str(e)))

    def launch(self, name: str, groups: int, threads: int, shared: int, values: list[Any]) -> None:
        self.run(self.functions[name], groups, threads, shared, values)


def graph_us(call: Callable[[torch.Tensor], Any], matrices: list[torch.Tensor]) -> float:
    """Device microseconds of one call, over a graph of a call on each matrix."""
    inner = max(len(matrices), 8)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(matrices[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(inner):
                call(matrices[i % len(matrices)])
        best = float("inf")
        for _ in range(7):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) * 1000 / inner)
    return best


class Case:
    """One shape and dtype: its tensors, our call of a row, and the calls it is held against."""

    def __init__(self, gpu: Gpu, tag: str, shape: tuple[int, int, int, bool, str]) -> None:
        self.gpu, self.tag, self.dtype = gpu, tag, TAGS[tag]
        self.outputs, self.depth, self.nrhs, self.transposed, self.epilogue = shape
        stored = (self.depth, self.outputs) if self.transposed else (self.outputs, self.depth)
        size = stored[0] * stored[1] * self.dtype.itemsize
        self.bytes = size + (self.depth + self.outputs) * self.nrhs * self.dtype.itemsize
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        copies = max(1, -(-4 * l2 // size))
        first = torch.randn(stored, device="cuda").to(self.dtype)
        self.matrices = [first, *(first.clone() for _ in range(copies - 1))]
        self.x = torch.randn(self.nrhs, self.depth, device="cuda").to(self.dtype)
        self.bias = torch.randn(self.nrhs, self.outputs, device="cuda").to(self.dtype)
        self.residual = torch.randn(self.nrhs, self.outputs, device="cuda").to(self.dtype)
        self.out = torch.empty(self.nrhs, self.outputs, dtype=self.dtype, device="cuda")
        self.flags = {"": 0, "bias": 1, "all": 1 | 4}[self.epilogue]
        self.partial = torch.empty(1 << 24, dtype=torch.float32, device="cuda")
        self.exact, self.scale = self.reference(first)

    def reference(self, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = (a if self.transposed else a.t()).double()
        exact = self.x.double() @ wide
        scale = self.x.double().abs() @ wide.abs_()
        if self.flags & 1:
            exact = exact + self.bias.double()
            scale = scale + self.bias.double().abs()
        if self.epilogue == "all":
            exact = torch.nn.functional.silu(exact) + self.residual.double()
            scale = scale + self.residual.double().abs()
        return exact, scale

    def error(self) -> float:
        bound = (2 * EPS[self.tag] + self.depth * EPS["f32"]) * self.scale
        return float(((self.out.double() - self.exact).abs() / bound).max())

    def peer(self) -> dict[str, Callable[[torch.Tensor], Any]]:
        x, out = self.x, self.out

        def op(a: torch.Tensor) -> torch.Tensor:
            return a.t() if self.transposed else a

        def three(a: torch.Tensor) -> Any:
            z = torch.addmv(self.bias[0], op(a), x[0])
            return torch.nn.functional.silu(z, inplace=True).add_(self.residual[0])

        if self.epilogue == "all":
            return {"addmv+silu+add": three}
        if self.epilogue == "bias":
            return {"addmv": lambda a: torch.addmv(self.bias[0], op(a), x[0], out=out[0])}
        calls: dict[str, Callable[[torch.Tensor], Any]] = {
            "matmul": lambda a: torch.matmul(x, op(a).t(), out=out)
        }
        if self.nrhs == 1:
            calls["mv"] = lambda a: torch.mv(op(a), x[0], out=out[0])
        return calls

    def parts(self, v: GemvVariant) -> int:
        return gemv_parts(v, self.outputs, self.depth, self.gpu.cores)[0]

    def ours(self, v: GemvVariant, once: bool) -> Callable[[torch.Tensor], None]:
        gpu = self.gpu
        parts, part = gemv_parts(v, self.outputs, self.depth, gpu.cores)
        if once:
            parts, part = 1, v.chunks(self.depth)
        p = gpu.params(
            a_batch=0,
            batch=1,
            outputs=self.outputs,
            depth=self.depth,
            stride=self.outputs if self.transposed else self.depth,
            nrhs=self.nrhs,
            rhs_groups=-(-self.nrhs // v.vectors),
            blocks=-(-self.outputs // v.outputs),
            parts=parts,
            part=part,
            flags=self.flags,
            activation=4 if self.epilogue == "all" else 0,
            alpha_re=1.0,
            conjugate=1.0,
        )
        ends = [self.x, self.bias, self.residual, self.out]
        ends_p = [ctypes.c_void_p(t.data_ptr()) for t in ends]
        rest = [ctypes.c_void_p(self.x.data_ptr()), *ends_p]
        partial = [ctypes.c_void_p(self.partial.data_ptr())] if v.splits else []
        groups = p.blocks * p.parts * p.rhs_groups
        total = -(-self.outputs * self.nrhs // 256)

        def call(a: torch.Tensor) -> None:
            values = [ctypes.c_void_p(a.data_ptr()), *rest, *partial, p]
            values.append(ctypes.c_ulong(min(a.nbytes, AHEAD)))
            gpu.launch(v.name, groups, v.threads, v.scratch_bytes, values)
            if parts > 1:
                finish = [*ends_p, *partial, p]
                gpu.launch(f"gemv_finish_{self.tag}", total, 256, 0, finish)

        return call


def rows_for(case: Case, variants: list[GemvVariant], dtype: str) -> list[GemvVariant]:
    """The rows that can do the case; of each kind the one for that many vectors."""
    storage = STORAGE[dtype][0]
    length = case.outputs if case.transposed else case.depth
    best: dict[str, GemvVariant] = {}
    for v in variants:
        same = v.storage == v.x_storage == storage and v.width == 1
        if not same or v.transposed != case.transposed or not v.fits(length):
            continue
        # The fewest vectors that hold the call's, else the most.
        held = best.get(v.variant)
        if held is None or _rank(v, case.nrhs) < _rank(held, case.nrhs):
            best[v.variant] = v
    return list(best.values())


def _rank(v: GemvVariant, nrhs: int) -> tuple[int, int]:
    return (0, v.vectors) if v.vectors >= nrhs else (1, -v.vectors)


def with_explored(text: str) -> str:
    rows = ""
    for tag in ("f16", "f32"):
        storage, kind = STORAGE[tag]
        for function, words, lanes, r, u, s in EXPLORE:
            words = 0 if words == 1 and kind == 0 else words
            short = {"gemv_split": "s", "gemv_rows": "g", "gemv_columns": "c"}[function]
            name = f"gemv_w{words}l{lanes}r{r}u{u}{short}{s}_{tag}_m1"
            numbers = f"{kind}, {kind}, 1, {words}, {lanes}, {r}, {u}, {s}, 1, kGemvReal"
            rows += f"  X({name}, {function}, {storage}, {storage}, {numbers}) \\\n"
    return re.sub(r"(#define GEMV_VARIANTS\(X\) *\\\n)", lambda m: m[1] + rows, text)


def copy_gbps() -> float:
    """By the driver or by a kernel, whichever is faster."""
    a, b = (torch.zeros(1 << 28, dtype=torch.float32, device="cuda") for _ in range(2))
    calls: tuple[Callable[[torch.Tensor], Any], ...] = (b.copy_, lambda x: torch.neg(x, out=b))
    return max(float(2 * a.numel() * 4 / graph_us(call, [a]) / 1000) for call in calls)


def measure(case: Case, variants: list[GemvVariant], dtype: str, copy: float, late: float) -> Any:
    """The row of JSON of one case: peers, then each row of ours."""
    names = ("outputs", "depth", "nrhs", "transposed", "epilogue", "bytes")
    row: dict[str, Any] = {"dtype": dtype, **{k: getattr(case, k) for k in names}}
    row["copy_gbps"] = copy
    row["peers"], row["rows"], row["gaps"] = {}, {}, {}
    for name, peer in case.peer().items():
        try:
            row["peers"][name] = round(graph_us(peer, case.matrices), 3)
        except RuntimeError as e:
            row["gaps"][name] = str(e)[:200]
    trials = [(v, False) for v in rows_for(case, variants, dtype)]
    # Also without sharing sums among threadgroups, which costs a second launch.
    trials += [(v, True) for v, _ in trials if v.splits and case.parts(v) > 1]
    for v, once in trials:
        if time.perf_counter() > late:
            row["gaps"][v.name] = "no time left"
            continue
        if v.name not in case.gpu.functions:
            row["gaps"][v.name] = case.gpu.errors.get(v.name, "not compiled")
            continue
        try:
            call = case.ours(v, once)
            case.out.fill_(float("nan"))
            call(case.matrices[0])
            torch.cuda.synchronize()
            error = case.error()
            us = graph_us(call, case.matrices)
        except RuntimeError as e:
            row["gaps"][v.name] = str(e)[:200]
            continue
        name = v.name + " once" * once
        row["rows"][name] = {"us": round(us, 3), "error": round(error, 4)}
        if not error <= 1.0:
            row["gaps"][v.name] = f"error {error} of the bound"
    return row


def report(row: dict[str, Any], top: int) -> None:
    shape = f"{row['outputs']}x{row['depth']}{'T' if row['transposed'] else ''}"
    head = f"{row['dtype']:4} {shape:>13} x{row['nrhs']:<2} {row['epilogue']:4}"
    peer = min(row["peers"].values(), default=float("nan"))
    ranked = sorted(row["rows"].items(), key=lambda item: item[1]["us"])
    line = f"{head} peer {peer:8.2f} us"
    if ranked:
        best = ranked[0][1]["us"]
        share = 100 * row["bytes"] / best / 1000 / row["copy_gbps"]
        line += f"  best {best:8.2f} us  {peer / best:5.2f}x  {share:5.1f}% of copy |"
        for name, figures in ranked[:top]:
            short = name.removeprefix("gemv_").replace(f"_{row['dtype']}_", " ")
            line += f" {short} {figures['us']:.2f}"
    if row["gaps"]:
        line += f" | gaps {row['gaps']}"
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write one row a shape here")
    parser.add_argument("--table", action="store_true", help="only rows of the table")
    parser.add_argument("--budget", type=float, default=80.0, help="seconds")
    options = parser.parse_args()
    late = time.perf_counter() + options.budget
    text = SOURCE.read_text()
    text = text if options.table else with_explored(text)
    gpu = Gpu(parse_file(SOURCE, "kernels/gemv.metal", text))
    variants = gemv_variants(gpu.unit)
    tags = tuple(TAGS)
    names = [v.name for v in variants if v.name.split("_")[2] in tags]
    gpu.compile_all([*names, *(f"gemv_finish_{t}" for t in tags)])
    copy = copy_gbps()
    left = late - time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, NVRTC {gpu.nvrtc.version}, torch {torch.__version__}")
    print(f"copy {copy:.0f} GB/s; {len(gpu.functions)} kernels compiled, {left:.0f} s left")
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for dtype in TAGS:
            if time.perf_counter() > late:
                print(f"gap: no time left for {dtype} {shape}")
                continue
            try:
                case = Case(gpu, dtype, shape)
                rows.append(measure(case, variants, dtype, copy, late))
                report(rows[-1], 6 if options.table else 9)
            except RuntimeError as e:
                print(f"gap: {dtype} {shape}: {str(e)[:300]}")
    if options.json:
        options.json.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return int(any("error" in g for r in rows for g in r["gaps"].values()))


if __name__ == "__main__":
    sys.exit(main())
