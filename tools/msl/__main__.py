"""Writes a kernel file for another target.

python -m tools.msl --target cuda|sim|sim-fast|json kernels/svd.metal [-o FILE]

Exit status 1 and ``file:line: reason`` on standard error when the source breaks a rule.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from . import emit
from .lexer import MslError
from .parse import Unit, parse_file

TARGETS: dict[str, Callable[[Unit], str]] = {
    "cuda": emit.emit_cuda,
    "sim": lambda unit: emit.emit_sim(unit, checked=True),
    "sim-fast": lambda unit: emit.emit_sim(unit, checked=False),
    "json": emit.emit_json,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.msl", description=__doc__)
    parser.add_argument("source", type=Path, help="a .metal file")
    parser.add_argument("--target", choices=sorted(TARGETS), required=True)
    parser.add_argument("-o", "--output", type=Path, help="default: standard output")
    options = parser.parse_args(argv)
    try:
        text = TARGETS[options.target](parse_file(options.source))
    except MslError as e:
        print(e, file=sys.stderr)
        return 1
    if options.output:
        emit.write(options.output, text)
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
