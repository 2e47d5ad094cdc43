"""Checks kernels with Clang, which knows address spaces: no Mac, no generated code.

python -m tools.msl.check kernels/svd.metal [more.metal]

Clang parses and instantiates the text as C++20 against ``metal_check.h``. Before that three things
of MSL that Clang lacks are rewritten in place: ``[[attributes]]`` go, ``float4(a, b, c, d)``
becomes ``float4{a, b, c, d}``, and a cast to bfloat, which may be from half, goes through float.
The rules of our own dialect are in ``parse``, which runs first.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import clang
from .lexer import MslError
from .parse import parse_file

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++20", "-fsyntax-only", "-w", "-Wno-c++11-narrowing", "-ferror-limit=8"]
VECTOR = (
    r"(?:\b(?:u?(?:char|short|int|long)|float|half|bfloat|bool)[234]|\bvec<[^<>();]*>{names})"
    r"(?:\s+\w+)?\s*\("
)
VECTOR_NAME = re.compile(r"\b(?:using (\w+)\s*=\s*|typedef )(?:metal::)?vec<[^<>();]*>\s*(\w*)")
# In the parentheses of a function, which a * b is not.
DECLARATION = re.compile(
    r"[A-Za-z_]\w*(?:\s+|[&*]+\s*|\s+[&*]+)[A-Za-z_]|<[^<>()]*>\s*[&*]*\s*[A-Za-z_]\w*\s*(?:,|$)"
)
TO_BFLOAT = re.compile(r"\bstatic_cast<(bfloat(?:16_t)?)>\(")
# constant int x[2] as a parameter is a pointer; Clang would qualify the parameter itself.
ARRAY = re.compile(
    r"\b(constant|device|threadgroup)(\s+(?:const\s+)?\w+)\s+(\w+)\[\w+\](?=\s*[,)])"
)
# A threadgroup variable of a function (not in our dialect) lives as long as the threadgroup.
SHARED = re.compile(r"^(\s*)(threadgroup\s+[\w:<>, ]+\s+\w+\s*(?:\[[^;]*\])?;)", re.MULTILINE)
SYSTEM_HEADERS = (
    *("metal_stdlib", "metal_simdgroup", "metal_simdgroup_matrix", "metal_math", "metal_common"),
    *("metal_atomic", "metal_integer", "metal_compute", "metal_logging", "metal_type_traits"),
)


def _closing(text: str, start: int) -> tuple[int, bool]:
    """Index of the bracket that closes text[start], and whether a comma stands directly inside."""
    depth, comma = 0, False
    for i in range(start, len(text)):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
            if depth == 0:
                return i, comma
        elif text[i] == "," and depth == 1:
            comma = True
    return -1, False


def plain(text: str) -> str:
    """The same text as C++, line by line."""
    out: list[str] = []
    i = 0
    while i < len(text):
        if text.startswith("//", i):
            end = text.find("\n", i)
            i = len(text) if end < 0 else end
        elif text.startswith("[[", i):
            end, _ = _closing(text, i)
            # Lines stay, also those of a macro.
            out += ["\\\n" if row.endswith("\\") else "\n" for row in text[i:end].split("\n")[:-1]]
            if text.startswith("[[function_constant", i):
                out.append("= {}")  # which a constexpr one needs
            i = end + 1
        else:
            out.append(text[i])
            i += 1
    result = ARRAY.sub(r"\1\2* \3", "".join(out))
    result = SHARED.sub(r"\1static \2", result)
    result = TO_BFLOAT.sub(r"static_cast<\1>((float)", result)
    names = {a or b for a, b in VECTOR_NAME.findall(result)}
    vector = re.compile(VECTOR.format(names="".join(rf"|\b{name}" for name in sorted(names))))
    at = 0
    while match := vector.search(result, at):
        opening = match.end() - 1
        end, comma = _closing(result, opening)
        if comma and end > 0 and not DECLARATION.search(result[opening:end]):
            result = f"{result[:opening]}{{{result[opening + 1 : end]}}}{result[end + 1 :]}"
        at = match.end()
    return result


def system_headers(folder: Path) -> Path:
    """A new folder in this one, which stands for that of Metal's headers."""
    stubs = folder / "stubs"
    stubs.mkdir()
    for header in SYSTEM_HEADERS:
        (stubs / header).write_text('#include "metal_check.h"\n')
    return stubs


def check(source: str, include: list[Path]) -> str:
    """Clang's complaints about one text, empty if there are none."""
    includes = [f"-I{p}" for p in [HERE, *include]]
    command = [*clang.command(), *FLAGS, *includes, "-xc++", "-"]
    text = '#include "metal_check.h"\n' + source
    return subprocess.run(command, input=text, capture_output=True, text=True).stderr


def check_kernel(path: Path, text: str | None = None) -> str:
    """Complaints about a kernel of ours: by the dialect's rules, then by Clang."""
    source = path.read_text(encoding="utf-8") if text is None else text
    try:
        parse_file(path, str(path), source)
    except MslError as e:
        return str(e)
    with tempfile.TemporaryDirectory() as folder:
        include = [system_headers(Path(folder)), path.parent]
        return check(f'#line 1 "{path}"\n' + plain(source), include)


# Headers of MLX that stand for compiler internals or use member functions of an address space, with
# as much of each as the others need.
MLX_REPLACED = {
    "bf16_math.h": "",
    "logging.h": """#pragma once
namespace mlx {
struct os_log {
  const char *subsystem, *category;
  template <typename... T>
  static void log_debug(T...);
};
}
""",
    "complex.h": """#pragma once
template <typename U>
struct complex_t {
  U real, imag;
  constexpr complex_t(U r = 0, U i = 0) : real(r), imag(i) {}
  template <typename T>
  constexpr complex_t(T r) : real(U(r)), imag(0) {}
};
typedef complex_t<float> complex64_t;
complex64_t operator+(complex64_t, complex64_t);
complex64_t operator-(complex64_t, complex64_t);
complex64_t operator*(complex64_t, complex64_t);
complex64_t operator/(complex64_t, complex64_t);
complex64_t operator%(complex64_t, complex64_t);
bool operator<(complex64_t, complex64_t);
bool operator>(complex64_t, complex64_t);
bool operator==(complex64_t, complex64_t);
""",
}
# A member function of objects in one address space: Clang has none in C++.
MLX_MEMBERS = ("gemv_masked.h", "steel_gemm_masked.h")
MLX_MEMBER = re.compile(
    r"^ *(?:constexpr )?(?:METAL_FUNC )?operator \w+\(\)(?: const)? "
    r"(?:thread|threadgroup|device|constant) \{[^{}]*\}",
    re.MULTILINE,
)
# What MLX includes before a header that does not include it itself.
MLX_BEFORE = {
    "reduction/": ("atomic.h", "reduction/ops.h", "reduce_utils.h"),
    "reduce.h": ("atomic.h", "reduction/ops.h", "reduce_utils.h"),
    "indexing/": ("atomic.h", "reduction/ops.h"),
    "steel/gemm/kernels/": ("steel/gemm/gemm.h",),
    "fp_quantized.h": ("steel/gemm/gemm.h",),
    "quantized.h": ("steel/gemm/gemm.h",),
    "steel/conv/kernels/": ("steel/gemm/gemm.h", "steel/conv/conv.h"),
    "steel/conv/": ("steel/defines.h", "steel/utils.h", "steel/conv/params.h"),
    "searchsorted.h": ("sort.h",),
}


def check_mlx(include: Path) -> dict[str, str]:
    """Complaints about each kernel header of MLX (``include`` of the mlx-metal wheel), by name.

    Apple's compiler is known to accept them, so a complaint is a limit of this checker.
    """
    prefix = Path("mlx/backend/metal/kernels")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        headers = sorted((include / prefix).rglob("*.h"))
        for header in headers:
            target = folder / header.relative_to(include)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = MLX_REPLACED.get(header.name)
            if text is None:
                text = plain(header.read_text())
                if header.name in MLX_MEMBERS:
                    text = MLX_MEMBER.sub(lambda m: "\n" * m[0].count("\n"), text)
            target.write_text(text)

        include_paths = [system_headers(folder), folder]

        def complaints(short: str) -> str:
            before = next((v for k, v in MLX_BEFORE.items() if short.startswith(k)), ())
            files = ["utils.h", *(b for b in before if b != short), short]
            source = "".join(f'#include "{prefix / f}"\n' for f in files)
            return check(source, include_paths)

        names = [str(h.relative_to(include / prefix)) for h in headers]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(names, pool.map(complaints, names), strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.msl.check", description=__doc__)
    parser.add_argument("source", type=Path, nargs="*")
    parser.add_argument("--mlx", type=Path, help="the include folder of an mlx-metal wheel")
    options = parser.parse_args(argv)
    worst = 0
    if options.mlx:
        found = check_mlx(options.mlx)
        for name, complaints in found.items():
            first = next((r for r in complaints.splitlines() if "error" in r), "clean")
            print(f"{name}: {first.partition('error: ')[2] or first}")
        print(f"{sum(not c for c in found.values())} of {len(found)} headers are clean")
    for source in options.source:
        complaints = check_kernel(source)
        print(complaints or f"{source}: clean")
        worst = max(worst, int(bool(complaints)))
    return worst


if __name__ == "__main__":
    sys.exit(main())
