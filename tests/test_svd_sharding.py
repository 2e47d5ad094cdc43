"""svd on several devices: no gather over the batch, and right gradients under shard_map.

The cases need four forced host devices, which changes XLA's thread pools; so one test starts this
file again in a process of its own, and counts what ran there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import random_matrix
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmetal_linalg as jml

CHILD = "JAXMETAL_TEST_SHARDING_CHILD"
N_CASES = 22

if os.environ.get(CHILD) != "1":

    def test_on_four_devices() -> None:
        environment = {
            **os.environ,
            CHILD: "1",
            "JAX_PLATFORMS": "cpu",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "JAXMETAL_REQUIRE": os.environ.get("JAXMETAL_REQUIRE", "").replace("cuda", ""),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
            + " --xla_force_host_platform_device_count=4",
        }
        command = [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, __file__],
            env=environment,
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=600,
        )
        passed = len(re.findall(r"PASSED", done.stdout))
        # Several GPUs are test_cuda.py's, Metal is test_metal.py's.
        skipped = len(re.findall(r"^(?!.*\[(?:cuda|metal)).*SKIPPED", done.stdout, re.M))
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        # Without the native library its cases are skipped, and only those.
        assert passed + skipped == N_CASES, done.stdout[-6000:]
        assert skipped == 0 or "host" not in jml.devices(), done.stdout[-6000:]

else:
    A = random_matrix((8, 6, 5), "float32")

    # The same rules everywhere, and compiled fastest there.
    on_host = pytest.mark.parametrize("device", ["host"], indirect=True)

    def mesh(*sizes: int, kind: AxisType = AxisType.Auto) -> Any:
        return jax.make_mesh(sizes, ("x", "y")[: len(sizes)], axis_types=(kind,) * len(sizes))

    def compiled_text(f: Callable[..., Any], x: jax.Array) -> str:
        return str(jax.jit(f).lower(x).compile().as_text())

    def test_there_are_four_devices() -> None:
        assert jax.device_count() == 4

    def with_info(method: str) -> Callable[[Any], Any]:
        return lambda a: jml.svd(a, method=method, return_info=True)

    @pytest.mark.parametrize("layout", ["one axis", "two axes", "one of two"])
    def test_batch_is_not_gathered(device: str, layout: str) -> None:
        over, spec, a = {
            "one axis": (mesh(4), P("x"), A),
            "two axes": (mesh(2, 2), P("x", "y"), A.reshape(2, 4, 6, 5)),
            "one of two": (mesh(4), P("x", None), A.reshape(4, 2, 6, 5)),
        }[layout]
        x = jax.device_put(a, NamedSharding(over, spec))
        for method in ("jacobi", "lapack") if device == "host" else ("auto",):
            f = jax.jit(with_info(method))
            compiled = f.lower(x).compile()
            text = compiled.as_text()
            assert "all-gather" not in text, method
            assert "all-to-all" not in text, method
            assert ("jml_svd_v1" in text) == (device != "xla")
            out, whole = compiled(x), f(a)
            for got, want in zip(jax.tree.leaves(out), jax.tree.leaves(whole), strict=True):
                assert got.sharding.spec[0] == "x"
                np.testing.assert_allclose(got, want, atol=2e-6)

    @pytest.mark.parametrize("spec", [P(None, "x"), P(None, None, "x")])
    def test_sharded_rows_or_columns_are_right(device: str, spec: P) -> None:
        a = A[:, :4, :4]
        x = jax.device_put(a, NamedSharding(mesh(4), spec))
        f = jax.jit(with_info("auto"))
        got, want = f(x), f(a)
        for p, q in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(p, q, atol=2e-6)

    @on_host
    def test_sharded_gradient(device: str) -> None:
        x = jax.device_put(A, NamedSharding(mesh(4), P("x")))
        g = jax.grad(lambda a: (jml.svd(a, False).U * jnp.cos(jnp.arange(5.0))[None, None]).sum())
        assert "all-gather" not in compiled_text(g, x)
        g = jax.jit(g)
        np.testing.assert_allclose(g(x), g(A), atol=2e-5)

    def loss(a: Any) -> Any:
        u, s, vh = jml.svd(a, False)
        m, n = a.shape[-2:]
        w = jnp.cos(jnp.arange(float(m * n))).reshape((1,) * (a.ndim - 2) + (m, n))
        return (((u * jnp.sin(s)[..., None, :]) @ vh) * w).sum()

    def summed(f: Callable[..., Any], *specs: P) -> Callable[..., Any]:
        inner = jax.shard_map(
            lambda *xs: jax.lax.psum(f(*xs), "x"), mesh=mesh(4), in_specs=specs, out_specs=P()
        )
        return jax.jit(inner)

    @on_host
    def test_shard_map_gradient(device: str) -> None:
        f = summed(loss, P("x"))
        value, grad = jax.jit(jax.value_and_grad(f))(A)
        want, want_grad = jax.jit(jax.value_and_grad(loss))(A)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        np.testing.assert_allclose(grad, want_grad, atol=1e-5)

    @on_host
    def test_shard_map_gradient_of_a_replicated_matrix(device: str) -> None:
        """The cotangents of all shards must be added up, which needs the varying axes tracked."""
        b, c = A[0], jnp.arange(1.0, 5.0)

        def varying(b: Any, c: Any) -> Any:
            return loss(b * c[0])

        def constant(b: Any, c: Any) -> Any:
            return jml.svdvals(b).sum() * c[0]

        for f in (varying, constant):
            got = jax.jit(jax.grad(summed(f, P(), P("x")), (0, 1)))(b, c)

            def total(b: Any, c: Any, f: Any = f) -> Any:
                return jax.vmap(lambda x: f(b, x[None]))(c).sum()

            want = jax.jit(jax.grad(total, (0, 1)))(b, c)
            for p, q in zip(got, want, strict=True):
                np.testing.assert_allclose(p, q, atol=2e-5)

    @on_host
    def test_shard_map_second_derivative_and_vmap(device: str) -> None:
        f = summed(lambda a: jax.vmap(loss)(a).sum(), P("x"))
        tangent = jnp.ones_like(A)
        got, want = (
            jax.jit(lambda a, f=f: jax.jvp(jax.grad(f), (a,), (tangent,))[1])(A) for f in (f, loss)
        )
        np.testing.assert_allclose(got, want, atol=2e-2)

    @on_host
    def test_shard_map_with_info(device: str) -> None:
        f = jax.shard_map(with_info("auto"), mesh=mesh(4), in_specs=P("x"), out_specs=P("x"))
        (u, s, vh), info = jax.jit(f)(A)
        np.testing.assert_allclose((u[..., :5] * s[:, None]) @ vh, A, atol=1e-5)
        np.testing.assert_array_equal(info.status, 0)

    @on_host
    def test_explicit_sharding(device: str) -> None:
        over = mesh(4, kind=AxisType.Explicit)
        with jax.set_mesh(over):
            x = jax.device_put(A, NamedSharding(over, P("x")))
            out = jax.jit(with_info("auto"))(x)
            for got in jax.tree.leaves(out):
                assert jax.typeof(got).sharding.spec[0] == "x"
            g = jax.jit(jax.grad(lambda a: jml.svd(a, False).U.sum()))(x)
            assert jax.typeof(g).sharding.spec[0] == "x"
            y = jax.device_put(A[:, :4], NamedSharding(over, P(None, "x")))
            with pytest.raises(Exception, match="svd: argument a: expected m and n unsharded"):
                jml.svd(y)
