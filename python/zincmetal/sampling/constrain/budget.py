"""Budget of reasoning: after so many tokens, the text that ends it is forced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import UsageError
from .vocabulary import Vocabulary

Words = NDArray[np.uint32]
Mask = Callable[[Sequence[int]], Words | None]

LONGEST_CHARACTER = 4  # bytes in UTF-8


@dataclass(frozen=True)
class Budget:
    """Most ``tokens`` of reasoning, as plain data.

    - ``end``: the text that ends reasoning, such as ``</think>``; it counts whether the model or the budget wrote it.
    - ``forced``: what is written when the tokens are used up; it has ``end`` in it. By default it is ``end``.
    - ``begin``: the text that begins reasoning, "" if the prompt has begun it. Reasoning is the beginning of an answer
      or there is none.
    """

    tokens: int
    end: str
    forced: str = ""
    begin: str = ""

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise UsageError(f"a budget of reasoning is 0 tokens or more, not {self.tokens}")
        if not self.end:
            raise UsageError("a budget of reasoning needs the text that ends it")
        if self.forced and self.end not in self.forced:
            raise UsageError("what a budget of reasoning forces must have the text in it that ends the reasoning")


class BudgetMask:
    """Mask of one answer: forces the end of its reasoning, over another mask that may be None.

    A token is forced where the other mask allows it. Otherwise that mask goes first, and the budget waits.
    """

    def __init__(self, budget: Budget, vocabulary: Vocabulary, n_prompt: int, other: Mask | None = None) -> None:
        self._vocabulary, self._n_prompt, self._other = vocabulary, n_prompt, other
        self._budget = budget
        self._begin, self._end = budget.begin.encode(), budget.end.encode()
        self._forced = vocabulary.exact((budget.forced or budget.end).encode(), special=True)
        self._restart()

    def _restart(self) -> None:
        self._n, self._last = 0, -1
        self._inside, self._over = not self._begin, False
        self._left = self._budget.tokens
        self._tail = b""  # the bytes so far, as far back as a marker may reach
        self._written = 0  # tokens of ``_forced`` in a row
        self._expected = -1  # the token that was forced last

    def __call__(self, ids: Sequence[int]) -> Words | None:
        """Return the mask of the next token, None if any may follow the ids."""
        self._follow(ids)
        mask = self._other(ids) if self._other else None
        token, self._expected = self._wanted(), -1
        if token is None or (mask is not None and not mask[token >> 5] >> (token & 31) & 1):
            return mask
        self._expected = token
        return self._vocabulary.only([token])

    def draft(self, tokens: Sequence[int]) -> list[Words | None]:
        """Return the mask after each of the tokens that may follow now: none where the budget may end meanwhile."""
        if not self._over and self._left <= len(tokens):
            return []
        if self._other is None:
            return [None] * len(tokens)
        draft = getattr(self._other, "draft", None)
        return draft(tokens) if draft else []

    def ahead(self, ids: Sequence[int]) -> bool:
        """Return True if any two tokens may follow the ids."""
        if self._other is not None:
            return False
        self._follow(ids)
        return self._over or self._left >= 2

    def _follow(self, ids: Sequence[int]) -> None:
        at = self._n_prompt + self._n
        if len(ids) < at or (self._n and ids[at - 1] != self._last):
            self._restart()
            at = self._n_prompt
        for i in range(at, len(ids)):
            if self._over:
                break
            self._take(ids[i])
            self._n, self._last = i + 1 - self._n_prompt, ids[i]

    def _take(self, token: int) -> None:
        data = self._vocabulary.tokens[token]
        if not self._inside:
            self._look_for_begin(data)
            return
        self._written = self._written + 1 if token == self._expected else 0
        self._left -= 1
        keep = max(len(self._end), LONGEST_CHARACTER) + len(data)
        self._tail = (self._tail + data)[-keep:]
        by_model = not self._written and self._end in self._tail
        self._over = by_model or self._written == len(self._forced)

    def _look_for_begin(self, data: bytes) -> None:
        self._tail = (self._tail + data).lstrip()
        if self._tail.startswith(self._begin):
            self._inside, self._tail = True, self._tail[len(self._begin) :]
            self._over = self._end in self._tail
        else:
            self._over = not self._begin.startswith(self._tail)

    def _wanted(self) -> int | None:
        """Return the token to force, None for any."""
        if self._over or not self._inside or not self._forced:
            return None
        if self._written == 0 and (self._left > 0 or _in_character(self._tail)):
            return None
        return self._forced[self._written] if self._written < len(self._forced) else None


def _in_character(data: bytes) -> bool:
    """Return True if bytes end within a character of UTF-8."""
    for back in range(1, min(LONGEST_CHARACTER, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            needed = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back < needed
    return False
