"""Places in shared memory for what an output's draw reads beside its record: biases, and a mask of allowed tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..graph.ops import BIASES, MASKS
from ..sampling.draws import bias_records

if TYPE_CHECKING:
    from ..device.buffers import Buffers
    from ..device.core import Core
    from .batch import Drawing, Place


class Places:
    """Writes the biases and masks of a step where no step in flight reads: halves of both buffers in turn."""

    def __init__(self, buffers: Buffers, core: Core, n_vocab: int) -> None:
        self._bias = core.params_dtype("Bias")
        self._biases = np.frombuffer(memoryview(buffers.buffer(BIASES.name)).cast("B"), self._bias)
        self._masks = np.frombuffer(memoryview(buffers.buffer(MASKS.name)).cast("B"), np.uint32)
        self._mask_words = -(-n_vocab // 32)

    @property
    def most_biases(self) -> int:
        """Biases of all outputs of a step, at most."""
        return self._biases.size // 2

    def biases_each(self, n_out: int) -> int:
        """Biases of an output, at most, of a step with so many outputs."""
        return self.most_biases // n_out

    def of(self, number: int) -> Place:
        """Return the function that places biases and masks of the step ``number``."""
        half = number % 2
        next_bias = half * self.most_biases

        def place(i: int, drawing: Drawing) -> tuple[int, int | None]:
            nonlocal next_bias
            at = next_bias
            next_bias += len(drawing.params.logit_bias)
            if drawing.params.logit_bias:
                self._biases[at:next_bias] = bias_records(self._bias, drawing.params)
            if drawing.mask is None:
                return at, None
            mask_at = (half * (self._masks.size // self._mask_words // 2) + i) * self._mask_words
            self._masks[mask_at : mask_at + self._mask_words] = drawing.mask
            return at, mask_at

        return place
