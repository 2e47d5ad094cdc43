"""What tests share: hard matrices, extended precision, the verdict, and mutants of kernels."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmetal_linalg as jml
from jaxmetal_linalg import _measure, _native
from jaxmetal_linalg._measure import sigma_error_ulp, svd_ratios, ulp
from tools.msl import nvrtc
from tools.msl.emit import emit_cuda, emit_sim
from tools.msl.layout import Dispatch
from tools.msl.lexer import MslError
from tools.msl.parse import Unit, parse_file
from tools.msl.simulate import ROOT, CompileError, Finding, Simulator, workshop

__all__ = ["check_svd", "hard_matrices", "random_matrix", "reference_sigma", "relative_sigma_ulp"]

Matrix = np.ndarray[Any, Any]


@functools.cache
def shipped() -> Simulator:
    """The native library's simulator: every kernel of kernels/, judged and only run."""
    library = _native.library_path()
    built = library.read_bytes()
    for file in sorted((ROOT / "kernels").glob("*.metal")):
        name = f"kernels/{file.name}"
        # What it gives to NVRTC tells what it was built from.
        same = emit_cuda(parse_file(file, name)).encode() in built
        assert same, f"{library} was built from another {name}: `make install` builds it again"
    return Simulator(ctypes.CDLL(str(library)))


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
        "scaled_2^-24": gauss * 2.0**-24,
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


def launching(f: Callable[..., Any], *args: Any) -> tuple[Any, dict[str, int]]:
    """The result of ``f(*args)`` and what it launches, by kernel."""
    before = _native.launches()
    out = jax.block_until_ready(f(*args))
    after = _native.launches()
    return out, {k: n - before.get(k, 0) for k, n in after.items() if n > before.get(k, 0)}


def launched(f: Callable[[], Any]) -> dict[str, int]:
    """What ``f()`` launches, by kernel."""
    return launching(f)[1]


def python(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, at the root of the repository."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def arrays_platform() -> str:
    """Where JAX puts new arrays, by the name that lowering has for it."""
    platform: str = jnp.zeros(()).device.platform
    return "cuda" if platform == "gpu" else platform


def lowered_text(f: Callable[..., Any], *args: Any) -> str:
    """StableHLO of a jitted function."""
    # A new function each time: options from the environment are not part of jit's cache key.
    return str(jax.jit(lambda *xs: f(*xs)).lower(*args).as_text())


# --- kernels/<stem>.metal --------------------------------------------------------------------

# CI compiles for all of them (.ci/run), each of which takes as long as a hundred other tests.
each_architecture = pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=[] if a == "sm_90" else pytest.mark.slow) for a in nvrtc.ARCHITECTURES],
)


# --- mutants of kernels/<stem>.metal ---------------------------------------------------------


def code_lines(source: str, start: int) -> Iterator[tuple[int, int, str]]:
    """Line number, offset and text of each line of kernel code, without comments."""
    offset = 0
    for number, row in enumerate(source.split("\n"), 1):
        if offset >= start:
            yield number, offset, row.split("//")[0]
        offset += len(row) + 1


def comparisons(row: str) -> Iterator[tuple[re.Match[str], str]]:
    for m in re.finditer(r" <=? (?!0\.)", row):
        if "<<" not in row and "template" not in row:
            yield m, " <= " if m[0] == " < " else " < "


def mutants_of(
    source: str,
    start: int,
    bounds: Callable[[str], Iterable[tuple[re.Match[str], str]]] = comparisons,
    *,
    once: bool = False,
) -> dict[str, str]:
    """Changed sources by name: every barrier, every bound, every address space from ``start`` on.

    ``bounds`` finds what compares sizes in a line, and what it turns into. With ``once``, of the
    same declaration in several kernels one is changed.
    """
    found: dict[str, str] = {}

    def put(kind: str, number: int, start: int, end: int, text: str) -> None:
        name = f"{kind}:{number}"
        while name in found:
            name += "+"
        found[name] = source[:start] + text + source[end:]

    spaces: set[str] = set()
    for number, offset, row in code_lines(source, start):
        for m in re.finditer(r"\w+_barrier\(mem_flags::[^)]+\);", row):
            put("barrier", number, offset + m.start(), offset + m.end(), ";")
        for m, other in bounds(row):
            put("bound", number, offset + m.start(), offset + m.end(), other)
        for m in re.finditer(r"\b(device|threadgroup)(?= (const )?\w+\*( \w+)?)", row):
            declaration = row[m.start() : m.end(3)]
            if once and (not m[3] or declaration in spaces):
                continue
            spaces.add(declaration)
            other = "threadgroup" if m[1] == "device" else "device"
            put("space", number, offset + m.start(), offset + m.end(), other)
    return found


def mutant_line(name: str) -> int:
    return int(name.split(":")[1].rstrip("+"))


def line_pairs(source: str) -> list[tuple[str, str]]:
    """Each line and the one after it: what tells an equivalent mutant."""
    return list(pairwise(row.strip() for row in source.split("\n")))


def part_of(unit: Unit, wanted: Callable[[str], bool]) -> Unit:
    """The kernels that are wanted, by name."""
    return dataclasses.replace(unit, instances=[i for i in unit.instances if wanted(i.host_name)])


def launch_steps(
    sim: Simulator,
    steps: Iterable[Dispatch],
    memory: Mapping[str, np.ndarray],
    params: Callable[[Any], ctypes.Structure],
    less: Callable[[str], int] = lambda kernel: 0,
    **options: Any,
) -> list[Finding]:
    """The dispatches of a plan, as far as they are clean. ``less``: bytes taken from a kernel."""
    findings: list[Finding] = []
    for step in steps:
        findings = sim.launch(
            step.kernel,
            grid=step.groups,
            threads=step.threads,
            buffers={i: memory[name] for i, name in enumerate(step.buffers)},
            params=(len(step.buffers), params(step)),
            threadgroup_bytes=[b - less(step.kernel) for b in step.threadgroup_bytes],
            **options,
        )
        if findings:
            break
    return findings


def kernels_by_line(source: str, unit: Unit) -> Callable[[int], tuple[str, ...]]:
    """For a line of code, the kernels whose text it is in: its function's and its users'."""
    blocks: list[tuple[int, str]] = []  # last line of a definition, and its text
    text, depth, directive = "", 0, False
    for number, row in enumerate(source.split("\n"), 1):
        directive = directive or row.startswith("#")
        if directive:
            directive = row.endswith("\\")
            continue
        row = row.partition("//")[0]
        text += row + "\n"
        depth += row.count("{") - row.count("}")
        if depth == 0 and row.rstrip().endswith(("}", ";")):
            blocks.append((number, text))
            text = ""
    # A function's name stands before the first parenthesis, a constant's before the first "=".
    heads = [re.sub(r"\[\[.*?\]\]|template <[^{]*?>(?=\s)", "", text) for _, text in blocks]
    names = ["".join(re.findall(r"(\w+)(?:\[\w+\])?\s*[({=]", head)[:1]) for head in heads]
    words = [set(re.findall(r"\w+", text)) for _, text in blocks]
    functions: dict[str, list[str]] = {}
    for i in unit.instances:
        functions.setdefault(i.function.name, []).append(i.host_name)

    def kernels(line: int) -> tuple[str, ...]:
        reached: set[str] = set()
        new = {names[next(i for i, (last, _) in enumerate(blocks) if line <= last)]}
        while new:
            reached |= new
            new = {n for n, w in zip(names, words, strict=True) if w & new} - reached
        return tuple(k for name in reached for k in functions.get(name, ()))

    return kernels


def build_mutant(stem: str, text: str, kernels: Collection[str]) -> Path | str:
    """The library of some kernels of a mutant, or who refused it: generator or compiler."""
    try:
        unit = parse_file(ROOT / "kernels" / f"{stem}.metal", f"kernels/{stem}.metal", text)
        unit = part_of(unit, lambda name: name in kernels)
        return workshop().build(emit_sim(unit, checked=True), optimize="-O0")
    except MslError:
        return "generator"
    except CompileError:
        return "compiler"


def caught_by(built: Path | str, trial: Callable[[], str | None]) -> str | None:
    """What caught the mutant: generator, compiler or the trial of its library; None if nothing.

    The trial has a process of its own: a mutant may end it, or never end.
    """
    if isinstance(built, str):
        return built
    outcome, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads: the child uses none
        child = os.fork()
    if child == 0:
        signal.alarm(300)
        try:
            ctypes.CDLL(str(built))
            text = trial() or "nothing"
        except BaseException as e:
            text = f"error {e!r}"
        os.write(write, text.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(outcome) as f:
        text = f.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        return "crash"
    assert not text.startswith("error"), text
    return None if text == "nothing" else text


Kernels: TypeAlias = tuple[str, ...]


def check_mutants_of_kernels(
    stem: str,
    every: Mapping[str, str],
    source: str,
    unit: Unit,
    trial: Callable[[Kernels], str | None],
    equivalent: Collection[tuple[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``check_mutants``, each in the kernels of ``unit`` that its line is in, which are tried.

    The others are as they are, and the source passes.
    """
    barriers = {"barrier"} if "_barrier(" in source else set()
    assert {k.split(":")[0] for k in every} == {"bound", "space"} | barriers
    workshop().load(unit)
    of_line = kernels_by_line(source, unit)
    kernels = {name: of_line(mutant_line(name)) for name in every}

    def build(name: str) -> Path | str:
        return build_mutant(stem, every[name], kernels[name])

    def caught(name: str, built: Path | str) -> str | None:
        return caught_by(built, lambda: trial(kernels[name]))

    check_mutants(every, source, build, caught, equivalent, capsys)
    whole = tuple(i.host_name for i in unit.instances)
    assert caught_by(build_mutant(stem, source, whole), lambda: trial(whole)) is None


def check_mutants(
    names: Iterable[str],
    source: str,
    build: Callable[[str], Path | str],
    caught: Callable[[str, Path | str], str | None],
    equivalent: Collection[tuple[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Builds every mutant and asserts that what is not caught is known to change nothing."""
    names = list(names)
    pairs = line_pairs(source)
    workshop()  # built before two threads ask for it
    survivors: list[str] = []
    by: dict[str, int] = {}
    with ThreadPoolExecutor(2) as pool:
        for name, built in zip(names, pool.map(build, names), strict=True):
            what = caught(name, built)
            pair = pairs[mutant_line(name) - 1]
            if what is None and pair not in equivalent:
                survivors.append(f"{name} {pair[0]} // {pair[1]}")
            by[str(what)] = by.get(str(what), 0) + 1
    with capsys.disabled():
        print(f"\n{len(names)} mutants caught by: {by}")
    assert not survivors, "\n".join(survivors)
