"""``doctor``: what is present, what is missing and how to get it, and whether what is here works.

Every check runs a primitive for real and judges the result by LAPACK's test ratios or against
double precision; it passes only if the code that ``explain`` names is in the compiled program.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from jaxmetal_linalg import _device, _measure, _native
from jaxmetal_linalg._accuracy import (
    ACC_GEMV_OUT_EPS,
    ACC_GEMV_SUM_EPS,
    ACC_RATIO,
    ACC_RSVD_OPTIMAL,
    ACC_SIGMA_ULP,
)
from jaxmetal_linalg._explain import explain
from jaxmetal_linalg._portable import finfo
from jaxmetal_linalg.lanczos import lanczos_svd
from jaxmetal_linalg.primitives.gemv import gemv
from jaxmetal_linalg.primitives.qr import qr
from jaxmetal_linalg.primitives.rsvd import rsvd
from jaxmetal_linalg.primitives.svd import svd, svdvals

PLUGINS = ("jax-metal", "jax-mps", "jax-cuda12-plugin", "jax-cuda13-plugin")


@dataclass(frozen=True)
class Check:
    """One thing that was run: on which device, by which route, how well."""

    op: str
    device: str
    name: str
    route: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """What ``doctor`` found; ``str`` is its text, ``ok`` its verdict.

    Attributes:
      machine: hardware and versions.
      library: what the native library says of itself, or its ``error``.
      ffi_api: FFI API versions, of the library and of the installed jaxlib.
      devices: per device, ``""`` if it can be used, else what is missing and how to get it.
      plugins: installed JAX plugins with their versions, and JAX's own platform.
      checks: one self-check per op, device and transformation.
    """

    machine: dict[str, Any]
    library: dict[str, Any]
    ffi_api: dict[str, str]
    devices: dict[str, str]
    plugins: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether the native library works and every check passed."""
        return "error" not in self.library and all(c.ok for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        m, lib = self.machine, self.library
        lines = [
            f"machine   {m['cpu']}, {m['cores']} cores, {m['system']}",
            f"versions  Python {m['python']}, jax {m['jax']}, jaxlib {m['jaxlib']}, "
            f"numpy {m['numpy']}",
            "platform  " + ", ".join(f"{k} {v}" for k, v in self.plugins.items()),
            f"library   {lib['path']}",
        ]
        if "error" in lib:
            lines.append(f"          MISSING: {lib['error']}")
        if "isa" in lib:
            compiled = ", ".join(lib["isa"]["compiled"])
            lines.append(
                f"          version {lib['version']}, compiler {lib['compiler']}, instruction set "
                f"{lib['isa']['active']} (compiled: {compiled})"
            )
        lines.append(
            f"FFI API   library {self.ffi_api['library']}, jaxlib {self.ffi_api['jaxlib']}"
        )
        lines += ["", "devices"]
        for name, missing in self.devices.items():
            lines.append(f"  {name:<6} " + (f"absent: {missing}" if missing else "usable"))
        lines += ["", f"self-checks (LAPACK test ratios, bound {ACC_RATIO:g})"]
        for c in self.checks:
            verdict = "ok  " if c.ok else "FAIL"
            lines.append(
                f"  {verdict} {c.op:<11} {c.device:<5} {c.name:<24} {c.route:<18} {c.detail}"
            )
        failed = sum(not c.ok for c in self.checks)
        if self.ok:
            verdict = f"ok: {len(self.checks)} checks passed"
        elif failed:
            verdict = f"NOT OK: {failed} of {len(self.checks)} checks failed"
        else:
            verdict = "NOT OK: the native library is missing"
        return "\n".join([*lines, "", verdict])


def doctor(devices: Sequence[str] | None = None) -> Report:
    """Looks at this installation and runs every op on every device that can be used.

    Args:
      devices: those to run the ops on, as ``devices()`` lists them; all if None.

    Returns:
      A ``Report``. ``.ok`` is true only if the native library works and each check passed.

    Raises:
      ValueError: a name that is no device's.
      DeviceUnavailableError: one of ``devices`` is absent here.
    """
    for name in devices or ():
        _device.check(name, "doctor: argument devices")
    # With no device usable but xla, the checks still run there: they say what is left.
    chosen = _device.devices() if devices is None else devices
    return Report(
        machine=_measure.machine(),
        library=_native.describe(),
        ffi_api={"library": _library_ffi_api(), "jaxlib": _jaxlib_ffi_api()},
        devices={n: _device.why_absent(n) for n in _device.NAMES if n != "auto"},
        plugins=_plugins(),
        checks=tuple(c for device in chosen for c in _checks(device)),
    )


def _library_ffi_api() -> str:
    version = _native.describe().get("ffi_api")
    return ".".join(map(str, version)) if version else "none"


def _jaxlib_ffi_api() -> str:
    """From the C header that jaxlib ships; jaxlib offers no other way to ask."""
    header = Path(jaxlib.__file__).parent / "include/xla/ffi/api/c_api.h"
    if not header.exists():
        return "unknown"
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header.read_text()))
    return f"{found.get('MAJOR', '?')}.{found.get('MINOR', '?')}"


def _plugins() -> dict[str, str]:
    found = {"jax backend": jax.default_backend()}
    for name in PLUGINS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# --- checks: one function per op, yielding a Check per transformation -------------------------


# Too long for a quick look: in the simulator to run, in plain XLA to compile.
SLOW = {
    "sim": ("jit 4x150x200",),
    "xla": ("jit 40x24", "jit 2x50x36", "vmap(vmap) 3x5x16x16", "jit 90x12", "jit 64x16x16"),
}


def _checks(device: str) -> Iterator[Check]:
    for op, run in _BY_OP.items():
        for name, check in run().items():
            if name in SLOW.get(device, ()):
                continue
            with _device.arrays_for(device):
                try:
                    route, ok, detail = check(device)
                except Exception as e:  # any failure at all is a finding, not a crash of the doctor
                    route, ok, detail = "", False, f"{type(e).__name__}: {e}".splitlines()[0]
            yield Check(op, device, name, route, ok, detail)


Outcome = tuple[str, bool, str]


def _matrices(*shape: int, dtype: Any = np.float32) -> jax.Array:
    rng = np.random.default_rng(7)
    a = rng.standard_normal(shape)
    if np.dtype(dtype).kind == "c":
        a = a + 1j * rng.standard_normal(shape)
    return jnp.asarray(a.astype(dtype))


def _run(f: Callable[..., Any], a: jax.Array, device: str) -> tuple[str, str, Any]:
    """Compiles and runs ``f(a)``.

    Returns: route and variant that explain promises, what contradicts it, and the result.
    """
    # A composite is listed before the calls that it consists of; the first of those is judged.
    calls = explain(f, a).calls
    call = next(c for c in calls if c.route != "composite")
    route = "/".join(x for x in (call.route, call.variant) if x)
    compiled = jax.jit(f).lower(a).compile()
    wrong = ""
    if call.device != device:
        wrong = f"ran on {call.device}, not {device}"
    elif call.route in ("host", "kernel"):
        target = _target(call.op)
        if target not in (compiled.as_text() or ""):
            wrong = f"{target} is not in the compiled program"
    before = _native.launches()
    result = jax.block_until_ready(compiled(a))
    if call.route == "kernel" and not wrong:
        launched = [k for k, n in _native.launches().items() if n > before.get(k, 0)]
        # rsvd has one row, whose kernels do not bear its name.
        row = "rsvd_" if call.op == "rsvd" else f"_{call.variant}_"
        if not any(row in k for k in launched):
            wrong = f"no kernel of row {call.variant} was launched"
    return route, wrong, result


def _target(op: str) -> str:
    """The custom call of a primitive."""
    return f"jml_{op}_v1"


def _outcome(route: str, ok: bool, detail: str, wrong: str) -> Outcome:
    return route, ok and not wrong, "; ".join(x for x in (detail, wrong) if x)


def _judge(f: Callable[..., Any], a: jax.Array, device: str) -> Outcome:
    """Judges ``f(a) -> (u, s, vh)`` by its ratios and its route."""
    route, wrong, result = _run(f, a, device)
    ratios = _measure.svd_ratios(a, *result)
    detail = (
        f"residual {ratios.residual:.2f}, orthogonality U {ratios.orthogonality_u:.2f}, "
        f"V {ratios.orthogonality_v:.2f}"
    )
    return _outcome(route, max(ratios) < ACC_RATIO, detail, wrong)


def _thin(a: Any) -> Any:
    return svd(a, full_matrices=False)


def _check_svd() -> dict[str, Callable[[str], Outcome]]:
    deficient = _matrices(4, 12, 3) @ _matrices(4, 3, 10)
    return {
        "jit 64x8x8": lambda d: _judge(_thin, _matrices(64, 8, 8), d),
        "jit 40x24": lambda d: _judge(_thin, _matrices(40, 24), d),
        "jit 2x50x36": lambda d: _judge(_thin, _matrices(2, 50, 36), d),
        "jit 4x150x200": lambda d: _judge(_thin, _matrices(4, 150, 200), d),
        "full 5x9x6": lambda d: _judge(svd, _matrices(5, 9, 6), d),
        "complex64 8x7x7": lambda d: _judge(_thin, _matrices(8, 7, 7, dtype=np.complex64), d),
        "complex64 2x40x34": lambda d: _judge(svd, _matrices(2, 40, 34, dtype=np.complex64), d),
        "rank 3 of 4x12x10": lambda d: _judge(svd, deficient, d),
        "vmap(vmap) 3x5x16x16": lambda d: _judge(
            jax.vmap(jax.vmap(_thin)), _matrices(3, 5, 16, 16), d
        ),
        "grad 6x8x8": _check_gradient,
        "NaN stays in its matrix": _check_nan,
    }


def _check_gradient(device: str) -> Outcome:
    """The gradient of the best rank-2 approximation's energy, against finite differences."""
    a = _matrices(6, 8, 8)
    weight = _matrices(8, 8)

    def rank_two(x: Any) -> Any:
        u, s, vh = svd(x, full_matrices=False)
        return jnp.vdot(weight, (u[..., :, :2] * s[..., None, :2]) @ vh[..., :2, :])

    def loss(x: Any) -> Any:
        return jax.vmap(rank_two)(x).sum()

    route, wrong, result = _run(jax.grad(loss), a, device)
    gradient = np.float64(result)
    # The same function in double precision by NumPy, differentiated by central differences.
    direction = np.float64(_matrices(7, 6, 8, 8)[6])

    def double(x: Any) -> float:
        u, s, vh = np.linalg.svd(x, full_matrices=False)
        low = (u[..., :, :2] * s[..., None, :2]) @ vh[..., :2, :]
        return float((np.float64(weight) * low).sum())

    wide, step = np.float64(a), 1e-5
    numeric = (double(wide + step * direction) - double(wide - step * direction)) / (2 * step)
    error = abs(float((gradient * direction).sum()) - numeric) / max(abs(numeric), 1.0)
    detail = f"relative error {error:.1e} against differences in double"
    return _outcome(route, error < 1e-3, detail, wrong)


def _check_nan(device: str) -> Outcome:
    a = _matrices(3, 8, 8).at[1, 2, 3].set(jnp.nan)
    route, wrong, result = _run(lambda x: svd(x, full_matrices=False, return_info=True), a, device)
    (u, s, vh), info = result
    bad = all(bool(jnp.isnan(x[1]).all()) for x in (u, s, vh))
    good = all(bool(jnp.isfinite(x[jnp.array([0, 2])]).all()) for x in (u, s, vh))
    status = np.asarray(info.status).tolist()
    return _outcome(route, bad and good and status == [0, 3, 0], f"status {status}", wrong)


def _check_svdvals() -> dict[str, Callable[[str], Outcome]]:
    return {
        "jit 64x16x16": lambda d: _check_values(_matrices(64, 16, 16), d),
        "jit 400x12": lambda d: _check_values(_matrices(400, 12), d),
        "jit 90x12": lambda d: _check_values(_matrices(90, 12), d),
    }


def _check_values(a: jax.Array, device: str) -> Outcome:
    route, wrong, s = _run(svdvals, a, device)
    error = _measure.sigma_error_ulp(s, np.linalg.svd(np.float64(a), compute_uv=False))
    detail = f"within {error:.2f} ulp of sigma 1 (bound {ACC_SIGMA_ULP:g})"
    return _outcome(route, error < ACC_SIGMA_ULP, detail, wrong)


def _check_gemv() -> dict[str, Callable[[str], Outcome]]:
    def several(a: Any) -> Any:
        return gemv(a, _matrices(5, 130), activation="silu", bias=_matrices(40))

    return {
        "float32 70x130": lambda d: _check_product(jnp.float32, d),
        "bfloat16 70x130": lambda d: _check_product(jnp.bfloat16, d),
        "5 vectors, bias, silu": lambda d: _check_epilogue(several, _matrices(40, 130), d),
        "grad 40x130": lambda d: _check_product_gradient(d),
    }


def _check_product(dtype: Any, device: str) -> Outcome:
    a, x = _matrices(70, 130).astype(dtype), _matrices(130).astype(dtype)
    route, wrong, out = _run(lambda a: gemv(a, x), a, device)
    wide, vector = _measure.widen(a), _measure.widen(x)
    eps = ACC_GEMV_OUT_EPS * float(finfo(dtype).eps) + ACC_GEMV_SUM_EPS * 130 * 2.0**-23
    error = np.abs(_measure.widen(out) - wide @ vector) / (np.abs(wide) @ np.abs(vector))
    share = float(error.max() / eps)
    return _outcome(route, share <= 1, f"error {share:.2f} of the documented bound", wrong)


def _check_epilogue(f: Callable[[Any], Any], a: jax.Array, device: str) -> Outcome:
    route, wrong, out = _run(f, a, device)
    z = _measure.widen(_matrices(5, 130)) @ _measure.widen(a).T + _measure.widen(_matrices(40))
    error = float(np.abs(_measure.widen(out) - z / (1 + np.exp(-z))).max())
    return _outcome(route, error < 1e-4, f"largest error {error:.1e}", wrong)


def _check_product_gradient(device: str) -> Outcome:
    a, x = _matrices(40, 130), _matrices(130)
    route, wrong, gradient = _run(jax.grad(lambda a: (gemv(a, x) ** 2).sum() / 2), a, device)
    wide, vector = _measure.widen(a), _measure.widen(x)
    want = np.outer(wide @ vector, vector)
    error = float(np.linalg.norm(_measure.widen(gradient) - want) / np.linalg.norm(want))
    return _outcome(route, error < 1e-5, f"relative error {error:.1e}", wrong)


def _check_qr() -> dict[str, Callable[[str], Outcome]]:
    return {
        "jit 64x8x8": lambda d: _judge_qr(_matrices(64, 8, 8), d),
        "jit 500x12": lambda d: _judge_qr(_matrices(500, 12), d),
        "rank 3 of 4x12x10": lambda d: _judge_qr(_matrices(4, 12, 3) @ _matrices(4, 3, 10), d),
    }


def _judge_qr(a: jax.Array, device: str) -> Outcome:
    route, wrong, (q, r) = _run(qr, a, device)
    ratios = _measure.qr_ratios(a, q, r)
    detail = f"residual {ratios.residual:.2f}, orthogonality {ratios.orthogonality:.2f}"
    return _outcome(route, max(ratios) < ACC_RATIO, detail, wrong)


def _decaying() -> jax.Array:
    """120x90 with singular values 1/i."""
    u, _, vh = np.linalg.svd(np.float64(_matrices(120, 90)), full_matrices=False)
    return jnp.asarray((u / np.arange(1, 91)) @ vh, jnp.float32)


def _check_rsvd() -> dict[str, Callable[[str], Outcome]]:
    return {
        "rank 10 of 120x90": _check_low_rank,
        "grad 120x90": _check_low_rank_gradient,
    }


def _check_low_rank(device: str) -> Outcome:
    a = _decaying()
    route, wrong, (result, bound) = _run(lambda x: rsvd(x, 10, return_error=True), a, device)
    u, s, vh = map(_measure.widen, result)
    error = float(np.linalg.norm(np.float64(a) - (u * s) @ vh, 2))
    ratios = _measure.svd_ratios(a, *result)
    ok = error <= ACC_RSVD_OPTIMAL / 11 and error <= bound
    ok = ok and max(ratios.orthogonality_u, ratios.orthogonality_v) < ACC_RATIO
    return _outcome(route, ok, f"error {11 * error:.4f} of the best, certified {bound:.4f}", wrong)


def _check_low_rank_gradient(device: str) -> Outcome:
    """Against the derivative of the full decomposition, residual term included."""
    a, weight = _decaying(), _matrices(120, 90)

    def loss(result: Any) -> Any:
        u, s, vh = result
        return jnp.vdot(weight, (u[:, :4] * s[None, :4]) @ vh[:4])

    route, wrong, gradient = _run(jax.grad(lambda x: loss(rsvd(x, 4))), a, device)
    with _device.use_device("xla"):
        want = jax.grad(lambda x: loss(svd(x, full_matrices=False)))(a)
    error = float(jnp.linalg.norm(gradient - want) / jnp.linalg.norm(want))
    return _outcome(route, error < 1e-3, f"relative difference {error:.1e} from svd's", wrong)


def _check_lanczos() -> dict[str, Callable[[str], Outcome]]:
    return {"rank 5 of 120x90": _check_lanczos_array}


def _check_lanczos_array(device: str) -> Outcome:
    a = _decaying()
    route, wrong, (result, info) = _run(lambda x: lanczos_svd(x, 5, return_info=True), a, device)
    error = _measure.sigma_error_ulp(result.S, 1 / np.arange(1.0, 6))
    ratios = _measure.svd_ratios(a, *result)
    ok = error < 10 and bool(info.converged)
    ok = ok and max(ratios.orthogonality_u, ratios.orthogonality_v) < ACC_RATIO
    detail = f"within {error:.2f} ulp of sigma 1, {int(info.products)} products"
    return _outcome(route, ok, detail, wrong)


_BY_OP: dict[str, Callable[[], dict[str, Callable[[str], Outcome]]]] = {
    "svd": _check_svd,
    "svdvals": _check_svdvals,
    "gemv": _check_gemv,
    "qr": _check_qr,
    "rsvd": _check_rsvd,
    "lanczos_svd": _check_lanczos,
}
