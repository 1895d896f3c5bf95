"""Special tokens in text: where they stand, and the marks that keep text from being one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .vocabulary import MARK


class Matcher:
    """Finds tokens in a text: from left to right, the longest first."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        lengths: dict[str, set[int]] = {}
        for text in tokens:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(some, reverse=True) for first, some in lengths.items()}
        self._first = re.compile("[" + "".join(map(re.escape, lengths)) + "]") if lengths else None

    def __bool__(self) -> bool:
        return self._first is not None

    def split(self, text: str) -> Iterator[str | int]:
        """The ids of the tokens in `text`, and between them what is no token; nothing empty."""
        at = end = 0
        while self._first is not None and (found := self._first.search(text, at)):
            at = found.start()
            token = next((t for n in self._lengths[text[at]] if (t := text[at : at + n]) in self._tokens), None)
            if token is None:
                at += 1
                continue
            if at > end:
                yield text[end:at]
            yield self._tokens[token]
            at = end = at + len(token)
        if end < len(text):
            yield text[end:]


class SpecialText:
    """Takes a text with special tokens apart.

    Args:
        control: tokens that count in text only where special tokens are parsed.
        defined: tokens that count in any text; here they only keep a control token from beginning inside of them.
        strips: control tokens that swallow the spaces and line breaks behind them.
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
        """The ids of control tokens, and the text between them, without its marks.

        A mark keeps the characters around it from being one token; then it goes, so that what was marked is
        tokenized together with its neighbours as plain text is.
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
