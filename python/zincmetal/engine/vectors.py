"""Vectors of texts: steps over many texts, whose final rows are pooled. Requests have steps between them."""

from __future__ import annotations

from collections.abc import Sequence as AnySequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ContextFullError
from .batch import HiddenRows
from .engine import TEXT_SEATS, Engine
from .readings import Reading, Slices
from .running import Running
from .texts import Texts

F64 = NDArray[np.float64]


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
        found += running.loop.read(Reading("hidden", engine.max_rows, _slices(running, group, kind)))
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
    """Return the first texts that one whole step takes, at least one. A single one may need several steps."""
    rows = 0
    for n, ids in enumerate(texts):
        rows += len(ids)
        if n and (rows > engine.max_rows or n >= TEXT_SEATS):
            return texts[:n]
    return texts


def _slices(running: Running, texts: AnySequence[AnySequence[int]], kind: str) -> Slices[list[NDArray[np.float32]]]:
    """Read some texts, on the step thread. If the pools have no room for all, the result has the first ones alone."""
    rows = yield 0, len(texts)
    engine = running.engine
    group, pooled = Texts(running, texts, HiddenRows), [Pooled(kind) for _ in texts]
    index = {id(sequence): i for i, sequence in enumerate(group.sequences)}
    try:
        while group.left:
            batch = group.step(rows if engine.config.causal else engine.max_rows)
            hidden, at = engine.hidden(batch.n_rows), 0
            for run in batch.runs:
                pooled[index[id(run.sequence)]].add(hidden[at : at + len(run.tokens)])
                at += len(run.tokens)
            rows = yield batch.n_rows, group.left
    finally:
        n = len(group.sequences)
        group.leave()
    return [each.vector() for each in pooled[:n]]
