"""Logits of one step, as the host draws from them: the reference of the device's draw.

1. ``StepLogits`` ranks the candidates, the 256 largest logits, and sums over all logits.
2. ``Adjusted`` replaces the logits of the tokens to which a penalty or a bias applies.
3. ``Adjusted.rankings`` yields a ranking of the candidates first. It ends before the first
   place that a token outside the candidates could take.
4. If a filter cannot be certain with that ranking, longer rankings follow: about 8192 tokens, then all tokens.
5. Rankings of every length agree, so the token that is drawn does not depend on the length. Most steps sort few tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..errors import DeviceError
from .ranking import F32Array, F64Array, IdArray, Ranking, Totals, largest, ranked

N_CANDIDATES = 256  # tokens of the first ranking
WIDER = 8192  # tokens of the first ranking that is made from all logits
# Least probability of the unchanged tokens. Below this share, their sums are too inaccurate after the changed tokens
# are subtracted.
LEAST_UNCHANGED = 0.01
NO_IDS, NO_LOGITS = np.empty(0, np.int64), np.empty(0, np.float64)
LARGEST = 1e300  # limit of a changed logit; it is finite, and so are all differences


class StepLogits:
    """Logits after a step, float32 [n_vocab]. A token whose logit is not finite cannot be chosen."""

    def __init__(self, logits: F32Array) -> None:
        self._logits = logits
        self._finite = np.flatnonzero(np.isfinite(logits))

    def check_finite(self) -> None:
        """Raise DeviceError if a logit is infinite or NaN."""
        if n := self._logits.size - self._finite.size:
            raise DeviceError(
                f"{n} of the model's logits are not finite: the file is damaged, or the device failed; "
                f"check the file, and load it again"
            )

    def candidates(self) -> Ranking:
        """Rank the N_CANDIDATES tokens with the largest logits, with the totals over all tokens."""
        finite = self._finite
        if not finite.size:
            return Ranking(NO_IDS, NO_LOGITS, -np.inf)
        x = self._logits[finite].astype(np.float64)
        below = x - x.max()
        weights = np.exp(below)
        total = float(weights.sum())
        totals = Totals(float(x.max()), math.log(total), float((below * weights).sum()) / total)
        best = largest(x, N_CANDIDATES)
        return Ranking(finite[best], x[best], -np.inf if best.size == finite.size else float(x[best[-1]]), totals)

    def at(self, ids: IdArray) -> F64Array:
        """Return the logits of some tokens, float64 [ids.size]."""
        return self._logits[ids].astype(np.float64)

    def all(self) -> F32Array:
        """Copy all logits, float32 [n_vocab]."""
        return self._logits.copy()


class Adjusted:
    """Logits of a step after penalties and bias.

    The tokens ``ids``, which ascend, had the logits ``before`` and now have ``values``. -inf forbids a token.
    """

    def __init__(self, step: StepLogits, ids: IdArray, before: F64Array, values: F64Array) -> None:
        self._step, self._ids, self._before, self._values = step, ids, before, np.minimum(values, LARGEST)

    def all(self) -> F64Array:
        """Return all logits, changed, float64 [n_vocab]."""
        logits = self._step.all().astype(np.float64)
        logits[self._ids] = self._values
        return logits

    def rankings(self) -> Iterator[Ranking]:
        """Yield rankings of growing length: of the candidates, of about WIDER tokens, of all tokens. All agree."""
        candidates = self._step.candidates()
        totals = self._totals(candidates)
        yield self._among(candidates, totals)
        logits = self.all()
        if totals and logits.size > WIDER:
            floor = float(np.partition(logits, -WIDER)[-WIDER])
            yield ranked(np.flatnonzero(logits > floor), logits, floor, totals)
        yield ranked(np.flatnonzero(logits > -np.inf), logits, -np.inf, totals)

    def _among(self, candidates: Ranking, totals: Totals | None) -> Ranking:
        """Rank the candidates and the changed tokens, down to the first place where another token may stand."""
        if self._ids.size == 0:
            return candidates
        at = self._ids.searchsorted(candidates.ids).clip(max=self._ids.size - 1)
        unchanged = self._ids[at] != candidates.ids
        ids = np.concatenate([candidates.ids[unchanged], self._ids])
        logits = np.concatenate([candidates.logits[unchanged], self._values])
        floor = candidates.floor
        certain = logits > floor
        if not candidates.whole:  # all other tokens come after the last candidate
            certain |= (logits == floor) & (ids <= candidates.ids[-1])
        ids, logits = ids[certain], logits[certain]
        order = np.lexsort((ids, -logits))
        return Ranking(ids[order], logits[order], floor, totals)

    def _totals(self, candidates: Ranking) -> Totals | None:
        """Replace the shares of the changed tokens in the totals. None if too little is left."""
        known = candidates.known
        if known is None or self._ids.size == 0:
            return known
        old, new = self._before[self._before > -np.inf], self._values[self._values > -np.inf]
        share, below = np.exp(-known.surprisal(old)), old - known.base
        unchanged = 1 - float(share.sum())
        if unchanged < LEAST_UNCHANGED:
            return None
        base = max(known.base, float(new.max(initial=-LARGEST)))
        log_unchanged = (known.base - base) + known.log_sum + math.log(unchanged)
        mean_unchanged = (known.base - base) + (known.mean - float((share * below).sum())) / unchanged
        new = new - base
        log_sum = float(np.logaddexp.reduce(np.append(new, log_unchanged)))
        mean = math.exp(log_unchanged - log_sum) * mean_unchanged + float((np.exp(new - log_sum) * new).sum())
        return Totals(base, log_sum, mean)
