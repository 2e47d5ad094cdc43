"""What the metal device needs around it: the GPU that the native library sees."""

from __future__ import annotations

import functools
from typing import Any

from jaxmetal_linalg import _native


@functools.cache
def state() -> dict[str, Any]:
    """The Apple GPU, asked once: ``problem`` is ``""`` where kernels can run on it."""
    if _native.missing():
        return {"problem": f"it is part of the native library. {_native.missing()}"}
    return _native.metal()


def missing() -> str:
    """Why there is no metal device here, or ``""``."""
    return str(state()["problem"])


def caps() -> str:
    """The row of the table of GPUs that calls on the Apple GPU are planned for."""
    return str(state()["caps"])


def family() -> str:
    """The GPU's family, ``apple7`` to ``apple10``, by which it is tuned; ``default`` without."""
    return str(state().get("family", "default"))
