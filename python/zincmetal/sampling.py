"""Choosing the next token: some logits are changed, then filters leave a few tokens, then one is drawn.

In this order: ``logits_processors``; repetition, presence and frequency penalties; ``logit_bias``; top-k, typical,
top-p, min-p, each on the probabilities of what the one before left; the temperature; the draw.

The candidates that the device leaves suffice for most steps. A filter that cannot be sure of its result asks for a
longer ranking of the tokens instead; whatever the length, the result is the same to the bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from .candidates import Adjusted, F32Array, F64Array, IdArray, Ranking, StepLogits
from .errors import UsageError

LogitsProcessor = Callable[[Sequence[int], F32Array], F32Array]

_INF = float("inf")
SUMS_ERROR = 1e-3  # more than float32 sums over all logits are off, relatively


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token. A control at its default is off; raises UsageError that names a wrong one.

    ``temperature`` 0 takes the most probable token, whatever the filters. Filters: ``top_k`` keeps the k most
    probable, ``typical_p`` those whose surprisal is nearest to the entropy until they reach probability p
    (arXiv 2202.00666), ``top_p`` the fewest most probable that reach p, ``min_p`` those of at least p times the
    best. They see probabilities before the temperature.

    Penalties count the last ``repeat_last_n`` tokens, prompt included: ``repeat_penalty`` divides positive and
    multiplies negative logits of tokens among them (arXiv 1909.05858), ``presence_penalty`` is subtracted from
    those, ``frequency_penalty`` times how often each is there. ``logit_bias`` maps token ids to what is added
    to their logits; -inf forbids a token. ``logits_processors`` are called in turn with the ids so far and the
    logits float32 [vocab], and return logits; -inf forbids.

    The same ``seed`` gives the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logits_processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        for f in fields(self):
            wanted, good = _RULES[f.name]
            value = getattr(self, f.name)
            try:
                ok = good(value)
            except (TypeError, ValueError, OverflowError):
                ok = False
            if not ok:
                raise UsageError(f"{f.name} must be {wanted}, not {value!r}")
        # What the caller does to theirs later changes nothing.
        object.__setattr__(self, "logit_bias", {operator.index(k): float(v) for k, v in self.logit_bias.items()})
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors))

    def check_vocabulary(self, n_vocab: int) -> None:
        """Raises UsageError where ``logit_bias`` names a token that the model does not have."""
        wrong = next((t for t in self.logit_bias if t >= n_vocab), None)
        if wrong is not None:
            raise UsageError(f"logit_bias: token id {wrong} is outside the vocabulary of {n_vocab}")

    @property
    def greedy(self) -> bool:
        """Whether the device's arg max is the answer: no temperature, and no logit is changed."""
        return self.temperature == 0 and not (self.penalises or self.logit_bias or self.logits_processors)

    @property
    def penalises(self) -> bool:
        """Whether any penalty is on."""
        on = self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return on and self.repeat_last_n > 0


def _finite(value: Any) -> bool:
    return bool(-_INF < value < _INF)


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(operator.index(k) >= 0 and -_INF <= v < _INF for k, v in value.items())


# What each field must be, in words, and the test of it.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number >= 0", lambda v: 0 <= v < _INF),
    "top_k": ("a whole number >= 0 (0: off)", lambda v: operator.index(v) >= 0),
    "top_p": ("a number above 0 and at most 1 (1: off)", lambda v: 0 < v <= 1),
    "min_p": ("a number from 0 (off) to 1", lambda v: 0 <= v <= 1),
    "typical_p": ("a number above 0 and at most 1 (1: off)", lambda v: 0 < v <= 1),
    "repeat_penalty": ("a number > 0 (1: off)", lambda v: 0 < v < _INF),
    "repeat_last_n": ("a whole number >= 0", lambda v: operator.index(v) >= 0),
    "presence_penalty": ("a finite number (0: off)", _finite),
    "frequency_penalty": ("a finite number (0: off)", _finite),
    "logit_bias": ("a mapping of token ids to finite numbers or -inf", _is_bias),
    "seed": ("a whole number >= 0, or None", lambda v: v is None or operator.index(v) >= 0),
    "logits_processors": ("a sequence of callables", lambda v: all(callable(f) for f in v)),
}


class Sampler:
    """Draws tokens for one sequence; holds the generator's state."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._rng = np.random.default_rng(params.seed)

    def sample(self, logits: StepLogits | F32Array, history: Sequence[int]) -> int:
        """The next token id after ``history``, from a step's logits or an array float32 [vocab]. Changes neither.

        Raises DeviceError where a logit is not finite, UsageError where no token is left to choose or a
        processor returns what are no logits.
        """
        step = StepLogits.of(logits) if isinstance(logits, np.ndarray) else logits
        step.check_finite()
        if self.params.logits_processors:
            step = StepLogits.of(_processed(step.all(), history, self.params.logits_processors))
        rankings = Adjusted(step, *_changes(step, history, self.params)).rankings()
        u = self._rng.random() if self.params.temperature > 0 else 0.0
        tokens = (choose(ranking, self.params, u) for ranking in rankings)
        return next(token for token in tokens if token is not None)


# ---- changed logits -----------------------------------------------------------------------------------------


def _processed(logits: F32Array, history: Sequence[int], processors: Sequence[LogitsProcessor]) -> F32Array:
    """What the processors, in turn, make of the logits."""
    n_vocab = logits.size
    for i, process in enumerate(processors):
        result = process(list(history), logits)
        try:
            logits = np.asarray(result, np.float32)
        except (TypeError, ValueError):
            raise UsageError(f"logits_processors[{i}] returned {type(result).__name__}, not logits") from None
        if logits.shape != (n_vocab,):
            raise UsageError(f"logits_processors[{i}] returned shape {logits.shape}, not ({n_vocab},)")
        if not (logits < np.inf).all():
            raise UsageError(f"logits_processors[{i}] returned NaN or +inf; -inf is how a token is forbidden")
    return logits


def _changes(step: StepLogits, history: Sequence[int], p: SamplingParams) -> tuple[IdArray, F64Array, F64Array]:
    """The ids, ascending, of the tokens that penalties or bias apply to, and their logits before and after both."""
    recent = history[-p.repeat_last_n :] if p.penalises else ()
    seen, counts = np.unique(np.asarray(recent, np.int64), return_counts=True)
    biased = np.fromiter(p.logit_bias, np.int64, len(p.logit_bias))
    ids = np.union1d(seen, biased)
    before = step.at(ids)
    logits = before.copy()
    at = ids.searchsorted(seen)
    x = logits[at]
    with np.errstate(over="ignore"):
        x = np.where(x > 0, x / p.repeat_penalty, x * p.repeat_penalty)
        logits[at] = x - p.presence_penalty - p.frequency_penalty * counts
        logits[ids.searchsorted(biased)] += np.fromiter(p.logit_bias.values(), np.float64, biased.size)
    return ids, before, logits


# ---- the choice ---------------------------------------------------------------------------------------------
# Everything from here on says None where the ranking is too short to say.


def choose(ranking: Ranking, p: SamplingParams, u: float) -> int | None:
    """The token that ``u``, from 0 to 1, draws. Raises UsageError where no token is left."""
    if ranking.ids.size == 0:
        if ranking.whole:
            raise UsageError("no token is left to choose: logit_bias or logits_processors forbid them all")
        return None
    if p.temperature == 0:
        return int(ranking.ids[0])
    kept = keep(ranking, p)
    return None if kept is None else _draw(kept, p.temperature, u)


def _draw(ranking: Ranking, temperature: float, u: float) -> int | None:
    """The token at the share ``u`` of all weights; certain where it is the same for the least and the most of them."""
    others = _most_of_others(ranking, temperature)
    if others == _INF:
        return None
    weights = np.exp((ranking.logits - ranking.logits[0]) / temperature).cumsum()
    least, most = weights.searchsorted(u * (weights[-1] + np.array([0.0, others])), side="right")
    return int(ranking.ids[least]) if least == most else None


def _most_of_others(ranking: Ranking, temperature: float) -> float:
    """No less than what the tokens that are not ranked weigh beside the best."""
    if ranking.whole:
        return 0.0
    totals = ranking.totals()
    if totals is None or temperature > 1:
        return _INF
    best = ranking.logits[0]
    all_weights = np.exp(totals.log_sum_exp - best)
    rest = all_weights * (1 + SUMS_ERROR) - np.exp(ranking.logits - best).sum()
    # That is at temperature 1; below, a token loses the more, the less probable it is.
    below = ranking.floor - best
    return float(max(rest, 0.0) * np.exp(below / temperature - below))


# ---- filters ------------------------------------------------------------------------------------------------


def keep(ranking: Ranking, p: SamplingParams) -> Ranking | None:
    """What all filters leave."""
    kept: Ranking | None = ranking
    for keep_some in (_keep_top_k, _keep_typical, _keep_top_p_and_min_p):
        kept = None if kept is None else keep_some(kept, p)
    return kept


def _keep_top_k(ranking: Ranking, p: SamplingParams) -> Ranking | None:
    if p.top_k == 0:
        return ranking
    return ranking.only(slice(p.top_k)) if ranking.whole or ranking.ids.size >= p.top_k else None


def _keep_typical(ranking: Ranking, p: SamplingParams) -> Ranking | None:
    if p.typical_p == 1:
        return ranking
    totals = ranking.totals()
    if totals is None:
        return None
    surprisal = totals.log_sum_exp - ranking.logits
    distance = np.abs(surprisal - totals.entropy)
    order = np.argsort(distance, kind="stable")
    n = _reach(np.exp(-surprisal[order]), p.typical_p, ranking.whole)
    # Tokens that are not in the ranking are less probable than all in it: they may be nearer to the entropy than some.
    nearest_other = (totals.log_sum_exp - ranking.floor) - totals.entropy
    if n is None or not distance[order[n - 1]] < nearest_other:
        return None
    return ranking.only(np.sort(order[:n]))


def _keep_top_p_and_min_p(ranking: Ranking, p: SamplingParams) -> Ranking | None:
    """Both keep the most probable: the smaller number counts, and may be certain where the other is not."""
    if p.top_p == 1 and p.min_p == 0:
        return ranking
    if p.top_p < 1 and ranking.totals() is None:
        return None
    limits = (_n_top_p(ranking, p.top_p), _n_min_p(ranking, p.min_p))
    n = min((n for n in limits if n is not None), default=None)
    return None if n is None else ranking.only(slice(n))


def _n_top_p(ranking: Ranking, top_p: float) -> int | None:
    """How many top-p keeps; None where they are more than are ranked."""
    totals = ranking.totals() if top_p < 1 else None
    if totals is None:
        return ranking.ids.size if ranking.whole else None
    best = ranking.logits[0]
    return _reach(np.exp(ranking.logits - best), top_p * np.exp(totals.log_sum_exp - best), ranking.whole)


def _n_min_p(ranking: Ranking, min_p: float) -> int | None:
    """How many min-p keeps; None where they may be more than are ranked."""
    least = ranking.logits[0] + np.log(min_p) if min_p > 0 else -np.inf
    if not ranking.whole and ranking.floor >= least:
        return None
    return int((ranking.logits >= least).sum())


def _reach(weights: F64Array, wanted: float, whole: bool) -> int | None:
    """How many of the weights, in order, sum up to ``wanted``; all where rounding keeps them below it."""
    n = int(weights.cumsum().searchsorted(wanted)) + 1
    if n <= weights.size:
        return n
    return weights.size if whole else None
