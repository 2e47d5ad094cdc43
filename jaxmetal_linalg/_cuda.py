"""What the cuda device needs around it: NVRTC's files, the driver, JAX's own backend."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from jaxmetal_linalg import _compat, _native


def nvrtc_files() -> list[Path]:
    """NVRTC libraries of the ``nvidia-*`` wheels, which ``jax[cuda]`` installs; newest first."""
    spec = importlib.util.find_spec("nvidia")
    found: list[Path] = []
    for folder in (spec.submodule_search_locations or []) if spec else []:
        # Wheels of CUDA 13 and 12 differ in folder. The builtins library lies beside it.
        found += Path(folder).glob("*/lib/libnvrtc.so.*")
    found = [f for f in found if "alt" not in f.name]
    return sorted(found, key=lambda f: f.name, reverse=True)


def use_nvrtc() -> None:
    """Tells the native library where NVRTC is; opens nothing."""
    files = nvrtc_files()
    if files:
        _native.use_nvrtc(str(files[0]))


@functools.cache
def state() -> dict[str, Any]:
    """Driver, NVRTC and GPUs, asked once: ``problem`` is ``""`` where kernels can run."""
    if _native.missing():
        return {"problem": f"it is part of the native library. {_native.missing()}", "gpus": []}
    return _native.cuda()


def missing() -> str:
    """Why arrays on CUDA cannot reach the kernels, or ``""``."""
    if state()["problem"]:
        return str(state()["problem"])
    if not _compat.has_platform("cuda"):
        return "JAX has no cuda backend here: pip install 'jax[cuda13]'"
    return ""


def missing_to_lower() -> str:
    """Why programs for CUDA cannot hold the kernels, or ``""``.

    Lowering for CUDA elsewhere (``jax.export``) needs no GPU, but the library's plan.
    """
    return missing() if _compat.has_platform("cuda") else _native.missing()


def caps() -> str:
    """The row of the table of GPUs that calls on CUDA are planned for.

    Where programs are only lowered for CUDA (``jax.export``), without a GPU, it is the row of what
    every GPU has.
    """
    return str(state().get("caps", "nvidia"))
