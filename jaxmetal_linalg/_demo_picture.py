"""The demo's picture: six panels drawn from what ``_demo.run`` found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from jaxmetal_linalg._demo import KINDS, STORED, Array, Results, of_kind, psnr

INK, GREY, ACCENT = "#1b1f24", "#9aa3ad", "#c2410c"
PALETTE = ("#1d4ed8", "#38bdf8", "#0f766e", "#7c3aed", "#c2410c", "#f59e0b")


def draw(results: Results, path: Path) -> None:
    """Draws the six panels into a PNG."""
    style: Any = {
        "font.size": 9,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(15, 7.8), dpi=92, layout="constrained")
        axes = figure.subplots(2, 3, width_ratios=(1.55, 1, 1))
        _draw_compressed(axes[0, 0], results)
        _draw_curves(axes[0, 1], results)
        _draw_times(axes[0, 2], results)
        _draw_denoised(axes[1, 0], results)
        _draw_steps(axes[1, 1], results)
        _draw_spectra(axes[1, 2], results)
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.12, h_pad=0.12)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _draw_images(axis: Any, images: dict[str, Array]) -> None:
    """Images side by side in one panel, each with its caption below."""
    gap = 10
    x = 0
    for caption, image in images.items():
        h, w = image.shape[:2]
        axis.imshow(
            np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1, extent=(x, x + w, h, 0),
            interpolation="nearest",
        )  # fmt: skip
        axis.text(x + w / 2, h + 6, caption, ha="center", va="top", fontsize=8)
        x += w + gap
    axis.set(xlim=(0, x - gap), ylim=(h + 24, 0))
    axis.axis("off")
    axis.set_anchor("N")


def _draw_compressed(axis: Any, r: Results) -> None:
    crop = (slice(40, 330), slice(130, 350))
    best = max(r.compressed, key=lambda name: psnr(r.compressed[name], r.photo))
    shown = {"original": r.photo[crop]}
    for name in dict.fromkeys(("whole photograph", best)):
        image = r.compressed[name]
        shown[f"{name}, {psnr(image, r.photo):.1f} dB"] = image[crop]
    _draw_images(axis, shown)
    axis.set_title(f"Compressed to {STORED:.0%} of its numbers")


def _draw_curves(axis: Any, r: Results) -> None:
    for colour, (name, (share, db)) in zip(PALETTE, r.curves.items(), strict=False):
        axis.plot(share * 100, db, label=name, color=colour, lw=1.8)
    axis.axvline(STORED * 100, color=GREY, lw=0.8, ls=":")
    axis.set(xscale="log", xlim=(1, 50), ylim=(15, 45))
    axis.set_xticks([1, 2, 5, 10, 20, 50], labels=["1", "2", "5", "10", "20", "50"])
    axis.minorticks_off()
    axis.set(xlabel="numbers stored, % of the photograph's", ylabel="PSNR, dB")
    axis.set_title("Largest singular values first")
    axis.legend(loc="upper left")


def _draw_times(axis: Any, r: Results) -> None:
    rows = [row for row in r.rows if row.jnp_ms > 0.1][::-1]
    y = np.arange(len(rows))
    axis.barh(y + 0.2, [row.jnp_ms for row in rows], 0.36, color=GREY, label="jnp.linalg.svd")
    axis.barh(y - 0.2, [row.ms for row in rows], 0.36, color=ACCENT, label="jaxmetal_linalg")
    for i, row in enumerate(rows):
        x = max(row.ms, row.jnp_ms) * 1.15
        axis.text(x, i, f"{row.ratio:.1f}x", va="center", fontweight="bold")
    axis.set_yticks(y, labels=[f"{row.what.split()[0].strip(',')} {row.shape}" for row in rows])
    times = [ms for row in rows for ms in (row.ms, row.jnp_ms)]
    axis.set(xscale="log", xlim=(min(times) / 2, max(times) * 100))
    axis.set_xlabel("milliseconds, medians of one run")
    axis.set_title("Time of each step")
    axis.legend(loc="upper right")


def _draw_denoised(axis: Any, r: Results) -> None:
    d = r.denoised
    side = d["clean"].shape[0]
    crop = (slice(0, 290), slice(60, 280)) if side > 290 else (slice(None), slice(None))
    shown = {
        f"{caption}, {psnr(d[name], d['clean']):.1f} dB": d[name][crop]
        for name, caption in (
            ("noisy", "noisy"),
            ("textbook", "textbook threshold"),
            ("tuned", "tuned thresholds"),
        )
    }
    _draw_images(axis, shown)
    axis.set_title("Denoised by shrinking singular values of similar patches")


def _draw_steps(axis: Any, r: Results) -> None:
    for (name, db), colour in zip(r.steps.items(), (ACCENT, GREY), strict=True):
        axis.plot(db, ".-", label=name, color=colour, lw=1.8)
    axis.set_xticks(range(0, len(db), max(1, len(db) // 6)))
    axis.set(xlabel="gradient step", ylabel="PSNR, dB")
    axis.set_title("Gradient descent through the SVD")
    axis.legend(loc="lower right")


def _draw_spectra(axis: Any, r: Results) -> None:
    for colour, (kind, part) in zip(PALETTE, KINDS.items(), strict=True):
        for i, s in enumerate(of_kind(r, part)):
            label = kind if i == 0 else None
            axis.plot(s / s[0], color=colour, lw=0.9, alpha=0.75, label=label)
    axis.set(yscale="log", ylim=(1e-3, 1.2), xlabel="index", ylabel="singular value / largest")
    axis.set_title(f"Spectra of {len(r.spectra)} weight matrices")
    axis.legend(ncols=2, loc="lower left")
