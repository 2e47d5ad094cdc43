"""The matrices that every benchmark decomposes, and their names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Json = dict[str, Any]


def matrices(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Standard normal matrices ``[batch, m, n]``, the same in every run."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal(shape)
    if dtype.startswith("complex"):
        a = a + 1j * rng.standard_normal(shape)
    return jnp.asarray(a, dtype=dtype)


def label(shape: tuple[int, ...]) -> str:
    """``10000x8x8``; a single matrix without its batch."""
    return "x".join(map(str, shape[1:] if shape[0] == 1 else shape))
