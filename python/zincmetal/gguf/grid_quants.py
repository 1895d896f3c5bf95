"""Quant types with a grid: a block has indices of points, and a point is 4 or 8 weights without their scale.

The IQ2 and IQ3 types have magnitudes, and a sign for each weight. The IQ1 types have -1, 0 and 1, and add a small
number to all weights of a point. Layouts and formulas are ggml's (``ggml-common.h``, ``ggml-quants.c``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .grids import grid
from .quant_type import U8, Blocks, D, F32Array, column, nibbles, row

Ints = NDArray[np.integer[Any]]


# ---- pieces -------------------------------------------------------------------------------------------------


def _high_bits(low: U8, packed: Ints, bits: int) -> Ints:
    """Add ``bits`` higher bits to indices [n, p]; ``packed`` [n, g] has those of p / g indices, lowest first."""
    shifts = np.arange(low.shape[1] // packed.shape[1]) * bits
    high = (packed.astype(np.int64)[..., None] >> shifts & (1 << bits) - 1).reshape(low.shape)
    return np.asarray(low | high << 8)


def _pairs_of_nibbles(packed: U8) -> U8:
    """Unpack bytes [n, b] to [n, 2 b] in the order low, high, low, high."""
    return nibbles(packed[..., None]).reshape(len(packed), -1)


def _with_parity(signs: Ints) -> U8:
    """Add bit 7 to seven signs, so that the number of minus signs is even."""
    seven = (signs & 127).astype(np.uint8)
    parity: U8 = np.unpackbits(seven[..., None], axis=-1).sum(axis=-1, dtype=np.uint8) & np.uint8(1)
    return np.asarray(seven | parity << np.uint8(7))


def _signed(name: str, scale: F32Array, indices: Ints, signs: U8) -> F32Array:
    """Compute ``scale * point * sign``, float32 [n, 256], from scales [n, s], indices [n, p] and sign bits [n, 32]."""
    points = grid(name)[indices].reshape(*scale.shape, -1)
    weights = (scale[..., None] * points).reshape(-1, 32, 8)
    minus = np.unpackbits(signs[..., None], axis=-1, bitorder="little").astype(bool)
    return np.where(minus, -weights, weights).reshape(-1, 256)


def _halves(b: Blocks, scale: Ints, factor: float) -> F32Array:
    """Compute ``d * (0.5 + scale) * factor``, float32 [n, s]."""
    return column(b["d"]) * (np.float32(0.5) + scale.astype(np.float32)) * np.float32(factor)


def _ternary(scale: F32Array, indices: Ints, minus: NDArray[np.bool_]) -> F32Array:
    """Compute ``scale * (point +- 1/8)``, float32 [n, 256]: minus where ``minus``, [n, 32], is true."""
    points = grid("iq1_s")[indices] + np.where(minus, np.float32(-0.125), np.float32(0.125))[..., None]
    return (scale[..., None] * points.reshape(*scale.shape, -1)).reshape(-1, 256)


# ---- dequantisation, blocks [n] -> float32 [n, 256] -----------------------------------------------------------


def _iq3_s(b: Blocks) -> F32Array:
    scale = column(b["d"]) * (1 + 2 * _pairs_of_nibbles(b["scales"]))
    return _signed("iq3_s", scale, _high_bits(b["qs"], b["qh"], 1), b["signs"])


def _iq3_xxs(b: Blocks) -> F32Array:
    words = b["words"]
    signs = _with_parity(words[..., None] >> np.arange(0, 28, 7, dtype=np.uint32)).reshape(-1, 32)
    return _signed("iq3_xxs", _halves(b, words >> 28, 0.5), b["qs"], signs)


def _iq2_xxs(b: Blocks) -> F32Array:
    words = b["groups"]["word"]
    signs = _with_parity(words[..., None] >> np.arange(0, 28, 7, dtype=np.uint32)).reshape(-1, 32)
    return _signed("iq2_xxs", _halves(b, words >> 28, 0.25), b["groups"]["qs"].reshape(-1, 32), signs)


def _iq2_xs(b: Blocks) -> F32Array:
    scale = _halves(b, _pairs_of_nibbles(b["scales"]), 0.25)
    return _signed("iq2_xs", scale, b["qs"] & 511, _with_parity(b["qs"] >> 9))


def _iq2_s(b: Blocks) -> F32Array:
    scale = _halves(b, _pairs_of_nibbles(b["scales"]), 0.25)
    return _signed("iq2_s", scale, _high_bits(b["qs"], b["qh"], 2), b["signs"])


def _iq1_s(b: Blocks) -> F32Array:
    qh = b["qh"]
    scale = column(b["d"]) * (2 * (qh >> 12 & 7) + 1)
    return _ternary(scale, _high_bits(b["qs"], qh, 3), np.repeat(qh >= 1 << 15, 4, axis=1))


def _iq1_m(b: Blocks) -> F32Array:
    # Four bits of the scale of the block are the top bits of each word of scales. The rest of a word is four scales.
    words, high = b["scales"], _pairs_of_nibbles(b["qh"])
    d = (words >> 12 << np.arange(0, 16, 4, dtype=np.uint16)).sum(axis=1, dtype=np.uint16).view(np.float16)
    scales = (words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7).reshape(-1, 16)
    return _ternary(column(d) * (2 * scales + 1), b["qs"] | (high & 7).astype(np.int64) << 8, high >= 8)


def _set_iq1_m(blocks: Blocks, scale: F32Array) -> None:
    bits = scale.astype(np.float16).view(np.uint16)[:, None] >> np.arange(0, 16, 4, dtype=np.uint16)
    blocks["scales"] = blocks["scales"] & 0xFFF | bits << np.uint16(12)


# ---- the table ------------------------------------------------------------------------------------------------

_QS = ("qs", "u1", 32)
_SIGNS = ("signs", "u1", 32)
_QH = ("qh", "u1", 8)
_SCALES = ("scales", "u1", 8)

IQ2_XXS = row(16, "iq2_xxs", 256, [D, ("groups", [("qs", "u1", 4), ("word", "<u4")], 8)], _iq2_xxs)
IQ2_XS = row(17, "iq2_xs", 256, [D, ("qs", "<u2", 32), _SCALES], _iq2_xs)
IQ3_XXS = row(18, "iq3_xxs", 256, [D, ("qs", "u1", 64), ("words", "<u4", 8)], _iq3_xxs)
IQ1_S = row(19, "iq1_s", 256, [D, _QS, ("qh", "<u2", 8)], _iq1_s)
IQ3_S = row(21, "iq3_s", 256, [D, ("qs", "u1", 64), _QH, _SIGNS, ("scales", "u1", 4)], _iq3_s)
IQ2_S = row(22, "iq2_s", 256, [D, _QS, _SIGNS, _QH, _SCALES], _iq2_s)
IQ1_M = row(29, "iq1_m", 256, [_QS, ("qh", "u1", 16), ("scales", "<u2", 4)], _iq1_m, _set_iq1_m)

#: All of them, the usual ones first.
TYPES = (IQ3_S, IQ3_XXS, IQ2_S, IQ2_XS, IQ2_XXS, IQ1_M, IQ1_S)
