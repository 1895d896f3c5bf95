"""Marks the texts of control tokens in a caller's messages, so that they stay text.

A mark is the noncharacter U+FDD0. It stands behind the first character of each of these texts. Templates pass it
through. The tokenizer reads a text with a mark inside as plain text, and removes the mark.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from ..special_text import MARK

FOREIGN = "\ufffd"  # replaces a mark in the caller's own text


class Marker:
    """Marks the texts ``control_texts`` in JSON values.

    With ``beginnings`` it marks every character that a control text could begin with. Then a template that removes or
    joins parts of a text cannot make a control text from others.
    """

    def __init__(self, control_texts: Iterable[str], beginnings: bool = False) -> None:
        self._beginnings = beginnings
        self._texts = frozenset(t for t in control_texts if t)
        lengths: dict[str, set[int]] = {}
        for text in self._texts:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(some) for first, some in lengths.items()}
        self._first = re.compile("[" + "".join(map(re.escape, lengths)) + "]") if lengths else None
        self.met: set[str] = set()  #: the control texts that it has marked

    def without(self, texts: Iterable[str]) -> Marker:
        """Make a marker that leaves ``texts`` alone."""
        return Marker(self._texts.difference(texts))

    def mark(self, value: Any) -> Any:
        """Copy a JSON value with marks in all its strings, keys of objects included."""
        if isinstance(value, str):
            return self._in_texts([value])[0]
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if not isinstance(value, (list, tuple)):
            return value
        # A control text may begin in one part of a content and end in the next. So parts are marked as one text.
        parts = [item for item in value if is_text_part(item)]
        texts = iter(self._in_texts([part["text"] for part in parts]))
        return [self.mark(v) | {"text": next(texts)} if is_text_part(v) else self.mark(v) for v in value]

    def _in_texts(self, texts: list[str]) -> list[str]:
        joined = "".join(texts).replace(MARK, FOREIGN)
        places = self._places(joined)
        marked, at = [], 0
        for text in texts:
            end = at + len(text)
            inside = places[bisect_left(places, at) : bisect_left(places, end)]
            cuts = [at, *(p + 1 for p in inside), end]
            marked.append(MARK.join(joined[a:b] for a, b in pairwise(cuts)))
            at = end
        return marked

    def _places(self, text: str) -> list[int]:
        """Find the places to mark, and remember the control texts that begin there."""
        starts = self._starts(text)
        self.met.update(*starts.values())
        return [at for at, found in starts.items() if found or self._beginnings]

    def _starts(self, text: str) -> dict[int, list[str]]:
        """Map each possible begin of a control text to the texts that begin there. They may overlap."""
        found = {}
        for first in self._first.finditer(text) if self._first else ():
            at = first.start()
            found[at] = [t for n in self._lengths[text[at]] if (t := text[at : at + n]) in self._texts]
        return found

    def count(self, text: str) -> int:
        """Count the control texts without a mark in a text."""
        return sum(map(bool, self._starts(text).values()))


def is_text_part(value: Any) -> bool:
    """Return True for a part of a content that is text."""
    return isinstance(value, dict) and isinstance(value.get("text"), str)


def unmarked(text: str) -> str:
    """Remove all marks from a text."""
    return text.replace(MARK, "")
