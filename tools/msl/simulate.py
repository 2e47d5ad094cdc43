"""Builds kernels for the simulator with the system's C++ compiler and launches them from Python.

Tests use it to run kernels, and changed copies of kernels, without building the package.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .emit import emit_sim
from .parse import Unit

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    *["-std=c++20", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-w"],
    # Some systems turn it on; it ends the process before a finding can be told.
    "-fno-stack-protector",
    f"-I{ROOT / 'csrc'}",
    f"-I{ROOT / 'kernels'}",
]


@dataclass(frozen=True)
class Finding:
    kind: str
    line: int
    other_line: int
    text: str


@dataclass(frozen=True)
class Limits:
    """What the simulated device allows; by default what Apple GPUs since family 7 do."""

    threads: int = 1024
    threadgroup_bytes: int = 32768
    buffers: int = 31


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("index", ctypes.c_int32),
        ("undefined", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
    ]


class _Options(ctypes.Structure):
    _fields_ = [
        ("checked", ctypes.c_int32),
        ("shuffle", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("max_threads", ctypes.c_int64),
        ("max_threadgroup_bytes", ctypes.c_int64),
        ("max_buffers", ctypes.c_int64),
    ]


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)


class CompileError(RuntimeError):
    """The C++ compiler refused; the text is what it said."""


class Simulator:
    """A runtime and the kernels it knows, as the native library has them."""

    def __init__(self, runtime: ctypes.CDLL) -> None:
        self.runtime = runtime
        self.runtime.jml_sim_launch.restype = ctypes.c_void_p

    def launch(
        self,
        kernel: str,
        *,
        grid: int | tuple[int, int, int],
        threads: int,
        buffers: Mapping[int, np.ndarray],
        params: tuple[int, Any] | None = None,
        threadgroup_bytes: Sequence[int] = (),
        constants: Mapping[int, int] | None = None,
        checked: bool = True,
        seed: int | None = None,
        limits: Limits | None = None,
        undefined: Collection[int] = (),
    ) -> list[Finding]:
        """Runs one dispatch. Raises ValueError if a limit or the signature is broken.

        Args:
            kernel: its host name.
            grid: threadgroups.
            threads: threads per threadgroup.
            buffers: by buffer index; read and written in place.
            params: buffer index and ctypes structure.
            threadgroup_bytes: by threadgroup index.
            constants: function constants, index to bits.
            checked: which of the two compiled forms to run.
            seed: shuffles the order of lanes, simdgroups and threadgroups.
            limits: of the simulated device.
            undefined: buffers of which nothing may be read before it is written.

        Returns:
            What the judge found; empty for a clean launch.
        """
        limits = limits or Limits()
        bound = (_Buffer * max(len(buffers), 1))(
            *(_Buffer(i, i in undefined, a.ctypes.data, a.nbytes) for i, a in buffers.items())
        )
        sizes = (grid, 1, 1) if isinstance(grid, int) else grid
        options = _Options(
            int(checked),
            int(seed is not None),
            seed or 0,
            limits.threads,
            limits.threadgroup_bytes,
            limits.buffers,
        )
        pairs = [x for item in (constants or {}).items() for x in item]
        index, struct = params if params is not None else (-1, None)
        address = self.runtime.jml_sim_launch(
            kernel.encode(),
            (ctypes.c_uint32 * 3)(*sizes),
            ctypes.c_uint32(threads),
            bound,
            ctypes.c_int32(len(buffers)),
            ctypes.c_int32(index),
            ctypes.byref(struct) if struct is not None else None,
            ctypes.c_int64(ctypes.sizeof(struct) if struct is not None else 0),
            (ctypes.c_int64 * max(len(threadgroup_bytes), 1))(*threadgroup_bytes),
            ctypes.c_int32(len(threadgroup_bytes)),
            (ctypes.c_int64 * max(len(pairs), 1))(*pairs),
            ctypes.c_int32(len(pairs) // 2),
            ctypes.byref(options),
        )
        answer = json.loads(ctypes.string_at(address).decode())
        self.runtime.jml_sim_free(ctypes.c_void_p(address))
        if answer["error"]:
            raise ValueError(answer["error"])
        return [Finding(**f) for f in answer["findings"]]


class Workshop(Simulator):
    """A runtime built into ``folder``, and kernels compiled and loaded beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._library = folder / "libjml_sim.so"
        self._numbers = itertools.count()
        source = str(ROOT / "csrc" / "device_sim.cc")
        _call([compiler(), *FLAGS, "-O2", source, "-o", str(self._library)])
        super().__init__(ctypes.CDLL(str(self._library), mode=ctypes.RTLD_GLOBAL))

    def load(self, unit: Unit, *, checked: bool = True, optimize: str = "-O1") -> ctypes.CDLL:
        """Compiles and loads the kernels of ``unit``; a kernel of the same name is replaced."""
        return ctypes.CDLL(str(self.build(emit_sim(unit, checked), optimize=optimize)))

    def build(self, text: str, *, optimize: str) -> Path:
        """Compiles generated text to a library to be loaded. Threads may do this side by side."""
        source = self.folder / f"kernels{next(self._numbers)}.cc"
        library = source.with_suffix(".so")
        source.write_text(text)
        runtime = [str(self._library), f"-Wl,-rpath,{self.folder}"]
        _call([compiler(), *FLAGS, optimize, str(source), *runtime, "-o", str(library)])
        return library


@functools.cache
def workshop() -> Workshop:
    """The one of this process: a second runtime would answer for the first."""
    folder = tempfile.TemporaryDirectory(prefix="jml_sim_")
    atexit.register(folder.cleanup)
    return Workshop(Path(folder.name))
