"""Makes the noise for draws. It depends on the seed, the position in the text and the token, and on nothing else.

The token with the largest sum of log-weight and Gumbel noise is a draw by the weights. The noise of a token does not
depend on the weights. So a small change of the weights changes the draw only if the two largest sums were that close.
"""

from __future__ import annotations

import secrets

import numpy as np
from numpy.typing import NDArray

F64Array = NDArray[np.float64]
IdArray = NDArray[np.int64]

MAX_SEED = 2**128 - 1
MASK = 2**64 - 1
# SplitMix64 (Steele, Lea and Flood, 2014): it adds a step, then mixes with two multipliers.
STEP = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Noise:
    """Noise of one draw, by its 64-bit key."""

    def __init__(self, key: int) -> None:
        self.key = key

    def of(self, ids: IdArray) -> F64Array:
        """Gumbel noise of the tokens ``ids``, float64 [ids.size]."""
        x = ids.astype(np.uint64)
        x *= np.uint64(STEP)
        x += np.uint64(self.key)
        x ^= x >> np.uint64(30)
        x *= np.uint64(MIX_1)
        x ^= x >> np.uint64(27)
        x *= np.uint64(MIX_2)
        x ^= x >> np.uint64(31)
        # 52 bits plus one half: exact in float64, above 0 and below 1.
        uniform = ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        result: F64Array = -np.log(-np.log(uniform))
        return result


class NoiseSource:
    """Source of the noise of one draw after another. A second draw at the same position has other noise."""

    def __init__(self, seed: int | None) -> None:
        seed = secrets.randbits(128) if seed is None else seed
        self._key = _absorb(_absorb(0, seed & MASK), seed >> 64)
        self._position, self._again = -1, 0

    def at(self, position: int) -> Noise:
        """Make the noise of the next draw, for the token at ``position``."""
        self._again = self._again + 1 if position == self._position else 0
        self._position = position
        return Noise(self.key(position, self._again))

    def key(self, position: int, again: int = 0) -> int:
        """Return the key of a draw's noise: of the first draw for the token at ``position``, or of another one."""
        return _absorb(_absorb(self._key, position), again)


def _absorb(key: int, value: int) -> int:
    """Make a key from another key and 64 more bits."""
    return _mix(((key ^ value) + STEP) & MASK)


def _mix(x: int) -> int:
    """Map 64 bits to 64 bits, one to one, so that each output bit depends on all input bits."""
    x = (x ^ x >> 30) * MIX_1 & MASK
    x = (x ^ x >> 27) * MIX_2 & MASK
    return x ^ x >> 31
