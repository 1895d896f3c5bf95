"""Mixtures of experts on 2 to 32 rows: moe_few of every type against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from support.kernel_lab import Lab, assert_close, assert_untouched, every_lane, tiles
from support.kernels.experts import TYPES, every_form
from support.kernels.experts_few import MoeFew
from support.kernels.experts_mm import Experts, Route, layer_of_experts, random_route, run_moe_mix
from support.kernels.products import TOLERANCE, block_of, every_type_on
from support.kernels.route import Router, check_route
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType

epilogues = pytest.mark.parametrize("epilogue", ["", "_swiglu"], ids=["store", "swiglu"])

# ---- moe_few ------------------------------------------------------------------------------------------------

# Tokens, rows of the dispatch, experts, experts of a row, rows of a matrix, its blocks of columns.
FEW_SHAPES = [(2, 2, 16, 3, 37, 1), (5, 8, 4, 2, 18, 2), (31, 32, 24, 1, 5, 1)]


@every_lane
@every_type_on(FEW_SHAPES, types=TYPES)
@epilogues
def test_moe_few(lane: str, qtype: QuantType, epilogue: str, shape: tuple[int, int, int, int, int, int]) -> None:
    tokens, rows, n_expert, n_used, m, blocks = shape
    lab = Lab(lane)
    route = random_route(lab, rows, tokens, n_expert, n_used)
    MoeFew(lab, qtype, epilogue, route, m, blocks * block_of(qtype)[0], shared_x=bool(epilogue)).check_few(lab)


@every_lane
@every_form
def test_biases_and_activations(lane: str, form: str, bias: bool) -> None:
    lab = Lab(lane)
    route = random_route(lab, 9, 7, 4, 2)
    for qtype, m, k in ((quants.Q4_K, 67, 256), (quants.Q8_0, 35, 96), (quants.F16, 5, 33)):
        MoeFew(lab, qtype, form, route, m, k, shared_x=form != "", bias=bias).check_few(lab)


@every_lane
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32])
def test_an_expert_of_any_number_of_slots(lane: str, tokens: int) -> None:
    """All tokens choose the same expert of three."""
    lab = Lab(lane)
    route = Route(np.full((tokens, 1), 1, np.int32), tokens, 3)
    MoeFew(lab, quants.Q4_K, "", route, 35, 256, shared_x=True).check_few(lab)
    MoeFew(lab, quants.Q6_K, "", route, 34, 256, shared_x=False).check_few(lab)
    MoeFew(lab, quants.Q8_0, "_swiglu", route, 33, 64, shared_x=False).check_few(lab)
    MoeFew(lab, quants.Q4_K, "_swiglu", route, 17, 512, shared_x=True).check_few(lab)


@every_lane
@pytest.mark.parametrize("k", [256, 512, 768, 1024, 2048, 2304])
@pytest.mark.parametrize("qtype", [quants.Q4_K, quants.Q5_K, quants.Q6_K], ids=lambda t: t.name)
def test_rows_of_any_number_of_blocks(lane: str, qtype: QuantType, k: int) -> None:
    lab = Lab(lane)
    route = random_route(lab, 3, 3, 3, 2)
    MoeFew(lab, qtype, "", route, 33, k, shared_x=False).check_few(lab)
    MoeFew(lab, qtype, "_swiglu", route, 17, k, shared_x=True).check_few(lab)


@every_lane
@pytest.mark.parametrize("threadgroups", [1, 2, 3, 7, 64])
def test_any_number_of_threadgroups_shares_an_expert(lane: str, threadgroups: int) -> None:
    lab = Lab(lane)
    route = random_route(lab, 6, 6, 4, 2)
    MoeFew(lab, quants.Q4_K, "", route, 75, 256, shared_x=False).check_few(lab, threadgroups)
    MoeFew(lab, quants.Q5_K, "_swiglu", route, 75, 256, shared_x=True).check_few(lab, threadgroups)
    MoeFew(lab, quants.Q8_0, "_swiglu", route, 75, 64, shared_x=True).check_few(lab, threadgroups)


@every_lane
@epilogues
def test_as_many_experts_of_a_row_as_there_may_be(lane: str, epilogue: str) -> None:
    lab = Lab(lane)
    route = random_route(lab, 8, 7, 40, 32)
    MoeFew(lab, quants.Q4_0, epilogue, route, 9, 64, shared_x=bool(epilogue)).check_few(lab)


@every_lane
@pytest.mark.parametrize("k", [1, 31, 67])
def test_float_rows_of_any_length(lane: str, k: int) -> None:
    lab = Lab(lane)
    route = random_route(lab, 5, 5, 3, 2)
    MoeFew(lab, quants.F16, "", route, 6, k, shared_x=False).check_few(lab)
    MoeFew(lab, quants.F16, "_swiglu", route, 5, k, shared_x=True).check_few(lab)


@every_lane
def test_a_step_without_tokens_writes_nothing(lane: str) -> None:
    lab = Lab(lane)
    case = MoeFew(lab, quants.Q4_K, "", random_route(lab, 4, 0, 5, 2), 5, 256, shared_x=True)
    assert_untouched(case.launch(lab).array)


@every_lane
def test_a_wild_expert_reads_no_other_memory(lane: str) -> None:
    """moe_route writes no such tile. If the kernel met one, it would read the last expert."""
    lab = Lab(lane)
    for qtype, k in ((quants.Q8_0, 32), (quants.Q4_K, 256)):
        case = MoeFew(lab, qtype, "", Route(np.full((3, 1), 4, np.int32), 3, 5), 5, k, shared_x=True)
        slots = lab.input(np.arange(3, dtype=np.int32), align=4)
        for wild in (-1, 5, 2**31 - 1):
            tile, out = lab.input(np.array([[wild, 0, 3, 0]], np.int32)), lab.output(3, 5)
            bindings = [slots, tile, lab.input(np.array([1], np.int32), align=4), *case.operands, out]
            threads = lab.core.shapes()["MOE_FEW_THREADS"]
            lab.run(f"moe_few_{qtype.name}", case.params, "MoeMmParams", bindings, (1, 1), threads)
            assert_close(out.array, case.want, TOLERANCE, case.scale)


@every_lane
@pytest.mark.parametrize("magnitude", [1e-12, 1e12])
def test_activations_of_any_size(lane: str, magnitude: float) -> None:
    lab = Lab(lane)
    case = MoeFew(lab, quants.Q4_K, "", random_route(lab, 5, 5, 2, 1), 16, 512, shared_x=True)
    case.inputs[-1] = lab.input((case.x * np.float32(magnitude)).astype(np.float32))
    case.want, case.scale = case.want * magnitude, case.scale * magnitude
    case.check_few(lab)


# ---- moe_mix_few --------------------------------------------------------------------------------------------


@every_lane
@pytest.mark.parametrize(("rows", "n_tokens", "n", "n_used"), [(2, 2, 1, 1), (4, 3, 1030, 8), (9, 9, 67, 32)])
def test_moe_mix_few(lane: str, rows: int, n_tokens: int, n: int, n_used: int) -> None:
    run_moe_mix(Lab(lane), rows, n_tokens, n, n_used, few=True)
    run_moe_mix(Lab(lane), rows, n_tokens, n, n_used, few=True, alias=True)
    run_moe_mix(Lab(lane), rows, n_tokens, n, n_used, few=True, alone=True)


# ---- together -----------------------------------------------------------------------------------------------


@every_lane
def test_a_layer_of_experts(lane: str) -> None:
    """From the router's logits to the mixed output: each kernel reads the output of the one before."""
    lab = Lab(lane)
    shapes, tokens, k, m = lab.core.shapes(), 11, 256, 256
    gate, up, down = (Experts(lab, quants.Q4_K, 6, *s) for s in ((m, k), (m, k), (k, m)))
    x, logits = lab.normal(tokens, k, scale=k**-0.5), lab.normal(tokens, 6)
    routed = check_route(lab, logits, Router(2), tokens)
    hidden, y, out = lab.output(2 * tokens, m), lab.output(2 * tokens, k), lab.output(tokens, k)
    list_x, threads = lab.input(x), shapes["MOE_FEW_THREADS"]

    sort = [routed.slots, routed.tiles, routed.n_tiles]
    grid = (len(routed.tiles.array), 4)
    bindings = [*sort, gate.buffer, up.buffer, *[list_x] * 3, hidden]
    lab.run("moe_few_gated_q4_k", gate.params(2), "MoeMmParams", bindings, grid, threads)
    lab.run("moe_few_q4_k", down.params(1), "MoeMmParams", [*sort, down.buffer, hidden, hidden, y], grid, threads)
    bindings = [lab.step(tokens), routed.weights, y, list_x, out]
    grid = (tiles(k, shapes["ELEMENTWISE_THREADS"]), tokens)
    lab.run(
        "moe_mix_few", {"n": k, "n_used": 2, "alone": 0}, "MoeMixParams", bindings, grid, shapes["ELEMENTWISE_THREADS"]
    )

    want = layer_of_experts(x, routed.ids.array, routed.weights.array, gate, up, down)
    assert_close(out.array, want, 1e-5)


@every_lane
def test_every_type_has_every_kernel(lane: str) -> None:
    want = {f"moe_few{e}_{t.name}" for e in ("", "_gated") for t in TYPES}
    assert want | {"moe_mix_few"} <= set(Lab(lane).device.kernel_names())
