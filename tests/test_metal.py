"""The metal device: csrc/device_metal.cc over a simulated Metal framework, driven from JAX.

The framework (tests/metal_sim) ends the process where a rule of Metal is broken, so that a test
which merely passes has met them all. What needs the simulation's own switches is skipped on a Mac.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import mmap
import os
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
from harness import check_svd, random_matrix
from test_sim import launched

import jaxmetal_linalg as jml
from jaxmetal_linalg import _metal, _native
from jaxmetal_linalg.primitives import svd as svd_module

pytestmark = pytest.mark.usefixtures("metal")
A = random_matrix((5, 9, 6), "float32")
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
        out = (ctypes.c_int64 * 4)()
        self.dll.jml_metal_sim_totals(out)
        return dict(zip(("committed", "dispatches", "hits", "files"), out, strict=True))

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
    found.forget()


def fresh(**options: Any) -> Any:
    """A jitted svd that nothing else has compiled."""
    return jax.jit(lambda a: jml.svd(a, full_matrices=False, **options))


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


@pytest.mark.parametrize("row", ["xor", "ring", "block8", "block16"])
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
    weight = random_matrix((9, 6), "float32", 1)

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


# --- which calls it takes --------------------------------------------------------------------


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
        ((2, 40, 40), "complex64", "complex64"),
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
            result: list[Any] = []
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
    before = framework.totals()
    for _ in range(3):
        jax.block_until_ready(f(A))
    after = framework.totals()
    assert after["committed"] - before["committed"] == 3
    assert after["dispatches"] - before["dispatches"] == 3


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
    return spec.problem_on(_metal.caps(), a.shape, a.dtype)


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
    assert (
        counted(lambda: f(copied))
        == {
            "calls": 1,
            "command_buffers": 1,
            "copied_in": 1,
            "copied_out": 6,
        }
        or copied.unsafe_buffer_pointer() % mmap.PAGESIZE == 0
    )
    done = counted(lambda: f(pages))
    assert done["wrapped"] >= 1
    assert done.get("copied_in", 0) == 0
    for x, y in zip(f(pages), want, strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(pages, a)
    # Memory that Metal will not map is copied.
    framework.fault("no_copy")
    assert counted(lambda: f(pages))["copied_in"] == 1


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
    return subprocess.run(
        [sys.executable, "-c", "import jaxmetal_linalg as jml, numpy as np\n" + code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )


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


def test_prebuilt_library_beside_this_one(framework: Framework) -> None:
    file = _native.library_path().with_name("svd.metallib")
    assert not file.exists()
    try:
        file.write_text("simulated metallib\n")
        done = counted(lambda: fresh()(A))
        assert done["libraries_loaded"] == 1
        assert "libraries_compiled" not in done
        framework.forget()
        file.write_text("of another format")
        with pytest.raises(FAILURES, match=r"svd\.metallib cannot be loaded"):
            jax.block_until_ready(fresh()(A))
    finally:
        file.unlink()


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
        ("threads", "2048 threads exceed the pipeline's 1024"),
        ("memory", "bytes of threadgroup memory exceed 32768"),
        ("offset", "offset 16384 is outside of MTLBuffer"),
        ("untracked", "expected shared storage with tracked hazards"),
        ("fast_math", "expected the safe math mode"),
        ("freed_in_flight", "goes while the GPU uses it"),
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
