"""Rotary embedding: its base, and how a context longer than the trained one is scaled."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, and how a context longer than the trained one is scaled."""

    base: float
    scaling: str = "none"  # none, linear, yarn
    factor: float = 1.0
    n_ctx_orig: int = 0

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by: 1, or YaRN's 0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22)."""
        return 0.1 * math.log(self.factor) + 1.0 if self.scaling == "yarn" and self.factor > 1 else 1.0

    def frequencies(self, n_rot: int, factors: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Radians per position of each pair, float32 [n_rot / 2]: base^(-2i / n_rot), scaled.

        ``factors`` are the file's ``rope_freqs.weight`` (Llama 3.1), which divide. YaRN blends between scaled
        and unscaled by the number of turns that a pair makes in the original context (32 turns and more are
        left alone, 1 and fewer are scaled in full).
        """
        i = np.arange(n_rot // 2, dtype=np.float64)
        freqs = self.base ** (-2.0 * i / n_rot)
        if factors is not None:
            freqs = freqs / factors.astype(np.float64)
        if self.scaling == "linear":
            freqs = freqs / self.factor
        if self.scaling == "yarn":
            low, high = (self._pair_with_turns(turns, n_rot) for turns in (32.0, 1.0))
            low, high = max(math.floor(low), 0), min(math.ceil(high), n_rot - 1)
            keep = 1.0 - np.clip((i - low) / max(high - low, 0.001), 0.0, 1.0)
            freqs = freqs * keep + freqs / self.factor * (1.0 - keep)
        return freqs.astype(np.float32)

    def _pair_with_turns(self, turns: float, n_rot: int) -> float:
        """The (fractional) pair that makes this many turns in the original context."""
        return n_rot * math.log(self.n_ctx_orig / (turns * 2 * math.pi)) / (2 * math.log(self.base))
