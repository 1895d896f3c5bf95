"""Quant types whose quants stand for numbers of a small table, and those of one or two bits a weight.

Their NumPy dequantisation is the oracle, as in ``quants.py``. Layouts and tables are ggml's (``ggml-common.h``).
"""

from __future__ import annotations

import numpy as np

from .quant_type import U8, Blocks, D, F32Array, column, nibbles, row

#: The numbers of IQ4_NL and IQ4_XS, by nibble.
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


def _iq4_nl(b: Blocks) -> F32Array:
    weights: F32Array = column(b["d"]) * IQ4[nibbles(b["qs"])]
    return weights


def _iq4_xs(b: Blocks) -> F32Array:
    # Sub-block s of 32 weights has the low 4 bits of its scale in nibble s, and the high 2 at bit 2 s of a word.
    low = (b["scales_l"][..., None] >> np.array([0, 4], np.uint8) & 15).reshape(-1, 8)
    high = (b["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    scales = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    numbers = IQ4[nibbles(b["qs"].reshape(-1, 8, 16))]
    return (column(column(b["d"]) * scales) * numbers).reshape(-1, 256)


# ---- four-bit floats ---------------------------------------------------------------------------------------

#: The numbers of E2M1 by nibble, doubled. Scales are half as large for it.
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def _e8m0(e: U8) -> F32Array:
    """Compute half of 2^(e - 127), which is subnormal for the two smallest e."""
    e32 = e.astype(np.uint32)
    bits = np.where(e < 2, np.uint32(0x00200000) << e32, (e32 - np.uint32(1)) << np.uint32(23))
    return bits.view(np.float32)


def _mxfp4(b: Blocks) -> F32Array:
    weights: F32Array = column(_e8m0(b["e"])) * FP4[nibbles(b["qs"])]
    return weights


def _set_e8m0(blocks: Blocks, scale: F32Array) -> None:
    blocks["e"] = np.clip(np.frexp(np.abs(scale))[1] + 127, 0, 254)


def _ue4m3() -> F32Array:
    """Make half of each number with four bits of exponent and three of fraction, by byte. Its sign has no meaning."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    numbers = np.where(exponent == 0, fraction * 2.0**-9, (1 + fraction / 8) * 2.0 ** (exponent - 7)) / 2
    numbers[0x7F] = 0
    return numbers.astype(np.float32)


UE4M3 = _ue4m3()


def _nvfp4(b: Blocks) -> F32Array:
    numbers = FP4[nibbles(b["qs"].reshape(-1, 4, 8))]
    return (column(UE4M3[b["d"]]) * numbers).reshape(-1, 64)


def _set_ue4m3(blocks: Blocks, scale: F32Array) -> None:
    blocks["d"] = np.searchsorted(UE4M3[:0x7F], np.abs(scale)).clip(0, 0x7E)[:, None]


# ---- one or two bits a weight ------------------------------------------------------------------------------


def _signed(d: U8, numbers: U8) -> F32Array:
    """Compute ``d * (number - 1)``."""
    weights: F32Array = column(d) * (numbers.astype(np.int8) - np.int8(1))
    return weights


def _pairs(packed: U8) -> U8:
    """Unpack bytes [..., b] to 2-bit values [..., 4, b], low bits first."""
    return packed[..., None, :] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & np.uint8(3)


def _digits(packed: U8, n: int) -> U8:
    """Unpack bytes [..., b] to their first ``n`` digits of base 3, [..., n, b]. A byte is a fraction times 256."""
    moved = packed[..., None, :] * (3 ** np.arange(n)).astype(np.uint8)[:, None]
    return (moved.astype(np.uint16) * 3 >> 8).astype(np.uint8)


def _tq1_0(b: Blocks) -> F32Array:
    parts = (_digits(b["qs"][:, :32], 5), _digits(b["qs"][:, 32:], 5), _digits(b["qh"], 4))
    return _signed(b["d"], np.concatenate([p.reshape(len(b), -1) for p in parts], axis=1))


def _tq2_0(b: Blocks) -> F32Array:
    return _signed(b["d"], _pairs(b["qs"].reshape(-1, 2, 32)).reshape(-1, 256))


def _q2_0(b: Blocks) -> F32Array:
    return _signed(b["d"], _pairs(b["qs"][..., None]).reshape(-1, 64))


def _q1_0(b: Blocks) -> F32Array:
    return _signed(b["d"], np.unpackbits(b["qs"], axis=1, bitorder="little") << np.uint8(1))


# ---- the table ---------------------------------------------------------------------------------------------

IQ4_NL = row(20, "iq4_nl", 32, [D, ("qs", "u1", 16)], _iq4_nl)
IQ4_XS = row(23, "iq4_xs", 256, [D, ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)], _iq4_xs)
MXFP4 = row(39, "mxfp4", 32, [("e", "u1"), ("qs", "u1", 16)], _mxfp4, _set_e8m0)
NVFP4 = row(40, "nvfp4", 64, [("d", "u1", 4), ("qs", "u1", 32)], _nvfp4, _set_ue4m3)
TQ1_0 = row(34, "tq1_0", 256, [("qs", "u1", 48), ("qh", "u1", 4), D], _tq1_0)
TQ2_0 = row(35, "tq2_0", 256, [("qs", "u1", 64), D], _tq2_0)
Q1_0 = row(41, "q1_0", 128, [D, ("qs", "u1", 16)], _q1_0)
Q2_0 = row(42, "q2_0", 64, [D, ("qs", "u1", 16)], _q2_0)

TYPES = (IQ4_NL, IQ4_XS, MXFP4, NVFP4, TQ1_0, TQ2_0, Q1_0, Q2_0)
