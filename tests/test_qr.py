"""qr and what is made of it: accuracy, routes, transformations, derivatives and errors."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import hard_matrices, launched, lowered_text, random_matrix, x64_for
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

import jaxmetal_linalg as jml
from jaxmetal_linalg import _native
from jaxmetal_linalg._measure import qr_ratios

qr_module = importlib.import_module("jaxmetal_linalg.primitives.qr")
DTYPES = ("float32", "float64", "complex64", "complex128")
ROWS = ("interleaved", "tsqr", "blocked", "lapack")
MODES = ("reduced", "complete", "r")


def adjoint(x: Any) -> Any:
    return np.swapaxes(np.conj(x), -1, -2)


def check_qr(a: np.ndarray, result: Any, mode: str = "reduced", label: Any = "") -> None:
    """Asserts shapes, dtypes, the triangle, its diagonal and LAPACK's ratios."""
    q, r = (np.asarray(x) for x in result)
    m, n = a.shape[-2:]
    kq = m if mode == "complete" else min(m, n)
    assert q.shape == (*a.shape[:-2], m, kq), label
    assert r.shape == (*a.shape[:-2], kq, n), label
    assert q.dtype == r.dtype == a.dtype, label
    assert not np.any(np.tril(r, -1)), f"{label}: not a triangle"
    diagonal = np.diagonal(r, axis1=-2, axis2=-1)
    assert np.all(diagonal.real >= 0), f"{label}: diagonal"
    assert np.all(diagonal.imag == 0), f"{label}: diagonal"
    ratios = qr_ratios(a, q, r)
    assert max(ratios) < jml.ACC_RATIO, f"{label}: {ratios}"


def with_phases(a: np.ndarray, dtype: str) -> np.ndarray:
    if dtype.startswith("complex"):
        m, n = a.shape[-2:]
        a = a * np.exp(1j * np.arange(m))[:, None] * np.exp(0.5j * np.arange(n))
    return a.astype(dtype)


def force(monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    monkeypatch.setenv("JAXMETAL_VARIANT", f"qr:{row}")


# --- accuracy --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 17])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.once
def test_hard_matrices(
    host: None, row: str, dtype: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, row)
    named = hard_matrices(n)
    a = with_phases(np.stack(list(named.values())), dtype)
    with x64_for(dtype):
        assert [c.variant for c in jml.explain(jml.qr, a).calls] == [row]
        result = jml.qr(a)
    for i, name in enumerate(named):
        check_qr(a[i], [x[i] for x in result], label=(name, n, dtype, row))


@pytest.mark.parametrize(("n", "dtype"), [(3, "complex64"), (9, "float32"), (9, "float64")])
@pytest.mark.once
def test_hard_matrices_in_plain_xla(n: int, dtype: str) -> None:
    named = hard_matrices(n)
    a = with_phases(np.stack(list(named.values())), dtype)
    with x64_for(dtype):
        result = jml.qr(a, method="xla")
    for i, name in enumerate(named):
        check_qr(a[i], [x[i] for x in result], label=(name, n, dtype))


def tall_matrices(m: int, n: int) -> dict[str, np.ndarray]:
    """Named m x n matrices, m >= n, in float64."""
    g = np.random.default_rng(m + n)
    gauss = g.standard_normal((m, n))
    t = np.arange(n) / max(n - 1, 1)
    mix = np.linalg.qr(g.standard_normal((n, n)))[0]
    basis = np.linalg.qr(gauss)[0]
    rank = max(n // 2, 1)
    named = {
        "gauss": gauss,
        "cond_1e6": basis * 10.0 ** (-6 * t) @ mix,
        "cond_1e15": basis * 10.0 ** (-15 * t) @ mix,
        "graded_rows": 10.0 ** (-15 * np.arange(m) / m)[:, None] * gauss,
        "graded_rows_up": 10.0 ** (-15 * np.arange(m)[::-1] / m)[:, None] * gauss,
        "graded_columns": gauss * 10.0 ** (-15 * t),
        "low_rank": gauss[:, :rank] @ g.standard_normal((rank, n)),
        "zero": np.zeros((m, n)),
        "ones": np.ones((m, n)),
        "zero_top": np.where(np.arange(m)[:, None] < m // 2, 0, gauss),
        "zero_column": np.where(np.arange(n) == n // 2, 0, gauss),
        "scaled_1e30": gauss * 1e30,
        "scaled_1e-30": gauss * 1e-30,
    }
    return named


TALL = [(row, 700, 3, "float32") for row in ROWS]
TALL += [("blocked", 500, 70, t) for t in DTYPES]
TALL += [("gram", 3000, n, t) for n, t in ((32, "float32"), (17, "float64"), (16, "complex64"))]
TALL += [("tsqr", *size, t) for t in DTYPES for size in ((5000, 9), (3000, 33))]


@pytest.mark.parametrize(("row", "m", "n", "dtype"), TALL)
@pytest.mark.once
def test_tall(
    host: None, row: str, m: int, n: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, row)
    named = tall_matrices(m, n)
    a = with_phases(np.stack(list(named.values())), dtype)
    with x64_for(dtype):
        result = jml.qr(a)
        triangle = jml.qr(a, "r")
    for i, name in enumerate(named):
        check_qr(a[i], [x[i] for x in result], label=(name, m, n, dtype, row))
    np.testing.assert_array_equal(triangle, result.R)


@pytest.mark.once
def test_columns_keep_their_own_accuracy(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the native rows the residual of a column is small against that column."""
    a = (random_matrix((4, 900, 6), np.float64) * 10.0 ** -np.arange(0, 30, 5)).astype(np.float32)
    for row in ("interleaved", "tsqr"):
        force(monkeypatch, row)
        q, r = (np.asarray(x, np.float64) for x in jml.qr(a))
        error = np.linalg.norm(a - q @ r, axis=-2) / np.linalg.norm(a.astype(np.float64), axis=-2)
        assert np.max(error) < 1e-5, row


@pytest.mark.once
def test_the_ends_of_the_range(device: str) -> None:
    for scale in (1e37, 1e-37, 1e-41):
        a = (random_matrix((2, 40, 9), np.float64) * scale).astype(np.float32)
        check_qr(a, jml.qr(a), label=scale)


# Around the number of columns taken together, lanes, blocks of rows and levels.
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.once
def test_sizes_of_small_matrices(host: None, dtype: str) -> None:
    for m, n in [(i, i) for i in range(1, 20)] + [(1, 5), (5, 1), (2, 9), (9, 2), (6, 16), (40, 7)]:
        for batch in (1, 17):
            a = random_matrix((batch, m, n), dtype)
            for mode in ("reduced", "complete"):
                result = jml.qr(a, mode, method="householder")
                check_qr(a, result, mode, (dtype, m, n, batch, mode))


@pytest.mark.parametrize("dtype", ["float16", "float32", "complex128"])
@pytest.mark.parametrize("n", [1, 2, 5, 32])
@pytest.mark.once
def test_sizes_around_blocks(host: None, dtype: str, n: int) -> None:
    with x64_for(dtype):
        lanes = 64 // (8 if dtype == "complex128" else 4)
        for m in (n, 2 * n + 1, 511, 512, 513, 512 * lanes - 1, 512 * lanes + 1):
            if m < n or m * n > 300_000:
                continue
            a = random_matrix((m, n), dtype)
            q, r = (np.asarray(x) for x in jml.qr(a, method="tsqr"))
            if dtype == "float16":
                np.testing.assert_allclose(adjoint(q) @ q.astype(float), np.eye(n), atol=4e-3)
                continue
            check_qr(a, (q, r), label=(dtype, m, n))


# Those whose columns, brought to norm 1, are independent enough for two Cholesky factorisations.
INDEPENDENT = {"gauss", "graded_columns", "graded_rows", "graded_rows_up", "zero_top"}


@pytest.mark.parametrize(
    ("m", "n", "dtype"),
    [
        (700, 9, "float32"),
        (700, 9, "float64"),
        (300, 40, "complex64"),
        pytest.param(700, 9, "complex128", marks=pytest.mark.once),
        pytest.param(3000, 110, "float32", marks=pytest.mark.once),
    ],
)
@pytest.mark.once
def test_cholesky_of_tall_matrices(m: int, n: int, dtype: str) -> None:
    named = {name: with_phases(a, dtype) for name, a in tall_matrices(m, n).items()}
    with x64_for(dtype):
        cholesky = jax.jit(functools.partial(jml.qr, method="cholesky"))
        for name, a in named.items():
            check_qr(a, cholesky(a), label=(name, m, n, dtype))
        # All are served by reflectors where one needs them.
        both = np.stack([named["gauss"], named["low_rank"]])
        check_qr(both, cholesky(both), label=(m, n, dtype))


def test_cholesky_leaves_dependent_columns_to_reflectors(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("jaxmetal_linalg.primitives.qr")
    nothing = [np.full((700, 9), np.nan, np.float32), np.full((9, 9), np.nan, np.float32)]
    monkeypatch.setattr(module, "_lapack", lambda *_: [jnp.asarray(x) for x in nothing])
    cholesky = jax.jit(lambda a: jml.qr(a, method="cholesky"))
    for name, a in tall_matrices(700, 9).items():
        served = np.isfinite(np.asarray(cholesky(a.astype(np.float32)).R)).all()
        assert served == (name in INDEPENDENT), name
    monkeypatch.undo()
    if "host" in jml.devices():
        force(monkeypatch, "cholesky2")
        (call,) = jml.explain(jml.qr, jnp.zeros((2, 700, 9))).calls
        assert (call.device, call.route, call.variant) == ("host", "cholesky", "cholesky2")
        with pytest.raises(ValueError, match="cholesky2, which needs m >= n"):
            jml.explain(jml.qr, jnp.zeros((3, 9)))
        monkeypatch.undo()
    # In XLA on any device, by name alone, without a kernel or a custom call of ours.
    (call,) = jml.explain(cholesky, jnp.zeros((700, 9))).calls
    assert (call.device, call.route, call.variant) == ("xla", "cholesky", "cholesky2")


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from(["householder", "lapack", "cholesky"]),
    st.integers(0, 2**16),
)
@pytest.mark.once
def test_any_matrix_of_small_integers(m: int, n: int, method: str, seed: int) -> None:
    """Many ties, zeros and dependent columns."""
    g = np.random.default_rng(seed)
    a = np.zeros((3, 12, 12), np.float32)
    a[:, :m, :n] = g.integers(-1, 2, (3, m, n))
    check_qr(a, jml.qr(a, method=method))  # type: ignore[arg-type]


def test_unique_factors_agree_with_numpy(wide_device: str, x64: None) -> None:
    a = random_matrix((3, 9, 5), "complex128")
    q, r = np.linalg.qr(a)
    phase = np.diagonal(r, axis1=-2, axis2=-1)
    phase = phase / np.abs(phase)
    mine = jml.qr(a)
    np.testing.assert_allclose(mine.Q, q * phase[:, None, :], atol=1e-13)
    np.testing.assert_allclose(mine.R, r * phase.conj()[:, :, None], atol=1e-13)


# --- modes, dtypes, bad input ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 3, 6), (4, 5, 5)])
@pytest.mark.once
def test_modes(device: str, shape: tuple[int, ...]) -> None:
    a = random_matrix(shape, "float32")
    for method in ("auto", "xla", "householder"):
        for mode in ("reduced", "complete"):
            check_qr(a, jml.qr(a, mode, method=method), mode, (shape, mode, method))  # type: ignore[arg-type]
        r = jml.qr(a, "r", method=method)  # type: ignore[arg-type]
        np.testing.assert_allclose(r, jml.qr(a, method=method).R, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half(device: str, dtype: str) -> None:
    a = random_matrix((20, 7, 4), np.float64).astype(dtype)
    q, r = jml.qr(a)
    assert q.dtype == r.dtype == a.dtype
    # Computed in float32 and rounded once.
    exact = jml.qr(a.astype(np.float32), method="householder")
    eps = float(jnp.finfo(dtype).eps)
    for x, y in zip((q, r), exact, strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=eps, atol=eps / 16)


def test_integers_are_promoted(wide_device: str) -> None:
    a = np.arange(12).reshape(4, 3)
    q, r = jml.qr(a)
    assert q.dtype == jnp.linalg.qr(a)[0].dtype
    np.testing.assert_allclose(q @ r, a, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 4, 3), (2, 0, 3), (2, 3, 0)])
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    a = np.zeros(shape, np.float32)
    m, n = shape[-2:]
    for mode in MODES:
        result = jml.qr(a, mode)  # type: ignore[arg-type]
        kq = m if mode == "complete" else min(m, n)
        r = result if mode == "r" else result.R
        assert r.shape == (*shape[:-2], kq, n)
        if mode != "r":
            np.testing.assert_array_equal(
                result.Q, np.broadcast_to(np.eye(m, kq), (*shape[:-2], m, kq))
            )
    (call,) = jml.explain(jml.qr, a).calls
    assert call.route == "empty"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
@pytest.mark.once
def test_non_finite_stays_in_its_matrix(device: str, shape: tuple[int, int], bad: float) -> None:
    a = random_matrix((20, *shape), "float32")
    good = a.copy()
    hit = (3, 18)
    a[3, -1, -1] = a[18, 0, 0] = bad
    clean = np.delete(a, hit, axis=0)
    tall = ["tsqr"] * (shape[0] >= shape[1] and device in ("host", "sim", "cuda"))
    methods = ["auto", "xla", *tall, *["cholesky"] * (shape[0] >= shape[1])]
    for method in methods:
        for mode in ("reduced", "complete"):
            if method in ("tsqr", "cholesky") and mode == "complete":
                continue
            result = jml.qr(a, mode, method=method)  # type: ignore[arg-type]
            for x, y in zip(result, jml.qr(good, mode, method=method), strict=True):  # type: ignore[arg-type]
                assert np.all(np.isnan(np.asarray(x)[list(hit)])), (method, mode)
                # Not to the bit: XLA's code depends on the machine, and matrices have condition.
                np.testing.assert_allclose(
                    np.delete(x, hit, axis=0), np.delete(y, hit, axis=0), atol=1e-4
                )
            check_qr(clean, [np.delete(x, hit, axis=0) for x in result], mode, method)


def test_non_finite_deep_inside_a_tall_matrix(host: None) -> None:
    a = random_matrix((2, 40_000, 3), "float32")
    a[1, 31_234, 1] = np.nan
    q, r = jml.qr(a, method="tsqr")
    check_qr(a[0], (q[0], r[0]))
    assert np.all(np.isnan(q[1]))
    assert np.all(np.isnan(r[1]))


ERRORS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "vector": (np.ones(3), {}, ValueError, r"qr: argument a: expected shape \[..., m, n\]"),
    "text": ("a", {}, TypeError, "qr: argument a"),
    "mode": (np.eye(2), {"mode": "full"}, ValueError, "reduced, complete, r, got 'full'"),
    "mode of another type": (np.eye(2), {"mode": True}, TypeError, "argument mode"),
    "method": (np.eye(2), {"method": "jacobi"}, ValueError, "argument method"),
    "wide tsqr": (np.ones((2, 3)), {"method": "tsqr"}, ValueError, "m >= n"),
    "wide cholesky": (np.ones((2, 3)), {"method": "cholesky"}, ValueError, "m >= n"),
    "complete tsqr": (
        np.ones((3, 2)),
        {"method": "tsqr", "mode": "complete"},
        ValueError,
        "reduced factors",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(host: None, name: str) -> None:
    a, options, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text):
        jml.qr(a, **options)


def test_what_no_kernel_serves(sim: None, x64: None) -> None:
    for shape, dtype, text in (
        ((3, 3), "float64", "expected dtype float16"),
        ((33, 3), "complex128", "expected dtype float16"),
    ):
        with pytest.raises(jml.DeviceUnavailableError, match=rf"qr: .*{text}.*not 'sim'"):
            jml.qr(random_matrix(shape, dtype))
    with pytest.raises(ValueError, match="method"):
        jml.qr(np.eye(3), method="lapack")
    check_qr(np.eye(3, dtype=np.float32), jml.qr(np.eye(3, dtype=np.float32), method="xla"))


@pytest.mark.once
def test_gram_serves_what_fits_a_panel(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "gram")
    for shape, text in (((64, 33), "up to 32 columns"), ((3, 4), "m >= n")):
        with pytest.raises(ValueError, match=text):
            jml.qr(np.ones(shape, np.float32))
    # A batch, with a matrix that has NaN and one that has dependent columns.
    a = random_matrix((3, 1001, 32), np.float32)
    a[1, 500, 3], a[2] = np.nan, a[2, :, :1]
    q, r = (np.asarray(x) for x in jml.qr(a))
    assert np.all(np.isnan(q[1]))
    assert np.all(np.isnan(r[1]))
    for i in (0, 2):
        check_qr(a[i], (q[i], r[i]))


@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
@pytest.mark.once
def test_sizes_around_panels(host: None, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of 2 to 32 columns and panels of 16 or 32, whatever the instruction set."""
    force(monkeypatch, "blocked")
    sizes = [(m, n) for n in (1, 15, 16, 17, 31, 32, 33, 65) for m in (n - 1, n, n + 40) if m]
    with x64_for(dtype):
        for m, n in sizes:
            a = random_matrix((m, n), "float32" if dtype == "float16" else dtype).astype(dtype)
            for mode in ("reduced", "complete"):
                q, r = (np.asarray(x) for x in jml.qr(a, mode))
                if dtype == "float16":
                    wide = a.astype(np.float32)
                    np.testing.assert_allclose(
                        q.astype(np.float32) @ r.astype(np.float32), wide, atol=0.02, rtol=0
                    )
                else:
                    check_qr(a, (q, r), mode, label=(m, n, dtype, mode))
                if mode == "reduced":
                    np.testing.assert_array_equal(jml.qr(a, "r"), r)


# --- the kernels -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "complex64", "float16", "bfloat16"])
def test_the_kernel_that_explain_names_runs(sim: None, dtype: str) -> None:
    tag = {"float32": "f32", "complex64": "c64", "float16": "f16", "bfloat16": "bf16"}[dtype]
    a = jnp.asarray(random_matrix((5, 9, 6), dtype if dtype in DTYPES else "float32")).astype(dtype)
    for f, kernel in (
        (jml.qr, "q"),
        (functools.partial(jml.qr, mode="r"), "r"),
        (jax.jit(jax.vmap(jml.qr)), "q"),
        (jml.orthonormal_columns, "q"),
    ):
        name = f"qr_small_{kernel}_{tag}_n16"
        (call,) = jml.explain(f, a).calls
        assert (call.device, call.route, call.variant) == ("sim", "kernel", "small")
        assert name in call.reason
        assert launched(lambda f=f: f(a)) == {name: 1}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64"])
@pytest.mark.once
def test_the_tree_runs(sim: None, dtype: str) -> None:
    a = jnp.asarray(random_matrix((2, 600, 6), dtype if dtype in DTYPES else "float32"))
    a = a.astype(dtype)
    (call,) = jml.explain(jml.qr, a).calls
    assert (call.device, call.route, call.variant) == ("sim", "kernel", "tsqr")
    names = launched(lambda: jml.qr(a))
    assert sum(names.values()) == call.launches
    tag = "c64_l8" if dtype == "complex64" else "l8"
    assert {f"qr_tsqr_factor_{tag}", f"qr_tsqr_apply_{tag}"} <= set(names)
    assert names[f"qr_tsqr_factor_{tag}"] >= 2, "a level of pieces, and one of their triangles"
    wide = np.complex128 if dtype == "complex64" else np.float64
    q, r = (np.asarray(x, wide) for x in jml.qr(a))
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(adjoint(q) @ q, np.eye(6) + 0 * r, atol=30 * eps)
    np.testing.assert_allclose(q @ r, np.asarray(a, wide), atol=30 * eps)
    assert launched(lambda: jml.qr(a[:, :9], method="tsqr"))[f"qr_tsqr_factor_{tag}"] == 1


@pytest.mark.parametrize("shape", [(5, 9, 6), (3, 40, 5)])
def test_a_batch_gives_what_its_matrices_give(sim: None, shape: tuple[int, ...]) -> None:
    """To the bit: sums do not depend on the batch."""
    a = random_matrix(shape, "float32")
    for x, y in zip(jml.qr(a), jml.qr(a[1]), strict=True):
        np.testing.assert_array_equal(x[1], y)


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize(("m", "n"), [(33, 3), (500, 6), (45, 40)])
@pytest.mark.once
def test_tall_on_the_kernels(sim: None, m: int, n: int, dtype: str) -> None:
    named = tall_matrices(m, n)
    a = with_phases(np.stack(list(named.values())), dtype)
    result = jml.qr(a)
    for i, name in enumerate(named):
        check_qr(a[i], [x[i] for x in result], label=(name, m, n))


@pytest.mark.once
def test_columns_keep_their_own_accuracy_on_the_kernels(sim: None) -> None:
    for m in (30, 300):
        wide = random_matrix((2, m, 6), np.float64) * 10.0 ** -np.arange(0, 30, 5)
        a = wide.astype(np.float32)
        q, r = (np.asarray(x, np.float64) for x in jml.qr(a))
        error = np.linalg.norm(a - q @ r, axis=-2) / np.linalg.norm(a.astype(np.float64), axis=-2)
        assert np.max(error) < 1e-5, m


def test_a_wrong_size_of_memory_is_a_finding(sim: None) -> None:
    config = json.dumps({**problem(), "planted_bytes": 64})
    with pytest.raises(Exception, match=r"out_of_bounds|outside"):
        call(A, OUT, config)


# --- routes ----------------------------------------------------------------------------------

PLANNED = [
    ((10000, 8, 8), "reduced", "interleaved"),
    ((8, 8), "reduced", "interleaved"),
    ((17, 16), "reduced", "blocked"),
    ((4, 70, 70), "reduced", "blocked"),
    ((100, 3000), "complete", "blocked"),
    ((5000, 5000), "reduced", "lapack"),
    ((1000, 20, 12), "complete", "interleaved"),
    ((1_000_000, 31), "reduced", "tsqr"),
    ((1_000_000, 31), "r", "tsqr"),
    ((3, 1_000_000, 64), "reduced", "tsqr"),
    ((1_000_000, 100), "reduced", "cholesky2"),
    ((1_000_000, 33), "r", "cholesky2"),
]


@pytest.mark.parametrize(("shape", "mode", "variant"), PLANNED)
@pytest.mark.once
def test_auto(host: None, shape: tuple[int, ...], mode: str, variant: str) -> None:
    a = jax.ShapeDtypeStruct(shape, jnp.float32)
    f = functools.partial(jml.qr, mode=mode)
    (call,) = jml.explain(f, a).calls
    assert (call.op, call.device, call.variant) == ("qr", "host", variant)
    routes = {"lapack": "lapack", "cholesky2": "cholesky"}
    assert call.route == routes.get(variant, "host")
    assert call.reason
    assert call.launches == 1
    if shape[-2] < 1000:
        text = lowered_text(f, np.zeros(shape, np.float32))
        assert text.count("jml_qr_v1") == (call.route == "host")


@pytest.mark.parametrize(
    ("change", "variant"),
    [
        ({"interleaved_single_max": 7}, "lapack"),
        ({"interleaved_single_max": 8}, "interleaved"),
        ({"interleaved_single_max": 7, "batch": 4000}, "interleaved"),
        ({"interleaved_single_max": 7, "batch": 4000, "interleaved_max_n": 7}, "lapack"),
        ({"interleaved_single_max": 7, "batch": 4000, "interleaved_max_kib": 1}, "lapack"),
        ({"interleaved_single_max": 7, "batch": 4, "interleaved_even": 4}, "interleaved"),
        ({"interleaved_single_max": 7, "batch": 4, "interleaved_even": 5}, "lapack"),
        ({"m": 10**6, "tsqr_max_n": 8}, "tsqr"),
        ({"m": 10**6, "tsqr_max_n": 7}, "lapack"),
        ({"m": 10**6, "tsqr_min_blocks": 10**6}, "lapack"),
        ({"m": 10**6, "mode": "complete"}, "lapack"),
        ({"m": 10**6, "n": 32, "gram_min_m": 10**6}, "gram"),
        ({"m": 10**6, "n": 32, "gram_min_m": 10**6 + 1}, "tsqr"),
        ({"m": 10**6, "n": 32, "gram_min_m": 0}, "tsqr"),
        ({"m": 10**6, "n": 31, "gram_min_m": 10**6}, "tsqr"),
        ({"m": 10**6, "n": 16, "gram_min_m": 10**6, "dtype": "complex64"}, "tsqr"),
        ({"interleaved_single_max": 7, "blocked_min_n": 8}, "blocked"),
        ({"interleaved_single_max": 7, "blocked_min_n": 8, "blocked_max_n": 7}, "lapack"),
        ({"interleaved_single_max": 7, "blocked_min_n": 8, "blocked_max_n": 8}, "blocked"),
        ({"method": "householder", "interleaved_max_n": 8}, "interleaved"),
        ({"method": "householder", "interleaved_max_n": 7}, "blocked"),
        *(
            ({"batch": 1, "m": 320, "n": 40, **change}, variant)
            for change, variant in (
                ({}, "cholesky2"),
                ({"cholesky_min_n": 41}, "another"),
                ({"cholesky_max_n": 39}, "another"),
                ({"m": 319}, "another"),
                ({"batch": 2}, "another"),
                ({"dtype": "bfloat16"}, "cholesky2"),
                ({"dtype": "float64"}, "another"),
                ({"mode": "complete", "blocked_max_n": 39}, "lapack"),
            )
        ),
    ],
)
@pytest.mark.once
def test_thresholds(host: None, change: dict[str, Any], variant: str) -> None:
    found = _native.plan("qr", problem(**{"m": 8, "n": 8, **change}))["variant"]
    if variant == "another":  # by the lanes of the instruction set
        assert found in ("tsqr", "blocked")
    else:
        assert found == variant


def test_other_platforms_and_gpus(host: None) -> None:
    explain_on = importlib.import_module("jaxmetal_linalg._explain").explain_on
    a = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    (call,) = jml.explain(jml.qr, a, caps="nvidia-h200").calls
    assert (call.device, call.route, call.variant) == ("cuda", "kernel", "small")
    with jml.use_device("auto"):
        (call,) = explain_on("METAL", jml.qr, a).calls
        assert (call.device, call.route) == ("xla", "portable")
        (call,) = explain_on("tpu", jml.qr, a).calls
        assert (call.device, call.route) == ("xla", "lapack")
    with pytest.raises(jml.DeviceUnavailableError, match="cpu platform"):
        explain_on("tpu", jml.qr, a)


def test_cuda_needs_no_gpu_to_be_planned_and_lowered() -> None:
    explain_on = importlib.import_module("jaxmetal_linalg._explain").explain_on

    def plan(shape: tuple[int, ...], dtype: Any = np.float32, **options: Any) -> Any:
        f = functools.partial(jml.qr, **options)
        with x64_for(np.dtype(dtype).name):
            (call,) = explain_on("cuda", f, jax.ShapeDtypeStruct(shape, dtype)).calls
        return call

    for shape, variant in (
        ((8192, 16, 16), "small"),
        ((32, 32), "small"),
        ((8, 512, 512), "tsqr"),
    ):
        call = plan(shape)
        assert (call.device, call.route, call.variant) == ("cuda", "kernel", variant)
    # cholesky_min_work, cholesky_aspect, cholesky_max_n; not a square Q.
    for shape, dtype, rest in (
        ((1_000_000, 32), np.float32, "kernel/tsqr"),
        ((7813, 8), np.float16, "kernel/tsqr"),
        ((8, 222, 111), np.float32, "kernel/tsqr"),
        ((8192, 4096), np.float32, "kernel/tsqr"),
        ((222, 111), np.complex64, "kernel/tsqr"),
        ((222, 111), np.complex128, "lapack/geqrf"),
    ):
        call = plan(shape, dtype)
        assert (call.device, call.route, call.variant) == ("cuda", "cholesky", "cholesky2")
        assert "cholesky_min_work" in call.reason
        assert rest in call.reason
    for shape, route in (
        ((7812, 8), "lapack"),
        ((221, 111), "lapack"),
        ((8194, 4097), "lapack"),
        ((8, 221, 111), "kernel"),
        ((8, 111, 222), "kernel"),
    ):
        assert plan(shape).route == route
    assert plan((7813, 8), mode="complete").route == "lapack"
    assert plan((7813, 8), mode="r").route == "cholesky"
    # Around the limits of hardware_params.json, by method, and what no kernel serves.
    for shape, key in (((33, 33), "kernel_max_n"), ((129, 32), "kernel_max_m"),
                       ((8, 513, 513), "kernel_max_n_batched"), ((7, 512, 512), "kernel_max_n"),
                       ((7, 129, 3), "kernel_max_m")):  # fmt: skip
        call = plan(shape)
        assert (call.device, call.route, call.variant) == ("cuda", "lapack", "geqrf")
        assert f"above {key} = " in call.reason
    assert plan((8192, 33), method="householder").route == "kernel"
    assert plan((40, 30), method="tsqr").variant == "tsqr"
    assert plan((40, 30), np.complex64).variant == "tsqr"
    assert plan((8, 50, 40), np.complex64).variant == "tsqr"
    assert plan((40, 30), np.complex128).route == "lapack"
    assert plan((40, 30), np.complex128, method="householder").route == "portable"
    with pytest.raises(jml.DeviceUnavailableError, match="expected dtype float16"):
        plan((9, 3), np.complex128, method="tsqr")
    with pytest.raises(jml.DeviceUnavailableError, match="cpu platform"):
        plan((9, 3), method="lapack")
    for shape in ((5, 6, 6), (8, 40, 40), (8, 222, 111)):
        a = jax.ShapeDtypeStruct(shape, jnp.float32)
        text = str(jax.export.export(jax.jit(jml.qr), platforms=["cuda"])(a).mlir_module())
        assert "jml_qr_v1" in text


def test_on_a_gpu(cuda: None) -> None:
    """The kernels run there, and are accurate on hard and on tall matrices."""
    for n in (3, 17, 32, 40):
        a = np.stack(list(hard_matrices(n).values())).astype(np.float32)
        names = launched(lambda a=a: jax.jit(jml.qr)(a))
        assert any(k.startswith("qr_") for k in names), "no kernel of ours ran"
        check_qr(a, jax.jit(jml.qr)(a), label=n)
    tsqr = jax.jit(functools.partial(jml.qr, method="tsqr"))
    for m, n in ((65_536, 8), (100_001, 2), (30_000, 32), (2000, 110)):
        named = {name: b.astype(np.float32) for name, b in tall_matrices(m, n).items()}
        for name, c in named.items():
            check_qr(c, jax.jit(jml.qr)(c), label=(m, n, name))
            check_qr(c, tsqr(c), label=(m, n, name))
    # Batches of tall matrices: products, and our kernels where one has dependent columns.
    good, mixed = np.stack([named["gauss"]] * 8), np.stack(list(named.values()))
    assert not launched(lambda: jax.jit(jml.qr)(good))
    assert launched(lambda: jax.jit(jml.qr)(mixed))
    for batch in (good, mixed):
        check_qr(batch, jax.jit(jml.qr)(batch))


@pytest.mark.once
def test_results_do_not_depend_on_threads(host: None) -> None:
    """The same bits from one processor as from all."""
    code = (
        "import os, sys, hashlib\n"
        "if sys.argv[1] == '1': os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import numpy as np, jaxmetal_linalg as jml\n"
        "g = np.random.default_rng(0)\n"
        "for shape in ((30000, 5), (500, 9, 6), (300, 200), (200000, 32)):\n"
        "    a = g.standard_normal(shape).astype(np.float32)\n"
        "    m = {5: 'tsqr', 32: 'auto'}.get(shape[-1], 'householder')\n"
        "    q, r = jml.qr(a, method=m)\n"
        "    print(hashlib.sha1(np.asarray(q).tobytes() + np.asarray(r).tobytes()).hexdigest())\n"
    )
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("threads cannot be kept to one processor here")
    environment = {**os.environ, "PYTHONPATH": str(Path(jml.__file__).parent.parent)}
    found = [
        subprocess.run(
            [sys.executable, "-c", code, one], capture_output=True, text=True, env=environment
        ).stdout
        for one in "01"
    ]
    assert found[0] == found[1] != ""


# --- transformations -------------------------------------------------------------------------


def test_vmap_of_vmap_is_one_call(device: str) -> None:
    a = random_matrix((2, 3, 5, 4), "float32")
    f = jax.vmap(jax.vmap(jml.qr, in_axes=1), in_axes=3)
    moved = np.moveaxis(np.moveaxis(a, 1, 2), 0, 3)
    for x, y in zip(f(moved), jml.qr(a), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    (call,) = jml.explain(f, moved).calls
    assert (call.batch, call.shape) == (6, (5, 4))
    assert lowered_text(f, moved).count("jml_qr_v1") == (device != "xla")


def test_export_with_a_symbolic_batch(host: None) -> None:
    (b,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((b, 6, 3), jnp.float32)
    exported = jax.export.export(jax.jit(jml.qr), platforms=["cpu"])(shape)
    again = jax.export.deserialize(exported.serialize())
    a = random_matrix((5, 6, 3), "float32")
    result = again.call(a)
    assert isinstance(result, jml.QRResult)
    check_qr(a, result)


# --- derivatives -----------------------------------------------------------------------------

SHAPES = [(4, 4), (6, 3), (3, 5)]


# Compiling the second derivative takes a second or two.
DIFFERENCES = [(shape, "float64", "complete", 2) for shape in SHAPES]
DIFFERENCES += [(shape, "complex128", "reduced", 1) for shape in SHAPES]
DIFFERENCES += [((6, 3), "float64", "reduced", 2), ((6, 3), "complex128", "complete", 1)]
DIFFERENCES += [((6, 3), "complex128", "r", 1), ((3, 5), "float64", "r", 1)]


@pytest.mark.parametrize(("shape", "dtype", "mode", "order"), DIFFERENCES)
@pytest.mark.once
def test_derivatives_by_finite_differences(
    host: None, shape: tuple[int, int], dtype: str, mode: str, order: int
) -> None:
    with x64_for(dtype):
        a = jnp.asarray(random_matrix(shape, dtype))
        m, n = shape
        k = min(m, n)
        wq = jnp.asarray(random_matrix((m, k), dtype, 3))
        wr = jnp.asarray(random_matrix((m, n), dtype, 4))
        wp = jnp.asarray(random_matrix((m, m), dtype, 5))

        @jax.jit
        def f(a: Any) -> Any:
            out = jml.qr(a, mode)  # type: ignore[arg-type]
            q, r = (None, out) if mode == "r" else out
            total = jnp.sum((jnp.cos(r.real) + r.imag**2) * wr.real[: r.shape[0]])
            if q is not None:
                # The complement is only determined up to a turn: through its projector.
                rest = q[:, k:]
                total += jnp.sum((q[:, :k] * wq).real)
                total += jnp.sum((rest @ jnp.conj(rest.T) * wp).real)
            return total

        check_grads(f, (a,), order=order, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4), (6, 3)])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_jvp_agrees_with_jnp(wide_device: str, shape: tuple[int, int], dtype: str) -> None:
    with x64_for(dtype):
        a, da = (jnp.asarray(random_matrix((2, *shape), dtype, i)) for i in (1, 2))

        def theirs(a: Any) -> Any:
            q, r = jnp.linalg.qr(a)
            d = jnp.diagonal(r, axis1=-2, axis2=-1)
            phase = d / jnp.sqrt((d * jnp.conj(d)).real)
            return q * phase[..., None, :], r * jnp.conj(phase)[..., None]

        for x, y in zip(
            jax.tree.leaves(jax.jvp(jml.qr, (a,), (da,))),
            jax.tree.leaves(jax.jvp(theirs, (a,), (da,))),
            strict=True,
        ):
            np.testing.assert_allclose(x, y, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.once
def test_first_order_identities(wide_device: str, shape: tuple[int, int], x64: None) -> None:
    a, da = (jnp.asarray(random_matrix(shape, "complex128", i)) for i in (1, 2))
    for mode in ("reduced", "complete"):
        f = functools.partial(jml.qr, mode=mode)
        (q, r), (dq, dr) = jax.jvp(f, (a,), (da,))
        np.testing.assert_allclose(dq @ r + q @ dr, da, atol=1e-12)
        turn = adjoint(q) @ dq
        np.testing.assert_allclose(turn, -adjoint(turn), atol=1e-12)
        assert not np.any(np.tril(dr, -1))
        np.testing.assert_array_equal(np.diagonal(dr).imag, 0)
    # The complement does not turn within itself.
    k = min(shape)
    np.testing.assert_allclose(turn[k:, k:], 0, atol=1e-12)


def test_dependent_columns_have_finite_derivatives(host: None, x64: None) -> None:
    a = np.stack([random_matrix((5, 4), "float64", i) for i in range(4)])
    a[0] = 0
    a[1, :, 2] = a[1, :, 0]
    a[2, :, 1] = 0
    a[3] = 1
    for mode in ("reduced", "complete"):

        def f(a: Any, mode: str = mode) -> Any:
            q, r = jml.qr(a, mode)  # type: ignore[arg-type]
            return jnp.sum(jnp.sin(q)) + jnp.sum(r**2)

        first = jax.grad(f)(jnp.asarray(a))
        second = jax.grad(lambda a, f=f: jnp.sum(jax.grad(f)(a) ** 2))(jnp.asarray(a))
        assert np.all(np.isfinite(first)), mode
        assert np.all(np.isfinite(second)), mode
    # |R|^2 = |A|^2 whatever the basis: right where a column of zeros comes last.
    b = jnp.asarray(np.concatenate([random_matrix((5, 2), "float64"), np.zeros((5, 1))], axis=1))
    g = jax.grad(lambda a: jnp.sum(jml.qr(a, "r") ** 2))(b)
    np.testing.assert_allclose(g, 2 * b, atol=1e-12)


def test_derivatives_keep_to_their_matrix_and_scale(host: None) -> None:
    a = random_matrix((3, 5, 3), "float32")
    a[1, 0, 0] = np.nan

    def f(a: Any) -> Any:
        return jnp.sum(jml.qr(a).Q * np.arange(15.0, dtype=np.float32).reshape(1, 5, 3))

    g = jax.grad(f)(a)
    assert np.all(np.isnan(g[1]))
    assert np.all(np.isfinite(g[np.array([0, 2])]))
    # Q does not change with the scale of a column: its derivative scales with the inverse.
    d = np.array([1e-12, 1.0, 1e12], np.float32)
    scaled = jax.grad(f)(np.asarray(a[::2] * d))
    np.testing.assert_allclose(np.asarray(scaled) * d, g[::2], rtol=1e-3, atol=1e-3)


def test_half_derivatives(host: None) -> None:
    a = random_matrix((4, 3), np.float64).astype(np.float16)
    g = jax.grad(lambda a: jnp.sum(jml.qr(a).Q.astype(jnp.float32)))(a)
    h = jax.grad(lambda a: jnp.sum(jml.qr(a).Q))(a.astype(np.float32))
    assert g.dtype == np.float16
    np.testing.assert_allclose(g.astype(np.float32), h, atol=5e-3, rtol=5e-3)


# --- orthonormal columns, rows and bases ------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_orthonormal(device: str, dtype: str) -> None:
    a = random_matrix((3, 7, 4), dtype)
    a[1, :, 2] = a[1, :, 0]
    a[2] = 0
    columns = np.asarray(jml.orthonormal_columns(a))
    np.testing.assert_allclose(
        adjoint(columns) @ columns, np.eye(4) + 0 * columns[:, :4], atol=1e-5
    )
    # The first j columns span the first j of a.
    np.testing.assert_allclose(columns @ np.triu(adjoint(columns) @ a), a, atol=1e-5)
    rows = np.asarray(jml.orthonormal_rows(adjoint(a)))
    np.testing.assert_allclose(rows, adjoint(columns), atol=1e-5)
    basis = np.asarray(jml.complete_basis(columns))
    assert basis.shape == (3, 7, 7)
    np.testing.assert_array_equal(basis[..., :4], columns)
    np.testing.assert_allclose(adjoint(basis) @ basis, np.eye(7) + 0 * basis, atol=1e-5)


def test_complete_basis_of_nothing_and_of_everything(device: str) -> None:
    np.testing.assert_array_equal(jml.complete_basis(np.zeros((3, 0), np.float32)), np.eye(3))
    np.testing.assert_array_equal(jml.complete_basis(np.eye(3, dtype=np.float32)), np.eye(3))


def test_orthonormal_errors() -> None:
    for f, shape, hint in (
        (jml.orthonormal_columns, (3, 4), "orthonormal_rows"),
        (jml.orthonormal_rows, (4, 3), "orthonormal_columns"),
        (jml.complete_basis, (3, 4), "r <= m"),
    ):
        with pytest.raises(ValueError, match=f"{f.__name__}: argument .*{hint}"):
            f(np.ones(shape))


def test_complete_basis_stays_orthonormal_to_first_order(host: None, x64: None) -> None:
    a = jnp.asarray(random_matrix((5, 2), "float64"))

    def basis(a: Any) -> Any:
        return jml.complete_basis(jml.orthonormal_columns(a))

    u, du = jax.jvp(basis, (a,), (jnp.asarray(random_matrix((5, 2), "float64", 1)),))
    np.testing.assert_allclose(u.T @ du, -(u.T @ du).T, atol=1e-12)


# --- the raw custom call ----------------------------------------------------------------------


def problem(**changes: Any) -> dict[str, Any]:
    spec = qr_module._spec("qr", "reduced", "auto")
    return {**spec.problem((3, 6, 4), np.float32), "variant": "", **changes}


A = random_matrix((3, 6, 4), "float32")
OUT = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((3, 6, 4), (3, 4, 4))]


def call(a: Any, out: Any, config: Any) -> Any:
    f = jax.jit(lambda a: jax.ffi.ffi_call(qr_module.TARGET, out)(a, config=config))
    return jax.block_until_ready(f(a))


def test_the_right_call_works(host: None) -> None:
    for planned in (1, 3, 40):
        check_qr(A, call(A, OUT, json.dumps(problem(batch=planned, method="householder"))))


def changed(index: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
    return [jax.ShapeDtypeStruct(shape, dtype) if i == index else o for i, o in enumerate(OUT)]


WRONG: dict[str, tuple[Any, Any, Any]] = {
    "rank": (A[0, 0], OUT, {}),
    "m": (A[:, :5], OUT, {}),
    "dtype": (A.astype(np.int32), OUT, {}),
    "shape of q": (A, changed(0, (3, 6, 6)), {}),
    "dtype of q": (A, changed(0, (3, 6, 4), jnp.float16), {}),
    "shape of r": (A, changed(1, (3, 4, 5)), {}),
    "batch of r": (A, changed(1, (2, 4, 4)), {}),
    "one result": (A, OUT[:1], {}),
    "three results": (A, [*OUT, OUT[0]], {}),
    "mode of other shapes": (A, OUT, {"mode": "complete"}),
    "no Q": (A, OUT, {"mode": "r"}),
    "unknown mode": (A, OUT, {"mode": "full"}),
    "unknown method": (A, OUT, {"method": "magic"}),
    "not native": (A, OUT, {"method": "lapack"}),
    "unknown variant": (A, OUT, {"variant": "magic"}),
    "zero n": (A, OUT, {"n": 0}),
    "huge m": (A, OUT, {"m": 2**62}),
    "unknown dtype": (A, OUT, {"dtype": "int8"}),
    "unknown key": (A, OUT, {"colour": "red"}),
    "another device": (A, OUT, {"device": "sim"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(host: None, name: str) -> None:
    a, out, change = WRONG[name]
    config = {"method": "householder", **change}
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        call(a, out, json.dumps(problem(**config)))
