"""Splits preprocessed MSL into tokens that know their file and line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

SPACES = ("device", "constant", "threadgroup", "thread")  # the address spaces

MARKER = re.compile(r'# (\d+) "([^"]*)"')
TOKEN = re.compile(
    r"""(?P<space>(?:\s|\\\n)*)
    (?:(?P<pragma>\#[^\n]*)
     |(?P<word>[A-Za-z_]\w*)
     |(?P<number>\.?\d(?:[eEpP][+-]|[\w.'])*)
     |(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
     |(?P<sign>::|->|[^\s\w]))""",
    re.VERBOSE,
)
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


@dataclass
class Token:
    """A token. ``text`` may be rewritten; ``space`` is the white space before it."""

    text: str
    space: str
    kind: str
    file: str
    line: int


def tokenize(text: str, file: str, line: int) -> Iterator[Token]:
    at = 0
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            return  # blanks at the end
        space = match["space"]
        line += space.count("\n")
        kind = str(match.lastgroup)
        yield Token(match[kind], space, kind, file, line)
        line += match[kind].count("\n")
        at = match.end()


def segments(preprocessed: str) -> Iterator[tuple[str, int, str]]:
    """Yields (file, first line, text) of the lines between the preprocessor's line markers."""
    file, line, run = "", 1, list[str]()
    for text in preprocessed.splitlines(keepends=True):
        marker = MARKER.match(text)
        if marker is None:
            run.append(text)
            continue
        if run:
            yield file, line, "".join(run)
        file, line, run = marker[2], int(marker[1]), []
    if run:
        yield file, line, "".join(run)


def is_operator(tokens: list[Token], i: int) -> bool:
    """Whether this < or > compares or shifts: after a value or before a number it opens no template."""
    before = tokens[i - 1] if i else None
    after = tokens[i + 1] if i + 1 < len(tokens) else None
    is_joined = after is not None and after.space == ""
    if tokens[i].text == ">":
        return is_joined and after is not None and after.text == "="
    if before is not None and (before.kind == "number" or before.text in (")", "]", "<")):
        return True
    return is_joined and after is not None and after.text in ("=", "<")


def closing(tokens: list[Token], at: int) -> int:
    """Returns the index of the token that closes the bracket at ``at``. Angle brackets count for themselves only."""
    opens = tokens[at].text
    closes, depth, around = CLOSING[opens], 0, 0
    for i in range(at, len(tokens)):
        text = tokens[i].text
        if opens == "<" and text in "([":
            around += 1
        elif opens == "<" and text in ")]":
            around -= 1
        elif i > at and text in ("<", ">") and is_operator(tokens, i):
            continue
        elif around == 0 and text == opens:
            depth += 1
        elif around == 0 and text == closes:
            depth -= 1
            if depth == 0:
                return i
    raise SyntaxError(f"{tokens[at].file}:{tokens[at].line}: {opens} is never closed")


def split(tokens: list[Token], separator: str = ",") -> list[list[Token]]:
    """Splits tokens at separators outside brackets."""
    parts: list[list[Token]] = [[]]
    depth = 0
    for i, token in enumerate(tokens):
        if token.text not in ("<", ">") or not is_operator(tokens, i):
            depth += token.text in ("(", "[", "{", "<")
            depth -= token.text in (")", "]", "}", ">")
        if token.text == separator and depth == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts if parts != [[]] else []


def joined(tokens: list[Token]) -> str:
    """Joins tokens, with single blanks between words only."""
    out = ""
    for token in tokens:
        out += " " if out and out[-1].isalnum() and token.text[0].isalnum() else ""
        out += token.text
    return out
