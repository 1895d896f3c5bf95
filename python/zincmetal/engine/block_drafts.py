"""Drafts by the model's own block that drafts (``models/mtp.py``).

Each drafted token is a step of the block, with a row for each sequence that wants one. A row takes its token from the
step before it, on the device. So the next step can be submitted before the host knows any of the tokens. The first one
can be submitted behind a step of the model: the device knows what that step accepts, and which token comes after it.

The rows stand beyond the tokens that are computed, where the step that verifies the draft writes again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .batch import Builder, Executor, id_of
from .drafters import NO_DRAFT, Draft, Drafter
from .pages import PagePool, PoolEmptyError, StateSlots
from .sequence import Sequence


class BlockDrafter(Drafter):
    """Drafter of a sequence whose drafts steps of the engine make, for all sequences at once."""

    costly = True


class Row(NamedTuple):
    """Row of the block: its position and its token, as in ``Run``. ``drafted``: it is behind a draft of so many."""

    position: int
    token: int
    drafted: int = 0


@dataclass
class _Step:
    """Step of the block, a row for each of the ``sequences``, and the pages to release after it."""

    sequences: list[Sequence]
    pages: list[int]


class BlockDrafts:
    """Makes drafts of sequences, whose last known tokens are not computed yet."""

    def __init__(self, executor: Executor, pages: PagePool, slots: StateSlots) -> None:
        self._executor, self._pages, self._slots = executor, pages, slots
        self._in_flight: deque[_Step] = deque()

    @property
    def begun(self) -> bool:
        """True if the first step of the next drafts is in flight."""
        return bool(self._in_flight)

    @property
    def held(self) -> list[int]:
        """Pages that are released when that step has been collected."""
        return [page for step in self._in_flight for page in step.pages]

    def begin(self, rows: Mapping[Sequence, Row]) -> bool:
        """Submit the first step of the next drafts behind the only step in flight. Return False if there is no page.

        ``make`` goes on from it, or ``settle`` forgets it. Until then the sequences keep their pages.
        """
        for sequence in self._submit(rows):
            sequence.drafting = True
        return self.begun

    def make(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Draft]:
        """Return a draft of so many tokens for each sequence. It is shorter where no page or row is left.

        Nothing is in flight but what was begun. If it was, there are drafts for its sequences alone.
        """
        found: dict[Sequence, list[int]] = {sequence: [] for sequence in wanted}
        outputs = self._outputs()  # of the step before
        try:
            for place in range(max(wanted.values())):
                if place or not outputs:
                    rows = {s: self._token(s, place, outputs, found[s]) for s, n in wanted.items() if n > place}
                    outputs = self._submit(
                        {s: Row(len(s) - 1 + place, token) for s, token in rows.items() if token is not None}
                    )
                if not outputs:
                    break
                if len(self._in_flight) == (2 if self._executor.runs_ahead else 1):
                    self._collect(found)
            while self._in_flight:
                self._collect(found)
        finally:
            self.forget()
        return {sequence: Draft(_finite(tokens)) if tokens else NO_DRAFT for sequence, tokens in found.items()}

    def settle(self) -> None:
        """Wait for the step that was begun, if one was, and forget what it drafted."""
        try:
            while self._in_flight:
                self._collect({})
        finally:
            self.forget()

    def forget(self) -> None:
        """Give up the steps in flight. They have ended, or after an error the scheduler drops them."""
        while self._in_flight:
            self._end(self._in_flight.popleft())

    def _end(self, step: _Step) -> None:
        for sequence in step.sequences:
            sequence.drafting = False
        self._pages.release_all(step.pages)

    def _outputs(self) -> dict[Sequence, int]:
        """Return the outputs of the step that was begun, by sequence."""
        return {s: i for step in self._in_flight for i, s in enumerate(step.sequences)}

    @staticmethod
    def _token(sequence: Sequence, place: int, outputs: Mapping[Sequence, int], found: list[int]) -> int | None:
        """Return the token of a sequence's next row, or what refers to it. None: its draft has ended."""
        if place == 0:
            return sequence.ids[-1]
        if sequence not in outputs:
            return None
        if len(found) < place:
            return -1 - outputs[sequence]
        return found[-1] if found[-1] >= 0 else None

    def _submit(self, rows: Mapping[Sequence, Row]) -> dict[Sequence, int]:
        """Submit a step of rows, as far as there are pages. Return their outputs."""
        builder = Builder(self._executor, self._pages, self._slots)
        step = _Step([], builder.batch().pages)
        self._in_flight.append(step)
        for sequence, row in rows.items():
            try:
                if builder.add_draft(sequence, *row):
                    step.sequences.append(sequence)
            except PoolEmptyError:
                continue
        if step.sequences:
            self._executor.submit(builder.batch())
        else:
            self._end(self._in_flight.pop())
        return {sequence: i for i, sequence in enumerate(step.sequences)}

    def _collect(self, found: Mapping[Sequence, list[int]]) -> None:
        choices, step = self._executor.collect(), self._in_flight.popleft()
        self._end(step)
        for sequence, choice in zip(step.sequences, choices, strict=True):
            if sequence in found:
                found[sequence].append(id_of(choice))


def _finite(tokens: list[int]) -> list[int]:
    """Return the tokens up to the first one that the block's logits did not give, since they were not finite."""
    return tokens[: tokens.index(-1)] if -1 in tokens else tokens
