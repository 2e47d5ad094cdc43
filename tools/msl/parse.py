"""Finds kernels and their instantiations in preprocessed tokens, and enforces the dialect."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from .lexer import Token, error
from .preprocess import Preprocessor

SPACES = frozenset({"device", "constant", "threadgroup", "thread"})
QUALIFIERS = frozenset({"const", "volatile", "constexpr"})
SCALARS = frozenset(
    {"bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "size_t"}
    | {"float", "half", "bfloat"}
    | {f"{u}int{bits}_t" for u in ("", "u") for bits in (8, 16, 32, 64)}
)
TYPES = SCALARS | {f"{s}{n}" for s in ("int", "uint", "float") for n in (2, 3, 4)} | {"void"}

# What differs between threads decides where barriers and returns may stand.
UNIFORM, BY_SIMDGROUP, BY_LANE = 0, 1, 2
IDS = {
    "threadgroup_position_in_grid": UNIFORM,
    "threadgroups_per_grid": UNIFORM,
    "threads_per_threadgroup": UNIFORM,
    "simdgroups_per_threadgroup": UNIFORM,
    "threads_per_simdgroup": UNIFORM,
    "simdgroup_index_in_threadgroup": BY_SIMDGROUP,
    "thread_index_in_simdgroup": BY_LANE,
    "thread_index_in_threadgroup": BY_LANE,
    "thread_position_in_threadgroup": BY_LANE,
    "thread_position_in_grid": BY_LANE,
}
VECTOR_IDS = frozenset(
    {
        "threadgroup_position_in_grid",
        "threadgroups_per_grid",
        "threads_per_threadgroup",
        "thread_position_in_threadgroup",
        "thread_position_in_grid",
    }
)
STATEMENTS = frozenset({"return", "else", "do", "case"})
BARRIERS = frozenset({"threadgroup_barrier", "simdgroup_barrier"})
UNIFORM_RESULTS = frozenset({"simd_any", "simd_all", "simd_sum", "simd_max", "simd_min"})
SIMD_FUNCTIONS = UNIFORM_RESULTS | {
    "simd_shuffle",
    "simd_shuffle_xor",
    "simd_shuffle_up",
    "simd_shuffle_down",
    "simd_broadcast",
    "make_filled_simdgroup_matrix",
    "simdgroup_load",
    "simdgroup_store",
    "simdgroup_multiply_accumulate",
}
MAX_BUFFERS, MAX_THREADGROUP_ARGUMENTS = 31, 31

FORBIDDEN = {
    "double": "Metal has no double",
    "sampler": "samplers are not in the dialect",
    "imageblock": "image blocks are not in the dialect",
    "goto": "no goto",
    "new": "no allocation",
    "delete": "no allocation",
    "throw": "no exceptions",
    "try": "no exceptions",
    "virtual": "no virtual functions",
    "dynamic_cast": "no run-time types",
    "typeid": "no run-time types",
    "asm": "no assembly",
    "auto": "write the type: in the simulator an element is a checked reference",
    "static": "no static variables",
    "std": "use metal, not std",
    "quad_shuffle": "quad functions are not in the dialect",
    "visible": "no visible functions",
    "vertex": "compute kernels only",
    "fragment": "compute kernels only",
    "threadgroup_imageblock": "image blocks are not in the dialect",
    "ray_data": "no ray tracing",
    "object_data": "no mesh shaders",
}
FORBIDDEN_PREFIXES = {
    "texture": "textures are not in the dialect",
    "depth2d": "textures are not in the dialect",
    "atomic": "atomics are not in the dialect yet: teach the simulator to judge them first",
    "simdgroup_matrix": "write simdgroup_float8x8",
    "simdgroup_half8x8": "only simdgroup_float8x8 is in the dialect",
    "simdgroup_bfloat8x8": "only simdgroup_float8x8 is in the dialect",
    "simdgroup_async": "asynchronous copies are not in the dialect",
}
ALONE = "an array is declared in a statement of its own, or the simulator does not judge it"
SWIZZLE = re.compile(r"^(?:[xyzw]{2,4}|[rgba]{2,4})$")


@dataclass
class Param:
    name: str
    token: Token
    space: str | None
    const: bool
    type: list[Token]
    declarator: str  # "*", "&", "array" or "value"
    attribute: str | None = None
    index: int | None = None


@dataclass
class Function:
    name: str
    token: Token
    template: list[tuple[str, str]]  # (kind, name): ("typename", "T"), ("int", "N")
    params: list[Param]
    body: list[Token]
    kernel: bool
    max_threads: list[Token] = field(default_factory=list)  # an expression; empty: not said


@dataclass
class Instance:
    """One kernel that can be launched, with the values of its template parameters."""

    host_name: str
    function: Function
    args: list[list[Token]]
    token: Token
    double: bool = False  # only for GPUs with 64-bit floating point; not in the text


@dataclass
class Constant:
    """A function constant: given when the kernel is compiled for a device."""

    name: str
    type: str
    index: int
    token: Token


@dataclass
class Unit:
    file: str
    tokens: list[Token] = field(default_factory=list)  # without instantiations
    functions: dict[str, Function] = field(default_factory=dict)
    instances: list[Instance] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    types: set[str] = field(default_factory=set)
    structs: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # (type, name)
    variants: dict[str, list[list[str]]] = field(default_factory=dict)  # rows of X-macro tables
    files: list[str] = field(default_factory=list)


def parse_file(path: Path, name: str | None = None, text: str | None = None) -> Unit:
    """Reads one ``.metal`` file. Raises MslError, whose text starts with file:line."""
    preprocessor = Preprocessor()
    tokens = preprocessor.read(path, name, text)
    unit = Unit(name or str(path), files=preprocessor.files)
    for chunk in _chunks(tokens):
        _declaration(unit, chunk)
    for macro in preprocessor.macros:
        if macro.endswith("_VARIANTS"):
            unit.variants[macro] = _rows(preprocessor, macro, tokens[0])
        if macro.endswith("_DOUBLE_VARIANTS"):
            _double_instances(unit, macro, tokens[0])
    _check_tokens(unit)
    for function in unit.functions.values():
        if function.kernel:
            _check_kernel(unit, function)
    return unit


def _rows(preprocessor: Preprocessor, macro: str, place: Token) -> list[list[str]]:
    """The rows of the table ``#define NAME_VARIANTS(X) X(a, b) X(c, d)``."""
    call = [Token("identifier", t, place.file, place.line) for t in (macro, "(", "JM_ROW", ")")]
    tokens = preprocessor.expand(call)
    rows: list[list[str]] = []
    for i, token in enumerate(tokens):
        if token.text == "JM_ROW":
            cells = split(tokens[i + 2 : close(tokens, i + 1)])
            rows.append([" ".join(t.text for t in c) for c in cells])
    return rows


def _double_instances(unit: Unit, macro: str, place: Token) -> None:
    """What the text itself cannot instantiate, because Metal has no such type."""
    for name, function, *values in unit.variants[macro]:
        kernel = unit.functions.get(function)
        if kernel is None or not kernel.kernel:
            raise error(place, f"{macro}: {name}: {function} is not a kernel")
        given = values[: len(kernel.template)]
        args = [[Token("identifier", v, place.file, place.line)] for v in given]
        unit.instances.append(Instance(name, kernel, args, kernel.token, double=True))


def close(tokens: list[Token], i: int) -> int:
    """Index of the bracket that closes the one at i; '<' counts only when i is one."""
    pairs = {"(": ")", "[": "]", "{": "}", "<": ">"}
    opening, closing = tokens[i].text, pairs[tokens[i].text]
    depth = 0
    for j in range(i, len(tokens)):
        text = tokens[j].text
        if text == opening:
            depth += 1
        elif text == closing:
            depth -= 1
        elif text == ">>" and opening == "<":
            depth -= 2
        if depth <= 0:
            return j
    raise error(tokens[i], f"{opening} without {closing}")


def declared(tokens: list[Token], i: int) -> int | None:
    """Where the name is that a statement at ``i`` declares."""
    while tokens[i].text in QUALIFIERS or tokens[i].text in ("constant", "thread"):
        i += 1
    if tokens[i].kind != "identifier" or tokens[i].text in STATEMENTS:
        return None
    i += 1
    while tokens[i].text == "::":
        i += 2
    if tokens[i].text == "<":
        # Template arguments, or a comparison, which nothing closes.
        depth = 0
        while tokens[i].text not in (";", "{", "("):
            depth += {"<": 1, ">": -1, ">>": -2}.get(tokens[i].text, 0)
            i += 1
            if depth <= 0:
                break
    return i if tokens[i].kind == "identifier" else None


def array_sizes(tokens: list[Token], i: int) -> tuple[list[list[Token]], int]:
    """What stands in the brackets from ``i`` on, and where they end."""
    sizes: list[list[Token]] = []
    while tokens[i].text == "[":
        end = close(tokens, i)
        sizes.append(tokens[i + 1 : end])
        i = end + 1
    return sizes, i


def split(tokens: list[Token]) -> list[list[Token]]:
    """Splits at commas outside of every bracket."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for t in tokens:
        depth += (t.text in ("(", "[", "{", "<")) - (t.text in (")", "]", "}", ">"))
        if t.text == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(t)
    return [p for p in parts if p]


def _chunks(tokens: list[Token]) -> list[list[Token]]:
    """Cuts a file into declarations: up to ';', or to the '}' of a function body."""
    chunks: list[list[Token]] = []
    start = i = 0
    while i < len(tokens):
        text = tokens[i].text
        if text in "([":
            i = close(tokens, i)
        elif text == "{":
            head = tokens[start:i]
            i = close(tokens, i)
            # A struct or an initialiser goes on to its ';'.
            if any(t.text == ")" for t in head) and not any(t.text == "=" for t in head):
                chunks.append(tokens[start : i + 1])
                start = i + 1
        elif text == ";":
            chunks.append(tokens[start : i + 1])
            start = i + 1
        i += 1
    if start < len(tokens):
        raise error(tokens[start], "declaration without an end")
    return [c for c in chunks if [t.text for t in c] != [";"]]


def _declaration(unit: Unit, chunk: list[Token]) -> None:
    head = chunk[0]
    if head.text == "template" and chunk[1].text != "<":
        _instance(unit, chunk)
        return
    unit.tokens += chunk
    if head.text in ("using", "typedef", "static_assert"):
        if head.text == "using" and [t.text for t in chunk] != ["using", "namespace", "metal", ";"]:
            unit.types.add(chunk[1].text)
        return
    if head.text == "template":
        following = chunk[close(chunk, 1) + 1 :]
        if following[0].text in ("struct", "using"):
            unit.types.add(following[1].text)
            return
    if head.text in ("struct", "enum"):
        unit.types.add(chunk[1].text)
        if head.text == "struct":
            _struct(unit, chunk)
        return
    if head.text == "constant":
        _file_constant(unit, chunk)
        return
    if any(t.text == "(" for t in chunk) and chunk[-1].text == "}":
        function = _function(unit, chunk)
        if function.name in unit.functions:
            raise error(function.token, f"function {function.name} is defined twice")
        unit.functions[function.name] = function
        return
    raise error(head, f"the dialect has no such declaration at file scope: {head.text} ...")


def _struct(unit: Unit, chunk: list[Token]) -> None:
    fields: list[tuple[str, str]] = []
    statement: list[str] = []
    for token in chunk[3:-2]:
        if token.text != ";":
            statement.append(token.text)
            continue
        if len(statement) != 2:
            raise error(token, f"struct {chunk[1].text}: one plain field a line, type and name")
        fields.append((statement[0], statement[1]))
        statement = []
    unit.structs[chunk[1].text] = fields


def _file_constant(unit: Unit, chunk: list[Token]) -> None:
    texts = [t.text for t in chunk]
    if "function_constant" in texts:
        at = texts.index("function_constant")
        unit.constants.append(Constant(texts[2], texts[1], int(texts[at + 2]), chunk[0]))
    elif "=" not in texts:
        raise error(chunk[0], "a constant needs a value or [[function_constant(index)]]")


def _instance(unit: Unit, chunk: list[Token]) -> None:
    texts = [t.text for t in chunk]
    if "host_name" not in texts:
        raise error(chunk[0], "explicit instantiation without [[host_name(...)]]")
    name = texts[texts.index("host_name") + 2].strip('"')
    try:
        at = texts.index("decltype")
        function = unit.functions.get(texts[at + 2])
        if function is None or not function.kernel:
            raise error(chunk[0], f"{name}: {texts[at + 2]} is not a kernel defined above")
        args = split(chunk[at + 4 : close(chunk, at + 3)])
        opening = close(chunk, at + 1) + 2
        again = split(chunk[opening + 1 : close(chunk, opening)])
    except (ValueError, IndexError):
        form = "template [[host_name(...)]] [[kernel]] decltype(f<...>) f<...>;"
        raise error(chunk[0], f"{name}: expected {form}") from None
    if [[t.text for t in a] for a in args] != [[t.text for t in a] for a in again]:
        raise error(chunk[0], f"{name}: decltype and declaration name different instances")
    if len(args) != len(function.template):
        raise error(
            chunk[0],
            f"{name}: {function.name} takes {len(function.template)} template arguments, "
            f"got {len(args)}",
        )
    if any(i.host_name == name for i in unit.instances):
        raise error(chunk[0], f"host_name {name} is used twice")
    constants = {c.name for c in unit.constants}
    for token in (t for a in args for t in a):
        if token.text in constants:
            raise error(token, f"function constant {token.text} as a template argument")
    unit.instances.append(Instance(name, function, args, chunk[0]))


def _attributes(tokens: list[Token]) -> tuple[list[Token], list[list[Token]]]:
    """Separates [[...]] from the rest."""
    rest: list[Token] = []
    found: list[list[Token]] = []
    i = 0
    while i < len(tokens):
        if tokens[i].text == "[" and i + 1 < len(tokens) and tokens[i + 1].text == "[":
            end = close(tokens, i)
            found += split(tokens[i + 2 : end - 1])
            i = end + 1
        else:
            rest.append(tokens[i])
            i += 1
    return rest, found


def _function(unit: Unit, chunk: list[Token]) -> Function:
    template: list[tuple[str, str]] = []
    rest = chunk
    if chunk[0].text == "template":
        end = close(chunk, 1)
        for part in split(chunk[2:end]):
            kind = part[0].text
            template.append(("typename" if kind == "class" else kind, part[1].text))
        rest = chunk[end + 1 :]
    brace = next(i for i, t in enumerate(rest) if t.text == "{")
    head, attributes = _attributes(rest[:brace])
    opening = next(i for i, t in enumerate(head) if t.text == "(")
    name = head[opening - 1]
    kernel = False
    max_threads: list[Token] = []
    for attribute in attributes:
        # Attributes of parameters are looked at with the parameter.
        kernel = kernel or attribute[0].text == "kernel"
        if attribute[0].text == "max_total_threads_per_threadgroup":
            max_threads = attribute[2:-1]
    kernel = kernel or any(t.text == "kernel" for t in head[:opening])
    start = next(i for i, t in enumerate(rest) if t is head[opening])
    for attribute in _attributes(rest[:start])[1]:
        if attribute[0].text not in ("kernel", "max_total_threads_per_threadgroup"):
            raise error(attribute[0], f"unknown attribute [[{attribute[0].text}]] on {name.text}")
    params = [_param(unit, p, kernel) for p in split(rest[start + 1 : close(rest, start)])]
    if kernel and not any(t.text == "void" for t in head[: opening - 1]):
        raise error(name, f"kernel {name.text} must return void")
    body = rest[brace + 1 : -1]
    return Function(name.text, name, template, params, body, kernel, max_threads)


def _param(unit: Unit, tokens: list[Token], kernel: bool) -> Param:
    plain, attributes = _attributes(tokens)
    space = next((t.text for t in plain if t.text in SPACES), None)
    const = any(t.text == "const" for t in plain)
    words = [t for t in plain if t.text not in SPACES and t.text not in QUALIFIERS]
    texts = [t.text for t in words]
    if "(" in texts:  # thread float (&x)[N]
        name = words[texts.index("&") + 1]
        kind, type_ = "array", words[: texts.index("(")]
    elif texts.count("*") > 1:
        raise error(words[0], "a pointer to a pointer is not in the dialect")
    elif "*" in texts:
        kind, type_, name = "*", words[: texts.index("*")], words[-1]
    elif "&" in texts:
        kind, type_, name = "&", words[: texts.index("&")], words[-1]
    else:
        kind, type_, name = "value", words[:-1], words[-1]
    param = Param(name.text, name, space, const, type_, kind)
    if kind != "value" and space is None:
        noun = "pointer" if kind == "*" else "reference"
        raise error(name, f"{noun} {name.text} has no address space")
    if kind == "&" and space in ("device", "threadgroup"):
        raise error(name, f"reference {name.text} to {space} memory: pass a pointer")
    if not kernel:
        for a in attributes:
            raise error(a[0], f"[[{a[0].text}]] on a parameter of a function that is no kernel")
        return param
    return _kernel_param(param, attributes)


def _kernel_param(param: Param, attributes: list[list[Token]]) -> Param:
    name = param.token
    if len(attributes) != 1:
        raise error(name, f"kernel parameter {param.name} needs one attribute")
    attribute = attributes[0]
    param.attribute = attribute[0].text
    if param.attribute in ("buffer", "threadgroup"):
        if len(attribute) != 4 or attribute[2].kind != "number":
            raise error(attribute[0], f"expected [[{param.attribute}(number)]]")
        param.index = int(attribute[2].text)
    if param.attribute == "buffer":
        ok = (param.space == "device" and param.declarator == "*") or (
            param.space == "constant" and param.declarator == "&"
        )
        if not ok:
            raise error(name, f"buffer {param.name} must be device T* or constant T&")
        if (param.index or 0) >= MAX_BUFFERS:
            raise error(name, f"buffer index {param.index}: the limit is {MAX_BUFFERS - 1}")
    elif param.attribute == "threadgroup":
        if param.space != "threadgroup" or param.declarator != "*":
            raise error(name, f"{param.name} must be threadgroup T*")
        if (param.index or 0) >= MAX_THREADGROUP_ARGUMENTS:
            raise error(name, f"threadgroup index {param.index}: the limit is 30")
    elif param.attribute in IDS:
        types = ["uint", "uint3"] if param.attribute in VECTOR_IDS else ["uint"]
        if [t.text for t in param.type] not in [[t] for t in types]:
            raise error(name, f"[[{param.attribute}]] {param.name} must be {' or '.join(types)}")
    else:
        raise error(attribute[0], f"unknown attribute [[{param.attribute}]]")
    return param


def _check_tokens(unit: Unit) -> None:
    """Rules that need no more than the tokens around one."""
    constants = {c.name for c in unit.constants}
    type_names = TYPES | unit.types
    for function in unit.functions.values():
        type_names |= {n for k, n in function.template if k == "typename"}
    tokens = unit.tokens
    bodies = {id(t) for f in unit.functions.values() for t in f.body}
    arrays: set[int] = set()
    for i, token in enumerate(tokens):
        text = token.text
        following = tokens[i + 1].text if i + 1 < len(tokens) else ""
        before = tokens[i - 1].text if i else ""
        if token.kind == "identifier":
            member = before in (".", "->")
            if member and SWIZZLE.match(text) and following != "(":
                raise error(token, f"swizzle .{text}: name the components one by one")
            if text in FORBIDDEN and not member and not _static_function(tokens, i):
                raise error(token, f"{text}: {FORBIDDEN[text]}")
            for prefix, why in FORBIDDEN_PREFIXES.items():
                if text.startswith(prefix) and not member:
                    raise error(token, f"{text}: {why}")
            known = text in SIMD_FUNCTIONS or text in BARRIERS
            if text.startswith(("simd_", "simdgroup_")) and following == "(" and not known:
                raise error(token, f"{text} is not in the dialect")
        if text == "threadgroup" and id(token) in bodies and following != "(":
            _check_threadgroup(tokens, i)
        if token.kind == "identifier" and text in type_names and following in ("*", "&"):
            _check_pointer(tokens, i)
        name = declared(tokens, i) if before in (";", "{", "}") else None
        if name:
            _check_alone(tokens, name)
            arrays.add(id(tokens[name]))
        sized = tokens[i - 1].kind == "identifier" and tokens[i - 2].text in type_names
        hidden = sized and id(tokens[i - 1]) not in arrays
        if text == "[" != following and (hidden or before in type_names):
            raise error(token, f"{before}[]: {ALONE}")
        # An index may be a function constant; a size may not.
        if text == "[" and following in constants and sized:
            raise error(token, f"function constant {following} as the size of an array")
        listed = before in ("<", ",") and following in (">", ",")
        if text in constants and listed and _inside_template_arguments(unit, tokens, i):
            raise error(token, f"function constant {text} as a template argument")
        if text in BARRIERS and [t.text for t in tokens[i + 2 : i + 4]] != ["mem_flags", "::"]:
            raise error(token, f"{text} takes one mem_flags value")


def _check_alone(tokens: list[Token], i: int) -> None:
    """Refuses an array behind the name at ``i``, the first of a declaration."""
    while tokens[i].text != ";" and (tokens[i].text != "{" or tokens[i - 1].text == "="):
        if tokens[i].text == "," and tokens[i + 2].text == "[":
            raise error(tokens[i + 1], f"{tokens[i + 1].text}[]: {ALONE}")
        i = close(tokens, i) + 1 if tokens[i].text in ("(", "[", "{") else i + 1


def _static_function(tokens: list[Token], i: int) -> bool:
    """Whether it is ``static type name(...)``: what a struct knows without an object."""
    return tokens[i].text == "static" and tokens[i + 3].text == "("


def _inside_template_arguments(unit: Unit, tokens: list[Token], i: int) -> bool:
    while i > 0 and tokens[i].text not in (";", "{", "}", "("):
        i -= 1
        if tokens[i].text == "<" and tokens[i - 1].text in unit.functions:
            return True
    return False


def _check_threadgroup(tokens: list[Token], i: int) -> None:
    j = i + 1
    while tokens[j].text in QUALIFIERS or tokens[j].kind == "identifier":
        j += 1
        if tokens[j].text == "<":
            j = close(tokens, j) + 1
    if tokens[j].text == "*":
        return
    if tokens[j].text == "&":
        raise error(tokens[i], "reference to threadgroup memory: use a pointer")
    raise error(
        tokens[i],
        "threadgroup variable inside a function: take a threadgroup pointer as an argument, so "
        "that the plan decides its size",
    )


def _check_pointer(tokens: list[Token], i: int) -> None:
    j = i - 1
    while j >= 0 and (tokens[j].text in QUALIFIERS or tokens[j].text == "unsigned"):
        j -= 1
    kind = "pointer" if tokens[i + 1].text == "*" else "reference"
    if j < 0 or tokens[j].text not in SPACES:
        if tokens[j].text in (".", "->"):
            return
        raise error(tokens[i], f"{kind} to {tokens[i].text} has no address space")
    if kind == "reference" and tokens[j].text in ("device", "threadgroup"):
        raise error(tokens[i], f"reference to {tokens[j].text} memory: use a pointer")
    if kind == "pointer" and tokens[j].text == "thread":
        raise error(tokens[i], "thread pointer: pass a reference to the array, which is judged")


def _check_kernel(unit: Unit, function: Function) -> None:
    seen: dict[tuple[str, int], str] = {}
    for p in function.params:
        if p.index is not None and p.attribute is not None:
            key = (p.attribute, p.index)
            if key in seen:
                raise error(p.token, f"{p.name} and {seen[key]} share [[{p.attribute}({p.index})]]")
            seen[key] = p.name
    if sum(p.space == "constant" for p in function.params) > 1:
        raise error(function.token, f"kernel {function.name}: scalars go in one constant struct")
    if function.template and not any(i.function is function for i in unit.instances):
        raise error(function.token, f"kernel template {function.name} is never instantiated")
    if not function.template:
        unit.instances.append(Instance(function.name, function, [], function.token))
    _check_flow(function)


def _check_flow(function: Function) -> None:
    """Refuses returns, barriers and simd functions where only some threads arrive."""
    level = {p.name: IDS[p.attribute] for p in function.params if p.attribute in IDS}
    tokens = function.body
    has_barrier = any(t.text == "threadgroup_barrier" for t in tokens)

    def varies(part: list[Token]) -> int:
        worst, i = UNIFORM, 0
        while i < len(part):
            if part[i].text in UNIFORM_RESULTS and i + 1 < len(part):
                i = close(part, i + 1)
            else:
                worst = max(worst, level.get(part[i].text, UNIFORM))
            i += 1
        return worst

    depth = [UNIFORM] * (len(tokens) + 1)
    for i, token in enumerate(tokens):
        if token.text == "=" and i and tokens[i - 1].kind == "identifier":
            end = next((j for j in range(i, len(tokens)) if tokens[j].text == ";"), len(tokens))
            name = tokens[i - 1].text
            level[name] = max(level.get(name, UNIFORM), varies(tokens[i + 1 : end]))
        if token.text in ("if", "while", "for") and tokens[i + 1].text == "(":
            end = close(tokens, i + 1)
            here = varies(tokens[i + 2 : end])
            for j in range(*_controlled(tokens, end + 1)):
                depth[j] = max(depth[j], here)
        if depth[i] == UNIFORM:
            continue
        which = "some lanes" if depth[i] == BY_LANE else "some simdgroups"
        if token.text == "return" and (depth[i] == BY_LANE or has_barrier):
            raise error(token, f"return by {which} only: predicate the stores instead")
        if token.text == "threadgroup_barrier" or (
            depth[i] == BY_LANE and (token.text in BARRIERS or token.text in SIMD_FUNCTIONS)
        ):
            raise error(token, f"{token.text} reached by {which} only")


def _controlled(tokens: list[Token], start: int) -> tuple[int, int]:
    """The range of the statement at ``start``, with its else branches."""
    i = start
    while True:
        if i >= len(tokens):
            return start, len(tokens)
        if tokens[i].text == "{":
            i = close(tokens, i) + 1
        else:
            while i < len(tokens) and tokens[i].text != ";":
                i = close(tokens, i) if tokens[i].text in "({[" else i
                i += 1
            i += 1
        if i < len(tokens) and tokens[i].text == "else":
            i += 1
            continue
        return start, min(i, len(tokens))
