"""Choosing the next token: some logits are changed, then filters leave a few tokens, then one is drawn.

In this order: ``logits_processors``; repetition, presence and frequency penalties; ``logit_bias``; top-k, typical,
top-p, min-p, each on the probabilities of what the one before left; the temperature; the draw.

The draw takes the largest of logit / temperature + noise, where the noise of a token depends on the seed, the position
and the token alone (``noise.py``). What the order of the tokens or their sums would carry from one to all others
does not count, so logits that differ in their last bits give other tokens only where two were as close as that.

The candidates that the device leaves suffice for most steps. A filter that cannot be sure of its result asks for a
longer ranking of the tokens instead; whatever the length, the result is the same to the bit. Without filters, the
HEAD most probable tokens have noise of their own, and the others one for all of them: only where that wins are all
logits read, and one of the others drawn. ``docs/sampling.md`` shows that this is the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import arguments
from ..errors import UsageError, abbreviate
from .logits import LARGEST, Adjusted, F32Array, F64Array, IdArray, Ranking, StepLogits, largest
from .noise import MAX_SEED, Noise, NoiseSource

LogitsProcessor = Callable[[Sequence[int], F32Array], F32Array]

_Read = Callable[[str, Any], Any]  # an argument as it is kept, from its name and what was passed

_INF = float("inf")
LARGEST_FLOAT = float(np.finfo(np.float64).max)
SUMS_ERROR = 1e-3  # more than float32 sums over all logits are off, relatively
HEAD = 128  # fewer than the candidates, so that some of these may be penalised and enough stay
LONGEST = 2**63 - 1  # of numbers of tokens
NO_IDS, NO_LOGITS = np.empty(0, np.int64), np.empty(0, np.float64)
FORBIDDEN = "no token is left to choose: logit_bias or logits_processors forbid them all"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token. A control at its default is off; raises UsageError that names a wrong one.

    ``temperature`` 0 takes the most probable token, whatever the filters. Filters: ``top_k`` keeps the k most
    probable (0 or -1: all), ``typical_p`` those whose surprisal is nearest to the entropy until they reach probability
    p (arXiv 2202.00666), ``top_p`` the fewest most probable that reach p (0: the best alone), ``min_p`` those of at
    least p times the best. They see probabilities before the temperature.

    Penalties count the last ``repeat_last_n`` tokens, prompt included (-1: all): ``repeat_penalty`` divides positive
    and multiplies negative logits of tokens among them (arXiv 1909.05858), ``presence_penalty`` is subtracted from
    those, ``frequency_penalty`` times how often each is there. ``logit_bias`` maps token ids (or their digits, as JSON
    has them) to what is added to their logits, or has pairs of both; -inf forbids a token, and +inf is refused.
    ``logits_processors`` are called in turn with the ids so far and the logits float32 [vocab], and return logits;
    -inf forbids. What they raise reaches the caller as it is.

    The same ``seed`` gives the same tokens for the same logits (``docs/sampling.md`` says what that promises); None
    or -1 is another one each time. None stands for the default of any other control too.
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
        # What the caller does to theirs later changes nothing: each is replaced by a value of its own.
        for name, read in _READ.items():
            object.__setattr__(self, name, read(name, getattr(self, name)))

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
        return on and self.repeat_last_n != 0

    @property
    def filters(self) -> bool:
        """Whether any filter is on."""
        return self.top_k > 0 or self.typical_p < 1 or self.top_p < 1 or self.min_p > 0


# ---- arguments ----------------------------------------------------------------------------------------------


def _number(default: float, note: str, low: float = -_INF, high: float = _INF, above: bool = False) -> _Read:
    return lambda name, value: arguments.number(name, value, low, high, default, note, above=above)


def _count(default: int, note: str) -> _Read:
    return lambda name, value: arguments.integer(name, value, -1, LONGEST, default, note)


def _seed(name: str, value: Any) -> int | None:
    seed = arguments.integer(name, value, -1, MAX_SEED, -1, "-1 or None: another one each time")
    return None if seed == -1 else seed


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    """Biases by token id, from a mapping or pairs."""
    wanted = "a mapping of token ids to numbers or -inf"
    if value is None:
        return {}
    if isinstance(value, str):
        arguments.refuse(name, wanted, value)
    try:
        pairs = [(k, v) for k, v in (value.items() if isinstance(value, Mapping) else value)]
    except Exception as error:
        arguments.refuse(name, wanted, value, error)
    biases = {}
    for token, bias in pairs:
        try:
            biases[_token_of(token)] = arguments.number("", bias, high=LARGEST_FLOAT, finite=False)
        except UsageError as error:
            shown = f"{abbreviate(token)}: {abbreviate(bias)}"
            raise UsageError(f"{name} must be {wanted}, and holds {{{shown}}}") from error.__cause__
    return biases


def _token_of(key: Any) -> int:
    """The token id that a key of ``logit_bias`` is, or whose digits it is."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20:
        key = int(key)
    return arguments.integer("", key, 0, LONGEST)


def _processors(name: str, value: Any) -> tuple[LogitsProcessor, ...]:
    wanted = "a sequence of functions"
    if value is None:
        return ()
    try:
        found = tuple(value)
    except Exception as error:
        arguments.refuse(name, wanted, value, error)
    if not all(callable(f) for f in found):
        arguments.refuse(name, wanted, value)
    return found


_READ: dict[str, _Read] = {
    "temperature": _number(0.0, "0: the most probable token", 0),
    "top_k": _count(0, "0 or -1: off"),
    "top_p": _number(1.0, "1: off", 0, 1),
    "min_p": _number(0.0, "0: off", 0, 1),
    "typical_p": _number(1.0, "1: off", 0, 1, above=True),
    "repeat_penalty": _number(1.0, "1: off", 0, above=True),
    "repeat_last_n": _count(64, "0: off, -1: all"),
    "presence_penalty": _number(0.0, "0: off"),
    "frequency_penalty": _number(0.0, "0: off"),
    "logit_bias": _logit_bias,
    "seed": _seed,
    "logits_processors": _processors,
}


# ---- one step -----------------------------------------------------------------------------------------------


class Sampler:
    """Draws tokens for one sequence."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._noise = NoiseSource(params.seed)

    def sample(self, logits: StepLogits | F32Array, history: Sequence[int]) -> int:
        """The next token id after ``history``, from a step's logits or an array float32 [vocab]. Changes neither.

        Raises DeviceError where a logit is not finite, UsageError where no token is left to choose or a
        processor returns what are no logits.
        """
        step = StepLogits.of(logits) if isinstance(logits, np.ndarray) else logits
        step.check_finite()
        if self.params.logits_processors:
            step = StepLogits.of(_processed(step.all(), history, self.params.logits_processors))
        return choose(Adjusted(step, *_changes(step, history, self.params)), self.params, self._noise.at(len(history)))


# ---- changed logits -----------------------------------------------------------------------------------------


def _processed(logits: F32Array, history: Sequence[int], processors: Sequence[LogitsProcessor]) -> F32Array:
    """What the processors, in turn, make of the logits."""
    for i, process in enumerate(processors):
        logits = _logits_of(f"logits_processors[{i}]", process(list(history), logits), logits.size)
    return logits


def _logits_of(name: str, result: Any, n_vocab: int) -> F32Array:
    """What a processor returned as float32 [n_vocab]."""
    try:
        logits = np.asarray(result)
    except Exception as error:
        raise UsageError(f"{name} returned {type(result).__name__}, not logits") from error
    if logits.dtype.kind not in "fiu":
        raise UsageError(f"{name} returned {type(result).__name__} of {logits.dtype}, not logits")
    if logits.shape != (n_vocab,):
        raise UsageError(f"{name} returned shape {logits.shape}, not ({n_vocab},)")
    if not (logits < np.inf).all():
        raise UsageError(f"{name} returned NaN or +inf; -inf is how a token is forbidden")
    if logits.dtype != np.float32:
        most = np.finfo(np.float32).max
        logits = np.where(logits == -np.inf, -np.inf, logits.clip(-most, most)).astype(np.float32)
    return logits


def _changes(step: StepLogits, history: Sequence[int], p: SamplingParams) -> tuple[IdArray, F64Array, F64Array]:
    """The ids, ascending, of the tokens that penalties or bias apply to, and their logits before and after both."""
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
    """Logits of tokens that are there so many times."""
    if not counts.size:
        return logits
    # A product that overflowed is as good as the largest number; a token that is forbidden stays so.
    with np.errstate(over="ignore"):
        scaled = _bounded(np.where(logits > 0, logits / p.repeat_penalty, logits * p.repeat_penalty))
        penalty = _bounded(p.presence_penalty + p.frequency_penalty * counts.astype(np.float64))
    changed = _bounded(scaled - penalty)
    changed[logits == -np.inf] = -np.inf
    return changed


def _sum(logits: F64Array, more: F64Array) -> F64Array:
    """The sum, of which -inf alone forbids: a number that grew too large is still one."""
    with np.errstate(over="ignore"):
        result = _bounded(logits + more)
    return np.where((logits == -np.inf) | (more == -np.inf), -np.inf, result)


def _bounded(logits: F64Array) -> F64Array:
    """Within what leaves room for differences."""
    result: F64Array = np.minimum(np.maximum(logits, -LARGEST), LARGEST)
    return result


# ---- the choice ---------------------------------------------------------------------------------------------
# A ranking may be too short to say: then functions say None.


def choose(adjusted: Adjusted, p: SamplingParams, noise: Noise) -> int:
    """The token that the noise draws. Raises UsageError where no token is left."""
    rankings = adjusted.rankings()
    if p.temperature > 0 and not p.filters:
        token = _draw_from_head(next(rankings), p.temperature, noise)
        return _draw_from_all(adjusted.all(), p.temperature, noise) if token is None else token
    for ranking in rankings:
        if ranking.ids.size == 0:
            continue
        if p.temperature == 0:
            return int(ranking.ids[0])
        kept = keep(ranking, p)
        if kept is not None:
            return _draw(kept.ids, kept.logits, p.temperature, noise)[0]
    raise UsageError(FORBIDDEN)  # of all tokens, something is kept


def _draw(ids: IdArray, logits: F64Array, temperature: float, noise: Noise) -> tuple[int, float]:
    """The token of the largest score, and that: logit below the first / temperature + noise."""
    scores = _scaled(logits, float(logits[0]), temperature) + noise.of(ids)
    best = int(scores.argmax())
    return int(ids[best]), float(scores[best])


def _scaled(logits: F64Array, best: float, temperature: float) -> F64Array:
    """The logits less the best one at a temperature, however small that is."""
    with np.errstate(over="ignore"):
        return (logits - best) / temperature


def _draw_from_head(ranking: Ranking, temperature: float, noise: Noise) -> int | None:
    """The token among the HEAD most probable, if it is certain that no other token wins."""
    ids, logits = ranking.ids, ranking.logits
    if ids.size < HEAD and (not ranking.whole or ids.size == 0):
        return None
    token, score = _draw(ids[:HEAD], logits[:HEAD], temperature, noise)
    others = float(np.exp(_scaled(logits[HEAD:], float(logits[0]), temperature)).sum())
    others += _most_of_others(ranking, temperature)
    return token if score > _log(others) + noise.of_others() else None


def _draw_from_all(logits: F64Array, temperature: float, noise: Noise) -> int:
    """The token among all, by id."""
    head = largest(logits, HEAD)
    best = float(logits[head[0]])
    if best == -np.inf:
        raise UsageError(FORBIDDEN)
    token, score = _draw(head, logits[head], temperature, noise)
    scaled = _scaled(logits, best, temperature)
    scaled[head] = -np.inf
    if score > _log(float(np.exp(scaled).sum())) + noise.of_others():
        return token
    return int((scaled + noise.of(np.arange(logits.size))).argmax())


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else -math.inf


def _most_of_others(ranking: Ranking, temperature: float) -> float:
    """No less than what the tokens that are not ranked weigh beside the best."""
    if ranking.whole:
        return 0.0
    totals = ranking.totals()
    if totals is None or temperature > 1:
        return _INF
    best = float(ranking.logits[0])
    all_weights = math.exp(totals.log_sum + (totals.base - best))
    rest = all_weights * (1 + SUMS_ERROR) - float(np.exp(ranking.logits - best).sum())
    # That is at temperature 1; below, a token loses the more, the less probable it is.
    below = ranking.floor - best
    return max(rest, 0.0) * math.exp(below / temperature - below)


# ---- filters ------------------------------------------------------------------------------------------------


def keep(ranking: Ranking, p: SamplingParams) -> Ranking | None:
    """What all filters leave."""
    kept: Ranking | None = ranking
    for keep_some in (_keep_top_k, _keep_typical, _keep_top_p_and_min_p):
        kept = None if kept is None else keep_some(kept, p)
    return kept


def _keep_top_k(ranking: Ranking, p: SamplingParams) -> Ranking | None:
    if p.top_k <= 0:
        return ranking
    return ranking.only(slice(p.top_k)) if ranking.whole or ranking.ids.size >= p.top_k else None


def _keep_typical(ranking: Ranking, p: SamplingParams) -> Ranking | None:
    if p.typical_p == 1:
        return ranking
    totals = ranking.totals()
    if totals is None:
        return None
    surprisal = totals.surprisal(ranking.logits)
    distance = np.abs(surprisal - totals.entropy)
    order = np.argsort(distance, kind="stable")
    n = _reach(np.exp(-surprisal[order]), p.typical_p, ranking.whole)
    if n is None:
        return None
    # Tokens that are not in the ranking are less probable than all in it: they may be nearer to the entropy than some.
    nearest_other = totals.log_sum + (totals.base - ranking.floor) - totals.entropy
    if not ranking.whole and distance[order[n - 1]] >= nearest_other:
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
    return _reach(np.exp(ranking.logits - best), top_p * math.exp(totals.log_sum + (totals.base - best)), ranking.whole)


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
