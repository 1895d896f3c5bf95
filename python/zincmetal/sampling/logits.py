"""Logits as sampling sees them: the most probable tokens in order, and of the others no more than is needed.

A step leaves the largest logits and sums over all of them in a small buffer (``Candidates`` in
``kernels/params.h``); the other logits stay on the device unless someone asks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceError

F32Array = NDArray[np.float32]
F64Array = NDArray[np.float64]
IdArray = NDArray[np.int64]

N_CANDIDATES = 256  # of StepLogits.of; a device's are as many as its buffer has room for
WIDER = 8192  # how many are ranked at first when the candidates do not suffice and all logits were read
# The device's sums are float32: where the changed tokens had all but this share of the probability, what is left
# after taking them out says too little.
LEAST_UNCHANGED = 0.01
LARGEST = 1e300  # of a changed logit: finite, and so is its difference to any other


class Indexable(Protocol):
    """Floats that are read as they are indexed: by an array of indices, or [:n]. An array is one."""

    def __getitem__(self, index: Any, /) -> F32Array: ...


class Totals(NamedTuple):
    """Of all tokens: log of the sum of exp(logit), and the mean logit under the distribution; both less ``base``.

    The base is near the largest logit: where that is 1e38, the differences still count.
    """

    base: float
    log_sum: float
    mean: float

    @property
    def entropy(self) -> float:
        """In nats."""
        return self.log_sum - self.mean

    @property
    def log_sum_exp(self) -> float:
        """With the base."""
        return self.base + self.log_sum

    def surprisal(self, logits: F64Array) -> F64Array:
        """-log of the probability of these logits."""
        return self.log_sum - (logits - self.base)

    @classmethod
    def of(cls, logits: F64Array) -> Totals:
        """Of all logits, the largest first."""
        below = logits - logits[0]
        weights = np.exp(below)
        total = weights.sum()
        return cls(float(logits[0]), float(np.log(total)), float((below * weights).sum() / total))


@dataclass(frozen=True)
class Ranking:
    """The most probable tokens and their logits, most probable first, lowest id first among equals.

    No other token's logit is above ``floor``; -inf where there are no others. ``known`` are the totals over all
    tokens where they were told.
    """

    ids: IdArray
    logits: F64Array
    floor: float
    known: Totals | None = None

    @property
    def whole(self) -> bool:
        """Whether these are all tokens."""
        return self.floor == -np.inf

    def totals(self) -> Totals | None:
        """Over all tokens, these and the others; None where that cannot be said."""
        return Totals.of(self.logits) if self.known is None and self.whole else self.known

    def only(self, kept: slice | NDArray[np.intp]) -> Ranking:
        """These tokens alone, as if there were no others."""
        return Ranking(self.ids[kept], self.logits[kept], -np.inf)


class StepLogits:
    """The logits after a step, read from the device as far as they are asked for.

    ``summary`` is a ``Candidates`` record, ``logits`` has float32 [n_vocab or more]; ``n_read`` counts the 32-bit
    words read.
    """

    def __init__(self, summary: Any, logits: Indexable, n_vocab: int) -> None:
        self._summary, self._logits, self._n_vocab = summary, logits, n_vocab
        self.n_read = 0

    @classmethod
    def of(cls, logits: F32Array) -> StepLogits:
        """From logits in memory. Those that are not finite are tokens that cannot be chosen."""
        return cls(_summary_of(logits), logits, logits.size)

    def check_finite(self) -> None:
        """Raises DeviceError where a logit is infinite or not a number."""
        self.n_read += 1
        if n := int(self._summary["n_not_finite"]):
            raise DeviceError(
                f"{n} of the model's logits are not finite: the file is damaged, or the device failed; "
                f"check the file, and load it anew"
            )

    def candidates(self) -> Ranking:
        """The tokens with the largest logits, and the totals over all."""
        c = self._summary
        n = int(c["n"])
        self.n_read += 4 + 2 * n
        ids, logits = c["id"][:n].astype(np.int64), c["logit"][:n].astype(np.float64)
        order = np.lexsort((ids, -logits))
        ids, logits = ids[order], logits[order]
        if n == 0:
            return Ranking(ids, logits, -np.inf)
        sum_exp, sum_x_exp = float(c["sum_exp"]), float(c["sum_x_exp"])
        # Differences of logits beyond float32 leave no numbers in its sums.
        told = math.isfinite(sum_exp) and math.isfinite(sum_x_exp)
        totals = Totals(float(c["largest"]), math.log(sum_exp), sum_x_exp / sum_exp) if told else None
        every = n == self._n_vocab - int(c["n_not_finite"])
        return Ranking(ids, logits, -np.inf if every else float(logits[-1]), totals)

    def at(self, ids: IdArray) -> F64Array:
        """The logits of these tokens."""
        self.n_read += ids.size
        return self._logits[ids].astype(np.float64)

    def all(self) -> F32Array:
        """A copy of all logits."""
        self.n_read += self._n_vocab
        return self._logits[: self._n_vocab].copy()


class Adjusted:
    """The logits of a step, those of some tokens (``ids``, ascending), ``before``, replaced by ``values``.

    -inf forbids a token.
    """

    def __init__(self, step: StepLogits, ids: IdArray, before: F64Array, values: F64Array) -> None:
        self._step, self._ids, self._before, self._values = step, ids, before, np.minimum(values, LARGEST)

    def all(self) -> F64Array:
        """All logits, by id."""
        logits = self._step.all().astype(np.float64)
        logits[self._ids] = self._values
        return logits

    def rankings(self) -> Iterator[Ranking]:
        """Rankings that agree as far as they go: from the candidates, then longer ones, then of all tokens."""
        candidates = self._step.candidates()
        totals = self._totals(candidates)
        yield self._among(candidates, totals)
        logits = self.all()
        if totals and logits.size > WIDER:
            floor = float(np.partition(logits, -WIDER)[-WIDER])
            yield _ranked(np.flatnonzero(logits > floor), logits, floor, totals)
        yield _ranked(np.flatnonzero(logits > -np.inf), logits, -np.inf, totals)

    def _among(self, candidates: Ranking, totals: Totals | None) -> Ranking:
        """The candidates and the changed tokens, as far down as no other token can come between."""
        if self._ids.size == 0:
            return candidates
        at = self._ids.searchsorted(candidates.ids).clip(max=self._ids.size - 1)
        unchanged = self._ids[at] != candidates.ids
        ids = np.concatenate([candidates.ids[unchanged], self._ids])
        logits = np.concatenate([candidates.logits[unchanged], self._values])
        floor = candidates.floor
        certain = logits > floor
        if not candidates.whole:  # tokens that are no candidates come after the last of them
            certain |= (logits == floor) & (ids <= candidates.ids[-1])
        ids, logits = ids[certain], logits[certain]
        order = np.lexsort((ids, -logits))
        return Ranking(ids[order], logits[order], floor, totals)

    def _totals(self, candidates: Ranking) -> Totals | None:
        """The totals of the device with the changed tokens' shares exchanged; None where too little is left of them."""
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


def _ranked(ids: NDArray[np.intp], logits: F64Array, floor: float, totals: Totals | None) -> Ranking:
    """Of tokens in ascending order of ids."""
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return Ranking(ids.astype(np.int64), logits[ids], floor, totals)


def largest(logits: F64Array, n: int) -> NDArray[np.intp]:
    """The indices of the n largest (or of all, if they are fewer), the largest first, the lowest among equals."""
    n = min(n, logits.size)
    # Few can be among the n largest: sorting those is enough.
    near = np.flatnonzero(logits >= np.partition(logits, -n)[-n])
    return near[np.argsort(-logits[near], kind="stable")][:n]


def _summary_of(logits: F32Array) -> dict[str, Any]:
    """What the kernels leave of these logits, as a mapping of the same names."""
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
