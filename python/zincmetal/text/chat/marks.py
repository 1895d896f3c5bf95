"""Marks in what a caller says: they keep the text of a control token, in a message, from being that token.

A mark is the noncharacter U+FDD0 behind the first character of every occurrence. Templates carry it through; the
tokenizer takes text with a mark in it apart as text, and removes it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from ..vocabulary import MARK

FOREIGN = "\ufffd"  # what becomes of a mark that a caller's own text brings


class Marker:
    """Marks the texts of control tokens in JSON values.

    Args:
        control_texts: what to mark.
        beginnings: mark every character with which one could begin, so that none comes about by taking
            something out of a text or by putting texts together.
    """

    def __init__(self, control_texts: Iterable[str], beginnings: bool = False) -> None:
        self._beginnings = beginnings
        self._texts = frozenset(t for t in control_texts if t)
        lengths: dict[str, set[int]] = {}
        for text in self._texts:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(some) for first, some in lengths.items()}
        self._first = re.compile("[" + "".join(map(re.escape, lengths)) + "]") if lengths else None
        self.met: set[str] = set()  #: the control texts that were marked

    def without(self, texts: Iterable[str]) -> Marker:
        """One that leaves `texts` as they are."""
        return Marker(self._texts.difference(texts))

    def mark(self, value: Any) -> Any:
        """A JSON value with marks in all its strings, keys of objects included."""
        if isinstance(value, str):
            return self._in_texts([value])[0]
        if isinstance(value, dict):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if not isinstance(value, (list, tuple)):
            return value
        # A control text may begin in one part of a content and end in the next: parts are marked as one text.
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
        """Where control texts begin, those that overlap others included."""
        places = []
        for found in self._first.finditer(text) if self._first else ():
            at = found.start()
            met = [t for n in self._lengths[text[at]] if (t := text[at : at + n]) in self._texts]
            if met or self._beginnings:
                places.append(at)
                self.met.update(met)
        return places

    def count(self, text: str) -> int:
        """How many control texts are in a text, without a mark."""
        return len(Marker(self._texts)._places(text))


def is_text_part(value: Any) -> bool:
    """Whether a value is a part of a content that is text."""
    return isinstance(value, dict) and isinstance(value.get("text"), str)


def unmarked(text: str) -> str:
    """A text without marks."""
    return text.replace(MARK, "")
