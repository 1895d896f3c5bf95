r"""Grammars in GBNF, the form of llama.cpp, read into a tree. ``gbnf_lark.py`` writes the tree in Lark.

    root ::= item ("," item)*   # the rule that the whole answer follows
    item ::= [a-z]+ | "\"" [^"\n]{1,20} "\"" | <think>

A rule ends with its line, but for a line break within parentheses and after ``::=`` or ``|``. If a rule is defined
twice, the last definition counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Union

from ...errors import UsageError, quote

MOST_NESTED = 100  # parentheses
MOST_REPEATED = 2000  # as llama.cpp has it
LAST_CHARACTER = 0x10FFFF
ESCAPES = {"t": "\t", "r": "\r", "n": "\n", **{c: c for c in '\\"[]-'}}
CODES = {"x": 2, "u": 4, "U": 8}  # digits of an escaped code point
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_REPEAT = re.compile(r"\{[ \t]*([0-9]{1,9})[ \t]*(?:(,)[ \t]*([0-9]{1,9})?[ \t]*)?\}")
_SPACE, _SPACES = re.compile(r"(?:[ \t]|#[^\r\n]*)*"), re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_RULE = re.compile(r"^[ \t]*[A-Za-z0-9_-]+[ \t]*::=", re.MULTILINE)
_TOKEN = re.compile(r"<(?:\[[0-9]{1,9}\]|[^\s<>\[\]]+)>")


@dataclass(frozen=True)
class Characters:
    """One character of some ranges of code points, or with ``negated`` one of all others."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False


@dataclass(frozen=True)
class Token:
    """One token, as GBNF and Lark write it: by its text ``<think>`` or its id ``<[12]>``."""

    text: str


@dataclass(frozen=True)
class Reference:
    """What another rule says."""

    name: str


@dataclass(frozen=True)
class Repeated:
    """From ``least`` to ``most`` times the same; None: without end."""

    item: Node
    least: int
    most: int | None


@dataclass(frozen=True)
class Sequence:
    """One after another, maybe nothing."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    """One of several."""

    items: tuple[Node, ...]


Node = Union[Characters, Token, Reference, Repeated, Sequence, Choice]  # noqa: UP007  # of classes before it


def is_gbnf(text: str) -> bool:
    """Return True if a line of a grammar begins a rule of GBNF, which no line of Lark does."""
    return _RULE.search(text) is not None


def parsed(text: str) -> dict[str, Node]:
    """Read a grammar: its rules by name, of which ``root`` is one. Raises UsageError, with the line."""
    rules = _Reader(text).rules()
    if "root" not in rules:
        raise UsageError("grammar: GBNF needs a rule named root, which the answer follows")
    for name in [name for node in rules.values() for name in references(node)]:
        if name not in rules:
            raise UsageError(f"grammar: the rule {quote(name)} is not defined")
    return rules


def references(node: Node) -> list[str]:
    """Return the names of the rules that a tree refers to."""
    if isinstance(node, Reference):
        return [node.name]
    if isinstance(node, Repeated):
        return references(node.item)
    if isinstance(node, (Sequence, Choice)):
        return [name for item in node.items for name in references(item)]
    return []


class _Reader:
    """Text of a grammar, and how far it was read."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def rules(self) -> dict[str, Node]:
        found = dict[str, Node]()
        self._skip(_SPACES)
        while self._at < len(self._text):
            name = self._take(_NAME, "the name of a rule")
            self._skip(_SPACE)
            if not self._next("::="):
                raise self._wrong("::=")
            self._skip(_SPACES)
            found[name] = self._choice(0)
            if self._at < len(self._text) and self._text[self._at] not in "\r\n":
                raise self._wrong("a line break")
            self._skip(_SPACES)
        return found

    def _choice(self, depth: int) -> Node:
        if depth > MOST_NESTED:
            raise UsageError(f"grammar: line {self._line}: more than {MOST_NESTED} parentheses in each other")
        items = [self._sequence(depth)]
        while self._next("|"):
            self._skip(_SPACES)
            items.append(self._sequence(depth))
        return items[0] if len(items) == 1 else Choice(tuple(items))

    def _sequence(self, depth: int) -> Node:
        items = list[Node]()
        space = _SPACES if depth else _SPACE
        while (item := self._item(depth)) is not None:
            self._skip(space)
            while (bounds := self._bounds()) is not None:
                item = Repeated(item, *bounds)
                self._skip(space)
            items.append(item)
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def _item(self, depth: int) -> Node | None:
        """Read one item; None if the sequence ends here."""
        here = self._text[self._at : self._at + 1]
        if here == '"':
            return self._literal()
        if here == "[":
            return self._class()
        if self._next("."):
            return Characters((), negated=True)
        if here == "!":
            raise UsageError(
                f"grammar: line {self._line}: all tokens but one (!<…>) are not supported; write the characters that "
                f"may come"
            )
        if here == "<":
            return Token(self._take(_TOKEN, "a token such as <think> or <[12]>"))
        if self._next("("):
            self._skip(_SPACES)
            inside = self._choice(depth + 1)
            if not self._next(")"):
                raise self._wrong(")")
            return inside
        name = _NAME.match(self._text, self._at)
        if name is None:
            return None
        self._at = name.end()
        return Reference(name[0])

    def _bounds(self) -> tuple[int, int | None] | None:
        """Read how often the item before comes, if it says so."""
        for mark, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._next(mark):
                return bounds
        if self._text[self._at : self._at + 1] != "{":
            return None
        found = _REPEAT.match(self._text, self._at)
        if found is None:
            raise self._wrong("a repetition such as {3}, {3,} or {3,5}")
        least = int(found[1])
        most = None if found[2] and found[3] is None else int(found[3] or found[1])
        if least > MOST_REPEATED or (most or 0) > MOST_REPEATED or (most is not None and most < least):
            raise UsageError(
                f"grammar: line {self._line}: {quote(found[0])} must go upwards, to {MOST_REPEATED} at most"
            )
        self._at = found.end()
        return least, most

    def _literal(self) -> Node:
        self._at += 1
        items = list[Node]()
        while not self._next('"'):
            code = self._character()
            items.append(Characters(((code, code),)))
        return Sequence(tuple(items))

    def _class(self) -> Node:
        self._at += 1
        negated, ranges = self._next("^"), list[tuple[int, int]]()
        while not self._next("]"):
            first = last = self._character()
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                last = self._character()
            if last < first:
                raise UsageError(f"grammar: line {self._line}: a range goes from {chr(first)!r} to {chr(last)!r}")
            ranges.append((first, last))
        if not ranges:
            raise self._wrong("a character between [ and ]")
        return Characters(tuple(ranges), negated)

    def _character(self) -> int:
        """Read a character of a literal or of a class, which may be escaped: its code point."""
        here = self._text[self._at : self._at + 1]
        if not here or here in "\r\n":
            raise UsageError(f"grammar: line {self._line}: a text or a class does not end in its line")
        self._at += 1
        if here != "\\":
            return self._checked(ord(here))
        kind = self._text[self._at : self._at + 1]
        self._at += 1
        if kind in CODES:
            digits = self._text[self._at : self._at + CODES[kind]]
            if not re.fullmatch(f"[0-9A-Fa-f]{{{CODES[kind]}}}", digits):
                raise self._wrong(f"{CODES[kind]} hexadecimal digits")
            self._at += len(digits)
            return self._checked(int(digits, 16))
        if kind not in ESCAPES:
            raise UsageError(f"grammar: line {self._line}: {quote(here + kind)} is no escape of GBNF")
        return ord(ESCAPES[kind])

    def _checked(self, code: int) -> int:
        if code > LAST_CHARACTER or 0xD800 <= code < 0xE000:
            raise UsageError(f"grammar: line {self._line}: {code:#x} is no character")
        return code

    def _next(self, text: str) -> bool:
        """Go on if this text is next."""
        there = self._text.startswith(text, self._at)
        self._at += len(text) * there
        return there

    def _take(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            raise self._wrong(what)
        self._at = found.end()
        return found[0]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self._text, self._at)
        self._at = found.end() if found else self._at

    def _wrong(self, wanted: str) -> UsageError:
        found = self._text[self._at : self._at + 20].split("\n")[0] or "the end of the line"
        return UsageError(f"grammar: line {self._line}: {wanted} is expected, not {quote(found)}")

    @property
    def _line(self) -> int:
        return self._text.count("\n", 0, self._at) + 1
