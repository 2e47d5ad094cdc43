"""explain: every call is found, nothing runs, and it agrees with what is lowered."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import lowered_text, random_matrix

import jaxmetal_linalg as jml
from jaxmetal_linalg._explain import explain_on

A = random_matrix((3, 8, 5), "float32")
FIELDS = ("op", "device", "route", "variant", "grid", "group", "threadgroup_bytes", "launches")


def test_record_and_table(device: str) -> None:
    explanation = jml.explain(jml.svd, A, full_matrices=False)
    (call,) = explanation.calls
    assert call.op == "svd"
    assert call.device == device
    assert call.launches == 1
    assert call.shape == (8, 5)
    assert call.batch == 3
    assert call.dtype == "float32"
    assert call.variant
    assert call.reason
    table = str(explanation)
    for name in FIELDS:
        assert name in table
        assert hasattr(call, name)
    assert call.reason in table
    assert "8x5" in table


def test_shapes_instead_of_arrays(device: str) -> None:
    abstract = jax.ShapeDtypeStruct((1000, 16, 16), jnp.float32)
    (call,) = jml.explain(jml.svdvals, abstract).calls
    assert call.batch == 1000


def test_nothing_runs_and_nothing_compiles(device: str) -> None:
    ran: list[int] = []

    @jax.jit
    def f(a: Any) -> Any:
        jax.debug.callback(lambda: ran.append(1))
        return jml.svd(a).S

    # Far too large to allocate, let alone to decompose.
    side = 128 if device == "sim" else 1 << 12
    huge = jax.ShapeDtypeStruct((1 << 24, side, side), jnp.float32)
    assert len(jml.explain(f, huge).calls) == 1
    jax.effects_barrier()
    assert not ran


def test_every_call_is_found(device: str) -> None:
    def scanned(a: Any) -> Any:
        return jax.lax.scan(lambda c, x: (c, jml.svdvals(x)), 0.0, a)

    def looped(a: Any) -> Any:
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x - jml.svdvals(x).sum(), a[0])

    def branched(a: Any) -> Any:
        return jax.lax.cond(a.sum() > 0, jml.svdvals, lambda a: jml.svd(a).S, a)

    @jax.custom_jvp
    def custom(a: Any) -> Any:
        return jml.svdvals(a)

    custom.defjvp(lambda p, t: (custom(*p), custom(*t)))

    @jax.custom_vjp
    def reverse(a: Any) -> Any:
        return jml.svdvals(a)

    reverse.defvjp(lambda a: (reverse(a), a), lambda a, g: (a,))

    def mapped(a: Any) -> Any:
        mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec()
        return jax.shard_map(jml.svdvals, mesh=mesh, in_specs=spec, out_specs=spec)(a)

    for f, count in (
        (jax.jit(jml.svd), 1),
        (lambda a: (jml.svd(a), jml.svdvals(a[0])), 2),
        (scanned, 1),
        (looped, 1),
        (branched, 2),
        (custom, 1),
        (reverse, 1),
        (mapped, 1),
        (jax.checkpoint(jml.svdvals), 1),
        (jax.vmap(jml.svdvals), 1),
        (jax.grad(lambda a: jml.svd(a, False).U.sum()), 1),
        (jnp.sum, 0),
    ):
        assert len(jml.explain(f, A).calls) == count, f
    assert "no jaxmetal_linalg primitive" in str(jml.explain(jnp.sum, A))


def test_arguments_without_shape_are_passed_on(device: str) -> None:
    def f(a: Any, times: int, *, method: str, flag: bool) -> Any:
        assert isinstance(times, int)
        assert flag is True
        return [jml.svdvals(a, method=method) for _ in range(times)]

    assert len(jml.explain(f, A, 3, method="jacobi", flag=True).calls) == 3


def test_explain_agrees_with_lowering(host: None) -> None:
    for shape in [(10, 4, 4), (10, 40, 40), (300, 300), (3, 300, 300), (700, 700), (9, 200, 20)]:
        a = jax.ShapeDtypeStruct(shape, jnp.float32)
        (call,) = jml.explain(jml.svd, a).calls
        text = lowered_text(jml.svd, a)
        assert (call.route == "lapack") == ("lapack_sgesdd" in text), shape
        if call.route == "host":
            assert "jml_svd_v1" in text


def test_empty_input(device: str) -> None:
    (call,) = jml.explain(jml.svd, np.zeros((3, 0, 4), np.float32)).calls
    assert call.route == "empty"
    assert call.launches == 0


def test_caps_of_gpus_that_are_not_here(device: str) -> None:
    """The plan for another GPU, whatever device is chosen here."""
    explanation = jml.explain(jml.svd, A, caps="apple-m3-max")
    (call,) = explanation.calls
    assert (call.device, call.route, call.variant, call.launches) == ("metal", "kernel", "xor", 1)
    # Three matrices of up to 8 x 8, sixteen a threadgroup of four simdgroups.
    assert (call.grid, call.group) == ((1, 1, 1), (128, 1, 1))
    assert call.threadgroup_bytes == 16 * 8 * 9 * 4
    assert str(explanation).startswith("GPU apple-m3-max\n")
    assert "svd_xor_vectors_f32_n8" in call.reason
    for caps, n, variant in (
        ("nvidia-h200", 8, "xor"),
        ("nvidia-h200", 16, "ring"),
        ("nvidia-h200", 24, "ring"),
        ("apple-m5", 32, "xor"),
        ("apple-m1", 64, "block8"),
    ):
        a = jax.ShapeDtypeStruct((7, n, n), jnp.bfloat16)
        (call,) = jml.explain(jml.svdvals, a, caps=caps).calls
        assert call.variant == variant, (caps, n)
        assert call.device == ("cuda" if "nvidia" in caps else "metal")


def test_caps_of_gpus_that_take_the_triangle_first(device: str) -> None:
    def thin(a: jax.Array) -> Any:
        return jml.svd(a, full_matrices=False)

    a = jax.ShapeDtypeStruct((5000, 20), jnp.float32)
    for caps, f, route in (
        ("nvidia-h200", thin, "qr"),
        ("nvidia-h200", jml.svd, "kernel"),  # U is completed
        ("apple-m5", thin, "kernel"),
    ):
        (call,) = jml.explain(f, a, caps=caps).calls
        assert (call.route, "qr first" in call.reason) == (route, route == "qr"), (caps, f)


def test_caps_with_a_row_by_name(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMETAL_VARIANT", "svd:fused")
    a = jax.ShapeDtypeStruct((3, 300, 280), jnp.float16)
    (call,) = jml.explain(jml.svdvals, a, caps="nvidia-h200").calls
    assert (call.device, call.route, call.variant) == ("cuda", "kernel", "fused")
    assert "lanes a pair: 4; svd_fused_n512" in call.reason


def test_caps_with_64_bit_types(device: str) -> None:
    with jax.enable_x64(True):
        for dtype, bytes_ in ((jnp.float64, 2 * 32 * 33 * 8), (jnp.complex128, 2 * 64 * 32 * 8)):
            a = jax.ShapeDtypeStruct((7, 32, 20), dtype)
            (call,) = jml.explain(jml.svd, a, caps="nvidia-h200").calls
            assert (call.device, call.route, call.variant) == ("cuda", "kernel", "xor")
            # A matrix a simdgroup, two a threadgroup.
            assert (call.grid, call.group) == ((4, 1, 1), (64, 1, 1))
            assert call.threadgroup_bytes == bytes_
            (call,) = jml.explain(jml.svdvals, a, caps="nvidia-h200").calls
            values_bytes = bytes_ if dtype == jnp.float64 else 0
            assert (call.route, call.threadgroup_bytes) == ("kernel", values_bytes)


def test_caps_without_a_kernel(device: str) -> None:
    big = jax.ShapeDtypeStruct((3, 256, 200), jnp.float32)
    with jax.enable_x64(True):
        wide = jax.ShapeDtypeStruct((3, 256, 200), jnp.float64)
        (call,) = jml.explain(jml.svd, wide, caps="apple-m1").calls
    assert (call.device, call.route, call.variant, call.launches) == ("metal", "none", "", 0)
    assert "float64" in call.reason
    (call,) = jml.explain(jml.svd, big, method="xla", caps="apple-m1").calls
    assert call.route == "portable"
    (call,) = jml.explain(jml.svd, A[:0], caps="apple-m1").calls
    assert call.route == "empty"


def test_unknown_caps() -> None:
    with pytest.raises(
        ValueError, match=r"explain: argument caps: .*apple-m3-max.*nvidia-h200.*'m9'"
    ):
        jml.explain(jml.svd, A, caps="m9")


@pytest.mark.parametrize("platform", ["METAL", "mps", "metal", "mlx", "rocm", "tpu"])
def test_other_platforms(platform: str) -> None:
    (call,) = explain_on(platform, jml.svd, A).calls
    assert call.device == "xla"
    assert call.route == "portable"
    assert platform in call.reason
    if "host" in jml.devices():
        with jml.use_device("host"), pytest.raises(jml.DeviceUnavailableError, match=platform):
            explain_on(platform, jml.svd, A)
