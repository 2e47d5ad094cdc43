"""The metal device: csrc/device_metal.cc over a simulated Metal framework, driven from JAX.

The framework (tests/metal_sim) ends the process where a rule of Metal is broken, so that a test
which merely passes has met them all. What needs the simulation's own switches is skipped on a Mac.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import mmap
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require
from harness import check_svd, launched, python, random_matrix
from test_gemv import array, check

import jaxmetal_linalg as jml
from jaxmetal_linalg import _metal, _native

svd_module = importlib.import_module("jaxmetal_linalg.primitives.svd")
gemv_module = importlib.import_module("jaxmetal_linalg.primitives.gemv")

pytestmark = pytest.mark.usefixtures("metal")
A = random_matrix((5, 13, 6), "float32")
# jit's fast path has an error class of its own.
FAILURES = (jax.errors.JaxRuntimeError, ValueError)
KERNEL = "svd_xor_vectors_f32_n16"


@pytest.fixture
def metal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    require("metal")
    monkeypatch.setenv("JAXMETAL_CACHE_DIR", str(tmp_path / "cache"))
    with jml.use_device("metal"):
        yield


def simulated() -> Any:
    """The library, where its Metal framework is the simulated one, else None."""
    dll = _native._library().dll
    return dll if hasattr(dll, "jml_metal_sim_fault") else None


class Framework:
    """The simulation's own switches."""

    def __init__(self, dll: ctypes.CDLL) -> None:
        self.dll = dll
        dll.jml_metal_sim_living.restype = ctypes.c_char_p
        dll.jml_metal_sim_fault.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
        dll.jml_metal_sim_page.argtypes = [ctypes.c_int64]
        dll.jml_metal_sim_probe.restype = ctypes.c_char_p

    def fault(self, kind: str, skip: int = 0, count: int = 1) -> None:
        self.dll.jml_metal_sim_fault(kind.encode(), skip, count)

    def living(self) -> dict[str, int]:
        rows = self.dll.jml_metal_sim_living().decode().splitlines()
        return {k: int(n) for k, n in (row.rsplit(" ", 1) for row in rows)}

    def settled(self, want: dict[str, int]) -> bool:
        """Whether these are all; the GPU's thread lets go a moment after a call returns."""
        for _ in range(500):
            if self.living() == want:
                return True
            time.sleep(0.01)
        raise AssertionError(f"{self.living()} instead of {want}")

    def totals(self) -> dict[str, int]:
        out = (ctypes.c_int64 * 5)()
        self.dll.jml_metal_sim_totals(out)
        return dict(zip(("committed", "dispatches", "hits", "files", "waits"), out, strict=True))

    def during(self, f: Any) -> dict[str, int]:
        before = self.totals()
        jax.block_until_ready(f())
        return {k: n - before[k] for k, n in self.totals().items()}

    def forget(self) -> None:
        """The next call finds the GPU anew, and compiles anew."""
        self.dll.jml_metal_sim_forget()


@pytest.fixture
def framework(metal: None) -> Iterator[Framework]:
    dll = simulated()
    if dll is None:
        pytest.skip("a real GPU takes no injected faults")
    found = Framework(dll)
    found.forget()
    yield found
    dll.jml_metal_sim_fast(0)
    dll.jml_metal_sim_page(0)
    found.forget()


def fresh(**options: Any) -> Any:
    """A jitted svd that nothing else has compiled."""
    return jax.jit(lambda a: jml.svd(a, full_matrices=False, **options))


class Kept(list[Any]):
    """Keeps results, once they are there: what was done for them is counted by then."""

    def append(self, result: Any) -> None:
        super().append(jax.block_until_ready(result))


def counted(f: Any) -> dict[str, int]:
    """What the device did during ``f()``, of what it counts."""
    before = _native.metal()
    jax.block_until_ready(f())
    after = _native.metal()
    return {k: n - before[k] for k, n in after.items() if isinstance(n, int) and n != before[k]}


# --- what it computes ------------------------------------------------------------------------


def test_the_kernel_that_explain_names_runs() -> None:
    for f, kernel in (
        (jml.svd, KERNEL),
        (jml.svdvals, "svd_xor_values_f32_n16"),
        (jax.jit(jax.vmap(jml.svd)), KERNEL),
        (jax.vmap(jax.vmap(jml.svd)), KERNEL),
        (jax.grad(lambda a: jml.svdvals(a).sum()), KERNEL),
    ):
        a = A[None] if f is not jml.svd else A
        (call,) = jml.explain(f, a).calls
        assert (call.device, call.route) == ("metal", "kernel")
        assert kernel in call.reason
        assert launched(lambda f=f, a=a: f(a)) == {kernel: 1}


@pytest.mark.parametrize("row", ["xor", "ring", "block8", "block16", "twin"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_row(row: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMETAL_VARIANT", f"svd:{row}")
    shape = (3, 13, 30) if row in ("xor", "ring") else (2, 50, 36)
    a = jnp.asarray(random_matrix(shape, "float32")).astype(dtype)
    (call,) = jml.explain(jml.svd, a).calls
    assert (call.device, call.variant) == ("metal", row)
    result = fresh()(a)
    if dtype == "float32":
        check_svd(np.asarray(a), result)
    if _native.metal()["name"] != "Apple M1 Pro" or simulated() is None:
        return
    # The GPU of the simulated framework is the simulator.
    with jml.use_device("sim"):
        want = fresh()(a)
    for x, y in zip(result, want, strict=True):
        np.testing.assert_array_equal(x, y)


def test_transformations_agree_with_host() -> None:
    weight = random_matrix((13, 6), "float32", 1)

    def loss(a: Any) -> Any:
        u, s, vh = jml.svd(a, full_matrices=False)
        return jnp.vdot(weight, (u[:, :3] * s[None, :3]) @ vh[:3])

    def all_of(a: Any) -> Any:
        gradient = jax.vmap(jax.grad(loss))(a)
        _, moved = jax.jvp(jax.vmap(loss), (a,), (a[::-1],))
        second = jax.grad(lambda x: (jml.svdvals(x) ** 3).sum())
        return gradient, moved, jax.jvp(second, (a,), (a[::-1],))[1]

    got = jax.jit(all_of)(A)
    with jml.use_device("host"):
        want = jax.jit(lambda a: all_of(a))(A)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3 * float(np.abs(y).max()))


def test_nan_stays_in_its_matrix() -> None:
    a = A.copy()
    a[2, 3, 1] = np.nan
    (u, s, vh), info = fresh(return_info=True)(a)
    assert np.asarray(info.status).tolist() == [0, 0, 3, 0, 0]
    for x in (u, s, vh):
        assert np.isnan(x[2]).all()
        assert np.isfinite(np.delete(np.asarray(x), 2, 0)).all()


# --- matrices of any size, many dispatches a call ---------------------------------------------

GRID = [
    ((129, 70), "float32", {}),
    ((40, 200), "float32", {"full_matrices": False}),
    ((150, 30), "float32", {"compute_uv": False}),
    ((2, 131, 20), "float32", {"full_matrices": False}),
    ((9, 140), "float16", {}),
    ((135, 5), "bfloat16", {"full_matrices": False}),
    ((2, 40, 36), "complex64", {}),
    ((33, 50), "complex64", {"compute_uv": False}),
]


@pytest.mark.parametrize(("shape", "dtype", "options"), GRID)
def test_any_size(
    framework: Framework,
    shape: tuple[int, ...],
    dtype: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    framework.dll.jml_metal_sim_fast(1)
    wide = "complex64" if dtype == "complex64" else "float32"
    a = jnp.asarray(random_matrix(shape, wide)).astype(dtype)
    f = functools.partial(jml.svd, **options)
    (call,) = jml.explain(f, a).calls
    variant = "pairs" if dtype == "complex64" else "grid"
    assert (call.device, call.route, call.variant) == ("metal", "kernel", variant)
    result = Kept()
    ran: dict[str, int] = {}
    done = framework.during(lambda: ran.update(launched(lambda: result.append(jax.jit(f)(a)))))
    assert (done["committed"], done["waits"]) == (1, 1)
    assert done["dispatches"] == sum(ran.values()) == call.launches
    assert {k.split("_")[1] for k in ran} == {variant}
    if dtype == wide and options.get("compute_uv", True):
        check_svd(np.asarray(a), result[0], full_matrices=options.get("full_matrices", True))
    # The GPU of the simulated framework is the simulator.
    monkeypatch.setenv("JAXMETAL_SIM_CAPS", _metal.caps())
    monkeypatch.setenv("JAXMETAL_SIM", "fast")
    with jml.use_device("sim"):
        want = jax.jit(lambda a: f(a))(a)
    for x, y in zip(jax.tree.leaves(result[0]), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)


def test_any_size_is_judged(framework: Framework) -> None:
    """Once with every access judged, which the framework's GPU does by default."""
    a = random_matrix((129, 3), "float32")
    check_svd(a, fresh()(a))


def test_transformations_of_any_size(framework: Framework) -> None:
    framework.dll.jml_metal_sim_fast(1)
    a = random_matrix((2, 130, 4), "float32")

    def f(a: Any) -> Any:
        u, s, vh = jml.svd(a, full_matrices=False)
        return ((u * s[None, :]) @ vh)[0, 0] * s[0]

    got = jax.jit(jax.vmap(jax.grad(f)))
    assert {c.variant for c in jml.explain(got, a).calls} == {"grid"}
    with jml.use_device("host"):
        want = jax.vmap(jax.grad(f))(a)
    np.testing.assert_allclose(got(a), want, rtol=2e-3, atol=2e-3)


def test_any_size_is_cut_for_the_watchdog(
    framework: Framework, monkeypatch: pytest.MonkeyPatch
) -> None:
    framework.dll.jml_metal_sim_fast(1)
    a = random_matrix((2, 130, 4), "float32")
    # By default a single matrix of any size that fits is cut rarely, and not at all here.
    problem = spec_problem(a)
    native = _native.plan("svd", problem)
    limit = 10**7
    monkeypatch.setattr(svd_module.Spec, "problem_on", lambda *_: problem, raising=True)
    want = fresh()(a)
    problem["max_submission_work"] = limit
    assert _native.plan("svd", problem)["launches"] == native["launches"]
    result = Kept()
    done = framework.during(lambda: result.append(fresh()(a)))
    assert 1 < done["committed"] < native["launches"]
    assert done["waits"] == done["committed"]
    for x, y in zip(result[0], want, strict=True):
        np.testing.assert_array_equal(x, y)
    # Where one dispatch is too much, a matrix at a time.
    problem["max_submission_work"] = 1
    assert _native.plan("svd", problem)["launches"] == 2 * native["launches"]
    check_svd(a, fresh()(a))


def test_large_matrices_are_cut_by_default() -> None:
    one = device_of((4096, 4096))
    assert one.variant == "grid"
    assert device_of((2, 4096, 4096)).launches == one.launches
    assert device_of((500, 4096, 4096)).launches > one.launches


def test_auto_for_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMETAL_TUNING", "metal.svd.auto_min_grid_n=140")
    with jml.use_device("auto"):
        small = device_of((1000, 139))
        assert small.device == "host"
        assert "min(m, n) = 139 is below auto_min_grid_n = 140" in small.reason
        large = device_of((1000, 140))
        assert (large.device, large.variant) == ("metal", "grid")
        assert "min(m, n) = 140: worth a dispatch" in large.reason
        # One core works on a matrix of "pairs".
        for shape, device in (((64, 140, 40), "metal"), ((63, 140, 40), "host")):
            assert device_of(shape, "complex64").device == device, shape
        large = device_of((64, 300, 257), "complex64")
        assert large.device == "host"
        assert "min(m, n) = 257 is above auto_max_pairs_n = 256" in large.reason


# --- gemv ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64"])
@pytest.mark.parametrize("trans", ["N", "T", "C"])
def test_gemv(dtype: str, trans: Any) -> None:
    alpha, beta = (1.5 - 0.5j, 0.25 + 2j) if dtype == "complex64" else (1.5, -0.25)
    for m, n, vectors in ((37, 70, ()), (19, 600, (5,)), (3, 5, (18,))):
        depth, outs = (n, m) if trans == "N" else (m, n)
        a, x = array((m, n), dtype), array((*vectors, depth), dtype, 1)
        y, bias = array((*vectors, outs), dtype, 2), array((outs,), dtype, 3)
        f = functools.partial(jml.gemv, alpha=alpha, beta=beta, trans=trans)
        out = Kept()
        ran = launched(
            lambda f=f, a=a, x=x, y=y, b=bias, o=out: o.append(jax.jit(f)(a, x, y, bias=b))
        )
        (call,) = jml.explain(functools.partial(f, bias=bias), a, x, y).calls
        assert (call.device, call.route, call.launches) == ("metal", "kernel", sum(ran.values()))
        assert any(k in call.reason for k in ran)
        check(out[0], a, x, alpha=alpha, beta=beta, y=y, bias=bias, trans=trans)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
def test_gemv_epilogue(activation: Any) -> None:
    a, x, bias = array((24, 40), "bfloat16"), array((40,), "bfloat16", 1), array((24,), "bfloat16")
    f = functools.partial(jml.gemv, activation=activation)
    ours = f(a, x, bias=bias, residual=bias)
    with jml.use_device("xla"):
        want = f(a, x, bias=bias, residual=bias)
    np.testing.assert_allclose(
        ours.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-7, atol=2**-7
    )


def test_gemv_in_several_dispatches(framework: Framework) -> None:
    """Conversion, sums in parts and their end, in one command buffer, by way of scratch memory."""
    a, x = array((2, 40_000), "float16"), array((40_000,), "bfloat16", 1)
    f = jax.jit(lambda a, x: jml.gemv(a, x))
    out = Kept()
    done = framework.during(lambda: out.append(f(a, x)))
    assert (done["committed"], done["dispatches"], done["waits"]) == (1, 3, 1)
    check(out[0], a, x)


def test_gemv_transformations() -> None:
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

    ours = Kept()
    assert launched(lambda: ours.append(jax.jit(all_of)(a, x, b)))
    with jml.use_device("xla"):
        want = all_of(a, x, b)
    for got, w in zip(jax.tree.leaves(ours[0]), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, w, rtol=2e-5, atol=2e-4)


def test_gemv_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(m: int, nrhs: int = 1, dtype: Any = np.float32) -> Any:
        a, x = jax.ShapeDtypeStruct((m, 8), dtype), jax.ShapeDtypeStruct((nrhs, 8), dtype)
        (found,) = jml.explain(jml.gemv, a, x).calls
        return found

    with jml.use_device("auto"):
        assert call(1000).device == "host"
        assert call(4_000_000).device == "metal"
        text = "metal.gemv.auto_min_bytes=3200,metal.gemv.auto_max_nrhs=3"
        monkeypatch.setenv("JAXMETAL_TUNING", text)
        assert "3168 bytes of matrices are below auto_min_bytes = 3200" in call(99).reason
        assert "3200 bytes of matrices: worth a dispatch" in call(100).reason
        assert "4 vectors exceed auto_max_nrhs = 3" in call(100, 4).reason
        assert [call(99).device, call(100).device, call(100, 3).device] == ["host", *["metal"] * 2]
        assert call(100, 4).device == "host"
        a, x = array((100, 8), "float32"), array((8,), "float32", 1)
        assert launched(lambda: jml.gemv(a, x)) == {"gemv_tiny_f32_m1": 1}
        assert launched(lambda: jml.gemv(a[:99], x)) == {}


def test_gemv_that_no_kernel_does(x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("metal", "auto"):
        with jml.use_device(name):  # type: ignore[arg-type]
            for a, x, why in (
                ("float64", "float64", "got float64"),
                ("complex128", "complex64", "got complex128"),
                ("float32", "complex64", "a dtype that x does not widen"),
            ):
                m, v = array((9, 8), a), array((8,), x, 1)
                (call,) = jml.explain(jml.gemv, m, v).calls
                assert call.device == "host"
                assert "not on the Apple GPU: argument a: " in call.reason
                assert why in call.reason
                assert launched(lambda m=m, v=v: jml.gemv(m, v)) == {}
                check(jml.gemv(m, v), m, v)
    monkeypatch.setenv("JAXMETAL_VARIANT", "gemv:rows8")
    with pytest.raises(jml.DeviceUnavailableError, match=r"expected one of rows.*not 'metal'"):
        jml.gemv(array((9, 8), "float32"), array((8,), "float32", 1))


def test_gemv_is_cut_for_the_watchdog(
    framework: Framework, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        (array((3, 6, 70), "float16"), array((3, 70), "float32", 1)),  # a matrix at a time
        (array((6, 70), "float16"), array((35, 70), "float32", 2)),  # 16 vectors at a time
        (array((2, 40_000), "float16"), array((17, 40_000), "float16", 3)),
    ]
    real = gemv_module.Spec.problem_on
    for a, x in cases:
        f = (lambda a, x: jax.vmap(jml.gemv)(a, x)) if a.ndim == 3 else jml.gemv
        monkeypatch.setattr(gemv_module.Spec, "problem_on", real)
        want = jax.jit(lambda a, x, f=f: f(a, x))(a, x)
        (call,) = jml.explain(f, a, x).calls
        monkeypatch.setattr(
            gemv_module.Spec,
            "problem_on",
            lambda *args: {**real(*args), "max_submission_work": 1},
        )
        got = Kept()
        done = framework.during(lambda f=f, a=a, x=x, o=got: o.append(jax.jit(f)(a, x)))
        pieces = 3 if a.ndim == 3 or len(x) == 35 else 2
        assert done["dispatches"] == pieces * call.launches
        assert pieces <= done["committed"] <= done["dispatches"]
        np.testing.assert_array_equal(got[0], want)


# --- which calls it takes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "mode", "dtype"),
    [
        ((3, 9, 5), "reduced", "float32"),
        ((70, 40), "r", "float16"),
        ((40, 30), "complete", "float32"),
    ],
)
def test_qr(framework: Framework, shape: tuple[int, ...], mode: Any, dtype: str) -> None:
    a = jnp.asarray(random_matrix(shape, "float32")).astype(dtype)
    f = functools.partial(jml.qr, mode=mode)
    (call,) = jml.explain(f, a).calls
    assert (call.device, call.route) == ("metal", "kernel")
    out = Kept()
    ran: dict[str, int] = {}
    done = framework.during(lambda: ran.update(launched(lambda: out.append(jax.jit(f)(a)))))
    assert (done["committed"], done["dispatches"]) == (1, sum(ran.values()))
    assert done["dispatches"] == call.launches
    with jml.use_device("sim"):
        want = jax.jit(lambda a: f(a))(a)
    for x, y in zip(jax.tree.leaves(out[0]), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(
            x.astype(jnp.float32), y.astype(jnp.float32), atol=1e-5 if dtype == "float32" else 1e-2
        )


def test_qr_goes_to_host_where_it_has_no_kernel(x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    a = random_matrix((9, 5), "float64")
    (call,) = jml.explain(jml.qr, a).calls
    assert call.device in ("host", "xla")
    assert "not on the Apple GPU" in call.reason
    assert "float64" in call.reason
    q, r = jml.qr(a)
    np.testing.assert_allclose(q @ r, a, atol=1e-12)
    with jml.use_device("auto"):
        assert jml.explain(jml.qr, a.astype(np.float32)).calls[0].device != "metal"
    with pytest.raises(jml.DeviceUnavailableError, match="cpu platform"):
        jax.jit(jml.qr).trace(a).lower(lowering_platforms=("rocm",))
    monkeypatch.setenv("JAXMETAL_VARIANT", "qr:interleaved")
    with pytest.raises(jml.DeviceUnavailableError, match="not 'metal'"):
        jml.qr(a.astype(np.float32))


@pytest.mark.parametrize("shape", [(60, 50), (2, 40, 70)])
def test_rsvd_is_one_call(framework: Framework, shape: tuple[int, ...]) -> None:
    a = jnp.asarray(random_matrix(shape, "float32"))
    f = functools.partial(jml.rsvd, k=6, n_iter=2)
    (call,) = jml.explain(f, a).calls
    assert (call.device, call.route) == ("metal", "kernel")
    out = Kept()
    ran: dict[str, int] = {}
    done = framework.during(lambda: ran.update(launched(lambda: out.append(jax.jit(f)(a)))))
    assert done["dispatches"] == sum(ran.values()) == call.launches
    with jml.use_device("sim"):
        want = jax.jit(lambda a: f(a))(a)
    for x, y in zip(out[0], want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_rsvd_by_itself_from_some_size_on() -> None:
    def first(m: int, n: int) -> Any:
        a = jax.ShapeDtypeStruct((m, n), jnp.float32)
        with jml.use_device("auto"):
            return jml.explain(lambda a: jml.rsvd(a, 20), a).calls[0]

    assert first(2048, 2048).device == "metal"
    small = first(2048, 2047)
    assert small.route == "composite"
    assert "below auto_min_entries" in small.reason


def device_of(shape: tuple[int, ...], dtype: str = "float32", **options: Any) -> Any:
    f = functools.partial(jml.svd, full_matrices=False, **options)
    (call,) = jml.explain(f, jax.ShapeDtypeStruct(shape, dtype)).calls
    return call


def test_auto_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning = {"auto_min_matrices": 100, "auto_min_work": 100 * 8**3 + 1}
    text = ",".join(f"metal.svd.{k}={v}" for k, v in tuning.items())
    monkeypatch.setenv("JAXMETAL_TUNING", text)
    with jml.use_device("auto"):
        few = device_of((99, 32, 32))
        assert few.device == "host"
        assert "not on the Apple GPU: 99 matrices are fewer than auto_min_matrices" in few.reason
        small = device_of((100, 8, 8))
        assert small.device == "host"
        assert "= 51200 is below auto_min_work = 51201" in small.reason
        worth = device_of((101, 8, 8))
        assert worth.device == "metal"
        assert "worth a dispatch" in worth.reason
        assert device_of((1000, 32, 32), method="lapack").device == "host"
        a = random_matrix((101, 8, 8), "float32")
        assert launched(lambda: jml.svd(a)) == {"svd_xor_vectors_f32_n8": 1}
        assert launched(lambda: jml.svd(a[:99])) == {}
    with jml.use_device("host"):
        assert device_of((101, 8, 8)).device == "host"
        assert launched(lambda: jml.svd(a)) == {}


def test_shipped_thresholds() -> None:
    with jml.use_device("auto"):
        assert device_of((10_000, 8, 8)).device == "metal"
        assert device_of((8, 8)).device == "host"


def test_family_row_of_the_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "params.json"
    row = '{"metal": {"svd": {"%s": {"auto_min_work": 0, "auto_min_matrices": 0}}}}'
    monkeypatch.setenv("JAXMETAL_PARAMS", str(path))
    with jml.use_device("auto"):
        path.write_text(row % "apple1")
        assert device_of((8, 8)).device == "host"
        path = tmp_path / "params2.json"
        monkeypatch.setenv("JAXMETAL_PARAMS", str(path))
        path.write_text(row % _metal.family())
        assert device_of((8, 8)).device == "metal"


@pytest.mark.parametrize(
    ("shape", "dtype", "why"),
    [
        ((4, 5, 5), "float64", "got float64"),
        ((4, 5, 5), "complex128", "got complex128"),
    ],
)
def test_host_takes_what_no_kernel_does(
    x64: None, shape: tuple[int, ...], dtype: str, why: str
) -> None:
    for name in ("metal", "auto"):
        with jml.use_device(name):  # type: ignore[arg-type]
            call = device_of(shape, dtype)
            assert call.device == "host"
            assert "not on the Apple GPU" in call.reason
            assert why in call.reason
            a = random_matrix(shape, dtype)
            result = Kept()
            assert launched(lambda a=a, r=result: r.append(fresh()(a))) == {}
            check_svd(a, result[0])


def test_a_row_that_is_not_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMETAL_VARIANT", "svd:column")
    with pytest.raises(jml.DeviceUnavailableError, match=r"variant.*got column.*not 'metal'"):
        jml.svd(A)
    with jml.use_device("auto"):
        assert device_of((5, 9, 6)).variant == "column"


def test_another_platform_is_an_error() -> None:
    with pytest.raises(
        jml.DeviceUnavailableError, match="'metal' serves arrays on the cpu platform"
    ):
        jax.jit(lambda a: jml.svd(a)).trace(A).lower(lowering_platforms=("rocm",))


# --- one command buffer, memory --------------------------------------------------------------


def test_one_command_buffer_a_call(framework: Framework) -> None:
    f = fresh()
    f(A)
    done = framework.during(lambda: [jax.block_until_ready(f(A)) for _ in range(3)])
    assert (done["committed"], done["dispatches"], done["waits"]) == (3, 3, 3)


def test_large_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that each stay under the watchdog's limit, each matrix in one of them."""
    row = _native.caps()[_metal.caps()]
    call = device_of((20_000, 128, 128))
    assert call.launches > 10
    assert call.grid[0] * (call.launches - 1) < 20_000 <= call.grid[0] * call.launches
    assert row["max_submission_work"] > 0
    assert device_of((100, 128, 128)).launches == 1


def test_the_pieces_of_a_cut_call(framework: Framework, monkeypatch: pytest.MonkeyPatch) -> None:
    a = random_matrix((23, 7, 5), "float32")
    want = fresh(return_info=True)(a)
    problem = {**spec_problem(a), "max_submission_work": 1}
    assert problem["device"] == "metal"
    monkeypatch.setattr(svd_module.Spec, "problem_on", lambda *_: problem, raising=True)
    before = framework.totals()
    got = fresh(return_info=True)(a)
    jax.block_until_ready(got)
    after = framework.totals()
    # 16 matrices of 8 x 8 to a threadgroup, which is the least.
    assert after["committed"] - before["committed"] == 2
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)


def spec_problem(a: Any) -> dict[str, Any]:
    spec = svd_module._spec("svd", False, True, "auto", "safe")
    found: dict[str, Any] = spec.problem_on(_metal.caps(), a.shape, a.dtype)
    return found


def page_aligned(a: np.ndarray) -> np.ndarray:
    memory = mmap.mmap(-1, a.nbytes)
    out = np.frombuffer(memory, a.dtype).reshape(a.shape)
    out[:] = a
    return out


def test_both_ways_into_the_gpu(framework: Framework) -> None:
    """Whole pages are wrapped where they are, anything else is copied; the results agree."""
    a = random_matrix((700, 8, 8), "float32")
    pages = jax.device_put(page_aligned(a), may_alias=True)
    if pages.unsafe_buffer_pointer() % mmap.PAGESIZE:
        pytest.fail("JAX copied the array; the test needs another way to alias memory")
    copied = jnp.asarray(a) + 0
    f = fresh()
    want = f(copied)
    done = counted(lambda: f(copied))
    ways = {k: done.pop(k, 0) for k in ("wrapped", "copied_in", "copied_out")}
    assert (done["calls"], done["command_buffers"]) == (1, 1)
    assert sum(ways.values()) == 7
    # XLA's memory may happen to begin on a page.
    assert ways["copied_in"] == (copied.unsafe_buffer_pointer() % mmap.PAGESIZE != 0)
    done = counted(lambda: f(pages))
    assert done["wrapped"] >= 1
    assert done.get("copied_in", 0) == 0
    for x, y in zip(f(pages), want, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(pages, a)
    # Memory that Metal will not map is copied.
    framework.fault("no_copy")
    assert counted(lambda: f(pages))["copied_in"] == 1


def test_results_in_place(framework: Framework) -> None:
    """XLA aligns its memory to 64 bytes here, to pages on a Mac if it is large: pages of 64."""
    a = jnp.asarray(random_matrix((40, 8, 8), "float32"))
    f = fresh(return_info=True)
    want = f(a)
    framework.dll.jml_metal_sim_page(64)
    framework.forget()
    done = counted(lambda: f(a))
    assert done["wrapped"] == 7
    assert not {"copied_in", "copied_out"} & set(done)
    got = f(a)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)
    # Results of less than a page, and one that Metal will not map.
    few = counted(lambda: f(a[:4]))
    assert (few["wrapped"], few["copied_out"]) == (4, 3)
    framework.fault("no_copy", skip=2)
    assert counted(lambda: f(a))["copied_out"] == 1


def test_buffers_are_used_again(framework: Framework) -> None:
    f = fresh()
    jax.block_until_ready(f(A))
    assert "buffers_made" not in counted(lambda: f(A))


def test_nothing_leaks(framework: Framework) -> None:
    f = fresh()
    jax.block_until_ready(f(A))
    before = {k: n for k, n in framework.living().items() if k != "MTLCommandBuffer"}
    for _ in range(50):
        jax.block_until_ready(f(A))
    assert framework.settled(before)
    framework.dll.jml_metal_sim_stub(1)
    try:
        for _ in range(10_000):
            out = f(A)
        jax.block_until_ready(out)
    finally:
        framework.dll.jml_metal_sim_stub(0)
    assert framework.settled(before)
    for kind in ("command_buffer", "encoder", "timeout", "page_fault"):
        framework.fault(kind)
        with pytest.raises(FAILURES):
            jax.block_until_ready(f(A))
        jax.block_until_ready(f(A))
    assert framework.settled(before)
    del f
    jax.clear_caches()
    gc.collect()
    framework.forget()
    assert framework.settled({})


def test_threads(framework: Framework) -> None:
    a = random_matrix((40, 8, 8), "float32")
    f, g = fresh(), jax.jit(jml.svdvals)
    want = [np.asarray(x) for x in f(a)]
    values = np.asarray(g(a))
    framework.forget()
    wrong: list[str] = []

    def work(i: int) -> None:
        for _ in range(6):
            # use_device holds in the main thread only, and these are compiled already.
            with jml.use_device("metal"):
                if i % 2:
                    same = np.array_equal(g(a), values)
                else:
                    same = all(np.array_equal(x, y) for x, y in zip(f(a), want, strict=True))
            if not same:
                wrong.append(f"thread {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_function_constants(framework: Framework) -> None:
    """No kernel of the package has one: tests/metal_sim/probe.metal, two launches by scratch."""
    x = np.arange(50, dtype=np.float32)
    y = np.zeros_like(x)

    def probe(constant: int) -> str:
        pointers = [v.ctypes.data_as(ctypes.c_void_p) for v in (x, y)]
        text: bytes = framework.dll.jml_metal_sim_probe(constant, *pointers, len(x))
        return text.decode()

    assert probe(0) == ""
    np.testing.assert_array_equal(y, -(3 * (2 * x + 0.5) + 0.5))
    assert "probe has no function constant 9" in probe(9)
    assert "function constant 3 of probe has no value" in probe(-1)


# --- what goes wrong -------------------------------------------------------------------------

FAULTS = {
    "compile": r"svd.metal does not compile for .*report it.*\n.*undeclared identifier 'quux'",
    "function": r"kernel svd_\w+ is not in the compiled library",
    "pipeline": r"has no pipeline on apple-m1-pro: Compiler encountered an internal error",
    "width": r"simdgroups of 16 threads on apple-m1-pro, the kernels are written for 32",
    "buffer": r"no memory for a buffer of \d+ bytes",
    "command_buffer": r"no command buffer on apple-m1-pro",
    "encoder": r"no compute encoder on apple-m1-pro",
    "timeout": r"GPU Timeout.*holds the GPU for seconds: use smaller batches, or device host",
    "page_fault": r"Address Fault.*please report it",
    "out_of_memory": r"Insufficient Memory.*use smaller batches",
    "removed": r"Device was removed.*next call looks for one again",
    "registers": r"64 threads per threadgroup exceed the 32 that its registers leave",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_errors_and_pass(framework: Framework, kind: str) -> None:
    # A second try with a smaller pool is made where a buffer fails; pools are empty here.
    framework.fault(kind, count=2 if kind == "buffer" else 1)
    with pytest.raises(FAILURES) as caught:
        jax.block_until_ready(fresh()(A))
    assert re.search(r"svd: metal: " + r"[\s\S]*" + FAULTS[kind], str(caught.value)), caught.value
    if kind == "registers":
        framework.forget()
    check_svd(A, fresh()(A))


def test_a_pool_in_the_way_is_let_go(framework: Framework) -> None:
    f = fresh()
    jax.block_until_ready(f(A))
    b = random_matrix((900, 8, 8), "float32")
    framework.fault("buffer")
    check_svd(b, f(b))


def test_a_lost_gpu_is_found_again(framework: Framework) -> None:
    f = fresh()
    want = f(A)
    framework.fault("removed")
    with pytest.raises(FAILURES, match="Device was removed"):
        jax.block_until_ready(f(A))
    framework.fault("no_device")
    with pytest.raises(FAILURES, match="sees no Metal device"):
        jax.block_until_ready(f(A))
    for x, y in zip(f(A), want, strict=True):
        np.testing.assert_array_equal(x, y)


def test_without_the_math_mode_of_macos_15(framework: Framework) -> None:
    """The simulation refuses a library that was not compiled without fast math."""
    framework.fault("macos14", count=100)
    check_svd(A, fresh()(A))
    framework.fault("macos14", count=0)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("import jaxmetal_linalg as jml, numpy as np\n" + code, **environment)


def test_gpus_by_name(framework: Framework) -> None:
    code = "from jaxmetal_linalg import _native; print(_native.metal())"
    for name, family, caps in (
        ("Apple M4 Max", "9", "'caps': 'apple-m4-max', 'family': 'apple9'"),
        ("Apple M9 Giga", "12", "'caps': 'apple-m5', 'family': 'apple10'"),
        ("Apple A12", "5", "need an Apple GPU of family 7 (M1) or newer"),
    ):
        done = run(code, JML_METAL_SIM_GPU=name, JML_METAL_SIM_FAMILY=family)
        assert caps in done.stdout, (done.stdout, done.stderr)


def test_too_old_a_gpu_is_no_device(framework: Framework) -> None:
    code = "print(jml.devices()); print(jml.explain(jml.svd, np.ones((9999, 8, 8), 'f')))"
    old = {"JML_METAL_SIM_FAMILY": "6", "JAXMETAL_DEVICE": ""}
    done = run(code, **old)
    assert done.returncode == 0, done.stderr
    assert "metal" not in done.stdout
    done = run("jml.svd(np.eye(3))", **{**old, "JAXMETAL_DEVICE": "metal"})
    assert "device 'metal' is not available: the kernels need an Apple GPU" in done.stderr


# --- compiled code on disk -------------------------------------------------------------------


def test_archive_on_disk(framework: Framework, tmp_path: Path) -> None:
    first = counted(lambda: fresh()(A))
    assert first["archives_written"] == 1
    (file,) = (tmp_path / "cache").glob("*.binarchive")
    framework.forget()
    hits = framework.totals()["hits"]
    again = counted(lambda: fresh()(A))
    assert again["archives_loaded"] == 1
    assert "archives_written" not in again
    assert framework.totals()["hits"] == hits + 1
    # One that is cut short is thrown away and written anew.
    file.write_bytes(b"half an arch")
    framework.forget()
    assert counted(lambda: fresh()(A))["archives_written"] == 1
    # Without an archive everything works.
    file.unlink()
    framework.forget()
    framework.fault("archive")
    assert "archives_written" not in counted(lambda: fresh()(A))


def test_compiled_once_a_process(framework: Framework) -> None:
    done = counted(lambda: [fresh()(A), fresh()(A[:2]), fresh()(A)])
    assert done["libraries_compiled"] == 1


def test_prebuilt_library_beside_this_one(framework: Framework, tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.symlink_to(_native.library_path().resolve())
    code = (
        "import jax; jax.block_until_ready(jml.svd(np.ones((3, 4), 'f')))\n"
        "from jaxmetal_linalg import _native; print(_native.metal())"
    )
    file = tmp_path / "svd.metallib"
    file.write_text("simulated metallib\n")
    done = run(code, JAXMETAL_LIBRARY=str(library), JAXMETAL_DEVICE="metal")
    assert "'libraries_compiled': 0, 'libraries_loaded': 1," in done.stdout, done.stderr
    file.write_text("of another format")
    done = run(code, JAXMETAL_LIBRARY=str(library), JAXMETAL_DEVICE="metal")
    assert re.search(r"svd\.metallib cannot be loaded", done.stderr), done.stderr


# --- the framework notices -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("misuse", "text"),
    [
        ("unknown", "unknown selector frobnicate sent to MTLDevice #1"),
        ("released", r"message name to MTLDevice #\d+, which is gone"),
        ("twice", r"release of MTLDevice #\d+, which is gone|message release to MTLDevice #\d+"),
        ("nil", "message name to nil"),
        ("no_pool", "autoreleased on a thread without a pool"),
        ("no_end", "goes without endEncoding"),
        ("open_commit", "commit before endEncoding"),
        ("early_wait", "waitUntilCompleted before commit"),
        ("two_commits", "committed twice"),
        ("after_end", "dispatchThreadgroups:threadsPerThreadgroup: after endEncoding"),
        ("unbound", "argument a: no buffer bound at 0"),
        ("left_by_another", "argument a: no buffer bound at 0"),
        ("threads", "2048 threads exceed the pipeline's 1024"),
        ("memory", "bytes of threadgroup memory exceed 32768"),
        ("offset", "offset 16384 is outside of MTLBuffer"),
        ("untracked", "expected shared storage with tracked hazards"),
        ("fast_math", "expected the safe math mode"),
        ("freed_in_flight", "goes while the GPU uses it"),
        ("touched_in_flight", r"MTLBuffer #\d+: contents while the GPU uses it"),
        ("untracked_hazard", "share memory that one of them writes: a hazard that Metal does not"),
        ("no_pipeline", "a dispatch without a pipeline"),
        ("two_encoders", "a second encoder before the first has ended"),
        ("late_encoder", "an encoder after commit"),
        ("high_index", "buffer index 31 above 30"),
        ("null_buffer", "null bound at 0"),
        ("wrong_class", r"setBuffer:offset:atIndex: expected MTLBuffer, got MTLDevice #\d+"),
        ("gone_argument", r"setBuffer:offset:atIndex: got MTLBuffer #\d+, which is gone"),
        ("big_bytes", "setBytes: of 4100 bytes"),
        ("odd_memory", "threadgroup memory of 24 bytes: expected a multiple of 16"),
        ("empty_grid", "an empty grid"),
        ("odd_threads", "40 threads are no whole simdgroups"),
        ("pool_order", "an autorelease pool ends on another thread or out of order"),
        ("empty_buffer", "newBufferWithLength: of 0 bytes"),
        ("part_of_a_page", "newBufferWithBytesNoCopy: expected whole pages, got 100 bytes"),
        ("ignored_error", "an error that nobody looks at"),
    ],
)
def test_misuse_ends_the_process(framework: Framework, misuse: str, text: str) -> None:
    code = f"""
import ctypes
ctypes.CDLL({str(_native.library_path())!r}).jml_metal_sim_misuse({misuse!r}.encode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode < 0, done.stdout
    assert re.search(f"metal_sim: .*{text}", done.stderr), done.stderr
