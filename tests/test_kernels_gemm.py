"""Kernels of kernels/gemm.metal, run by the simulator in checked mode, against NumPy; mutants."""

from __future__ import annotations

import numpy as np
import pytest
from harness import (
    Kernels,
    check_mutants_of_kernels,
    each_architecture,
    mutants_of,
    random_matrix,
    shipped,
)
from test_kernels import decode, encode

from tools.msl import nvrtc
from tools.msl.layout import structure
from tools.msl.parse import parse_file
from tools.msl.simulate import ROOT, Simulator, workshop

UNIT = parse_file(ROOT / "kernels" / "gemm.metal", "kernels/gemm.metal")
Params = structure(UNIT, "GemmParams")
SOURCE = (ROOT / "kernels" / "gemm.metal").read_text()
KERNELS = {"gemm_f16": "half", "gemm_bf16": "bfloat"}
CODE_START = SOURCE.index("#ifndef JM_HOST\n", SOURCE.index("#define GEMM_VARIANTS("))


@pytest.fixture(scope="session")
def sim() -> Simulator:
    return shipped()


def check(sim: Simulator, kernel: str, transposed: bool, accumulate: bool) -> str | None:
    """Two products beside what is not theirs; what is wrong, or None."""
    count, rows, columns, depth = 2, 17, 19, 11
    a = decode(encode(random_matrix((count, depth, rows), np.float32), KERNELS[kernel]))
    b = decode(encode(random_matrix((count, depth, 24), np.float32, 1), KERNELS[kernel]))
    before = random_matrix((count, rows, 21), np.float32, 2)
    given = a if transposed else np.ascontiguousarray(np.swapaxes(a, 1, 2))
    c = before.copy()
    p = Params(
        a_next=rows * depth,
        b_next=depth * 24,
        c_next=rows * 21,
        count=count,
        rows=rows,
        columns=columns,
        depth=depth,
        a_row=1 if transposed else depth,
        a_col=rows if transposed else 1,
        b_row=24,
        c_row=21,
        accumulate=accumulate,
    )
    found = sim.launch(
        kernel,
        grid=count * -(-rows * columns // 256),
        threads=256,
        buffers={
            0: encode(given, KERNELS[kernel]),
            1: encode(b, KERNELS[kernel]),
            2: c,
            3: np.zeros(1, np.float32),
        },
        params=(4, p),
    )
    want = np.swapaxes(a, 1, 2).astype(np.float64) @ b[..., :columns]
    if accumulate:
        want += before[..., :columns]
    if found:
        return str(found[0])
    if not np.array_equal(c[..., columns:], before[..., columns:]):
        return "beside"
    return None if np.max(np.abs(c[..., :columns] - want)) < 1e-5 else "numbers"


def check_all(sim: Simulator, kernels: Kernels) -> str | None:
    for kernel in kernels:
        for transposed in (False, True):
            for accumulate in (False, True):
                if (what := check(sim, kernel, transposed, accumulate)) is not None:
                    return what
    return None


def test_products(sim: Simulator) -> None:
    assert check_all(sim, tuple(KERNELS)) is None


@pytest.mark.slow
def test_mutants_are_caught(capsys: pytest.CaptureFixture[str]) -> None:
    def trial(kernels: Kernels) -> str | None:
        what = check_all(workshop(), kernels)
        return what and ("judge" if ".metal" in what else "numbers")

    every = mutants_of(SOURCE, CODE_START, once=True)
    check_mutants_of_kernels("gemm", every, SOURCE, UNIT, trial, {}, capsys)


@each_architecture
def test_cuda_without_spills(compiler: nvrtc.Nvrtc, arch: str) -> None:
    for r in nvrtc.report(compiler, UNIT, arch, list(KERNELS)):
        assert r.spill_bytes == 0, r
        assert r.stack_bytes == 0, r
