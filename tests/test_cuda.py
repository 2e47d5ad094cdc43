"""The cuda device: what is lowered for it anywhere, and what runs where there is a GPU."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import (
    check_svd,
    hard_matrices,
    launching,
    python,
    random_matrix,
    reference_sigma,
    sigma_bound,
    spectrum,
)
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxmetal_linalg as jml
from jaxmetal_linalg import _cuda, _native
from jaxmetal_linalg._device import arrays_for
from jaxmetal_linalg._explain import explain_on
from jaxmetal_linalg._measure import sigma_error_ulp
from jaxmetal_linalg.primitives.svd import TARGET

ROOT = Path(__file__).parent.parent
A = random_matrix((5, 12, 12), "float32")


def thin(a: Any) -> Any:
    return jml.svd(a, full_matrices=False)


# --- without a GPU ---------------------------------------------------------------------------


def test_tuning_of_64_bit_types(monkeypatch: pytest.MonkeyPatch) -> None:
    with jax.enable_x64(True):
        a, one = (jax.ShapeDtypeStruct(s, np.float64) for s in ((10, 8, 8), (8, 8)))
        for key, value, reason in (
            ("wide_max_n", 7, "above wide_max_n = 7, for float64"),
            ("wide_min_batch", 11, "fewer matrices than wide_min_batch = 11, for float64"),
        ):
            monkeypatch.setenv("JAXMETAL_TUNING", f"cuda.svd.{key}={value}")
            (call,) = explain_on("cuda", jml.svd, a).calls
            assert (call.route, call.launches) == ("portable", 1)
            assert reason in call.reason
            assert explain_on("cuda", jml.svd, one).calls[0].route == "cusolver"
            # Asked for, it is ours whatever was measured; and float32 is not concerned.
            by_name = explain_on("cuda", lambda x: jml.svd(x, method="jacobi"), a)
            assert by_name.calls[0].route == "kernel"
            assert explain_on("cuda", jml.svd, A).calls[0].route == "kernel"


def test_lowering_for_cuda_needs_no_gpu() -> None:
    exported = export.export(jax.jit(jml.svd), platforms=["cuda"])(A)
    text = str(exported.mlir_module())
    assert TARGET in text
    assert "\\22device\\22: \\22cuda\\22" in text or '\\"device\\": \\"cuda\\"' in text


def test_explain_for_cuda_names_the_route() -> None:
    def call(shape: tuple[int, ...], dtype: Any = np.float32, f: Any = jml.svd) -> Any:
        (found,) = explain_on("cuda", f, jax.ShapeDtypeStruct(shape, dtype)).calls
        return found

    small = call((1000, 8, 8))
    assert (small.device, small.route) == ("cuda", "kernel")
    assert small.grid
    assert small.group
    with jax.enable_x64(True):
        for dtype, tag in ((np.float64, "f64"), (np.complex128, "c128")):
            wide = call((10, 8, 8), dtype)
            assert (wide.device, wide.route) == ("cuda", "kernel")
            assert f"svd_xor_vectors_{tag}_n8" in wide.reason
            assert call((32, 20), dtype, jml.svdvals).route == "kernel"
            above = call((10, 33, 8), dtype)
            assert above.route == "portable"
            assert f"up to 32 for {np.dtype(dtype)}" in above.reason
            assert call((300, 20), dtype, thin).variant == "gesvd"  # no QR of ours in front
    assert call((300, 300)).route == "kernel"
    assert call((4096, 5000)).route == "kernel"
    large = call((4097, 5000), f=lambda a: jml.svd(a, full_matrices=False))
    assert large.variant == "polar"
    assert "kernel_max_n" in large.reason
    assert call((4097, 5000)).variant == "gesvd"
    assert call((4097, 5000), f=jml.svdvals).variant == "gesvd"
    # One multiprocessor works on a matrix of "pairs": pairs_square, pairs_max_n.
    for shape in ((90, 90), (2, 128, 128), (8, 256, 300), (32, 512, 512)):
        assert call(shape, np.complex64).variant == "pairs", shape
    for shape, instead in (
        ((91, 91), "gesvd"),
        ((7, 256, 256), "polar"),
        ((31, 512, 512), "polar"),
    ):
        fewer = call(shape, np.complex64, thin)
        assert fewer.variant == instead, shape
        assert "above pairs_square = 8192" in fewer.reason
    assert "pairs_max_n = 512" in call((1000, 513, 513), np.complex64).reason
    forced = call((4, 4000, 4000), f=lambda a: jml.svd(a, method="xla"))
    assert forced.route == "portable"


def test_tall_matrices_go_by_their_triangle() -> None:
    def route(shape: tuple[int, ...], f: Any = thin, dtype: Any = np.float32) -> str:
        (found,) = explain_on("cuda", f, jax.ShapeDtypeStruct(shape, dtype)).calls
        return str(found.route)

    # Around tall_aspect, tall_min_m, tall_batched_from, tall_aspect_grid, tall_grid_n.
    for shape in ((65, 26), (200, 33, 13), (26, 65), (323, 129), (776, 194), (2500, 1000)):
        assert route(shape) == route(shape, jml.svdvals) == "qr", shape
    for shape in (
        (64, 25),
        (65, 27),
        (199, 33, 13),
        (200, 32, 8),
        (322, 129),
        (775, 194),
        (2497, 999),
    ):
        assert route(shape) == route(shape, jml.svdvals) == "kernel", shape
    (found,) = explain_on("cuda", thin, jax.ShapeDtypeStruct((100_000, 20), jnp.float32)).calls
    assert (found.device, found.variant) == ("cuda", "ring")
    assert "qr first" in found.reason
    assert route((100, 20), jml.svd) == "kernel"  # the complement of U is the kernels'
    assert route((100, 20), lambda a: jml.svd(a, full_matrices=False, method="jacobi")) == "kernel"
    # Those of "pairs" begin with a QR as those of "grid" do.
    assert route((131, 33), dtype=np.complex64) == "kernel"
    assert route((132, 33), dtype=np.complex64) == "qr"
    assert route((1000, 300), dtype=np.complex64) == "cusolver"


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 50, 9), "float32"), ((2, 9, 30), "complex64"), ((40, 6), "bfloat16")],
)
@pytest.mark.parametrize("device", ["host", "sim", "cuda"], indirect=True)
@pytest.mark.once
def test_factors_of_the_triangle(device: str, shape: tuple[int, ...], dtype: str) -> None:
    """What is lowered for tall and wide matrices on CUDA is plain JAX code over two primitives."""
    module = importlib.import_module("jaxmetal_linalg.primitives.svd")
    a = random_matrix(shape, "complex64" if dtype == "complex64" else "float32").astype(dtype)
    a[..., -1] = a[..., 0]  # one singular value is zero, wherever the matrix is tall

    def by_qr(compute_uv: bool) -> Any:
        spec = module._spec("svd", False, compute_uv, "auto", "safe")
        return jax.jit(functools.partial(module._by_qr, spec))

    with_vectors = by_qr(True)
    for compute_uv in (True, False):
        *values, status, _, _ = (with_vectors if compute_uv else by_qr(False))(jnp.asarray(a))
        assert np.all(np.asarray(status) == 0)
        if compute_uv:
            if dtype != "bfloat16":
                check_svd(a, values)
            assert [v.dtype for v in values] == [v.dtype for v in thin(a)]
        kept = values[1 if compute_uv else 0]
        eps = float(jnp.finfo(dtype).eps)
        exact = np.linalg.svd(a.astype("complex128"), compute_uv=False)
        np.testing.assert_allclose(np.asarray(kept, np.float32), exact, atol=8 * eps * exact.max())
    if a.ndim == 3:
        a[1, 0, 0] = np.nan
        u, s, vh, status, _, _ = with_vectors(jnp.asarray(a))
        assert np.asarray(status).tolist() == [0, 3, 0][: a.shape[0]]
        assert all(np.isnan(np.asarray(x[1])).all() for x in (u, s, vh))
        check_svd(a[0], (u[0], s[0], vh[0]))


@pytest.mark.skipif("cuda" in jml.devices(), reason="there is a GPU")
def test_absent_gpu_is_an_error_that_says_what_is_missing() -> None:
    with (
        pytest.raises(jml.DeviceUnavailableError, match=r"driver|NVRTC|GPU|cuda backend"),
        jml.use_device("cuda"),
    ):
        pass
    assert "cuda" not in jml.devices()
    assert _cuda.missing()


def test_missing_nvrtc_is_named() -> None:
    """Either the driver or NVRTC is what is missing then; both come with the way out."""
    code = "from jaxmetal_linalg import _cuda; print(_cuda.missing())"
    done = python(code, JAXMETAL_CUDA_PATH="/nowhere")
    done.check_returncode()
    out = done.stdout
    assert "pip install nvidia-cuda-nvrtc" in out or "Install it" in out or "nvidia-smi" in out


# --- with a GPU ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 31, 32, 33, 64, 65, 127, 128, 192, 193, 256])
def test_kernels_run_and_are_accurate(cuda: None, n: int) -> None:
    cases = {k: v.astype(np.float32) for k, v in hard_matrices(n).items() if n > 2}
    names = list(cases)
    batch = np.stack([*cases.values(), *random_matrix((4, n, n), "float32")])
    assert len(jax.devices("cuda")) >= 1
    (u, s, vh), kernels = launching(jax.jit(jml.svd), batch)
    assert kernels, "no kernel of ours ran"
    for i, a in enumerate(batch):
        name = names[i] if i < len(names) else ""
        check_svd(a, (u[i], s[i], vh[i]), label=name)
        if n <= 33:
            error = sigma_error_ulp(s[i], reference_sigma(a))
            assert error < sigma_bound(name), name


@pytest.mark.parametrize("shape", [(300, 300), (9, 260, 150), (3, 200, 150), (40, 400, 12)])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
def test_what_no_kernel_serves_keeps_the_promise(
    cuda: None, shape: tuple[int, ...], dtype: str
) -> None:
    a = random_matrix(shape, dtype)
    check_svd(a, jax.jit(jml.svd, static_argnums=1)(a, False))


@pytest.mark.parametrize("shape", [(5000, 20), (30, 4000), (300, 70, 20), (3, 2000, 130)])
def test_tall_and_wide(cuda: None, shape: tuple[int, ...]) -> None:
    *batch, m, n = shape
    k = min(m, n)
    (found,) = jml.explain(thin, jax.ShapeDtypeStruct(shape, jnp.float32)).calls
    assert found.route == "qr"
    square = {name: x for name, x in hard_matrices(k).items() if np.isfinite(x).all()}
    q = np.linalg.qr(random_matrix((max(m, n), k), "float64"))[0]
    ran: set[str] = set()
    for name, x in {"gauss": random_matrix((k, k), "float64"), **square}.items():
        a = (q @ x.astype(np.float64)).astype(np.float32)
        a = np.broadcast_to(a.T if m < n else a, shape)
        (u, s, vh), kernels = launching(jax.jit(thin), a)
        ran |= set(kernels)  # not each time: XLA replays what it has recorded
        check_svd(a, (u, s, vh), label=name)
        one = (0,) * len(batch)
        # The product above rounds: singular values move by as much as that did.
        exact = np.linalg.svd(a[one].astype(np.float64), compute_uv=False)
        assert np.max(np.abs(np.asarray(s[one], np.float64) - exact)) <= 8 * 2.0**-23 * exact[0], (
            name
        )
    assert any(kernel.startswith("svd_") for kernel in ran)


def test_same_as_the_simulator(cuda: None) -> None:
    """One kernel source, two devices. Where sums are in the same order, so are the bits."""
    a = random_matrix((3, 20, 13), "float32")
    on_gpu = jax.jit(jml.svd, static_argnums=1)(a, False)
    if "sim" not in jml.devices():
        pytest.skip("no simulator")
    with jax.default_device(jax.devices("cpu")[0]), jml.use_device("sim"):
        on_sim = jml.svd(a, full_matrices=False)
    np.testing.assert_allclose(on_gpu.S, on_sim.S, rtol=4e-6)


def test_nan_stays_in_its_matrix(cuda: None) -> None:
    a = A.copy()
    a[2, 3, 4] = np.nan
    (u, s, vh), info = jax.jit(lambda x: jml.svd(x, return_info=True))(a)
    assert list(np.asarray(info.status)) == [0, 0, 3, 0, 0]
    bad = ~np.isfinite(np.asarray(s)).all(-1)
    assert list(bad) == [False, False, True, False, False]
    assert np.isfinite(np.asarray(u)[~bad]).all()
    assert np.isfinite(np.asarray(vh)[~bad]).all()


def test_transformations(cuda: None) -> None:
    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jml.svdvals(x) ** 3)

    a = jnp.asarray(A)
    g = jax.jit(jax.grad(loss))(a)
    u, s, vh = np.linalg.svd(np.float64(A))
    np.testing.assert_allclose(g, 3 * (u * (s**2)[..., None, :]) @ vh, rtol=1e-4, atol=1e-3)
    nested = jax.jit(jax.vmap(jax.vmap(jml.svdvals)))(a.reshape(5, 1, 12, 12))
    np.testing.assert_allclose(nested[:, 0], s, rtol=1e-5, atol=1e-5)
    hessian = jax.jit(jax.jvp, static_argnums=0)(jax.grad(loss), (a,), (jnp.ones_like(a),))[1]
    assert np.isfinite(hessian).all()


@pytest.mark.parametrize(("op", "n"), [("svd", 12), ("rsvd", 1024)])
def test_captured_into_a_command_buffer(cuda: None, op: str, n: int) -> None:
    """The same results where XLA records its launches, ours among them, and replays them."""
    start = jnp.asarray(random_matrix((5, 12, 12) if op == "svd" else (n, n), "float32"))
    decompose = thin if op == "svd" else functools.partial(jml.rsvd, k=9, n_iter=2)

    @jax.jit
    def many(a: jax.Array) -> jax.Array:
        for _ in range(6):
            u, s, vh = decompose(a)
            a = (u * s[..., None, :]) @ vh + 0.1 * jnp.sin(a)
        return a

    lowered = many.lower(start)
    plain = lowered.compile({"xla_gpu_enable_command_buffer": ""})
    captured = lowered.compile(
        {
            "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL",
            "xla_gpu_graph_min_graph_size": 1,
        }
    )
    want, kernels = launching(plain, start)
    assert (kernels.get("gemm_f16", 0) > 0) == (op == "rsvd")
    seen = []
    for _ in range(8):
        before = sum(_native.launches().values())
        got = captured(start)
        np.testing.assert_array_equal(got, want)
        del got
        seen.append(sum(_native.launches().values()) - before)
    # A replay goes past the handler; XLA records again what moved in memory.
    assert min(seen) < sum(kernels.values()), seen


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1100, 1300), "float32"),
        ((2, 1501, 700), "float32"),
        ((1300, 1001), "float16"),
        ((900, 1400), "bfloat16"),
    ],
)
@pytest.mark.parametrize("center", [False, True])
def test_rsvd_with_the_products_of_cublas(
    cuda: None, shape: tuple[int, ...], dtype: str, center: bool
) -> None:
    m, n = shape[-2:]
    a = spectrum((m, n), 1 / np.arange(1.0, min(m, n) + 1)) + 1e-3
    a = jnp.asarray(np.broadcast_to(a, shape)).astype(dtype)
    f = jax.jit(functools.partial(jml.rsvd, k=20, center=center, return_error=True))
    (result, error), kernels = launching(f, a)
    assert kernels.get("gemm_bf16" if dtype == "bfloat16" else "gemm_f16", 0) > 0
    assert kernels.get("rsvd_split", 0) == (dtype == "float32")
    wide = np.float64(a.astype(jnp.float32))
    wide = wide - wide.mean(-2, keepdims=True) if center else wide
    eps = float(jnp.finfo(dtype).eps)
    best = np.linalg.svd(wide, compute_uv=False)[..., :21]
    values = np.float64(result.S)
    assert np.max(np.abs(values - best[..., :20])[..., :10]) < (1e-4 + eps) * best.max()
    u, s, vh = (np.float64(x) for x in result)
    found = np.linalg.norm(wide - (u * s[..., None, :]) @ vh, 2, axis=(-2, -1))
    assert np.all(found <= jml.ACC_RSVD_OPTIMAL * best[..., 20] + 4 * eps * best.max())
    assert np.all(found <= np.float64(error) + 4 * eps * best.max())


def test_threads(cuda: None) -> None:
    f = jax.jit(lambda a: jml.svd(a).S)
    inputs = [random_matrix((20, 16, 16), "float32", i) for i in range(4)]
    want = [np.asarray(f(a)) for a in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with arrays_for("cuda"):
            for _ in range(20):
                if not np.array_equal(f(inputs[i]), want[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_several_gpus_give_what_one_gives(cuda: None) -> None:
    gpus = jax.devices("cuda")
    if len(gpus) < 2:
        pytest.skip("one GPU")
    a = random_matrix((8 * len(gpus), 12, 12), "float32")
    one = jax.jit(jml.svd)(a)
    mesh = Mesh(np.array(gpus), ("b",))
    shards = jax.device_put(a, NamedSharding(mesh, PartitionSpec("b")))
    many = jax.jit(jml.svd)(shards)
    for x, y in zip(one, many, strict=True):
        np.testing.assert_array_equal(x, y)
    assert "all-gather" not in (jax.jit(jml.svd).lower(shards).compile().as_text() or "")

    def loss(x: jax.Array) -> jax.Array:
        return jml.svdvals(x).sum(-1)

    mapped = jax.jit(
        jax.shard_map(
            lambda x: jax.grad(lambda y: loss(y).sum())(x),
            mesh=mesh,
            in_specs=PartitionSpec("b"),
            out_specs=PartitionSpec("b"),
        )
    )
    np.testing.assert_allclose(
        mapped(shards), jax.grad(lambda y: loss(y).sum())(jnp.asarray(a)), rtol=1e-5, atol=1e-5
    )


def test_exported_program_runs_in_a_process_that_lowered_nothing(
    cuda: None, tmp_path: Path
) -> None:
    path = tmp_path / "svd.bin"
    path.write_bytes(export.export(jax.jit(jml.svdvals), platforms=["cuda"])(A).serialize())
    np.save(tmp_path / "a.npy", A)
    code = (
        "import sys, numpy as np, jax; from jax import export; import jaxmetal_linalg\n"
        "f = export.deserialize(open(sys.argv[1], 'rb').read())\n"
        "print(np.asarray(f.call(np.load(sys.argv[2]))).sum())"
    )
    arguments = (str(path), str(tmp_path / "a.npy"))
    done = python(code, *arguments, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    done.check_returncode()
    assert float(done.stdout) == pytest.approx(float(np.asarray(jml.svdvals(A)).sum()), rel=1e-6)


# One launch of a kernel whose text was changed: names of kernel and shape, then old and new text.
PLANTED = """
import sys
from pathlib import Path
import torch
from bench import gpu_kernels as g
kernel, m, n, old, new = sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:6]
text = Path("kernels/svd.metal").read_text()
assert old in text
g.UNIT = g.parse_file(Path("kernels/svd.metal"), "kernels/svd.metal", text.replace(old, new))
(variant,) = (v for v in g.svd_variants(g.UNIT) if v.name == kernel)
launch, out = g.Gpu().launcher(variant, 4, m, n, n)
launch(torch.randn(4, m, n, device="cuda"))
torch.cuda.synchronize()
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.mark.parametrize(
    ("tool", "kernel", "shape", "old", "new"),
    [
        ("memcheck", "svd_xor_vectors_f32_n8", (7, 7), "if (i < p.m) to[", "if (i <= p.m) to["),
        ("racecheck", "svd_block8_vectors_f32_n64", (40, 34), BARRIER, ""),
    ],
    ids=["overflow", "race"],
)
def test_sanitizer_sees_what_is_planted(
    cuda: None, tool: str, kernel: str, shape: tuple[int, int], old: str, new: str
) -> None:
    """And nothing in the kernel as it is."""
    pytest.importorskip("torch")
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        pytest.skip("needs compute-sanitizer, of the CUDA toolkit")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # each tensor an allocation of its own
    }

    def errors(changed: str) -> int:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", PLANTED]
        arguments = [kernel, *map(str, shape), old, changed]
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode in (0, 9), done.stdout[-2000:] + done.stderr[-2000:]
        assert "SUMMARY" in done.stdout, done.stdout[-2000:]
        return done.returncode

    assert errors(old) == 0
    assert errors(new) == 9
