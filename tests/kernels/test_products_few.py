"""mul_few of every tensor type and class against float64 NumPy on decoded weights."""

from __future__ import annotations

import numpy as np
import pytest

from support.kernel_lab import LANES, Lab, assert_untouched, every_lane
from support.kernels.products import EPILOGUES, block_of, every_type, for_block
from support.kernels.products_few import CLASSES, VECTORS, Few
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType

epilogues = pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda e: e[1:] or "store")
every_class = pytest.mark.parametrize("n", CLASSES)
float_types = pytest.mark.parametrize("qtype", [quants.F32, quants.F16, quants.BF16], ids=lambda t: t.name)

#: Rows of W, blocks of a row and gap between rows in blocks, by block size: the ends of tiles and of steps.
SHAPES = {32: [(37, 3, 1), (16, 8, 0)], 256: [(37, 1, 1), (16, 2, 0)]}


def k_of(qtype: QuantType, blocks: int) -> int:
    return blocks * block_of(qtype)[0]


@every_lane
@every_type
@every_class
def test_types(lane: str, qtype: QuantType, n: int) -> None:
    lab = Lab(lane)
    size, nbytes = block_of(qtype)
    for (m, blocks, gap), tokens, epilogue in zip(
        for_block(qtype, SHAPES), (n, n // 2 + 1), ("", "_swiglu"), strict=True
    ):
        Few(lab, qtype, epilogue, m, blocks * size, tokens, n, gap * nbytes).check(lab)


@every_lane
@every_class
@epilogues
def test_epilogues(lane: str, n: int, epilogue: str) -> None:
    lab = Lab(lane)
    for qtype in (quants.Q8_0, quants.Q4_K, quants.Q6_K):
        Few(lab, qtype, epilogue, 19, 256, n - 1, n).check(lab)


@every_lane
@every_class
def test_every_number_of_tokens(lane: str, n: int) -> None:
    lab = Lab(lane)
    for tokens in range(1, n + 1):
        Few(lab, quants.Q4_0, "_add", 5, 64, tokens, n).check(lab)


@every_lane
@pytest.mark.parametrize("k_split", [1, 2, 4])
@pytest.mark.parametrize("n", [n for n in CLASSES if n > VECTORS])
def test_shared_columns(lane: str, n: int, k_split: int) -> None:
    lab = Lab(lane)
    Few(lab, quants.Q8_0, "_mix", 67, 352, n, n).check(lab, k_split=k_split)
    Few(lab, quants.Q5_K, "", 33, 768, n, n).check(lab, k_split=k_split)
    Few(lab, quants.Q6_K, "_geglu", 9, 256, n, n).check(lab, k_split=k_split)
    Few(lab, quants.Q5_1, "", 65, 32, n, n).check(lab, k_split=k_split)


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane != "native"])
@pytest.mark.parametrize("n", [n for n in CLASSES if n > VECTORS])
def test_more_rows_than_the_class_has(lane: str, n: int) -> None:
    """Threadgroups side by side take N rows each: so prompts meet small matrices on devices that take any number."""
    lab = Lab(lane)
    tokens = 3 * n - (n // 2 if lab.core.shapes()["FEW_ANY_ROWS"] else 0)
    Few(lab, quants.F32, "", 33, 256, tokens, n, rows=3 * n).check(lab, k_split=4)
    Few(lab, quants.Q8_0, "_mix", 67, 96, tokens, n, rows=3 * n).check(lab, k_split=2)
    Few(lab, quants.Q4_K, "_swiglu", 9, 256, tokens, n, rows=3 * n).check(lab)
    Few(lab, quants.F16, "_add", 5, 33, 3 * n - 1, n, rows=3 * n).check(lab)  # rows that are not whole blocks


@every_lane
@every_type
@pytest.mark.parametrize("n", [n for n in CLASSES if n > VECTORS])
def test_tiles_of_small_matrices(lane: str, qtype: QuantType, n: int) -> None:
    lab = Lab(lane)
    if not lab.core.shapes()["FEW_SMALL_ROWS"]:
        pytest.skip("this device has none")
    for k_split in (2, 8):
        Few(lab, qtype, "_add", 37, 1024, n - 1, n, small=True).check(lab, k_split=k_split)
        Few(lab, qtype, "_geglu", 9, 256, n, n, small=True).check(lab, k_split=k_split)


@every_lane
@float_types
@every_class
def test_float_rows_of_any_length(lane: str, qtype: QuantType, n: int) -> None:
    lab = Lab(lane)
    for k, epilogue in ((1, ""), (33, "_add"), (67, "_swiglu"), (130, "_mix")):
        Few(lab, qtype, epilogue, 5, k, n - 1, n, 3 * qtype.block_bytes).check(lab)


@every_lane
def test_long_rows(lane: str) -> None:
    lab = Lab(lane)
    Few(lab, quants.Q8_0, "", 5, 4096, 3, 4).check(lab)
    Few(lab, quants.Q4_K, "", 17, 4096, 8, 8).check(lab, k_split=4)
    Few(lab, quants.Q6_K, "_add", 17, 2048, 16, 16).check(lab)
    Few(lab, quants.Q4_1, "", 40, 2048, 32, 32).check(lab, k_split=2)


@every_lane
@every_class
def test_the_residual_may_be_the_output_or_a_bias(lane: str, n: int) -> None:
    lab = Lab(lane)
    Few(lab, quants.Q4_K, "_add", 37, 256, n - 1, n).check(lab, alias=True)
    Few(lab, quants.Q5_0, "_mix", 37, 96, n - 1, n).check(lab, alias=True)
    Few(lab, quants.Q8_0, "_add", 37, 64, n - 1, n, bias=True).check(lab)


@every_lane
@every_class
@pytest.mark.parametrize("qtype", [quants.Q8_0, quants.Q4_K, quants.Q6_K, quants.F16], ids=lambda t: t.name)
def test_a_row_does_not_depend_on_its_batch(lane: str, qtype: QuantType, n: int) -> None:
    """Bit for bit: the last row of a full step, alone and first in other steps."""
    lab = Lab(lane)
    case = Few(lab, qtype, "", 37, 512, n, n)
    want = case.outputs(lab)
    x = case.inputs[-1].array.copy()
    for tokens in {1, n // 2, n}:
        case.tokens = tokens
        case.inputs[-1] = lab.input(x[::-1])
        np.testing.assert_array_equal(case.outputs(lab).view(np.uint32), want[::-1][:tokens].view(np.uint32))


@every_lane
@every_class
def test_outputs_are_fewer_than_the_tokens_of_their_step(lane: str, n: int) -> None:
    lab = Lab(lane)
    any_rows = n <= VECTORS or lane == "native" or lab.core.shapes()["FEW_ANY_ROWS"] == 1
    for tokens in {1, n // 2 + 1}:
        rows = tokens if any_rows else n
        Few(lab, quants.Q8_0, "", 19, 96, tokens, n, rows=rows).check(lab, step_tokens=None if rows > tokens else n + 5)
        Few(lab, quants.Q4_K, "_swiglu", 19, 256, n, n).check(lab, step_tokens=n + 5)


@every_lane
@pytest.mark.parametrize("n", [n for n in CLASSES if n <= VECTORS])
def test_more_rows_than_a_class_of_vectors_has(lane: str, n: int) -> None:
    lab = Lab(lane)
    for tokens, rows in ((9, 11), (4, 11), (32, 32)):
        Few(lab, quants.Q8_0, "_mix", 19, 96, tokens, n, rows=rows).check(lab)
        Few(lab, quants.F32, "_swiglu", 19, 96, tokens, n, rows=rows).check(lab)


@every_lane
@every_class
def test_a_step_without_tokens_writes_nothing(lane: str, n: int) -> None:
    lab = Lab(lane)
    case = Few(lab, quants.Q4_0, "", 5, 64, 1, n)
    case.tokens = 0
    assert_untouched(case.outputs(lab))


@every_lane
def test_every_type_has_every_kernel(lane: str) -> None:
    want = {f"mul_few{f}_{t.name}_n{n}" for f in ("", "_gated") for t in quants.SUPPORTED for n in CLASSES}
    assert want <= set(Lab(lane).device.kernel_names())
