"""Finds special tokens in text, and obeys the marks that keep text from being a special token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

MARK = "\ufdd0"  # a noncharacter in a chat prompt: the text around it is no special token


class Matcher:
    """Finds tokens in a text, from left to right. Of several at one place it takes the longest."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        lengths: dict[str, set[int]] = {}  # by the first two characters: the first alone is frequent in prose
        for text in tokens:
            lengths.setdefault(text[:2], set()).add(len(text))
        self._lengths = {start: sorted(some, reverse=True) for start, some in lengths.items()}
        self._start = _any_of(lengths) if lengths else None

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the ids of the tokens in ``text``, and the text between them. No text is empty."""
        at = end = 0
        while self._start is not None and (found := self._start.search(text, at)):
            at = found.start()
            token = self._longest(text, at)
            if token is None:
                at += 1
                continue
            if at > end:
                yield text[end:at]
            yield self._tokens[token]
            at = end = at + len(token)
        if end < len(text):
            yield text[end:]

    def _longest(self, text: str, at: int) -> str | None:
        for n in self._lengths.get(text[at : at + 2], ()):
            if (token := text[at : at + n]) in self._tokens:
                return token
        # The mark of a token of one character stands behind it.
        return first if (first := text[at]) in self._tokens and text[at + 1 : at + 2] != MARK else None


def _any_of(starts: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern that finds the given texts of one or two characters."""
    seconds: dict[str, str] = {}
    for start in starts:
        seconds[start[0]] = seconds.get(start[0], "") + start[1:]
    single = "".join(re.escape(start) for start in starts if len(start) == 1)
    pairs = [f"{re.escape(first)}[{re.escape(rest)}]" for first, rest in seconds.items() if rest]
    return re.compile("|".join([*pairs, *([f"[{single}]"] if single else [])]))


class SpecialText:
    """Splits a text at its special tokens.

    ``control`` has the control tokens. ``defined`` has tokens that are matched in any text. Here they have one effect:
    no control token begins inside of them. ``strips`` are the control tokens that swallow the spaces and line breaks
    behind them.
    """

    def __init__(
        self, control: Mapping[str, int], defined: Mapping[str, int], strips: frozenset[int] = frozenset()
    ) -> None:
        self.control = control
        self._strips = strips
        self._ids = frozenset(control.values())
        self._all = Matcher({**defined, **control})
        self._names = {i: text for text, i in defined.items()}

    def split(self, text: str) -> Iterator[str | int]:
        """Yield the ids of control tokens, and the text between them, without its marks.

        A mark keeps the characters around it from being one control token. Then it is removed, so that the text
        around it is tokenized like any other text.
        """
        plain: list[str] = []
        strip = False
        for part in self._all.split(text):
            if not isinstance(part, int):
                plain.append(part.lstrip() if strip and not plain else part)
            elif part not in self._ids:
                plain.append(self._names[part])
            else:
                yield from _joined(plain)
                yield part
                plain, strip = [], part in self._strips
        yield from _joined(plain)


def _joined(parts: list[str]) -> Iterator[str]:
    if text := "".join(parts).replace(MARK, ""):
        yield text
