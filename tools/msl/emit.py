"""Writes a parsed kernel file for CUDA, for the simulator, as one MSL text, or as a table.

The text of the kernels stays as it is, token by token and line by line. What changes: attributes
and explicit instantiations go, pointers get the form the target has for their address space, and
each instance gets an entry point made from its signature.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .lexer import Token, error
from .parse import QUALIFIERS, SPACES, Constant, Instance, Param, Unit, array_sizes, close, declared

# Files whose kernels stream the matrix `a` at the memory's speed. On CUDA they are told in a last
# argument how many of its bytes to fetch ahead (Step::ahead of csrc/plan.h).
STREAMING = {"gemv"}

# Kernels of which so many threadgroups are asked to run on an NVIDIA multiprocessor, in 168
# registers a thread; with more there are 8 simdgroups on it instead of 12. On an H200, against
# the registers they take by themselves: 0.74 of the time for 1310 matrices 40x40, 0.95 for 10000;
# 0.72 and 0.98 at 48x48 (168 bytes spilled), 1.02 for 1000; 1.03 for 3640 and 0.91 for 40000
# matrices 24x24 (120 bytes). At 56x56 spills ate the gain.
MIN_GROUPS = {r"svd_twin_vectors_f32_n4[08]": 12, r"svd_ring_vectors_\w+_n24": 3}


def write(path: Path, text: str) -> None:
    """Leaves a file that holds the text already as it is: nothing is compiled anew."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _text(tokens: list[Token]) -> str:
    return " ".join(t.text for t in tokens)


def _rewrite(unit: Unit, target: str) -> list[Token]:
    """The unit's tokens with address spaces in the form of the target."""
    tokens, out = unit.tokens, []
    i = depth = 0
    while i < len(tokens):
        token = tokens[i]
        if token.text in ("{", "}"):
            depth += 1 if token.text == "{" else -1
        if token.text == "[" and i + 1 < len(tokens) and tokens[i + 1].text == "[":
            i = close(tokens, i) + 1  # an attribute
            continue
        if token.text == "kernel":
            i += 1
            continue
        if token.kind == "pragma" and target == "sim":
            i += 1
            continue
        if target == "sim" and token.text not in SPACES and tokens[i - 1].text in (";", "{", "}"):
            name = declared(tokens, i)
            if name and tokens[name + 1].text == "[":
                sizes, end = array_sizes(tokens, name + 1)
                out += [_array(tokens[i:name], sizes), tokens[name]]
                i = end
                continue
        if token.text not in SPACES or (i and tokens[i - 1].text in (".", "->", "::")):
            out.append(token)
            i += 1
            continue
        i = _rewrite_space(unit, tokens, i, out, target, depth)
    return out


def _rewrite_space(
    unit: Unit, tokens: list[Token], i: int, out: list[Token], target: str, depth: int
) -> int:
    """Rewrites the declaration whose address space is tokens[i]; returns where to go on."""
    space = tokens[i]

    def make(text: str) -> Token:
        return Token("identifier", text, space.file, space.line, True)

    j = i + 1
    while tokens[j].text in QUALIFIERS:
        j += 1
    start = j
    j += 1
    while tokens[j].text in ("::", "<") or tokens[j - 1].text == "::":
        j = close(tokens, j) + 1 if tokens[j].text == "<" else j + 1
    type_ = tokens[start:j]
    const = any(t.text == "const" for t in tokens[i + 1 : start])
    while tokens[j].text == "const":
        const, j = True, j + 1
    if space.text == "constant" and depth == 0 and tokens[j].kind == "identifier":
        # A constant of the file, or a function constant.
        function_constant = tokens[j + 1].text == "[" == tokens[j + 2].text
        if function_constant:
            constant = next(c for c in unit.constants if c.name == tokens[j].text)
            out += [make(_declare(constant, target))]
            return next(k for k in range(j, len(tokens)) if tokens[k].text == ";") + 1
        words = [make("constexpr")]
    else:
        words = [make("const")] if const or space.text == "constant" else []
    if space.text != "thread" and tokens[j].text == "*":
        if target == "sim":
            name = f"jm_pointer<jm_space::{space.text}_, {_text(words + type_)}>"
            out.append(make(name))
        else:
            out += [*words, *type_, make("*")]
        return j + 1
    if space.text in ("device", "threadgroup"):
        raise error(space, f"{space.text} is used only for pointers")
    if target == "sim" and tokens[j + 1].text == "[":  # T x[N]
        sizes, end = array_sizes(tokens, j + 1)
        out += [*words, _array(type_, sizes), tokens[j]]
        return end
    if target == "sim" and tokens[j].text == "(":  # T (&x)[N]
        sizes, end = array_sizes(tokens, j + 4)
        out += [*words, _array(type_, sizes), *tokens[j + 1 : j + 3]]
        return end
    out += [*words, *type_]
    return j


def _array(type_: list[Token], sizes: list[list[Token]]) -> Token:
    """The type of an array in the simulator, which judges every index."""
    text = _text(type_)
    for size in map(_text, reversed(sizes)):
        text = f"jm_array<{text}, {f'({size})' if '>' in size else size}>"
    return Token("identifier", text, type_[0].file, type_[0].line, True)


def _declare(constant: Constant, target: str) -> str:
    if target == "sim":
        return (
            f"static {constant.type} {constant.name}; "
            f"static const ::jml::sim::ConstantRegistration jm_constant_{constant.index}"
            f'(JM_SIM_CHECKED, "{constant.name}", {constant.index}, '
            f"&{constant.name}, sizeof({constant.name}));"
        )
    return f"constexpr {constant.type} {constant.name} = JM_CONSTANT_{constant.index};"


def _layout(tokens: list[Token]) -> str:
    """Tokens as text, each on the line it came from, by #line directives."""
    rows: list[str] = []
    file, line, row = "", -1, ""
    for token in tokens:
        if (token.file, token.line) != (file, line):
            if row:
                rows.append(row)
            gap = token.line - line
            if token.file == file and 0 < gap <= 4:
                rows += [""] * (gap - 1)
            else:
                rows.append(f'#line {token.line} "{token.file}"')
            file, line, row = token.file, token.line, ""
        if token.kind == "pragma":
            rows.append(token.text)
            rows.append(f'#line {token.line + 1} "{token.file}"')
            line, row = token.line + 1, ""
            continue
        row += (" " if row else "") + token.text
    rows.append(row)
    return "\n".join(rows) + "\n"


def _substitute(instance: Instance, tokens: list[Token]) -> str:
    given = dict(zip((n for _, n in instance.function.template), instance.args, strict=True))
    words: list[str] = []
    for t in tokens:
        words.append(_text(given[t.text]) if t.text in given else t.text)
    return " ".join(words)


def _callee(instance: Instance) -> str:
    args = ", ".join(_text(a) for a in instance.args)
    return f"{instance.function.name}<{args}>" if instance.args else instance.function.name


def _double(unit: Unit) -> list[str]:
    """What kernels must know of double, ahead of those that are made for it."""
    if not any(i.double for i in unit.instances):
        return []
    path = Path(__file__).parents[2] / "kernels" / "msl_double.h"
    return ['#line 1 "kernels/msl_double.h"', path.read_text(encoding="utf-8")]


def emit_cuda(unit: Unit) -> str:
    """CUDA C++ for NVRTC. -DJM_ENTRY_<kernel> (or -DJM_ENTRY_ALL) chooses the entry points.

    -DJM_MIN_GROUPS=n asks for so few registers that n threadgroups run on a multiprocessor. Without
    it MIN_GROUPS says how many, and else two are asked for where one would leave it nearly idle: at
    320 threads that took 0.78 of the time on an H200 (svd_block8_vectors_f32_n80, 190 to 390 bytes
    spilled); at 384 and more threads the spills ate the gain.
    """
    rows = [f"// Generated from {unit.file}. Do not edit.", '#include "msl_cuda.h"']
    rows += ["#ifdef JM_MIN_GROUPS", "#define JM_GROUPS(threads, least) JM_MIN_GROUPS", "#else"]
    groups = "((least) > 0 ? (least) : (threads) > 256 && (threads) <= 320 ? 2 : 1)"
    rows += [f"#define JM_GROUPS(threads, least) {groups}", "#endif"]
    rows += ["namespace jm_kernels {", "using namespace metal;", *_double(unit)]
    rows.append(_layout(_rewrite(unit, "cuda")))
    rows += ["}  // namespace jm_kernels", '#line 1 "generated entry points"']
    for instance in unit.instances:
        rows += _cuda_entry(instance)
    return "\n".join(rows) + "\n"


def _cuda_entry(instance: Instance) -> list[str]:
    params: list[str] = []
    calls: list[str] = []
    scratch = [p for p in instance.function.params if p.attribute == "threadgroup"]
    for p in instance.function.params:
        type_ = f"{'const ' if p.const else ''}{_substitute(instance, p.type)}"
        if p.attribute == "buffer" and p.space == "device":
            params.append(f"{type_}* {p.name}")
            calls.append(p.name)
        elif p.attribute == "buffer":
            params.append(f"const {type_} {p.name}")
            calls.append(p.name)
        elif p.attribute == "threadgroup":
            # The first starts at 0; each further one is told where by the host.
            offset = "0" if p is scratch[0] else f"jm_offset_{p.index}"
            calls.append(f"reinterpret_cast<{type_}*>(jm_scratch + {offset})")
        else:
            kind = "3" if p.type[0].text == "uint3" else ""
            calls.append(f"jm_{p.attribute}{kind}()")
    params += [f"unsigned jm_offset_{p.index}" for p in scratch[1:]]
    begin = "  jm_begin();"
    file, first = instance.function.token.file, instance.function.params[0].name
    if Path(file).stem in STREAMING and first == "a":
        params.append("unsigned long jm_ahead")
        begin = "  jm_begin(a, jm_ahead);"
    name = instance.host_name
    limit = _substitute(instance, instance.function.max_threads)
    least = next((n for pattern, n in MIN_GROUPS.items() if re.fullmatch(pattern, name)), 0)
    bounds = f"__launch_bounds__({limit}, JM_GROUPS({limit}, {least})) " if limit else ""
    rows = [f"#if defined(JM_ENTRY_ALL) || defined(JM_ENTRY_{name})", "namespace jm_kernels {"]
    rows.append(f'extern "C" __global__ void {bounds}{name}({", ".join(params)}) {{')
    if scratch:
        rows.append("  extern __shared__ __align__(16) unsigned char jm_scratch[];")
    rows += [begin, f"  {_callee(instance)}({', '.join(calls)});", "}", "}", "#endif"]
    return rows


def emit_sim(unit: Unit, checked: bool) -> str:
    """C++ for the simulator; registers every instance when the library is loaded."""
    rows = [f"// Generated from {unit.file}. Do not edit."]
    rows += [f"#define JM_SIM_CHECKED {int(checked)}", '#include "msl_sim.h"']
    rows += ["namespace {", "using namespace jm_msl;", "using namespace jm_msl::metal;"]
    rows += _double(unit)
    rows.append(_layout(_rewrite(unit, "sim")))
    rows.append('#line 1 "generated entry points"')
    for number, instance in enumerate(unit.instances):
        rows += _sim_entry(instance, number, unit.file)
    rows.append("}  // namespace")
    return "\n".join(rows) + "\n"


def _sim_entry(instance: Instance, number: int, file: str) -> list[str]:
    calls: list[str] = []
    table: list[str] = []
    for p in instance.function.params:
        type_ = f"{'const ' if p.const else ''}{_substitute(instance, p.type)}"
        kind, read_only = _kind(p), str(p.const or p.space == "constant").lower()
        size = f"sizeof({_substitute(instance, p.type)})"
        if kind == "buffer":
            calls.append(f"jm_buffer<{type_}>({p.index})")
        elif kind == "params":
            calls.append(f"jm_params<{type_}>({p.index})")
        elif kind == "threadgroup":
            calls.append(f"jm_scratch<{type_}>({p.index})")
        else:
            vector = "3" if p.type[0].text == "uint3" else ""
            calls.append(f"jm_id{vector}(jm_ids::{p.attribute}_)")
            continue
        table.append(
            f'{{"{p.name}", ::jml::sim::ArgKind::{kind}_, {p.index}, {read_only}, {size}}}'
        )
    function = instance.function.token
    limit = _substitute(instance, instance.function.max_threads) or "0"
    return [
        f"void jm_entry_{number}() {{ {_callee(instance)}({', '.join(calls)}); }}",
        f"const ::jml::sim::Arg jm_args_{number}[] = {{{', '.join(table)}}};",
        f"const ::jml::sim::KernelRegistration jm_kernel_{number}(JM_SIM_CHECKED, "
        f'"{instance.host_name}", "{file}", {function.line}, jm_entry_{number}, '
        f"jm_args_{number}, {len(table)}, {limit});",
    ]


def _kind(p: Param) -> str:
    if p.attribute == "buffer":
        return "params" if p.space == "constant" else "buffer"
    return "threadgroup" if p.attribute == "threadgroup" else "id"


def table(unit: Unit) -> dict[str, Any]:
    """The kernels of a file as plain data: names, template values, arguments in order."""
    kernels = []
    for instance in unit.instances:
        names = [n for _, n in instance.function.template]
        args = []
        for p in instance.function.params:
            arg: dict[str, Any] = {
                "name": p.name,
                "kind": _kind(p),
                "type": _substitute(instance, p.type),
            }
            if _kind(p) == "id":
                arg["id"] = p.attribute
            else:
                arg["index"] = p.index
                arg["read_only"] = p.const or p.space == "constant"
            args.append(arg)
        kernels.append(
            {
                "name": instance.host_name,
                "function": instance.function.name,
                "file": instance.function.token.file,
                "line": instance.function.token.line,
                "double": instance.double,
                "template": {n: _text(a) for n, a in zip(names, instance.args, strict=True)},
                "arguments": args,
            }
        )
    constants = [{"name": c.name, "type": c.type, "index": c.index} for c in unit.constants]
    return {
        "file": unit.file,
        "sources": unit.files,
        "kernels": kernels,
        "constants": constants,
        "structs": unit.structs,
        "variants": unit.variants,
    }


def emit_json(unit: Unit) -> str:
    return json.dumps(table(unit), indent=1) + "\n"
