"""Quant types of GGUF files: one row for each type, and the NumPy dequantisation that is the oracle.

A quantised row is a sequence of blocks. Each block has ``block_size`` weights in ``block_bytes`` bytes. ggml
(``ggml.h``, ``ggml-common.h``) defines the ids, the names and the layouts. There is no I/O here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedModelError, UsageError

U8 = NDArray[np.uint8]
F32Array = NDArray[np.float32]
Blocks = NDArray[Any]  # [n] of a type's block dtype


@dataclass(frozen=True)
class QuantType:
    """Quant type: the geometry of its blocks, and how to dequantise them.

    ``name`` is ggml's name in lower case and the suffix of kernel names. ``block`` is the dtype of one block.
    ``dequantize_blocks`` maps blocks [n] to float32 [n, block_size]. The last two are None for a type that zincmetal
    does not compute with.
    """

    id: int
    name: str
    block_size: int
    block_bytes: int
    block: np.dtype[Any] | None = field(default=None, repr=False)
    dequantize_blocks: Callable[[Blocks], F32Array] | None = field(default=None, repr=False)

    @property
    def supported(self) -> bool:
        """True if zincmetal computes with this type."""
        return self.dequantize_blocks is not None

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of ``k`` weights. Raises UsageError if ``k`` is no multiple of the block size."""
        if k < 0 or k % self.block_size:
            raise UsageError(f"a row of {k} weights is not whole {self.name} blocks of {self.block_size}")
        return k // self.block_size * self.block_bytes

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of ``shape``, slowest dimension first; () is one weight. Raises as ``row_bytes``."""
        *rows, k = shape or (1,)
        return prod(rows) * self.row_bytes(k)


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


def _column(scale: NDArray[Any]) -> F32Array:
    """Convert scales [...] to float32 [..., 1], so that they multiply the weights of their blocks."""
    return scale.astype(np.float32)[..., None]


def _nibbles(packed: U8) -> U8:
    """Unpack bytes [..., b] to 4-bit values [..., 2b]: all low nibbles, then all high nibbles."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


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
    step = _column(b["d"]) * scales
    base = _column(b["dmin"]) * minima
    return (step[..., None] * quants - base[..., None]).reshape(-1, 256)


# ---- dequantisation, blocks [n] -> float32 [n, block_size] ------------------------------------------------


def _plain(b: Blocks) -> F32Array:
    return b.astype(np.float32)[:, None]


def _bf16(b: Blocks) -> F32Array:
    return (b.astype(np.uint32) << 16).view(np.float32)[:, None]


def _q4_0(b: Blocks) -> F32Array:
    return _column(b["d"]) * (_nibbles(b["qs"]).astype(np.int8) - np.int8(8))


def _q4_1(b: Blocks) -> F32Array:
    return _column(b["d"]) * _nibbles(b["qs"]) + _column(b["m"])


def _q5_0(b: Blocks) -> F32Array:
    quants = _nibbles(b["qs"]) | _fifth_bits(b["qh"])
    return _column(b["d"]) * (quants.astype(np.int8) - np.int8(16))


def _q5_1(b: Blocks) -> F32Array:
    return _column(b["d"]) * (_nibbles(b["qs"]) | _fifth_bits(b["qh"])) + _column(b["m"])


def _q8_0(b: Blocks) -> F32Array:
    weights: F32Array = _column(b["d"]) * b["qs"]
    return weights


def _q4_k(b: Blocks) -> F32Array:
    # 32 bytes hold two sub-blocks: one in the low nibbles, the next one in the high nibbles.
    return _k_affine(b, _nibbles(b["qs"].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(b: Blocks) -> F32Array:
    low = _nibbles(b["qs"].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    qh: U8 = b["qh"][:, None, :]  # bit s of byte i belongs to quant i of sub-block s
    high = qh >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    return _k_affine(b, low | high << np.uint8(4))


def _q6_k(b: Blocks) -> F32Array:
    # Each half of 128 weights has 64 bytes of low nibbles and 32 bytes of four bit pairs.
    # Pair p of byte i has the top bits of weight 32 p + i.
    low = _nibbles(b["ql"].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    qh: U8 = b["qh"].reshape(-1, 2, 1, 32)
    high = qh >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & np.uint8(3)
    quants = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    step: F32Array = _column(b["d"]) * b["scales"]
    return (step[..., None] * quants.reshape(-1, 16, 16)).reshape(-1, 256)


# ---- the table --------------------------------------------------------------------------------------------


def _row(
    ggml_id: int, name: str, block_size: int, layout: Any, dequantize_blocks: Callable[[Blocks], F32Array]
) -> QuantType:
    block = np.dtype(layout)
    return QuantType(ggml_id, name, block_size, block.itemsize, block, dequantize_blocks)


_D = ("d", "<f2")
_DM = [_D, ("m", "<f2")]
_K = [_D, ("dmin", "<f2"), ("scales", "u1", 12)]

F32 = _row(0, "f32", 1, "<f4", _plain)
F16 = _row(1, "f16", 1, "<f2", _plain)
BF16 = _row(30, "bf16", 1, "<u2", _bf16)
Q4_0 = _row(2, "q4_0", 32, [_D, ("qs", "u1", 16)], _q4_0)
Q4_1 = _row(3, "q4_1", 32, [*_DM, ("qs", "u1", 16)], _q4_1)
Q5_0 = _row(6, "q5_0", 32, [_D, ("qh", "<u4"), ("qs", "u1", 16)], _q5_0)
Q5_1 = _row(7, "q5_1", 32, [*_DM, ("qh", "<u4"), ("qs", "u1", 16)], _q5_1)
Q8_0 = _row(8, "q8_0", 32, [_D, ("qs", "i1", 32)], _q8_0)
Q4_K = _row(12, "q4_k", 256, [*_K, ("qs", "u1", 128)], _q4_k)
Q5_K = _row(13, "q5_k", 256, [*_K, ("qh", "u1", 32), ("qs", "u1", 128)], _q5_k)
Q6_K = _row(14, "q6_k", 256, [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), _D], _q6_k)

#: The types that zincmetal computes with.
SUPPORTED: tuple[QuantType, ...] = (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K)

#: Every type that a file may have. The geometry of unsupported types serves to check and show files.
ALL: tuple[QuantType, ...] = (
    *SUPPORTED,
    QuantType(9, "q8_1", 32, 36),
    QuantType(10, "q2_k", 256, 84),
    QuantType(11, "q3_k", 256, 110),
    QuantType(15, "q8_k", 256, 292),
    QuantType(16, "iq2_xxs", 256, 66),
    QuantType(17, "iq2_xs", 256, 74),
    QuantType(18, "iq3_xxs", 256, 98),
    QuantType(19, "iq1_s", 256, 50),
    QuantType(20, "iq4_nl", 32, 18),
    QuantType(21, "iq3_s", 256, 110),
    QuantType(22, "iq2_s", 256, 82),
    QuantType(23, "iq4_xs", 256, 136),
    QuantType(24, "i8", 1, 1),
    QuantType(25, "i16", 1, 2),
    QuantType(26, "i32", 1, 4),
    QuantType(27, "i64", 1, 8),
    QuantType(28, "f64", 1, 8),
    QuantType(29, "iq1_m", 256, 56),
    QuantType(34, "tq1_0", 256, 54),
    QuantType(35, "tq2_0", 256, 66),
    QuantType(39, "mxfp4", 32, 17),
    QuantType(40, "nvfp4", 64, 36),
    QuantType(41, "q1_0", 128, 18),
    QuantType(42, "q2_0", 64, 18),
)

_BY_ID = {t.id: t for t in ALL}
_BY_NAME = {t.name: t for t in ALL}
