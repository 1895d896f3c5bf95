"""The norm that products of one row apply to their x."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab

F64 = NDArray[np.float64]


class InputNorm:
    """Norm of x [1, k] with a random weight, or none: then NaN stands in its places, which must not be read."""

    buffer: Guarded
    values: F64  # what the product multiplies

    def __init__(self, lab: Lab, x: NDArray[np.float32], given: bool) -> None:
        if given and not lab.core.shapes()["FOLDED_NORMS"]:
            pytest.skip("norms are kernels of their own on this lane")
        weight = lab.normal(x.shape[-1]) if given else np.full(x.shape[-1], np.nan, np.float32)
        self.buffer, self.values = lab.input(weight, align=8), x.astype(np.float64)  # a file aligns it no better
        self.params: dict[str, float] = {"normed": int(given), "eps": np.nan}
        if given:
            eps = np.float32(np.mean(np.square(x)))  # as large as what it is added to
            self.params["eps"] = float(eps)
            mean = np.mean(np.square(self.values), axis=-1, keepdims=True)
            self.values = self.values * weight / np.sqrt(mean + float(eps))
