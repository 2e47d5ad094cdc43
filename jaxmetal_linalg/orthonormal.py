"""Orthonormal columns, rows and bases: plain JAX on ``qr``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmetal_linalg._errors import value_error
from jaxmetal_linalg.primitives import svd as _svd
from jaxmetal_linalg.primitives.qr import qr


def orthonormal_columns(a: Any) -> jax.Array:
    """Orthonormal columns that span what the columns of ``a`` do, one after the other.

    Args:
      a: ``[..., m, n]`` with m >= n, dtypes as ``qr``.

    Returns:
      Q ``[..., m, n]`` with Q^H Q = I, the Q of ``qr(a)``: its first j columns span the first j
      columns of ``a``. Where those are linearly dependent, Q is orthonormal all the same.

    Raises:
      TypeError: unsupported dtype.
      ValueError: rank < 2, or m < n.

    Failure, accuracy, differentiability, devices: as ``qr``.
    """
    a = _svd._operand("orthonormal_columns", a)
    m, n = a.shape[-2:]
    if m < n:
        raise value_error(
            "orthonormal_columns",
            "a",
            "[..., m, n] with m >= n",
            f"shape {a.shape}",
            f"{m} dimensions hold no {n} orthonormal columns; use orthonormal_rows",
        )
    return jnp.asarray(qr(a).Q)


def orthonormal_rows(a: Any) -> jax.Array:
    """Orthonormal rows that span what the rows of ``a`` do, one after the other.

    Args:
      a: ``[..., m, n]`` with m <= n, dtypes as ``qr``.

    Returns:
      Q ``[..., m, n]`` with Q Q^H = I: its first i rows span the first i rows of ``a``. Where those
      are linearly dependent, Q is orthonormal all the same.

    Raises:
      TypeError: unsupported dtype.
      ValueError: rank < 2, or m > n.

    Failure, accuracy, differentiability, devices: as ``qr`` of the adjoint.
    """
    a = _svd._operand("orthonormal_rows", a)
    m, n = a.shape[-2:]
    if m > n:
        raise value_error(
            "orthonormal_rows",
            "a",
            "[..., m, n] with m <= n",
            f"shape {a.shape}",
            f"{n} dimensions hold no {m} orthonormal rows; use orthonormal_columns",
        )
    return _svd._adjoint(qr(_svd._adjoint(a)).Q)


def complete_basis(q: Any) -> jax.Array:
    """An orthonormal basis of the whole space that begins with the columns of ``q``.

    Args:
      q: ``[..., m, r]`` with r <= m and orthonormal columns, dtypes as ``qr``.

    Returns:
      ``[..., m, m]``: ``q``, then m - r columns with which it is orthonormal. If the columns of
      ``q`` are not orthonormal, the new ones are still orthonormal and orthogonal to them.

    Raises:
      TypeError: unsupported dtype.
      ValueError: rank < 2, or r > m.

    Failure, accuracy, devices: as ``qr`` in mode ``complete``; the columns of ``q`` are returned as
    they came. Differentiability: as there, the new columns do not turn among themselves.
    """
    q = _svd._operand("complete_basis", q)
    m, r = q.shape[-2:]
    if r > m:
        raise value_error(
            "complete_basis",
            "q",
            "[..., m, r] with r <= m",
            f"shape {q.shape}",
            f"{m} dimensions hold no {r} orthonormal columns",
        )
    return jnp.concatenate([q, qr(q, "complete").Q[..., :, r:]], axis=-1)
