"""Inputs of kernels: random weights of every tensor type, and buffers between guards.

The checks of a device, the tests of kernels and the benches share them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..gguf.random_weights import Bytes

if TYPE_CHECKING:
    from .. import _core

__all__ = ["GUARD", "POISON", "Bytes", "Guarded"]

POISON = 0xFF  # NaN in every float type
GUARD = 256  # bytes of poison on either side of the bytes that a kernel may touch


# ---- guarded buffers ----------------------------------------------------------------------------------------


class Guarded:
    """Buffer of a device with ``content`` between two bands of poison.

    ``array`` is the content. It is a live view if the device shares the host's memory, else a copy for
    :meth:`push` and :meth:`pull`. The content begins ``align`` bytes after a multiple of 256.
    """

    def __init__(self, device: _core.Device, content: NDArray[Any], align: int = 0) -> None:
        self.offset, self.nbytes = GUARD + align, content.nbytes
        self.buffer = device.alloc(self.offset + self.nbytes + GUARD)
        shared, nbytes = self.buffer.shared, self.buffer.nbytes
        self._all = np.frombuffer(memoryview(self.buffer), np.uint8) if shared else np.empty(nbytes, np.uint8)
        self._all[:] = POISON
        inside = self._all[self.offset : self.offset + self.nbytes]
        self.array: NDArray[Any] = inside.view(content.dtype).reshape(content.shape)
        self.array[...] = content
        self._content = inside.copy()

    @property
    def binding(self) -> tuple[_core.Buffer, int, int]:
        """Buffer, the offset of the content and its bytes."""
        return self.buffer, self.offset, self.nbytes

    def push(self) -> None:
        """Copy to the device, if it has its own memory."""
        if not self.buffer.shared:
            self.buffer.write(self._all)

    def pull(self) -> None:
        """Copy from the device, if it has its own memory."""
        if not self.buffer.shared:
            self._all[:] = self.buffer.read()

    def is_outside_intact(self) -> bool:
        """Return True if the poison before and after the content is unchanged."""
        end = self.offset + self.nbytes
        return bool((self._all[: self.offset] == POISON).all() and (self._all[end:] == POISON).all())

    def is_content_intact(self) -> bool:
        """Return True if the content is unchanged."""
        return np.array_equal(self._all[self.offset : self.offset + self.nbytes], self._content)
