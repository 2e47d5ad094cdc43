"""What fails under device cuda is an error with the reason and the way out, and nothing is lost.

A copy of the library opens ``cuda_fake/driver.c`` in place of the driver, which fails as it is
told; JAX keeps the real one. Without a GPU ``cuda_fake/call.c`` calls the handlers in XLA's place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import absent
from harness import ROOT, python, random_matrix
from jax import export

import jaxmetal_linalg as jml
from jaxmetal_linalg import _native
from tools.msl import nvrtc

FAKE = ROOT / "tests" / "cuda_fake"
NAMES = (b"libcuda.so.1\0", b"libjmlf.so.1\0")  # of the driver and of the one in its place

# Codes of the driver, of FFI and its stages.
INVALID, NO_MEMORY, NO_GPU, NO_BINARY, LAUNCH_FAILED, UNKNOWN = 1, 2, 100, 209, 719, 999
EXHAUSTED, INTERNAL, UNAVAILABLE = 8, 13, 14
INSTANTIATE, EXECUTE = 0, 3

if sys.platform != "linux":
    pytest.skip("device cuda is Linux's", allow_module_level=True)


def compile_c(source: Path | str, out: Path, *options: str) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        absent("cc", "needs a C compiler")
    given = source if isinstance(source, str) else source.read_text()
    command = [compiler, "-xc", "-std=gnu11", "-O1", "-shared", "-fPIC", *options, "-", "-o"]
    subprocess.run([*command, str(out), "-ldl", "-pthread"], input=given, text=True, check=True)


def changed_library(to: Path, *changes: tuple[bytes, bytes]) -> None:
    """The library with texts of it replaced by others of the same length."""
    image = _native.library_path().read_bytes()
    for old, new in (NAMES, *changes):
        assert image.count(old) == 1
        assert len(old) == len(new)
        image = image.replace(old, new)
    to.write_bytes(image)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, the driver that it opens, and what calls it."""
    if not _native.available():
        pytest.skip(_native.missing())
    path = tmp_path_factory.mktemp("cuda")
    changed_library(path / "library.so")
    compile_c(FAKE / "driver.c", path / "libjmlf.so.1")
    compile_c(FAKE / "call.c", path / "call.so", f"-I{jax.ffi.include_dir()}")
    return path


def environment(folder: Path, library: str = "library.so") -> dict[str, str]:
    paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        "JAXMETAL_LIBRARY": str(folder / library),
        "JAXMETAL_CACHE_DIR": str(folder / "cache" / library),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths)),
    }


# --- the driver, NVRTC and GPUs as they are found ----------------------------------------------

PROBE = """
import ctypes, sys
library, nvrtc, code = sys.argv[1:]
driver = ctypes.CDLL("libjmlf.so.1") if code else None
exec(code)
dll = ctypes.CDLL(library)
dll.jml_cuda_library(b'nvrtc', nvrtc.encode())
dll.jml_cuda.restype = ctypes.c_char_p
print(dll.jml_cuda().decode())
"""


def fail(name: str, code: int, skip: int = 0, times: int = 1) -> str:
    return f"driver.fake_fail({name.encode()!r}, {code}, {skip}, {times})\n"


OLD = "driver.fake_version(11080)\n"


def probe(folder: Path, library: str, code: str, **more: str) -> dict[str, Any]:
    given = {**environment(folder), "FAKE_GPU": "1", **more}
    done = python(PROBE, given["JAXMETAL_LIBRARY"], library, code, **given)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_nothing_is_missing(folder: Path, compiler: nvrtc.Nvrtc) -> None:
    found = probe(folder, compiler.lib._name, "driver.fake_version(0)")
    assert found["problem"] == ""
    assert found["driver"] == "13.0"
    assert [(g["name"], g["arch"]) for g in found["gpus"]] == [("Pretended GPU", "sm_90")]


@pytest.mark.parametrize(
    ("code", "reason", "way_out"),
    [
        (OLD, "serves CUDA 11.8, and 12.0 is the oldest", "Update the NVIDIA driver"),
        (fail("cuDriverGetVersion", UNKNOWN), "does not tell its version", "nvidia-smi"),
        (fail("cuInit", NO_GPU), "does not start: CUDA_ERROR_NO_DEVICE", "nvidia-smi"),
        (fail("cuInit", 803), "does not start: CUDA error 803", "nvidia-smi"),
        (fail("cuDeviceGetCount", NO_GPU), "cannot be counted: CUDA_ERROR_NO", "nvidia-smi"),
        ("driver.fake_gpus(0)", "sees no GPU", "CUDA_VISIBLE_DEVICES"),
        (fail("cuDeviceGetAttribute", UNKNOWN, 1), "GPU 0 does not answer", "nvidia-smi"),
    ],
)
def test_driver_that_will_not_do(folder: Path, code: str, reason: str, way_out: str) -> None:
    problem = probe(folder, "", code)["problem"]
    assert reason in problem
    assert way_out in problem[problem.index(reason) :]


def test_absent_driver_and_one_of_another_age(folder: Path, tmp_path: Path) -> None:
    absent = probe(folder, "", "", LD_LIBRARY_PATH="")["problem"]
    assert "cannot be opened (libjmlf.so.1: cannot open shared object file" in absent
    assert "Install it, and check with nvidia-smi" in absent
    compile_c("int cuInit(unsigned flags) { return (int)flags; }", tmp_path / "libjmlf.so.1")
    other = probe(folder, "", "", LD_LIBRARY_PATH=str(tmp_path))["problem"]
    assert "is not a driver of CUDA 12.0 or newer. Update the NVIDIA driver" in other


def test_absent_nvrtc_and_what_is_not_nvrtc(folder: Path, tmp_path: Path) -> None:
    way_out = "pip install nvidia-cuda-nvrtc, or set JAXMETAL_CUDA_PATH"
    absent = probe(folder, "", "driver", JAXMETAL_CUDA_PATH="/nowhere")["problem"]
    assert "NVRTC cannot be opened (/nowhere/libnvrtc.so.13: cannot open" in absent
    assert way_out in absent
    compile_c("int nvrtcVersion(int *a) { return *a; }", tmp_path / "libnvrtc.so.13")
    other = probe(folder, "", "driver", JAXMETAL_CUDA_PATH=str(tmp_path))["problem"]
    assert f"{tmp_path}/libnvrtc.so.13: not NVRTC 11.2 or newer" in other
    assert way_out in other


SEEN = """
import ctypes, json, sys
ctypes.CDLL("libjmlf.so.1").fake_version(int(sys.argv[1]))
import jaxmetal_linalg as jml
from jaxmetal_linalg import _doctor
_doctor._checks = lambda device: iter(())
try:
    with jml.use_device("cuda"):
        error = ""
except jml.DeviceUnavailableError as e:
    error = str(e)
report = jml.doctor()
print(json.dumps([jml.devices(), error, report.devices["cuda"], str(report)]))
"""


@pytest.mark.parametrize(
    ("version", "text"),
    [("11080", "CUDA 11.8, and 12.0 is the oldest that will do. Update"), ("0", "JAX has no cuda")],
)
def test_devices_and_doctor_say_what_is_missing(
    folder: Path, compiler: nvrtc.Nvrtc, version: str, text: str
) -> None:
    """With a GPU that is fine too, where JAX has no backend for it."""
    given = {**environment(folder), "FAKE_GPU": "1", "JAX_PLATFORMS": "cpu"}
    home = Path(compiler.lib._name).parent
    if home.is_absolute():
        given["JAXMETAL_CUDA_PATH"] = str(home)
    done = python(SEEN, version, **given)
    assert done.returncode == 0, done.stderr
    devices, error, why, report = json.loads(done.stdout)
    assert "cuda" not in devices
    assert all(text in said for said in (error, why, report))
    assert re.search(r"Use one of .*xla", error)


# --- the handlers, without JAX and without a GPU -----------------------------------------------

CALL = """
import ctypes, json, sys
library, call, nvrtc, config, code = sys.argv[1:]
driver, dll, call = ctypes.CDLL("libjmlf.so.1"), ctypes.CDLL(library), ctypes.CDLL(call)
dll.jml_cuda_library(b'nvrtc', nvrtc.encode())
dll.jml_handler.restype = dll.jml_launches.restype = ctypes.c_void_p
driver.fake_called.restype = ctypes.c_char_p
found = []
target, operands, shapes = b"jml_gemv_v1", 2, [(1, 9000, 70), (1, 1, 9000), (1, 1, 70)]

def do(stage, memory=1 << 30):
    name = b"instantiate" if stage == 0 else b"execute"
    handler = ctypes.c_void_p(dll.jml_handler(target, b"CUDA", name))
    dims = (ctypes.c_int64 * (3 * len(shapes)))(*sum(shapes, ()))
    results = len(shapes) - operands
    text = ctypes.create_string_buffer(1 << 16)
    memory, size = ctypes.c_int64(memory), ctypes.c_size_t(len(text))
    status = call.fake_call(
        handler, stage, config.encode(), operands, results, dims, memory, text, size
    )
    found.append([status, text.value.decode()])

exec(code)
print(json.dumps([found, driver.fake_called().decode().split()]))
"""

Outcome = tuple[list[tuple[int, str]], list[str]]
Calls = Callable[..., Outcome]
BOTH = f"do({INSTANTIATE}); do({EXECUTE})\n"


@pytest.fixture(scope="module")
def config() -> str:
    """What a call's attribute holds when it is lowered for an H200: two launches and scratch."""
    a = jax.ShapeDtypeStruct((9000, 70), np.float32)
    x = jax.ShapeDtypeStruct((9000,), np.float32)
    transposed = jax.jit(lambda a, x: jml.gemv(a, x, trans="T"))
    text = str(export.export(transposed, platforms=["cuda"])(a, x).mlir_module())
    (found,) = re.findall(r'config = "((?:\\.|[^"\\])*)"', text)
    problem = {**json.loads(re.sub(r'\\22|\\"', '"', found)), "caps": "nvidia-h200"}
    plan = _native.plan("gemv", problem)
    assert (plan["launches"], plan["kernels"]) == (2, ["gemv_column_f32_m1", "gemv_finish_f32"])
    assert plan["scratch_bytes"] > 0
    return json.dumps(problem)


@pytest.fixture
def calls(folder: Path, compiler: nvrtc.Nvrtc, config: str) -> Calls:
    """Runs code in a process of its own: outcomes of its ``do(stage)``, and the driver's calls."""

    def run(code: str, library: str = "library.so", **more: str) -> Outcome:
        given = {**environment(folder, library), "FAKE_GPU": "1", **more}
        paths = (given["JAXMETAL_LIBRARY"], str(folder / "call.so"), compiler.lib._name)
        done = python(CALL, *paths, config, code, **given)
        assert done.returncode == 0, done.stderr
        found, called = json.loads(done.stdout)
        return [(status, text) for status, text in found], called

    return run


def test_a_call_that_works(calls: Calls) -> None:
    found, called = calls(BOTH)
    assert found == [(0, ""), (0, "")]
    assert called.count("cuLaunchKernelEx") == 2
    assert called.count("cuModuleLoadData") == 2


@pytest.mark.parametrize(
    ("before", "overlapping"),
    [("", 2), ("driver.fake_version(12020)\n", 0), ("driver.fake_major(8)\n", 0)],
)
def test_launches_overlap(calls: Calls, before: str, overlapping: int) -> None:
    """Where GPU and driver can; and a kernel that streams is told how much to fetch ahead."""
    told = "found.append([driver.fake_overlapping(), str(driver.fake_value())])"
    found, _ = calls(f"{before}driver.fake_watch(8)\n{BOTH}{told}")
    assert found == [(0, ""), (0, ""), (overlapping, str(9000 * 70 * 4))]


# rsvd of 100 x 80 in place of it, its products with the matrix by the library at `blas`.
LIBRARY = """
dll.jml_cuda_library(b"cublas", blas.encode())
target, operands = b"jml_rsvd_v1", 2
shapes = [(1, 100, 80), (1, 80, 20), (1, 100, 20), (1, 20, 0), (1, 80, 20)]
config = json.dumps(
    {"batch": 1, "m": 100, "n": 80, "q": 20, "n_iter": 1, "normalizer": "auto",
     "center": False, "max_sweeps": 40, "dtype": "float32", "variant": "library",
     "device": "cuda", "caps": "nvidia-h200"}
)
"""
COUNT = """
fake = ctypes.CDLL(blas)
found.append([fake.fake_products(), str(fake.fake_prepared())])
"""


def with_library(blas: Path | str) -> str:
    return f"blas = {str(blas)!r}\n{LIBRARY}{BOTH}"


def test_products_of_a_library(folder: Path, calls: Calls) -> None:
    """Four products with a matrix in two halves: eight of cuBLAS's."""
    blas = folder / "libcublas.so.13"
    compile_c(FAKE / "blas.c", blas)
    found, called = calls(with_library(blas) + COUNT)
    assert found == [(0, ""), (0, ""), (8, "1")]
    assert called.count("cuLaunchKernelEx") > 20
    (_, (status, text)), _ = calls(with_library(blas), FAKE_BLAS="gemm")
    assert status == INTERNAL
    assert "rsvd: gemm_f16: 1 of 100x48x80: cuBLAS: CUBLAS_STATUS_EXECUTION_FAILED" in text
    assert "JAXMETAL_VARIANT=rsvd:cholesky does without it" in text
    ((status, text), _), _ = calls(with_library(blas), FAKE_BLAS="create")
    assert (status, text.split(".")[0]) == (
        INTERNAL,
        "rsvd: gemm_f16: cuBLAS: CUBLAS_STATUS_EXECUTION_FAILED",
    )


def test_absent_cublas(folder: Path, calls: Calls, tmp_path: Path) -> None:
    for status, text in calls(with_library("/nowhere/libcublas.so.13"))[0]:
        assert status == INTERNAL
        assert "cuBLAS cannot be opened (/nowhere/libcublas.so.13: cannot open" in text
        assert "pip install nvidia-cublas, or set JAXMETAL_CUDA_PATH" in text
    other = tmp_path / "libcublas.so.13"
    compile_c("int cublasGetProperty(int a, int *b) { return *b = a; }", other)
    assert f"{other}: not cuBLAS 12 or newer" in calls(with_library(other))[0][0][1]


def test_failed_launch(calls: Calls) -> None:
    """The second of two; the next call runs whole."""
    lost = "start another. compute-sanitizer finds the kernel"
    refused = 'jaxmetal_linalg.use_device("xla") does without'
    for code, text, way_out in (
        (LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", lost),
        (INVALID, "CUDA_ERROR_INVALID_VALUE", refused),
        (NO_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
    ):
        found, called = calls(BOTH + fail("cuLaunchKernelEx", code, 1) + f"do({EXECUTE})\n" * 2)
        assert [status for status, _ in found] == [0, 0, INTERNAL, 0]
        error = found[2][1]
        assert re.match(r"gemv: gemv_finish_f32: grid \d+x1x1, group \d+x1x1, \d+ threadgr", error)
        assert text in error
        assert way_out in error
        assert called.count("cuLaunchKernelEx") == 6


def test_scratch_memory_that_is_not_there(calls: Calls, config: str) -> None:
    found, called = calls(BOTH + f"do({EXECUTE}, 0); do({EXECUTE})")
    wanted = _native.plan("gemv", json.loads(config))["scratch_bytes"]
    assert [status for status, _ in found] == [0, 0, EXHAUSTED, 0]
    assert f"gemv: the GPU has not got {wanted} bytes left" in found[2][1]
    assert "Use smaller batches" in found[2][1]
    assert called.count("cuLaunchKernelEx") == 4


def test_code_that_cannot_be_loaded(calls: Calls) -> None:
    for code, text, way_out in (
        (NO_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "XLA_PYTHON_CLIENT_MEM_FRACTION"),
        (NO_BINARY, "CUDA_ERROR_NO_BINARY_FOR_GPU", "Update the NVIDIA driver"),
    ):
        found, _ = calls(fail("cuModuleLoadData", code, times=2) + BOTH + BOTH)
        assert [status for status, _ in found] == [INTERNAL, INTERNAL, 0, 0]
        for _, error in found[:2]:
            assert re.match(r"gemv: gemv_column_f32_m1: [1-9]\d+ bytes of code cannot be", error)
            assert "on Pretended GPU (sm_90)" in error
            assert text in error
            assert way_out in error


# What a call asks the driver after it was opened. Its answer to these changes nothing.
HARMLESS = {"cuDevicePrimaryCtxGetState", "cuDevicePrimaryCtxRelease_v2", "cuCtxGetCurrent"}
HARMLESS |= {"cuCtxPopCurrent_v2", "cuGetErrorName", "cuGetErrorString"}


def test_every_answer_of_the_driver_is_heeded(calls: Calls) -> None:
    """Each of its functions fails once: an error, or no difference; then all is well."""
    _, called = calls(BOTH)
    for name in sorted(set(called)):
        found, again = calls(fail(name, UNKNOWN) + BOTH + BOTH)
        statuses = [status for status, _ in found]
        if name in HARMLESS:
            assert statuses == [0, 0, 0, 0], name
            assert again.count("cuLaunchKernelEx") == 4, name
        elif name in ("cuInit", "cuDriverGetVersion"):  # asked once
            assert statuses == [UNAVAILABLE] * 4, name
        else:
            assert sorted(statuses)[:3] == [0, 0, 0], name
            assert max(statuses) in (INTERNAL, UNAVAILABLE), name
            assert statuses[2:] == [0, 0], name
        assert all(map(says_unknown, found)), name
    _, before = calls(f"do({INSTANTIATE})")
    executing = Counter(called) - Counter(before)
    assert {"cuStreamGetCtx", "cuCtxPushCurrent_v2", "cuLaunchKernelEx"} <= set(executing)
    for name in set(executing) - HARMLESS:
        code = f"do({INSTANTIATE})\n" + fail(name, UNKNOWN) + f"do({EXECUTE})\n" * 2
        found, _ = calls(code)
        assert [status for status, _ in found] == [0, INTERNAL, 0], name
        assert all(map(says_unknown, found)), name


def says_unknown(outcome: tuple[int, str]) -> bool:
    status, text = outcome
    return status == 0 or bool(re.search(r"CUDA error 999 \(.*\)\. Check with nvidia-smi", text))


def test_compile_error_has_the_line(calls: Calls, folder: Path) -> None:
    """The log names kernels/*.metal, whose text the library holds; the error comes again."""
    changed_library(folder / "broken.so", (b"int rhs_groups ;", b"int rhs_groups !"))
    rows = (ROOT / "kernels" / "gemv.metal").read_text().split("\n")
    (line,) = (i for i, row in enumerate(rows, 1) if "int rhs_groups;" in row)
    found, called = calls(BOTH + BOTH, "broken.so")
    assert "cuLaunchKernelEx" not in called
    for status, error in found:
        assert status == INTERNAL
        assert re.match(r"gemv: gemv_column_f32_m1: NVRTC [\d.]+: NVRTC_ERROR_COMPILATION", error)
        assert 'use_device("xla") does without' in error
        assert re.search(rf"kernels/gemv\.metal\({line}\): error: ", error), error


def test_what_is_missing_is_an_ffi_error(calls: Calls) -> None:
    for code, more, text in (
        (OLD, {}, "12.0 is the oldest that will do. Update the NVIDIA driver"),
        ("", {"JAXMETAL_CUDA_PATH": "/nowhere"}, "pip install nvidia-cuda-nvrtc"),
    ):
        found, _ = calls(code + BOTH, **more)
        assert [status for status, _ in found] == [UNAVAILABLE, UNAVAILABLE]
        assert all(error.startswith("gemv: ") and text in error for _, error in found)


def test_gpu_that_nvrtc_does_not_know(folder: Path, compiler: nvrtc.Nvrtc) -> None:
    code = (
        "import ctypes, sys\n"
        "dll = ctypes.CDLL(sys.argv[1])\n"
        "dll.jml_cuda_library(b'nvrtc', sys.argv[2].encode())\n"
        "dll.jml_cuda_compile.restype = ctypes.c_char_p\n"
        "print(dll.jml_cuda_compile(b'gemv_column_f32_m1', b'sm_12345').decode())"
    )
    given = environment(folder)
    done = python(code, given["JAXMETAL_LIBRARY"], compiler.lib._name, **given)
    error = json.loads(done.stdout)["error"]
    assert "NVRTC_ERROR_INVALID_OPTION with -arch=sm_12345" in error
    assert "pip install -U nvidia-cuda-nvrtc" in error


# --- through JAX, on a GPU ---------------------------------------------------------------------

GPU = """
import ctypes, json, sys
import jax, jax.numpy as jnp, numpy as np
import jaxmetal_linalg as jml
from jaxmetal_linalg import _cuda
from jaxmetal_linalg._device import arrays_for
driver = ctypes.CDLL("libjmlf.so.1")
rng = np.random.default_rng(0)
found = []

values = jax.jit(jml.svdvals)
small = rng.standard_normal((5, 12, 12)).astype(np.float32)
exact = np.linalg.svd(np.float64(small), compute_uv=False)
steps = jax.jit(lambda a: jnp.abs(jml.qr(a, mode="r")))
tall = rng.standard_normal((100, 40, 12)).astype(np.float32)
exact_r = np.abs(np.linalg.qr(np.float64(tall), mode="r"))
product = jax.jit(lambda a, x: jml.gemv(a, x, trans="T"))
matrix, vector = rng.standard_normal((9000, 70)).astype(np.float32), np.ones(9000, np.float32)

def attempt(f, args, want):
    try:
        got = jax.block_until_ready(f(*map(jnp.asarray, args)))
    except Exception as e:
        found.append(["error", str(e)])
        return
    right = want is None or np.allclose(got, want, atol=1e-4 * np.abs(want).max())
    found.append(["right" if right else "wrong", ""])

svd = lambda: attempt(values, (small,), exact)
qr = lambda: attempt(steps, (tall,), exact_r)
gemv = lambda: attempt(product, (matrix, vector), np.float64(matrix).sum(0))
exec(sys.argv[1])
print(json.dumps(found))
"""
ON_CUDA = "with arrays_for('cuda'):\n"


def indented(code: str) -> str:
    return "".join(f"    {row}\n" for row in code.strip().split("\n"))


@pytest.fixture
def jax_calls(cuda: None, folder: Path) -> Callable[..., list[tuple[str, str]]]:
    """Runs code in a process with JAX on the GPU: outcomes of its calls."""

    def run(code: str, library: str = "library.so", **more: str) -> list[tuple[str, str]]:
        given = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **environment(folder, library), **more}
        done = python(GPU, code, **given)
        assert done.returncode == 0, done.stderr[-4000:]
        return [(kind, text) for kind, text in json.loads(done.stdout.splitlines()[-1])]

    return run


JaxCalls = Callable[..., list[tuple[str, str]]]
FLAGS = "--xla_gpu_enable_command_buffer="
CAPTURED = FLAGS + "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"


@pytest.mark.parametrize("flags", [FLAGS, CAPTURED], ids=["plain", "captured"])
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
def test_failed_launch_on_a_gpu(jax_calls: JaxCalls, flags: str, warm: bool) -> None:
    """In the middle of several: an error, and the same process goes on."""
    code = (
        "launches = jml.explain(steps, tall).calls[0].launches\n"
        "assert launches > 2\n"
        + ("qr()\nqr()\n" if warm else "")
        + f"driver.fake_fail(b'cuLaunchKernelEx', {LAUNCH_FAILED}, launches // 2, 1)\n"
        "for _ in range(4): qr()\n"
        "driver.fake_fail(b'', 0, 0, 0)\n"
        "qr(); svd()"
    )
    both = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    found = jax_calls(ON_CUDA + indented(code), XLA_FLAGS=both)
    failed = [text for kind, text in found if kind == "error"]
    assert [kind for kind, _ in found[:2]] == ["right", "right"] or not warm
    if warm and flags == CAPTURED:
        # A replayed graph launches nothing through us. Where XLA records it again and fails, it may
        # go on with what it has got of it, which is why the text says to start another process.
        assert len(failed) <= 1
    else:
        assert len(failed) == 1
    if not (warm and flags == CAPTURED and failed):
        assert [kind for kind, _ in found].count("wrong") == 0
        assert [kind for kind, _ in found[-2:]] == ["right", "right"]
    for text in failed:
        assert "qr: qr_" in text
        assert "CUDA_ERROR_LAUNCH_FAILED" in text
        assert "start another" in text


def test_launch_that_the_driver_refuses(jax_calls: JaxCalls) -> None:
    code = "svd()\ndriver.fake_spoil(1)\nsvd()\ngemv()\ndriver.fake_spoil(0)\nsvd()\ngemv()"
    found = jax_calls(ON_CUDA + indented(code))
    assert [kind for kind, _ in found] == ["right", "error", "error", "right", "right"]
    for name, (_, text) in zip(("svd: svd_", "gemv: gemv_"), found[1:3], strict=True):
        assert name in text
        assert "group 1048576x1x1" not in text  # what was asked for, not what was made of it
        assert re.search(r"CUDA_ERROR_[A-Z_]+ \(.+\)\. Please report this text; .*use_device", text)


def test_no_memory_for_code_on_a_gpu(jax_calls: JaxCalls) -> None:
    code = fail("cuModuleLoadData", NO_MEMORY) + "svd()\nsvd()\ngemv()"
    found = jax_calls(ON_CUDA + indented(code))
    assert [kind for kind, _ in found] == ["error", "right", "right"]
    assert re.search(r"svd: svd_\w+: [1-9]\d+ bytes of code cannot be loaded on ", found[0][1])
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in found[0][1]


def test_compile_error_on_a_gpu(jax_calls: JaxCalls, folder: Path) -> None:
    """Other kernels, and the same call without kernels, go on in the same process."""
    changed_library(folder / "bad.so", (b"int rhs_groups ;", b"int rhs_groups !"))
    code = (
        "gemv()\nsvd()\ngemv()\n"
        "with jml.use_device('xla'):\n"
        "    product = jax.jit(lambda a, x: jml.gemv(a, x, trans='T'))\n"
        "    gemv()"
    )
    found = jax_calls(ON_CUDA + indented(code), "bad.so")
    assert [kind for kind, _ in found] == ["error", "right", "error", "right"]
    assert all(re.search(r"kernels/gemv\.metal\(\d+\): error: ", found[i][1]) for i in (0, 2))


def test_more_scratch_than_the_gpu_has(jax_calls: JaxCalls) -> None:
    """Operand and results fit into JAX's pool, and what lies between them, twice as much, not."""
    code = (
        "limit = jax.devices('cuda')[0].memory_stats()['bytes_limit']\n"
        "batch = int(0.4 * limit / (3 * 300 * 300 * 4))\n"
        "a = jnp.zeros((batch, 300, 300), jnp.float32)\n"
        "whole = jax.jit(jml.svd)\n"
        "assert jml.explain(whole, a).calls[0].variant == 'grid'\n"
        "attempt(whole, (a,), None)\n"
        "del a\n"
        "svd()"
    )
    pool = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.01"}
    found = jax_calls(ON_CUDA + indented(code), **pool)
    assert [kind for kind, _ in found] == ["error", "right"]
    assert re.search(r"svd: the GPU has not got [1-9]\d{6,} bytes left", found[0][1]), found[0][1]
    assert "Use smaller batches" in found[0][1]


def without(missing: str, jax_calls: JaxCalls, code: str) -> list[tuple[str, str]]:
    """Calls on the GPU with too old a driver, or with no NVRTC."""
    on_gpu = "with jax.default_device(jax.devices('cuda')[0]):\n" + indented(code)
    if missing == "driver":
        return jax_calls(OLD + on_gpu)
    return jax_calls(on_gpu, JAXMETAL_CUDA_PATH="/nowhere")


@pytest.mark.parametrize("missing", ["driver", "NVRTC"])
def test_plain_xla_where_kernels_cannot_run(jax_calls: JaxCalls, missing: str) -> None:
    """Device auto, on arrays on the GPU; what was asked for by name is an error."""
    code = (
        "why = _cuda.missing()\n"
        "assert 'cuda' not in jml.devices(), why\n"
        "found.append(['why', why])\n"
        "found.append(['why', jml.explain(product, *map(jnp.asarray, (matrix, vector)))"
        ".calls[0].reason])\n"
        "svd(); gemv(); qr()\n"
        "try:\n"
        "    with jml.use_device('cuda'): pass\n"
        "except jml.DeviceUnavailableError as e:\n"
        "    found.append(['why', str(e)])"
    )
    found = without(missing, jax_calls, code)
    text = "serves CUDA 11.8" if missing == "driver" else "NVRTC cannot be opened"
    assert [kind for kind, _ in found] == ["why", "why", "right", "right", "right", "why"]
    assert all(text in found[i][1] for i in (0, 1, 5))


@pytest.mark.parametrize("missing", ["driver", "NVRTC"])
def test_exported_program_where_kernels_cannot_run(
    jax_calls: JaxCalls, missing: str, tmp_path: Path
) -> None:
    """It holds the custom call, whose handler then says what is missing."""
    a = random_matrix((5, 12, 12), "float32")
    path = tmp_path / "svdvals.bin"
    path.write_bytes(export.export(jax.jit(jml.svdvals), platforms=["cuda"])(a).serialize())
    code = (
        "from jax import export\n"
        f"f = export.deserialize(open({str(path)!r}, 'rb').read())\n"
        "attempt(f.call, (small,), exact)\n"
        "attempt(jax.jit(lambda x: x + 1), (small,), small + 1)"
    )
    found = without(missing, jax_calls, code)
    assert [kind for kind, _ in found] == ["error", "right"]
    old = missing == "driver"
    text = "12.0 is the oldest" if old else "pip install nvidia-cuda-nvrtc"
    assert "svd: " in found[0][1]
    assert text in found[0][1]
