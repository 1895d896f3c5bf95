"""A quant type of GGUF files, and the pieces from which its dequantisation is made.

A quantised row is a sequence of blocks. Each block has ``block_size`` weights in ``block_bytes`` bytes. ggml
(``ggml.h``, ``ggml-common.h``) defines the ids, the names and the layouts. ``quants.py`` lists the types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

U8 = NDArray[np.uint8]
F32Array = NDArray[np.float32]
Blocks = NDArray[Any]  # [n] of a type's block dtype


SetScale = Callable[[Blocks, F32Array], None]


def _set_half(blocks: Blocks, scale: F32Array) -> None:
    blocks["d"] = scale


@dataclass(frozen=True)
class QuantType:
    """Quant type: the geometry of its blocks, and how to dequantise them.

    ``name`` is ggml's name in lower case and the suffix of kernel names. ``block`` is the dtype of one block.
    ``dequantize_blocks`` maps blocks [n] to float32 [n, block_size]. Both are None for a type that zincmetal does not
    compute with. ``set_scale`` stores the scales [n] of blocks, as nearly as the type can.
    """

    id: int
    name: str
    block_size: int
    block_bytes: int
    block: np.dtype[Any] | None = field(default=None, repr=False)
    dequantize_blocks: Callable[[Blocks], F32Array] | None = field(default=None, repr=False)
    set_scale: SetScale = field(default=_set_half, repr=False)

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


def row(
    ggml_id: int,
    name: str,
    block_size: int,
    layout: Any,
    dequantize_blocks: Callable[[Blocks], F32Array],
    set_scale: SetScale = _set_half,
) -> QuantType:
    """Make a type from the layout of its block, in NumPy's notation."""
    block = np.dtype(layout)
    return QuantType(ggml_id, name, block_size, block.itemsize, block, dequantize_blocks, set_scale)


#: The field of a block's scale.
D = ("d", "<f2")


def column(scale: NDArray[Any]) -> F32Array:
    """Convert scales [...] to float32 [..., 1], so that they multiply the weights of their blocks."""
    return scale.astype(np.float32)[..., None]


def nibbles(packed: U8) -> U8:
    """Unpack bytes [..., b] to 4-bit values [..., 2b]: all low nibbles, then all high nibbles."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)
