"""Tables of what Mac owners measured, from the files that ``doctor --report`` wrote for them.

python -m bench.reports FILE...              prints them as Markdown
python -m bench.reports --publish FILE...    puts them between README.md's markers; none: empties it

No other number about Apple hardware is to be printed anywhere in this repository.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.report import replace_between
from jaxmetal_linalg import _report

NONE = "No report from a Mac has come in yet, so there is no time of Apple hardware to show.\n"


def read(path: Path) -> dict[str, Any]:
    """A report from a Mac.

    Raises:
      ValueError: not a report, or not one of an Apple GPU.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        made = report["format"]
    except (ValueError, KeyError, TypeError):
        made = None
    if made != _report.FORMAT:
        raise ValueError(f"{path}: expected a file that `doctor --report` wrote ({_report.FORMAT})")
    system = report["doctor"]["machine"]["system"]
    if not system.startswith("Darwin arm64"):
        raise ValueError(f"{path}: expected a report from a Mac with an Apple GPU, got {system}")
    if not report["metal"].get("name"):
        raise ValueError(f"{path}: no Apple GPU was found there: {report['metal']['problem']}")
    return report


def markdown(reports: dict[str, dict[str, Any]]) -> str:
    """The reports by the name of their file, oldest first."""
    lines = []
    for name, report in sorted(reports.items(), key=lambda item: item[1]["date"]):
        doctor = report["doctor"]
        machine, checks = doctor["machine"], doctor["checks"]
        passed = sum(c["ok"] for c in checks)
        on_gpu = [c for c in checks if c["device"] == "metal"]
        lines += [
            f"**{report['metal']['name']}** (`{name}`, {report['date'][:10]}): "
            f"{machine['system']}, {machine['cores']} cores, Python {machine['python']}, "
            f"jax {machine['jax']}. "
            f"Self-checks passed: {passed} of {len(checks)}, "
            f"on the GPU {sum(c['ok'] for c in on_gpu)} of {len(on_gpu)}. "
            "svd of float32, thin factors, median milliseconds of a call:",
            "",
            *_report.table(report["rows"]),
            "",
        ]
        failed = [c for c in checks if not c["ok"]]
        lines += [
            f"- FAILED {c['op']} on {c['device']}, {c['name']}: {c['detail']}" for c in failed
        ]
        errors = [r for r in report["rows"] if "error" in r]
        lines += [f"- FAILED {'x'.join(map(str, r['shape']))}: {r['error']}" for r in errors]
        lines += [""] if failed or errors else []
    return "\n".join(lines) if lines else NONE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reports", description=__doc__)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--publish", action="store_true", help="into README.md")
    options = parser.parse_args(argv)
    try:
        text = markdown({path.name: read(path) for path in options.files})
    except (OSError, ValueError) as e:
        print(e, file=sys.stderr)
        return 1
    print(text)
    if options.publish:
        replace_between("reports", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
