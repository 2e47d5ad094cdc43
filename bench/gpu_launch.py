"""Launches kernels on torch's stream through the driver, as csrc/device_cuda.cc launches them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_ubyte * 64)]


class Config(ctypes.Structure):
    _fields_ = [
        *(("grid", ctypes.c_uint * 3), ("group", ctypes.c_uint * 3), ("shared", ctypes.c_uint)),
        *(("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute))),
        ("count", ctypes.c_uint),
    ]


OVERLAP = Attribute(6, 0, (ctypes.c_ubyte * 64)(1))  # kOverlap


def launch(
    cuda: ctypes.CDLL, function: Any, groups: int, threads: int, shared: int, values: Sequence[Any]
) -> int:
    """The driver's code; ``values`` are the kernel's arguments in order."""
    argv = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    config = Config(
        (groups, 1, 1),
        (threads, 1, 1),
        shared,
        torch.cuda.current_stream().cuda_stream,
        ctypes.pointer(OVERLAP),
        int(torch.cuda.get_device_capability()[0] >= 9),
    )
    code: int = cuda.cuLaunchKernelEx(ctypes.byref(config), function, argv, None)
    return code
