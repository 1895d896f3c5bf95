"""Logits of one step. Sampling reads a few of them, and all only if it must.

1. A step leaves the candidates in a small buffer (``Candidates`` in ``kernels/params.h``): the 256 largest logits, and
   sums over all logits. All logits stay on the device.
2. ``StepLogits`` reads candidates, single logits, or all logits, and counts the words that it reads.
3. ``Adjusted`` replaces the logits of the tokens to which a penalty or a bias applies.
4. ``Adjusted.rankings`` yields a ranking of the candidates first. It ends before the first
   place that a token outside the candidates could take.
5. If a filter cannot be certain with that ranking, longer rankings follow: about 8192 tokens, then all tokens.
   They read all logits.
6. Rankings of every length agree, so the token that is drawn does not depend on the length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from ..errors import DeviceError
from .ranking import F32Array, F64Array, IdArray, Ranking, Totals, largest, ranked

N_CANDIDATES = 256  # candidates of StepLogits.of; a device has as many as its buffer has room for
WIDER = 8192  # tokens of the first ranking that is made from all logits
# Least probability of the unchanged tokens. The sums of the device are float32. Below this share, they are too
# inaccurate after the changed tokens are subtracted.
LEAST_UNCHANGED = 0.01
LARGEST = 1e300  # limit of a changed logit; it is finite, and so are all differences


class Indexable(Protocol):
    """Vector of float32 that is read when it is indexed, by an array of indices or by [:n]."""

    def __getitem__(self, index: Any, /) -> F32Array: ...


class StepLogits:
    """Logits after a step. Each method reads no more of them than it needs.

    ``summary`` is a ``Candidates`` struct. ``logits`` is float32 [n_vocab or more]. ``n_read`` counts the 32-bit words
    that were read.
    """

    def __init__(self, summary: Any, logits: Indexable, n_vocab: int) -> None:
        self._summary, self._logits, self._n_vocab = summary, logits, n_vocab
        self.n_read = 0

    @classmethod
    def of(cls, logits: F32Array) -> StepLogits:
        """Make it from logits in memory, float32 [n_vocab]. A token whose logit is not finite cannot be chosen."""
        return cls(_summary_of(logits), logits, logits.size)

    def check_finite(self) -> None:
        """Raise DeviceError if a logit is infinite or NaN."""
        self.n_read += 1
        if n := int(self._summary["n_not_finite"]):
            raise DeviceError(
                f"{n} of the model's logits are not finite: the file is damaged, or the device failed; "
                f"check the file, and load it again"
            )

    def candidates(self) -> Ranking:
        """Rank the tokens with the largest logits, with the totals over all tokens."""
        c = self._summary
        n = int(c["n"])
        self.n_read += 4 + 2 * n
        ids, logits = c["id"][:n].astype(np.int64), c["logit"][:n].astype(np.float64)
        order = np.lexsort((ids, -logits))
        ids, logits = ids[order], logits[order]
        if n == 0:
            return Ranking(ids, logits, -np.inf)
        sum_exp, sum_x_exp = float(c["sum_exp"]), float(c["sum_x_exp"])
        # Logits whose differences exceed float32 make the sums infinite or NaN.
        known = math.isfinite(sum_exp) and math.isfinite(sum_x_exp)
        totals = Totals(float(c["largest"]), math.log(sum_exp), sum_x_exp / sum_exp) if known else None
        every = n == self._n_vocab - int(c["n_not_finite"])
        return Ranking(ids, logits, -np.inf if every else float(logits[-1]), totals)

    def at(self, ids: IdArray) -> F64Array:
        """Read the logits of some tokens, float64 [ids.size]."""
        self.n_read += ids.size
        return self._logits[ids].astype(np.float64)

    def all(self) -> F32Array:
        """Copy all logits, float32 [n_vocab]."""
        self.n_read += self._n_vocab
        return self._logits[: self._n_vocab].copy()


class Adjusted:
    """Logits of a step after penalties and bias.

    The tokens ``ids``, which ascend, had the logits ``before`` and now have ``values``. -inf forbids a token.
    """

    def __init__(self, step: StepLogits, ids: IdArray, before: F64Array, values: F64Array) -> None:
        self._step, self._ids, self._before, self._values = step, ids, before, np.minimum(values, LARGEST)

    def all(self) -> F64Array:
        """Read all logits and change them, float64 [n_vocab]."""
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
        """Replace the shares of the changed tokens in the totals of the device. None if too little is left."""
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


def _summary_of(logits: F32Array) -> dict[str, Any]:
    """Summarise logits, float32 [n_vocab], as the kernels do: a mapping with the fields of ``Candidates``."""
    finite = np.flatnonzero(np.isfinite(logits))
    if finite.size == 0:
        return {"n": 0, "n_not_finite": logits.size, "id": finite, "logit": logits[finite]}
    x = logits[finite].astype(np.float64)
    below = x - x.max()
    weights = np.exp(below)
    best = largest(x, N_CANDIDATES)
    return {
        "n": best.size,
        "n_not_finite": logits.size - finite.size,
        "largest": x.max(),
        "sum_exp": weights.sum(),
        "sum_x_exp": (below * weights).sum(),
        "id": finite[best],
        "logit": logits[finite[best]],
    }
