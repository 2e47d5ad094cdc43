"""Kernels of kernels/rsvd.metal alone, run by the simulator in checked mode, against NumPy."""

from __future__ import annotations

import itertools
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
from harness import each_architecture, random_matrix, shipped
from test_kernels import decode, encode

from tools.msl import nvrtc
from tools.msl.layout import structure
from tools.msl.parse import parse_file
from tools.msl.simulate import ROOT, Finding, Simulator

UNIT = parse_file(ROOT / "kernels" / "rsvd.metal", "kernels/rsvd.metal")
Params = structure(UNIT, "RsvdParams")
SOURCE = (ROOT / "kernels" / "rsvd.metal").read_text()
FLAGS = {name: int(value) for name, value in re.findall(r"^#define (RSVD_\w+) (\d+)", SOURCE, re.M)}
# One of each function, storage and width; the rest are the same templates.
KERNELS = (
    *("rsvd_scan_f32", "rsvd_scan_f16", "rsvd_scan_bf16", "rsvd_scale", "rsvd_ones", "rsvd_sum"),
    *("rsvd_product_f32_n32", "rsvd_product_f16_n64", "rsvd_product_bf16_n128"),
    *("rsvd_product_f32_low_n32", "rsvd_product_f32_low_n64"),
    *("rsvd_factor_n32", "rsvd_factor_n64", "rsvd_bound"),
    *("rsvd_triangle", "rsvd_values"),
    *("rsvd_split", "rsvd_pieces_f16", "rsvd_pieces_bf16", "rsvd_gather"),
)
STORAGE = {"f32": "float", "f16": "half", "bf16": "bfloat"}
FAR, NEAR, DONE = 0, 1, 2
ULP = 2.0**-23


def flags(*names: str) -> int:
    return sum(FLAGS[f"RSVD_{name}"] for name in names)


@pytest.fixture(scope="session")
def sim() -> Simulator:
    return shipped()


class Memory:
    """What every product is given: numbers of each matrix, NaN where a kernel must not look."""

    def __init__(self, batch: int) -> None:
        self.exponent = np.zeros(batch, np.int32)
        self.status = np.zeros(batch, np.int32)
        self.state = np.zeros(batch, np.int32)
        self.coefficient = np.full(batch, np.nan, np.float32)


def numbers_of(m: Memory) -> list[np.ndarray]:
    return [m.exponent, m.status, m.state, m.coefficient]


def product(
    sim: Simulator,
    kernel: str,
    a: np.ndarray,
    b: np.ndarray,
    *,
    c: np.ndarray | None = None,
    memory: Memory | None = None,
    transposed: bool = False,
    turned: bool = False,
    parts: int = 1,
    pieces: int = 1,
    into_a: bool = False,
    names: tuple[str, ...] = (),
    alpha: float = 1.0,
    noise: float = 0.0,
    **more: Any,
) -> tuple[np.ndarray, list[Finding]]:
    """op(a) b by one kernel, in so many parts and dispatches. ``turned``: b is stored turned."""
    batch, *core = a.shape
    rows, depth = reversed(core) if transposed else core
    columns = b.shape[-2] if turned else b.shape[-1]
    m = memory or Memory(batch)
    tag, width = kernel.split("_")[2], kernel.split("_")[-1]
    tile = 32 if "_low_" in kernel else 128
    numbers = 16 * (tile + 4 + int(width[1:]))
    stored = encode(a, STORAGE[tag]).copy()
    out = stored if into_a else np.full((batch, rows, columns), np.nan, np.float32)
    if c is not None:
        out = c.astype(np.float32)
    part = (depth + 16 * parts - 1) // (16 * parts) * 16
    parts = -(-depth // part)
    partial = np.full((batch, parts, rows, columns), np.nan, np.float32)
    p = Params(
        a_batch=rows * depth,
        b_batch=depth * columns,
        batch=batch,
        rows=rows,
        columns=columns,
        depth=depth,
        a_row=1 if transposed else depth,
        a_col=rows if transposed else 1,
        b_row=1 if turned else columns,
        b_col=depth if turned else 1,
        parts=parts,
        part=part,
        flags=flags(*names),
        alpha=alpha,
        noise=noise,
    )
    tiles = -(-rows // tile)
    each = -(-tiles // pieces)
    found: list[Finding] = []
    for first in range(0, tiles, each):
        p.first, p.tiles = first, min(each, tiles - first)
        found += sim.launch(
            kernel,
            grid=batch * parts * p.tiles,
            threads=256,
            buffers=dict(
                enumerate(
                    [
                        stored,
                        np.ascontiguousarray(b, np.float32),
                        partial if parts > 1 else out,
                        *numbers_of(m),
                    ]
                )
            ),
            params=(7, p),
            threadgroup_bytes=[4 * numbers],
            **more,
        )
    if parts > 1:
        found += sim.launch(
            "rsvd_sum",
            grid=batch * -(-rows * columns // 256),
            threads=256,
            buffers=dict(enumerate([partial, out, m.status, m.state, m.coefficient])),
            params=(5, p),
            **more,
        )
    return decode(out) if into_a else out, found


def near(x: np.ndarray, want: np.ndarray, scale: float) -> bool:
    return bool(np.max(np.abs(x - want)) <= 4 * ULP * scale)


def check_products(sim: Simulator, small: bool = False) -> str | None:
    """Every kind of product against NumPy; what is wrong, or None."""
    for kernel, rows, columns, depth in (
        ("rsvd_product_f32_n32", 150, 20, 37),
        ("rsvd_product_f16_n64", 129, 50, 40),
        ("rsvd_product_bf16_n128", 140, 101, 33),
        ("rsvd_product_f32_low_n32", 45, 20, 37),
        ("rsvd_product_f32_low_n64", 33, 50, 40),
    ):
        if small and "bf16" in kernel:
            continue
        storage = STORAGE[kernel.split("_")[2]]
        a = decode(encode(random_matrix((2, rows, depth), np.float32), storage))
        b = random_matrix((2, depth, columns), np.float32)
        want = a.astype(np.float64) @ b
        for parts, pieces in ((1, 2), (2, 1)):
            for transposed in (False, True):
                given = np.ascontiguousarray(np.swapaxes(a, 1, 2)) if transposed else a
                x, found = product(
                    sim, kernel, given, b, transposed=transposed, parts=parts, pieces=pieces
                )
                if found:
                    return str(found[0])
                if not near(x, want, depth):
                    return f"{kernel} {parts} {transposed}"
        turned = np.ascontiguousarray(np.swapaxes(b, 1, 2))
        x, found = product(sim, kernel, a, turned, turned=True)
        if found or not near(x, want, depth):
            return f"{kernel} turned {found}"
    return check_epilogues(sim)


def check_epilogues(sim: Simulator) -> str | None:
    kernel, batch = "rsvd_product_f32_n32", 4
    a = random_matrix((batch, 20, 20), np.float32)
    b = random_matrix((batch, 20, 20), np.float32)
    c = random_matrix((batch, 20, 20), np.float32, 5)
    plain = a.astype(np.float64) @ b
    for parts in (1, 2):
        m = Memory(batch)
        m.coefficient[:] = np.arange(batch) + 1
        names = ("ACCUMULATE", "COEFFICIENT")
        x, found = product(sim, kernel, a, b, c=c, memory=m, names=names, alpha=-2.0, parts=parts)
        want = c - 2 * m.coefficient[:, None, None] * plain
        if found or not near(x, want, 160):
            return f"accumulate {found}"
        # A matrix that is done is left alone, and one that is near gets no noise.
        m.state[:] = [FAR, NEAR, DONE, FAR]
        m.status[3] = 1
        names = ("UNLESS_DONE", "NOISE", "RESULT")
        x, found = product(sim, kernel, a, b, c=c, memory=m, names=names, noise=1.0, parts=parts)
        noise = x[0] - plain[0]
        if found or np.abs(noise).max() > 1.0001 or not 0.4 < noise.std() < 0.7:
            return f"noise {found}"
        if not near(x[1], plain[1], 40) or not np.array_equal(x[2], c[2]):
            return "states"
        if not np.isnan(x[3]).all():
            return "result"
        x, found = product(sim, kernel, a, b, c=c, memory=m, names=("UNLESS_NEAR",), parts=parts)
        if found or not np.array_equal(x[1:3], c[1:3]) or not near(x[::3], plain[::3], 40):
            return f"unless near {found}"
    # A panel times a small matrix may take the panel's place.
    x, found = product(sim, kernel, a, b, into_a=True)
    if found or not near(x, plain, 40):
        return f"in place {found}"
    # Denormals are not flushed; what is not finite is computed as zeros.
    tiny = a * np.float32(1e-39)
    m = Memory(batch)
    m.exponent[:] = 130
    m.status[2] = 1
    x, found = product(sim, kernel, tiny, b, memory=m, names=("SCALED",))
    want = tiny.astype(np.float64) * 2.0**130 @ b
    want[2] = 0
    if found or not near(x, want, 80):
        return f"scaled {found} {np.abs(x - want).max((1, 2))}"
    return None


def check_scan(sim: Simulator) -> str | None:
    # Numbers one by one, and 16 bytes at a time.
    for tag, (m, n) in itertools.product(STORAGE, ((25, 31), (24, 32))):
        a = decode(encode(random_matrix((3, m, n), np.float32), STORAGE[tag]))
        a[1, -1, -1] = 300.0
        a[2, 3, 4] = np.inf
        largest = np.zeros((3, 3), np.uint32)
        exponent, status, state = (np.full(3, 9, np.int32) for _ in range(3))
        p = Params(batch=3, rows=m, depth=n, parts=3)
        found = sim.launch(
            f"rsvd_scan_{tag}",
            grid=9,
            threads=256,
            buffers={0: encode(a, STORAGE[tag]), 1: largest},
            params=(2, p),
            threadgroup_bytes=[1024],
        )
        found += sim.launch(
            "rsvd_scale",
            grid=3,
            threads=256,
            buffers={0: largest, 1: exponent, 2: status, 3: state},
            params=(4, p),
            threadgroup_bytes=[1024],
        )
        top = np.abs(a[:2]).max((1, 2)) * 2.0 ** exponent[:2]
        if found or np.any(top < 1) or np.any(top >= 2):
            return f"scan {found}"
        if status.tolist() != [0, 0, 1] or state.any() or exponent[2] != 0:
            return "scale"
    ones = np.zeros(300, np.float32)
    found = sim.launch(
        "rsvd_ones", grid=2, threads=256, buffers={0: ones}, params=(1, Params(rows=300))
    )
    sigma = np.float32([[3, 2, 1], [3, 2, 1], [3, 2, 0]])
    s = np.full((3, 3), 7, np.float32)
    exponent, status = np.int32([0, 149, 24]), np.int32([0, 0, 2])
    found += sim.launch(
        "rsvd_values",
        grid=3,
        threads=128,
        buffers={0: sigma, 1: exponent, 2: status, 3: s},
        params=(4, Params(columns=3)),
    )
    want = np.ldexp(sigma[:2], -exponent[:2, None])
    if found or not np.all(ones == 1) or not np.array_equal(s[:2], want):
        return f"values {found}"
    return None if np.isnan(s[2]).all() else "values of a bad matrix"


class Factored(NamedTuple):
    inverse: np.ndarray
    scale: float
    length: float
    state: int
    status: int
    found: list[Finding]


def factor(
    sim: Simulator, gram: np.ndarray, n: int, state: int, *names: str, shift: float = 1e-5
) -> Factored:
    """One factorisation."""
    columns = gram.shape[0]
    inverse = np.full((columns, columns), np.nan, np.float32)
    length, scale = np.zeros(1, np.float32), np.full(1, np.nan, np.float32)
    states, status = np.int32([state]), np.zeros(1, np.int32)
    found = sim.launch(
        f"rsvd_factor_n{n}",
        grid=1,
        threads=n * n // 32,
        buffers={
            **{0: gram.astype(np.float32), 1: inverse, 2: length, 3: states, 4: status},
            5: scale,
        },
        params=(6, Params(columns=columns, flags=flags(*names), alpha=shift)),
        threadgroup_bytes=[4 * (34 * n + 32)],
    )
    return Factored(
        inverse, float(scale[0]), float(length[0]), int(states[0]), int(status[0]), found
    )


def bound(
    sim: Simulator, inverse: np.ndarray, scale: float, before: float, *names: str, length: float = 0
) -> tuple[float, float, list[Finding]]:
    """From the eighth power of a Gram matrix, as the plan has it formed."""
    g = inverse.astype(np.float64) @ inverse.T * scale
    g = 2.0**-27 * np.linalg.matrix_power(g, 4)
    best, coefficient = np.float32([before]), np.zeros(1, np.float32)
    found = sim.launch(
        "rsvd_bound",
        grid=1,
        threads=256,
        buffers={
            **{0: (g @ g).astype(np.float32), 1: np.float32([scale])},
            **{2: np.float32([length]), 3: best, 4: coefficient},
        },
        params=(5, Params(columns=len(g), flags=flags(*names), alpha=0.5, noise=1e-6)),
        threadgroup_bytes=[128],
    )
    return float(best[0]), float(coefficient[0]), found


def check_bases(sim: Simulator) -> str | None:
    for n, width in ((32, 21), (64, 43), (32, 32), (32, 28)):
        y = random_matrix((200, width), np.float64) * 10.0 ** np.linspace(0, -6, width)
        inverse, scale, length, state, _, found = factor(sim, y.T @ y, n, DONE)
        if found or state != DONE:
            return f"factor {found}"
        # Of long columns too: the largest entry then is below 1, as rows of padding have it.
        longer = factor(sim, 1e16 * (y.T @ y), n, DONE)
        for of, by in ((inverse, scale), (longer.inverse, longer.scale)):
            if abs(by * np.abs(of).max() ** 2 - 1) > 1e-5:
                return "scale"
        unit = np.linalg.norm(y, axis=0)
        r = np.linalg.cholesky(y.T @ y / unit / unit[:, None] + 1e-5 * np.eye(width)).T * unit
        if (
            np.abs(np.tril(inverse, -1)).max() > 0
            or np.abs(r @ inverse - np.eye(width)).max() > 1e-3
        ):
            return "inverse"
        if abs(length / np.linalg.norm(r) - 1) > 1e-5:
            return "length"
        sigma = np.linalg.svd(r, compute_uv=False)[-1]
        least, coefficient, found = bound(sim, inverse, scale, np.nan, "FIRST")
        if found or not 0.85 * sigma < least < 1.0001 * sigma:
            return f"bound {least / sigma} {found}"
        flat, _, found = bound(sim, np.eye(width, dtype=np.float32), 1.0, np.nan, "FIRST")
        if found or abs(flat * width ** (1 / 32) - 1) > 1e-5:
            return f"bound of equal values {flat} {found}"
        if abs(coefficient / (-0.5 * least**2) - 1) > 1e-5:
            return "coefficient"
        if bound(sim, inverse, scale, 2 * sigma)[0] != np.float32(2 * sigma):
            return "better bound"
        less, _, found = bound(sim, inverse, scale, np.nan, "FIRST", length=1e6 * sigma / 2)
        if found or abs(less - (least - sigma / 2)) > 1e-3 * sigma:
            return f"slack {found}"
        if bound(sim, inverse, 0.0, np.nan, "FIRST")[0] != 0:
            return "a bound of what cannot be squared"
        # Of a result's basis: near after one factorisation, and done with the next.
        q = y @ inverse
        inverse, *_, state, status, found = factor(sim, q.T @ q, n, FAR, "BASIS")
        if found or (state, status) != (NEAR, 0):
            return f"near {state} {found}"
        q = q @ inverse
        if np.abs(q.T @ q - np.eye(width)).max() > 1e-5:
            return "orthonormal"
        *_, state, status, found = factor(sim, q.T @ q, n, NEAR, "BASIS", "LAST")
        if found or (state, status) != (DONE, 0):
            return f"done {state} {found}"
        # Columns that depend on others, or are zero: never a NaN, and far from done.
        y[:, 3], y[:, 5] = y[:, 2], 0
        inverse, *_, state, status, found = factor(sim, y.T @ y, n, DONE, "BASIS", "FIRST", "LAST")
        if found or (state, status) != (FAR, 2) or not np.isfinite(inverse).all():
            return f"far {state} {found}"
        p = y @ inverse
        if np.abs(p[:, 3]).max() > 1e-4 or p[:, 5].any():
            return "a dependent column"
        if factor(sim, y.T @ y, n, DONE).length < 1e29:
            return "a bound in spite of that"
    return None


def check_triangle(sim: Simulator) -> str | None:
    core = random_matrix((2, 35, 35), np.float32)
    core[:, :, 6] *= 1e-7
    core[1, :, 9] *= 1e-5
    # No longer than the limit, to the bit: a row of 4, a column of 4 * 2^-20.
    core[0] = np.tril(core[0]) / 64
    core[0, 34], core[0, 34, 34] = 0, 4
    core[0, :, 7], core[0, 20, 7] = 0, 4 * 2.0**-20
    want = np.tril(core)
    want[:, :, 6] = 0
    want[0, :, 7] = 0
    found = sim.launch(
        "rsvd_triangle",
        grid=2,
        threads=512,
        buffers={0: core},
        params=(1, Params(columns=35, noise=8 * ULP)),
        threadgroup_bytes=[4 * 18 * 128],
    )
    return None if not found and np.array_equal(core, want) else f"triangle {found}"


def check_split(sim: Simulator) -> str | None:
    """A in two halves, next to a matrix that is not finite and one of denormals."""
    for n in (1030, 1028):  # numbers one by one, and in fours with some of the padding
        a = random_matrix((3, 5, n), np.float32)
        a[1, 2, 3] = np.nan
        a[2] *= np.float32(1e-41)
        exponent, status = np.int32([-3, 0, 136]), np.int32([0, 1, 0])
        high, low = (np.full((3, 5, 1032), 7, np.float16) for _ in range(2))
        found = sim.launch(
            "rsvd_split",
            grid=3 * 5 * 2,
            threads=256,
            buffers={0: a, 1: high, 2: low, 3: exponent, 4: status},
            params=(5, Params(batch=3, rows=5, depth=n, b_row=1032)),
        )
        got = high.astype(np.float64) + low.astype(np.float64) / 2048
        want = np.ldexp(a.astype(np.float64), exponent[:, None, None])
        want[1] = 0
        if found or got[..., n:].any():
            return f"split {found}"
        bound = 2.0**-22 * np.abs(want) + 2.0**-36
        if not np.all(np.abs(got[..., :n] - want) <= bound):
            return "halves"
    return None


def library_product(
    sim: Simulator, tag: str, exponent: np.ndarray, parts: int
) -> tuple[np.ndarray, np.ndarray, list[Finding]]:
    """What comes of a panel's pieces, and what should: 2^exponent times a matrix times the panel.

    NumPy stands for the library.
    """
    batch, rows, depth, columns, wide = len(exponent), 9, 40, 13, 16
    pieces = 3 if tag == "bf16" else 2
    a = decode(encode(random_matrix((batch, rows, depth), np.float32), STORAGE[tag]))
    x = random_matrix((batch, depth, columns), np.float32, 3)
    status = np.zeros(batch, np.int32)
    status[-1] = 1
    panel = encode(np.full((batch, depth, pieces * wide), 7, np.float32), STORAGE[tag]).copy()
    p = Params(batch=batch, rows=rows, columns=columns, depth=depth, b_row=pieces * wide)
    p.b_batch, p.parts, p.part = depth * columns, parts, pieces
    p.flags, p.alpha = flags("SCALED"), 2.0**-11 if pieces == 2 else 1.0
    found = sim.launch(
        f"rsvd_pieces_{tag}",
        grid=batch * -(-depth * wide // 256),
        threads=256,
        buffers={0: x, 1: panel, 2: exponent},
        params=(3, p),
    )
    each = depth // parts
    partial = np.stack(
        [
            a[:, :, i * each : (i + 1) * each].astype(np.float64)
            @ decode(panel)[:, i * each : (i + 1) * each]
            for i in range(parts)
        ],
        axis=1,
    )
    if partial[..., columns:wide].any():
        partial[:] = np.nan  # what is behind a panel's columns must be zeros
    c = np.full((batch, rows, columns), np.nan, np.float32)
    found += sim.launch(
        "rsvd_gather",
        grid=batch * -(-rows * (wide // 4) // 256),
        threads=256,
        buffers={0: partial.astype(np.float32), 1: c, 2: exponent, 3: status},
        params=(4, p),
    )
    want = np.ldexp(a.astype(np.float64) @ x, exponent[:, None, None])
    want[-1] = 0
    return c, want, found


def check_halves(sim: Simulator) -> str | None:
    if (what := check_split(sim)) is not None:
        return what
    for tag, exponent in (("f16", (0, -14, 24, 0)), ("bf16", (0, -119, 101, 0))):
        for parts in (1, 2):
            c, want, found = library_product(sim, tag, np.int32(exponent), parts)
            if found:
                return str(found[0])
            if np.any(np.abs(c - want) > 16 * ULP * np.ldexp(1.0, exponent)[:, None, None]):
                return f"{tag} {parts}"
    return None


def test_products(sim: Simulator) -> None:
    assert check_products(sim) is None


def test_halves(sim: Simulator) -> None:
    assert check_halves(sim) is None


def test_scan_and_values(sim: Simulator) -> None:
    assert check_scan(sim) is None


def test_bases(sim: Simulator) -> None:
    assert check_bases(sim) is None


def test_triangle(sim: Simulator) -> None:
    assert check_triangle(sim) is None


def test_same_bits_in_any_order_and_batch(sim: Simulator) -> None:
    a = random_matrix((3, 130, 40), np.float32)
    b = random_matrix((3, 40, 20), np.float32)
    x, found = product(sim, "rsvd_product_f32_n32", a, b, parts=2)
    assert found == []
    for seed in (1, 2):
        again, found = product(sim, "rsvd_product_f32_n32", a, b, parts=2, seed=seed)
        assert found == []
        np.testing.assert_array_equal(x, again)
    alone, _ = product(sim, "rsvd_product_f32_n32", a[1:2], b[1:2], parts=2)
    np.testing.assert_array_equal(x[1:2], alone)


@each_architecture
def test_cuda_without_spills(compiler: nvrtc.Nvrtc, arch: str) -> None:
    """The largest of each kind; on one architecture all."""
    names = ["rsvd_product_f32_n128", "rsvd_factor_n128"]
    if arch == "sm_90":
        names = [i.host_name for i in UNIT.instances]
    rows = nvrtc.report(compiler, UNIT, arch, names)
    assert sorted(r.kernel for r in rows) == sorted(names)
    for r in rows:
        print(f"{r.kernel:30} {r.arch} registers {r.registers} spills {r.spill_bytes}")
        assert r.spill_bytes == 0, r
        assert r.stack_bytes == 0, r
