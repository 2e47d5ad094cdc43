"""Compiles kernels and launches them on torch's stream, as csrc/device_cuda.cc does."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from tools.msl.nvrtc import Nvrtc


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_ubyte * 64)]


class Config(ctypes.Structure):
    _fields_ = [
        *(("grid", ctypes.c_uint * 3), ("group", ctypes.c_uint * 3), ("shared", ctypes.c_uint)),
        *(("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute))),
        ("count", ctypes.c_uint),
    ]


OVERLAP = Attribute(6, 0, (ctypes.c_ubyte * 64)(1))  # kOverlap


class Gpu:
    """The driver, on torch's context and stream, and NVRTC for this GPU."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.nvrtc = Nvrtc()
        major, minor = torch.cuda.get_device_capability()
        self.arch = f"sm_{major}{minor}"
        self.cores = torch.cuda.get_device_properties(0).multi_processor_count

    def load(self, cubin: bytes, names: Sequence[str]) -> list[Any]:
        """The functions of these names; RuntimeError where the driver refuses."""
        module = ctypes.c_void_p()
        check(self.cuda.cuModuleLoadData(ctypes.byref(module), cubin), "module load")
        functions = [ctypes.c_void_p() for _ in names]
        for name, function in zip(names, functions, strict=True):
            code = self.cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
            check(code, name)
        return functions

    def run(
        self, function: Any, groups: int, threads: int, shared: int, values: Sequence[Any]
    ) -> None:
        """One launch; ``values`` are the kernel's arguments in order."""
        argv = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        config = Config(
            (groups, 1, 1),
            (threads, 1, 1),
            shared,
            torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(OVERLAP),
            int(torch.cuda.get_device_capability()[0] >= 9),
        )
        check(self.cuda.cuLaunchKernelEx(ctypes.byref(config), function, argv, None), "launch")


def check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what}: CUDA error {code}")
