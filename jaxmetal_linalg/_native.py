"""The native library: a plain C ABI opened with ctypes. Everything but handlers crosses as JSON."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax

from jaxmetal_linalg import _compat
from jaxmetal_linalg._errors import DeviceUnavailableError

ABI = 4
BUILD_HINT = "See BUILD.md, section 'Build from source'"


def library_path() -> Path:
    """Where the library is looked for: ``JAXMETAL_LIBRARY``, else inside the package."""
    override = os.environ.get("JAXMETAL_LIBRARY", "")
    if override:
        return Path(override)
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return Path(__file__).parent / "_lib" / f"libjaxmetal_linalg{suffix}"


class _Library:
    """The opened library, or why it could not be opened (``error``)."""

    def __init__(self) -> None:
        self.path = library_path()
        self.error = ""
        self.dll: ctypes.CDLL | None = None
        try:
            if not self.path.exists():
                self.error = f"the native library is not built: no file {self.path}. {BUILD_HINT}"
                return
            dll = ctypes.CDLL(str(self.path))
            for name, restype, argtypes in (
                ("jml_describe", ctypes.c_char_p, []),
                ("jml_handler", ctypes.c_void_p, [ctypes.c_char_p] * 3),
                ("jml_type_id", ctypes.c_void_p, [ctypes.c_char_p] * 2),
                ("jml_type_info", ctypes.c_void_p, [ctypes.c_char_p] * 2),
                ("jml_plan", ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_char_p]),
                ("jml_launches", ctypes.c_void_p, []),
                ("jml_cuda", ctypes.c_void_p, []),
                ("jml_cuda_library", None, [ctypes.c_char_p] * 2),
                ("jml_cublas", ctypes.c_void_p, []),
                ("jml_metal", ctypes.c_void_p, []),
                ("jml_free", None, [ctypes.c_void_p]),
            ):
                function = getattr(dll, name)
                function.restype = restype
                function.argtypes = argtypes
            self.description: dict[str, Any] = json.loads(dll.jml_describe())
            if self.description.get("abi") != ABI:
                self.error = (
                    f"the native library {self.path} has ABI {self.description.get('abi')}, "
                    f"this package needs {ABI}. Build it again. {BUILD_HINT}"
                )
                return
            self.dll = dll
        except (OSError, AttributeError, ValueError, TypeError) as e:
            self.error = (
                f"the native library {self.path} cannot be used: {e}. "
                f"Build it again for this machine. {BUILD_HINT}"
            )


@functools.cache
def _library() -> _Library:
    return _Library()


def available() -> bool:
    """Whether the native library is open and its handlers are registered."""
    return not missing()


def missing() -> str:
    """Why the native library cannot be used and what to do, or ``""``."""
    return _library().error or _registration_error()


def describe() -> dict[str, Any]:
    """What the library says of itself, with ``path``; ``{"path", "error"}`` where it is missing."""
    lib = _library()
    if lib.dll is None:
        return {"path": str(lib.path), "error": lib.error}
    out = {"path": str(lib.path), **lib.description}
    if _registration_error():
        out["error"] = _registration_error()
    return out


def isa() -> str:
    """The active instruction-set level of the host kernels, ``"default"`` without a library."""
    lib = _library()
    if lib.dll is None:
        return "default"
    return str(lib.description.get("isa", {}).get("active", "default"))


@functools.lru_cache(maxsize=4096)
def _plan_text(op: str, problem: str) -> str:
    lib = _library()
    if lib.dll is None:
        return json.dumps({"error": lib.error})
    text = _take(lib.dll, lib.dll.jml_plan(op.encode(), problem.encode()))
    return text or json.dumps({"error": f"{op}: the native library returned no plan"})


def _take(dll: ctypes.CDLL, pointer: int | None) -> str:
    """The text at a pointer that the library gives away, ``""`` for a null pointer."""
    if not pointer:
        return ""
    try:
        return ctypes.string_at(pointer).decode()
    finally:
        dll.jml_free(pointer)


def launches() -> dict[str, int]:
    """How often this process launched each kernel, by its name in ``kernels/*.metal``."""
    lib = _library()
    found: dict[str, int] = json.loads(_take(lib.dll, lib.dll.jml_launches())) if lib.dll else {}
    return found


def _asked(function: str) -> Any:
    """What a function of the library without arguments answers."""
    lib = _library()
    assert lib.dll is not None
    return json.loads(_take(lib.dll, getattr(lib.dll, function)()))


def cuda() -> dict[str, Any]:
    """The driver, NVRTC and the GPUs as the library sees them; opens the driver."""
    found: dict[str, Any] = _asked("jml_cuda")
    return found


def metal() -> dict[str, Any]:
    """The Apple GPU as the library sees it, and counts of what was done on it."""
    found: dict[str, Any] = _asked("jml_metal")
    return found


def cublas() -> dict[str, str]:
    """The version of cuBLAS, or the ``problem`` with it; opens it."""
    found: dict[str, str] = _asked("jml_cublas")
    return found


def use_cuda_library(stem: str, path: str) -> None:
    """The file of a CUDA library to open, where ``JAXMETAL_CUDA_PATH`` does not say."""
    lib = _library()
    if lib.dll is not None:
        lib.dll.jml_cuda_library(stem.encode(), path.encode())


def kernel_devices() -> tuple[str, ...]:
    """Devices of the library that run ``kernels/*.metal``, e.g. ``("sim",)``; none without one.

    cuda and metal are not among them: a library that has them may lack a GPU (``_cuda.missing``,
    ``_metal.missing``).
    """
    lib = _library()
    return tuple(lib.description["devices"]) if lib.dll is not None and available() else ()


def caps() -> dict[str, dict[str, Any]]:
    """The limits of every GPU that plans can be made for, by name; empty without a library."""
    lib = _library()
    return {row["name"]: row for row in lib.description["caps"]} if lib.dll is not None else {}


def caps_row(name: str, where: str) -> dict[str, Any]:
    """One row of ``caps``.

    Raises:
      ValueError: no GPU of that name; the text lists them.
      DeviceUnavailableError: there is no native library, which holds the table.
    """
    rows = caps()
    if not rows:
        raise DeviceUnavailableError(f"{where}: the table of GPUs is not here: {missing()}")
    if name not in rows:
        raise ValueError(f"{where}: expected one of {', '.join(rows)}, got {name!r}")
    return rows[name]


def plan(op: str, problem: dict[str, Any]) -> dict[str, Any]:
    """The native plan of a problem: route, variant, reason, launches, scratch_bytes and so on.

    On a device that runs kernels, route ``none`` with a reason says that no kernel serves it.

    Raises:
      ValueError: the library refuses the problem, in its words.
    """
    result: dict[str, Any] = json.loads(_plan_text(op, json.dumps(problem, sort_keys=True)))
    if "error" in result:
        raise ValueError(result["error"])
    return result


def _capsule(pointer: int) -> Any:
    return jax.ffi.pycapsule(ctypes.c_void_p(pointer))


@functools.cache
def _registration_error() -> str:
    """Registers every target of the library, once. Returns why that failed, or ``""``."""
    lib = _library()
    if lib.dll is None:
        return ""
    for target in lib.description["targets"]:
        name = target["name"]
        try:
            handlers, state_name, state = _capsules(lib.dll, target)
            if target["platform"] == "cpu":
                _compat.register_cpu_target(name, handlers, state_name, state)
            else:
                _compat.register_stateless_target(name, target["platform"], handlers)
        except Exception as e:  # jaxlib raises its own classes; the text is what helps
            return f"jaxlib refused the handlers of {name} in {lib.path}: {e}. {BUILD_HINT}"
        _compat.declare_stable_target(name)
    return ""


def _capsules(
    dll: ctypes.CDLL, target: dict[str, Any]
) -> tuple[dict[str, Any], str | None, dict[str, Any] | None]:
    """Handlers by stage, the state type's name, and the state type, of one target."""
    key = (target["name"].encode(), target["platform"].encode())
    handlers: dict[str, Any] = {}
    for stage in target["stages"]:
        pointer = dll.jml_handler(*key, stage.encode())
        if not pointer:
            raise LookupError(f"there is no {stage} handler")
        handlers[stage] = _capsule(pointer)
    if not target.get("state_type"):
        return handlers, None, None
    state = {
        "type_id": _capsule(dll.jml_type_id(*key)),
        "type_info": _capsule(dll.jml_type_info(*key)),
    }
    return handlers, target["state_type"], state


# Plugins for Apple GPUs, by the names of their platforms: jax-metal and jax-mps. Their memory is
# the host's too, so that the handlers of the cpu platform would serve them. Neither takes FFI
# handlers so far (jax-metal 0.1.1, jax-mps 0.11.1), so that this was never run on hardware.
APPLE_PLUGINS = ("METAL", "mps")


@functools.cache
def _plugin_registration(platform: str) -> str:
    lib = _library()
    assert lib.dll is not None
    for target in lib.description["targets"]:
        if target["platform"] == "cpu":
            try:
                parts = _capsules(lib.dll, target)
                _compat.register_plugin_target(platform, target["name"], *parts)
            except Exception as e:  # as above
                return f"platform {platform!r} refused the handlers of {target['name']}: {e}"
    return ""


def serves_plugin(platform: str) -> bool:
    """Whether our custom calls run on this plugin's platform; registers them with it first."""
    return (
        platform in APPLE_PLUGINS
        and _compat.plugin_takes_ffi(platform)
        and available()
        and not _plugin_registration(platform)
    )


def register() -> None:
    """Opens the library and registers its handlers, if it is there. Never raises.

    Called on import, so that an exported artefact that holds our custom calls runs in a process
    that has lowered nothing itself.
    """
    missing()
