"""The tensor types that expert kernels take (all), and what the kernels do with their products, in float64 NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab
from support.kernels.products import gated
from zincmetal.gguf import quants

F64 = NDArray[np.float64]

TYPES = list(quants.SUPPORTED)

#: Forms of products, with the number that kernels know them by: one matrix, then gate and up.
FORMS = {"": 0, "_relu2": 1, "_swiglu": 0, "_geglu": 1, "_clamped": 2}
GATED = ("_swiglu", "_geglu", "_clamped")

every_form = pytest.mark.parametrize(
    ("form", "bias"), [*((form, True) for form in FORMS), ("_relu2", False), ("_geglu", False), ("_clamped", False)]
)


def matrices(form: str) -> int:
    """Counts the matrices of an expert that a product takes."""
    return 2 if form in GATED else 1


def kernel(family: str, form: str) -> str:
    """Returns the beginning of a kernel's name."""
    return f"{family}{'_gated' if form in GATED else ''}_"


class Biases:
    """Biases [n_expert, m] of each matrix, so large that a clamp meets some; or none, and ``dummy`` is bound."""

    def __init__(self, lab: Lab, form: str, n_expert: int, m: int, given: bool, dummy: Guarded) -> None:
        self.given, n = given, matrices(form)
        self.values: F64 = np.zeros((n, n_expert, m))
        if given:
            values = lab.normal(n, n_expert, m, scale=6)
            self.values = values.astype(np.float64)
        self.buffers = [lab.input(v, align=4) for v in values] if given else [dummy] * n

    def params(self, form: str) -> dict[str, int]:
        return {"kind": FORMS[form], "has_bias": int(self.given)}


def finished(form: str, products: Sequence[F64], scales: Sequence[F64]) -> tuple[F64, F64]:
    """Applies a form to products after their biases; returns the result and its error bound, computed from theirs."""
    if form in GATED:
        return gated(form, products, scales)
    if form == "_relu2":
        return np.maximum(products[0], 0) ** 2, (2 * np.abs(products[0]) + scales[0]) * scales[0]
    return products[0], scales[0]
