"""Which device runs our primitives: the one switch, its context manager, and the list."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

from jaxmetal_linalg import _compat, _cuda, _metal, _native
from jaxmetal_linalg._errors import device_absent

DeviceName: TypeAlias = Literal["auto", "host", "metal", "cuda", "sim", "xla"]
NAMES: tuple[str, ...] = get_args(DeviceName)

_state = _compat.cache_key_state(
    "jaxmetal_linalg_device", "Device of jaxmetal_linalg's primitives; see use_device."
)

_ABSENT = {
    "sim": "it needs a build with the kernel simulator, which this native library has not got",
}


def why_absent(name: str) -> str:
    """Why a device cannot be used here and how to get it, or ``""`` if it can."""
    if name in ("auto", "xla"):
        return ""
    if name == "host" or name in _native.kernel_devices():
        return _native.missing()
    if name in ("cuda", "metal"):
        reason = _cuda.missing() if name == "cuda" else _metal.missing()
        return reason and f"{reason}. Use one of {', '.join(devices())}, or auto"
    if name == "sim" and _native.missing():
        return f"it is part of the native library. {_native.missing()}"
    return f"{_ABSENT[name]}. Use one of {', '.join(devices())}, or auto"


def check(name: str, where: str) -> None:
    """Raises unless ``name`` is a device that can be used now.

    Raises:
      ValueError: not the name of a device.
      DeviceUnavailableError: the device is absent; the text names what is missing.
    """
    if name not in NAMES:
        raise ValueError(f"{where}: expected one of {', '.join(NAMES)}, got {name!r}")
    reason = why_absent(name)
    if reason:
        raise device_absent(where, name, reason)


def devices() -> list[str]:
    """The names of the devices that can be used now, for instance ``["host", "sim", "xla"]``."""
    native = ("host", *_native.kernel_devices()) if _native.available() else ()
    if not _cuda.missing():
        native += ("cuda",)
    if not _metal.missing():
        native += ("metal",)
    return [n for n in ("host", "metal", "cuda", "sim") if n in native] + ["xla"]


def gpu_caps(name: str) -> str:
    """The row of the table of GPUs that calls on a device are planned for; ``""``: it is no GPU."""
    if name == "cuda":
        return _cuda.caps()
    return _metal.caps() if name == "metal" else ""


# Devices that serve arrays of one XLA platform only.
PLATFORMS = {"host": "cpu", "metal": "cpu", "sim": "cpu", "cuda": "cuda"}


@contextlib.contextmanager
def arrays_for(name: str) -> Iterator[None]:
    """``use_device(name)``, with JAX's default device on the platform that the device serves."""
    platform = PLATFORMS.get(name)
    where = _compat.default_device(platform) if platform else contextlib.nullcontext()
    with where, use_device(name):  # type: ignore[arg-type]
        yield


@contextlib.contextmanager
def use_device(name: DeviceName) -> Iterator[None]:
    """Chooses the device of every primitive of this package inside the ``with`` block.

    Args:
      name: ``auto`` (the fastest that is present), ``host`` (native code, cpu platform only),
        ``xla`` (plain XLA operations, any platform), ``sim`` (the GPU kernels in a checking
        simulator, cpu platform only, slow, never chosen by ``auto``), ``cuda`` (the GPU kernels on
        NVIDIA GPUs, cuda platform only) or ``metal`` (the GPU kernels on an Apple GPU, cpu
        platform; what no kernel serves, as float64, goes to host, and ``explain`` says so).

    The choice is local to the thread, nests, wins over the environment variable
    ``JAXMETAL_DEVICE``, and is part of ``jax.jit``'s cache key: a function that was jitted before
    is traced again under another device.

    Raises:
      ValueError: ``name`` is not the name of a device.
      DeviceUnavailableError: the device is absent here. Both a ``ValueError`` and a
        ``RuntimeError``; the text says what is missing and how to get it.
    """
    check(name, "use_device: argument name")
    with _state(name):
        yield


# Largest seed that crosses to the native library as a JSON number.
MAX_SEED = 10**15


def sim_options() -> tuple[tuple[str, bool | int | str], ...]:
    """How the simulator runs, from the environment, as what its custom calls carry.

    ``JAXMETAL_SIM`` is ``checked`` (default: every access is judged) or ``fast``;
    ``JAXMETAL_SIM_SEED`` shuffles the order of lanes, simdgroups and threadgroups;
    ``JAXMETAL_SIM_CAPS`` names the GPU whose limits hold (default ``apple-m1``).

    Raises:
      ValueError: a variable has another value; the text lists those that it may have.
    """
    mode = os.environ.get("JAXMETAL_SIM", "") or "checked"
    if mode not in ("checked", "fast"):
        raise ValueError(f"environment JAXMETAL_SIM: expected checked or fast, got {mode!r}")
    seed = os.environ.get("JAXMETAL_SIM_SEED", "")
    if seed and not (seed.isascii() and seed.isdigit() and int(seed) <= MAX_SEED):
        raise ValueError(
            f"environment JAXMETAL_SIM_SEED: expected an integer from 0 to {MAX_SEED}, got {seed!r}"
        )
    caps = os.environ.get("JAXMETAL_SIM_CAPS", "") or "apple-m1"
    _native.caps_row(caps, "environment JAXMETAL_SIM_CAPS")
    return (
        ("caps", caps),
        ("sim_checked", mode == "checked"),
        ("sim_seed", int(seed or 0)),
        ("sim_shuffle", bool(seed)),
    )


_warned = False


def requested() -> str:
    """The device asked for by ``use_device``, else ``JAXMETAL_DEVICE``, else ``auto``; checked."""
    local = _state.value
    if local is not None:
        return str(local)
    name = os.environ.get("JAXMETAL_DEVICE", "") or "auto"
    check(name, "environment JAXMETAL_DEVICE")
    if name == "auto" and _native.missing():
        _warn_once()
    return name


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"jaxmetal_linalg runs without its native code: {_native.missing()}. "
            "XLA's own routines are used instead; JAXMETAL_DEVICE=xla chooses them in silence",
            RuntimeWarning,
            stacklevel=2,
        )
