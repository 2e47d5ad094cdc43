"""The CUDA text in the library compiles with NVRTC, without a GPU, and its cache can be trusted."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import absent

from jaxmetal_linalg import _native
from tools.msl import nvrtc

# A process a compile: the cache in memory must not answer for the one on disk.
PROGRAM = """
import ctypes, sys
dll = ctypes.CDLL(sys.argv[1])
dll.jml_cuda_library(b'nvrtc', sys.argv[4].encode())
dll.jml_cuda_compile.restype = ctypes.c_char_p
print(dll.jml_cuda_compile(*(a.encode() for a in sys.argv[2:4])).decode())
"""


def start(folder: Path, kernel: str, path: str) -> subprocess.Popen[str]:
    args = [sys.executable, "-c", PROGRAM, str(_native.library_path()), kernel, "sm_90"]
    env = {**os.environ, "JAXMETAL_CACHE_DIR": str(folder)}
    return subprocess.Popen([*args, path], env=env, stdout=subprocess.PIPE, text=True)


def build(folder: Path, kernel: str, path: str) -> dict[str, Any]:
    out, _ = start(folder, kernel, path).communicate()
    return json.loads(out)


@pytest.fixture(scope="module")
def library() -> str:
    for name in nvrtc.candidates():
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    absent("nvrtc", "needs NVRTC: pip install nvidia-cuda-nvrtc")


@pytest.fixture(scope="module")
def kernel() -> str:
    unit = nvrtc.parse_file(Path(__file__).parents[1] / "kernels" / "svd.metal")
    return unit.instances[0].host_name


def test_missing_nvrtc_says_what_to_do(tmp_path: Path, kernel: str) -> None:
    error = build(tmp_path, kernel, "/nowhere/libnvrtc.so")["error"]
    assert "/nowhere/libnvrtc.so" in error
    assert "pip install nvidia-cuda-nvrtc" in error


def test_disk_cache_is_used_and_damage_is_compiled_again(
    tmp_path: Path, kernel: str, library: str
) -> None:
    first = build(tmp_path, kernel, library)
    assert first["origin"] == "nvrtc"
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    assert build(tmp_path, kernel, library) == {**first, "origin": "disk"}
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for damaged in (b"", whole[:20], whole[: len(whole) // 2], flipped):
        file.write_bytes(damaged)
        assert build(tmp_path, kernel, library)["origin"] == "nvrtc"
        assert [p.name for p in tmp_path.iterdir()] == [file.name]
    assert build(tmp_path, kernel, library)["origin"] == "disk"


def test_concurrent_processes_leave_one_good_file(
    tmp_path: Path, kernel: str, library: str
) -> None:
    running = [start(tmp_path, kernel, library) for _ in range(3)]
    for process in running:
        assert "error" not in json.loads(process.communicate()[0])
    assert len(list(tmp_path.iterdir())) == 1
    assert build(tmp_path, kernel, library)["origin"] == "disk"


def test_unwritable_cache_costs_nothing_but_time(tmp_path: Path, kernel: str, library: str) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert build(blocked / "cache", kernel, library)["origin"] == "nvrtc"


def test_unknown_kernel_is_an_error(tmp_path: Path, library: str) -> None:
    assert "no kernel named svd_nothing" in build(tmp_path, "svd_nothing", library)["error"]
    assert not list(tmp_path.iterdir())
