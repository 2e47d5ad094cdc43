"""Shared settings: the device fixture, strictness, and bounded property tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NoReturn

import jax
import pytest
from hypothesis import HealthCheck, settings

import jaxmetal_linalg as jml
from jaxmetal_linalg._device import arrays_for
from tools.msl import nvrtc

# Every device this version knows how to provide.
KNOWN_DEVICES = ("host", "metal", "cuda", "sim", "xla")

settings.register_profile(
    "bounded",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("bounded")

jax.config.update("jax_numpy_rank_promotion", "raise")
# Where there is a GPU, tests that name no device still mean the cpu platform, in every thread.
if jax.default_backend() != "cpu":
    jax.config.update("jax_default_device", jax.devices("cpu")[0])


@pytest.fixture(scope="module", autouse=True)
def _no_programs_are_kept() -> Iterator[None]:
    """A file's compiled programs, a gigabyte in all, are of no use to the next one."""
    yield
    jax.clear_caches()


def absent(name: str, reason: str) -> NoReturn:
    """Skips the test for want of a device or tool; fails where JAXMETAL_REQUIRE has its name."""
    if name in os.environ.get("JAXMETAL_REQUIRE", "").replace(" ", "").split(","):
        pytest.fail(f"JAXMETAL_REQUIRE={name}: {reason}")
    pytest.skip(reason)


def require(name: str) -> None:
    """Likewise, unless the device is present."""
    if name in jml.devices():
        return
    try:
        with jml.use_device(name):  # type: ignore[arg-type]
            reason = "listed as absent, yet usable"
    except jml.DeviceUnavailableError as e:
        reason = str(e)
    absent(name, reason)


@contextlib.contextmanager
def chosen(name: str) -> Iterator[str]:
    """The device chosen for our primitives and, where it serves one platform, for JAX's arrays."""
    require(name)
    with arrays_for(name):
        yield name


@pytest.fixture(params=KNOWN_DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each device, with that device chosen."""
    with chosen(request.param):
        yield request.param


@pytest.fixture(params=[d for d in KNOWN_DEVICES if d != "sim"])
def wide_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Likewise on each device that takes float64 and matrices of any size."""
    with chosen(request.param):
        yield request.param


@pytest.fixture
def sim() -> Iterator[None]:
    """The kernels on the checking simulator, chosen."""
    with chosen("sim"):
        yield


@pytest.fixture
def cuda() -> Iterator[None]:
    """The kernels on an NVIDIA GPU, chosen."""
    with chosen("cuda"):
        yield


@pytest.fixture
def host() -> Iterator[None]:
    """The native device, chosen."""
    with chosen("host"):
        yield


@pytest.fixture(scope="module")
def compiler() -> nvrtc.Nvrtc:
    """NVRTC, which needs no GPU."""
    try:
        return nvrtc.Nvrtc()
    except nvrtc.NvrtcMissing as e:
        absent("nvrtc", str(e))


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types inside the test."""
    with jax.enable_x64(True):
        yield
