"""Writes README.md's tables and docs/bench.png from a result file of ``python -m bench.svd``.

python -m bench.report [bench/results/FILE.json]     default: the newest float32 result
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

Json = dict[str, Any]


def publish(path: Path) -> None:
    """Puts the tables of a result between README.md's markers and draws the plot."""
    result = json.loads(path.read_text())
    replace_between("bench", markdown(result, path))
    draw(result, ROOT / "docs" / "bench.png")


def replace_between(name: str, text: str) -> None:
    """Puts text between README.md's markers of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split(begin)
    tail = rest.split(end)[1]
    readme.write_text(f"{head}{begin}\n{text}{end}{tail}")


def markdown(result: Json, path: Path) -> str:
    """The tables as Markdown, with date and hardware."""
    m = result["machine"]
    lines = [
        f"{result['date']}, {m['cpu']} with {m['cores']} cores ({m['isa']}), Python {m['python']}, "
        f"jax {m['jax']}, {result['rows'][0]['dtype']}; milliseconds, medians of one interleaved "
        f"run; numbers in `bench/results/{path.name}`.",
        "",
    ]
    for op, title in (("svd", "U, S and V"), ("svdvals", "Values only")):
        rows = [r for r in result["rows"] if r["op"] == op]
        if rows:
            lines += [f"**{title}**", "", *_table(rows), ""]
    lines += ["![Time of jnp.linalg.svd over ours](docs/bench.png)", ""]
    if "memory" in result:
        lines += ["**Peak memory of a call beyond its input**, in copies of the input on top of "]
        lines[-1] += "the outputs:"
        lines += ["", "| shape | ours | jnp |", "|---|---|---|"]
        for r in result["memory"]:
            lines.append(f"| {r['shape']} | {r['ours_copies']:.2f} | {r['jnp_copies']:.2f} |")
        lines.append("")
    if "import" in result:
        r = result["import"]
        lines += [
            f"`import jaxmetal_linalg` adds {r['added_ms']:.0f} ms to `import jax` "
            f"({r['jax_ms']:.0f} ms).",
            "",
        ]
    return "\n".join(lines)


def _table(rows: list[Json]) -> list[str]:
    peers = list(dict.fromkeys(name for r in rows for name in r["peers"]))
    heads = ["shape", "route", "ms", *(x for p in peers for x in (f"{p} ms", "ratio"))]
    heads += ["accuracy (ours)", "accuracy (jnp)"]
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in rows:
        cells = [r["shape"], f"{r['route']}/{r['variant']}", _ms(r["median_ms"])]
        for name in peers:
            peer = r["peers"][name]
            ratio = f"{peer['ratio']:.2f}x"
            if name == "jnp":
                ratio = f"**{ratio}**"
            cells += [_ms(peer["median_ms"]) + ("\\*" if "scaled_from" in peer else ""), ratio]
        cells += [_accuracy(r), _accuracy(r["peers"]["jnp"])]
        out.append("| " + " | ".join(cells) + " |")
    if any("scaled_from" in p for r in rows for p in r["peers"].values()):
        out += ["", "\\* looped over from Python, 256 matrices timed and scaled up."]
    return out


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _accuracy(row: Json) -> str:
    if "residual" not in row:
        return f"{row['sigma_ulp']:.1f} ulp"
    ortho = max(row["orthogonality_u"], row["orthogonality_v"])
    return f"{row['residual']:.2f} / {ortho:.2f} / {row['sigma_ulp']:.1f} ulp"


def draw(result: Json, path: Path) -> None:
    """Draws the ratio to jitted jnp.linalg.svd for every shape."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    axis = figure.subplots()
    shapes = list(dict.fromkeys(r["shape"] for r in result["rows"]))
    for op, colour, shift in (("svd", "#c2410c", -0.2), ("svdvals", "#1d4ed8", 0.2)):
        found = {r["shape"]: r["peers"]["jnp"]["ratio"] for r in result["rows"] if r["op"] == op}
        x = [i + shift for i, shape in enumerate(shapes) if shape in found]
        bars = axis.bar(x, list(found.values()), 0.38, color=colour, label=op)
        axis.bar_label(bars, fmt="%.3g", fontsize=7)
    axis.axhline(1, color="#1b1f24", lw=0.8)
    axis.set_yscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50]
    axis.set_yticks(ticks, labels=[f"{t:g}x" for t in ticks])
    axis.minorticks_off()
    axis.set_xticks(range(len(shapes)), labels=shapes, rotation=30, ha="right", fontsize=8)
    axis.set_ylabel("jnp.linalg.svd's time / ours")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    m = result["machine"]
    axis.set_title(f"{m['cpu']}, {m['cores']} cores, {result['date'][:10]}", loc="left", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> int:
    """Publishes the file named on the command line, or the newest float32 result."""
    named = [Path(p) for p in sys.argv[1:]] or sorted(RESULTS.glob("*-svd-float32.json"))[-1:]
    if not named:
        print(f"no result in {RESULTS}; run: python -m bench.svd --publish", file=sys.stderr)
        return 1
    publish(named[0].resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
