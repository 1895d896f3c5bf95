"""Drafts by the model's own block that drafts (``models/mtp.py``).

Each drafted token is a step of the block, with a row for each sequence that wants one. A row takes its token from the
step before it, on the device. So the next step can be submitted before the host knows any of the tokens.

The rows stand beyond the tokens that are computed, where the step that verifies the draft writes again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from .batch import Builder, Executor, id_of
from .drafters import NO_DRAFT, Draft, Drafter
from .pages import PagePool, PoolEmptyError, StateSlots
from .sequence import Sequence


class BlockDrafter(Drafter):
    """Drafter of a sequence whose drafts steps of the engine make, for all sequences at once."""

    costly = True


class BlockDrafts:
    """Makes drafts of sequences, while nothing is in flight. Their last known tokens are not computed yet."""

    def __init__(self, executor: Executor, pages: PagePool, slots: StateSlots) -> None:
        self._executor, self._pages, self._slots = executor, pages, slots

    def make(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Draft]:
        """Return a draft of so many tokens for each sequence. It is shorter where no page or row is left."""
        found: dict[Sequence, list[int]] = {sequence: [] for sequence in wanted}
        flights: deque[tuple[list[Sequence], list[int]]] = deque()  # the sequences of a step, and pages to release
        last: list[Sequence] = []
        for step in range(max(wanted.values())):
            builder = Builder(self._executor, self._pages, self._slots)
            outputs = {sequence: i for i, sequence in enumerate(last)}
            last = [s for s, n in wanted.items() if n > step and self._add(builder, s, step, outputs, found[s])]
            if not last:
                break
            batch = builder.batch()
            self._executor.submit(batch)
            flights.append((last, batch.pages))
            if len(flights) == (2 if self._executor.runs_ahead else 1):
                self._collect(*flights.popleft(), found)
        while flights:
            self._collect(*flights.popleft(), found)
        return {sequence: Draft(_finite(tokens)) if tokens else NO_DRAFT for sequence, tokens in found.items()}

    def _add(
        self, builder: Builder, sequence: Sequence, step: int, outputs: Mapping[Sequence, int], found: list[int]
    ) -> bool:
        """Add a row of a sequence. Return False if there is no room, or had been none for the row before it."""
        if step and sequence not in outputs:
            return False
        if len(found) == step:
            token = [sequence.ids[-1], *found][step]
            if token < 0:
                return False
        else:
            token = -1 - outputs[sequence]
        try:
            return builder.add_draft(sequence, len(sequence.ids) - 1 + step, token)
        except PoolEmptyError:
            return False

    def _collect(self, sequences: list[Sequence], pages: list[int], found: Mapping[Sequence, list[int]]) -> None:
        try:
            for sequence, choice in zip(sequences, self._executor.collect(), strict=True):
                found[sequence].append(id_of(choice))
        finally:
            self._pages.release_all(pages)


def _finite(tokens: list[int]) -> list[int]:
    """Return the tokens up to the first one that the block's logits did not give, since they were not finite."""
    return tokens[: tokens.index(-1)] if -1 in tokens else tokens
