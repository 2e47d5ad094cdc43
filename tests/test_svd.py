"""svd and svdvals: accuracy, status, dtypes, shapes, routes and errors."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import (
    check_svd,
    hard_matrices,
    launching,
    lowered_text,
    random_matrix,
    reference_sigma,
    relative_sigma_ulp,
    rng,
    sigma_bound,
    x64_for,
)
from hypothesis import given
from hypothesis import strategies as st

import jaxmetal_linalg as jml
from jaxmetal_linalg import _native
from jaxmetal_linalg._measure import sigma_error_ulp, svd_ratios

svd_module = importlib.import_module("jaxmetal_linalg.primitives.svd")
DTYPES = ("float32", "float64", "complex64", "complex128")


def cast(stack: list[np.ndarray], dtype: str) -> np.ndarray:
    a = np.stack(stack)
    if dtype.startswith("complex"):
        # Phases on rows and columns keep the spectrum and make every entry complex.
        m, n = a.shape[-2:]
        a = a * np.exp(1j * np.arange(m))[:, None] * np.exp(0.5j * np.arange(n))
    return a.astype(dtype)


# --- accuracy --------------------------------------------------------------------------------

ALL_SIZES = (*range(1, 65), 96, 127, 128, 129)
# The portable code compiles for about a second a shape, so it takes the sizes where code changes.
XLA_SIZES = (1, 2, 7, 8, 17, 127)
SIM_SIZES = (1, 2, 3, 4, 7, 8, 16, 17, 32, 33, 64, 127, 128)


@pytest.mark.once
def test_every_size(device: str) -> None:
    for n in ALL_SIZES if device == "host" else XLA_SIZES if device == "xla" else SIM_SIZES:
        t = np.arange(n) / max(n - 1, 1)
        q, r = (np.linalg.qr(rng(n, i).standard_normal((n, n)))[0] for i in (1, 2))
        a = np.stack([random_matrix((n, n), np.float64, n), (q * 10.0 ** (-6 * t)) @ r])
        a = a.astype(np.float32)
        reference = np.linalg.svd(a.astype(np.float64), compute_uv=False)
        result, info = jml.svd(a, method="jacobi", return_info=True)
        check_svd(a, result, reference=reference, full_matrices=True, label=f"n={n}")
        assert np.all(info.status == 0), n
        if device == "host":
            check_svd(a[0], jml.svd(a[0]), full_matrices=True, label=f"n={n}, one matrix")


@pytest.mark.parametrize("n", [256, 511, 1024])
@pytest.mark.once
def test_large(host: None, n: int) -> None:
    a = random_matrix((n, n), "float32", n)
    reference = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    check_svd(a, jml.svd(a), full_matrices=True, label="auto")
    result, info = jml.svd(a, method="jacobi", return_info=True)
    check_svd(a, result, reference=reference, full_matrices=True, label="jacobi")
    assert info.status == 0


@pytest.mark.slow
def test_large_portable() -> None:
    a = random_matrix((256, 256), "float32", 256)
    reference = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    check_svd(a, jml.svd(a, method="xla"), reference=reference, full_matrices=True)


@functools.lru_cache
def hard_case(n: int, dtype: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, matrices and reference singular values."""
    named = hard_matrices(n)
    a = cast(list(named.values()), dtype)
    if dtype in ("float32", "complex64"):
        wide = a.astype(np.complex128 if dtype == "complex64" else np.float64)
        return list(named), a, np.linalg.svd(wide, compute_uv=False)
    return list(named), a, np.stack([reference_sigma(x) for x in a])


def check_each(
    names: list[str],
    a: np.ndarray,
    result: Any,
    references: np.ndarray,
    label: str,
    full_matrices: bool = False,
) -> None:
    for i, name in enumerate(names):
        one = jml.SVDResult(*(np.asarray(x)[i] for x in result))
        check_svd(
            a[i], one, reference=references[i], full_matrices=full_matrices, label=f"{name} {label}"
        )


# The portable code is one program for all sizes, and compiles for a second or two a case.
HARD = [("host", n, dtype) for n in (2, 3, 8, 17, 32) for dtype in DTYPES]
HARD += [("xla", 3, dtype) for dtype in DTYPES] + [("xla", 32, "float32"), ("xla", 17, "complex64")]
HARD += [("xla", 8, "float64")]
HARD += [("sim", n, "float32") for n in (2, 3, 8, 17, 32)] + [("sim", 34, "complex64")]


@pytest.mark.parametrize(("device", "n", "dtype"), HARD, indirect=["device"])
@pytest.mark.once
def test_hard_matrices(device: str, n: int, dtype: str) -> None:
    names, a, references = hard_case(n, dtype)
    with x64_for(dtype):
        result, info = jml.svd(a, full_matrices=False, method="jacobi", return_info=True)
        values = np.asarray(jml.svdvals(a, method="jacobi"))
    check_each(names, a, result, references, f"n={n} {dtype}")
    for i, name in enumerate(names):
        assert sigma_error_ulp(values[i], references[i]) < sigma_bound(name), name
    assert np.all(np.asarray(info.status) == 0)


@pytest.mark.parametrize(("n", "dtype"), [(8, "complex64"), (32, "float64"), (63, "float32")])
@pytest.mark.parametrize("row", ["interleaved", "column", "block"])
@pytest.mark.once
def test_hard_matrices_on_each_row(
    host: None, row: str, n: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXMETAL_VARIANT", f"svd:{row}")
    names, a, references = hard_case(n, dtype)
    with x64_for(dtype):
        assert [c.variant for c in jml.explain(jml.svd, a).calls] == [row]
        result, info = jml.svd(a, full_matrices=False, return_info=True)
    check_each(names, a, result, references, f"n={n} {dtype} {row}")
    assert np.all(np.asarray(info.status) == 0)


@pytest.mark.parametrize("n", [7, 16])
@pytest.mark.parametrize("row", ["xor", "ring", "block8", "block16", "twin"])
@pytest.mark.once
def test_hard_matrices_on_each_kernel(
    sim: None, row: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXMETAL_VARIANT", f"svd:{row}")
    names, a, references = hard_case(n, "float32")
    size = {"block8": 40, "block16": 64, "twin": 40}.get(row, 8 if n <= 8 else 16)
    kernel = f"svd_{row}_vectors_f32_n{size}"
    before = _native.launches().get(kernel, 0)
    assert [c.variant for c in jml.explain(jml.svd, a).calls] == [row]
    result, info = jml.svd(a, full_matrices=False, return_info=True)
    check_each(names, a, result, references, f"n={n} {row}")
    assert np.all(np.asarray(info.status) == 0)
    assert _native.launches()[kernel] == before + (2 if row == "twin" else 1)


@pytest.mark.parametrize(("row", "n"), [("fused", 16), ("fused16", 7)])
@pytest.mark.once
def test_hard_matrices_on_fused(
    sim: None, row: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXMETAL_VARIANT", f"svd:{row}")
    names, a, references = hard_case(n, "float32")
    kernel = {"fused": "svd_fused_n256", "fused16": "svd_fused16_n2048"}[row]
    (call,) = jml.explain(jml.svd, a).calls
    assert (call.variant, kernel in call.reason) == (row, True)
    f = functools.partial(jml.svd, full_matrices=False, return_info=True)
    (result, info), ran = launching(f, a)
    assert ran[kernel] == 1
    assert sum(ran.values()) == call.launches
    check_each(names, a, result, references, f"n={n} {row}")
    assert np.all(np.asarray(info.status) == 0)
    np.testing.assert_array_equal(jml.svdvals(a), result.S)


@pytest.mark.once
def test_quarters_where_there_are_registers(sim: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMETAL_SIM_CAPS", "nvidia-h200")
    a = random_matrix((193, 200), "float32")
    (call,) = jml.explain(jml.svd, a).calls
    assert call.variant == "quarters"
    (u, s, vh), ran = launching(jax.jit(jml.svd), a)
    assert ran["svd_quarters_n256"] == 61
    assert sum(ran.values()) == call.launches
    check_svd(a, jml.SVDResult(u, s, vh), full_matrices=True)


@pytest.mark.parametrize(("n", "dtype"), [(17, "float64"), (8, "complex128")])
@pytest.mark.once
def test_hard_matrices_on_kernels_in_double(
    sim: None, n: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXMETAL_SIM_CAPS", "nvidia-a100")
    names, a, references = hard_case(n, dtype)
    with x64_for(dtype):
        result, info = jml.svd(a, full_matrices=False, return_info=True)
    assert result.S.dtype == np.float64
    check_each(names, a, result, references, f"n={n} {dtype}")
    assert np.all(np.asarray(info.status) == 0)


LARGE = [("host", 64), ("host", 128), ("xla", 64), ("sim", 64)]
LARGE += [pytest.param(device, 128, marks=pytest.mark.slow) for device in ("xla", "sim")]


@pytest.mark.parametrize(("device", "n"), LARGE, indirect=["device"])
@pytest.mark.once
def test_hard_matrices_large(device: str, n: int) -> None:
    names, a, references = hard_case(n, "float32")
    result = jml.svd(a, full_matrices=False, method="jacobi")
    check_each(names, a, result, references, f"n={n}")


@pytest.mark.parametrize("n", [8, 33])
def test_hard_matrices_auto_and_lapack(host: None, n: int) -> None:
    names, a, _ = hard_case(n, "float32")
    for method in ("auto", "lapack"):
        result, info = jml.svd(a, method=method, return_info=True)
        for i, name in enumerate(names):
            one = jml.SVDResult(*(np.asarray(x)[i] for x in result))
            check_svd(a[i], one, full_matrices=True, label=f"{name} n={n} {method}")
        assert np.all(np.asarray(info.status) <= 1)


RECTANGLES = [
    ("host", shape, full)
    for shape in [(24, 8), (8, 24), (130, 7), (7, 130), (65, 64), (33, 64)]
    for full in (True, False)
] + [("xla", (24, 8), True), ("xla", (7, 130), False), ("xla", (33, 64), True)]
RECTANGLES += [
    ("sim", shape, full) for shape in [(24, 8), (7, 30), (40, 9)] for full in (True, False)
]


@pytest.mark.parametrize(("device", "shape", "full"), RECTANGLES, indirect=["device"])
@pytest.mark.once
def test_hard_rectangles(device: str, shape: tuple[int, int], full: bool) -> None:
    m, n = shape
    k = min(m, n)
    named = hard_matrices(k)
    g = rng(m, n).standard_normal((max(m, n), k)) / np.sqrt(max(m, n))
    a = cast([g @ h for h in named.values()], "float32")
    if m < n:
        a = np.ascontiguousarray(np.swapaxes(a, -1, -2))
    references = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    result = jml.svd(a, full, method="jacobi")
    check_each(named, a, result, references, f"{shape}", full_matrices=full)


@pytest.mark.parametrize(("n", "decades"), [(16, 6), (16, 12), (32, 12), (64, 6), (64, 12)])
@pytest.mark.once
def test_relative_accuracy_of_scaled_columns(device: str, n: int, decades: int) -> None:
    """A = B D: every singular value is accurate relative to itself, which LAPACK cannot do."""
    g = rng(n, decades)
    b = g.standard_normal((3, n, n))
    d = 10.0 ** (-decades * g.permutation(n) / (n - 1))
    a = (b * d).astype(np.float32)
    values = np.asarray(jml.svdvals(a, method="jacobi"))
    s = np.asarray(jml.svd(a, method="jacobi").S)
    for i in range(len(a)):
        reference = reference_sigma(a[i])
        bound = jml.ACC_RELATIVE_SIGMA_ULP * n
        assert relative_sigma_ulp(s[i], reference) < bound
        assert relative_sigma_ulp(values[i], reference) < bound


def test_denormal_input(device: str) -> None:
    a = (random_matrix((5, 8, 8), np.float64) * 1e-42).astype(np.float32)
    assert np.any(a)
    assert np.all(np.abs(a) < np.finfo(np.float32).tiny)
    u, s, vh = (np.asarray(x) for x in jml.svd(a, method="jacobi"))
    reference = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    # One unit in the last (denormal) place is the best that the output type can hold.
    assert np.max(np.abs(s.astype(np.float64) - reference)) < 2 * 2.0**-149
    assert max(svd_ratios(np.eye(8, dtype=np.float32), u[0], np.ones(8), vh[0])[1:]) < jml.ACC_RATIO
    exact = (u.astype(np.float64) * reference[:, None, :]) @ vh.astype(np.float64)
    assert max(svd_ratios(a, u, reference, vh)) < jml.ACC_RATIO, np.max(np.abs(exact - a))


def test_very_tall(wide_device: str) -> None:
    a = random_matrix((400_000, 2), "float32")
    reference = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    check_svd(a, jml.svd(a, full_matrices=False), reference=reference)


@pytest.mark.once
def test_tall_and_wide(device: str) -> None:
    shapes = [(1, 9), (9, 1), (2, 3, 40, 6), (3, 6, 40), (500, 20), (20, 500)]
    for shape in shapes if device == "host" else shapes[1:4]:
        a = random_matrix(shape, "float32")
        reference = np.linalg.svd(a.astype(np.float64), compute_uv=False)
        for full in (True, False):
            check_svd(
                a, jml.svd(a, full), reference=reference, full_matrices=full, label=str(shape)
            )


@given(
    m=st.sampled_from([1, 2, 3, 5, 8, 13]),
    n=st.sampled_from([1, 2, 4, 7, 12]),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-30, 30),
    rank=st.integers(0, 12),
)
@pytest.mark.once
def test_any_matrix(host: None, m: int, n: int, seed: int, exponent: int, rank: int) -> None:
    g = rng(seed)
    r = min(rank, m, n)
    a = g.standard_normal((m, r)) @ g.standard_normal((r, n)) * 10.0**exponent
    a = a.astype(np.float32)
    check_svd(a, jml.svd(a), reference=reference_sigma(a), full_matrices=True)


# --- types and shapes ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.once
def test_half_types(device: str, dtype: str) -> None:
    a = jnp.asarray(random_matrix((4, 12, 7), np.float32)).astype(dtype)
    result = jml.svd(a, full_matrices=False)
    assert all(x.dtype == a.dtype for x in result)
    assert jml.svdvals(a).dtype == a.dtype
    wide = jml.svd(a.astype(jnp.float32), full_matrices=False)
    # Computed in float32 and rounded once.
    for x, y in zip(result, wide, strict=True):
        close = np.asarray(y.astype(dtype), np.float32)
        assert np.max(np.abs(np.asarray(x, np.float32) - close)) <= 2 * float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int32", "int64"])
def test_integers_promote_as_jnp(dtype: str, x64: bool) -> None:
    a = rng(1).integers(0, 2, (4, 3)).astype(dtype)
    with jax.enable_x64(x64):
        mine, theirs = jml.svd(a), jnp.linalg.svd(a)
        for x, y in zip(mine, theirs, strict=True):
            assert x.dtype == y.dtype
            assert x.shape == y.shape
        np.testing.assert_allclose(mine.S, theirs.S, atol=1e-6)


def test_sequences_and_numpy(device: str) -> None:
    a = random_matrix((3, 3), "float32")
    same = jml.svd([a[0], a[1], a[2]])
    np.testing.assert_array_equal(same.S, jml.svd(jnp.asarray(a)).S)


@pytest.mark.parametrize(
    "shape", [(0, 0), (0, 3), (3, 0), (0, 4, 5), (2, 0, 5), (2, 5, 0), (3, 0, 4, 4)]
)
@pytest.mark.once
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    a = np.zeros(shape, np.float32)
    for full in (True, False):
        mine, info = jml.svd(a, full, return_info=True)
        theirs = jnp.linalg.svd(a, full)
        for x, y in zip(mine, theirs, strict=True):
            assert x.shape == y.shape
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        assert all(x.shape == shape[:-2] for x in info)
    assert jml.svdvals(a).shape == (*shape[:-2], min(shape[-2:]))
    grad = jax.grad(lambda a: jml.svd(a).S.sum())(a)
    assert grad.shape == shape


def test_result_types(device: str) -> None:
    a = random_matrix((2, 4, 3), "float32")
    result, info = jml.svd(a, return_info=True)
    assert isinstance(result, jml.SVDResult)
    assert isinstance(info, jml.SVDInfo)
    assert info.status.dtype == info.sweeps.dtype == jnp.int32
    assert info.off_norm.dtype == jnp.float32
    s, info = jml.svd(a, compute_uv=False, return_info=True)
    assert s.shape == (2, 3)
    assert isinstance(info, jml.SVDInfo)
    np.testing.assert_array_equal(s, jml.svdvals(a))
    s, info = jml.svdvals(a, return_info=True)
    assert info.status.shape == (2,)


# --- status ----------------------------------------------------------------------------------


NON_FINITE = [
    ("host", method, n, dtype)
    for method in ("auto", "jacobi", "lapack")
    for n in (5, 40)
    for dtype in ("float32", "complex64", "bfloat16")
] + [
    ("xla", "auto", 5, "float32"),
    ("xla", "auto", 5, "complex64"),
    ("xla", "auto", 40, "bfloat16"),
    ("sim", "auto", 5, "float32"),
    ("sim", "jacobi", 5, "bfloat16"),
    ("sim", "auto", 33, "float16"),
]


@pytest.mark.parametrize(("device", "method", "n", "dtype"), NON_FINITE, indirect=["device"])
@pytest.mark.once
def test_non_finite_spoils_its_own_matrix_only(
    device: str, method: str, n: int, dtype: str
) -> None:
    good = jnp.asarray(random_matrix((6, n + 2, n), "complex64" if "c" in dtype else "float32"))
    good = good.astype(dtype)
    bad = good.at[1, 2, 3].set(jnp.nan).at[3, 0, 0].set(jnp.inf).at[4, 1, 1].set(-jnp.inf)
    result, info = jml.svd(bad, method=method, return_info=True)
    clean = jml.svd(good, method=method)
    np.testing.assert_array_equal(info.status, [0, 3, 0, 3, 3, 0])
    for x, y in zip(result, clean, strict=True):
        x, y = (np.asarray(v.astype("complex64" if "c" in dtype else "float32")) for v in (x, y))
        assert np.all(np.isnan(x[[1, 3, 4]]))
        np.testing.assert_array_equal(x[[0, 2, 5]], y[[0, 2, 5]])
    s, info = jml.svdvals(bad, method=method, return_info=True)
    np.testing.assert_array_equal(info.status, [0, 3, 0, 3, 3, 0])
    assert np.all(np.isnan(np.asarray(s.astype(jnp.float32))[[1, 3, 4]]))


def test_info_tells_the_iteration(device: str) -> None:
    easy, hard = np.eye(16, dtype=np.float32), random_matrix((16, 16), "float32")
    _, info = jml.svd(np.stack([easy, hard]), method="jacobi", return_info=True)
    assert info.sweeps[0] <= 1 < info.sweeps[1] < 20
    assert info.off_norm[0] == 0 < info.off_norm[1] < 1e-2


def test_no_convergence_is_nan(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = "max_sweeps=1"
    if device in ("host", "xla"):  # the kernels have no second algorithm
        keys += f",{device}.svd.fallback_max_sweeps=1"
    monkeypatch.setenv("JAXMETAL_TUNING", f"{device}.svd.{keys}")
    a = np.stack([np.eye(24), random_matrix((24, 24), np.float64)]).astype(np.float32)
    result, info = jml.svd(a, method="jacobi", return_info=True)
    np.testing.assert_array_equal(info.status, [0, 2])
    for x in result:
        assert np.all(np.isfinite(x[0]))
        assert np.all(np.isnan(x[1]))


@pytest.mark.parametrize("name", ["host", "xla"])
@pytest.mark.once
def test_second_algorithm_after_jacobi(
    host: None, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXMETAL_TUNING", f"{name}.svd.max_sweeps=1")
    shapes = [(3, 24, 24), (3, 9, 17), (3, 6, 6), (3, 80, 80), (3, 2, 2)]
    for shape in shapes if name == "host" else shapes[:2]:
        a = random_matrix(shape, "float32")
        if min(shape) > 2:
            a[1] = np.eye(*shape[1:])
        with jml.use_device(name):
            result, info = jml.svd(a, method="jacobi", return_info=True)
        if min(shape) > 2:
            np.testing.assert_array_equal(info.status, [1, 0, 1])
        check_svd(a, result, full_matrices=True, label=f"{shape}")


@pytest.mark.parametrize("compute_uv", [True, False])
def test_second_algorithm_after_lapack(
    host: None, compute_uv: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LAPACK gives up on rare matrices: played by a stand-in that does so on a marked one."""
    real = svd_module.lax.linalg.svd

    def gives_up(x: Any, **options: Any) -> Any:
        out = real(x, **options)
        mark = jnp.where(x[..., 0, 0] == 0, jnp.nan, 0)
        if not options["compute_uv"]:
            return (
                [out[0] + mark[:, None]] if isinstance(out, (list, tuple)) else out + mark[:, None]
            )
        return [v + mark.reshape((-1,) + (1,) * (v.ndim - 1)) for v in out]

    monkeypatch.setattr(svd_module.lax.linalg, "svd", gives_up)
    a = random_matrix((3, 21, 19), "float32")
    a[1, 0, 0] = 0
    f = jax.jit(lambda a: jml.svd(a, True, compute_uv, method="lapack", return_info=True))
    result, info = f(a)
    np.testing.assert_array_equal(info.status, [0, 1, 0])
    if compute_uv:
        check_svd(a, result, full_matrices=True)
    else:
        np.testing.assert_allclose(result, np.linalg.svd(a, compute_uv=False), rtol=1e-5)


# --- routes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["interleaved", "column", "block"])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.once
def test_forced_variants(
    host: None, variant: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXMETAL_VARIANT", f"svd:{variant}")
    for n in (5, 12, 40):
        a = random_matrix((5, n, n), dtype)
        if variant == "interleaved" and n > 16:
            continue
        (call,) = jml.explain(jml.svd, a).calls
        assert (call.device, call.route, call.variant) == ("host", "host", variant)
        text = lowered_text(jml.svd, a)
        assert "jml_svd_v1" in text
        assert variant in text
        assert "lapack" not in text
        reference = np.stack([reference_sigma(x) for x in a])
        check_svd(a, jml.svd(a), reference=reference, full_matrices=True, label=f"{variant} {n}")


def test_methods_take_their_route(host: None) -> None:
    a = random_matrix((4, 20, 20), "float32")
    for method, native, lapack in (
        ("jacobi", True, False),
        ("block_jacobi", True, False),
        ("lapack", False, True),
        ("xla", False, False),
    ):
        text = lowered_text(lambda a, method=method: jml.svd(a, method=method), a)
        # LAPACK's rare failures are retried natively, inside a branch.
        assert ("jml_svd_v1" in text) == (native or lapack), method
        assert ("lapack_sgesdd" in text) == lapack, method
        (call,) = jml.explain(jml.svd, a, method=method).calls
        expected = "lapack" if lapack else "host" if native else "portable"
        assert call.route == expected
        assert call.device == ("xla" if method == "xla" else "host")
        check_svd(a, jml.svd(a, method=method), full_matrices=True, label=method)


def test_auto_sends_one_large_matrix_to_lapack(host: None) -> None:
    text = lowered_text(jml.svd, jax.ShapeDtypeStruct((1024, 1024), jnp.float32))
    assert "lapack_sgesdd" in text
    text = lowered_text(jml.svd, jax.ShapeDtypeStruct((1000, 8, 8), jnp.float32))
    assert "lapack_sgesdd" not in text
    assert "jml_svd_v1" in text


def test_portable_code_is_plain_and_small() -> None:
    def f(a: Any) -> Any:
        return jml.svd(a, method="xla")

    small, large = (lowered_text(f, jax.ShapeDtypeStruct((n, n), jnp.float32)) for n in (8, 64))
    assert "custom_call" not in large
    # One loop, not a graph unrolled over columns or sweeps.
    assert large.count("\n") < small.count("\n") + 20


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [jml.svd, jml.svdvals])
def test_errors(function: Any) -> None:
    name = function.__name__
    good = np.ones((3, 3), np.float32)
    with pytest.raises(
        ValueError, match=rf"{name}: argument a: expected shape .* got shape \(3,\)"
    ):
        function(good[0])
    with pytest.raises(ValueError, match=rf"{name}: argument a: .*rank 0"):
        function(1.0)
    for bad in ("text", [["a", "b"]], object(), np.array([[None]]), None):
        with pytest.raises(TypeError, match=rf"{name}: argument a: expected"):
            function(bad)
    with pytest.raises(TypeError, match=rf"{name}: argument a: expected dtype .* float8"):
        function(jnp.ones((2, 2), jnp.float8_e5m2))
    with pytest.raises(ValueError, match=rf"{name}: argument method: expected one of auto.*'qr'"):
        function(good, method="qr")
    with pytest.raises(
        TypeError, match=rf"{name}: argument method: expected one of auto.*3 of type"
    ):
        function(good, method=3)
    with pytest.raises(ValueError, match=rf"{name}: argument gradient: expected one of safe, str"):
        function(good, gradient="none")
    with pytest.raises(TypeError, match=rf"{name}: argument return_info: expected a static bool"):
        function(good, return_info="yes")


def test_option_errors() -> None:
    good = np.ones((3, 3), np.float32)
    with pytest.raises(TypeError, match="svd: argument full_matrices: expected a static bool"):
        jml.svd(good, full_matrices=None)
    with pytest.raises(TypeError, match="svd: argument compute_uv: expected a static bool"):
        jax.jit(jml.svd)(good, True, True)
    with (
        jml.use_device("xla"),
        pytest.raises(ValueError, match=r"svd: argument method: .* got 'lapack'"),
    ):
        jml.svd(good, method="lapack")
