"""Chooses the next token: some logits are changed, filters keep a few tokens, and one token is drawn.

The steps, in their order:

1. ``logits_processors``.
2. Repetition, presence and frequency penalties.
3. ``logit_bias``.
4. The filters: top-k, typical, top-p, min-p. Each sees the probabilities that the one before left.
5. The temperature.
6. The draw: the token with the largest logit / temperature + noise.

The noise of a token depends on the seed, the position and the token alone (``noise.py``). So the draw depends neither
on the order of the tokens nor on a running sum over them. Logits that differ in their last bits give another token
only if the two largest scores were that close.

The device draws by the same rule (``draws.py``). This is the reference, and it draws where ``logits_processors`` change
the logits, where the biases are too many for a step's buffers, and for a device that cannot draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UsageError
from .logits import LARGEST, NO_IDS, NO_LOGITS, Adjusted, StepLogits
from .noise import Noise, NoiseSource
from .params import LogitsProcessor, SamplingParams
from .ranking import F32Array, F64Array, IdArray, keep

__all__ = ["Sampler", "choose", "keep"]

FORBIDDEN = "no token is left to choose: logit_bias or logits_processors forbid them all"


class Sampler:
    """Chooses tokens for one sequence."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._noise = NoiseSource(params.seed)

    def sample(self, logits: StepLogits | F32Array, history: Sequence[int]) -> int:
        """Choose the token id after ``history``, from the logits of a step or an array float32 [vocab].

        Changes neither of them. Raises DeviceError if a logit is not finite. Raises UsageError if no token is
        left to choose, or if a processor does not return logits.
        """
        step = StepLogits(logits) if isinstance(logits, np.ndarray) else logits
        step.check_finite()
        if self.params.logits_processors:
            step = StepLogits(processed(step.all(), history, self.params.logits_processors))
        return choose(Adjusted(step, *changes(step, history, self.params)), self.params, self._noise.at(len(history)))


# ---- changed logits -----------------------------------------------------------------------------------------


def processed(logits: F32Array, history: Sequence[int], processors: Sequence[LogitsProcessor]) -> F32Array:
    """Apply the processors, one after another, to logits float32 [n_vocab]."""
    for i, process in enumerate(processors):
        logits = _logits_of(f"logits_processors[{i}]", process(list(history), logits), logits.size)
    return logits


def _logits_of(name: str, result: Any, n_vocab: int) -> F32Array:
    """Convert the result of a processor to float32 [n_vocab]. Raises UsageError, with ``name``, if it is no logits."""
    try:
        logits = np.asarray(result)
    except Exception as error:
        raise UsageError(f"{name} returned {type(result).__name__}, not logits") from error
    if logits.dtype.kind not in "fiu":
        raise UsageError(f"{name} returned {type(result).__name__} of {logits.dtype}, not logits")
    if logits.shape != (n_vocab,):
        raise UsageError(f"{name} returned shape {logits.shape}, not ({n_vocab},)")
    if not (logits < np.inf).all():
        raise UsageError(f"{name} returned NaN or +inf; use -inf to forbid a token")
    if logits.dtype != np.float32:
        most = np.finfo(np.float32).max
        logits = np.where(logits == -np.inf, -np.inf, logits.clip(-most, most)).astype(np.float32)
    return logits


def changes(step: StepLogits, history: Sequence[int], p: SamplingParams) -> tuple[IdArray, F64Array, F64Array]:
    """Apply penalties and bias.

    Returns the ids of the changed tokens, ascending, and their logits before and after.
    """
    seen, counts = NO_IDS, NO_IDS
    if p.penalises:
        recent = history if p.repeat_last_n < 0 else history[-p.repeat_last_n :]
        seen, counts = np.unique(np.asarray(recent, np.int64), return_counts=True)
    if not p.logit_bias:
        before = step.at(seen) if seen.size else NO_LOGITS
        return seen, before, _penalised(before, counts, p)
    biased = np.fromiter(p.logit_bias, np.int64, len(p.logit_bias))
    bias = np.fromiter(p.logit_bias.values(), np.float64, biased.size)
    ids = np.union1d(seen, biased)
    before = step.at(ids)
    logits = before.copy()
    at, biased_at = ids.searchsorted(seen), ids.searchsorted(biased)
    logits[at] = _penalised(logits[at], counts, p)
    logits[biased_at] = _sum(logits[biased_at], bias)
    return ids, before, logits


def _penalised(logits: F64Array, counts: IdArray, p: SamplingParams) -> F64Array:
    """Apply the penalties to the logits of tokens that occur ``counts`` times."""
    if not counts.size:
        return logits
    # A product that overflows becomes the largest number. A forbidden token stays forbidden.
    with np.errstate(over="ignore"):
        scaled = _bounded(np.where(logits > 0, logits / p.repeat_penalty, logits * p.repeat_penalty))
        penalty = _bounded(p.presence_penalty + p.frequency_penalty * counts.astype(np.float64))
    changed = _bounded(scaled - penalty)
    changed[logits == -np.inf] = -np.inf
    return changed


def _sum(logits: F64Array, more: F64Array) -> F64Array:
    """Add, so that only -inf gives -inf: a sum that overflows becomes the largest number."""
    with np.errstate(over="ignore"):
        result = _bounded(logits + more)
    return np.where((logits == -np.inf) | (more == -np.inf), -np.inf, result)


def _bounded(logits: F64Array) -> F64Array:
    """Clip logits to ±LARGEST, so that their differences stay finite."""
    result: F64Array = np.minimum(np.maximum(logits, -LARGEST), LARGEST)
    return result


# ---- the choice ---------------------------------------------------------------------------------------------


def choose(adjusted: Adjusted, p: SamplingParams, noise: Noise) -> int:
    """Choose a token by its logits and the noise. Raises UsageError if no token is left."""
    if p.temperature > 0 and not p.filters:
        return _draw_from_all(adjusted.all(), p.temperature, noise)
    for ranking in adjusted.rankings():
        if ranking.ids.size == 0:
            continue
        if p.temperature == 0:
            return int(ranking.ids[0])
        kept = keep(ranking, p)
        if kept is not None:
            return _draw(kept.ids, kept.logits, p.temperature, noise)
    raise UsageError(FORBIDDEN)  # a ranking of all tokens was empty; filters always keep a token


def _draw(ids: IdArray, logits: F64Array, temperature: float, noise: Noise) -> int:
    """Find the token with the largest score: (logit - first logit) / temperature + noise."""
    return int(ids[(_scaled(logits, float(logits[0]), temperature) + noise.of(ids)).argmax()])


def _scaled(logits: F64Array, best: float, temperature: float) -> F64Array:
    """Compute (logits - best) / temperature. A tiny temperature may give -inf."""
    with np.errstate(over="ignore"):
        return (logits - best) / temperature


def _draw_from_all(logits: F64Array, temperature: float, noise: Noise) -> int:
    """Draw among all tokens, with logits float64 [n_vocab]."""
    best = float(logits.max())
    if best == -np.inf:
        raise UsageError(FORBIDDEN)
    return int((_scaled(logits, best, temperature) + noise.of(np.arange(logits.size))).argmax())
