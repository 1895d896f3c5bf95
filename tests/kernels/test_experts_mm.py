"""Prefill of mixtures of experts: moe_sort exactly, moe_mm of every type and moe_mix against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import MSL, Guarded, Lab, assert_close, assert_untouched, every_lane, tiles
from support.kernels.experts import TYPES, every_form
from support.kernels.experts_mm import Experts, MoeMm, Route, layer_of_experts, random_route, run_moe_mix
from support.kernels.products import block_of, every_type_on, tolerance
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType

F32 = NDArray[np.float32]

epilogues = pytest.mark.parametrize("epilogue", ["", "_swiglu"], ids=["store", "swiglu"])


# ---- moe_sort -----------------------------------------------------------------------------------------------


def run_moe_sort(lab: Lab, route: Route, max_tiles: int | None = None) -> tuple[Guarded, Guarded, Guarded]:
    shapes = lab.core.shapes()
    if max_tiles is None:
        max_tiles = route.max_tiles(shapes["MOE_MM_TOKENS"])
    slots = lab.output(route.ids.size, dtype=np.int32, align=4)
    cut = lab.output(max_tiles, 4, dtype=np.int32)
    n_tiles = lab.output(1, dtype=np.int32, align=4)
    params = {"n_expert": route.n_expert, "n_used": route.n_used, "max_tiles": max_tiles}
    bindings = [lab.step(route.n_tokens), lab.input(route.ids, align=4), slots, cut, n_tiles]
    lab.run("moe_sort", params, "MoeSortParams", bindings, (1,), shapes["MOE_SORT_THREADS"])
    return slots, cut, n_tiles


def check_sort(lab: Lab, route: Route) -> None:
    slots, cut, n_tiles = run_moe_sort(lab, route)
    want_slots, want_tiles = route.sorted(lab.core.shapes()["MOE_MM_TOKENS"])
    assert n_tiles.array[0] == len(want_tiles)
    assert np.array_equal(slots.array[: len(want_slots)], want_slots)
    assert np.array_equal(cut.array[: len(want_tiles)], want_tiles)
    assert_untouched(slots.array[len(want_slots) :])
    assert_untouched(cut.array[len(want_tiles) :])


# Experts, experts of a row, tokens of the step, rows of the dispatch.
ROUTES = [
    (256, 8, 64, 64),
    (256, 8, 1, 4),
    (1024, 32, 70, 70),
    (1000, 10, 37, 40),
    (128, 8, 7, 7),
    (1, 1, 33, 40),
    (3, 2, 70, 70),
    (7, 7, 31, 31),
    (60, 4, 0, 5),
    (64, 8, 67, 67),  # more slots than 16 simdgroups take at once, fewer than 17 take
]


@every_lane
@pytest.mark.parametrize(("n_expert", "n_used", "n_tokens", "rows"), ROUTES)
def test_moe_sort(lane: str, n_expert: int, n_used: int, n_tokens: int, rows: int) -> None:
    lab = Lab(lane)
    check_sort(lab, random_route(lab, rows, n_tokens, n_expert, n_used))


@every_lane
@pytest.mark.parametrize(("n_expert", "n_used", "n_tokens"), [(1024, 32, 512), (256, 8, 2048), (256, 8, 1999)])
def test_moe_sort_of_a_large_step(lane: str, n_expert: int, n_used: int, n_tokens: int) -> None:
    """As many slots as a step of 512 rows has with the widest router, and one of 2,048 with a usual one."""
    lab = Lab("msl" if lane == MSL else lane)  # unchecked: 16,384 slots
    check_sort(lab, random_route(lab, 512 if n_tokens == 512 else 2048, n_tokens, n_expert, n_used))


@every_lane
@pytest.mark.parametrize("n_used", [1, 8])
def test_moe_sort_of_one_expert(lane: str, n_used: int) -> None:
    """Every slot goes to the same expert, even several of a row."""
    lab = Lab(lane)
    check_sort(lab, Route(np.full((70, n_used), 5, np.int32), 70, 16))


@every_lane
def test_moe_sort_takes_wild_ids_for_the_last_expert(lane: str) -> None:
    lab = Lab(lane)
    route = random_route(lab, 40, 33, 64, 4)
    wild = lab.rng.random(route.ids.shape) < 0.3
    route.ids[wild] = lab.rng.choice(np.array([-1, 64, 2**31 - 1, -(2**31), 100], np.int32), wild.sum())
    check_sort(lab, route)


@every_lane
def test_moe_sort_writes_no_more_tiles_than_there_is_room_for(lane: str) -> None:
    lab = Lab(lane)
    route = random_route(lab, 40, 40, 64, 4)
    slots, cut, n_tiles = run_moe_sort(lab, route, max_tiles=9)
    want_slots, want_tiles = route.sorted(lab.core.shapes()["MOE_MM_TOKENS"])
    assert len(want_tiles) > 9
    assert n_tiles.array[0] == 9
    assert np.array_equal(cut.array, want_tiles[:9])
    assert np.array_equal(slots.array, want_slots)


# ---- moe_mm -------------------------------------------------------------------------------------------------


# Tokens, rows of the dispatch, experts, experts of a row, rows of a matrix, its blocks of columns.
MM_SHAPES = [(9, 12, 5, 2, 67, 2), (33, 33, 2, 1, 5, 1), (1, 4, 16, 3, 64, 1)]


@every_lane
@every_type_on(MM_SHAPES, types=TYPES)
@epilogues
def test_moe_mm(lane: str, qtype: QuantType, epilogue: str, shape: tuple[int, int, int, int, int, int]) -> None:
    tokens, rows, n_expert, n_used, m, blocks = shape
    lab = Lab(lane)
    route = random_route(lab, rows, tokens, n_expert, n_used)
    MoeMm(lab, qtype, epilogue, route, m, blocks * block_of(qtype)[0], shared_x=bool(epilogue)).check(lab)


@every_lane
@every_form
def test_biases_and_activations(lane: str, form: str, bias: bool) -> None:
    lab = Lab(lane)
    route = random_route(lab, 9, 7, 4, 2)
    for qtype, m, k in ((quants.Q4_K, 67, 256), (quants.Q8_0, 35, 96), (quants.F16, 5, 33)):
        MoeMm(lab, qtype, form, route, m, k, shared_x=form != "", bias=bias).check(lab)


@every_lane
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 49, 64, 70])
def test_moe_mm_of_any_number_of_tokens(lane: str, tokens: int) -> None:
    """All tokens choose the same expert of three."""
    lab = Lab(lane)
    route = Route(np.full((tokens, 1), 1, np.int32), tokens, 3)
    MoeMm(lab, quants.Q4_K, "", route, 70, 256, shared_x=True).check(lab)
    MoeMm(lab, quants.Q8_0, "_swiglu", route, 33, 64, shared_x=False).check(lab)


@every_lane
def test_moe_mm_of_a_step_without_tokens_writes_nothing(lane: str) -> None:
    lab = Lab(lane)
    case = MoeMm(lab, quants.Q4_0, "", random_route(lab, 4, 0, 5, 2), 5, 32, shared_x=True)
    assert_untouched(case.run(lab).array)


@every_lane
def test_moe_mm_of_a_wild_expert_reads_no_other_memory(lane: str) -> None:
    """moe_sort writes no such tile. If the kernel met one, it would read the last expert."""
    lab = Lab(lane)
    case = MoeMm(lab, quants.Q8_0, "", Route(np.full((3, 1), 4, np.int32), 3, 5), 5, 32, shared_x=True)
    slots = lab.input(np.arange(3, dtype=np.int32), align=4)
    for wild in (-1, 5, 2**31 - 1):
        tile, out = lab.input(np.array([[wild, 0, 3, 0]], np.int32)), lab.output(3, 5)
        bindings = [slots, tile, lab.input(np.array([1], np.int32), align=4), *case.operands, out]
        lab.run(case.name, case.params, "MoeMmParams", bindings, (1, 1), lab.core.shapes()["MOE_MM_THREADS"])
        assert_close(out.array, case.want, case.tolerance, case.scale)


def test_moe_mm_of_a_tile_that_is_too_long_takes_its_first_slots() -> None:
    """moe_sort writes no such tile. Threadgroup memory has no room for more slots."""
    lab = Lab(MSL)
    tokens = lab.core.shapes()["MOE_MM_TOKENS"]
    case = MoeMm(
        lab, quants.Q8_0, "", Route(np.full((tokens + 8, 1), 2, np.int32), tokens + 8, 5), 5, 32, shared_x=True
    )
    slots, out = lab.input(np.arange(tokens + 8, dtype=np.int32), align=4), lab.output(tokens + 8, 5)
    tile = lab.input(np.array([[2, 0, tokens + 8, 0]], np.int32))
    bindings = [slots, tile, lab.input(np.array([1], np.int32), align=4), *case.operands, out]
    lab.run(case.name, case.params, "MoeMmParams", bindings, (1, 1), lab.core.shapes()["MOE_MM_THREADS"])
    assert_close(out.array[:tokens], case.want[:tokens], case.tolerance, case.scale[:tokens])
    assert_untouched(out.array[tokens:])


# ---- moe_mix ------------------------------------------------------------------------------------------------


@every_lane
@pytest.mark.parametrize(("rows", "n_tokens", "n", "n_used"), [(1, 1, 1, 1), (4, 3, 1030, 8), (9, 9, 67, 32)])
def test_moe_mix(lane: str, rows: int, n_tokens: int, n: int, n_used: int) -> None:
    run_moe_mix(Lab(lane), rows, n_tokens, n, n_used)
    run_moe_mix(Lab(lane), rows, n_tokens, n, n_used, alias=True)
    run_moe_mix(Lab(lane), rows, n_tokens, n, n_used, alone=True)


# ---- together -----------------------------------------------------------------------------------------------


@every_lane
def test_a_layer_of_experts(lane: str) -> None:
    """From the router's ids to the mixed output: each kernel reads the output of the one before."""
    lab = Lab(lane)
    shapes, tokens, k, m = lab.core.shapes(), 21, 64, 96
    route = random_route(lab, tokens, tokens, 6, 2)
    gate, up, down = (Experts(lab, quants.Q8_0, 6, *s) for s in ((m, k), (m, k), (k, m)))
    x, weights = lab.normal(tokens, k), lab.normal(tokens, 3)
    slots, cut, n_tiles = run_moe_sort(lab, route)
    hidden, y, out = lab.output(2 * tokens, m), lab.output(2 * tokens, k), lab.output(tokens, k)
    list_x, threads = lab.input(x), shapes["MOE_MM_THREADS"]

    sort = [slots, cut, n_tiles]
    grid = (len(cut.array), tiles(m, shapes["MOE_MM_ROWS"] // 2))
    bindings = [*sort, gate.buffer, up.buffer, *[list_x] * 3, hidden]
    lab.run("moe_mm_gated_q8_0", gate.params(2), "MoeMmParams", bindings, grid, threads)
    grid = (len(cut.array), tiles(k, shapes["MOE_MM_ROWS"]))
    lab.run("moe_mm_q8_0", down.params(1), "MoeMmParams", [*sort, down.buffer, hidden, hidden, y], grid, threads)
    bindings = [lab.step(tokens), lab.input(weights), y, list_x, out]
    lab.run(
        "moe_mix",
        {"n": k, "n_used": 2, "alone": 0},
        "MoeMixParams",
        bindings,
        (1, tokens),
        shapes["ELEMENTWISE_THREADS"],
    )

    want = layer_of_experts(x, route.ids, weights, gate, up, down)
    assert_close(out.array, want, 1e-6 if lane == "native" else tolerance(lane, quants.Q8_0))


@every_lane
def test_every_type_has_every_kernel(lane: str) -> None:
    want = {f"moe_mm{e}_{t.name}" for e in ("", "_gated") for t in TYPES} | {"moe_sort", "moe_mix"}
    assert want <= set(Lab(lane).device.kernel_names())
