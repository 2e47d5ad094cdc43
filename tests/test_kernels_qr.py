"""Every kernel of kernels/qr.metal, run by the simulator in checked mode."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from harness import hard_matrices, random_matrix
from test_kernels import decode, encode

import jaxmetal_linalg as jml
from jaxmetal_linalg._measure import qr_ratios
from tools.msl.layout import QrPlan, QrVariant, qr_variants, structure
from tools.msl.parse import parse_file
from tools.msl.simulate import ROOT, Finding, Simulator, simulator

UNIT = parse_file(ROOT / "kernels" / "qr.metal", "kernels/qr.metal")
Params = structure(UNIT, "QrParams")
TsqrParams = structure(UNIT, "QrTsqrParams")
VARIANTS = {v.name: v for v in qr_variants(UNIT)}
EPS = {"float": 2.0**-24, "half": 2.0**-11, "bfloat": 2.0**-8}


@dataclass
class Outcome:
    q: np.ndarray | None
    r: np.ndarray
    findings: list[Finding]


def _stored(a: np.ndarray, storage: str) -> np.ndarray:
    if np.iscomplexobj(a):
        return np.ascontiguousarray(a, np.complex64).view(np.float32)
    return encode(a, storage)


def _read(x: np.ndarray, shape: tuple[int, ...], wide: bool) -> np.ndarray:
    return (x.view(np.complex64) if wide else decode(x)).reshape(shape)


def _blank(shape: tuple[int, ...], storage: str, wide: bool) -> np.ndarray:
    return _stored(np.full(shape, 77.0, np.complex64 if wide else np.float32), storage)


def run_small(
    sim: Simulator, v: QrVariant, a: np.ndarray, *, complete: bool = False, less: int = 0, **more: Any
) -> Outcome:
    """One launch of a row of "small" on a [batch, m, n] array."""
    batch, m, n = a.shape
    cols = m if complete else min(m, n)
    wide = v.width == 2
    q, r = (_blank((batch, *s), v.storage, wide) for s in ((m, cols), (cols, n)))
    buffers = [_stored(a, v.storage), *([q] if v.with_q else []), r]
    p = Params(batch=batch, m=m, n=n, q_cols=cols)
    findings = sim.launch(
        v.name,
        grid=-(-batch // v.matrices),
        threads=v.threads,
        buffers=dict(enumerate(buffers)),
        params=(len(buffers), p),
        threadgroup_bytes=[v.scratch_bytes - less] if v.with_q else [],
        **more,
    )
    shapes = (batch, m, cols), (batch, cols, n)
    return Outcome(
        _read(q, shapes[0], wide) if v.with_q else None, _read(r, shapes[1], wide), findings
    )


def run_tsqr(sim: Simulator, plan: QrPlan, a: np.ndarray, less: int = 0, **more: Any) -> Outcome:
    """All dispatches of a plan of "tsqr", as far as they are clean."""
    batch, m, n, cols = plan.batch, plan.m, plan.n, plan.q_cols
    memory = {k: np.full(b // 4, 0x7FC00000, np.uint32) for k, b in plan.scratch.items()}
    memory["a"] = encode(a, plan.storage)
    memory["r"] = _blank((batch, cols, n), plan.storage, False)
    memory["q"] = _blank((batch, m, cols), plan.storage, False)
    findings: list[Finding] = []
    for step in plan.steps():
        findings = sim.launch(
            step.kernel,
            grid=step.groups,
            threads=step.threads,
            buffers={i: memory[name] for i, name in enumerate(step.buffers)},
            params=(len(step.buffers), TsqrParams(**step.params)),
            threadgroup_bytes=[b - less for b in step.threadgroup_bytes],
            **more,
        )
        if findings:
            break
    q = None if plan.mode == "r" else decode(memory["q"]).reshape(batch, m, cols)
    return Outcome(q, decode(memory["r"]).reshape(batch, cols, n), findings)


def check(a: np.ndarray, o: Outcome, storage: str = "float", label: Any = "") -> None:
    """Clean, triangular, diagonal >= 0, and within LAPACK's ratios (or the storage's rounding)."""
    assert o.findings == [], label
    assert not np.any(np.tril(o.r, -1)), label
    diagonal = np.diagonal(o.r, axis1=-2, axis2=-1)
    assert np.all(diagonal.real >= 0), label
    assert np.all(diagonal.imag == 0), label
    if o.q is None:
        return
    if storage == "float":
        assert o.q.dtype == a.dtype
        ratios = qr_ratios(a, o.q, o.r)
        assert max(ratios) < jml.ACC_RATIO, (label, ratios)
        return
    q, r, wide = o.q.astype(np.float64), o.r.astype(np.float64), a.astype(np.float64)
    eps = 4 * EPS[storage]
    gram = np.swapaxes(q, -1, -2) @ q
    assert np.max(np.abs(gram - np.eye(q.shape[-1]) + 0 * gram)) < eps * q.shape[-2], label
    scale = np.linalg.norm(wide, axis=-2, keepdims=True)
    assert np.all(np.abs(wide - q @ r) <= eps * q.shape[-1] * scale), label


@pytest.fixture(scope="session")
def sim() -> Simulator:
    simulator().load(UNIT)
    return simulator()


def case(v: QrVariant, batch: int, m: int, n: int) -> np.ndarray:
    a = random_matrix((batch, m, n), np.complex64 if v.width == 2 else np.float32)
    return a if v.width == 2 else decode(encode(a, v.storage))


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant(sim: Simulator, name: str) -> None:
    v = VARIANTS[name]
    wide = v.n // 2 + 1
    for batch, m, n in ((v.matrices + 1, v.n, v.n), (3, v.n, wide), (2, wide, v.n), (1, 1, 1)):
        a = case(v, batch, m, n)
        for complete in (False, True) if m != n else (False,):
            o = run_small(sim, v, a, complete=complete)
            check(a, o, v.storage, (name, a.shape, complete))
            if not v.with_q:
                # The R of the row with Q, to the bit.
                other = VARIANTS[name.replace("small_r", "small_q")]
                np.testing.assert_array_equal(o.r, run_small(sim, other, a, complete=complete).r)


@pytest.mark.parametrize("n", [7, 8, 32])
@pytest.mark.parametrize("tag", ["f32", "c64"])
def test_small_hard_matrices(sim: Simulator, tag: str, n: int) -> None:
    v = VARIANTS[f"qr_small_q_{tag}_n{8 if n < 9 else 32}"]
    named = hard_matrices(n)
    a = np.stack(list(named.values()))
    if tag == "c64":
        a = a * np.exp(1j * np.arange(n))[:, None]
    a = a.astype(np.complex64 if tag == "c64" else np.float32)
    o = run_small(sim, v, a)
    for i, name in enumerate(named):
        check(a[i], Outcome(o.q[i], o.r[i], o.findings), label=(name, n, tag))  # type: ignore[index]


def plan_for(batch: int, m: int, n: int, **changes: Any) -> QrPlan:
    """Few rows a piece, so that there are levels."""
    mode, storage = changes.pop("mode", "reduced"), changes.pop("storage", "float")
    plan = QrPlan.on(UNIT, 8, batch, m, n, mode, storage)
    return dataclasses.replace(plan, **changes)


# Levels, panels, rows beside the pieces, and matrices that are wider than tall.
TSQR = [
    *((1, 3, 3), (3, 37, 3), (1, 333, 4), (2, 300, 7), (1, 1000, 8), (1, 170, 16), (1, 500, 13)),
    *((1, 200, 30), (1, 33, 33), (1, 70, 40), (1, 40, 70), (2, 5, 50), (1, 300, 35), (1, 64, 96)),
]


@pytest.mark.parametrize("size", TSQR)
@pytest.mark.parametrize("mode", ["reduced", "complete", "r"])
def test_tsqr(sim: Simulator, size: tuple[int, int, int], mode: str) -> None:
    if mode == "complete" and size[1] > 200:
        pytest.skip("seconds in the simulator, and nothing new")
    a = random_matrix(size, np.float32)
    plan = plan_for(*size, mode=mode)
    plan = dataclasses.replace(plan, piece=plan.lanes + plan.rows // 2 + 1, fan=3)
    check(a, run_tsqr(sim, plan, a), label=(size, mode))
