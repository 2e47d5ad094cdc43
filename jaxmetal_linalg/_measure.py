"""What doctor, demo, benchmarks and tests all measure: LAPACK's test ratios, time, and the machine.

The judging is NumPy in double precision and shares no code with what it judges.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray


class SvdRatios(NamedTuple):
    """LAPACK's test ratios (sdrvbd.f), the worst of a batch; NaN anywhere counts as infinity."""

    residual: float  # |A - U S Vh| / (|A| max(m, n) ulp)
    orthogonality_u: float  # |I - U^H U| / (m ulp)
    orthogonality_v: float  # |I - V^H V| / (n ulp)


def ulp(dtype: Any) -> float:
    """Spacing of numbers just above 1 in the computing dtype; half types compute in float32."""
    double = np.dtype(dtype) in (np.dtype(np.float64), np.dtype(np.complex128))
    return 2.0**-52 if double else 2.0**-23


def widen(a: ArrayLike) -> NDArray[Any]:
    """The same numbers in double precision."""
    x = np.asarray(a)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def _worst(x: NDArray[Any]) -> float:
    if x.size == 0:
        return 0.0
    return float(np.max(x)) if np.all(np.isfinite(x)) else float("inf")


def _norm1(x: NDArray[Any]) -> NDArray[Any]:
    if 0 in x.shape[-2:]:
        return np.zeros(x.shape[:-2])
    return np.asarray(np.abs(x).sum(axis=-2).max(axis=-1))


def svd_ratios(a: ArrayLike, u: ArrayLike, s: ArrayLike, vh: ArrayLike) -> SvdRatios:
    """LAPACK's test ratios of a singular value decomposition, in the 1-norm.

    Args:
      a: ``[..., m, n]``; its dtype sets the ulp.
      u: ``[..., m, k]`` or ``[..., m, m]``.
      s: ``[..., k]``.
      vh: ``[..., k, n]`` or ``[..., n, n]``.
    """
    eps = ulp(np.asarray(a).dtype)
    aa, uu, ss, vv = widen(a), widen(u), widen(s), widen(vh)
    m, n = aa.shape[-2:]
    k = ss.shape[-1]
    with np.errstate(all="ignore"):
        error = _norm1(aa - (uu[..., :, :k] * ss[..., None, :]) @ vv[..., :k, :])
        scale = _norm1(aa) * max(m, n, 1) * eps
        # A zero matrix has no scale: its error must be zero itself.
        residual = np.where(scale > 0, error / np.where(scale > 0, scale, 1.0), error / eps)
        gram_u = np.swapaxes(uu.conj(), -1, -2) @ uu
        gram_v = vv @ np.swapaxes(vv.conj(), -1, -2)
        ortho_u = _norm1(gram_u - np.eye(gram_u.shape[-1])) / (max(m, 1) * eps)
        ortho_v = _norm1(gram_v - np.eye(gram_v.shape[-1])) / (max(n, 1) * eps)
    return SvdRatios(_worst(residual), _worst(ortho_u), _worst(ortho_v))


class QrRatios(NamedTuple):
    """LAPACK's test ratios (sqrt01.f), the worst of a batch; NaN anywhere counts as infinity."""

    residual: float  # |A - Q R| / (|A| max(m, n) ulp)
    orthogonality: float  # |I - Q^H Q| / (m ulp)


def qr_ratios(a: ArrayLike, q: ArrayLike, r: ArrayLike) -> QrRatios:
    """LAPACK's test ratios of a QR decomposition, in the 1-norm.

    Args:
      a: ``[..., m, n]``; its dtype sets the ulp.
      q: ``[..., m, j]``.
      r: ``[..., j, n]``.
    """
    eps = ulp(np.asarray(a).dtype)
    aa, qq, rr = widen(a), widen(q), widen(r)
    m, n = aa.shape[-2:]
    with np.errstate(all="ignore"):
        error = _norm1(aa - qq @ rr)
        scale = _norm1(aa) * max(m, n, 1) * eps
        # A zero matrix has no scale: its error must be zero itself.
        residual = np.where(scale > 0, error / np.where(scale > 0, scale, 1.0), error / eps)
        gram = np.swapaxes(qq.conj(), -1, -2) @ qq
        ortho = _norm1(gram - np.eye(gram.shape[-1])) / (max(m, 1) * eps)
    return QrRatios(_worst(residual), _worst(ortho))


def sigma_error_ulp(s: ArrayLike, reference: ArrayLike) -> float:
    """Largest error of any singular value, in ulp of the largest one of its matrix."""
    eps = ulp(np.asarray(s).dtype)
    got, want = widen(s), widen(reference)
    if got.size == 0:
        return 0.0
    top = np.where(want[..., :1] > 0, want[..., :1], 1.0)
    return _worst(np.abs(got - want) / (top * eps))


SETTLE_S = 0.12
BUSY_S = 0.1


class Timing(NamedTuple):
    """First call (tracing and compiling included) and the warm repeats, in milliseconds."""

    cold_ms: float
    warm_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return float(np.median(self.warm_ms))


def _once_ms(function: Callable[..., Any], args: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return (time.perf_counter() - start) * 1e3


def turn_ms(call_ms: float) -> float:
    """What one turn of ``interleaved`` takes a function whose calls take ``call_ms``."""
    return 1e3 * SETTLE_S + max(1e3 * BUSY_S, call_ms) + call_ms


def interleaved(
    functions: Sequence[Callable[..., Any]], args: tuple[Any, ...], repeats: int
) -> list[Timing]:
    """Times functions in turn, A B A B, so that the machine's drift meets all of them alike.

    A pause before each warm call lets a peer's threads go to sleep: OpenBLAS's spin for up to
    0.1 s after a call, on the cores that the next function needs. The function then runs untimed
    for ``BUSY_S``, because virtual processors that slept may share one core until they are busy:
    calls after a pause take anything from 1 to 2.3 times as long.
    """
    cold = [_once_ms(f, args) for f in functions]
    warm: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for times, function in zip(warm, functions, strict=True):
            time.sleep(SETTLE_S)
            start = time.perf_counter()
            while time.perf_counter() - start < BUSY_S:
                jax.block_until_ready(function(*args))
            times.append(_once_ms(function, args))
    return [Timing(c, tuple(w)) for c, w in zip(cold, warm, strict=True)]


def machine() -> dict[str, Any]:
    """The hardware and the versions that a measurement belongs to."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
                break
    system = f"{platform.system()} {platform.machine()}"
    if sys.platform == "darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        cpu = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        system += f", macOS {platform.mac_ver()[0]}"
    return {
        "cpu": cpu,
        "cores": usable_cores(),
        "system": system,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
    }


def usable_cores() -> int:
    """Cores this process may run on, which is what XLA's thread pool is made of."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
