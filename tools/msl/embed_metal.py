"""Writes every kernel file's own text, and a table of its kernels, as C++ for the Metal device.

python -m tools.msl.embed_metal -o FILE kernels/*.metal

Metal compiles a file with all of its templates' instances in seconds, one instance in a fraction of
that. So the text goes without its instances, and each kernel comes with the line that makes it.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from .embed import _literal
from .emit import table, write
from .lexer import MslError
from .parse import parse_file

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"[^\n]*$', re.M)
_MAKES_INSTANCES = re.compile(r"^([ \t]*#[ \t]*define[^\n]*?\))((?:[^\n]*\\\n)*[^\n]*)$", re.M)


def joined(path: Path, seen: set[Path] | None = None) -> str:
    """The text of a kernel file with what it includes from the same folder in place."""
    seen = set() if seen is None else seen
    seen.add(path.resolve())

    def put(match: re.Match[str]) -> str:
        inner = path.parent / match.group(1)
        return "" if inner.resolve() in seen else joined(inner, seen)

    return _INCLUDE.sub(put, path.read_text(encoding="utf-8"))


def without_instances(text: str) -> str:
    """Empties the macros that instantiate kernels; no line moves."""

    def empty(match: re.Match[str]) -> str:
        body = match.group(2)
        return match.group(1) + "\\\n" * body.count("\n") if "host_name" in body else match.group(0)

    return _MAKES_INSTANCES.sub(empty, text)


def instance(kernel: dict[str, object]) -> str:
    """The line that makes one kernel, ``""`` for one that is no template."""
    values = kernel["template"]
    assert isinstance(values, dict)
    if not values:
        return ""
    function = f"{kernel['function']}<{', '.join(values.values())}>"
    return f'template [[host_name("{kernel["name"]}")]] [[kernel]] decltype({function}) {function};'


def source(path: Path, kernel: str) -> str:
    """What the Metal device hands to Metal's compiler for one kernel."""
    rows = {row["name"]: row for row in table(parse_file(path))["kernels"]}
    return without_instances(joined(path)) + instance(rows[kernel]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.msl.embed_metal", description=__doc__)
    parser.add_argument("sources", type=Path, nargs="+", help=".metal files")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(argv)
    texts, kernels, constants = [], [], []
    for path in options.sources:
        try:
            rows = table(parse_file(path))
        except MslError as e:
            print(e, file=sys.stderr)
            return 1
        texts.append(f'{{"{path.stem}", {_literal(without_instances(joined(path)))}}},')
        for row in (k for k in rows["kernels"] if not k["double"]):
            written = sum(
                1 << a["index"]
                for a in row["arguments"]
                if a["kind"] == "buffer" and not a["read_only"]
            )
            line = _literal(instance(row))
            kernels.append(f'{{"{row["name"]}", "{path.stem}", {line}, {written}u}},')
        for row in rows["constants"]:
            constants.append(f'{{"{path.stem}", {row["index"]}, "{row["type"]}"}},')
    newline = "\n"
    write(
        options.output,
        '#include "csrc/metal_text.h"\n\nnamespace jml {\n'
        f"const MetalText metal_texts[] = {{\n{newline.join(texts)}\n{{nullptr, nullptr}}}};\n"
        f"const MetalKernelText metal_kernels[] = {{\n{newline.join(kernels)}\n"
        "{nullptr, nullptr, nullptr, 0}};\n"
        f"const MetalConstantText metal_constants[] = {{\n{newline.join(constants)}\n"
        "{nullptr, 0, nullptr}};\n"
        "}  // namespace jml\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
