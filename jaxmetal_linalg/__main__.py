"""``python -m jaxmetal_linalg doctor | demo``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxmetal_linalg")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="what is present, what is missing; a self-check")
    doctor.add_argument("--json", action="store_true", help="the report as one JSON object")
    doctor.add_argument(
        "--devices", metavar="NAMES", help="run the self-check on these, comma separated"
    )
    doctor.add_argument(
        "--report",
        nargs="?",
        const=".",
        metavar="FOLDER",
        help="the report and timings of this machine as a JSON and a Markdown file",
    )
    demo = commands.add_parser("demo", help="SVDs of a photograph and of a model's weights")
    demo.add_argument("--quick", action="store_true", help="a smoke test of a few seconds")
    demo.add_argument("--output", default="demo.png", help="where the picture goes (PNG)")
    args = parser.parse_args(argv)

    if args.command == "demo":
        from jaxmetal_linalg import _demo

        return _demo.main(args.output, args.quick)

    if args.report is not None:
        from jaxmetal_linalg import _report

        data, text, ok = _report.write(Path(args.report))
        print(text.read_text(encoding="utf-8"))
        print(f"attach {data} and {text} to an issue")
        return 0 if ok else 1

    from jaxmetal_linalg import _doctor

    report = _doctor.doctor(args.devices.split(",") if args.devices else None)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
