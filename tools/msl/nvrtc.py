"""Compiles generated kernels with NVRTC, which needs no GPU, and reports registers and spills.

python -m tools.msl.nvrtc kernels/svd.metal [--arch sm_90 ...] [--match REGEX] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from .emit import emit_cuda
from .parse import Unit, parse_file

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100")
# Contraction off: kernels say fma where they mean it, on every device.
OPTIONS = ("-std=c++17", "-default-device", "-fmad=false", "--ptxas-options=-v")


class NvrtcMissing(RuntimeError):
    """No NVRTC library; the text says how to get one."""


@dataclass(frozen=True)
class Report:
    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    stack_bytes: int


def candidates() -> list[str]:
    """Where NVRTC may be: the wheels, a toolkit, the loader's path."""
    # Not at the top: this folder builds the library, where there is no JAX yet.
    from jaxmetal_linalg._cuda import library_files

    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    toolkit = [p for p in sorted(Path(home).glob("lib64/libnvrtc.so*")) if "alt" not in p.name]
    loader = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
    return [*map(str, library_files("nvrtc")), *map(str, toolkit), *loader]


def load() -> ctypes.CDLL:
    """The NVRTC library of the nvidia-cuda-nvrtc wheel or of an installed toolkit."""
    for name in candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise NvrtcMissing("NVRTC not found: pip install nvidia-cuda-nvrtc, or set CUDA_HOME")


class Nvrtc:
    """A loaded NVRTC."""

    def __init__(self) -> None:
        self.lib = load()
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def architectures(self) -> list[str]:
        count = ctypes.c_int()
        self.lib.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self.lib.nvrtcGetSupportedArchs(archs)
        return [f"sm_{a}" for a in archs]

    def compile(self, source: str, arch: str, options: list[str]) -> tuple[bytes, str]:
        """Cubin and log. Raises RuntimeError with the compiler's log."""
        header = Path(__file__).parents[2] / "kernels" / "msl_cuda.h"
        program = ctypes.c_void_p()
        names = (ctypes.c_char_p * 1)(b"msl_cuda.h")
        texts = (ctypes.c_char_p * 1)(header.read_bytes())
        lib = self.lib
        lib.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernels.cu", 1, texts, names
        )
        args = [f"-arch={arch}", *OPTIONS, *options]
        argv = (ctypes.c_char_p * len(args))(*(a.encode() for a in args))
        code = lib.nvrtcCompileProgram(program, len(args), argv)
        size = ctypes.c_size_t()
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        text = log.value.decode(errors="replace")
        try:
            if code:
                raise RuntimeError(f"NVRTC error {code} for {arch}:\n{text}")
            lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
            cubin = ctypes.create_string_buffer(size.value)
            lib.nvrtcGetCUBIN(program, cubin)
            return cubin.raw, text
        finally:
            lib.nvrtcDestroyProgram(ctypes.byref(program))


def report(nvrtc: Nvrtc, unit: Unit, arch: str, kernels: list[str]) -> list[Report]:
    """Compiles the named kernels for one architecture and reads what ptxas says of each."""
    _, log = nvrtc.compile(emit_cuda(unit), arch, [f"-DJM_ENTRY_{k}" for k in kernels])
    return parse_log(log, arch)


def parse_log(log: str, arch: str) -> list[Report]:
    found: list[Report] = []
    for part in re.split(r"Compiling entry function ", log)[1:]:
        name = part.split("'")[1]
        stack = re.search(r"(\d+) bytes stack frame", part)
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", part)]
        registers = re.search(r"Used (\d+) registers", part)
        found.append(
            Report(
                name,
                arch,
                int(registers[1]) if registers else -1,
                sum(spills),
                int(stack[1]) if stack else -1,
            )
        )
    return sorted(found, key=lambda r: r.kernel)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.msl.nvrtc", description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--match", default="", help="only kernels whose name matches")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args(argv)
    nvrtc = Nvrtc()
    unit = parse_file(options.source)
    names = [i.host_name for i in unit.instances if re.search(options.match, i.host_name)]
    rows: list[Report] = []
    for arch in options.arch:
        rows += report(nvrtc, unit, arch, names)
    print(f"NVRTC {nvrtc.version[0]}.{nvrtc.version[1]}")
    print(f"{'kernel':32} {'arch':7} {'registers':>9} {'spill bytes':>11} {'stack bytes':>11}")
    for r in rows:
        print(f"{r.kernel:32} {r.arch:7} {r.registers:9} {r.spill_bytes:11} {r.stack_bytes:11}")
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
