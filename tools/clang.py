"""Which Clang reads kernels (``tools.msl.check``) and metal-cpp: the system's, else zig's.

python -m tools.clang     prints the command, its words divided by semicolons as CMake wants them
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST, NEWEST = 17, 22


class ClangMissing(RuntimeError):
    """No Clang that is new enough; the text says how to get one."""


def command() -> list[str]:
    """A C++ compiler's command, to which arguments are added."""
    for version in range(NEWEST, OLDEST - 1, -1):
        if found := shutil.which(f"clang++-{version}"):
            return [found]
    if found := shutil.which("clang++"):
        text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
        number = re.search(r"clang version (\d+)", text)
        if number and int(number[1]) >= OLDEST:
            return [found]
    ziglang = importlib.util.find_spec("ziglang")
    if ziglang and ziglang.submodule_search_locations:
        return _zig(Path(ziglang.submodule_search_locations[0]))
    raise ClangMissing(f"clang {OLDEST} or newer not found: pip install ziglang, which has one")


@functools.cache
def _zig(folder: Path) -> list[str]:
    """The driver alone: ``zig c++`` would compile a C++ library of its own first."""
    found = [str(folder / "zig"), "clang", "--driver-mode=g++"]
    if sys.platform == "linux":

        def gcc(option: str) -> str:
            done = subprocess.run(["gcc", option], capture_output=True, text=True, check=True)
            return done.stdout.strip()

        # gcc's standard library, which the rest is compiled with.
        place = Path(gcc("-print-libgcc-file-name")).parent
        found += ["-target", gcc("-dumpmachine"), f"--gcc-install-dir={place}"]
    # The compiler's own headers: last, after that library's.
    return [*found, "-resource-dir", "/nonexistent", "-idirafter", str(folder / "lib" / "include")]


if __name__ == "__main__":
    try:
        print(";".join(command()), end="")
    except ClangMissing as e:
        sys.exit(str(e))
