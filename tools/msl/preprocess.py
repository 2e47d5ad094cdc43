"""A preprocessor for the part of C that kernels use: includes, macros, guards.

It exists because the table of variants is a macro list, which the generator must see expanded,
and because expanding here keeps the line of each use. Conditionals may test only ``JM_HOST`` and
include guards: a kernel that tests for its compiler would no longer be one source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .lexer import MslError, Token, error, tokenize

SYSTEM_HEADERS = frozenset({"metal_stdlib", "metal_simdgroup", "metal_math", "metal_integer"})


@dataclass(frozen=True)
class Macro:
    params: tuple[str, ...] | None  # None: object-like
    body: tuple[Token, ...]


class Preprocessor:
    """Expands one translation unit. ``files`` lists what was read, in order."""

    def __init__(self) -> None:
        self.macros: dict[str, Macro] = {}
        self.files: list[str] = []
        self._once: set[Path] = set()

    def read(self, path: Path, name: str | None = None, text: str | None = None) -> list[Token]:
        """The expanded tokens of ``path``; ``text`` stands in for the file's content."""
        name = name or str(path)
        self.files.append(name)
        source = path.read_text(encoding="utf-8") if text is None else text
        output: list[Token] = []
        pending: list[Token] = []
        guards: list[tuple[bool, Token]] = []
        for row in _rows(list(tokenize(source, name)), source):
            if row[0].kind != "hash":
                if all(on for on, _ in guards):
                    pending += row
                continue
            directive = row[1].text if len(row) > 1 else ""
            if directive in ("ifdef", "ifndef"):
                self._check_guard(row)
                on = (row[2].text in self.macros) == (directive == "ifdef")
                guards.append((on, row[0]))
            elif directive == "else" and guards:
                guards[-1] = (not guards[-1][0], guards[-1][1])
            elif directive == "endif" and guards:
                guards.pop()
            elif directive in ("if", "elif", "else", "endif"):
                raise error(row[0], f"#{directive}: a kernel uses only #ifdef and #ifndef")
            elif all(on for on, _ in guards):
                output += self.expand(pending)
                pending = []
                output += self._directive(directive, row, path)
        if guards:
            raise error(guards[-1][1], "conditional without #endif")
        return output + self.expand(pending)

    def _check_guard(self, row: list[Token]) -> None:
        if len(row) < 3:
            raise error(row[0], "conditional without a name")
        name = row[2].text
        if name != "JM_HOST" and not name.endswith(("_H", "_H_")):
            raise error(
                row[2],
                f"conditional on {name}: a kernel may test only JM_HOST, so that all dialects "
                "compile the same text",
            )

    def _directive(self, directive: str, row: list[Token], path: Path) -> list[Token]:
        rest = row[2:]
        if directive == "include":
            return self._include(row, path)
        if directive == "define":
            self._define(row)
        elif directive == "undef" and rest:
            self.macros.pop(rest[0].text, None)
        elif directive == "pragma":
            if rest and rest[0].text == "once":
                self._once.add(path.resolve())
            elif [t.text for t in rest] == ["unroll"]:
                return [Token("pragma", "#pragma unroll", row[0].file, row[0].line, False, True)]
            else:
                raise error(row[0], "unknown #pragma; known: once, unroll")
        else:
            raise error(row[0], f"unknown directive #{directive}")
        return []

    def _include(self, row: list[Token], path: Path) -> list[Token]:
        rest = row[2:]
        if rest and rest[0].kind == "string":
            target = path.parent / rest[0].text.strip('"')
            if not target.is_file():
                raise error(row[0], f"#include {rest[0].text}: no such file")
            if target.resolve() in self._once:
                return []
            return self.read(target)
        header = "".join(t.text for t in rest).strip("<>")
        if header not in SYSTEM_HEADERS:
            known = ", ".join(sorted(SYSTEM_HEADERS))
            raise error(row[0], f"#include <{header}> is not in the dialect; known: {known}")
        return []

    def _define(self, row: list[Token]) -> None:
        if len(row) < 3 or row[2].kind != "identifier":
            raise error(row[0], "#define without a name")
        name, rest = row[2].text, row[3:]
        params: list[str] | None = None
        if rest and rest[0].text == "(" and not rest[0].space:
            end = next((i for i, t in enumerate(rest) if t.text == ")"), None)
            if end is None:
                raise error(row[0], f"#define {name}: parameter list without )")
            params = [t.text for t in rest[1:end] if t.text != ","]
            rest = rest[end + 1 :]
        self.macros[name] = Macro(None if params is None else tuple(params), tuple(rest))

    def expand(self, tokens: Iterable[Token], hidden: frozenset[str] = frozenset()) -> list[Token]:
        """Tokens with every macro replaced; a replacement stands where its use stood."""
        todo = list(tokens)
        output: list[Token] = []
        i = 0
        while i < len(todo):
            token = todo[i]
            i += 1
            macro = self.macros.get(token.text) if token.kind == "identifier" else None
            if macro is None or token.text in hidden:
                output.append(token)
                continue
            if macro.params is None:
                body = [t.at(token) for t in macro.body]
                output += self.expand(body, hidden | {token.text})
                continue
            if i >= len(todo) or todo[i].text != "(":
                output.append(token)
                continue
            args, i = _arguments(todo, i, token)
            if len(args) != len(macro.params) and not (len(macro.params) == 0 and args == [[]]):
                raise error(
                    token,
                    f"macro {token.text} takes {len(macro.params)} arguments, got {len(args)}",
                )
            body = self._substitute(macro, args, token, hidden)
            # A macro passed by name may be called with what follows it in the body.
            output += self.expand(body, hidden | {token.text})
        return output

    def _substitute(
        self, macro: Macro, args: list[list[Token]], use: Token, hidden: frozenset[str]
    ) -> list[Token]:
        given = dict(zip(macro.params or (), args, strict=False))
        body: list[Token] = []
        tokens = list(macro.body)
        i = 0
        while i < len(tokens):
            token = tokens[i]
            following = tokens[i + 1].text if i + 1 < len(tokens) else ""
            if token.text == "#" and following in given:
                text = " ".join(t.text for t in given[following])
                body.append(Token("string", f'"{text}"', use.file, use.line, True))
                i += 2
            elif token.text == "##" and body and i + 1 < len(tokens):
                right = given.get(following, [tokens[i + 1]])
                left = body.pop()
                joined = left.text + (right[0].text if right else "")
                body.append(Token("identifier", joined, use.file, use.line, left.space))
                body += [t.at(use) for t in right[1:]]
                i += 2
            elif token.text in given:
                arg = given[token.text]
                raw = following == "##"
                body += [t.at(use) for t in (arg if raw else self.expand(arg, hidden))]
                i += 1
            else:
                body.append(token.at(use))
                i += 1
        return body


def _arguments(tokens: list[Token], i: int, use: Token) -> tuple[list[list[Token]], int]:
    """The arguments of a macro call whose '(' is tokens[i], and the index after its ')'."""
    args: list[list[Token]] = [[]]
    depth = 0
    for j in range(i, len(tokens)):
        text = tokens[j].text
        if text in "([{":
            depth += 1
            if depth == 1:
                continue
        elif text in ")]}":
            depth -= 1
            if depth == 0:
                return args, j + 1
        if text == "," and depth == 1:
            args.append([])
        else:
            args[-1].append(tokens[j])
    raise error(use, f"macro {use.text}: argument list without )")


def _rows(tokens: list[Token], source: str) -> list[list[Token]]:
    """Groups tokens into lines; a directive takes its continuation lines along."""
    continued = {n for n, text in enumerate(source.split("\n"), 1) if text.rstrip().endswith("\\")}
    rows: list[list[Token]] = []
    last = 0
    for token in tokens:
        joins = bool(rows) and token.line == last
        if rows and rows[-1][0].kind == "hash" and not joins:
            joins = all(line in continued for line in range(last, token.line))
        if joins:
            rows[-1].append(token)
        else:
            rows.append([token])
        last = token.line
    return rows


__all__ = ["Macro", "MslError", "Preprocessor"]
