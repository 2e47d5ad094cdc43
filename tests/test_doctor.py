"""The self-check: it passes on a good installation and says so honestly on a broken one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxmetal_linalg as jml
from jaxmetal_linalg import _device, _doctor, _native, _registry, _report
from jaxmetal_linalg.__main__ import main


@pytest.mark.slow
def test_a_good_installation() -> None:
    """A minute of compiling. CI has the same checks pass where the wheel is installed."""
    report = jml.doctor()
    assert report.ok, str(report)
    assert {c.device for c in report.checks} == set(jml.devices())
    # One op a primitive and a composite; svdvals is svd's primitive.
    ops = {op.name for op in _registry.OPS.values()} | set(_registry.COMPOSITES.values())
    assert {c.op for c in report.checks} == {*ops, "svdvals"}

    text = str(report)
    assert jax.__version__ in text
    assert "FFI API" in text
    for name, missing in report.devices.items():
        assert f"  {name}" in text
        assert missing in text
    assert report.devices["host"] == ""
    assert "Apple GPU" in report.devices["metal"]

    routes = {c.route.split("/")[0] for c in report.checks if c.device == "host"}
    assert "host" in routes
    found = {(c.op, c.route) for c in report.checks if c.device == "sim"}
    assert {route.split("/")[0] for _, route in found} == {"kernel"}
    assert {("svd", "kernel/xor"), ("svd", "kernel/block8"), ("gemv", "kernel/any")} <= found

    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is True
    assert data["ffi_api"]["library"] == ".".join(map(str, _native.describe()["ffi_api"]))


@pytest.fixture
def few_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {k: v for k, v in _doctor._BY_OP.items() if k in ("svdvals", "gemv")}
    monkeypatch.setattr(_doctor, "_BY_OP", few)


@pytest.mark.usefixtures("sim", "few_checks")
def test_a_kernel_that_did_not_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "launches", dict)
    checks = list(_doctor._checks("sim"))
    assert {c.op for c in checks} == {"svdvals", "gemv"}
    assert all("no kernel of row" in c.detail and not c.ok for c in checks)


@pytest.fixture
def host_only(monkeypatch: pytest.MonkeyPatch, few_checks: None) -> None:
    monkeypatch.setattr(_device, "devices", lambda: ["host"])


@pytest.mark.usefixtures("host_only")
def test_a_failing_check_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_doctor, "ACC_SIGMA_ULP", 0.0)
    assert main(["doctor"]) == 1
    assert "NOT OK" in capsys.readouterr().out


@pytest.mark.usefixtures("host_only")
def test_a_route_that_did_not_run_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor, "_target", lambda op: "a target that no program holds")
    failed = [c for c in _doctor.doctor().checks if not c.ok]
    assert failed
    assert all("not in the compiled program" in c.detail for c in failed)


def test_chosen_devices(
    few_checks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(_doctor, "_checks", lambda device: asked.append(device) or iter(()))
    assert main(["doctor", "--devices", "xla,host"]) == 0
    assert asked == ["xla", "host"]
    capsys.readouterr()
    with pytest.raises(ValueError, match="doctor: argument devices"):
        _doctor.doctor(["moon"])


def test_missing_library_is_not_ok() -> None:
    code = (
        "import sys\n"
        "from jaxmetal_linalg import __main__, _doctor\n"
        "_doctor._checks = lambda device: iter(())\n"  # what is left would pass
        "sys.exit(__main__.main(['doctor', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAXMETAL_LIBRARY": "no such file", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    data = json.loads(done.stdout)
    assert done.returncode == 1
    assert not data["ok"]
    assert "not built" in data["library"]["error"]
    assert data["devices"]["host"]


def test_report_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_report, "SHAPES", ((9, 8, 8),))
    monkeypatch.setattr(_report._doctor, "_checks", lambda device: iter(()))
    data, text, ok = _report.write(tmp_path / "new", seconds=0.01)
    assert ok
    report = json.loads(data.read_text())
    assert report["doctor"]["devices"].keys() >= {"metal", "host"}
    (row,) = report["rows"]
    assert row["shape"] == [9, 8, 8]
    assert all(row["median_ms"][k] >= ms > 0 for k, ms in row["min_ms"].items())
    for device, route in row["routes"].items():
        assert route.split("/")[0] == device
    assert "sim" not in row["median_ms"]
    gpu = report["metal"].get("name", "none: it needs an Apple GPU")
    assert f"- Apple GPU: {gpu}" in text.read_text()
    assert "| 9x8x8 |" in text.read_text()
    assert report["format"] == _report.FORMAT
    assert str(Path.home()) not in data.read_text()
    assert report["environment"].items() <= os.environ.items()


def test_a_report_is_written_when_a_shape_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_report, "SHAPES", ((9, 8, 8),))
    monkeypatch.setattr(_report._doctor, "_checks", lambda device: iter(()))
    monkeypatch.setattr(_device, "devices", lambda: ["host"])

    def broken(*args: object) -> None:
        raise RuntimeError("the GPU is gone")

    monkeypatch.setattr(_report, "_times", broken)
    assert main(["doctor", "--report", str(tmp_path)]) == 1
    (data,) = tmp_path.glob("*.json")
    (text,) = tmp_path.glob("*.md")
    (row,) = json.loads(data.read_text())["rows"]
    assert row == {"shape": [9, 8, 8], "dtype": "float32", "error": "RuntimeError: the GPU is gone"}
    assert "9x8x8 FAILED:" in text.read_text()
    assert str(data) in capsys.readouterr().out
