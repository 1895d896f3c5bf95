"""Constraint: the tokens that may follow, of one answer, as its grammar and its budget of reasoning say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import GrammarError, quote
from .spent import Spent

Words = NDArray[np.uint32]
T = TypeVar("T")


def asked(call: Callable[..., T], *args: Any) -> T:
    """Call the library. A fault of it, which it raises as no usual exception, is an error of one answer."""
    try:
        return call(*args)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise GrammarError(f"the grammar's library failed: {quote(str(error), 200)}") from error
        raise


class Constraint:
    """Mask of one answer by a grammar: call it with all ids so far, of the prompt too, before each token.

    It returns the bits of the tokens that may follow, or None where any text may. It follows the answer token by token,
    and begins again if it is called with another one. Control tokens, and bytes that are no character, count as nothing
    where any text may follow.

    Raises GrammarError where the answer cannot go on. That ends this answer alone.
    """

    def __init__(self, matcher: Any, free: Words, n_prompt: int, spent: Spent | None = None) -> None:
        self._spent = spent or Spent()
        self._first, self._free, self._n_prompt = matcher, free, n_prompt  # the matcher at its start
        self._matcher = matcher.deep_copy()
        self._taken: list[int] = []  # tokens that the matcher has consumed
        self._n, self._last = 0, -1  # tokens of the answer that are known, and the last of them
        self._mask: Words | None = None  # of the next token; made when it is needed
        self._is_free = False

    def __call__(self, ids: Sequence[int]) -> Words | None:
        """Return the mask of the next token, None if any may follow the ids."""
        at = self._n_prompt + self._n
        if len(ids) < at or (self._n and ids[at - 1] != self._last):
            self._matcher, self._taken = self._first.deep_copy(), []
            self._n, self._mask, at = 0, None, self._n_prompt
        for i in range(at, len(ids)):
            self._take(ids[i])
        mask = self._next()
        return None if self._is_free else mask

    def draft(self, tokens: Sequence[int]) -> list[Words | None]:
        """Return the mask after each of the tokens that may follow now, up to the first that may not.

        The answer stays where the last call left it.
        """
        kept, found, taken = (self._mask, self._is_free), list[Words | None](), 0
        try:
            for token in tokens:
                mask = self._next()
                if not mask[token >> 5] >> (token & 31) & 1 or not asked(self._matcher.consume_token, token):
                    break
                taken, self._mask = taken + 1, None
                mask = self._next()
                found.append(None if self._is_free else mask)
        except GrammarError:
            pass  # where the draft ends, the answer need not
        finally:
            if self._matcher.is_error():  # which it does not leave
                self._matcher = self._first.deep_copy()
                for token in self._taken:
                    asked(self._matcher.consume_token, token)
            elif taken:
                asked(self._matcher.rollback, taken)
            self._mask, self._is_free = kept
        return found

    def _take(self, token: int) -> None:
        mask = self._next()
        if mask[token >> 5] >> (token & 31) & 1:
            if not asked(self._matcher.consume_token, token):
                raise self._dead(f"after token {token}")
            self._taken.append(token)
            self._mask = None
        elif not self._is_free:
            raise self._dead(f"at token {token}, which it does not allow")
        self._n, self._last = self._n + 1, token

    def _next(self) -> Words:
        """Return the mask of the next token."""
        if self._mask is None:
            with self._spent.on("mask"):
                bits = asked(self._matcher.compute_bitmask)
            self._mask = mask = np.frombuffer(bits, "<u4", self._free.size)
            self._is_free = not np.any(self._free & ~mask)
            if self._matcher.is_error() or not mask.any():
                raise self._dead("where no token is left")
        return self._mask

    def _dead(self, where: str) -> GrammarError:
        said = self._matcher.get_error()
        return GrammarError(
            f"the answer cannot go on by its grammar, {where}" + (f": {quote(said, 200)}" if said else "")
        )
