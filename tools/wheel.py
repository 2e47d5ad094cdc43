"""Names a Linux wheel after the oldest glibc that its library runs on, or says why it cannot.

python -m tools.wheel FILE.whl     renames it from linux_<machine> to manylinux_<version>_<machine>
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

# Of what PEP 600 lets a wheel expect on every Linux, the part that a library like ours may need.
ALLOWED = {
    "libc.so.6",
    "libm.so.6",
    "libdl.so.2",
    "librt.so.1",
    "libpthread.so.0",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
MACHINES = {62: "x86_64", 183: "aarch64"}


class Elf:
    """A 64-bit little-endian ELF shared object, as far as a loader is concerned.

    Attributes:
      machine: x86_64 or aarch64.
      needed: libraries that it is linked with.
      search: its rpath and runpath.
      exported: names that it defines for others.
      versions: ``(library, version)`` of every versioned symbol that it takes, e.g. ``GLIBC_2.17``.
    """

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not a 64-bit little-endian ELF file")
        self._data = data
        kind, machine = struct.unpack_from("<2H", data, 16)
        if kind != 3 or machine not in MACHINES:
            raise ValueError(f"not a shared object of {', '.join(MACHINES.values())}")
        self.machine = MACHINES[machine]
        (start,) = struct.unpack_from("<Q", data, 40)
        size, count = struct.unpack_from("<2H", data, 58)
        heads = [struct.unpack_from("<2I4Q2I2Q", data, start + i * size) for i in range(count)]
        # type: (offset, size, linked section, items)
        self._sections = {h[1]: (h[4], h[5], h[6], h[7]) for h in heads}
        self._heads = heads
        tags = self._dynamic()
        self.needed = [self._name(6, value) for tag, value in tags if tag == 1]
        self.search = [self._name(6, value) for tag, value in tags if tag in (15, 29)]
        self.exported = self._exported()
        self.versions = self._versions()

    def _name(self, section: int, at: int) -> str:
        """The text at an offset of the string table that goes with the section of a type."""
        start = self._heads[self._sections[section][2]][4] + at
        return self._data[start : self._data.index(b"\0", start)].decode()

    def _dynamic(self) -> list[tuple[int, int]]:
        offset, size, _, _ = self._sections[6]
        return list(struct.iter_unpack("<qQ", self._data[offset : offset + size]))

    def _exported(self) -> set[str]:
        offset, size, _, _ = self._sections[11]
        rows = struct.iter_unpack("<IBBHQQ", self._data[offset : offset + size])
        return {
            self._name(11, name)
            for name, info, other, section, _, _ in rows
            if section != 0 and info >> 4 != 0 and other & 3 in (0, 3)
        }

    def _versions(self) -> set[tuple[str, str]]:
        found: set[tuple[str, str]] = set()
        at, _, _, count = self._sections.get(0x6FFFFFFE, (0, 0, 0, 0))
        for _ in range(count):
            _, items, library, first, step = struct.unpack_from("<2H3I", self._data, at)
            item = at + first
            for _ in range(items):
                _, _, _, name, following = struct.unpack_from("<I2H2I", self._data, item)
                found.add((self._name(0x6FFFFFFE, library), self._name(0x6FFFFFFE, name)))
                item += following
            at += step
        return found

    def glibc(self) -> tuple[int, int]:
        """The oldest glibc with all that it takes."""
        texts = (re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", v) for _, v in self.versions)
        return max((int(m[1]), int(m[2])) for m in texts if m)


def library(wheel: Path) -> bytes:
    """The native library in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if "/_lib/libjaxmetal_linalg." in n)
        return archive.read(name)


def platform_tag(elf: Elf) -> str:
    """``manylinux_<glibc>_<machine>`` by PEP 600.

    Raises:
      ValueError: it needs a library that a Linux may be without, or looks for one by a path.
    """
    strange = [*sorted(set(elf.needed) - ALLOWED), *elf.search]
    if strange:
        raise ValueError(f"it needs {', '.join(strange)}: not for every Linux")
    major, minor = elf.glibc()
    return f"manylinux_{major}_{max(minor, 17)}_{elf.machine}"


def main() -> int:
    for path in map(Path, sys.argv[1:]):
        tag = platform_tag(Elf(library(path)))
        command = [
            sys.executable,
            "-m",
            "wheel",
            "tags",
            "--remove",
            "--platform-tag",
            tag,
            str(path),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
