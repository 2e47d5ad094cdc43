"""tools/metallib.cmake with a stand-in for xcrun: what that is asked for, and what comes of it.

Apple's compiler itself has not been run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import absent

ROOT = Path(__file__).parent.parent
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))


@pytest.fixture(scope="module", autouse=True)
def _there_is_cmake() -> None:
    if CMAKE is None:
        absent("cmake", "there is no cmake")


PROJECT = f"""
cmake_minimum_required(VERSION 3.24)
project(metallibs LANGUAGES NONE)
include({ROOT}/tools/metallib.cmake)
jml_add_metallibs(metallibs "${{CMAKE_BINARY_DIR}}/out" kernels/one.metal kernels/two.metal)
message(STATUS "made: ${{JML_METALLIBS}}")
install(FILES ${{JML_METALLIBS}} DESTINATION lib)
"""

# --find succeeds for the tools that the machine has; a compiler joins its arguments and its input.
XCRUN = """#!/bin/sh
echo "$@" >> "{log}"
[ "$1 $2" = "-sdk macosx" ] || exit 2
shift 2
if [ "$1" = --find ]; then
  case "$2" in {tools}) exit 0;; *) exit 72;; esac
fi
tool=$1
while [ "$1" != -o ]; do case "$1" in *.metal|*.air) input=$1;; esac; shift; done
{{ echo "$tool of"; cat "$input"; }} > "$2"
"""


def build(folder: Path, tools: str | None) -> tuple[str, list[str]]:
    """Builds where xcrun knows these tools: what CMake says, and the calls of xcrun."""
    source, bin_dir, log = folder / "source", folder / "bin", folder / "calls"
    (source / "kernels").mkdir(parents=True)
    bin_dir.mkdir()
    (source / "CMakeLists.txt").write_text(PROJECT)
    for stem in ("one", "two"):
        (source / "kernels" / f"{stem}.metal").write_text(f"text of {stem}")
    if tools is not None:
        (bin_dir / "xcrun").write_text(XCRUN.format(log=log, tools=tools))
        (bin_dir / "xcrun").chmod(0o755)
    env = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"}
    output = ""
    for command in (
        [CMAKE, "-S", source, "-B", folder / "build", "-G", "Unix Makefiles"],
        [CMAKE, "--build", folder / "build"],
        [CMAKE, "--install", folder / "build", "--prefix", folder / "installed"],
    ):
        output += subprocess.check_output(list(map(str, command)), env=env, text=True)
    return output, log.read_text().splitlines() if log.exists() else []


def test_xcrun_compiles_each_file(tmp_path: Path) -> None:
    _, calls = build(tmp_path, "metal|metallib")
    for stem in ("one", "two"):
        made = tmp_path / "installed" / "lib" / f"{stem}.metallib"
        assert made.read_text() == f"metallib of\nmetal of\ntext of {stem}"
    compiled = [c for c in calls if c.startswith("-sdk macosx metal ")]
    assert len(compiled) == 2
    for call in compiled:
        # As the run-time compiler is asked in csrc/device_metal.cc.
        assert {"-std=metal3.1", "-fno-fast-math", "-mmacosx-version-min=14.0"} <= set(call.split())
    text = (ROOT / "csrc/device_metal.cc").read_text()
    assert "LanguageVersion3_1" in text
    assert "MathModeSafe" in text


@pytest.mark.parametrize("tools", [None, "metal", "none"])
def test_without_the_compiler_there_are_none(tmp_path: Path, tools: str | None) -> None:
    if tools is None and shutil.which("xcrun"):
        pytest.skip("this machine has xcrun")
    output, calls = build(tmp_path, tools)
    assert "made: \n" in output
    assert not (tmp_path / "installed" / "lib").exists()
    assert all("--find" in c for c in calls)
    if tools is not None:
        missing = "metallib" if tools == "metal" else "metal"
        assert f"xcrun finds no {missing}: kernels are compiled at run time" in output


def test_the_build_uses_it_on_macos() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    assert "jml_add_metallibs(jml_metallibs" in text
    stems = [p.stem for p in (ROOT / "kernels").glob("*.metal")]
    assert "svd" in stems  # device_metal.cc looks for <stem>.metallib beside the library
    assert '(std::string(stem) + ".metallib")' in (ROOT / "csrc/device_metal.cc").read_text()
