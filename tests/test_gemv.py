"""gemv: values against extended precision, bits, options, transformations, and what really ran."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import arrays_platform, lowered_text, python, random_matrix, x64_for
from hypothesis import given
from hypothesis import strategies as st
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

import jaxmetal_linalg as jml
from jaxmetal_linalg import _native, _tuning
from jaxmetal_linalg.primitives.gemv import ACTIVATIONS, TARGET

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
HALF = ("float16", "bfloat16")
# Around one vector of every instruction set and dtype, and around the tiles of 8 rows.
SIDES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130)
# float16 and bfloat16 results of an activation: its own rounding beside that of its argument.
ACTIVATION_ULP = 4.0


@pytest.fixture(params=("host", "xla"))
def wide(request: pytest.FixtureRequest) -> Any:
    """Each device that takes every dtype and size."""
    if request.param not in jml.devices():
        pytest.skip("there is no native library")
    with jml.use_device(request.param):
        yield request.param


def array(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Any:
    kind = "complex128" if dtype.startswith("complex") else "float64"
    return jnp.asarray(random_matrix(shape, kind, seed), dtype)


def exact(x: Any) -> Any:
    wide = np.clongdouble if np.iscomplexobj(x) else np.longdouble
    return np.asarray(np.asarray(x), "complex128" if np.iscomplexobj(x) else "float64").astype(wide)


def oriented(a: Any, trans: str) -> Any:
    return a if trans == "N" else np.swapaxes(a.conj() if trans == "C" else a, -1, -2)


def check(
    out: Any,
    a: Any,
    x: Any,
    *,
    alpha: complex = 1,
    beta: complex = 0,
    y: Any = None,
    bias: Any = None,
    trans: str = "N",
) -> None:
    """The documented bound, elementwise, against extended precision."""
    op, v = oriented(exact(a), trans), exact(x)
    want = alpha * np.einsum("...ij,...j->...i", op, v)
    scale = abs(alpha) * np.einsum("...ij,...j->...i", abs(op), abs(v))
    for factor, more in ((beta, y), (1, bias)):
        if more is not None:
            want = want + factor * exact(more)
            scale = scale + abs(factor) * abs(exact(more))
    names = {str(v.dtype) for v in (a, x, out)}
    wide = bool(names & {"float64", "complex128"})
    eps32 = 2.0**-52 if wide else 2.0**-23
    bound = jml.ACC_GEMV_OUT_EPS * float(jnp.finfo(out.dtype).eps)
    bound += jml.ACC_GEMV_SUM_EPS * op.shape[-1] * eps32
    # A complex term is two real ones.
    bound *= np.sqrt(2) if np.iscomplexobj(want) else 1
    assert out.shape == want.shape
    error = np.abs(exact(out) - want)
    assert np.all(error <= bound * scale + float(jnp.finfo(out.dtype).smallest_subnormal))


# --- values ----------------------------------------------------------------------------------


@pytest.mark.once
def test_sides_around_the_vectors(wide: str) -> None:
    @functools.partial(jax.jit, static_argnums=2)
    def f(a: Any, x: Any, trans: str) -> Any:
        return jml.gemv(a, x, trans=trans)

    # Every side as both m and n, with few programs to compile.
    sizes = list(zip(SIDES, SIDES[5:] + SIDES[:5], strict=True))
    for (m, n), trans in itertools.product(sizes, "NT"):
        a = array((m, n), "float32")
        x = array((n if trans == "N" else m,), "float32", 1)
        check(f(a, x, trans), a, x, trans=trans)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trans", ["N", "T", "C"])
@pytest.mark.once
def test_dtypes_with_everything(wide: str, dtype: str, trans: str) -> None:
    with x64_for(dtype):
        complex_ = dtype.startswith("complex")
        alpha, beta = (1.5 - 0.5j, 0.25 + 2j) if complex_ else (1.5, -0.25)
        for m, n, vectors in ((37, 70, ()), (70, 37, (5,))):
            depth, outs = (n, m) if trans == "N" else (m, n)
            a, x = array((m, n), dtype), array((*vectors, depth), dtype, 1)
            y, bias = array((*vectors, outs), dtype, 2), array((outs,), dtype, 3)
            f = functools.partial(jml.gemv, alpha=alpha, beta=beta, trans=trans)
            out = f(a, x, y, bias=bias)
            assert out.dtype == a.dtype
            check(out, a, x, alpha=alpha, beta=beta, y=y, bias=bias, trans=trans)
            residual = array(out.shape, dtype, 4)
            with_residual = f(a, x, y, bias=bias, residual=residual)
            eps = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(
                exact(with_residual), exact(out) + exact(residual), rtol=0, atol=100 * eps
            )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(wide: str, activation: Any, dtype: str) -> None:
    with x64_for(dtype):
        x = jnp.linspace(-12, 12, 83).astype(dtype)
        a = jnp.eye(83, dtype=dtype)
        residual = jnp.asarray(0.25, dtype) * x
        out = jml.gemv(a, x, activation=activation, residual=residual)
        wide_x = x.astype("float64" if dtype == "float64" else "float32")
        want = exact(ACTIVATIONS[activation](wide_x)) + exact(residual)
        scale = np.maximum(np.abs(exact(x)), 1)
        error = np.abs(exact(out) - want) / scale
        assert np.max(error) <= ACTIVATION_ULP * float(jnp.finfo(dtype).eps)
        special = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf], dtype)
        got = jml.gemv(jnp.ones((3, 1), dtype), jnp.ones(1, dtype), bias=special, activation="relu")
        np.testing.assert_array_equal(np.float64(got), [np.nan, np.inf, 0])


@pytest.mark.parametrize(("a_dtype", "x_dtype"), list(itertools.permutations(DTYPES, 2)))
def test_mixed_dtypes_promote_as_jnp(host: None, a_dtype: str, x_dtype: str) -> None:
    with jax.enable_x64(True):
        a, x = array((9, 21), a_dtype), array((2, 21), x_dtype, 1)
        want = jnp.result_type(a, x)
        f = jax.jit(jml.gemv)
        text = f.lower(a, x).as_text()
        out = f(a, x)
        assert out.dtype == want
        check(out, a, x)
        back = jml.gemv(a, array((2, 9), x_dtype, 2), trans="C")
        check(back, a, array((2, 9), x_dtype, 2), trans="C")
        # The matrix goes to the kernel as it is.
        call = next(line for line in text.splitlines() if TARGET in line)
        assert "9x21x" in call.split(") -> ")[0]
        short = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
        name = short.get(a_dtype, "complex<f32>" if a_dtype == "complex64" else "complex<f64>")
        assert f"tensor<9x21x{name}>" in call


def test_integers_are_promoted(wide: str) -> None:
    a, x = np.arange(12, dtype=np.int32).reshape(3, 4), np.array([True, False, True, True])
    out = jml.gemv(a, x)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, a @ x)
    assert jml.gemv(a, jnp.ones(4, jnp.bfloat16)).dtype == jnp.float32
    with jax.enable_x64(True):
        assert jml.gemv(np.int64(a), x).dtype == jnp.float64


@pytest.mark.once
def test_long_sums_are_cut_into_chunks(host: None) -> None:
    for shape, trans in (((3, 70001), "N"), ((70001, 3), "T"), ((4099, 70), "T")):
        a = array(shape, "float32")
        x = array((2, max(shape)), "float32", 1)
        check(jml.gemv(a, x, trans=trans), a, x, trans=trans)  # type: ignore[arg-type]
        ones = jnp.ones(shape, jnp.float32)
        full = jml.gemv(ones, jnp.ones(max(shape), jnp.float32), trans=trans)  # type: ignore[arg-type]
        np.testing.assert_array_equal(full, max(shape))


@pytest.mark.once
def test_rows_read_in_pairs(host: None) -> None:
    """Of bfloat16, even and odd terms apart: whole numbers, so every sum is exact."""
    rng = np.random.default_rng(0)
    for depth in (*range(1, 34), 47, 48, 49, 63, 64, 65, 95, 97, 511, 512, 527, 545, 1100, 32800):
        a = rng.integers(-2, 3, (9, depth))
        for dtype, vectors in (("float32", 1), ("float32", 5), ("complex64", 2)):
            x = rng.integers(-2, 3, (vectors, depth)) * (1 if dtype == "float32" else 1 + 2j)
            out = jml.gemv(jnp.asarray(a, jnp.bfloat16), jnp.asarray(x, dtype))
            np.testing.assert_array_equal(out, x @ a.T)
        # What is no number in a term stays in its row, wherever a tail begins.
        wrong = a.astype(np.float32)
        wrong[np.arange(9), rng.integers(0, depth, 9)] = np.inf
        out = np.asarray(jml.gemv(jnp.asarray(wrong, jnp.bfloat16), jnp.ones(depth, jnp.float32)))
        np.testing.assert_array_equal(out, np.inf)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    vectors=st.integers(0, 18),
    dtype=st.sampled_from(["bfloat16", "float32", "complex64"]),
    trans=st.sampled_from("NTC"),
)
@pytest.mark.once
def test_any_shape(
    m: int, n: int, batch: tuple[int, ...], vectors: int, dtype: str, trans: str
) -> None:
    depth = n if trans == "N" else m
    a = array((*batch, m, n), dtype)
    lead = (vectors, *(1,) * len(batch)) if vectors else batch
    x = array((*lead, depth), dtype, 1)
    out = jml.gemv(a, x, trans=trans)  # type: ignore[arg-type]
    check(out, np.broadcast_to(np.asarray(a), (*out.shape[:-1], m, n)), x, trans=trans)


@pytest.mark.once
def test_special_values_stay_where_they_are(wide: str) -> None:
    a = np.ones((19, 37), np.float32)
    a[3, 36], a[5, 0], a[7, 20] = np.nan, np.inf, -np.inf
    out = np.asarray(jml.gemv(a, np.ones(37, np.float32)))
    want = np.full(19, 37.0)
    want[[3, 5, 7]] = np.nan, np.inf, -np.inf
    np.testing.assert_array_equal(out, want)
    # Terms that a vector's overlapping tail reads again are not counted again.
    x = np.ones(37, np.float32)
    x[30] = np.inf
    np.testing.assert_array_equal(jml.gemv(np.ones((4, 37), np.float32), x), np.inf)
    columns = np.asarray(jml.gemv(a.T, np.ones(37, np.float32), trans="T"))
    np.testing.assert_array_equal(columns, want)


@pytest.mark.once
def test_subnormal_halves_are_not_flushed(host: None) -> None:
    tiny = jnp.asarray([6e-8, 1e-6, 3e-5, 0.0], jnp.float16)
    a = jnp.diag(tiny)
    np.testing.assert_array_equal(jml.gemv(a, jnp.ones(4, jnp.float16)), tiny)
    small = jnp.full((2, 20), 1e-40, jnp.float32)
    assert np.all(np.asarray(jml.gemv(small, jnp.ones(20, jnp.float32))) > 0)


def test_empty(wide: str) -> None:
    assert jml.gemv(np.zeros((0, 5), np.float32), np.zeros(5, np.float32)).shape == (0,)
    assert jml.gemv(np.zeros((2, 0, 3, 5)), np.zeros(5)).shape == (2, 0, 3)
    y = np.arange(4, dtype=np.float32)
    out = jml.gemv(np.zeros((4, 0), np.float32), np.zeros(0, np.float32), y, beta=2.0, bias=y)
    np.testing.assert_array_equal(out, 3 * y)
    assert jml.gemv(np.zeros((4, 3), np.float32), np.zeros((0, 3), np.float32)).shape == (0, 4)
    (call,) = jml.explain(jml.gemv, np.zeros((0, 5), np.float32), np.zeros(5, np.float32)).calls
    assert call.route == "empty"


# --- the same bits ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("trans", ["N", "T"])
@pytest.mark.once
def test_bits_do_not_depend_on_company(host: None, dtype: str, trans: Any) -> None:
    a, x = array((3, 45, 77), dtype), array((16, 77 if trans == "N" else 45), dtype, 1)
    one = functools.partial(jml.gemv, trans=trans)
    want = np.stack([np.asarray(one(a[1], v)) for v in x])
    for count in (2, 3, 7, 16):
        np.testing.assert_array_equal(one(a[1], x[:count]), want[:count])
    np.testing.assert_array_equal(jax.vmap(one, (0, None))(a, x)[1], want)
    # A row's sum does not depend on the rows beside it.
    if trans == "N":
        np.testing.assert_array_equal(one(a[1, 9:20], x[0]), want[0, 9:20])


THREADS = """
import hashlib, jax.numpy as jnp, numpy as np, jaxmetal_linalg as jml
g = np.random.default_rng(0)
h = hashlib.sha256()
with jml.use_device("host"):
    for dtype, m, n in (("float32", 1100, 900), ("bfloat16", 5000, 700)):
        a = jnp.asarray(g.standard_normal((m, n)), dtype)
        for trans, depth in (("N", n), ("T", m)):
            x = jnp.asarray(g.standard_normal((2, depth)), dtype)
            h.update(np.asarray(jml.gemv(a, x, trans=trans)).tobytes())
print(h.hexdigest())
"""


@pytest.mark.once
def test_bits_do_not_depend_on_threads_or_rows_in_flight(
    host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest() -> str:
        done = python(THREADS, JAX_PLATFORMS="cpu")
        assert done.returncode == 0, done.stderr
        return done.stdout

    monkeypatch.setenv("JAXMETAL_TUNING", "host.gemv.threads=1")
    alone = digest()
    monkeypatch.setenv("JAXMETAL_TUNING", "host.gemv.threads=3,host.gemv.serial_bytes=0")
    assert digest() == alone


def test_short_rows_are_read_four_at_once(host: None) -> None:
    """Shorter than a page, by one vector."""
    for dtype, most in (("bfloat16", 2047), ("float32", 1023), ("complex64", 511)):
        for n, nrhs, variant in ((most, 1, "rows4"), (most + 1, 1, "rows8"), (most, 2, "rows8")):
            a, x = jnp.ones((9, n), dtype), jnp.ones((nrhs, n), dtype)
            (call,) = jml.explain(jml.gemv, a, x[0] if nrhs == 1 else x).calls
            assert call.variant == variant, (dtype, n, nrhs)


@pytest.mark.once
def test_rows_in_flight_give_the_same_bits(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for variants, trans in ((("rows8", "rows4"), "N"), (("columns8", "columns4"), "T")):
        a, x = array((61, 61), "float32"), array((3, 61), "float32", 1)
        got = []
        for variant in variants:
            monkeypatch.setenv("JAXMETAL_VARIANT", f"gemv:{variant}")
            f = functools.partial(jml.gemv, trans=trans)
            (call,) = jml.explain(f, a, x).calls
            assert call.variant == variant
            got.append(np.asarray(f(a, x)))
        np.testing.assert_array_equal(*got)
    monkeypatch.setenv("JAXMETAL_VARIANT", "gemv:rows8")
    with pytest.raises(ValueError, match="one of columns8, columns4"):
        jax.jit(functools.partial(jml.gemv, trans="T")).lower(a, x)


# --- batches and vmap ------------------------------------------------------------------------


def planned(f: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """The one call of ``f``: its explanation, and what its custom call carries."""
    (call,) = jml.explain(f, *args).calls
    text = lowered_text(f, *args)
    assert text.count(TARGET) == (1 if call.device == "host" else 0)
    if call.device != "host":
        return {}
    (config,) = re.findall(r'"(\{\\22.*?\})"', text)
    return dict(json.loads(config.replace("\\22", '"')))


def test_leading_dimensions_broadcast_as_matmul(wide: str) -> None:
    for lead_a, lead_x in (
        ((), (3,)),
        ((4,), ()),
        ((4,), (4,)),
        ((4, 1), (3,)),
        ((2, 1, 3), (5, 1)),
        ((1, 3), (2, 3)),
        ((1,), (1,)),
    ):
        a, x = array((*lead_a, 6, 5), "float32"), array((*lead_x, 5), "float32", 1)
        bias = array((6,), "float32", 2)
        out = jml.gemv(a, x, bias=bias)
        want = jnp.matmul(a, x[..., None])[..., 0] + bias.reshape((1,) * (out.ndim - 1) + (6,))
        np.testing.assert_allclose(out, want, atol=1e-5)
        both = np.broadcast_shapes(lead_a, lead_x)
        y = array((2, *both, 6), "float32", 3)  # one more dimension than the product has
        got = jml.gemv(a, x, y, beta=2.0)
        np.testing.assert_allclose(got, np.float32(2 * y) + np.asarray(jml.gemv(a, x)), atol=1e-5)


def test_vmap_over_x_reads_the_matrix_once(wide: str) -> None:
    a, x = array((12, 9), "float32"), array((16, 9), "float32", 1)
    f = jax.vmap(jml.gemv, (None, 0))
    np.testing.assert_allclose(f(a, x), x @ a.T, atol=1e-5)
    if wide == "host":
        config = planned(f, a, x)
        assert (config["batch"], config["nrhs"]) == (1, 16)
        # Nested, out of order, under a map over the matrix.
        g = jax.vmap(jax.vmap(jml.gemv, (None, 1), 1), (None, 0))
        xs = array((3, 9, 4), "float32", 2)
        config = planned(g, a, xs)
        assert (config["batch"], config["nrhs"]) == (1, 12)
    else:
        g = jax.vmap(jax.vmap(jml.gemv, (None, 1), 1), (None, 0))
        xs = array((3, 9, 4), "float32", 2)
    np.testing.assert_allclose(g(a, xs), np.einsum("ij,bjk->bik", a, xs), atol=1e-5)


def test_vmap_over_a_and_over_both_is_one_batched_call(wide: str) -> None:
    a, x = array((4, 12, 9), "float32"), array((4, 9), "float32", 1)
    for f, args, want in (
        (jax.vmap(jml.gemv, (0, None)), (a, x[0]), np.einsum("bij,j->bi", a, x[0])),
        (jax.vmap(jml.gemv), (a, x), np.einsum("bij,bj->bi", a, x)),
        (
            jax.vmap(jax.vmap(jml.gemv, (None, 0)), (0, None)),
            (a, x),
            np.einsum("bij,cj->bci", a, x),
        ),
        (
            jax.vmap(jax.vmap(jml.gemv, (0, None)), (None, 0)),
            (a, x),
            np.einsum("bij,cj->cbi", a, x),
        ),
        (jax.vmap(jml.gemv, (2, 1), 1), (a.transpose(1, 2, 0), x.T), np.einsum("bij,bj->ib", a, x)),
    ):
        np.testing.assert_allclose(f(*args), want, atol=1e-5)
        config = planned(f, *args)
        if wide == "host":
            assert config["batch"] == 4
            assert config["nrhs"] == (4 if want.ndim == 3 else 1)


def test_vmap_over_the_epilogue(wide: str) -> None:
    a, x, bias = array((6, 5), "float32"), array((5,), "float32", 1), array((3, 6), "float32", 2)
    f = jax.vmap(lambda b: jml.gemv(a, x, bias=b, activation="tanh"))
    np.testing.assert_allclose(f(bias), np.tanh((a @ x)[None] + bias), atol=1e-5)
    scale = jnp.array([0.5, 2.0])
    g = jax.vmap(lambda s: jml.gemv(a, x, bias[0], alpha=s, beta=s))
    np.testing.assert_allclose(g(scale), scale[:, None] * (a @ x + bias[0])[None], atol=1e-5)


def test_many_vectors_go_to_matmul_and_explain_says_so(host: None) -> None:
    limits = dict(_tuning.resolve("host", "gemv", _native.isa()))
    a = array((9, 7), "float32")
    for count, route in (
        (int(limits["xla_min_nrhs"]) - 1, "host"),
        (int(limits["xla_min_nrhs"]), "portable"),
    ):
        x = array((count, 7), "float32", 1)
        (call,) = jml.explain(jml.gemv, a, x).calls
        assert call.route == route, count
        assert ("XLA's matmul" in call.reason) == (route == "portable")
        check(jml.gemv(a, x), a, x)


# --- options ---------------------------------------------------------------------------------


def test_beta_zero_never_reads_y(wide: str) -> None:
    a, x = array((6, 5), "float32"), array((5,), "float32", 1)
    bad = jnp.full(6, jnp.nan)
    for beta in (0, 0.0, np.float32(0), 0j):
        out = jml.gemv(a, x, bad, beta=beta)
        assert np.all(np.isfinite(out))
        assert out.dtype == jnp.float32
    # A traced zero is a number like any other.
    assert np.all(np.isnan(jml.gemv(a, x, bad, beta=jnp.float32(0))))


def test_traced_scalars_agree_with_static_ones(wide: str) -> None:
    for dtype in ("float16", "float32", "complex64"):
        a, x, y = array((6, 5), dtype), array((5,), dtype, 1), array((6,), dtype, 2)
        static = jml.gemv(a, x, y, alpha=1.5, beta=-2.0)
        one = jnp.asarray([1.5, -2.0], "float16" if dtype == "float16" else "float32")
        traced = jax.jit(lambda s, a=a, x=x, y=y: jml.gemv(a, x, y, alpha=s[0], beta=s[1]))(one)
        assert traced.dtype == static.dtype
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(exact(traced), exact(static), atol=20 * eps)
    # alpha x would leave float16's range.
    a, x = jnp.full((3, 4), 1e-4, jnp.float16), jnp.full(4, 100.0, jnp.float16)
    out = jml.gemv(a, x, alpha=jnp.float16(3e4))
    np.testing.assert_allclose(np.float64(out), 4 * 1e-4 * 100 * 3e4, rtol=1e-2)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"a": np.zeros(3)}, ValueError, "gemv: argument a: expected shape \\[..., m, n\\]"),
        ({"a": "text"}, TypeError, "gemv: argument a: expected an array"),
        ({"x": np.float32(1)}, ValueError, "argument x: .*rank >= 1"),
        ({"x": np.zeros((5, 1))}, ValueError, "with n = 5 .* leading dimension of x"),
        ({"x": np.zeros(6)}, ValueError, "argument x: expected .*n = 5"),
        ({"x": np.zeros(5), "trans": "T"}, ValueError, "m = 6"),
        ({"trans": "H"}, ValueError, "argument trans: expected one of N, T, C"),
        ({"activation": "swish"}, ValueError, "argument activation: .*gelu_tanh"),
        ({"x": np.zeros(5, np.complex64), "activation": "relu"}, TypeError, "complex"),
        ({"beta": 1.0}, ValueError, "argument y: .*None"),
        ({"y": np.zeros(5), "beta": 1.0}, ValueError, "argument y: .*m = 6"),
        ({"bias": np.zeros(1)}, ValueError, "argument bias: .*m = 6"),
        ({"residual": np.float32(0)}, ValueError, "argument residual"),
        ({"alpha": "2"}, TypeError, "argument alpha: expected a number"),
        ({"alpha": True}, TypeError, "argument alpha: expected a number"),
        ({"alpha": np.zeros(2)}, ValueError, "argument alpha: expected a scalar"),
        ({"a": jnp.zeros((2, 6, 5)), "x": np.zeros((3, 5))}, ValueError, "leading dimensions"),
        ({"a": jnp.zeros((6, 5), jnp.float8_e4m3fn)}, TypeError, "dtype float16, bfloat16"),
    ],
)
def test_errors_name_argument_and_expectation(
    change: dict[str, Any], error: type[Exception], text: str
) -> None:
    call: dict[str, Any] = {"a": np.zeros((6, 5), np.float32), "x": np.zeros(5, np.float32)}
    with pytest.raises(error, match=text):
        jml.gemv(**{**call, **change})


# --- derivatives -----------------------------------------------------------------------------


def loss_of(**options: Any) -> Callable[..., Any]:
    def f(a: Any, x: Any, y: Any, bias: Any, residual: Any, scale: Any) -> Any:
        return jml.gemv(
            a, x, y, alpha=scale[0], beta=scale[1], bias=bias, residual=residual, **options
        )

    return f


@pytest.mark.parametrize(("activation", "trans"), [(None, "T"), ("gelu", "N")])
def test_derivatives_to_second_order(wide: str, activation: Any, trans: Any) -> None:
    with jax.enable_x64(True):
        depth, outs = (4, 3) if trans == "N" else (3, 4)
        args = (
            array((3, 4), "float64"),
            array((2, depth), "float64", 1),
            array((2, outs), "float64", 2),
            array((outs,), "float64", 3),
            array((2, outs), "float64", 4),
            jnp.array([1.5, -0.5]),
        )
        f = jax.jit(loss_of(trans=trans, activation=activation))
        check_grads(f, args, order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh", "tanh", "sigmoid"])
def test_first_derivatives_of_activations(wide: str, activation: Any) -> None:
    with jax.enable_x64(True):
        a, x = array((3, 4), "float64"), array((4,), "float64", 1)
        f = functools.partial(jml.gemv, activation=activation)
        check_grads(f, (a, x), order=1, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trans", ["N", "T", "C"])
def test_complex_derivatives(wide: str, trans: Any) -> None:
    a, x = array((3, 4), "complex64"), array((4 if trans == "N" else 3,), "complex64", 1)
    f = functools.partial(jml.gemv, trans=trans, alpha=0.5 - 1j)
    check_grads(f, (a, x), order=2, atol=2e-2, rtol=2e-2)


def test_gradients_keep_mixed_dtypes(wide: str) -> None:
    a, x = array((3, 4), "bfloat16"), array((2, 4), "float32", 1)
    da, dx = jax.grad(lambda a, x: (jml.gemv(a, x) ** 2).sum(), (0, 1))(a, x)
    assert (da.dtype, dx.dtype) == (jnp.bfloat16, jnp.float32)
    wide_a = a.astype(jnp.float32)
    r = x @ wide_a.T
    np.testing.assert_allclose(dx, 2 * r @ wide_a, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.float32(da), 2 * r.T @ x, rtol=2e-2, atol=2e-2)
    z = array((4,), "complex64", 2)
    da, dz = jax.grad(lambda a, z: jnp.abs(jml.gemv(a, z)).sum(), (0, 1))(wide_a, z)
    want = jax.grad(lambda a, z: jnp.abs(a @ z).sum(), (0, 1))(wide_a, z)
    np.testing.assert_allclose(da, want[0], atol=1e-4)
    np.testing.assert_allclose(dz, want[1], atol=1e-4)


def test_the_gradient_in_x_reads_the_same_matrix(host: None) -> None:
    a, x = array((6, 5), "float32"), array((3, 5), "float32", 1)
    calls = jml.explain(jax.grad(lambda x: (jml.gemv(a, x) ** 2).sum()), x).calls
    assert [c.shape for c in calls] == [(6, 5), (6, 5)]
    assert [c.variant for c in calls] == ["rows8", "columns8"]
    text = lowered_text(jax.grad(lambda a, x: (jml.gemv(a, x) ** 2).sum(), 1), a, x)
    assert "dims = [1, 0]" not in text


def test_linear_transpose(wide: str) -> None:
    a, x = array((6, 5), "float32"), array((5,), "float32", 1)
    y = array((6,), "float32", 2)
    for f, primal, want in (
        (lambda v: jml.gemv(a, v, alpha=2.0), x, 2 * a.T @ y),
        (lambda v: jml.gemv(a, v, alpha=2.0, trans="T"), y, None),
        (lambda v: jml.gemv(v, x, alpha=2.0), a, 2 * np.outer(y, x)),
        (lambda v: jml.gemv(jnp.zeros_like(a), x, v, beta=3.0, residual=v), y, 4 * y),
    ):
        ct = y if want is not None else x
        (got,) = jax.linear_transpose(f, primal)(ct)
        np.testing.assert_allclose(got, 2 * a @ x if want is None else want, atol=1e-5)


def test_vmap_of_grad_and_grad_of_vmap(wide: str) -> None:
    a, x = array((3, 6, 5), "float32"), array((3, 5), "float32", 1)

    def loss(a: Any, x: Any) -> Any:
        return (jml.gemv(a, x, activation="tanh") ** 2).sum()

    def plain(a: Any, x: Any) -> Any:
        return (jnp.tanh(a @ x) ** 2).sum()

    got = jax.vmap(jax.grad(loss, (0, 1)))(a, x)
    want = jax.vmap(jax.grad(plain, (0, 1)))(a, x)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5)
    got = jax.vmap(jax.grad(loss, 1), (None, 0))(a[0], x)
    np.testing.assert_allclose(got, jax.vmap(jax.grad(plain, 1), (None, 0))(a[0], x), atol=1e-5)


# --- devices, sharding, export ---------------------------------------------------------------


def test_projections_off_a_basis(device: str) -> None:
    """The two kernels of a Gram-Schmidt step, Q^H v and v - Q c, each one read of Q."""
    q = array((200, 12), "complex64")
    q = jnp.asarray(np.linalg.qr(q)[0])
    v = q @ jnp.ones(12, q.dtype) + 1e-4 * array((200,), "complex64", 1)

    @jax.jit
    def off(q: Any, v: Any) -> Any:
        c = jml.gemv(q, v, trans="C")
        return jml.gemv(q, c, v, alpha=-1, beta=1)

    calls = jml.explain(off, q, v).calls
    assert [(c.op, c.device, c.shape) for c in calls] == [("gemv", device, (200, 12))] * 2
    if device in ("metal", "cuda", "sim"):
        assert all(c.route == "kernel" for c in calls)

    def left(v: Any) -> float:
        v = np.asarray(v, np.complex128)
        return float(np.linalg.norm(np.asarray(q).conj().T @ v) / np.linalg.norm(v))

    once = off(q, v)
    # Most of v was in the basis, so one pass leaves rounding of v, which is much of what is left.
    assert 20 * 2.0**-23 < left(once) < 1e-2
    assert left(off(q, once)) < 4 * 2.0**-23


def test_explain_names_what_is_in_the_program(wide: str) -> None:
    a, x = array((2, 6, 5), "bfloat16"), array((2, 5), "bfloat16", 1)
    f = functools.partial(jml.gemv, activation="relu")
    (call,) = jml.explain(f, a, x).calls
    assert (call.op, call.device, call.shape, call.batch) == ("gemv", wide, (6, 5), 2)
    assert (call.route, call.variant) == (("host", "rows4") if wide == "host" else ("portable", ""))
    text = jax.jit(f).lower(a, x).compile().as_text()
    assert (TARGET in text) == (wide == "host")


def test_other_platforms_get_plain_xla() -> None:
    a, x = np.zeros((6, 5), np.float32), np.zeros(5, np.float32)
    with jml.use_device("auto"):
        for platform, native in (("cuda", True), ("rocm", False)):
            exported = export.export(jax.jit(jml.gemv), platforms=[platform])(a, x)
            assert (TARGET in exported.mlir_module()) == (native and "host" in jml.devices())


def test_shard_map_and_sharded_batches(wide: str) -> None:
    mesh = Mesh([jnp.zeros(()).device], ("i",))
    p = PartitionSpec("i")
    w, a, x = array((6, 5), "float32"), array((4, 6, 5), "float32"), array((4, 5), "float32", 1)

    def f(w: Any, a: Any, x: Any) -> Any:
        return jml.gemv(w, x) + jml.gemv(a, x)

    mapped = jax.shard_map(f, mesh=mesh, in_specs=(PartitionSpec(), p, p), out_specs=p)
    want = x @ w.T + np.einsum("bij,bj->bi", a, x)
    np.testing.assert_allclose(jax.jit(mapped)(w, a, x), want, atol=1e-5)
    grad = jax.jit(jax.grad(lambda w: mapped(w, a, x).sum()))(w)
    np.testing.assert_allclose(grad, np.broadcast_to(x.sum(0), (6, 5)), atol=1e-5)
    sharded = [jax.device_put(v, NamedSharding(mesh, p)) for v in (a, x)]
    text = jax.jit(jml.gemv).lower(*sharded).compile().as_text()
    assert "all-gather" not in text


def test_export_with_symbolic_leading_dimensions(wide: str) -> None:
    w = array((6, 5), "float32")
    (b,) = export.symbolic_shape("b")
    kinds = (
        jax.ShapeDtypeStruct((6, 5), jnp.float32),
        jax.ShapeDtypeStruct((b, 5), jnp.float32),
    )
    relu = jax.jit(lambda a, x: jml.gemv(a, x, activation="relu"))
    f = export.export(relu, platforms=[arrays_platform()])(*kinds)
    again = export.deserialize(f.serialize())
    x = array((3, 5), "float32", 1)
    np.testing.assert_allclose(again.call(w, x), np.maximum(x @ w.T, 0), atol=1e-5)


# --- the raw custom call ---------------------------------------------------------------------

RAW = {
    "batch": 1,
    "m": 6,
    "n": 5,
    "nrhs": 1,
    "transpose": False,
    "conjugate": False,
    "a_dtype": "float32",
    "x_dtype": "float32",
    "out_dtype": "float32",
    "alpha_re": 1.0,
    "alpha_im": 0.0,
    "beta_re": 0.0,
    "beta_im": 0.0,
    "y": False,
    "bias": False,
    "residual": False,
    "activation": "none",
    "variant": "",
}


def raw(operands: Any = None, out: Any = ((1, 6), jnp.float32), **changes: Any) -> Any:
    config = {**RAW, **dict(_tuning.resolve("host", "gemv", _native.isa())), **changes}
    config = {k: v for k, v in config.items() if v is not None}
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(*out))
    operands = (jnp.ones((6, 5)), jnp.ones((1, 5))) if operands is None else operands
    return jax.jit(lambda *v: call(*v, config=json.dumps(config)))(*operands)


def test_raw_call(host: None) -> None:
    np.testing.assert_array_equal(raw(), np.full((1, 6), 5.0))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"operands": (jnp.ones((6, 4)), jnp.ones((1, 5)))}, "argument a: expected float32.6, 5"),
        ({"operands": (jnp.ones((6, 5)), jnp.ones((1, 6)))}, "argument x: expected"),
        ({"operands": (jnp.ones((6, 5)), jnp.ones(5))}, "argument x: expected the rank of a"),
        ({"operands": (jnp.ones(5), jnp.ones(5))}, "argument a: expected rank"),
        ({"out": ((1, 5), jnp.float32)}, "result out: expected"),
        ({"out": ((1, 6), jnp.bfloat16)}, "result out: expected float32"),
        ({"bias": True}, "out of range|expected"),
        ({"operands": (jnp.ones((6, 5)), jnp.ones((1, 5)), jnp.ones((1, 6)))}, "expected 2"),
        ({"m": None}, "key m is missing"),
        ({"m": 0}, "argument m: expected an integer of at least 1"),
        ({"what": 1}, "unknown key what"),
        ({"a_dtype": "int8"}, "argument a: expected dtype"),
        ({"out_dtype": "complex64"}, "a complex dtype exactly"),
        ({"activation": "swish"}, "argument activation: expected one of"),
        ({"variant": "columns8"}, "argument variant: expected one of rows8, rows4"),
        ({"nrhs": 10**6}, "a number of vectors that a native row serves"),
    ],
)
def test_raw_call_with_wrong_buffers_is_an_error(
    host: None, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(Exception, match=text):
        raw(**change)
