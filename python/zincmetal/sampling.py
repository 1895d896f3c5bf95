"""Choosing the next token from logits: penalties, then filters, then a draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError

F32Array = NDArray[np.float32]


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Temperature 0 takes the most probable token; a filter at its default is off.

    ``top_k`` keeps the k most probable, ``top_p`` the fewest that reach probability p, ``min_p`` those of at
    least p times the best. ``repeat_penalty`` divides positive and multiplies negative logits of the tokens
    among the last ``repeat_last_n``. Filters apply in the order top-k, top-p, min-p, on probabilities before
    the temperature. The same seed gives the same tokens.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises UsageError that names the argument out of its range."""
        in_range = {
            "temperature (>= 0)": 0 <= self.temperature < float("inf"),
            "top_k (>= 0)": self.top_k >= 0,
            "top_p (0 to 1)": 0 < self.top_p <= 1,
            "min_p (0 to 1)": 0 <= self.min_p <= 1,
            "repeat_penalty (> 0)": 0 < self.repeat_penalty < float("inf"),
            "repeat_last_n (>= 0)": self.repeat_last_n >= 0,
        }
        for name, good in in_range.items():
            if not good:
                raise UsageError(f"{name} is out of range in {self}")

    @property
    def greedy(self) -> bool:
        """Whether the device's arg max is the answer: no temperature and no penalty."""
        return self.temperature == 0 and self.repeat_penalty == 1


class Sampler:
    """Draws tokens for one sequence; holds the generator's state."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._rng = np.random.default_rng(params.seed)

    def sample(self, logits: F32Array, history: Sequence[int]) -> int:
        """The next token id for ``logits`` float32 [vocab], after ``history``. Changes neither."""
        p = self.params
        logits = penalise(logits, history[-p.repeat_last_n :] if p.repeat_last_n else (), p.repeat_penalty)
        if p.temperature == 0:
            return int(logits.argmax())
        ids, kept = candidates(logits, p)
        weights = np.exp((kept - kept[0]) / p.temperature)
        total = weights.cumsum()
        return int(ids[total.searchsorted(self._rng.random() * total[-1], side="right")])


def penalise(logits: F32Array, recent: Sequence[int], penalty: float) -> F32Array:
    """Logits with those of the recent tokens made less likely (arXiv 1909.05858)."""
    if penalty == 1 or not recent:
        return logits
    ids = np.unique(np.asarray(recent))
    out = logits.copy()
    out[ids] = np.where(out[ids] > 0, out[ids] / penalty, out[ids] * penalty)
    return out


def candidates(logits: F32Array, p: SamplingParams) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The ids that pass the filters and their logits (float64), most probable first; at least one."""
    if 0 < p.top_k < logits.size:
        ids = np.argpartition(logits, -p.top_k)[-p.top_k :]
    elif p.min_p > 0 and p.top_p == 1:
        # Only these can pass min-p, so the sort that follows is of few.
        ids = np.flatnonzero(logits >= logits.max() + np.log(p.min_p))
    else:
        ids = np.arange(logits.size)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    kept = logits[ids].astype(np.float64)
    probs = np.exp(kept - kept[0])
    n = kept.size
    if p.top_p < 1:
        total = probs.cumsum()
        n = min(n, int(total.searchsorted(p.top_p * total[-1])) + 1)
    if p.min_p > 0:
        n = min(n, int((probs >= p.min_p).sum()))
    return ids[: max(n, 1)], kept[: max(n, 1)]
