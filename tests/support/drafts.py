"""Drafters for tests: they know the answer, and are wrong as often as they are told to be."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from zincmetal.engine.drafters import NO_DRAFT, Draft, Drafter


class Guesses(Drafter):
    """Drafter that proposes the tokens of an answer, each of them right with the probability ``rate``.

    ``answer()`` returns the tokens after the first ``n_prompt`` ids, as far as they are known. Beyond them, and where
    it is wrong, it proposes any token of ``n_vocab``. Some drafts are short, and some are empty.
    """

    def __init__(
        self, n_prompt: int, answer: Callable[[], Sequence[int]], rate: float, n_vocab: int, seed: int = 0
    ) -> None:
        self._n_prompt, self._answer, self._rate, self._n_vocab = n_prompt, answer, rate, n_vocab
        self._rng = random.Random(seed)
        self._known: Sequence[int] | None = None

    def propose(self, ids: Sequence[int], n: int) -> Draft:
        """Returns at most ``n`` tokens."""
        if self._known is None:
            self._known = list(self._answer())
        rng, at = self._rng, len(ids) - self._n_prompt
        if rng.random() < 0.1:
            return NO_DRAFT
        n = n if rng.random() < 0.7 else rng.randint(1, n)
        tokens = list(self._known[at : at + n])
        tokens += [rng.randrange(self._n_vocab) for _ in range(n - len(tokens))]
        return Draft(
            [t if rng.random() < self._rate else rng.randrange(self._n_vocab) for t in tokens], rng.choice([3, 40])
        )
