"""The wheels that `make wheel wheel-macos wheel-linux-arm64` leave: looked at, not run.

`JAXMETAL_WHEELS` names the folder; without it there is nothing to look at but this library.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import sys
import zipfile
from pathlib import Path

import pytest

from jaxmetal_linalg import _native
from tools.wheel import ALLOWED, Elf, platform_tag

FOLDER = os.environ.get("JAXMETAL_WHEELS", "")
ROOT = Path(__file__).parent.parent
KERNELS = [p.stem for p in (ROOT / "kernels").glob("*.metal")]
EXPORTS = {
    name
    for name in re.findall(
        r"^JML_EXPORT [\w ]+\*?\s*(jml_\w+)\(", (ROOT / "csrc/abi.cc").read_text(), re.M
    )
}

built = pytest.mark.skipif(not FOLDER, reason="no wheels were built: JAXMETAL_WHEELS is unset")


def library(tag: str, suffix: str) -> bytes:
    (path,) = Path(FOLDER).glob(f"*-py3-none-{tag}.whl")
    tag = path.stem.split("-py3-none-")[1]
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        assert "jaxmetal_linalg/__init__.py" in names
        (metadata,) = (n for n in names if n.endswith(".dist-info/WHEEL"))
        text = wheel.read(metadata).decode()
        assert f"Tag: py3-none-{tag}" in text
        assert "Root-Is-Purelib: false" in text
        outside = {n.split("/")[0] for n in names} - {"jaxmetal_linalg"}
        assert all(n.endswith(".dist-info") for n in outside), outside
        (found,) = (n for n in names if n.startswith("jaxmetal_linalg/_lib/"))
        assert found.endswith(f"libjaxmetal_linalg.{suffix}")
        return wheel.read(found)


def no_path_of_this_machine(data: bytes) -> None:
    for path in {str(ROOT), str(Path.home()), "/tmp/", "site-packages", ".cache/zig", "build-env"}:
        at = data.find(path.encode())
        assert path == "/" or at < 0, data[max(at - 40, 0) : at + 120]


def test_exports_are_known() -> None:
    assert {"jml_describe", "jml_handler", "jml_plan", "jml_metal"} <= EXPORTS


class MachO:
    """A 64-bit little-endian Mach-O file: its header and load commands."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.magic, self.cpu, _, self.kind, count, _, _, _ = struct.unpack_from("<8I", data)
        self.commands: list[tuple[int, bytes]] = []
        at = 32
        for _ in range(count):
            command, size = struct.unpack_from("<2I", data, at)
            self.commands.append((command & 0x7FFFFFFF, data[at : at + size]))
            at += size

    def of(self, command: int) -> list[bytes]:
        return [body for c, body in self.commands if c == command]

    def names(self, command: int) -> list[str]:
        return [
            body[struct.unpack_from("<I", body, 8)[0] :].split(b"\0")[0].decode()
            for body in self.of(command)
        ]

    def symbols(self) -> tuple[dict[str, bool], set[str]]:
        """Names that it exports and whether weakly, names that it takes from elsewhere."""
        (table,) = self.of(0x2)
        _, _, offset, count, strings, _ = struct.unpack("<6I", table[:24])
        exported: dict[str, bool] = {}
        wanted: set[str] = set()
        for i in range(count):
            name, kind, _, flags, _ = struct.unpack_from("<IBBHQ", self.data, offset + 16 * i)
            text = self.data[strings + name :].split(b"\0", 1)[0].decode()
            if kind & 0xE0 or not kind & 0x01:  # for debuggers, or local
                continue
            if kind & 0x0E:
                if not kind & 0x10:  # not private to the library
                    exported[text] = bool(flags & 0x80)
            else:
                wanted.add(text)
        return exported, wanted


@built
def test_macos() -> None:
    data = library("macosx_14_0_arm64", "dylib")
    file = MachO(data)
    assert file.magic == 0xFEEDFACF
    assert file.cpu == 0x0100000C  # arm64
    assert file.kind == 6  # a dynamic library
    (version,) = file.of(0x32)
    _, _, platform, minimum, _, _ = struct.unpack("<6I", version[:24])
    assert platform == 1  # macOS
    assert minimum >> 16 == 14
    assert minimum & 0xFFFF == 0
    # Itself, by a name without a folder; Metal, Foundation and what every system has.
    (own,) = file.names(0xD)
    assert own == "@rpath/libjaxmetal_linalg.dylib"
    needed = {name.rsplit("/", 1)[1]: name for name in file.names(0xC)}
    assert {"Metal", "Foundation", "libobjc.A.dylib", "libSystem.B.dylib"} == set(needed)
    for name in needed.values():
        assert name.startswith(("/System/Library/Frameworks/", "/usr/lib/"))
    assert file.names(0x1C) == []  # no rpath
    exported, wanted = file.symbols()
    assert {n for n in exported if n.startswith("_jml_")} >= {f"_{n}" for n in EXPORTS}
    # zig brings its C++ library along; its operators new and delete are weak, as Apple's are, so
    # that the loader takes one of each for the whole process.
    others = {n for n in exported if not n.startswith("_jml_")}
    assert others - {"___dso_handle", "__mh_dylib_header"} == {n for n in others if exported[n]}
    assert all(re.match(r"__Zn[aw]|__Zd[al]", n) for n in others if exported[n]), others
    # What a system may lack is looked up when it is loaded; this much has every macOS 14.
    framework = {n for n in wanted if re.match(r"_(MTL|NS|objc_|sel_|OBJC)", n)}
    assert framework == {"_objc_msgSend", "_objc_lookUpClass", "_objc_getProtocol"} | {
        "_sel_registerName",
        "_MTLCreateSystemDefaultDevice",
        "_MTLCopyAllDevices",
        "_MTLCopyAllDevicesWithObserver",
        "_MTLRemoveDeviceObserver",
    }
    # Signed ad hoc, without which Apple silicon loads nothing.
    (signature,) = file.of(0x1D)
    _, _, offset, size = struct.unpack("<4I", signature[:16])
    blob = data[offset : offset + size]
    magic, _, count = struct.unpack_from(">3I", blob)
    signed = False
    assert magic == 0xFADE0CC0
    for i in range(count):
        slot, at = struct.unpack_from(">2I", blob, 12 + 8 * i)
        if slot == 0:
            kind, _, _, flags = struct.unpack_from(">4I", blob, at)
            assert kind == 0xFADE0C02
            assert flags & 0x2, "not ad hoc"
            # Every page is as it was signed: nothing stripped or renamed the library since.
            hashes, _, _, pages, limit = struct.unpack_from(">5I", blob, at + 16)
            width, how, _, log_size = struct.unpack_from("4B", blob, at + 36)
            assert (width, how, limit) == (32, 2, offset)  # SHA-256, up to the signature
            page = 1 << log_size
            assert pages == -(-limit // page)
            for k in range(pages):
                digest = hashlib.sha256(data[k * page : min((k + 1) * page, limit)]).digest()
                start = at + hashes + k * width
                assert blob[start : start + width] == digest, f"page {k}"
            signed = True
    assert signed
    for stem in KERNELS:  # Metal's own text
        text = (ROOT / "kernels" / f"{stem}.metal").read_text()
        assert text[: text.index("#ifndef")].encode() in data, f"{stem}.metal is not inside"
    assert b'template [[host_name("svd_xor_vectors_f32_n8")]] [[kernel]]' in data
    no_path_of_this_machine(data)


@built
@pytest.mark.parametrize(
    ("tag", "machine"),
    [("manylinux_2_28_aarch64", "aarch64"), ("manylinux_*_x86_64", "x86_64")],
)
def test_linux(tag: str, machine: str) -> None:
    data = library(tag, "so")
    elf = Elf(data)
    assert elf.machine == machine
    assert exports_the_abi(elf)
    assert set(elf.needed) <= ALLOWED - {"libgcc_s.so.1"}
    assert elf.search == []
    (path,) = Path(FOLDER).glob(f"*-py3-none-{tag}.whl")
    (promised,) = re.findall(r"manylinux_2_(\d+)_", path.name)
    assert (2, 0) < elf.glibc() <= (2, int(promised))
    for stem in KERNELS:  # for NVRTC
        assert f"Generated from kernels/{stem}.metal".encode() in data, f"{stem} is not inside"
    no_path_of_this_machine(data)


def exports_the_abi(elf: Elf) -> bool:
    assert elf.exported >= EXPORTS
    return all(name.startswith("jml_") for name in elf.exported)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at an ELF file")
def test_this_library_exports_only_its_abi() -> None:
    path = Path(_native.describe()["path"])
    if _native.missing() or path.name != "libjaxmetal_linalg.so":
        pytest.skip("no library, or one built for tests")
    assert exports_the_abi(Elf(path.read_bytes()))


def test_a_wheel_for_one_machine_only_gets_no_tag() -> None:
    class Needy:
        needed = ("libc.so.6", "libstdc++.so.6")
        search = ("/opt/lib",)

    with pytest.raises(ValueError, match=r"libstdc\+\+"):
        platform_tag(Needy())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ELF"):
        Elf(b"MZ")
