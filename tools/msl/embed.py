"""Writes every kernel's CUDA text, and the shim that it includes, as C++ string literals.

python -m tools.msl.embed -o FILE kernels/*.metal
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .emit import emit_cuda, write
from .lexer import MslError
from .parse import parse_file


def _literal(text: str) -> str:
    if ')JML"' in text:
        raise ValueError('the text holds )JML", which would end its literal')
    return f'R"JML({text})JML"'


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.msl.embed", description=__doc__)
    parser.add_argument("sources", type=Path, nargs="+", help=".metal files")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(argv)
    rows: list[str] = []
    try:
        for source in options.sources:
            rows.append(f'{{"{source.stem}", {_literal(emit_cuda(parse_file(source)))}}},')
    except MslError as e:
        print(e, file=sys.stderr)
        return 1
    shim = (options.sources[0].parent / "msl_cuda.h").read_text(encoding="utf-8")
    body = "\n".join(rows)
    write(
        options.output,
        '#include "csrc/cuda_compile.h"\n\nnamespace jml {\n'
        f"const char* const cuda_shim = {_literal(shim)};\n"
        f"const CudaText cuda_texts[] = {{\n{body}\n{{nullptr, nullptr}}}};\n"
        "}  // namespace jml\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
