"""mul_mv_stack and mul_few_stack of every type, also beside f32, against float64 NumPy."""

from __future__ import annotations

import pytest

from support.kernel_lab import Lab, every_lane
from support.kernels.products import every_type_on
from support.kernels.products_stack import Stack
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType

#: Rows of a stack's matrices (0: no matrix), which matrices are f32, and whether the last two are a pair.
STACKS = [
    ((67, 5, 3, 64), (0, 0, 0, 0), False),
    ((67, 1, 33, 33), (1, 1, 0, 0), True),
    ((0, 9, 0, 2), (0, 0, 0, 1), False),
    ((4, 0, 0, 0), (0, 0, 0, 0), False),
    ((0, 0, 1, 1), (0, 0, 0, 0), True),
    ((3, 0, 7, 7), (0, 0, 1, 1), True),
    ((1, 1, 1, 1), (1, 0, 1, 0), False),
]


@every_lane
@every_type_on(STACKS, other=5)
def test_stack(lane: str, qtype: QuantType, shape: tuple[tuple[int, ...], tuple[int, ...], bool]) -> None:
    Stack(Lab(lane), qtype, 512, *shape).check()


@every_lane
@pytest.mark.parametrize("k", [256, 768, 2048])
def test_stack_of_rows_of_any_length(lane: str, k: int) -> None:
    Stack(Lab(lane), quants.Q8_0, k, *STACKS[1]).check()
    Stack(Lab(lane), quants.Q4_K, k, *STACKS[6]).check()


@every_lane
@pytest.mark.parametrize("k", [1, 33, 67])
def test_stack_of_float_rows_of_any_length(lane: str, k: int) -> None:
    Stack(Lab(lane), quants.BF16, k, *STACKS[0]).check()
    Stack(Lab(lane), quants.F16, k, *STACKS[1]).check()


@every_lane
@every_type_on([STACKS[0], STACKS[2], STACKS[6]], other=1)
def test_biases_are_added(lane: str, qtype: QuantType, shape: tuple[tuple[int, ...], tuple[int, ...], bool]) -> None:
    Stack(Lab(lane), qtype, 512, *shape, biased=True).check()


@every_lane
@every_type_on([STACKS[0], STACKS[1], STACKS[5], STACKS[6]], other=2)
def test_a_stack_of_a_norm(lane: str, qtype: QuantType, shape: tuple[tuple[int, ...], tuple[int, ...], bool]) -> None:
    Stack(Lab(lane), qtype, 512, *shape, normed=True).check()


@every_lane
@pytest.mark.parametrize("k", [1, 33, 67, 2048])
def test_a_stack_of_a_norm_of_any_length(lane: str, k: int) -> None:
    Stack(Lab(lane), quants.BF16, k, *STACKS[1], normed=True).check()
    Stack(Lab(lane), quants.F16, k, *STACKS[0], normed=True, biased=True).check()


@every_lane
@pytest.mark.parametrize("biased", [False, True])
@every_type_on([STACKS[0], STACKS[2]], other=1)
def test_a_stack_of_two_rows(
    lane: str, qtype: QuantType, shape: tuple[tuple[int, ...], tuple[int, ...], bool], biased: bool
) -> None:
    for tokens in (1, 2, 3):
        Stack(Lab(lane), qtype, 512, *shape, biased=biased, few=2, tokens=tokens).check()


@every_lane
def test_every_type_has_every_kernel(lane: str) -> None:
    want = {f"mul_mv_stack_{t.name}" for t in quants.SUPPORTED}
    assert want <= set(Lab(lane).device.kernel_names())
