"""What the cuda device needs around it: NVIDIA's libraries, the driver, JAX's own backend."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

from jaxmetal_linalg import _compat, _native

#: Of the CUDA toolkit, by their stems: opened by the native library when they are needed.
LIBRARIES = ("nvrtc", "cublas")


def library_files(stem: str) -> list[Path]:
    """Files of a library in the ``nvidia-*`` wheels, which ``jax[cuda]`` installs; newest first."""
    spec = importlib.util.find_spec("nvidia")
    found: list[Path] = []
    for folder in (spec.submodule_search_locations or []) if spec else []:
        # Wheels of CUDA 13 and 12 differ in folder. What they need themselves lies beside them.
        found += Path(folder).glob(f"*/lib/lib{stem}.so.*")
    found = [f for f in found if "alt" not in f.name]
    return sorted(found, key=lambda f: f.name, reverse=True)


def use_libraries() -> None:
    """Tells the native library where they are; opens nothing."""
    for stem in LIBRARIES:
        if files := library_files(stem):
            _native.use_cuda_library(stem, str(files[0]))


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


@functools.cache
def without_cublas() -> str:
    """Why kernels cannot leave products to cuBLAS, or ``""``; opens it."""
    return missing() or _native.cublas()["problem"]


def caps() -> str:
    """The row of the table of GPUs that calls on CUDA are planned for.

    Where programs are only lowered for CUDA (``jax.export``), without a GPU, it is the row of what
    every GPU has.
    """
    return str(state().get("caps", "nvidia"))
