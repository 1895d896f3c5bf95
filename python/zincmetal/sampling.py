"""Choosing the next token from logits: penalties, then filters, then a draw."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import DeviceError, UsageError

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
        try:
            in_range = self._in_range()
        except TypeError:
            raise UsageError(f"an option is of the wrong type in {self}") from None
        for name, good in in_range.items():
            if not good:
                raise UsageError(f"{name} is out of range in {self}")

    def _in_range(self) -> dict[str, bool]:
        return {
            "temperature (>= 0)": 0 <= self.temperature < float("inf"),
            "top_k (>= 0)": operator.index(self.top_k) >= 0,
            "top_p (0 to 1)": 0 < self.top_p <= 1,
            "min_p (0 to 1)": 0 <= self.min_p <= 1,
            "repeat_penalty (> 0)": 0 < self.repeat_penalty < float("inf"),
            "repeat_last_n (>= 0)": self.repeat_last_n >= 0,
            "seed (>= 0)": self.seed is None or operator.index(self.seed) >= 0,
        }

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
        if not np.isfinite(logits.max()):
            raise DeviceError("the model's logits are not finite: the file is damaged, or the device failed")
        logits = penalise(logits, history[-p.repeat_last_n :] if p.repeat_last_n else (), p.repeat_penalty)
        if p.temperature == 0:
            return int(logits.argmax())
        ids, kept = candidates(logits, p)
        total = np.exp((kept - kept.max()) / p.temperature).cumsum()
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
    """The ids that pass the filters and their logits (float64); at least one. Most probable first, if any filters."""
    if p.top_k == 0 and p.top_p == 1 and p.min_p == 0:
        return np.arange(logits.size), logits.astype(np.float64)
    ids, mass = _prefilter(logits, p)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    kept = logits[ids].astype(np.float64)
    probs = np.exp(kept - kept[0])
    n = kept.size
    if p.top_p < 1:
        n = min(n, int(probs.cumsum().searchsorted(p.top_p * (mass or probs.sum()))) + 1)
    if p.min_p > 0:
        n = min(n, int((probs >= p.min_p).sum()))
    return ids[: max(n, 1)], kept[: max(n, 1)]


def _prefilter(logits: F32Array, p: SamplingParams) -> tuple[NDArray[np.intp], float]:
    """Ids among which all that pass must be, so that few are sorted; and the mass of all, where top-p counts it."""
    if 0 < p.top_k < logits.size:
        return np.argpartition(logits, -p.top_k)[-p.top_k :], 0.0
    probs = np.exp(logits - logits.max())
    mass = float(probs.sum(dtype=np.float64))
    # All tokens below this, together, are less than what top-p leaves out.
    needed = 0.999 * (1 - p.top_p) * mass / logits.size if p.top_p < 1 else 0.999 * p.min_p
    return np.flatnonzero(probs >= needed), mass
