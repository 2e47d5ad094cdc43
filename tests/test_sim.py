"""The sim device: its options, its findings as errors, threads, and what it refuses."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import check_svd, launched, launching, lowered_text, random_matrix
from test_ffi import results, sim_problem

import jaxmetal_linalg as jml
from jaxmetal_linalg.primitives.svd import TARGET

pytestmark = pytest.mark.usefixtures("sim")
A = random_matrix((5, 13, 6), "float32")


def test_the_kernel_that_explain_names_runs() -> None:
    for f, kernel in (
        (jml.svd, "svd_xor_vectors_f32_n16"),
        (jml.svdvals, "svd_xor_values_f32_n16"),
        (jax.jit(jax.vmap(jml.svd)), "svd_xor_vectors_f32_n16"),
        (jax.vmap(jax.vmap(jml.svd)), "svd_xor_vectors_f32_n16"),
        (jax.grad(lambda a: jml.svdvals(a).sum()), "svd_xor_vectors_f32_n16"),
    ):
        a = A[None] if f is not jml.svd else A
        assert kernel in jml.explain(f, a).calls[0].reason
        assert launched(lambda f=f, a=a: f(a)) == {kernel: 1}


def test_auto_never_chooses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with jml.use_device("auto"):
        assert launched(lambda: jml.svd(A)) == {}
    monkeypatch.setenv("JAXMETAL_DEVICE", "sim")
    with jml.use_device("host"):
        assert launched(lambda: jml.svd(A)) == {}


def test_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMETAL_DEVICE", "sim")
    thread_launches: list[dict[str, int]] = []
    # use_device holds in the main thread only.
    thread = threading.Thread(target=lambda: thread_launches.append(launched(lambda: jml.svd(A))))
    thread.start()
    thread.join()
    assert thread_launches == [{"svd_xor_vectors_f32_n16": 1}]


def test_options_travel_with_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def config() -> str:
        return lowered_text(jml.svd, A).replace("\\22", '"')

    assert '"caps": "apple-m1"' in config()
    assert '"sim_checked": true' in config()
    assert '"sim_shuffle": false' in config()
    monkeypatch.setenv("JAXMETAL_SIM", "fast")
    monkeypatch.setenv("JAXMETAL_SIM_SEED", "17")
    monkeypatch.setenv("JAXMETAL_SIM_CAPS", "nvidia-h200")
    assert '"caps": "nvidia-h200"' in config()
    assert '"sim_checked": false' in config()
    assert '"sim_seed": 17' in config()
    assert '"sim_shuffle": true' in config()


def test_bits_depend_on_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = jml.svd(A)
    monkeypatch.setenv("JAXMETAL_SIM_SEED", "3")
    shuffled = jml.svd(A)
    monkeypatch.setenv("JAXMETAL_SIM", "fast")
    fast = jml.svd(A)
    for x, y, z in zip(plain, shuffled, fast, strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)


def test_caps_choose_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMETAL_SIM_CAPS", "nvidia-h200")
    result: list[Any] = []
    assert launched(lambda: result.append(jml.svd(A))) == {"svd_ring_vectors_f32_n16": 1}
    check_svd(A, result[0], full_matrices=True)
    assert jml.explain(jml.svd, A).calls[0].device == "sim"


@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        ("JAXMETAL_SIM", "quick", "expected checked or fast, got 'quick'"),
        ("JAXMETAL_SIM_SEED", "-1", "expected an integer from 0 to .*'-1'"),
        ("JAXMETAL_SIM_SEED", "x", "expected an integer from 0 to .*'x'"),
        ("JAXMETAL_SIM_CAPS", "m1", "expected one of apple-m1, .*nvidia-h200, got 'm1'"),
    ],
)
def test_wrong_options(
    name: str, value: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"environment {name}: {pattern}"):
        jml.svd(A)


def test_double_is_refused(x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs that have no such type, and by what has no such kernel."""
    for dtype in (np.float64, np.complex128):
        with pytest.raises(jml.DeviceUnavailableError, match=f"got {np.dtype(dtype)}"):
            jml.svd(A.astype(dtype))
    monkeypatch.setenv("JAXMETAL_SIM_CAPS", "nvidia-h200")
    for f in (jml.qr, lambda a: jml.gemv(a, a[..., 0, :])):
        with pytest.raises(jml.DeviceUnavailableError, match="got float64"):
            f(A.astype(np.float64))
    with pytest.raises(jml.DeviceUnavailableError, match=r"up to 32 for float64.*got 33x2"):
        jml.svd(np.ones((33, 2)))


@pytest.mark.parametrize(("dtype", "tag"), [("float64", "f64"), ("complex128", "c128")])
def test_double(dtype: str, tag: str, x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs that have it: factors, values alone, a batch by vmap, the derivative."""
    monkeypatch.setenv("JAXMETAL_SIM_CAPS", "nvidia-h200")
    a = random_matrix((2, 9, 6), dtype)
    result, ran = launching(jax.jit(jax.vmap(jml.svd)), a)
    assert ran == {f"svd_xor_vectors_{tag}_n16": 1}
    check_svd(a, result, full_matrices=True)
    s, ran = launching(jml.svdvals, a)
    assert ran == {f"svd_xor_values_{tag}_n16": 1}
    np.testing.assert_array_equal(s, result[1])
    wide = np.swapaxes(a, 1, 2)
    check_svd(wide, jml.svd(wide), full_matrices=True)
    step = 1e-6 * random_matrix((2, 9, 6), dtype, 1)
    moved = jax.jvp(lambda x: jml.svdvals(x), (a,), (step,))[1]
    apart = np.linalg.svd(a + step, compute_uv=False) - np.linalg.svd(a - step, compute_uv=False)
    np.testing.assert_allclose(moved, apart / 2, rtol=1e-6, atol=1e-11)


def test_rows_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in ("xor", "ring"):
        monkeypatch.setenv("JAXMETAL_VARIANT", f"svd:{row}")
        with pytest.raises(jml.DeviceUnavailableError, match=f"up to 32 for variant {row}.*40x9"):
            jml.svd(jnp.ones((40, 9)))
    monkeypatch.setenv("JAXMETAL_VARIANT", "svd:column")
    with pytest.raises(
        jml.DeviceUnavailableError,
        match=r"xor, ring, block8, block16, twin, grid, fused, fused16, quarters on .*column",
    ):
        jml.svd(A)


@pytest.mark.parametrize(
    ("shape", "dtype", "full"),
    [
        ((2, 131, 20), "float32", True),
        ((9, 150), "float32", False),
        ((140, 7), "float16", False),
        ((5, 129), "bfloat16", False),
    ],
)
def test_any_size(shape: tuple[int, ...], dtype: str, full: bool) -> None:
    a = random_matrix(shape, "float32").astype(jnp.dtype(dtype))
    f = jax.jit(lambda x: jml.svd(x, full_matrices=full))
    result, ran = launching(f, a)
    call = jml.explain(f, a).calls[0]
    assert call.variant == "grid"
    assert sum(ran.values()) == call.launches
    assert {"svd_grid_panel", "svd_grid_check", "svd_grid_merge"} <= set(ran)
    if dtype == "float32":
        check_svd(np.asarray(a), result, full_matrices=full)
    else:
        u, s, vh = (np.asarray(x, np.float32) for x in result)
        error = np.abs((u * s[..., None, :]) @ vh - np.asarray(a, np.float32)).max()
        assert error < 8 * float(jnp.finfo(dtype).eps) * s.max()
    s = np.asarray(result[1], np.float64)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(jml.svdvals(a), np.float64), s, rtol=0, atol=5 * eps * s.max()
    )


@pytest.mark.parametrize("shape", [(3, 8, 8), (20, 6), (5, 32)])
def test_complex(shape: tuple[int, ...]) -> None:
    a = random_matrix(shape, "complex64")
    result, ran = launching(jml.svd, a)
    assert [k.split("_n")[0] for k in ran] == ["svd_xor_vectors_c64"]
    check_svd(a, result, full_matrices=True)
    np.testing.assert_array_equal(jml.svdvals(a), result[1])


@pytest.mark.parametrize("shape", [(3, 8, 8), (7, 12)])
def test_complex_ring(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMETAL_VARIANT", "svd:ring")
    a = random_matrix(shape, "complex64")
    result, ran = launching(jml.svd, a)
    assert ran == {f"svd_ring_vectors_c64_n{8 if shape[-1] == 8 else 16}": 1}
    check_svd(a, result, full_matrices=True)
    np.testing.assert_array_equal(jml.svdvals(a), result[1])


@pytest.mark.parametrize(
    ("shape", "full"), [((2, 37, 33), True), ((34, 70), True), ((3, 48), False)]
)
def test_complex_of_any_size(shape: tuple[int, ...], full: bool) -> None:
    a = random_matrix(shape, "complex64")
    f = jax.jit(lambda x: jml.svd(x, full_matrices=full, return_info=True))
    (result, info), ran = launching(f, a)
    call = jml.explain(f, a).calls[0]
    assert (call.variant, call.launches) == ("pairs", sum(ran.values()))
    assert set(ran) == {f"svd_pairs_{k}" for k in ("load", "factor", "turn", "finish", "back")}
    check_svd(a, result, full_matrices=full)
    assert np.all(np.asarray(info.status) == 0)
    assert np.all(np.asarray(info.off_norm) < 1e-3)
    s = np.asarray(result[1])
    np.testing.assert_allclose(jml.svdvals(a), s, rtol=0, atol=1e-6 * s.max())


def test_complex_of_any_size_under_transformations() -> None:
    a = random_matrix((2, 34, 33), "complex64")
    mapped = jax.vmap(lambda x: jml.svd(x, full_matrices=False))(a)
    check_svd(a, mapped)
    g = jax.grad(lambda x: jml.svdvals(x).sum())(a)
    np.testing.assert_allclose(np.conj(g), mapped.U @ mapped.Vh, atol=1e-5)


def test_grid_by_name_and_under_transformations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMETAL_VARIANT", "svd:grid")
    result = jax.vmap(jml.svd)(A)
    check_svd(A, result, full_matrices=True)
    g = jax.grad(lambda a: jml.svdvals(a).sum())(A[0])
    u, _, vh = jml.svd(A[0], full_matrices=False)
    np.testing.assert_allclose(g, u @ vh, atol=1e-5)


# --- findings --------------------------------------------------------------------------------


def planted(size: int) -> Any:
    """The custom call with less threadgroup memory than its kernel uses, and a sound one."""
    f = jax.jit(
        lambda a, short: jax.ffi.ffi_call(
            TARGET,
            results(
                u=((5, 13, 6), jnp.float32),
                s=((5, 6), jnp.float32),
                vh=((5, 6, 6), jnp.float32),
                status=((5,), jnp.int32),
                sweeps=((5,), jnp.int32),
                off_norm=((5,), jnp.float32),
            ),
        )(a, config=json.dumps(sim_problem(batch=5, m=13, n=6, planted_bytes=short))),
        static_argnums=1,
    )
    return jax.block_until_ready(f(A, size))


def test_findings_are_errors() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        planted(4352 - 64)
    text = str(caught.value)
    # Kernel file and line, kernel, lane, and what lies where.
    assert "svd: sim: " in text
    assert "kernels/svd.metal:" in text
    assert "svd_xor_vectors_f32_n16, threadgroup 0: lane " in text
    assert re.search(r"threadgroup argument tiles, byte \d+ of 64 \[out_of_bounds\]", text)
    # The next call is not blamed.
    u, s, vh, status, *_ = planted(0)
    np.testing.assert_allclose((u * s[:, None]) @ vh, A, atol=1e-5)
    assert np.all(status == 0)


def test_calls_from_many_threads() -> None:
    """Sound and faulty calls of one executable each, from several threads at once."""
    a = random_matrix((20, 8, 8), "float32")
    want = jml.svd(a)
    f = jax.jit(jml.svd).lower(a).compile()
    outcomes: list[str] = []

    def good() -> None:
        same = [np.array_equal(x, y) for x, y in zip(f(a), want, strict=True)]
        outcomes.append("same" if all(same) else "different")

    def bad() -> None:
        try:
            planted(4352 - 64)
            outcomes.append("unnoticed")
        except jax.errors.JaxRuntimeError as e:
            outcomes.append("found" if "out_of_bounds" in str(e) else str(e))

    threads = [threading.Thread(target=g) for g in (good, bad, good, bad, good, good)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(outcomes) == ["found"] * 2 + ["same"] * 4
