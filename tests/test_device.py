"""The device switch, tuning overrides, and what happens when the native library is absent."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import python, random_matrix

import jaxmetal_linalg as jml
from jaxmetal_linalg import _device, _native, _tuning

A = random_matrix((3, 6, 6), "float32")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python(code, **{"JAX_PLATFORMS": "cpu", **environment})


def device_of(f: Any = jml.svd) -> str:
    (call,) = jml.explain(lambda a: f(a), A).calls
    return call.device


def test_devices_are_usable() -> None:
    names = jml.devices()
    assert names[-1] == "xla"
    assert len(set(names)) == len(names)
    for name in names:
        with _device.arrays_for(name):
            assert device_of() == name
            assert np.all(np.isfinite(jml.svd(A).S))


def test_nesting_and_exceptions(host: None) -> None:
    assert device_of() == "host"
    with jml.use_device("xla"):
        assert device_of() == "xla"
        with jml.use_device("auto"):
            assert device_of() == "host"
        with pytest.raises(KeyError), jml.use_device("host"):
            raise KeyError
        assert device_of() == "xla"
    assert device_of() == "host"


def test_use_device_decorates(host: None) -> None:
    @jml.use_device("xla")
    def f(a: Any) -> Any:
        return jml.svd(a)

    assert device_of(f) == "xla"
    assert device_of() == "host"
    assert device_of(f) == "xla"


def test_thread_local(host: None) -> None:
    seen = []
    with jml.use_device("xla"):
        thread = threading.Thread(target=lambda: seen.append(device_of()))
        thread.start()
        thread.join()
        assert device_of() == "xla"
    assert seen == ["host"]


def test_a_jitted_function_is_traced_again(host: None) -> None:
    traces = []

    @jax.jit
    def f(a: Any) -> Any:
        traces.append(_device.requested())
        return jml.svd(a)

    def target() -> bool:
        return "jml_svd_v1" in f.lower(A).as_text()

    assert target()
    f(A)
    f(A)
    with jml.use_device("xla"):
        assert not target()
        f(A)
    assert target()
    f(A)
    assert traces == ["host", "xla"]
    nested = jax.jit(lambda a: f(a).S + 1)
    nested(A)
    with jml.use_device("xla"):
        assert "jml_svd_v1" not in nested.lower(A).as_text()
        assert "jml_svd_v1" not in jax.jit(jax.vmap(f)).lower(A).as_text()


@pytest.mark.parametrize("name", ["metal", "cuda", "sim"])
def test_absent_devices(name: Any) -> None:
    if name in jml.devices():
        pytest.skip(f"{name} is present")
    for kind in (ValueError, RuntimeError, jml.DeviceUnavailableError):
        with (
            pytest.raises(
                kind, match=f"use_device: .*'{name}' is not available: (it|the|JAX|NVRTC) "
            ),
            jml.use_device(name),
        ):
            pass


def test_unknown_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="use_device: argument name: expected one of auto, host"),
        jml.use_device("tpu"),  # type: ignore[arg-type]
    ):
        pass
    monkeypatch.setenv("JAXMETAL_DEVICE", "gpu")
    with pytest.raises(ValueError, match="environment JAXMETAL_DEVICE: expected one of auto, host"):
        jml.svd(A)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMETAL_DEVICE", "xla")
    assert device_of() == "xla"
    with jml.use_device("auto"):
        assert device_of() == jml.devices()[0]
    if "cuda" not in jml.devices():
        monkeypatch.setenv("JAXMETAL_DEVICE", "cuda")
        with pytest.raises(jml.DeviceUnavailableError, match="JAXMETAL_DEVICE: device 'cuda'"):
            jml.svd(A)


def test_host_on_another_platform_is_an_error(host: None) -> None:
    def lower(**options: Any) -> Any:
        f = jax.jit(lambda a: jml.svd(a, **options))
        return f.trace(A).lower(lowering_platforms=("rocm",)).as_text()

    with pytest.raises(
        jml.DeviceUnavailableError, match="'host' serves arrays on the cpu platform"
    ):
        lower()
    with (
        jml.use_device("sim"),
        pytest.raises(jml.DeviceUnavailableError, match="'sim' serves arrays on the cpu platform"),
    ):
        lower()
    with jml.use_device("auto"):
        assert "custom_call" not in lower()
        with pytest.raises(jml.DeviceUnavailableError, match="method 'lapack' serves arrays on"):
            lower(method="lapack")


@pytest.mark.parametrize("platform", ["rocm", "tpu"])
def test_portable_on_platforms_without_a_handler(platform: str) -> None:
    f = jax.jit(lambda a: jml.svd(a))
    text = f.trace(A).lower(lowering_platforms=(platform,)).as_text()
    assert "custom_call" not in text
    assert "stablehlo.while" in text


# --- without the native library --------------------------------------------------------------

ABSENT = """
import warnings
import numpy as np
import jaxmetal_linalg as jml
assert jml.devices() == ["xla"], jml.devices()
a = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    s = jml.svd(a).S
    jml.svd(a[1:])
assert np.allclose(s, np.linalg.svd(a, compute_uv=False), atol=1e-4)
(warning,) = [w for w in seen if "jaxmetal_linalg" in str(w.message)]
assert "BUILD.md" in str(warning.message), warning
(call,) = jml.explain(jml.svd, a).calls
assert (call.device, call.route) == ("xla", "lapack") and "BUILD.md" in call.reason
assert np.allclose(jml.svdvals(a, method="jacobi"), s, atol=1e-4)
assert jml.svd(a, method="lapack", return_info=True)[1].status == 0
try:
    with jml.use_device("host"):
        raise SystemExit("host must be absent")
except jml.DeviceUnavailableError as e:
    assert "BUILD.md" in str(e) and {text!r} in str(e), e
for use, text in (
    (lambda: jml.use_device("sim").__enter__(), "part of the native library"),
    (lambda: jml.explain(jml.svd, a, caps="apple-m1"), "explain: argument caps: the table of GPUs"),
):
    try:
        use()
        raise SystemExit(text)
    except jml.DeviceUnavailableError as e:
        assert text in str(e) and "BUILD.md" in str(e), e
print("fine")
"""


@pytest.mark.once
def test_without_the_library(tmp_path: Path) -> None:
    missing = run(
        ABSENT.format(text="is not built"),
        JAXMETAL_LIBRARY=str(tmp_path / "none.so"),
        JAXMETAL_DEVICE="",
    )
    assert missing.stdout.strip() == "fine", missing.stderr
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    unusable = run(
        ABSENT.format(text="cannot be used"), JAXMETAL_LIBRARY=str(broken), JAXMETAL_DEVICE=""
    )
    assert unusable.stdout.strip() == "fine", unusable.stderr


def test_library_by_path(host: None) -> None:
    code = "import jaxmetal_linalg as j; from jaxmetal_linalg import _native as n; "
    code += "assert 'host' in j.devices(); print(n.describe()['path'])"
    path = _native.describe()["path"]
    done = run(code, JAXMETAL_LIBRARY=path)
    assert done.stdout.strip() == path, done.stderr


def test_isa_can_be_capped(host: None) -> None:
    code = "import numpy as np, jaxmetal_linalg as j; from jaxmetal_linalg import _native as n; "
    code += "a = np.random.default_rng(0).standard_normal((5, 9, 7)).astype('float32'); "
    code += "u, s, v = j.svd(a, False); assert np.abs((u * s[:, None]) @ v - a).max() < 1e-5; "
    code += "print(n.isa())"
    for level in _native.describe()["isa"]["compiled"]:
        done = run(code, JAXMETAL_ISA=level, JAXMETAL_DEVICE="host")
        assert done.stdout.strip() == level, done.stderr


# --- tuning ----------------------------------------------------------------------------------


def test_tuning_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "max_sweeps" in _tuning.known_keys("host", "svd")
    shipped = dict(_tuning.resolve("host", "svd"))
    file = tmp_path / "params.json"
    rows = {"default": {"max_sweeps": 11}, "avx2": {"max_sweeps": 12}}
    file.write_text(json.dumps({"host": {"svd": rows}}))
    monkeypatch.setenv("JAXMETAL_PARAMS", str(file))
    assert dict(_tuning.resolve("host", "svd")) == {**shipped, "max_sweeps": 11}
    assert dict(_tuning.resolve("host", "svd", "avx2"))["max_sweeps"] == 12
    monkeypatch.setenv("JAXMETAL_TUNING", "xla.svd.max_sweeps=5, host.svd.max_sweeps=13")
    assert dict(_tuning.resolve("host", "svd", "avx2"))["max_sweeps"] == 13
    assert dict(_tuning.resolve("xla", "svd"))["max_sweeps"] == 5


def test_tuning_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "host.svd.sweeps=3": "host.svd: expected one of .*max_sweeps.*got 'sweeps'",
        "host.svd.max_sweeps": "expected device.op.key=number",
        "host.svd.max_sweeps=many": "expected device.op.key=number",
        "moon.svd.max_sweeps=3": "expected one of .*host.svd, .*got moon.svd",
    }
    for text, pattern in cases.items():
        monkeypatch.setenv("JAXMETAL_TUNING", text)
        with pytest.raises(ValueError, match=f"JAXMETAL_TUNING: {pattern}"):
            jml.svd(A)
    monkeypatch.delenv("JAXMETAL_TUNING")
    monkeypatch.setenv("JAXMETAL_PARAMS", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="JAXMETAL_PARAMS: expected a readable JSON file"):
        jml.svd(A)
    (tmp_path / "bad.json").write_text('{"host": {"svd": {"default": {"max_sweeps": "x"}}}}')
    monkeypatch.setenv("JAXMETAL_PARAMS", str(tmp_path / "bad.json"))
    with pytest.raises(ValueError, match="max_sweeps: expected a number, got 'x'"):
        jml.svd(A)


def test_crossover_is_overridable(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    big = jax.ShapeDtypeStruct((700, 700), jnp.float32)
    assert jml.explain(jml.svd, big).calls[0].route == "lapack"
    monkeypatch.setenv("JAXMETAL_TUNING", "host.svd.jacobi_max_n_single=1000")
    assert jml.explain(lambda a: jml.svd(a), big).calls[0].route == "host"


def test_variant_errors(host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMETAL_VARIANT", "column")
    with pytest.raises(ValueError, match="JAXMETAL_VARIANT: expected op:row"):
        jml.svd(A)
    monkeypatch.setenv("JAXMETAL_VARIANT", "svd:nothing")
    with pytest.raises(ValueError, match=r"svd: .*variant.*nothing"):
        jml.svd(A)


def test_import_is_light() -> None:
    code = """
import sys, time
import jax
t = time.process_time()
import jaxmetal_linalg
print(time.process_time() - t)
heavy = [m for m in ("scipy", "matplotlib", "rich", "torch") if m in sys.modules]
assert not heavy, heavy
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    done = [run(code) for _ in range(3)]
    assert all(d.returncode == 0 for d in done), done[0].stderr
    # The bound is 0.15 s, of the processor: a busy machine must not decide.
    assert min(float(d.stdout) for d in done) < 0.15
