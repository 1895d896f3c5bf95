"""Drafters: guesses of the next tokens of a sequence, which the model then verifies.

A guess can be wrong, and costs nothing but time then. ``Lookup`` is prompt lookup: where the last tokens stood before,
in the prompt or in the answer, the tokens that followed them may follow again.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import index
from typing import NamedTuple

TAIL = 3  # tokens that must have stood before
MOST_PLACES = 16  # earlier places that are compared
LONGEST_MATCH = 32  # tokens that are compared
MOST_READ = 8192  # tokens that are read in one call: a step must not wait for a long prompt
DRAFT_TOKENS = 7  # a step of eight rows verifies them


class Draft(NamedTuple):
    """Tokens that may follow. ``match``: how many tokens before them speak for it; 0 if that says nothing."""

    tokens: list[int]
    match: int = 0

    def checked(self, n_vocab: int) -> Draft:
        """Return it with plain numbers. Raises ValueError unless each token is in the vocabulary: it becomes a row."""
        tokens = [index(token) for token in self.tokens]
        if not all(0 <= token < n_vocab for token in tokens):
            raise ValueError(f"a draft has tokens outside the vocabulary of {n_vocab}")
        return Draft(tokens, index(self.match))


NO_DRAFT = Draft([])


class Drafter:
    """Drafter of one sequence. A ``costly`` one is only asked for what will be verified."""

    costly = False

    def propose(self, ids: Sequence[int], n: int) -> Draft:
        """Return at most ``n`` tokens that may follow ``ids``. The ids of a later call begin with those of this one."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what it has. The sequence has ended."""


class Lookup(Drafter):
    """Prompt lookup over the tokens of one sequence.

    Each place after ``TAIL`` tokens is linked to the last place before it after the same tokens. Of these places the
    one with the longest match counts, the last one among equals.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, ...], int] = {}  # the last place after these tokens
        self._before = array("q")  # by place: the place before it after the same tokens, or -1

    def propose(self, ids: Sequence[int], n: int) -> Draft:
        """Return at most ``n`` tokens that may follow ``ids``."""
        self._read(ids)
        if n < 1 or len(self._before) < len(ids):
            return NO_DRAFT
        place, match = self._longest(ids)
        if not match:
            return NO_DRAFT
        tokens: list[int] = []
        for i in range(place, place + n):  # what repeats itself goes on in the draft
            tokens.append(ids[i] if i < len(ids) else tokens[i - len(ids)])
        return Draft(tokens, match)

    def _read(self, ids: Sequence[int]) -> None:
        """Link the places before the end, some of them if there are many."""
        first = len(self._before)
        for place in range(first, min(len(ids), first + MOST_READ)):
            tail = tuple(ids[max(0, place - TAIL) : place])
            self._before.append(self._last.get(tail, -1))
            self._last[tail] = place

    def _longest(self, ids: Sequence[int]) -> tuple[int, int]:
        """Return the place with the longest match, and its tokens: 0 if there is none."""
        best, longest = 0, 0
        place = self._last.get(tuple(ids[-TAIL:]), -1) if len(ids) > TAIL else -1
        for _ in range(MOST_PLACES):
            if place < 0:
                break
            match = _match(ids, place)
            if match > longest:
                best, longest = place, match
            place = self._before[place]
        return best, longest


def _match(ids: Sequence[int], place: int) -> int:
    """Return how many tokens before a place equal the last ones."""
    end, n = len(ids), 0
    while n < min(LONGEST_MATCH, place) and ids[place - 1 - n] == ids[end - 1 - n]:
        n += 1
    return n
