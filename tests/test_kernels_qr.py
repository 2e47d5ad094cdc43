"""Every kernel of kernels/qr.metal, run by the simulator in checked mode."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from harness import each_architecture, hard_matrices, launch_steps, random_matrix, shipped
from test_kernels import decode, encode

import jaxmetal_linalg as jml
from jaxmetal_linalg._measure import qr_ratios
from tools.msl import nvrtc
from tools.msl.layout import QrPlan, QrVariant, qr_variants, structure
from tools.msl.parse import parse_file
from tools.msl.simulate import ROOT, Finding, Simulator

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
    sim: Simulator,
    v: QrVariant,
    a: np.ndarray,
    *,
    complete: bool = False,
    less: int = 0,
    **more: Any,
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
    wide = plan.width == 2
    memory["a"] = _stored(a, plan.storage)
    memory["r"] = _blank((batch, cols, n), plan.storage, wide)
    memory["q"] = _blank((batch, m, cols), plan.storage, wide)
    findings = launch_steps(
        sim, plan.steps(), memory, lambda s: TsqrParams(**s.params), lambda _: less, **more
    )
    q = None if plan.mode == "r" else _read(memory["q"], (batch, m, cols), wide)
    return Outcome(q, _read(memory["r"], (batch, cols, n), wide), findings)


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
    return shipped()


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
    plan = QrPlan.on(UNIT, 8, batch, m, n, mode, storage, changes.pop("width", 1))
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


COMPLEX = [(3, 37, 3), (1, 200, 7), (1, 70, 13), (1, 40, 33), (1, 20, 40)]


@pytest.mark.parametrize("size", COMPLEX)
@pytest.mark.parametrize("mode", ["reduced", "complete", "r"])
def test_tsqr_of_complex_numbers(sim: Simulator, size: tuple[int, int, int], mode: str) -> None:
    a = random_matrix(size, np.complex64)
    plan = plan_for(*size, mode=mode, width=2)
    plan = dataclasses.replace(plan, piece=plan.lanes + plan.rows // 2 + 1, fan=3)
    check(a, run_tsqr(sim, plan, a), label=(size, mode))


@pytest.mark.parametrize("storage", ["half", "bfloat"])
def test_tsqr_in_16_bits(sim: Simulator, storage: str) -> None:
    for m, n in ((150, 6), (40, 36)):
        a = decode(encode(random_matrix((2, m, n), np.float32), storage))
        o = run_tsqr(sim, plan_for(2, m, n, storage=storage), a)
        check(a, o, storage, (storage, m, n))


@pytest.mark.parametrize("width", [1, 2])
def test_many_levels_of_hard_matrices(sim: Simulator, width: int) -> None:
    """Graded, rank-deficient and badly scaled rows, through four levels of pieces."""
    m, n = 600, 5
    gauss = random_matrix((m, n), np.float64)
    basis = np.linalg.qr(gauss)[0]
    down = 10.0 ** (-40 * np.arange(m) / m)[:, None]
    named = {
        "cond_1e8": basis * 10.0 ** -np.arange(0, 10, 2) @ random_matrix((n, n), np.float64),
        "rank_2": gauss[:, :2] @ random_matrix((2, n), np.float64),
        "zero": np.zeros((m, n)),
        "ones": np.ones((m, n)),
        "graded_rows": gauss * down,
        "graded_rows_up": gauss * down[::-1],
        "graded_columns": gauss * 10.0 ** -np.arange(0, 50, 10),
        "zero_pieces": np.where(np.arange(m)[:, None] // 100 % 2, 0, gauss),
        "denormal": gauss * 1e-41,
        "huge": gauss * 1e36,
        # R's entries, scaled up by 2^24, are not beyond the largest number.
        "scaled_2^-24": gauss * 2.0**-24,
    }
    a = np.stack(list(named.values())).astype(np.float32)
    if width == 2:
        a = (a * np.exp(1j * np.arange(m)[:, None] + 0.5j * np.arange(n))).astype(np.complex64)
        a[list(named).index("ones")] = 1j
    plan = dataclasses.replace(plan_for(len(a), m, n, width=width), piece=20, fan=3)
    assert len(plan.levels(0)) == 5
    o = run_tsqr(sim, plan, a)
    for i, name in enumerate(named):
        check(a[i], Outcome(o.q[i], o.r[i], o.findings), label=name)  # type: ignore[index]


def both(sim: Simulator, a: np.ndarray, **more: Any) -> list[Outcome]:
    """A row of "small", and "tsqr"."""
    wide = np.iscomplexobj(a)
    v = VARIANTS[f"qr_small_q_{'c64' if wide else 'f32'}_n8"]
    tree = dataclasses.replace(plan_for(*a.shape, width=1 + wide), piece=9, fan=2)
    return [run_small(sim, v, a[:, :8], **more), run_tsqr(sim, tree, a, **more)]


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_same_bits_in_any_order_and_batch(sim: Simulator, dtype: Any) -> None:
    a = random_matrix((5, 100, 6), dtype)
    for i, o in enumerate(both(sim, a)):
        check(a[:, :8] if i == 0 else a, o)
        for seed in (1, 2):
            again = both(sim, a, seed=seed)[i]
            np.testing.assert_array_equal(again.q, o.q)
            np.testing.assert_array_equal(again.r, o.r)
        one = both(sim, a[3:4])[i]
        np.testing.assert_array_equal(one.q[0], o.q[3])  # type: ignore[index]
        np.testing.assert_array_equal(one.r[0], o.r[3])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1j * np.inf])
def test_non_finite_stays_in_its_matrix(sim: Simulator, bad: complex) -> None:
    a = random_matrix((5, 100, 6), np.complex64 if isinstance(bad, complex) else np.float32)
    clean = both(sim, a)
    a[2, 7, 5] = a[4, 0, 0] = bad
    for o, want in zip(both(sim, a), clean, strict=True):
        assert o.findings == []
        assert np.all(np.isnan(o.q[[2, 4]]))  # type: ignore[index]
        assert np.all(np.isnan(o.r[[2, 4]]))
        np.testing.assert_array_equal(o.q[[0, 1, 3]], want.q[[0, 1, 3]])  # type: ignore[index]
        np.testing.assert_array_equal(o.r[[0, 1, 3]], want.r[[0, 1, 3]])


def test_scratch_is_what_the_kernels_use(sim: Simulator) -> None:
    """With the last word in use taken away, the judge objects."""
    for v in (v for v in VARIANTS.values() if v.with_q):
        o = run_small(sim, v, case(v, v.matrices, v.n, v.n), less=8)
        assert {f.kind for f in o.findings} == {"out_of_bounds"}, v.name
    for n, width in ((3, 1), (8, 1), (16, 1), (32, 1), (3, 2), (8, 2), (16, 2), (32, 2)):
        plan = plan_for(8 * 64 // n, 40, n, width=width)
        for step in plan.steps():
            if step.threadgroup_bytes:
                # What is left of four words behind the last column.
                padding = {"factor": 12, "apply": 16}
                unused = next((b for k, b in padding.items() if k in step.kernel), 0)
                assert findings_of(sim, plan, step, unused) == set(), step.kernel
                assert findings_of(sim, plan, step, unused + 4) == {"out_of_bounds"}, step.kernel


def findings_of(sim: Simulator, plan: QrPlan, step: Any, less: int) -> set[str]:
    """Of one dispatch alone, on whatever numbers."""
    memory = {k: np.zeros(b // 4, np.float32) for k, b in plan.scratch.items()}
    for name, cols in (("a", plan.n), ("q", plan.k), ("r", plan.n)):
        memory[name] = np.ones((plan.batch, plan.m, plan.width * cols), np.float32)
    found = launch_steps(sim, [step], memory, lambda s: TsqrParams(**s.params), lambda _: less)
    return {f.kind for f in found}


def test_table() -> None:
    for v in VARIANTS.values():
        assert v.threads <= 1024
        assert v.scratch_bytes <= 32768
        tag = {"float": "f32", "half": "f16", "bfloat": "bf16"}[v.storage]
        assert v.name == f"{v.function}_{'c64' if v.width == 2 else tag}_n{v.n}"
    rows = [tuple(r) for r in UNIT.variants["QR_TSQR_VARIANTS"]]
    # One row of each function for each number of lanes, with the same blocks.
    factor, apply = ([r[2:] for r in rows if f in r[0]] for f in ("factor", "apply"))
    assert factor == apply
    assert [int(r[1]) for r in factor] == [4, 8, 16, 32] * 2
    assert [int(r[0]) for r in factor] == [1] * 4 + [2] * 4
    assert all(int(r[2]) >= int(r[1]) for r in factor)


def test_unchecked_mode_gives_the_same_bits(sim: Simulator) -> None:
    names = {"qr_small_q_f32_n8"}
    a = random_matrix((3, 40, 6), np.float32)
    plan = plan_for(3, 40, 6, piece=9, fan=2)
    names |= {s.kernel for s in plan.steps()}
    for judged, plain in zip(both(sim, a), both(sim, a, checked=False), strict=True):
        np.testing.assert_array_equal(judged.q, plain.q)
        np.testing.assert_array_equal(judged.r, plain.r)


# --- NVRTC, which needs no GPU ---------------------------------------------------------------


@each_architecture
def test_cuda_without_spills(compiler: nvrtc.Nvrtc, arch: str) -> None:
    """The largest of each kind; on one architecture narrow, complex and half ones too."""
    names = ["qr_small_q_f32_n32", "qr_tsqr_factor_l32", "qr_tsqr_apply_l32"]
    names += ["qr_tsqr_factor_c64_l32", "qr_tsqr_apply_c64_l32"]
    if arch == "sm_90":
        names += ["qr_small_q_c64_n16", "qr_small_r_bf16_n8", "qr_tsqr_factor_l8"]
        names += ["qr_tsqr_apply_l8", "qr_tsqr_start_f32", "qr_tsqr_scale"]
        names += [f"qr_tsqr_{k}_f16" for k in ("scan", "load", "triangle", "store")]
        names += [f"qr_tsqr_{k}_c64_l{n}" for k in ("factor", "apply") for n in (4, 8, 16)]
        names += ["qr_tsqr_triangle_c64", "qr_tsqr_start_c64"]
    rows = nvrtc.report(compiler, UNIT, arch, names)
    assert sorted(r.kernel for r in rows) == sorted(names)
    for r in rows:
        print(f"{r.kernel:30} {r.arch} registers {r.registers} spills {r.spill_bytes}")
        assert r.spill_bytes == 0, r
        assert r.stack_bytes == 0, r
