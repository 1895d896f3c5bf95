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

The candidates that the device leaves suffice for most steps (``logits.py``). Without filters, the N_TOP most probable
tokens have noise of their own, and all other tokens share one noise. All logits are read only if the shared noise
wins; then one of the other tokens is drawn. ``docs/sampling.md`` shows that this is the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UsageError
from .logits import LARGEST, Adjusted, StepLogits
from .noise import Noise, NoiseSource
from .params import LogitsProcessor, SamplingParams
from .ranking import F32Array, F64Array, IdArray, Ranking, keep, largest

__all__ = ["N_TOP", "Sampler", "choose", "keep"]

SUMS_ERROR = 1e-3  # bound of the relative error of float32 sums over all logits
N_TOP = 128  # fewer than the candidates: some of these may be penalised, and enough stay
NO_IDS, NO_LOGITS = np.empty(0, np.int64), np.empty(0, np.float64)
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
        step = StepLogits.of(logits) if isinstance(logits, np.ndarray) else logits
        step.check_finite()
        if self.params.logits_processors:
            step = StepLogits.of(processed(step.all(), history, self.params.logits_processors))
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
    rankings = adjusted.rankings()
    if p.temperature > 0 and not p.filters:
        token = _draw_from_top(next(rankings), p.temperature, noise)
        return _draw_from_all(adjusted.all(), p.temperature, noise) if token is None else token
    for ranking in rankings:
        if ranking.ids.size == 0:
            continue
        if p.temperature == 0:
            return int(ranking.ids[0])
        kept = keep(ranking, p)
        if kept is not None:
            return _draw(kept.ids, kept.logits, p.temperature, noise)[0]
    raise UsageError(FORBIDDEN)  # a ranking of all tokens was empty; filters always keep a token


def _draw(ids: IdArray, logits: F64Array, temperature: float, noise: Noise) -> tuple[int, float]:
    """Find the token with the largest score, and its score: (logit - first logit) / temperature + noise."""
    scores = _scaled(logits, float(logits[0]), temperature) + noise.of(ids)
    best = int(scores.argmax())
    return int(ids[best]), float(scores[best])


def _scaled(logits: F64Array, best: float, temperature: float) -> F64Array:
    """Compute (logits - best) / temperature. A tiny temperature may give -inf."""
    with np.errstate(over="ignore"):
        return (logits - best) / temperature


def _draw_from_top(ranking: Ranking, temperature: float, noise: Noise) -> int | None:
    """Draw among the N_TOP most probable tokens. None if another token might win."""
    ids, logits = ranking.ids, ranking.logits
    if ids.size < N_TOP and (not ranking.whole or ids.size == 0):
        return None
    token, score = _draw(ids[:N_TOP], logits[:N_TOP], temperature, noise)
    others = float(np.exp(_scaled(logits[N_TOP:], float(logits[0]), temperature)).sum())
    others += _most_weight_of_others(ranking, temperature)
    return token if score > _log(others) + noise.of_others() else None


def _draw_from_all(logits: F64Array, temperature: float, noise: Noise) -> int:
    """Draw among all tokens, with logits float64 [n_vocab]."""
    top = largest(logits, N_TOP)
    best = float(logits[top[0]])
    if best == -np.inf:
        raise UsageError(FORBIDDEN)
    token, score = _draw(top, logits[top], temperature, noise)
    scaled = _scaled(logits, best, temperature)
    scaled[top] = -np.inf
    if score > _log(float(np.exp(scaled).sum())) + noise.of_others():
        return token
    return int((scaled + noise.of(np.arange(logits.size))).argmax())


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf


def _most_weight_of_others(ranking: Ranking, temperature: float) -> float:
    """Upper bound on the total weight of all unranked tokens, relative to the weight of the best token."""
    if ranking.whole:
        return 0.0
    totals = ranking.totals()
    if totals is None or temperature > 1:
        return math.inf
    best = float(ranking.logits[0])
    all_weights = math.exp(totals.log_sum + (totals.base - best))
    rest = all_weights * (1 + SUMS_ERROR) - float(np.exp(ranking.logits - best).sum())
    # So far at temperature 1. At a lower one, a token loses more weight the less probable it is.
    below = ranking.floor - best
    return max(rest, 0.0) * math.exp(below / temperature - below)
