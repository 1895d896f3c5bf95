"""The products of heads with matrices of their own against float64 NumPy, for every type."""

from __future__ import annotations

import pytest

from support.kernel_lab import Lab, every_lane
from support.kernels.products import every_type
from support.kernels.products_heads import Heads
from zincmetal.gguf.quants import QuantType


@every_lane
@pytest.mark.parametrize("kernel", ["mul_heads_mv", "mul_heads_mm"])
@every_type
@pytest.mark.parametrize(("n_head", "m", "tokens", "rows"), [(3, 70, 5, 7), (2, 33, 70, 80)])
def test_products_of_heads(
    lane: str, kernel: str, qtype: QuantType, n_head: int, m: int, tokens: int, rows: int
) -> None:
    """Rows that fill no tile, and blocks beside a threadgroup's columns."""
    case = Heads(Lab(lane), qtype, n_head, m, tokens, rows)
    case.check(case.run(kernel))
