"""Runs the kernels of kernels/svd.metal on an NVIDIA GPU: accuracy and time against torch.

Needs torch with CUDA and NVRTC (both come with the torch wheel); no network, nothing built before.

    python3 bench/gpu_kernels.py [--quick] [--fused] [--complex] [--json FILE]

Times are medians of CUDA-event times over calls made back to back, inputs cycled through 4 copies.
Ours is the kernel with outputs allocated before; torch's is its call. Accuracy is the worst of the
batch in the LAPACK test ratios (ulp 2^-23; LAPACK accepts 50, we accept 5) against float64.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import gpu_launch  # noqa: E402
from tools.msl.emit import emit_cuda  # noqa: E402
from tools.msl.layout import (  # noqa: E402
    FusedVariant,
    GridPlan,
    SvdVariant,
    fused_variants,
    grid_params,
    structure,
    svd_variants,
)
from tools.msl.nvrtc import Report, parse_log  # noqa: E402
from tools.msl.parse import parse_file  # noqa: E402

ULP = 2.0**-23
UNIT = parse_file(ROOT / "kernels" / "svd.metal", "kernels/svd.metal")
Params = structure(UNIT, "SvdParams")
STEP_PARAMS = {name: structure(UNIT, name) for name in ("SvdGridParams", "SvdPairsParams")}
DTYPES = {
    **{"float": torch.float32, "half": torch.float16, "bfloat": torch.bfloat16},
    "float2": torch.complex64,
}


class Gpu(gpu_launch.Gpu):
    """The kernels of svd, each compiled when it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: dict[tuple[str, int], tuple[Any, Any, float]] = {}

    def compile(self, name: str, min_groups: int = 0) -> tuple[Any, Any, float]:
        """min_groups: see emit_cuda; 0: as the package compiles it."""
        key = (name, min_groups)
        if key not in self.functions:
            start = time.perf_counter()
            options = [f"-DJM_ENTRY_{name}"]
            options += [f"-DJM_MIN_GROUPS={min_groups}"] if min_groups else []
            cubin, log = self.nvrtc.compile(emit_cuda(UNIT), self.arch, options)
            seconds = time.perf_counter() - start
            (function,) = self.load(cubin, [name])
            # NVRTC says nothing of a kernel that it has in its cache.
            unknown = Report(name, self.arch, -1, -1, -1)
            report = (parse_log(log, self.arch) or [unknown])[0]
            self.functions[key] = (function, report, seconds)
        return self.functions[key]

    def launcher(
        self,
        variant: SvdVariant,
        batch: int,
        m: int,
        n: int,
        u_cols: int,
        *,
        max_sweeps: int = 40,
        min_groups: int = 0,
    ) -> tuple[Callable[[torch.Tensor], None], dict[str, torch.Tensor]]:
        function = self.compile(variant.name, min_groups)[0]
        dtype = DTYPES[variant.storage]
        real = torch.float32 if variant.complex else dtype
        out = {
            "u": torch.empty(batch, m, u_cols, dtype=dtype, device="cuda"),
            "s": torch.empty(batch, n, dtype=real, device="cuda"),
            "vt": torch.empty(batch, n, n, dtype=dtype, device="cuda"),
            "status": torch.full((batch,), -1, dtype=torch.int32, device="cuda"),
            "sweeps": torch.full((batch,), -1, dtype=torch.int32, device="cuda"),
            "off": torch.empty(batch, dtype=torch.float32, device="cuda"),
        }
        p = Params(
            a_batch=m * n,
            u_batch=m * u_cols,
            vt_batch=n * n,
            batch=batch,
            m=m,
            n=n,
            u_cols=u_cols,
            a_row=n,
            a_col=1,
            u_row=u_cols,
            u_col=1,
            vt_row=n,
            vt_col=1,
            tol=max(1.0, math.sqrt(m) / 4) * 2.0**-23,
        )
        names = ["u", "s", "vt"] if variant.vectors else ["s"]
        names += ["status", "sweeps", "off"]
        if variant.twin:
            size = batch * variant.device_scratch_bytes // 4
            out["w"] = torch.empty(size, dtype=torch.float32, device="cuda")
            names.append("w")
        groups = -(-batch // variant.matrices)
        rows = self.compile(variant.rows_name, min_groups)[0] if variant.rows_name else None
        if rows:
            names.remove("u")
        pointers = [ctypes.c_void_p(out[k].data_ptr()) for k in names]
        of_rows = [ctypes.c_void_p(out[k].data_ptr()) for k in ("u", "status", "sweeps", names[-1])]

        def launch(a: torch.Tensor) -> None:
            for sweeps in variant.sweeps(max_sweeps):
                for name, value in sweeps.items():
                    setattr(p, name, value)
                values = [ctypes.c_void_p(a.data_ptr()), *pointers, p]
                self.run(function, groups, variant.threads, variant.scratch_bytes, values)
                if rows:
                    shared = variant.rows_scratch_bytes
                    self.run(rows, groups, variant.threads, shared, [*of_rows, p])

        return launch, out

    def grid_launcher(
        self, plan: GridPlan
    ) -> tuple[Callable[[torch.Tensor], None], dict[str, torch.Tensor]]:
        """Launches every dispatch of the plan; meant to be captured in a CUDA graph."""
        batch, m, n, k = plan.batch, plan.m, plan.n, plan.u_cols
        dtype = DTYPES[plan.storage]
        out = {
            "u": torch.empty(batch, m, k, dtype=dtype, device="cuda"),
            "s": torch.empty(batch, n, dtype=dtype, device="cuda"),
            "vt": torch.empty(batch, n, n, dtype=dtype, device="cuda"),
            "status": torch.full((batch,), -1, dtype=torch.int32, device="cuda"),
            "sweeps": torch.full((batch,), -1, dtype=torch.int32, device="cuda"),
            "off_norm": torch.empty(batch, dtype=torch.float32, device="cuda"),
        }
        scratch = {
            name: torch.empty(size // 4, dtype=torch.float32, device="cuda")
            for name, size in plan.scratch.items()
        }
        buffers = {**out, **scratch}
        steps = plan.steps()
        functions = {s.kernel: self.compile(s.kernel)[0] for s in steps}

        def launch(a: torch.Tensor) -> None:
            for s in steps:
                tensors = [a if b == "a" else buffers[b] for b in s.buffers]
                values: list[Any] = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
                values.append(STEP_PARAMS[s.params](**grid_params(plan, s)))
                function, shared = functions[s.kernel], sum(s.threadgroup_bytes)
                self.run(function, s.groups, s.threads, shared, values)

        return launch, out


def captured(launch: Callable[[torch.Tensor], None], a: torch.Tensor) -> Callable[..., None]:
    """The launches on ``a`` as one CUDA graph."""
    launch(a)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(a)
    return lambda _: graph.replay()


def profile(launch: Callable[[torch.Tensor], None], a: torch.Tensor) -> dict[str, list[float]]:
    """Number and total milliseconds of each kernel in one pass, by torch's profiler."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as p:
        launch(a)
        torch.cuda.synchronize()
    events = [e for e in p.key_averages() if e.key.startswith("svd_")]
    return {e.key: [e.count, round(e.device_time_total / 1e3, 4)] for e in events}


def grid_plan(
    batch: int, m: int, n: int, vectors: bool = True, fused: FusedVariant | None = None
) -> GridPlan:
    """As csrc/svd.cc plans on this GPU."""
    cores = torch.cuda.get_device_properties(0).multi_processor_count
    return GridPlan.on(cores, batch, m, n, n, vectors, fused=fused)


def hard_matrices(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    q1 = np.linalg.qr(rng.standard_normal((n, n)))[0]
    q2 = np.linalg.qr(rng.standard_normal((n, n)))[0]
    i = np.arange(n)
    g = rng.standard_normal((n, n))
    return {
        "zero": np.zeros((n, n)),
        "ones": np.ones((n, n)),
        "identity": np.eye(n),
        "orthogonal": q1,
        "rank1": np.outer(g[0], g[1]),
        "duplicates": np.repeat(g[:, : (n + 1) // 2], 2, axis=1)[:, :n],
        "zero_columns": g * (i % 3 != 0),
        "hilbert": 1.0 / (i[:, None] + i[None, :] + 1),
        "cond1e6": q1 * np.logspace(0, -6, n) @ q2,
        "cond1e4_arithmetic": q1 * np.linspace(1, 1e-4, n) @ q2,
        "clusters": q1 * np.where(i < n // 2, 1.0, 1e-3) @ q2,
        "graded_columns": g * np.logspace(0, -12, n),
        "graded_rows": g * np.logspace(0, -12, n)[:, None],
        "huge": g * 1e37,
        "tiny": g * 1e-30,
        "denormal": g * 1e-41,
        "upper": np.triu(np.ones((n, n))),
    }


def ratios(a: np.ndarray, u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> list[float]:
    """Worst residual, two orthogonalities, and sigma error in ulps of sigma1."""
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    a, u, vt = (x.astype(wide) for x in (a, u, vt))
    s = s.astype(np.float64)
    m, n = a.shape[-2:]
    norm = np.maximum(np.linalg.norm(a, 2, axis=(-2, -1)), 1e-45)
    residual = np.linalg.norm(a - (u * s[..., None, :]) @ vt, axis=(-2, -1)) / (norm * m * ULP)
    left = np.linalg.norm(np.eye(n) - np.swapaxes(u, -1, -2).conj() @ u, axis=(-2, -1)) / (m * ULP)
    right = np.linalg.norm(np.eye(n) - vt @ np.swapaxes(vt, -1, -2).conj(), axis=(-2, -1)) / (
        n * ULP
    )
    reference = np.linalg.svd(a, compute_uv=False)
    sigma = np.abs(s - reference).max(axis=-1) / (norm * ULP)
    return [float(np.max(x)) for x in (residual, left, right, sigma)]


def time_ms(
    call: Callable[[torch.Tensor], Any], inputs: list[torch.Tensor], repeats: int, inner: int
) -> float:
    """Median over repeats of the time of one of ``inner`` calls made back to back."""
    for a in inputs[:2]:
        call(a)
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for i in range(inner):
            call(inputs[i % len(inputs)])
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / inner)
    return float(statistics.median(times))


def time_grid(gpu: Gpu, rows: list[dict[str, Any]], quick: bool) -> None:
    """Times "grid" as a CUDA graph, which is launched about as fast as its dispatches run."""
    print("\nTime of grid, ms, float32, one CUDA graph; then of each kernel: number, ms")
    shapes = ((64, 256, 256), (64, 128, 128), (1, 128, 128), (1, 256, 256), (1, 512, 512),
              (16, 512, 512), (1, 1024, 1024), (1, 2048, 2048), (1, 4096, 4096),
              (1, 4096, 256))  # fmt: skip
    for batch, m, n in shapes:
        if quick and n > 1024:
            continue
        a = torch.randn(batch, m, n, device="cuda")
        row: dict[str, Any] = {"kind": "time", "variant": "grid", "m": m, "n": n, "batch": batch}
        for label, vectors in (("grid", True), ("grid_values", False)):
            plan = grid_plan(batch, m, n, vectors)
            launch, out = gpu.grid_launcher(plan)
            row[label] = time_ms(captured(launch, a), [a], 5, 3)
            row[f"{label}_sweeps"] = int(out["sweeps"].max())
            row[f"{label}_status"] = int(out["status"].max())
            row["slices"] = plan.slices
            if vectors:
                try:
                    row["kernels"] = profile(launch, a)
                except Exception as e:  # no profiler here: the times stand without it
                    row["kernels"] = {"none": [0, 0.0], type(e).__name__: [0, 0.0]}
        for driver in () if quick else ("gesvd", "gesvdj", "gesvda"):
            # One matrix after the other, or seconds a call.
            if (batch > 1 and driver != "gesvda") or (n > 2048 and driver == "gesvd"):
                continue
            call = lambda x, d=driver: torch.linalg.svd(x, driver=d, full_matrices=False)  # noqa: E731
            try:
                row[driver] = time_ms(call, [a], 3, 1)
            except RuntimeError:
                row[driver] = float("nan")
        peers = {d: round(row[d], 3) for d in ("gesvd", "gesvdj", "gesvda") if d in row}
        figures = f"{row['grid']:9.3f} values {row['grid_values']:9.3f} sweeps {row['grid_sweeps']}"
        print(f"{f'{batch}x{m}x{n}':>14} {figures} status {row['grid_status']} {peers}")
        print(f"{'':>14} {row['kernels']}")
        rows.append(row)


def compare_fused(gpu: Gpu, rows: list[dict[str, Any]]) -> None:
    """Times "grid" and what has one threadgroup a matrix in place of its rounds, in CUDA graphs."""
    print("\nTime with vectors and of values alone, ms, float32, one CUDA graph")
    variants = fused_variants(UNIT)
    for batch, n in ((64, 256), (1024, 256), (132, 512), (132, 1024)):
        a = torch.randn(batch, n, n, device="cuda")
        kinds: dict[str, FusedVariant | None] = {"grid": None}
        for v in sorted(variants, key=lambda v: -v.n):  # of each variant the smallest that fits
            kinds |= {v.variant: v} if v.n >= n else {}
        for kind, fused in kinds.items():
            row: dict[str, Any] = {"variant": kind, "m": n, "n": n, "batch": batch}
            times, bad = {}, []
            for label, vectors in (("ms", True), ("values_ms", False)):
                launch, out = gpu.grid_launcher(grid_plan(batch, n, n, vectors, fused))
                times[label] = time_ms(captured(launch, a), [a], 3, 1)
                names = ("u", "s", "vt") if vectors else ("s",)
                finite = all(bool(out[k].isfinite().all()) for k in names)
                if int(out["status"].max()) or not finite:
                    bad.append(label)
                elif vectors:
                    first = [x[:2].cpu().numpy() for x in (a, out["u"], out["s"], out["vt"])]
                    row["worst"] = ratios(first[0], *first[1:])
                    row["sweeps"] = int(out["sweeps"].max())
                    bad += [label] if max(row["worst"]) > 5 else []
            rows.append({"kind": "accuracy", **row, "bad": bad})
            rows.append({"kind": "time", **row, **times, "kernel": fused.name if fused else kind})
            print(
                f"{f'{batch}x{n}x{n}':>14} {kind:8} {times['ms']:10.3f} {times['values_ms']:10.3f} "
                f"sweeps {row.get('sweeps')} worst {max(row.get('worst', [0])):.2f} "
                f"{'FAIL ' + ' '.join(bad) if bad else 'ok'}",
                flush=True,
            )


def compare_complex(gpu: Gpu, rows: list[dict[str, Any]]) -> None:
    """Times complex64 with one column a lane (xor) and with two (ring), and checks both."""
    print("\nTime, ms, complex64; worst of residual, U, V, sigma, of sigma where alone; registers")
    variants = {v.name: v for v in svd_variants(UNIT)}
    rng = np.random.default_rng(0)
    for batch, n, what in ((10000, n, what) for n in (8, 16, 32) for what in ("vectors", "values")):
        inputs = [torch.randn(batch, n, n, dtype=torch.complex64, device="cuda") for _ in range(4)]
        phases = np.exp(1j * rng.uniform(0, 7, (2, n)))
        hard = hard_matrices(n, rng)
        del hard["denormal"]  # its singular values are rounded to whole multiples of 2^-149
        turned = [x * phases[0][:, None] * phases[1] for x in hard.values()]
        checked = np.concatenate([np.stack(turned), inputs[0][:500].cpu().numpy()])
        checked = checked.astype(np.complex64)
        for kind in ("xor", "ring"):
            name = f"svd_{kind}_{what}_c64_n{n}"
            if name not in variants:
                continue
            launch, out = gpu.launcher(variants[name], len(checked), n, n, n)
            launch(torch.from_numpy(checked).cuda())
            torch.cuda.synchronize()
            u, s, vt = (out[k].cpu().numpy() for k in ("u", "s", "vt"))
            exact = np.linalg.svd(checked.astype(np.complex128), compute_uv=False)
            top = np.maximum(exact[:, :1], 1e-45)
            worst = [float((np.abs(s - exact) / (top * ULP)).max())]
            if what == "vectors":
                worst = ratios(checked, u, s, vt)
            fails = int(out["status"].max()) != 0 or not max(worst) < 5
            row = {"variant": name, "n": n, "batch": batch, "worst": worst}
            rows.append({"kind": "accuracy", **row, "bad": [name] if fails else []})
            launch, _ = gpu.launcher(variants[name], batch, n, n, n)
            ms = time_ms(launch, inputs, 9, 20)
            report = gpu.compile(name)[1]
            rows.append({"kind": "time", **row, "ms": ms, "registers": report.registers})
            print(
                f"{f'{batch}x{n}x{n}':>14} {kind:4} {what:7} {ms:8.4f} worst {max(worst):.2f} "
                f"registers {report.registers} {'FAIL' if fails else 'ok'}",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="no torch.linalg.svd timings")
    parser.add_argument("--check", action="store_true", help="accuracy only, for a sanitizer")
    parser.add_argument("--groups", action="store_true", help="time fewer registers a thread")
    parser.add_argument("--grid", action="store_true", help="only the row for larger sizes")
    parser.add_argument("--fused", action="store_true", help="only its rows beside grid")
    parser.add_argument("--complex", action="store_true", help="only complex64 in registers")
    parser.add_argument("--json", type=Path, help="write one row a measurement here")
    options = parser.parse_args()
    gpu = Gpu()
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    variants = {v.name: v for v in svd_variants(UNIT) if not (v.complex or v.double)}
    print(f"{torch.cuda.get_device_name()}, NVRTC {gpu.nvrtc.version}, torch {torch.__version__}")

    def finish() -> int:
        if options.json:
            options.json.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return int(any(r["kind"] == "accuracy" and r["bad"] for r in rows))

    if options.fused or options.complex:
        (compare_fused if options.fused else compare_complex)(gpu, rows)
        return finish()

    print("\nAccuracy: residual, U, V in LAPACK ratios; sigma in ulp of sigma1; sweeps; status")
    for n in () if options.grid else (8, 16, 32, 64, 128):
        kinds = ("xor", "ring") if n <= 32 else ("block8", "block16", "twin")
        cases = {k: v.astype(np.float32)[None] for k, v in hard_matrices(n, rng).items()}
        count = 3 if options.check else 2000 if n <= 32 else 64
        cases["gaussian"] = rng.standard_normal((count, n, n)).astype(np.float32)
        cases["gaussian_odd"] = rng.standard_normal((count, n - 1, n - 3)).astype(np.float32)
        for kind in kinds:
            variant = variants[f"svd_{kind}_vectors_f32_n{n}"]
            worst = {"": [0.0] * 4}
            bad, sweeps = [], {}
            for name, a in cases.items():
                launch, out = gpu.launcher(variant, len(a), a.shape[1], a.shape[2], a.shape[2])
                launch(torch.from_numpy(np.ascontiguousarray(a)).cuda())
                torch.cuda.synchronize()
                status = out["status"].cpu().numpy()
                sweeps[name] = int(out["sweeps"].max())
                got = [out[k].cpu().numpy() for k in ("u", "s", "vt")]
                worst[name] = ratios(a, *got)
                if name == "denormal":  # sigma is rounded to whole multiples of 2^-149
                    worst[name][0] = worst[name][3] = 0.0
                if status.any() or not all(np.isfinite(x).all() for x in got):
                    bad.append(f"{name} status {status.max()}")
                elif max(worst[name]) > 5:
                    bad.append(f"{name} " + " ".join(f"{x:.3g}" for x in worst[name]))
            top = [max(w[i] for w in worst.values()) for i in range(4)]
            gauss = " ".join(f"{x:.2f}" for x in worst["gaussian"])
            print(
                f"n={n:2} {kind:4} gaussian {gauss} sweeps {sweeps['gaussian']} | worst "
                f"{' '.join(f'{x:.2f}' for x in top)} sweeps {max(sweeps.values())} | "
                f"{'FAIL ' + '; '.join(bad) if bad else 'ok'}"
            )
            rows.append({"kind": "accuracy", "variant": variant.name, "worst": worst, "bad": bad,
                         "sweeps": sweeps})  # fmt: skip

    for batch, m, n in ((1, 33, 33), (1, 200, 130), (1, 512, 512), (1, 1024, 1024)):
        if options.check and n > 200:
            continue
        cases = {k: v.astype(np.float32)[None] for k, v in hard_matrices(n, rng).items()}
        if n > 200:
            keep = ("cond1e6", "clusters", "graded_rows", "ones", "hilbert")
            cases = {k: cases[k] for k in keep}
        cases["gaussian"] = rng.standard_normal((batch, m, n)).astype(np.float32)
        cases["several"] = rng.standard_normal((3, m, n)).astype(np.float32)
        bad, sweeps, worst = [], {}, {}
        for name, a in cases.items():
            launch, out = gpu.grid_launcher(grid_plan(*a.shape))
            launch(torch.from_numpy(np.ascontiguousarray(a)).cuda())
            torch.cuda.synchronize()
            status = out["status"].cpu().numpy()
            sweeps[name] = int(out["sweeps"].max())
            got = [out[k].cpu().numpy() for k in ("u", "s", "vt")]
            if status.any() or not all(np.isfinite(x).all() for x in got):
                bad.append(f"{name} status {status.max()}")
                continue
            worst[name] = ratios(a, *got)
            if name == "denormal":
                worst[name][0] = worst[name][3] = 0.0
            if max(worst[name]) > 5:
                bad.append(f"{name} " + " ".join(f"{x:.3g}" for x in worst[name]))
        top = [max(w[i] for w in worst.values()) for i in range(4)]
        print(
            f"{m}x{n} grid worst {' '.join(f'{x:.2f}' for x in top)} sweeps {sweeps} | "
            f"{'FAIL ' + '; '.join(bad) if bad else 'ok'}"
        )
        rows.append({"kind": "accuracy", "variant": "grid", "m": m, "n": n, "worst": worst,
                     "bad": bad, "sweeps": sweeps})  # fmt: skip

    if options.check:
        return int(any(r["bad"] for r in rows))
    print("\nTime, ms, float32; registers and spilled bytes of the two vector kernels")
    print(f"{'shape':>12} {'kernels':>16} {'ms':>17} {'values':>8} {'gesvdj':>8} {'gesvda':>8}")
    sizes = ((10000, 8), (10000, 16), (10000, 32), (1024, 64), (64, 128), (1024, 128))
    for batch, n in () if options.grid else sizes:
        kinds = ("xor", "ring") if n <= 32 else ("block8", "block16", "twin")
        inputs = [torch.randn(batch, n, n, device="cuda") for _ in range(4)]
        row: dict[str, Any] = {"kind": "time", "n": n, "batch": batch}
        names = [f"svd_{k}_vectors_f32_n{n}" for k in kinds]
        for label, name in zip(
            (*kinds, "values"), (*names, f"svd_{kinds[-1]}_values_f32_n{n}"), strict=True
        ):
            launch, _ = gpu.launcher(variants[name], batch, n, n, n)
            row[label] = time_ms(launch, inputs, 9, 20)
            row[f"{label}_registers"] = gpu.compile(name)[1].registers
            row[f"{label}_spill_bytes"] = gpu.compile(name)[1].spill_bytes
        for driver in () if options.quick else ("gesvdj", "gesvda"):
            if driver == "gesvdj" and n > 32:
                continue  # one matrix after the other, up to seconds a call
            call = lambda a, d=driver: torch.linalg.svd(a, driver=d)  # noqa: E731
            row[driver] = time_ms(call, inputs, 3, 4)
        peers = [row.get(d, float("nan")) for d in ("gesvdj", "gesvda")]
        times = " ".join(f"{row[k]:8.4f}" for k in kinds)
        notes = ", ".join(f"{row[k + '_registers']} {row[k + '_spill_bytes']}" for k in kinds)
        print(
            f"{f'{batch}x{n}':>12} {'/'.join(kinds):>16} {times} {row['values']:8.4f} "
            f"{peers[0]:8.3f} {peers[1]:8.3f}  {notes}"
        )
        rows.append(row)
    if options.groups:
        print("\nThreadgroups a multiprocessor that the compiler makes room for: ms (registers)")
        for batch, n in ((10000, 8), (10000, 16), (10000, 32), (1024, 64), (1024, 128)):
            inputs = [torch.randn(batch, n, n, device="cuda") for _ in range(4)]
            for v in variants.values():
                if v.n != n or v.storage != "float" or not v.vectors:
                    continue
                by_group: list[str] = []
                for warps in (8, 10, 12, 14, 16, 20, 24):
                    groups = warps * 32 // v.threads
                    if groups * v.threads != warps * 32:
                        continue
                    launch, _ = gpu.launcher(v, batch, n, n, n, min_groups=groups)
                    ms = time_ms(launch, inputs, 5, 10)
                    report = gpu.compile(v.name, groups)[1]
                    figures = f"{report.registers}, {report.spill_bytes}"
                    by_group.append(f"{groups}: {ms:.4f} ({figures})")
                print(f"{v.name:28} {'  '.join(by_group)}")
    time_grid(gpu, rows, options.quick)
    return finish()


if __name__ == "__main__":
    sys.exit(main())
