"""Scores of prompts: the logits after every token, and the log-probabilities of the tokens that follow.

Other requests have steps between two slices of a prompt. For any thread but the step thread.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..plan.chunks import LOGITS_ROWS, chunk_shape
from ..sampling.draws import log_probabilities, top_log_probabilities
from ..sampling.params import SamplingParams
from .batch import AllLogits, Drawing
from .readings import Reading, Slices
from .texts import Texts

if TYPE_CHECKING:
    from .running import Running

F32 = NDArray[np.float32]
Ranked = tuple[float, tuple[tuple[int, float], ...]]


def logits(running: Running, ids: AnySequence[int]) -> F32:
    """Return the logits after every id: float32 [len(ids), vocab].

    Raises UsageError for no ids or a wrong id, ContextFullError for too many, OutOfMemoryError if the pools have no
    room for them.
    """
    running.engine.check_prompt(ids)
    out = np.empty((len(ids), running.engine.config.n_vocab), np.float32)

    def take(at: int, found: F32) -> None:
        out[at : at + len(found)] = found

    _read(running, ids, take)
    return out


def prompt_logprobs(running: Running, ids: AnySequence[int]) -> list[float]:
    """Return the log-probability of each id but the first, given those before it. Raises as :func:`logits`."""
    out = list[float]()
    _read(running, ids, lambda at, found: out.extend(following_logprobs(ids, at, found)))
    return out


def prompt_scores(running: Running, ids: AnySequence[int], n_top: int) -> list[Ranked]:
    """Return :func:`prompt_logprobs`, each with the ``n_top`` most probable ids and theirs."""
    out = list[Ranked]()

    def take(at: int, found: F32) -> None:
        following = ids[at + 1 : at + 1 + len(found)]
        out.extend(top_log_probabilities(row, id, n_top) for row, id in zip(found, following, strict=False))

    _read(running, ids, take)
    return out


def following_logprobs(ids: AnySequence[int], at: int, found: F32) -> list[float]:
    """Return the log-probabilities of the ids that follow. ``found``: the logits after id ``at`` and those behind."""
    following = list(ids[at + 1 : at + 1 + len(found)])
    if not following:
        return []
    return log_probabilities(found[: len(following)], following).tolist()  # type: ignore[no-any-return]


def _read(running: Running, ids: AnySequence[int], take: Callable[[int, F32], None]) -> None:
    """Call ``take`` with the place of a slice and its logits [n, vocab], on the step thread, in their order."""
    running.engine.check_prompt(ids)
    running.loop.read(Reading("logits", LOGITS_ROWS, _slices(running, ids, take)))


def _slices(running: Running, ids: AnySequence[int], take: Callable[[int, F32], None]) -> Slices[None]:
    rows = yield 0, len(ids)
    engine, n = running.engine, min(LOGITS_ROWS, len(ids))
    text = Texts(running, [ids], AllLogits, Drawing(SamplingParams()))
    try:
        many = n > 1 and engine.program(chunk_shape(n, 0, n, "all")).plan.shape.rows >= n
        while text.left:
            (sequence,) = text.sequences
            at = sequence.computed
            batch = text.step(rows if many else 1)
            found = engine.logits(batch.n_rows)
            if not np.isfinite(found).all():
                raise engine.not_finite(sequence.pages)
            take(at, found)
            rows = yield batch.n_rows, text.left
    finally:
        text.leave()
