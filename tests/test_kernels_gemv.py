"""Every row of the variant table of kernels/gemv.metal, run by the simulator in checked mode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from harness import shipped
from test_kernels import decode, encode

from tools.msl.layout import GemvVariant, gemv_variants, structure
from tools.msl.parse import parse_file
from tools.msl.simulate import ROOT, Finding, Simulator

UNIT = parse_file(ROOT / "kernels" / "gemv.metal", "kernels/gemv.metal")
Params = structure(UNIT, "GemvParams")
VARIANTS = {v.name: v for v in gemv_variants(UNIT)}
FINISH = {"float": "f32", "half": "f16", "bfloat": "bf16"}
EPS = {"float": 2.0**-24, "half": 2.0**-11, "bfloat": 2.0**-8}
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
BIAS, ACCUMULATE, RESIDUAL = 1, 2, 4


def store(a: np.ndarray, storage: str) -> np.ndarray:
    """As a kernel reads it; complex numbers as pairs."""
    if np.iscomplexobj(a):
        a = np.ascontiguousarray(a, np.complex64).view(np.float32)
    return encode(a, storage)


def value(a: np.ndarray, storage: str) -> np.ndarray:
    """What storing leaves of it."""
    return a if np.iscomplexobj(a) else decode(encode(a, storage))


@dataclass
class Outcome:
    out: np.ndarray
    findings: list[Finding]


def run(
    sim: Simulator,
    v: GemvVariant,
    a: np.ndarray,
    x: np.ndarray,
    *,
    y: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    alpha: complex = 1.0,
    beta: complex = 0.0,
    activation: str = "none",
    conjugate: bool = False,
    parts: int = 1,
    scratch_less: int = 0,
    **options: Any,
) -> Outcome:
    """One product on a [batch, m, n] and x [batch, nrhs, depth] array."""
    batch, m, n = a.shape
    nrhs, depth = x.shape[1:]
    outputs = n if v.transposed else m
    assert depth == (m if v.transposed else n)
    assert v.fits(n)
    out = store(np.full((batch, nrhs, outputs), 77.0, x.dtype), v.x_storage)
    given = {BIAS: bias, ACCUMULATE: y if beta != 0 else None, RESIDUAL: residual}
    flags = sum(k for k, z in given.items() if z is not None)
    chunks = v.chunks(depth)
    part = max(1, -(-chunks // parts))
    p = Params(
        a_batch=m * n * v.width,
        batch=batch,
        outputs=outputs,
        depth=depth,
        stride=n * v.width,
        nrhs=nrhs,
        rhs_groups=-(-nrhs // v.vectors),
        blocks=-(-outputs // v.outputs),
        parts=-(-chunks // part),
        part=part,
        flags=flags,
        activation=ACTIVATIONS.index(activation),
        alpha_re=np.real(alpha),
        alpha_im=np.imag(alpha),
        beta_re=np.real(beta),
        beta_im=np.imag(beta),
        conjugate=-1.0 if conjugate else 1.0,
    )
    kept = store(x, v.x_storage)

    def extra(z: np.ndarray | None) -> np.ndarray:
        return kept if z is None else store(z, v.x_storage)

    ends = [extra(y), extra(bias), extra(residual), out]
    partial = np.full(batch * nrhs * outputs * p.parts * v.width, np.nan, np.float32)
    buffers = [store(a, v.storage), kept, *ends] + ([partial] if v.splits else [])
    findings = sim.launch(
        v.name,
        grid=p.blocks * p.parts * p.rhs_groups * batch,
        threads=v.threads,
        buffers=dict(enumerate(buffers)),
        params=(len(buffers), p),
        threadgroup_bytes=[v.scratch_bytes - scratch_less] if v.splits else [],
        **options,
    )
    if p.parts > 1 and not findings:
        findings = sim.launch(
            "gemv_finish_" + ("c64" if v.width == 2 else FINISH[v.x_storage]),
            grid=-(-(batch * nrhs * outputs) // 256),
            threads=256,
            buffers=dict(enumerate([*ends, partial])),
            params=(5, p),
            **options,
        )
    result = out.view(np.complex64) if v.width == 2 else decode(out)
    return Outcome(result.reshape(batch, nrhs, outputs), findings)


def activate(z: np.ndarray, name: str) -> np.ndarray:
    if name == "relu":
        return np.maximum(z, 0)
    if name == "gelu":
        return np.vectorize(lambda t: 0.5 * t * math.erfc(-t / math.sqrt(2)))(z)
    if name == "gelu_tanh":
        return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    if name == "silu":
        return z / (1 + np.exp(-z))
    if name == "sigmoid":
        return 1 / (1 + np.exp(-z))
    return np.tanh(z) if name == "tanh" else z


def random(*shape: int, complex_: bool = False, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng((seed, *shape))
    a = rng.standard_normal(shape).astype(np.float32)
    return a + 1j * rng.standard_normal(shape).astype(np.float32) if complex_ else a


def case(
    v: GemvVariant, batch: int, outputs: int, depth: int, nrhs: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    shape = (batch, depth, outputs) if v.transposed else (batch, outputs, depth)
    wide = v.width == 2
    a = value(random(*shape, complex_=wide, seed=seed), v.storage)
    return a, value(random(batch, nrhs, depth, complex_=wide, seed=seed + 1), v.x_storage)


def product(v: GemvVariant, a: np.ndarray, x: np.ndarray) -> np.ndarray:
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    op = a.astype(wide) if v.transposed else np.swapaxes(a, 1, 2).astype(wide)
    return x.astype(wide) @ op


def assert_product(v: GemvVariant, a: np.ndarray, x: np.ndarray, o: Outcome) -> None:
    """Within 2 eps of the result's storage and depth * eps32 of |A| |x|."""
    assert o.findings == []
    bound = product(v, np.abs(a), np.abs(x)) * (
        2 * EPS[v.x_storage] + x.shape[2] * v.width * EPS["float"]
    )
    error = np.abs(o.out - product(v, a, x))
    assert np.all(error <= bound), float(np.max(error / bound))


@pytest.fixture(scope="session")
def sim() -> Simulator:
    return shipped()


def sizes(v: GemvVariant) -> list[tuple[int, int, int, int, int]]:
    """Batch, outputs, depth, vectors, parts: more than a threadgroup, and less than a lane has."""
    deep = 32 * v.unroll + 3 if v.transposed else (v.lanes * v.unroll + 5) * v.chunk // v.width
    some = v.outputs + (v.chunk // v.width if v.transposed else 1)
    unit = v.chunk // v.width
    small = (1, unit, 1, 1, 1) if v.transposed else (1, 1, unit, 1, 1)
    return [
        (2, some, deep, max(1, v.vectors - 1), 1),
        (1, some, deep, v.vectors + 1, 3 if v.splits else 1),
        small,
    ]


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant(sim: Simulator, name: str) -> None:
    v = VARIANTS[name]
    for batch, outputs, depth, nrhs, parts in sizes(v):
        a, x = case(v, batch, outputs, depth, nrhs)
        assert_product(v, a, x, run(sim, v, a, x, parts=parts))


MAIN = "f32"  # where one dtype tells enough
CORE = ("rows", "split", "column", "anysplit")
NAMED = {k: VARIANTS[f"gemv_{k}_{MAIN}_m1"] for k in (*CORE, "any", "tiny", "wide", "wideread")}


@pytest.mark.parametrize("kind", CORE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(sim: Simulator, kind: str, activation: str) -> None:
    v = NAMED[kind]
    a, x = case(v, 1, 24, 36, 2)
    y, bias, residual = (random(1, 2, 24, seed=s) for s in (5, 6, 7))
    given = {"y": y, "bias": bias, "residual": residual}
    o = run(sim, v, a, x, **given, alpha=0.75, beta=-1.5, activation=activation)
    assert o.findings == []
    z = 0.75 * product(v, a, x) - 1.5 * y + bias
    np.testing.assert_allclose(o.out, activate(z, activation) + residual, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_activations_far_out(sim: Simulator, activation: str) -> None:
    """Relative to the value itself, tails included; never NaN."""
    v = NAMED["rows"]
    z = np.array([-100, -30, -8, -3, -1, -1e-3, -1e-6, 0, 1e-6, 1e-3, 1, 3, 8, 30, 100], np.float32)
    a = np.zeros((1, len(z), 4), np.float32)
    a[0, :, 0] = z
    o = run(sim, v, a, np.array([[[1, 0, 0, 0]]], np.float32), activation=activation)
    with np.errstate(over="ignore", under="ignore"):
        want = activate(z.astype(np.float64), activation)
    np.testing.assert_allclose(o.out[0, 0], want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", [n for n in sorted(VARIANTS) if "c64" in n and "_m16" not in n])
def test_complex_flags(sim: Simulator, name: str) -> None:
    v = VARIANTS[name]
    a, x = case(v, 1, 6, 10, 2)
    y, bias = random(1, 2, 6, complex_=True, seed=5), random(1, 2, 6, complex_=True, seed=6)
    o = run(sim, v, a, x, y=y, bias=bias, alpha=1 - 2j, beta=0.5j, conjugate=True)
    assert o.findings == []
    want = (1 - 2j) * product(v, a.conj(), x) + 0.5j * y + bias
    np.testing.assert_allclose(o.out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CORE)
def test_beta_zero_never_reads_y(sim: Simulator, kind: str) -> None:
    v = NAMED[kind]
    a, x = case(v, 1, 8, 12, 1)
    o = run(sim, v, a, x, y=np.full((1, 1, 8), np.nan, np.float32), beta=0.0)
    assert_product(v, a, x, o)


@pytest.mark.parametrize("kind", sorted(NAMED))
def test_same_bits_whatever_the_batch(sim: Simulator, kind: str) -> None:
    """And whatever the order of threads, and the number of vectors where the class has more."""
    v = NAMED[kind]
    parts = 2 if v.splits else 1
    a, x = case(v, 3, 40, 36 * (64 if v.splits else 1), 4)
    whole = run(sim, v, a, x, parts=parts)
    assert whole.findings == []
    for seed in (1, 2):
        again = run(sim, v, a, x, parts=parts, seed=seed)
        assert again.findings == []
        assert np.array_equal(whole.out, again.out)
    one = run(sim, v, a[2:], x[2:, 1:2], parts=parts)
    assert np.array_equal(one.out, whole.out[2:, 1:2])
    if more := VARIANTS.get(v.name.replace("_m1", "_m4")):
        assert np.array_equal(run(sim, more, a, x, parts=parts).out, whole.out)


@pytest.mark.parametrize("kind", ["rows", "wide", "split"])
def test_inf_and_nan_stay_where_they_are(sim: Simulator, kind: str) -> None:
    """Lanes behind the end of a row add nothing, not Inf times zero."""
    v = NAMED[kind]
    a, x = case(v, 1, 20, 36, 1)
    # The last term of every sum.
    if v.transposed:
        a[:, -1, :] = np.inf
    else:
        a[:, :, -1] = np.inf
    o = run(sim, v, a, x)
    assert o.findings == []
    with np.errstate(invalid="ignore"):
        want = product(v, a, x)
    assert np.array_equal(np.isinf(o.out), np.isinf(want))
    assert not np.isnan(o.out).any()


@pytest.mark.parametrize("name", sorted(v.name for v in VARIANTS.values() if v.splits))
def test_scratch_is_what_the_kernel_uses(sim: Simulator, name: str) -> None:
    """With the last word in use taken away, the judge objects."""
    v = VARIANTS[name]
    a, x = case(v, 1, v.outputs, 32 * v.simdgroups if v.transposed else 8, v.vectors)
    o = run(sim, v, a, x, scratch_less=4)
    assert {f.kind for f in o.findings} == {"out_of_bounds"}
    assert "threadgroup argument tile" in o.findings[0].text


def test_table() -> None:
    for v in VARIANTS.values():
        assert v.threads <= 1024
        assert v.scratch_bytes <= 32768
        assert v.name == f"gemv_{v.variant}_{v.name.split('_')[2]}_m{v.vectors}"
        assert {"kGemvBias", "kGemvAccumulate", "kGemvResidual"} <= v.flags
        assert ("kGemvActivation" in v.flags) == (v.width == 1)
        # A row that any length fits, in each class of dtypes and for up to 16 vectors.
    for tag in ("f32", "f16", "bf16", "f16f32", "bf16f32", "c64"):
        for kind in ("any", "column"):
            assert VARIANTS[f"gemv_{kind}_{tag}_m16"].fits(1)


def test_unchecked_mode_gives_the_same_bits(sim: Simulator) -> None:
    names = ("gemv_split_f16_m1", "gemv_finish_f16", "gemv_wide_f16_m1")
    for name in (names[0], names[2]):
        v = VARIANTS[name]
        a, x = case(v, 1, 24, 3000 if v.splits and not v.transposed else 64, 1)
        kept = {"parts": 2}
        judged, plain = run(sim, v, a, x, **kept), run(sim, v, a, x, checked=False, **kept)
        assert np.array_equal(judged.out, plain.out)
