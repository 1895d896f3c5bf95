"""Finds markers in a text that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache


class Markers:
    """Set of markers, such as ``<tool_call>``. Where one begins with another, the longer one counts."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self._any, self._first = _patterns(frozenset(filter(None, texts)))
        self._longest = max(map(len, self._texts), default=1)

    def find(self, text: str, final: bool = False) -> tuple[int, str]:
        """Find the first marker: its place and itself. ``final``: no text follows.

        If there is none, return the place from which on the text may become a marker, and "". That is the end of the
        text if nothing there begins a marker.
        """
        if self._first.search(text) is None:
            return len(text), ""
        found = self._any.search(text)
        if final or (found and len(text) - found.start() >= self._longest):
            return (found.start(), found[0]) if found else (len(text), "")
        begun = self._begun(text)
        return (begun, "") if not found or begun <= found.start() else (found.start(), found[0])

    def _begun(self, text: str) -> int:
        at = max(0, len(text) - self._longest + 1)
        while found := self._first.search(text, at):
            at = found.start()
            end = text[at:]
            if any(marker.startswith(end) and marker != end for marker in self._texts):
                return at
            at += 1
        return len(text)


@lru_cache(maxsize=128)  # each answer of a model asks for the same
def _patterns(texts: frozenset[str]) -> tuple[list[str], re.Pattern[str], re.Pattern[str]]:
    """Return the texts, the longest first, and patterns that find any of them and the first letter of any."""
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    firsts = "".join(re.escape(first) for first in sorted({text[0] for text in ordered}))
    return (
        ordered,
        re.compile("|".join(map(re.escape, ordered)) or r"(?!)"),
        re.compile(f"[{firsts}]" if firsts else r"(?!)"),
    )


def begins(text: str, marker: str) -> bool | None:
    """Return True if ``text`` begins with ``marker``, False if it cannot, and None if more text will tell."""
    if text.startswith(marker):
        return True
    return None if marker.startswith(text) else False
