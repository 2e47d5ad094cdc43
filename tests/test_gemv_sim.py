"""gemv's kernels through the handler, on sim and cuda: values, rows, findings and refusals."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import chosen
from harness import launched, launching, lowered_text
from test_gemv import RAW, array, check

import jaxmetal_linalg as jml
from jaxmetal_linalg.primitives.gemv import TARGET

on_sim = pytest.mark.usefixtures("sim")
DTYPES = ("float32", "float16", "bfloat16", "complex64")


@pytest.fixture(params=["sim", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each device that runs the kernels on the cpu or the cuda platform."""
    with chosen(request.param):
        yield request.param


def ran(f: Any, *args: Any) -> Any:
    """The result of ``f``, which calls gemv; a kernel must have been launched for it."""
    calls = jml.explain(f, *args).calls
    assert all(c.route == "kernel" for c in calls), calls
    out, kernels = launching(f, *args)
    assert kernels
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trans", ["N", "T", "C"])
@pytest.mark.once
def test_values(kernels: str, dtype: str, trans: Any) -> None:
    alpha, beta = (1.5 - 0.5j, 0.25 + 2j) if dtype == "complex64" else (1.5, -0.25)
    # Where XLA's cuBLAS is faster with several vectors it is what cuda takes.
    several = (5,) if kernels == "sim" or (dtype, trans) == ("float32", "N") else ()
    for m, n, vectors in ((37, 70, ()), (19, 600, several), (64, 264, ())):
        depth, outs = (n, m) if trans == "N" else (m, n)
        a, x = array((m, n), dtype), array((*vectors, depth), dtype, 1)
        y, bias = array((*vectors, outs), dtype, 2), array((outs,), dtype, 3)
        f = functools.partial(jml.gemv, alpha=alpha, beta=beta, trans=trans)
        out = ran(lambda a, x, y, b, f=f: f(a, x, y, bias=b), a, x, y, bias)
        check(out, a, x, alpha=alpha, beta=beta, y=y, bias=bias, trans=trans)


@pytest.mark.parametrize(
    ("a_dtype", "x_dtype"),
    [
        *(("float16", "float32"), ("bfloat16", "float32"), ("float32", "float16")),
        *(("float16", "bfloat16"), ("complex64", "float32"), ("complex64", "bfloat16")),
    ],
)
def test_mixed_dtypes_promote_as_jnp(kernels: str, a_dtype: str, x_dtype: str) -> None:
    a, x = array((9, 40), a_dtype), array((40,), x_dtype, 1)
    out = ran(jml.gemv, a, x)
    assert out.dtype == jnp.promote_types(a.dtype, x.dtype)
    check(out, a, x)
    check(jml.gemv(a, array((9,), x_dtype, 1), trans="T"), a, array((9,), x_dtype, 1), trans="T")


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
@pytest.mark.once
def test_epilogue_is_that_of_xla(kernels: str, activation: Any) -> None:
    a, x, bias = array((24, 40), "bfloat16"), array((40,), "bfloat16", 1), array((24,), "bfloat16")
    f = functools.partial(jml.gemv, activation=activation)
    ours = ran(lambda *v: f(*v[:2], bias=v[2], residual=v[2]), a, x, bias)
    with jml.use_device("xla"):
        want = f(a, x, bias=bias, residual=bias)
    np.testing.assert_allclose(
        ours.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-7, atol=2**-7
    )


@on_sim
def test_the_kernel_that_explain_names_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    a, x = array((6, 160), "float32"), array((160,), "float32", 1)
    xs = array((3, 160), "float32", 2)
    long = array((2, 40_000), "float16"), array((40_000,), "float16", 1)
    half = array((6, 160), "float16")
    for f, args, want in (
        (jml.gemv, (a, x), {"gemv_rows_f32_m1": 1}),
        (jax.jit(jml.gemv), (half, x), {"gemv_any_f16f32_m1": 1}),
        (jax.vmap(jml.gemv, (None, 0)), (a, xs), {"gemv_rows_f32_m4": 1}),
        (jax.vmap(jml.gemv), (jnp.stack([a, a, a]), xs), {"gemv_rows_f32_m1": 1}),
        (jml.gemv, (a, x.astype(jnp.float16)),
         {"gemv_convert_f16f32": 1, "gemv_rows_f32_m1": 1}),
        (jml.gemv, long, {"gemv_split_f16_m1": 1, "gemv_finish_f16": 1}),
    ):  # fmt: skip
        kernel = next(k for k in want if "m" in k.rpartition("_")[2])
        assert kernel in jml.explain(f, *args).calls[0].reason
        assert launched(lambda f=f, args=args: f(*args)) == want
    monkeypatch.setenv("JAXMETAL_VARIANT", "gemv:r1")
    assert launched(lambda: jml.gemv(a, x)) == {"gemv_r1_f32_m1": 1}
    monkeypatch.setenv("JAXMETAL_VARIANT", "gemv:rows8")
    with pytest.raises(jml.DeviceUnavailableError, match=r"expected one of rows, any.*rows8"):
        jml.gemv(a, x)


def test_transformations(kernels: str) -> None:
    a, x, b = array((12, 40), "float32"), array((40,), "float32", 1), array((12,), "float32", 2)

    def f(a: Any, x: Any, b: Any) -> Any:
        return jml.gemv(a, x, bias=b, activation="silu").sum()

    def all_of(a: Any, x: Any, b: Any) -> Any:
        first = jax.grad(f, (0, 1, 2))(a, x, b)
        second = jax.jvp(jax.grad(f, 1), (a, x, b), (a, x, b))[1]
        many = jax.vmap(jax.vmap(f, (None, 0, None)), (0, None, 0))(
            jnp.stack([a, -a]), jnp.stack([x, 2 * x, -x]), jnp.stack([b, b])
        )
        return first, second, many

    ours = jax.jit(all_of)(a, x, b)
    with jml.use_device("xla"):
        want = all_of(a, x, b)
    for got, w in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, w, rtol=2e-5, atol=2e-4)


@pytest.mark.once
def test_bits_depend_on_neither_batch_nor_option(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, x = array((3, 10, 700), "bfloat16"), array((3, 700), "bfloat16", 1)
    f = jax.vmap(jml.gemv)
    whole = ran(f, a, x)
    np.testing.assert_array_equal(whole[1:2], f(a[1:2], x[1:2]))
    monkeypatch.setenv("JAXMETAL_SIM_SEED", "5")
    np.testing.assert_array_equal(whole, f(a, x))
    monkeypatch.setenv("JAXMETAL_SIM", "fast")
    np.testing.assert_array_equal(whole, f(a, x))


@pytest.mark.once
def test_nothing_reads_y_at_beta_zero(kernels: str) -> None:
    a, x = array((5, 40), "float32"), array((40,), "float32", 1)
    out = jml.gemv(a, x, jnp.full((5,), jnp.nan), beta=0)
    check(out, a, x)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "real by complex": ("float32", "complex64", "argument a: expected a dtype that x does not"),
    "long": ("float32", "float32", "argument a: expected m and n up to 33554432"),
}


@on_sim
@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_traced(name: str) -> None:
    a, x, pattern = REFUSED[name]
    n = 2**25 + 4 if name == "long" else 8
    with pytest.raises(jml.DeviceUnavailableError, match=rf"gemv: {pattern}.*Use device host"):
        jax.jit(jml.gemv).lower(jax.ShapeDtypeStruct((2, n), a), jax.ShapeDtypeStruct((n,), x))


@on_sim
def test_double_is_refused(x64: None) -> None:
    with pytest.raises(jml.DeviceUnavailableError, match="got float64"):
        jml.gemv(jnp.ones((3, 4), jnp.float64), jnp.ones(4, jnp.float64))


@on_sim
def test_options_travel_with_the_call() -> None:
    a, x = array((5, 40), "float32"), array((40,), "float32", 1)
    text = lowered_text(jml.gemv, a, x).replace("\\22", '"')
    assert '"caps": "apple-m1"' in text
    assert '"sim_checked": true' in text


@on_sim
def test_findings_are_errors() -> None:
    """The custom call with less threadgroup memory than its kernel uses, then a sound one."""
    a, x = jnp.ones((6, 9)), jnp.ones((1, 6))

    def planted(size: int) -> Any:
        config = {**RAW, "device": "sim", "caps": "apple-m1", "transpose": True, "n": 9}
        call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct((1, 9), jnp.float32))
        config |= {"planted_bytes": size}
        return jax.jit(lambda *v: call(*v, config=json.dumps(config)))(a, x)

    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(planted(64))
    text = str(caught.value)
    assert "gemv: sim: " in text
    assert "kernels/gemv.metal:" in text
    assert "threadgroup argument tile" in text
    np.testing.assert_array_equal(planted(0), np.full((1, 9), 6.0))
