"""Quant types of GGUF files: one row for each type, and the NumPy dequantisation that is the oracle.

Here are the types whose weight is a number, or a scale times a number plus an offset. ``quant_tables.py`` and
``grid_quants.py`` have others. There is no I/O here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedModelError, UsageError
from . import grid_quants, quant_tables
from .grid_quants import IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from .quant_tables import IQ4_NL, IQ4_XS, MXFP4, NVFP4, Q1_0, Q2_0, TQ1_0, TQ2_0
from .quant_type import U8, Blocks, D, F32Array, QuantType, column, nibbles, row

__all__ = ["ALL", "SUPPORTED", "QuantType", "by_id", "by_name", "dequantize"]
__all__ += ["BF16", "F16", "F32", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"]
__all__ += ["IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS", "Q2_K", "Q3_K"]
__all__ += ["IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0"]


def dequantize(qtype: QuantType, raw: U8, shape: Sequence[int]) -> F32Array:
    """Dequantise a tensor into a new float32 array of ``shape``, slowest dimension first.

    ``raw`` is uint8 of any shape, in row order, of ``qtype.nbytes(shape)`` bytes. Products and sums are rounded to
    float32 one by one, in ggml's order, so the result is bit-equal to ggml's. Raises UnsupportedModelError for a type
    without a dequantisation, UsageError if the sizes do not fit.
    """
    if qtype.dequantize_blocks is None or qtype.block is None:
        known = " ".join(t.name for t in SUPPORTED)
        raise UnsupportedModelError(f"cannot compute with {qtype.name} weights; supported: {known}")
    nbytes = qtype.nbytes(shape)
    if raw.dtype != np.uint8 or raw.size != nbytes:
        have = f"{raw.size} of {raw.dtype}"
        raise UsageError(f"{qtype.name} weights of shape {tuple(shape)} are {nbytes} of uint8, not {have}")
    blocks = np.ascontiguousarray(raw).reshape(-1).view(qtype.block)
    return qtype.dequantize_blocks(blocks).reshape(tuple(shape))


def by_id(ggml_id: int) -> QuantType | None:
    """Find the type with this ggml id, or None."""
    return _BY_ID.get(ggml_id)


def by_name(name: str) -> QuantType:
    """Find the type with this name, in upper or lower case. Raises UsageError for an unknown name."""
    try:
        return _BY_NAME[name.lower()]
    except KeyError:
        raise UsageError(f"unknown quant type {name!r}; known: {' '.join(_BY_NAME)}") from None


# ---- pieces of the block formats --------------------------------------------------------------------------


def _fifth_bits(qh: NDArray[Any]) -> U8:
    """Unpack the high bits of 32 5-bit weights, from uint32 [n] to uint8 [n, 32] of 0 or 16."""
    bits: U8 = (qh[:, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(np.uint8)
    return bits << np.uint8(4)


def _k_scales(packed: U8) -> tuple[U8, U8]:
    """Unpack the 6-bit scales and minima of 8 sub-blocks, each uint8 [n, 8], from uint8 [n, 12].

    Scales 0-3 are the low 6 bits of bytes 0-3. Minima 0-3 are the low 6 bits of bytes 4-7. Scales and minima 4-7
    have their low nibbles in bytes 8-11. Their top 2 bits are the top bits of bytes 0-7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales, minima


def _k_affine(b: Blocks, quants: U8) -> F32Array:
    """Compute ``d * scale * q - dmin * minimum`` for 8 sub-blocks of 32 quants: [n, 8, 32] to [n, 256]."""
    scales, minima = _k_scales(b["scales"])
    step = column(b["d"]) * scales
    base = column(b["dmin"]) * minima
    return (step[..., None] * quants - base[..., None]).reshape(-1, 256)


# ---- dequantisation, blocks [n] -> float32 [n, block_size] ------------------------------------------------


def _plain(b: Blocks) -> F32Array:
    return b.astype(np.float32)[:, None]


def _bf16(b: Blocks) -> F32Array:
    return (b.astype(np.uint32) << 16).view(np.float32)[:, None]


def _q4_0(b: Blocks) -> F32Array:
    return column(b["d"]) * (nibbles(b["qs"]).astype(np.int8) - np.int8(8))


def _q4_1(b: Blocks) -> F32Array:
    return column(b["d"]) * nibbles(b["qs"]) + column(b["m"])


def _q5_0(b: Blocks) -> F32Array:
    quants = nibbles(b["qs"]) | _fifth_bits(b["qh"])
    return column(b["d"]) * (quants.astype(np.int8) - np.int8(16))


def _q5_1(b: Blocks) -> F32Array:
    return column(b["d"]) * (nibbles(b["qs"]) | _fifth_bits(b["qh"])) + column(b["m"])


def _q8_0(b: Blocks) -> F32Array:
    weights: F32Array = column(b["d"]) * b["qs"]
    return weights


def _two_bits(packed: U8) -> U8:
    """Unpack bytes [n, 64] to 2-bit values [n, 256]: pair p of byte i of a half is value 32 p + i of the half."""
    pairs: U8 = packed.reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & np.uint8(3)
    return pairs.reshape(-1, 256)


def _q2_k(b: Blocks) -> F32Array:
    step: F32Array = column(b["d"]) * (b["scales"] & 15)
    base: F32Array = column(b["dmin"]) * (b["scales"] >> 4)
    quants = _two_bits(b["qs"]).reshape(-1, 16, 16)
    return (step[..., None] * quants - base[..., None]).reshape(-1, 256)


def _q3_k(b: Blocks) -> F32Array:
    # Bit g of byte i of the mask belongs to weight 32 g + i. Bytes 0-7 of the scales have their low bits, of scales 0-7
    # in the low nibbles, of the others in the high ones. Pair p of byte 8 + i has the top bits of scale 4 p + i.
    packed, mask = b["scales"], b["hmask"][:, None, :]
    top: U8 = packed[:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & np.uint8(3)
    scales = (nibbles(packed[:, :8]) | top.reshape(-1, 16) << np.uint8(4)).astype(np.int8) - np.int8(32)
    third: U8 = mask >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    quants = (_two_bits(b["qs"]) | third.reshape(-1, 256) << np.uint8(2)).astype(np.int8) - np.int8(4)
    step: F32Array = column(b["d"]) * scales
    return (step[..., None] * quants.reshape(-1, 16, 16)).reshape(-1, 256)


def _q4_k(b: Blocks) -> F32Array:
    # 32 bytes hold two sub-blocks: one in the low nibbles, the next one in the high nibbles.
    return _k_affine(b, nibbles(b["qs"].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(b: Blocks) -> F32Array:
    low = nibbles(b["qs"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    qh: U8 = b["qh"][:, None, :]  # bit s of byte i belongs to quant i of sub-block s
    high = qh >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    return _k_affine(b, low | high << np.uint8(4))


def _q6_k(b: Blocks) -> F32Array:
    # Each half of 128 weights has 64 bytes of low nibbles and 32 bytes of four bit pairs.
    # Pair p of byte i has the top bits of weight 32 p + i.
    low = nibbles(b["ql"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    qh: U8 = b["qh"].reshape(-1, 2, 1, 32)
    high = qh >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & np.uint8(3)
    quants = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    step: F32Array = column(b["d"]) * b["scales"]
    return (step[..., None] * quants.reshape(-1, 16, 16)).reshape(-1, 256)


# ---- the table --------------------------------------------------------------------------------------------


_DM = [D, ("m", "<f2")]
_K = [D, ("dmin", "<f2"), ("scales", "u1", 12)]

F32 = row(0, "f32", 1, "<f4", _plain)
F16 = row(1, "f16", 1, "<f2", _plain)
BF16 = row(30, "bf16", 1, "<u2", _bf16)
Q4_0 = row(2, "q4_0", 32, [D, ("qs", "u1", 16)], _q4_0)
Q4_1 = row(3, "q4_1", 32, [*_DM, ("qs", "u1", 16)], _q4_1)
Q5_0 = row(6, "q5_0", 32, [D, ("qh", "<u4"), ("qs", "u1", 16)], _q5_0)
Q5_1 = row(7, "q5_1", 32, [*_DM, ("qh", "<u4"), ("qs", "u1", 16)], _q5_1)
Q8_0 = row(8, "q8_0", 32, [D, ("qs", "i1", 32)], _q8_0)
Q2_K = row(10, "q2_k", 256, [("scales", "u1", 16), ("qs", "u1", 64), D, ("dmin", "<f2")], _q2_k)
Q3_K = row(11, "q3_k", 256, [("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), D], _q3_k)
Q4_K = row(12, "q4_k", 256, [*_K, ("qs", "u1", 128)], _q4_k)
Q5_K = row(13, "q5_k", 256, [*_K, ("qh", "u1", 32), ("qs", "u1", 128)], _q5_k)
Q6_K = row(14, "q6_k", 256, [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), D], _q6_k)

#: The types that zincmetal computes with.
SUPPORTED: tuple[QuantType, ...] = (
    *(F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K),
    *grid_quants.TYPES,
    *quant_tables.TYPES,
)

#: Every type that a file may have. The geometry of unsupported types serves to check and show files.
ALL: tuple[QuantType, ...] = (
    *SUPPORTED,
    QuantType(9, "q8_1", 32, 36),
    QuantType(15, "q8_k", 256, 292),
    QuantType(24, "i8", 1, 1),
    QuantType(25, "i16", 1, 2),
    QuantType(26, "i32", 1, 4),
    QuantType(27, "i64", 1, 8),
    QuantType(28, "f64", 1, 8),
)

_BY_ID = {t.id: t for t in ALL}
_BY_NAME = {t.name: t for t in ALL}
