"""The static checker: clean on what is right, and loud about errors planted in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import absent

from tools import clang
from tools.msl import check
from tools.msl.simulate import ROOT

KERNELS = sorted((ROOT / "kernels").glob("*.metal"))
HEAD = """\
#include <metal_stdlib>
using namespace metal;
struct P { int n; };
inline void store(device float* to, float x) { to[0] = x; }
inline float first(threadgroup const float* from) { return from[0]; }
"""
BODY = """\
[[kernel]] void k(device const float* a [[buffer(0)]], device float* b [[buffer(1)]],
                  constant P& p [[buffer(2)]], threadgroup float* t [[threadgroup(0)]],
                  uint i [[thread_index_in_threadgroup]]) {
%s
}
"""


@pytest.fixture(scope="module", autouse=True)
def _there_is_clang() -> None:
    try:
        clang.command()
    except clang.ClangMissing as e:
        absent("clang", str(e))


def complaints(body: str) -> str:
    return check.check_kernel(Path("k.metal"), HEAD + BODY % body)


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_are_clean(path: Path) -> None:
    assert check.check_kernel(path) == ""


CLEAN = {
    "plain": "t[i] = a[i]; store(b + i, first(t));",
    "vector": "float4 v = float4(a[0], a[1], a[2], a[3]); b[i] = v.x + v.w;",
    "pointers": "device const float* q = a + i; threadgroup float* u = t; u[0] = q[0];",
}


@pytest.mark.parametrize("name", sorted(CLEAN))
def test_clean(name: str) -> None:
    assert complaints(CLEAN[name]) == ""


PLANTED = {
    "device pointer from threadgroup": "device float* q = t; q[0] = 1.0f;",
    "threadgroup pointer from device": "threadgroup float* q = b; q[0] = 1.0f;",
    "wrong space passed": "store(t, 1.0f);",
    "wrong space passed back": "b[i] = first(b);",
    "thread pointer from device": "thread float* q = b; q[0] = 1.0f;",
    "device pointer to a local": "float x = 1.0f; device float* q = &x; q[0] = x;",
    "constant as device": "device P* q = &p; q[0].n = 1;",
    "write through const": "a[i] = 1.0f;",
    "static_cast between spaces": "b[i] = static_cast<device float*>(t)[0];",
    "unknown function": "b[i] = lgamma(a[i]);",
    "as_type of another size": "b[i] = float(as_type<ushort>(a[i]));",
    "pointer without a space": "float* q = b; q[0] = 1.0f;",
    "double": "double x = 1.0; b[i] = float(x);",
    "some lanes return": "if (i > 3u) return;\nthreadgroup_barrier(mem_flags::mem_threadgroup);",
    "threadgroup array": "threadgroup float s[4]; s[0] = 1.0f;",
    "barrier without flags": "threadgroup_barrier();",
    "half and float pointers": "device half* q = b; q[0] = half(1.0f);",
}


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_planted_error(name: str) -> None:
    text = complaints(PLANTED[name])
    assert "k.metal:9:" in text or "k.metal:10:" in text, text


def test_without_clang_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clang.shutil, "which", lambda name: None)
    monkeypatch.setattr(clang.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(clang.ClangMissing, match="pip install ziglang"):
        clang.command()


def test_lines_stay_where_they_are() -> None:
    text = "a [[buffer(\n0)]] b\n#define X [[host_name( \\\n  y)]] z\nfloat4(1, // c\n 2, 3, 4)\n"
    plain = check.plain(text)
    assert plain.count("\n") == text.count("\n")
    assert "[[" not in plain
    assert plain.split("\n")[2].endswith("\\")
    assert "float4{1," in plain


def test_what_clang_lacks_is_rewritten() -> None:
    """Vectors by any name, products like pointers, function constants, bfloat from half."""
    text = """using pair = vec<T, 2>;
pair f(pair a, vec<T, 2>
  b) { short2 at(x * y, z); return g ? pair(a.x, -b.y) : a; }
constant bool wide [[function_constant(0)]];
bfloat h(half x) { return static_cast<bfloat>(x); }
"""
    plain = check.plain(text)
    assert "pair f(pair a, vec<T, 2>\n  b)" in plain
    assert "short2 at{x * y, z};" in plain
    assert "pair{a.x, -b.y}" in plain
    assert "constant bool wide = {};" in plain
    assert "static_cast<bfloat>((float)x)" in plain


@pytest.mark.skipif("JM_MLX_INCLUDE" not in os.environ, reason="JM_MLX_INCLUDE is not set")
def test_accepts_the_kernels_of_mlx() -> None:
    """mlx-metal 0.32.4: 84 of 98 headers; the rest need the tensor operations of Metal 4."""
    found = check.check_mlx(Path(os.environ["JM_MLX_INCLUDE"]))
    refused = {name: text for name, text in found.items() if text and "nax" not in name}
    assert not refused
    assert len(found) - sum(map(bool, found.values())) >= 84
