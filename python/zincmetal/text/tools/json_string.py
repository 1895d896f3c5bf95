"""Reads a string that comes in pieces, as models write strings, and writes it as the inside of a JSON string."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from .markers import begins

SPACE = " \t\r\n"
_PLAIN = {quote: re.compile(rf"[^{quote}\\\x00-\x1f]+") for quote in "\"'"}
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")


def escaped(text: str) -> str:
    """Escape a text for the inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


class JsonString:
    """Reads one string, from behind the delimiter that opens it.

    A quote inside of a text is often not escaped. So a quote ends the string only if one of the characters ``follows``,
    or ``stop``, stands behind it; with ``follows`` "" every quote does.
    """

    def __init__(self, write: Callable[[str], None], delimiter: str, follows: str, stop: str) -> None:
        self._write, self._delimiter, self._follows, self._stop = write, delimiter, follows, stop
        self.repaired = delimiter == "'"
        self.done = False

    def take(self, text: str, at: int) -> int:
        """Take the text from a place on. Return the next place, or ~place if the text from there on is too short."""
        if plain := _PLAIN[self._delimiter].match(text, at):
            self._write(plain[0] if self._delimiter == '"' else plain[0].replace('"', '\\"'))
            return plain.end()
        char = text[at]
        if char == self._delimiter:
            return self._quote(text, at)
        if char == "\\":
            return self._escape(text, at)
        self.repaired = True
        self._write(escaped(char))
        return at + 1

    def finish(self, held: str) -> None:
        """Take the end of the text, with what was too short."""
        if not held.startswith(self._delimiter):
            self._write(escaped(held))

    def _quote(self, text: str, at: int) -> int:
        ends = self._ends(text, at + 1)
        if ends is None:
            return ~at
        self.done = ends
        if not ends:
            self.repaired = True
            self._write('\\"' if self._delimiter == '"' else "'")
        return at + 1

    def _ends(self, text: str, at: int) -> bool | None:
        if not self._follows:
            return True
        while at < len(text) and text[at] in SPACE:
            at += 1
        if at == len(text):
            return None
        if text[at] in self._follows:
            return True
        return begins(text[at : at + len(self._stop)], self._stop) if self._stop else False

    def _escape(self, text: str, at: int) -> int:
        if whole := _ESCAPE.match(text, at):
            self._write(whole[0])
            return whole.end()
        if _ESCAPE_BEGUN.match(text, at):
            return ~at
        self.repaired = True
        if text[at + 1] == "'":
            self._write("'")
            return at + 2
        self._write("\\\\")
        return at + 1


class RawString:
    """Reads one string up to its delimiter, which may be long. Nothing in it is escaped."""

    repaired = False

    def __init__(self, write: Callable[[str], None], delimiter: str) -> None:
        self._write, self._delimiter = write, delimiter
        self.done = False

    def take(self, text: str, at: int) -> int:
        """Take the text from a place on, as ``JsonString`` does."""
        delimiter = self._delimiter
        end = text.find(delimiter, at)
        if end >= 0:
            self._write(escaped(text[at:end]))
            self.done = True
            return end + len(delimiter)
        end = max(at, len(text) - len(delimiter) + 1)
        while end < len(text) and not delimiter.startswith(text[end:]):
            end += 1
        self._write(escaped(text[at:end]))
        return ~end

    def finish(self, held: str) -> None:
        """Take the end of the text, with what was too short."""
        self._write(escaped(held))
