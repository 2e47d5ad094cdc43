"""Splits a kernel source into tokens, each with its file and line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

PUNCTUATORS = frozenset(
    {"<<=", ">>=", "...", "->*", "::", "->", "++", "--", "<<", ">>", "<=", ">=", "==", "!="}
    | {"&&", "||", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "##"}
)


class MslError(Exception):
    """A kernel source that breaks a rule of the dialect; the text starts with file:line."""

    def __init__(self, file: str, line: int, message: str) -> None:
        super().__init__(f"{file}:{line}: {message}")
        self.file, self.line, self.message = file, line, message


@dataclass(frozen=True, slots=True)
class Token:
    """One token. ``kind`` is identifier, number, string, character, punct, hash or pragma."""

    kind: str
    text: str
    file: str
    line: int
    space: bool = False  # white space stands before it
    first: bool = False  # first on its line

    def at(self, other: Token) -> Token:
        """The same token, placed where ``other`` stands."""
        return replace(self, file=other.file, line=other.line, first=False)


def error(token: Token, message: str) -> MslError:
    return MslError(token.file, token.line, message)


def tokenize(text: str, file: str) -> Iterator[Token]:
    """Yields the tokens of ``text``; comments and continued lines vanish, line numbers stay."""
    i, line, space, first = 0, 1, False, True
    while i < len(text):
        c = text[i]
        if c == "\n":
            i, line, space, first = i + 1, line + 1, False, True
            continue
        if c in " \t\r\f":
            i, space = i + 1, True
            continue
        if text.startswith("\\\n", i):
            # Tells the preprocessor that a directive goes on.
            i, line, space = i + 2, line + 1, True
            continue
        if text.startswith("//", i):
            end = text.find("\n", i)
            i, space = (len(text) if end < 0 else end), True
            continue
        if text.startswith("/*", i):
            end = text.find("*/", i + 2)
            if end < 0:
                raise MslError(file, line, "comment without an end")
            line, i, space = line + text.count("\n", i, end), end + 2, True
            continue
        start = i
        if c.isalpha() or c == "_":
            kind = "identifier"
            while i < len(text) and (text[i].isalnum() or text[i] == "_"):
                i += 1
        elif c.isdigit() or (c == "." and text[i + 1 : i + 2].isdigit()):
            kind = "number"
            while i < len(text) and (
                text[i].isalnum() or text[i] in "._'" or (text[i] in "+-" and text[i - 1] in "eEpP")
            ):
                # 0xe+1 is three tokens.
                hexadecimal = text[start : start + 2].lower() == "0x"
                if text[i] in "+-" and hexadecimal and text[i - 1] not in "pP":
                    break
                i += 1
        elif c in "\"'":
            kind = "string" if c == '"' else "character"
            i += 1
            while i < len(text) and text[i] != c:
                if text[i] == "\n":
                    raise MslError(file, line, f"{kind} without an end")
                i += 2 if text[i] == "\\" else 1
            i += 1
        else:
            kind = "hash" if c == "#" and first else "punct"
            i += max((len(p) for p in PUNCTUATORS if text.startswith(p, i)), default=1)
        yield Token(kind, text[start:i], file, line, space, first)
        space = first = False
