"""Mutants of kernels/gemv.metal: the simulator notices every barrier, bound and address space."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from test_kernels_gemv import VARIANTS, case, product, run

from tools.msl.emit import emit_sim
from tools.msl.lexer import MslError
from tools.msl.parse import parse_file
from tools.msl.simulate import ROOT, CompileError, simulator, unload

SOURCE = (ROOT / "kernels" / "gemv.metal").read_text()
CODE_START = SOURCE.index("#ifndef JM_HOST\n", SOURCE.index("#define GEMV_V("))
# The smallest kernels that together run all code there is; each mutant runs those that it changes.
BY_ROWS = ("gemv_rows_f32_m2", "gemv_any_c64_m1", "gemv_anysplit_c64_m4")
BY_COLUMNS = ("gemv_column_c64_m1", "gemv_pair_f16_m4", "gemv_wideread_bf16_m1")
HELPERS = ("gemv_finish_f16", "gemv_finish_bf16", "gemv_finish_c64", "gemv_convert_f16c64")


def line_of(text: str) -> int:
    return SOURCE[: SOURCE.index(text)].count("\n") + 1


PARTS = (
    (line_of("// U chunks of R rows"), (*BY_ROWS, *BY_COLUMNS)),
    (line_of("// Adds the products of U rows"), BY_ROWS),
    (line_of("// Adds the sums of the parts"), BY_COLUMNS),
    (SOURCE.count("\n") + 2, ("gemv_anysplit_c64_m4",)),
)


def kernels_of(line: int) -> tuple[str, ...]:
    return next(kernels for end, kernels in PARTS if line < end)


def code_lines() -> Iterator[tuple[int, int, str]]:
    """Line number, offset and text of each line of kernel code, without comments."""
    offset = 0
    for number, row in enumerate(SOURCE.split("\n"), 1):
        if offset >= CODE_START:
            yield number, offset, row.split("//")[0]
        offset += len(row) + 1


def mutants() -> dict[str, str]:
    """Changed sources by name: every barrier, every bound, every address space."""
    found: dict[str, str] = {}

    def put(kind: str, number: int, start: int, end: int, text: str) -> None:
        name = f"{kind}:{number}"
        while name in found:
            name += "+"
        found[name] = SOURCE[:start] + text + SOURCE[end:]

    spaces: set[str] = set()
    for number, offset, row in code_lines():
        for m in re.finditer(r"\w+_barrier\(mem_flags::\w+\);", row):
            put("barrier", number, offset + m.start(), offset + m.end(), "")
        for m in re.finditer(r" <=? (?!0\.)", row):
            other = " <= " if m[0] == " < " else " < "
            if "<<" not in row and "x < " not in row[: m.end()]:
                put("bound", number, offset + m.start(), offset + m.end(), other)
        # Of the same declaration in several kernels, one.
        for m in re.finditer(r"\b(device|threadgroup) (const )?\w+\* \w+", row):
            if m[0] in spaces:
                continue
            spaces.add(m[0])
            other = "threadgroup" if m[1] == "device" else "device"
            put("space", number, offset + m.start(), offset + m.start() + len(m[1]), other)
    return found


# Mutants that change nothing that matters: the mutated line and the one after it, and the reason.
EQUIVALENT = {
    (
        "for (int e = 0; e + 1 < V; e += 2) {",
        "float ai = conjugate * a[e + 1];",
    ): "V is even",
    (
        "for (int r = 0; r < R; ++r) expand<WORDS == 0 ? 0 : KIND, V / E, V>(aw[u][r], av[r]);",
        "#pragma unroll",
    ): "a fault that is not seen: references one past an array's end pass -fsanitize=bounds",
    (
        "for (int u = 0; u < U; ++u)",
        "load_words<T, WORDS, V / E>(a + long(k + u) * p.stride, inside && k + u < end, aw[u]);",
    ): "a fault that is not seen, as above",
    (
        "for (; c + U * lanes <= end; c += U * lanes)",
        "add_chunks<T, X, KIND, XKIND, W, WORDS, R, U, M, false>"
        "(from, x, row, vector, c + lane, lanes,",
    ): "the last full step is taken with guards instead",
    (
        "if (c < end)",
        "add_chunks<T, X, KIND, XKIND, W, WORDS, R, U, M, true>"
        "(from, x, row, vector, c + lane, lanes,",
    ): "one more step, behind the end for every lane, adds nothing",
    (
        "for (int first = 0; first < R * M; first += L) {",
        "float own_re = 0.0f;",
    ): "outputs past the last one are not stored",
    (
        "for (int i = 0; i < L; ++i) {",
        "if (first + i < R * M) {",
    ): "no lane takes sum L",
    (
        "if (first + i < R * M) {",
        "float sum = lanes_sum<L>(re[(first + i) / R % M][(first + i) % R]);",
    ): "the first sum again, for a lane that stores nothing",
    (
        "for (int top = begin; top < end; top += 32 * S) {",
        "int k = top + int(simdgroup) * 32;",
    ): "one more round, of no rows",
}


def build(text: str, kernels: tuple[str, ...]) -> Path | str:
    """The mutant's library, or who refused it."""
    try:
        unit = parse_file(ROOT / "kernels" / "gemv.metal", "kernels/gemv.metal", text)
        unit.instances = [i for i in unit.instances if i.host_name in (*kernels, *HELPERS)]
        return simulator().build(emit_sim(unit, checked=True), optimize="-O0")
    except MslError:
        return "generator"
    except CompileError:
        return "compiler"


def caught(built: Path | str, kernels: tuple[str, ...]) -> str | None:
    """What caught the mutant: generator, compiler, judge or numbers; None if nothing did."""
    if isinstance(built, str):
        return built
    library = ctypes.CDLL(str(built))
    try:
        return next((w for w in (verdict(k) for k in kernels) if w), None) or converts()
    finally:
        unload(library)


def verdict(name: str) -> str | None:
    v = VARIANTS[name]
    unit = v.chunk // v.width
    if v.transposed:
        # Half of a simdgroup's columns, and more rows than one round of all simdgroups.
        shapes = [(16 * unit, 32 * v.simdgroups + 19, 1), (unit * 33, 37, 2)]
    else:
        long = 32 * v.unroll * (v.simdgroups if v.splits else 1)
        shapes = [(v.outputs + 1, (long + 3) * unit, 1), (3, long * unit, 2)]
    for outputs, depth, parts in shapes:
        a, x = case(v, 2, outputs, depth, v.vectors + 1)
        y, bias = (case(v, 2, outputs, outputs, v.vectors + 1, seed=s)[1] for s in (3, 4))
        o = run(simulator(), v, a, x, y=y, bias=bias, residual=y, beta=2.0,
                parts=parts if v.splits else 1)  # fmt: skip
        if o.findings:
            return "judge"
        want = product(v, a, x) + 3 * y + bias
        eps = 2.0**-8 if v.x_storage == "bfloat" else 2.0**-10
        if not np.allclose(o.out, want, rtol=3 * eps, atol=40 * eps):
            return "numbers"
    return None


def converts() -> str | None:
    from test_kernels_gemv import Params

    x, out = np.arange(300).astype(np.float16), np.full(600, 77.0, np.float32)
    found = simulator().launch(
        "gemv_convert_f16c64",
        grid=2,
        threads=256,
        buffers={0: x, 1: out},
        params=(2, Params(outputs=300)),
    )
    if found:
        return "judge"
    return None if np.array_equal(out.view(np.complex64), x.astype(np.complex64)) else "numbers"


def test_mutants_are_caught(capsys: pytest.CaptureFixture[str]) -> None:
    every = mutants()
    assert {k.split(":")[0] for k in every} == {"barrier", "bound", "space"}
    rows = [row.strip() for row in SOURCE.split("\n")]
    simulator()  # built before two threads ask for it
    kernels = [kernels_of(int(name.split(":")[1].rstrip("+"))) for name in every]
    survivors: list[str] = []
    by: dict[str, int] = {}
    with ThreadPoolExecutor(2) as pool:
        libraries = pool.map(build, every.values(), kernels)
        for name, library, which in zip(every, libraries, kernels, strict=True):
            what = caught(library, which)
            at = int(name.split(":")[1].rstrip("+")) - 1
            if what is None and (rows[at], rows[at + 1]) not in EQUIVALENT:
                survivors.append(f"{name} {rows[at]} // {rows[at + 1]}")
            by[str(what)] = by.get(str(what), 0) + 1
    with capsys.disabled():
        print(f"\n{len(every)} mutants caught by: {by}")
    assert not survivors, "\n".join(survivors)
    # Unchanged, the same trial passes.
    whole = (*BY_ROWS, *BY_COLUMNS)
    assert caught(build(SOURCE, whole), whole) is None


def test_every_equivalent_mutant_is_still_in_the_source() -> None:
    rows = [row.strip() for row in SOURCE.split("\n")]
    assert set(EQUIVALENT) <= set(pairwise(rows))
