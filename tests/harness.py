"""What all SVD tests share: hard matrices, references in extended precision, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

import jaxmetal_linalg as jml
from jaxmetal_linalg import _measure
from jaxmetal_linalg._measure import sigma_error_ulp, svd_ratios, ulp

__all__ = ["check_svd", "hard_matrices", "random_matrix", "reference_sigma", "relative_sigma_ulp"]

Matrix = np.ndarray[Any, Any]


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_matrix(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Matrix:
    """Gaussian entries, complex where the dtype is."""
    g = rng(seed, *shape)
    x = g.standard_normal(shape)
    if np.issubdtype(np.dtype(dtype), np.complexfloating):
        x = x + 1j * g.standard_normal(shape)
    return x.astype(dtype)


@contextmanager
def x64_for(dtype: Any) -> Iterator[None]:
    """64-bit types where the dtype needs them."""
    with jax.enable_x64(np.dtype(dtype).name in ("float64", "complex128")):
        yield


# --- hard matrices (performance.md section 6) ------------------------------------------------


def _orthogonal(n: int, seed: int) -> Matrix:
    q, r = np.linalg.qr(rng(n, seed).standard_normal((n, n)))
    return q * np.sign(np.diag(r))


def _spectrum(sigma: Matrix, seed: int = 0) -> Matrix:
    n = len(sigma)
    return (_orthogonal(n, seed + 1) * sigma) @ _orthogonal(n, seed + 2)


def spectrum(shape: tuple[int, int], sigma: Matrix, seed: int = 0) -> Matrix:
    """A real matrix with the given min(m, n) singular values and random vectors."""
    k = min(shape)
    u, v = (np.linalg.qr(rng(n, seed + i).standard_normal((n, k)))[0] for i, n in enumerate(shape))
    return (u * sigma) @ v.T


def _kahan(n: int) -> Matrix:
    s, c = np.sin(1.2), np.cos(1.2)
    upper = np.eye(n) - c * np.triu(np.ones((n, n)), 1)
    return np.diag(s ** np.arange(n)) @ upper


def _hilbert(n: int) -> Matrix:
    i = np.arange(n)
    return 1.0 / (i[:, None] + i + 1)


def _zero_columns(n: int) -> Matrix:
    a = rng(n, 3).standard_normal((n, n))
    a[:, ::2] = 0
    return a


def _duplicates(n: int) -> Matrix:
    a = rng(n, 4).standard_normal((n, n))
    a[:, n // 2 :] = a[:, : n - n // 2]
    return a


def _negative_zero(n: int) -> Matrix:
    a = np.diag(np.linspace(1, 2, n))
    return np.where(a == 0, -0.0, a)


# Beyond the documented set: entries over 36 decades at random. The interleaved host row does not
# pivot first and takes ten sweeps there; 7.2 ulp of sigma_1 were measured at n = 64.
KNOWN_SIGMA_ULP = {"mixed_scales": 10.0}


def sigma_bound(name: str) -> float:
    """The bound on the singular values of a named hard matrix, in ulp of the largest one."""
    return KNOWN_SIGMA_ULP.get(name, jml.ACC_SIGMA_ULP)


def hard_matrices(n: int) -> dict[str, Matrix]:
    """Named n x n matrices in float64, to be rounded to the dtype under test."""
    gauss = rng(n, 5).standard_normal((n, n))
    t = np.arange(n) / max(n - 1, 1)
    half = n // 2
    return {
        "zero": np.zeros((n, n)),
        "identity": np.eye(n),
        "one_entry": np.pad([[3.0]], ((n - 1, 0), (0, n - 1))),
        "zero_columns": _zero_columns(n),
        "zero_rows": _zero_columns(n).T,
        "ones": np.ones((n, n)),
        "rank_1": np.outer(rng(n, 6).standard_normal(n), rng(n, 7).standard_normal(n)),
        "duplicate_columns": _duplicates(n),
        "hilbert": _hilbert(n),
        "kahan": _kahan(n),
        "vandermonde": np.vander(np.linspace(-1, 1, n), increasing=True),
        "graded_rows": np.diag(10.0 ** (-15 * t)) @ gauss,
        "graded_columns": gauss @ np.diag(10.0 ** (-15 * t)),
        "graded_both": np.diag(10.0 ** (-8 * t)) @ gauss @ np.diag(10.0 ** (-8 * t[::-1])),
        "geometric_1e4": _spectrum(10.0 ** (-4 * t)),
        "geometric_1e6": _spectrum(10.0 ** (-6 * t)),
        "arithmetic_1e4": _spectrum(1 - t * (1 - 1e-4)),
        "arithmetic_1e6": _spectrum(1 - t * (1 - 1e-6)),
        "clusters": _spectrum(np.r_[np.ones(half), np.full(n - half, 1e-3)]),
        "near_clusters": _spectrum(
            np.r_[1 + 1e-7 * np.arange(half), 1e-3 * (1 + 1e-7 * np.arange(n - half))]
        ),
        "repeated": _spectrum(np.repeat([3.0, 2.0, 1.0], [n - 2 * (n // 3), n // 3, n // 3])),
        "orthogonal": _orthogonal(n, 8),
        "diagonal": np.diag(rng(n, 9).standard_normal(n)),
        "negative_zero": _negative_zero(n),
        "triangular": np.triu(gauss),
        "scaled_1e30": gauss * 1e30,
        "scaled_1e37": gauss * 1e37 / max(n, 4),
        "scaled_1e-30": gauss * 1e-30,
        "scaled_1e-37": gauss * 1e-37,
        "mixed_scales": gauss * 10.0 ** rng(n, 10).integers(-18, 18, (n, n)),
    }


# --- references ------------------------------------------------------------------------------


def reference_sigma(a: Matrix) -> Matrix:
    """Singular values by one-sided Jacobi in extended precision, high relative accuracy included.

    Shares no code with the package; LAPACK in float64 would not do for tiny singular values.
    """
    wide = np.clongdouble if np.iscomplexobj(a) else np.longdouble
    x = np.array(a, dtype=wide)
    if x.shape[0] < x.shape[1]:
        x = x.conj().T
    n = x.shape[1]
    if n == 0:
        return np.zeros(0, np.float64)
    # Pivoting first keeps the sweeps few where columns differ in scale.
    x = x[:, np.argsort(-np.abs(x).max(axis=0), kind="stable")]
    if n % 2:
        x = np.concatenate([x, np.zeros((x.shape[0], 1), wide)], axis=1)
    seats = np.arange(x.shape[1])
    half = len(seats) // 2
    eps = np.finfo(np.longdouble).eps
    for _ in range(60):
        worst = np.longdouble(0)
        top = np.sqrt((np.abs(x) ** 2).sum(0)).max()
        for _ in range(max(len(seats) - 1, 1)):
            p, q = seats[:half], seats[half:][::-1]
            cp, cq = x[:, p], x[:, q]
            aa, bb = (np.abs(cp) ** 2).sum(0), (np.abs(cq) ** 2).sum(0)
            g = (cp.conj() * cq).sum(0)
            size = np.abs(g)
            scale = np.sqrt(aa) * np.sqrt(bb)
            live = size > eps * scale
            # Rounding noise of a rank-deficient matrix need not become orthogonal.
            counted = live & (np.sqrt(np.minimum(aa, bb)) > 1e-25 * top)
            if counted.any():
                worst = max(worst, (size[counted] / scale[counted]).max())
            if live.any():
                zeta = (bb - aa) / (2 * np.where(live, size, 1))
                t = np.where(zeta < 0, -1, 1) / (np.abs(zeta) + np.sqrt(1 + zeta * zeta))
                t = np.where(live, t, 0)
                c = 1 / np.sqrt(1 + t * t)
                s = t * c
                phase = np.where(live, g / np.where(live, size, 1), 1)
                x[:, p] = c * cp - s * phase.conj() * cq
                x[:, q] = s * phase * cp + c * cq
            seats = np.r_[seats[:1], np.roll(seats[1:], 1)]
        if worst <= 16 * eps:
            break
    else:
        raise AssertionError("the reference did not converge")
    sigma = np.sqrt((np.abs(x) ** 2).sum(0))
    return np.sort(sigma)[::-1][:n]


def relative_sigma_ulp(s: Matrix, reference: Matrix) -> float:
    """Largest relative error of any singular value, in ulp of the singular value itself."""
    want = np.asarray(reference, np.longdouble)
    return float(np.max(np.abs(np.asarray(s, np.longdouble) - want) / want) / ulp(s.dtype))


# --- the verdict -----------------------------------------------------------------------------


def check_svd(
    a: Matrix,
    result: Any,
    *,
    reference: Matrix | None = None,
    full_matrices: bool = False,
    label: str = "",
) -> _measure.SvdRatios:
    """Asserts shapes, dtypes, order, sign, LAPACK's ratios and (with a reference) the sigmas."""
    u, s, vh = (np.asarray(x) for x in result)
    m, n = a.shape[-2:]
    k = min(m, n)
    ku, kv = (m, n) if full_matrices else (k, k)
    assert u.shape == (*a.shape[:-2], m, ku), label
    assert s.shape == (*a.shape[:-2], k), label
    assert vh.shape == (*a.shape[:-2], kv, n), label
    assert u.dtype == vh.dtype == a.dtype, label
    assert s.dtype == a.real.dtype, label
    assert np.all(s >= 0), f"{label}: negative"
    assert np.all(np.diff(s, axis=-1) <= 0), f"{label}: not sorted"
    ratios = svd_ratios(a, u, s, vh)
    assert max(ratios) < jml.ACC_RATIO, f"{label}: {ratios}"
    if reference is not None:
        error = sigma_error_ulp(s, reference)
        assert error < sigma_bound(label.split(" ")[0]), f"{label}: sigma {error} ulp"
    return ratios


def lowered_text(f: Callable[..., Any], *args: Any) -> str:
    """StableHLO of a jitted function."""
    # A new function each time: options from the environment are not part of jit's cache key.
    return str(jax.jit(lambda *xs: f(*xs)).lower(*args).as_text())
