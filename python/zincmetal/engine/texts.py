"""Texts that are read together, in slices: a sequence each, of which nothing is kept.

For the step thread, while nothing else is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from typing import TYPE_CHECKING

from ..errors import OutOfMemoryError
from .batch import Batch, Builder, Drawing
from .pages import PoolEmptyError
from .sequence import Sequence

if TYPE_CHECKING:
    from .running import Running

NO_ROOM = "the pages of the K/V cache are in use; end other generations, or load the model with a smaller context"


class Texts:
    """Sequences of some texts (ids). ``kind``: the batch of their steps. ``drawing``: of a step of one row, if any.

    If the pools have no room for all, the last texts are given up: ``sequences`` has those that are left.
    """

    def __init__(
        self, running: Running, texts: AnySequence[AnySequence[int]], kind: type[Batch], drawing: Drawing | None = None
    ) -> None:
        self._running, self._engine, self._kind, self._drawing = running, running.engine, kind, drawing
        self.sequences = [Sequence(list(ids)) for ids in texts]

    @property
    def left(self) -> int:
        """Number of tokens that are not computed yet."""
        return sum(len(sequence.ids) - sequence.computed for sequence in self.sequences)

    def step(self, rows: int) -> Batch:
        """Run a step of the next rows, at most so many. Raises OutOfMemoryError if the first text has no room."""
        while True:
            try:
                batch = self._built(rows)
                break
            except PoolEmptyError:
                self._make_room()
        engine = self._engine
        try:
            engine.submit(batch)
            engine.collect()
        except BaseException:
            engine.drop()
            self._take_back(batch)
            raise
        for run in batch.runs:
            run.sequence.computed = run.end
        self._release(batch)
        return batch

    def leave(self) -> None:
        """Give back all that the texts hold."""
        for sequence in self.sequences:
            self._leave(sequence)

    def _built(self, rows: int) -> Batch:
        """Make the batch of the next step. Raises PoolEmptyError."""
        engine, left = self._engine, rows
        builder = Builder(engine, engine.pages, engine.slots)
        try:
            for sequence in self.sequences:
                if sequence.seat is None:
                    sequence.sit(engine.text_seats.take())
                ids = sequence.ids[sequence.computed :][: min(left, builder.rows_left)]
                drawings = [self._drawing] if self._drawing and len(ids) == 1 else []
                if ids and builder.add(sequence, ids, *drawings):
                    left -= len(ids)
        except PoolEmptyError:
            self._take_back(builder.batch())
            raise
        made = builder.batch()
        assert made.runs, "an empty step takes no row"
        if made.drawings:
            return made
        return self._kind(made.runs, made.page_writes, made.table, made.pages, made.slots)

    def _take_back(self, batch: Batch) -> None:
        """Take back the runs of a step that did not run."""
        for sequence in self.sequences:
            sequence.submitted, sequence.tabled = sequence.computed, 0
        self._release(batch)

    def _release(self, batch: Batch) -> None:
        self._engine.pages.release_all(batch.pages)
        self._engine.slots.release_all(batch.slots)

    def _make_room(self) -> None:
        """Let the pools grow, or evict from the cache, or else give up the last text."""
        if self._engine.make_room(*self._engine.lacking(), self._running.cache):
            return
        if len(self.sequences) == 1:
            raise OutOfMemoryError(NO_ROOM)
        self._leave(self.sequences.pop())

    def _leave(self, sequence: Sequence) -> None:
        """Give back the sequence's pages, slot and seat."""
        sequence.submitted = sequence.computed
        sequence.release(self._engine.pages, self._engine.slots)
        if sequence.seat is not None:
            self._engine.text_seats.release(sequence.seat)
            sequence.seat = None
