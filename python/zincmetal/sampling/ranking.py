"""Rankings of the most probable tokens, and the filters that shorten a ranking.

A ``Ranking`` may have only some tokens of the vocabulary. A filter returns None if it cannot be certain with so
few tokens. The caller then tries again with a longer ranking.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .params import SamplingParams

F32Array = NDArray[np.float32]
F64Array = NDArray[np.float64]
IdArray = NDArray[np.int64]


class Totals(NamedTuple):
    """Sums over all tokens: log(sum of exp(logit)), and the mean logit under the distribution, both less ``base``.

    The base is near the largest logit. With a base of 1e38 the differences still count.
    """

    base: float
    log_sum: float
    mean: float

    @property
    def entropy(self) -> float:
        """Entropy of the distribution, in nats."""
        return self.log_sum - self.mean

    @property
    def log_sum_exp(self) -> float:
        """log(sum of exp(logit)), the base included."""
        return self.base + self.log_sum

    def surprisal(self, logits: F64Array) -> F64Array:
        """-log(probability) of tokens with these logits, in nats."""
        return self.log_sum - (logits - self.base)

    @classmethod
    def of(cls, logits: F64Array) -> Totals:
        """Sum over ``logits``. The first must be the largest."""
        below = logits - logits[0]
        weights = np.exp(below)
        total = weights.sum()
        return cls(float(logits[0]), float(np.log(total)), float((below * weights).sum() / total))


@dataclass(frozen=True)
class Ranking:
    """Most probable tokens and their logits, most probable first. Equal logits have the lowest id first.

    No token outside the ranking has a logit above ``floor``. A ranking of all tokens has the floor -inf. ``known`` has
    the totals over all tokens, or None.
    """

    ids: IdArray
    logits: F64Array
    floor: float
    known: Totals | None = None

    @property
    def whole(self) -> bool:
        """True if the ranking has all tokens."""
        return self.floor == -np.inf

    def totals(self) -> Totals | None:
        """Totals over all tokens of the vocabulary, or None if they are not known."""
        return Totals.of(self.logits) if self.known is None and self.whole else self.known

    def only(self, kept: slice | NDArray[np.intp]) -> Ranking:
        """Make a whole ranking of the tokens at the indices ``kept``."""
        return Ranking(self.ids[kept], self.logits[kept], -np.inf)


def ranked(ids: NDArray[np.intp], logits: F64Array, floor: float, totals: Totals | None) -> Ranking:
    """Rank the tokens ``ids``, which ascend, by ``logits`` [vocab]."""
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return Ranking(ids.astype(np.int64), logits[ids], floor, totals)


def largest(logits: F64Array, n: int) -> NDArray[np.intp]:
    """Find the indices of the ``n`` largest logits, or of all if there are fewer. Equal logits: lowest index first."""
    n = min(n, logits.size)
    # Only logits not below the n-th largest need to be sorted.
    near = np.flatnonzero(logits >= np.partition(logits, -n)[-n])
    return near[np.argsort(-logits[near], kind="stable")][:n]


# ---- filters ------------------------------------------------------------------------------------------------


def keep(ranking: Ranking, p: SamplingParams) -> Ranking | None:
    """Apply all filters, one after another. None if the ranking is too short to be certain."""
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
    n = _count_to_reach(np.exp(-surprisal[order]), p.typical_p, ranking.whole)
    if n is None:
        return None
    # Tokens outside the ranking are less probable than all in it. They may still be nearer to the entropy.
    nearest_other = totals.log_sum + (totals.base - ranking.floor) - totals.entropy
    if not ranking.whole and distance[order[n - 1]] >= nearest_other:
        return None
    return ranking.only(np.sort(order[:n]))


def _keep_top_p_and_min_p(ranking: Ranking, p: SamplingParams) -> Ranking | None:
    """Apply both filters at once. Both keep the first tokens of the ranking, so the smaller count decides.

    One of the two may be certain of its count although the other is not.
    """
    if p.top_p == 1 and p.min_p == 0:
        return ranking
    if p.top_p < 1 and ranking.totals() is None:
        return None
    limits = (_n_top_p(ranking, p.top_p), _n_min_p(ranking, p.min_p))
    n = min((n for n in limits if n is not None), default=None)
    return None if n is None else ranking.only(slice(n))


def _n_top_p(ranking: Ranking, top_p: float) -> int | None:
    """Count the tokens that top-p keeps. None if it keeps more than the ranking has."""
    totals = ranking.totals() if top_p < 1 else None
    if totals is None:
        return ranking.ids.size if ranking.whole else None
    best = ranking.logits[0]
    wanted = top_p * math.exp(totals.log_sum + (totals.base - best))
    return _count_to_reach(np.exp(ranking.logits - best), wanted, ranking.whole)


def _n_min_p(ranking: Ranking, min_p: float) -> int | None:
    """Count the tokens that min-p keeps. None if it may keep more than the ranking has."""
    least = ranking.logits[0] + np.log(min_p) if min_p > 0 else -np.inf
    if not ranking.whole and ranking.floor >= least:
        return None
    return int((ranking.logits >= least).sum())


def _count_to_reach(weights: F64Array, wanted: float, whole: bool) -> int | None:
    """Count the first weights that sum up to ``wanted``. All of them if rounding keeps the total sum below it."""
    n = int(weights.cumsum().searchsorted(wanted)) + 1
    if n <= weights.size:
        return n
    return weights.size if whole else None
