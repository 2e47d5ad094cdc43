"""Platforms of plugins for Apple GPUs: what the portable path asks of them, and their FFI.

No plugin runs here. Programs are lowered for a platform of its name, read, and run on the cpu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import stablehlo

import jaxmetal_linalg as jml
from jaxmetal_linalg import _compat, _measure, _native
from jaxmetal_linalg._accuracy import ACC_RATIO
from jaxmetal_linalg._explain import explain_on

PLATFORMS = _native.APPLE_PLUGINS

# What jax-mps 0.11.1 handles. From its wheel for macOS on PyPI: `strings` of its dylib lists the
# texts of its own object files in the order in which the linker met them, and MLIR's after them.
# Those named as operations, from the text "MPS Final Summary" to "stablehlo.complex", are the keys
# of its handlers' tables; each text is there once, so what only MLIR names comes later. For shape
# operations the project's source (src/pjrt_plugin/ops/shape.cc of its repository) has the same.
JAX_MPS_OPS = {"func.func", "func.call", "func.return", "chlo.atan2", "chlo.top_k"}
JAX_MPS_OPS |= {
    f"stablehlo.{name}"
    for names in (
        "exponential log sqrt rsqrt negate abs floor ceil sine cosine tanh tan logistic sign",
        "log_plus_one round_nearest_even is_finite exponential_minus_one real imag add subtract",
        "multiply divide maximum minimum power atan2 and or xor shift_left shift_right_logical",
        "clamp remainder cbrt not shift_right_arithmetic popcnt compare select round_nearest_afz",
        "count_leading_zeros reduce_precision constant convert bitcast_convert reshape",
        "broadcast_in_dim concatenate transpose reverse iota slice dynamic_slice",
        "dynamic_update_slice pad return gather scatter reduce reduce_window select_and_scatter",
        "all_reduce partition_id dot_general convolution cholesky triangular_solve composite",
        "optimization_barrier while case rng_bit_generator create_token after_all sort fft complex",
    )
    for name in names.split()
}
A = jax.ShapeDtypeStruct((2, 7, 4), jnp.float32)
WIDE = jax.ShapeDtypeStruct((4, 7), jnp.float32)
COMPLEX = jax.ShapeDtypeStruct((5, 3), jnp.complex64)
VECTOR = jax.ShapeDtypeStruct((2, 4), jnp.float32)
TALL_VECTOR = jax.ShapeDtypeStruct((2, 7), jnp.float32)


def total(f: Callable[..., Any]) -> Callable[..., Any]:
    """A real number of everything that ``f`` returns."""

    def number(*args: Any) -> Any:
        leaves = jax.tree.leaves(f(*args))
        return sum(jnp.sum(jnp.abs(x) ** 2) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact))

    return number


def thin(a: Any) -> Any:
    return jml.svd(a, full_matrices=False)


def operator(a: Any) -> jml.LinearOperator:
    return jml.LinearOperator(lambda x: a @ x, lambda y: a.T @ y, a.shape, a.dtype)


def epilogue(a: Any, x: Any, y: Any, name: Any = "gelu", alpha: float = 0.5) -> Any:
    return jml.gemv(a, x, y, alpha=alpha, beta=2, bias=y, activation=name, residual=y)


FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "svd": (lambda a: jml.svd(a, return_info=True), (A,)),
    "svd wide": (thin, (WIDE,)),
    "svd complex": (thin, (COMPLEX,)),
    "svd strict": (lambda a: jml.svd(a, full_matrices=False, gradient="strict"), (A,)),
    "svd block_jacobi": (lambda a: jml.svd(a, method="block_jacobi"), (A,)),
    "svdvals": (jml.svdvals, (A,)),
    "svdvals float16": (jml.svdvals, (jax.ShapeDtypeStruct((3, 3), jnp.float16),)),
    "qr": (jml.qr, (A,)),
    "qr complete": (lambda a: jml.qr(a, "complete"), (A,)),
    "qr r": (lambda a: jml.qr(a, "r"), (WIDE,)),
    "qr complex": (jml.qr, (COMPLEX,)),
    "complete_basis": (lambda a: jml.complete_basis(a[..., :2]), (A,)),
    "orthonormal_rows": (jml.orthonormal_rows, (WIDE,)),
    "gemv": (jml.gemv, (A, VECTOR)),
    "gemv T": (lambda a, x: jml.gemv(a, x, trans="T"), (A, TALL_VECTOR)),
    **{
        f"gemv {name}": (lambda a, x, y, n=name: epilogue(a, x, y, n), (A, VECTOR, TALL_VECTOR))
        for name in ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
    },
    "rsvd": (lambda a: jml.rsvd(a, 2, n_oversamples=1, return_error=True), (A,)),
    "rsvd QR": (
        lambda a: jml.rsvd(a, 2, n_oversamples=1, power_iteration_normalizer="QR", center=True),
        (WIDE,),
    ),
    "rsvd none": (
        lambda a: jml.rsvd(a, 2, n_oversamples=1, power_iteration_normalizer="none"),
        (COMPLEX,),
    ),
    "rsvd tol": (lambda a: jml.rsvd(a, tol=0.1, max_rank=3, sketch="sparse_sign"), (A,)),
    "lanczos_svd": (lambda a: jml.lanczos_svd(a, 2, return_info=True), (A,)),
    "lanczos_svd n_iter": (lambda a: jml.lanczos_svd(a, 2, n_iter=3), (COMPLEX,)),
    "lanczos_svd operator": (lambda a: jml.lanczos_svd(operator(a), 2), (WIDE,)),
}
SECOND = ("svd wide", "svdvals", "qr", "gemv gelu")


def operations(f: Callable[..., Any], args: Any, platform: str = "mps") -> set[str]:
    """Names of all operations, custom calls as ``@target``, of ``f`` lowered for a platform.

    jaxlib writes a program for a plugin without the dialect chlo, by the pass that is run here.
    """
    lowered = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,))
    module: Any = lowered.compiler_ir("stablehlo")
    found: set[str] = set()

    def note(op: Any) -> Any:
        name = op.name
        if name == "stablehlo.custom_call":
            name = "@" + ir.StringAttr(op.attributes["call_target_name"]).value
        found.add(name)
        return ir.WalkResult.ADVANCE

    with module.context:
        stablehlo.register_stablehlo_passes()
        passes = "builtin.module(func.func(chlo-legalize-to-stablehlo))"
        passmanager.PassManager.parse(passes).run(module.operation)
        module.operation.walk(note)
    return found - {"builtin.module"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jax_mps_handles_every_operation(name: str) -> None:
    f, args = FUNCTIONS[name]
    found = operations(f, args)
    if name not in ("lanczos_svd operator",):
        whole = range(len(args))
        found |= operations(jax.grad(total(f), argnums=tuple(whole)), args)
    if name in SECOND:
        gradient = jax.grad(total(f))
        found |= operations(
            lambda a, *rest: jax.jvp(lambda b: gradient(b, *rest), (a,), (a,)), args
        )
        found |= operations(
            jax.vmap(f), [jax.ShapeDtypeStruct((3, *a.shape), a.dtype) for a in args]
        )
    assert "stablehlo.multiply" in found
    assert found <= JAX_MPS_OPS


def test_an_operation_that_is_not_handled_is_seen() -> None:
    found = operations(lambda a: jax.lax.linalg.svd(jnp.fft.fft(jax.lax.erfc(a))), (WIDE,), "cpu")
    assert found - JAX_MPS_OPS == {"@lapack_cgesdd_ffi"}
    assert "stablehlo.fft" in found
    assert not [name for name in found if name.startswith("chlo")]


def run_on_cpu(f: Callable[..., Any], *args: Any) -> Any:
    """What ``f`` gives as lowered for a plugin's platform, run by the cpu's XLA."""
    checks = [export.DisabledSafetyCheck.platform()]
    there = export.export(jax.jit(f), platforms=["mps"], disabled_checks=checks)(*args)
    return jax.jit(there.call)(*args)


def test_the_program_for_a_plugin_is_right() -> None:
    a = np.random.default_rng(3).standard_normal((12, 9)).astype(np.float32)
    for f in (thin, lambda x: jml.rsvd(x, 9, power_iteration_normalizer="QR")):
        assert max(_measure.svd_ratios(a, *run_on_cpu(f, a))) < ACC_RATIO


# --- FFI ---------------------------------------------------------------------------------------


class Plugin:
    """Stands in for a plugin that takes FFI handlers: notes what it is given."""

    def __init__(self) -> None:
        self.types: list[str] = []
        self.targets: dict[str, list[str]] = {}
        self.refuses = ""

    def custom_call(self, name: str, handlers: Any, platform: str, *_: Any) -> None:
        assert platform in PLATFORMS
        if name == self.refuses:
            raise RuntimeError("refused on purpose")
        # The state type must be known by now, or the handler is no good.
        assert not handlers.get("instantiate") or self.types
        self.targets[name] = sorted(handlers)

    def custom_type(self, name: str, value: Any) -> None:
        assert set(value) == {"type_id", "type_info"}
        self.types.append(name)


@pytest.fixture(params=PLATFORMS)
def plugin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    fake = Plugin()
    client = _compat._xla_client
    monkeypatch.setitem(client._custom_callback_handler, request.param, fake.custom_call)
    monkeypatch.setitem(client._custom_type_id_handler, request.param, fake.custom_type)
    _native._plugin_registration.cache_clear()
    jax.clear_caches()  # of programs lowered before
    yield request.param, fake
    _native._plugin_registration.cache_clear()
    jax.clear_caches()


@pytest.mark.skipif(bool(_native.missing()), reason="no native library")
def test_a_plugin_with_ffi_gets_the_custom_calls(plugin: tuple[str, Plugin]) -> None:
    platform, fake = plugin
    targets = {t["name"] for t in _native.describe()["targets"] if t["platform"] == "cpu"}
    assert {"@jml_svd_v1"} == {x for x in operations(thin, (A,), platform) if x.startswith("@")}
    assert set(fake.targets) == targets
    assert fake.targets["jml_svd_v1"] == ["execute", "instantiate"]
    assert "@jml_gemv_v1" in operations(jml.gemv, (A, VECTOR), platform)
    (call,) = explain_on(platform, thin, A).calls
    assert (call.device, call.route) == ("host", "host")
    # LAPACK is the cpu platform's own: where it would be taken there, plain operations are here.
    large = jax.ShapeDtypeStruct((300, 300), jnp.float32)
    assert explain_on("cpu", thin, large).calls[0].route == "lapack"
    assert explain_on(platform, thin, large).calls[0].route == "portable"
    assert not [x for x in operations(thin, (large,), platform) if x.startswith("@")]
    with jml.use_device("xla"):
        assert "@jml_svd_v1" not in operations(thin, (A,), platform)


@pytest.mark.skipif(bool(_native.missing()), reason="no native library")
def test_a_plugin_that_refuses_is_left_alone(plugin: tuple[str, Plugin]) -> None:
    platform, fake = plugin
    fake.refuses = "jml_svd_v1"
    assert not _native.serves_plugin(platform)
    assert "refused on purpose" in _native._plugin_registration(platform)
    assert "@jml_svd_v1" not in operations(thin, (A,), platform)
    assert explain_on(platform, thin, A).calls[0].route == "portable"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_plugin_without_ffi_gets_plain_operations(platform: str) -> None:
    assert not _compat.plugin_takes_ffi(platform)
    assert not [x for x in operations(thin, (A,), platform) if x.startswith("@")]
    assert explain_on(platform, thin, A).calls[0].route == "portable"


def test_other_platforms_are_not_offered_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "plugin_takes_ffi", lambda platform: True)
    assert not _native.serves_plugin("tpu")
