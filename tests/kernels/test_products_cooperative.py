"""Products by Metal 4's tensor operations against float64 NumPy, on the CPU's stand-in of them."""

from __future__ import annotations

import numpy as np
import pytest

from support.kernel_lab import LANES, MSL, SEED, Lab, assert_close, assert_untouched, tiles
from support.kernels.experts_mm import MoeMm, Route, random_route
from support.kernels.products import (
    EPILOGUES,
    HALF_TOLERANCE,
    SWEPT,
    TOLERANCE,
    MatMul,
    Weights,
    block_of,
    mat_mul_params,
    tile,
)
from support.kernels.products_heads import Heads
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType

#: The CPU's native lane has no kernels of its own for them, and CUDA has none.
every_lane = pytest.mark.parametrize("lane", [lane for lane in LANES if lane in (MSL, "metal")])
TYPES = [qtype for qtype in quants.SUPPORTED if qtype is not quants.F32]
every_type = pytest.mark.parametrize("qtype", TYPES, ids=lambda t: t.name)
epilogues = pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda e: e[1:] or "store")


def run(lane: str, qtype: QuantType, epilogue: str, m: int, blocks: int, tokens: int, rows: int, gap: int = 0) -> None:
    lab, (size, nbytes) = Lab(lane), block_of(qtype)
    case = MatMul(lab, qtype, epilogue, m, blocks * size, tokens, rows, gap * nbytes)
    case.run(lab, f"mul_mm_coop{epilogue}_{qtype.name}", (rows, m))


@every_lane
@epilogues
@every_type
def test_products(lane: str, epilogue: str, qtype: QuantType) -> None:
    run(lane, qtype, epilogue, 67, 2, 65, 70, gap=1)


@every_lane
@epilogues
@pytest.mark.parametrize("qtype", [t for t in SWEPT if t is not quants.F32], ids=lambda t: t.name)
def test_tiles_that_are_not_full(lane: str, epilogue: str, qtype: QuantType) -> None:
    for m, blocks, tokens, rows in ((1, 1, 1, 4), (64, 3, 64, 64), (130, 1, 31, 32), (5, 5, 129, 140)):
        run(lane, qtype, epilogue, m, blocks, tokens, rows)


@every_lane
@pytest.mark.parametrize("qtype", [quants.F16, quants.BF16], ids=lambda t: t.name)
@pytest.mark.parametrize("k", [1, 31, 33, 67, 130])
def test_float_rows_of_any_length(lane: str, qtype: QuantType, k: int) -> None:
    lab = Lab(lane)
    MatMul(lab, qtype, "_add", 5, k, 3, 4, 0).run(lab, f"mul_mm_coop_add_{qtype.name}", (4, 5))


@every_lane
def test_the_residual_may_be_the_output(lane: str) -> None:
    lab = Lab(lane)
    MatMul(lab, quants.Q8_0, "_add", 67, 64, 33, 40, 0).run(lab, "mul_mm_coop_add_q8_0", (40, 67), alias=True)


@every_lane
@pytest.mark.parametrize("wrong", [1e6, np.inf, np.nan])
def test_activations_beyond_a_half(lane: str, wrong: float) -> None:
    """Their rows are computed again in floats, and their neighbours are as they would be without them."""
    lab = Lab(lane)
    x = np.random.default_rng(SEED).standard_normal((70, 512)).astype(np.float32)
    x[65, 77] = wrong
    w, out = Weights(lab, quants.Q5_K, 67, 512), lab.output(70, 67)
    rows, tokens, threads = tile(lab.core.shapes(), "mul_mm_coop_q5_k")
    params, grid = mat_mul_params(512, 67, w.row_bytes), (tiles(70, tokens), tiles(67, rows))
    lab.run("mul_mm_coop_q5_k", params, "MatMulParams", [lab.step(70), w.buffer, lab.input(x), out], grid, threads)
    x64, others = x.astype(np.float64), np.arange(70) != 65
    want, scale = x64[others] @ w.values.T, np.sqrt(x64[others] ** 2 @ w.values.T**2)
    assert_close(out.array[others], want, HALF_TOLERANCE, scale)
    if np.isfinite(wrong):
        assert_close(out.array[65], x64[65] @ w.values.T, TOLERANCE, np.sqrt(x64[65] ** 2 @ w.values.T**2))
    else:
        assert not np.isfinite(out.array[65]).any()


@every_lane
@every_type
def test_products_of_heads(lane: str, qtype: QuantType) -> None:
    for sizes in ((3, 70, 5, 7), (2, 33, 70, 80)):
        case = Heads(Lab(lane), qtype, *sizes)
        case.check(case.run("mul_heads_mm_coop"))


@every_lane
@pytest.mark.parametrize("form", ["", "_swiglu"])
@every_type
def test_products_of_experts(lane: str, form: str, qtype: QuantType) -> None:
    lab = Lab(lane)
    for rows, tokens, n_expert, n_used, m, blocks in ((12, 9, 5, 2, 67, 2), (70, 66, 2, 1, 5, 1)):
        route, k = random_route(lab, rows, tokens, n_expert, n_used), blocks * block_of(qtype)[0]
        MoeMm(lab, qtype, form, route, m, k, shared_x=bool(form), family="moe_mm_coop").check(lab)


@every_lane
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 31, 32, 33, 70])
def test_experts_of_any_number_of_tokens(lane: str, tokens: int, bias: bool) -> None:
    """All tokens choose the same expert of three."""
    lab, route = Lab(lane), Route(np.full((tokens, 1), 1, np.int32), tokens, 3)
    for qtype, form, m, k in ((quants.Q4_K, "", 70, 256), (quants.Q8_0, "_swiglu", 33, 64)):
        MoeMm(lab, qtype, form, route, m, k, shared_x=not form, bias=bias, family="moe_mm_coop").check(lab)


@every_lane
def test_a_step_without_tokens_writes_nothing(lane: str) -> None:
    lab = Lab(lane)
    w, out = Weights(lab, quants.Q4_0, 5, 64), lab.output(33, 5)
    bindings = [lab.step(0), w.buffer, lab.input(lab.normal(33, 64)), out]
    params, threads = mat_mul_params(64, 5, w.row_bytes), lab.core.shapes()["COOP_THREADS"]
    lab.run("mul_mm_coop_q4_0", params, "MatMulParams", bindings, (1, 1), threads)
    assert_untouched(out.array)


@every_lane
def test_every_type_has_every_kernel(lane: str) -> None:
    families = [*(f"mul_mm_coop{e}" for e in EPILOGUES), "mul_heads_mm_coop", "moe_mm_coop", "moe_mm_coop_gated"]
    assert {f"{f}_{t.name}" for f in families for t in TYPES} <= set(Lab(lane).device.kernel_names())
