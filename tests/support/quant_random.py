"""Random blocks of every supported tensor type, for the tests of the oracle and of the kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType

# Of a type's integer part, uniform over its bit patterns: (what d multiplies has this standard deviation,
# and the minimum that centres the weights on zero is this many d). Weights are then of variance about 1.
_SPREAD = {
    "q4_0": (4.6, 0.0),
    "q4_1": (4.6, -7.5),
    "q5_0": (9.2, 0.0),
    "q5_1": (9.2, -15.5),
    "q8_0": (74.0, 0.0),
    "q4_k": (260.0, 7.5),
    "q5_k": (530.0, 15.5),
    "q6_k": (1370.0, 0.0),
}


def random_blocks(qtype: QuantType, rows: int, k: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Raw rows of ``qtype``, uint8 [rows, row_bytes(k)]: finite, centred weights of size about 1.

    Quants and packed scales take every bit pattern; half scales take either sign and every mantissa, and one
    in 32 is zero or subnormal. Float types hold normal deviates.
    """
    row_bytes = qtype.row_bytes(k)
    if qtype.block_size == 1:
        return _normal_rows(qtype, rows, k, rng)
    assert qtype.block is not None
    raw = rng.integers(0, 256, (rows, row_bytes), dtype=np.uint8)
    blocks = raw.reshape(-1).view(qtype.block)
    spread, offset = _SPREAD[qtype.name]
    d = _half_scales(len(blocks), 1 / spread, rng)
    blocks["d"] = d
    for name in ("m", "dmin"):
        if name in (qtype.block.names or ()):
            blocks[name] = d * np.float32(offset) * rng.uniform(0.8, 1.2, len(blocks)).astype(np.float32)
    return raw


def _half_scales(n: int, size: float, rng: np.random.Generator) -> NDArray[np.float32]:
    sign = rng.choice(np.array([-1, 1], np.float32), n)
    scale = sign * rng.uniform(0.5, 1.5, n).astype(np.float32) * np.float32(size)
    tiny = sign * rng.integers(0, 1024, n).astype(np.float32) * np.float32(2.0**-24)  # 2^-24: the least half
    return np.where(rng.integers(0, 32, n) == 0, tiny, scale).astype(np.float16).astype(np.float32)


def _normal_rows(qtype: QuantType, rows: int, k: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    values = rng.standard_normal((rows, k), dtype=np.float32)
    if qtype is quants.BF16:
        return np.ascontiguousarray((values.view(np.uint32) >> 16).astype("<u2")).view(np.uint8)
    assert qtype.block is not None
    return np.ascontiguousarray(values.astype(qtype.block)).view(np.uint8)
