"""Vectors of texts: steps over many whole texts, whose final rows are pooled.

The step thread runs each step between those of requests, while nothing else is in flight. Nothing of it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..errors import ContextFullError, OutOfMemoryError
from .batch import Batch, Builder
from .engine import TEXT_SEATS, Engine
from .pages import PoolEmptyError
from .running import Running
from .sequence import Sequence

F64 = NDArray[np.float64]
NO_ROOM = "the pages of the K/V cache are in use; end other generations, or load the model with a smaller context"


class HiddenRows(Batch):
    """Batch without outputs, whose rows after the final norm are wanted."""

    @property
    def output(self) -> str:
        """Output that the plan must have."""
        return "hidden"


class Pooled:
    """Rows of a text so far, as one vector: their mean, the first or the last one."""

    def __init__(self, kind: str) -> None:
        self._kind, self._n = kind, 0
        self._vector: F64 | None = None

    def add(self, rows: NDArray[np.float32]) -> None:
        """Take the next rows [n, width]."""
        if self._kind == "mean":
            total = rows.sum(axis=0, dtype=np.float64)
            self._vector = total if self._vector is None else self._vector + total
        elif self._kind != "first" or self._vector is None:
            self._vector = rows[0 if self._kind == "first" else -1].astype(np.float64)
        self._n += len(rows)

    def vector(self) -> NDArray[np.float32]:
        """Return the vector, float32 [width]."""
        assert self._vector is not None
        return (self._vector / (self._n if self._kind == "mean" else 1)).astype(np.float32)


def vectors(running: Running, texts: AnySequence[AnySequence[int]], kind: str) -> NDArray[np.float32]:
    """Return the vector of each text (ids): float32 [n, width]. ``kind``: how its rows are pooled, see ``Pooled``.

    For any thread but the step thread. Raises UsageError for a text without ids or a wrong id, ContextFullError for
    one that is too long, OutOfMemoryError if the pools have no room for it.
    """
    engine = running.engine
    for ids in texts:
        check(engine, ids)
    found: list[NDArray[np.float32]] = []
    while len(found) < len(texts):
        group = _fitting(engine, texts[len(found) :])
        found += running.loop.call(partial(_of_group, running, group, kind))
    whole = np.stack(found) if found else np.empty((0, engine.hidden_width), np.float32)
    if not np.isfinite(whole).all():
        raise engine.not_finite()
    return whole


def check(engine: Engine, ids: AnySequence[int]) -> None:
    """Raise UsageError for no ids or wrong ids, ContextFullError for too many."""
    engine.check_prompt(ids)
    if not engine.config.causal and len(ids) > engine.max_rows:
        raise ContextFullError(
            f"the text has {len(ids)} tokens; this model sees a text as a whole, of at most {engine.max_rows} tokens"
        )


def _fitting(engine: Engine, texts: AnySequence[AnySequence[int]]) -> AnySequence[AnySequence[int]]:
    """Return the first texts that one step takes, at least one. A single one may need several steps."""
    rows = 0
    for n, ids in enumerate(texts):
        rows += len(ids)
        if n and (rows > engine.max_rows or n >= TEXT_SEATS):
            return texts[:n]
    return texts


def _of_group(running: Running, texts: AnySequence[AnySequence[int]], kind: str) -> list[NDArray[np.float32]]:
    """Run the steps of some texts, on the step thread. If the pools have no room for all, do the first ones alone."""
    engine = running.engine
    sequences = [Sequence(list(ids)) for ids in texts]
    pooled = [Pooled(kind) for _ in texts]
    try:
        while any(sequence.computed < len(sequence.ids) for sequence in sequences):
            try:
                _step(engine, sequences, pooled)
            except PoolEmptyError:
                _make_room(running, sequences, pooled)
    finally:
        for sequence in sequences:
            _leave(engine, sequence)
    return [each.vector() for each in pooled]


def _step(engine: Engine, sequences: list[Sequence], pooled: list[Pooled]) -> None:
    """Run one step of the sequences' next rows, as many as it takes. Raises PoolEmptyError."""
    builder = Builder(engine, engine.pages, engine.slots)
    try:
        for sequence in sequences:
            if sequence.seat is None:
                sequence.sit(engine.text_seats.take())
            ids = sequence.ids[sequence.computed :][: builder.rows_left]
            if ids:
                builder.add(sequence, ids)
    except PoolEmptyError:
        _forget(engine, builder.batch(), sequences)
        raise
    made = builder.batch()
    assert made.runs, "an empty step takes no row"
    batch = HiddenRows(made.runs, made.page_writes, made.table, made.pages, made.slots)
    try:
        engine.submit(batch)
        engine.collect()
    except BaseException:
        engine.drop()
        _forget(engine, batch, sequences)
        raise
    rows, at, index = engine.hidden(batch.n_rows), 0, {id(s): i for i, s in enumerate(sequences)}
    for run in batch.runs:
        pooled[index[id(run.sequence)]].add(rows[at : at + len(run.tokens)])
        at += len(run.tokens)
        run.sequence.computed = run.end
    engine.pages.release_all(batch.pages)
    engine.slots.release_all(batch.slots)


def _forget(engine: Engine, batch: Batch, sequences: list[Sequence]) -> None:
    """Take back the runs of a step that did not run."""
    for sequence in sequences:
        sequence.submitted, sequence.tabled = sequence.computed, 0
    engine.pages.release_all(batch.pages)
    engine.slots.release_all(batch.slots)


def _make_room(running: Running, sequences: list[Sequence], pooled: list[Pooled]) -> None:
    """Let the pools grow, or evict from the cache, or else give up the last of the sequences."""
    engine = running.engine
    if engine.make_room(*engine.lacking(), running.cache):
        return
    if len(sequences) == 1:
        raise OutOfMemoryError(NO_ROOM)
    _leave(engine, sequences.pop())
    pooled.pop()


def _leave(engine: Engine, sequence: Sequence) -> None:
    """Give back the sequence's pages, slot and seat."""
    sequence.submitted = sequence.computed
    sequence.release(engine.pages, engine.slots)
    if sequence.seat is not None:
        engine.text_seats.release(sequence.seat)
        sequence.seat = None
