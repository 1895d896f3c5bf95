"""Random weights of every tensor type: finite, of a known size, and of every bit pattern where that is possible.

The checks of a device, the exact shapes of a bench and the tests of kernels share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .quants import BF16, QuantType, dequantize

Bytes: TypeAlias = NDArray[np.uint8]


def random_weights(qtype: QuantType, shape: Sequence[int], rng: np.random.Generator, size: float = 1.0) -> Bytes:
    """Make finite weights of mean 0 and root mean square near ``size``: uint8 [*shape[:-1], bytes of a row].

    Quants and packed scales take every bit pattern. Half scales take either sign and every mantissa, and one in 32 is
    zero or subnormal. Float types hold normal deviates. Raises UsageError if a row is not whole blocks.
    """
    *rows, k = shape
    packed = (*rows, qtype.row_bytes(k))
    if qtype.block_size == 1:
        return _normal(qtype, shape, rng, size).reshape(packed)
    blocks = random_bits(qtype, qtype.nbytes(shape) // qtype.block_bytes, rng)
    deviation, centre = spread(qtype)
    d = _half_scales(blocks.size, size / deviation, rng)
    qtype.set_scale(blocks, d)
    if minimum := _minimum(qtype):
        blocks[minimum] = d * np.float32(centre) * rng.uniform(0.8, 1.2, blocks.size).astype(np.float32)
    return blocks.view(np.uint8).reshape(packed)


def random_bits(qtype: QuantType, n: int, rng: np.random.Generator) -> NDArray[np.void]:
    """Make ``n`` blocks of random bits, [n] of the block's dtype. Their scales may be infinite or NaN."""
    assert qtype.block is not None
    words = rng.bit_generator.random_raw(-(-n * qtype.block_bytes // 8))
    return words.view(np.uint8)[: n * qtype.block_bytes].view(qtype.block)


@cache
def spread(qtype: QuantType) -> tuple[float, float]:
    """Return the standard deviation of weights of scale 1, and the minimum that makes their mean 0 (or 0 if none)."""
    blocks = random_bits(qtype, 4096, np.random.Generator(np.random.SFC64(0)))
    minimum = _minimum(qtype)

    def weights(d: float, least: float) -> NDArray[np.float32]:
        qtype.set_scale(blocks, np.full(blocks.size, d, np.float32))
        if minimum:
            blocks[minimum] = least
        return dequantize(qtype, blocks.view(np.uint8), (blocks.size * qtype.block_size,))

    centre = float(-weights(1, 0).mean() / weights(0, 1).mean()) if minimum else 0.0
    return float(weights(1, centre).std()), centre


def _minimum(qtype: QuantType) -> str:
    """Return the field of a block that holds the scale of its minima; "" if there is none."""
    names = (qtype.block.names or ()) if qtype.block is not None else ()
    return next((name for name in ("m", "dmin") if name in names), "")


def _half_scales(n: int, size: float, rng: np.random.Generator) -> NDArray[np.float32]:
    sign = rng.choice(np.array([-1, 1], np.float32), n)
    scale = sign * rng.uniform(0.5, 1.5, n).astype(np.float32) * np.float32(size)
    tiny = sign * rng.integers(0, 1024, n).astype(np.float32) * np.float32(2.0**-24)  # 2^-24: the least half
    return np.where(rng.integers(0, 32, n) == 0, tiny, scale).astype(np.float16).astype(np.float32)


def _normal(qtype: QuantType, shape: Sequence[int], rng: np.random.Generator, size: float) -> Bytes:
    values = rng.standard_normal(tuple(shape), np.float32) * np.float32(size)
    if qtype is BF16:
        return np.ascontiguousarray((values.view(np.uint32) >> 16).astype("<u2")).view(np.uint8)
    assert qtype.block is not None
    return np.ascontiguousarray(values.astype(qtype.block)).view(np.uint8)
