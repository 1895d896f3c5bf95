"""The choice of experts, by moe_topk and moe_route, against float64 NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import Lab, assert_close, every_lane
from support.kernels.experts_mm import Route
from support.kernels.route import Router, check_choice, check_route, run_route, run_topk

F64 = NDArray[np.float64]

has_shared = pytest.mark.parametrize("has_shared", [False, True], ids=["routed", "shared"])


def softmax(x: F64) -> F64:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


# ---- moe_topk -----------------------------------------------------------------------------------------------


TOP_K_SHAPES = [(8, 2), (8, 8), (1, 1), (33, 5), (60, 4), (128, 8), (256, 8), (257, 32), (1000, 10), (1024, 32)]


@every_lane
@has_shared
@pytest.mark.parametrize(("n_expert", "n_used"), TOP_K_SHAPES)
def test_topk(lane: str, n_expert: int, n_used: int, has_shared: bool) -> None:
    lab = Lab(lane)
    logits, shared = lab.normal(7, n_expert, scale=3.0), lab.normal(7, scale=3.0)
    logits[5:] = shared[5:] = np.nan  # rows past the step's tokens must not be read
    router = Router(n_used, scale=2.5, shared=shared if has_shared else None)
    check_choice(*run_topk(lab, logits, router, 5), router, logits[:5])


@every_lane
def test_topk_prefers_the_lowest_id(lane: str) -> None:
    lab = Lab(lane)
    logits = lab.rng.integers(-2, 2, (6, 200)).astype(np.float32)
    logits[0], logits[1] = 0.0, np.where(np.arange(200) % 2, 0.0, -0.0)
    logits[2] = np.nextafter(
        np.float32(1.5), lab.rng.choice(np.array([0, 2], np.float32), 200)
    )  # floats two steps apart
    logits[3] = np.where(lab.rng.random(200) < 0.5, np.float32(-1.5), np.nextafter(np.float32(-1.5), np.float32(0)))
    for score in ("logit", "sigmoid", "softmax"):  # without biases the logits decide, also where scores round
        ids, weights = run_topk(lab, logits, Router(32, score), 6)
        assert np.array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :32])
        assert_close(weights[:2, :32], np.full((2, 32), 1 / 32), 1e-6)


@every_lane
def test_topk_takes_nan_last_and_gives_it_nothing(lane: str) -> None:
    lab = Lab(lane)
    logits = lab.normal(3, 40)
    logits[0, :35], logits[1, ::2], logits[2, 3:] = np.nan, -np.nan, -np.inf
    ids, weights = run_topk(lab, logits, Router(8), 3)
    numbers = np.argsort(-logits[0, 35:], kind="stable") + 35
    assert np.array_equal(ids[0], [*numbers, 0, 1, 2])
    assert np.array_equal(ids[1], 1 + 2 * np.argsort(-logits[1, 1::2], kind="stable")[:8])
    assert np.array_equal(ids[2], [*np.argsort(-logits[2, :3], kind="stable"), 3, 4, 5, 6, 7])
    assert_close(weights[0, :5], softmax(logits[0, numbers].astype(np.float64)), 1e-6)
    assert (weights[0, 5:8] == 0).all()
    assert (weights[2, 3:8] == 0).all()
    assert np.isfinite(weights).all()


@every_lane
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_scores_give_nan_nothing(lane: str, score: str) -> None:
    lab = Lab(lane)
    logits = lab.normal(2, 40)
    logits[0, 3:], logits[1, ::2] = np.nan, np.nan
    ids, weights = run_topk(lab, logits, Router(6, score, bias=np.zeros(40, np.float32), n_group=4, n_group_used=2), 2)
    assert set(ids[0][:3]) == {0, 1, 2}
    assert (weights[0, 3:6] == 0).all()
    assert (ids[1] % 2 == 1).all()
    assert_close(weights[:, :6].sum(axis=1), np.ones(2), 1e-6)


@every_lane
def test_topk_of_logits_whose_exponential_overflows(lane: str) -> None:
    lab = Lab(lane)
    logits = lab.normal(2, 64) + np.array([[3e38], [-500.0]], np.float32)
    shared = np.array([-300.0, 300.0], np.float32)
    ids, weights = run_topk(lab, logits, Router(6, shared=shared), 2)
    chosen = np.take_along_axis(logits, ids, axis=1).astype(np.float64)
    assert_close(weights[:, :6], softmax(chosen), 1e-6)
    assert weights[0, 6] < 1e-30
    assert weights[1, 6] == 1.0


# ---- ways to choose -------------------------------------------------------------------------------------------

WAYS = {
    "softmax": Router(6, "softmax", normalised=False, scale=2.0),
    "sigmoid": Router(6, "sigmoid"),
    "sigmoid-raw": Router(6, "sigmoid", normalised=False, scale=0.5, shared=True),
    "groups": Router(6, "sigmoid", n_group=8, n_group_used=3),
    "softmax-groups": Router(4, "softmax", n_group=4, n_group_used=1, shared=True),
    "groups-of-two": Router(4, "logit", n_group=32, n_group_used=2),
}


@every_lane
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_choose(lane: str, way: str, bias: bool) -> None:
    lab = Lab(lane)
    n = 64 if WAYS[way].n_group == 32 else lab.rng.choice([64, 320])
    router = replace(WAYS[way], bias=lab.normal(n, scale=0.3) if bias else None, scales=lab.normal(n))
    logits = lab.normal(7, n, scale=2.0)
    logits[5:] = np.nan
    check_choice(*run_topk(lab, logits, router, 5), router, logits[:5])
    check_route(lab, logits, router, 5)


@every_lane
def test_equal_scores_and_equal_groups(lane: str) -> None:
    """The lowest id comes first, and the lowest group."""
    lab = Lab(lane)
    logits = lab.rng.integers(-1, 2, (6, 96)).astype(np.float32)
    logits[0] = 0
    bias = (lab.rng.integers(0, 2, 96) / 8).astype(np.float32)
    for router in (
        Router(8, "sigmoid", bias=bias),
        Router(8, "logit", bias=bias, n_group=6, n_group_used=2),
        Router(8, "logit", n_group=12, n_group_used=5),
    ):
        check_choice(*run_topk(lab, logits, router, 6), router, logits)
        check_route(lab, logits, router, 6)


@every_lane
def test_the_bias_is_for_the_choice_alone(lane: str) -> None:
    lab = Lab(lane)
    logits, bias = lab.normal(3, 16), np.zeros(16, np.float32)
    bias[[3, 9]] = 5, -5
    ids, weights = run_topk(lab, logits, Router(2, "sigmoid", normalised=False, bias=bias), 3)
    assert (ids[:, 0] == 3).all()
    assert_close(weights[:, 0], 1 / (1 + np.exp(-logits[:, 3].astype(np.float64))), 1e-6)


@every_lane
def test_a_small_sum_does_not_divide(lane: str) -> None:
    """Sums below 2^-14 count as 2^-14."""
    lab = Lab(lane)
    logits = (lab.normal(4, 8) - np.array([[5], [9], [16], [60]])).astype(np.float32)
    router = Router(2, "sigmoid")
    ids, weights = run_topk(lab, logits, router, 4)
    want_ids, want = router.want(logits)
    assert np.array_equal(ids, want_ids)
    assert want[2:, :2].sum(axis=1).max() < 0.9
    assert np.allclose(weights, want, rtol=1e-5, atol=0)


# ---- moe_route ----------------------------------------------------------------------------------------------

# Experts, experts of a row, tokens of the step, rows of the dispatch.
ROUTES = [
    (256, 8, 2, 2),
    (256, 8, 32, 32),
    (256, 8, 17, 32),
    (60, 4, 3, 4),
    (8, 8, 5, 8),
    (1, 1, 31, 32),
    (33, 32, 32, 32),
    (257, 10, 7, 8),
    (1024, 32, 32, 32),
    (64, 6, 0, 4),
]


@every_lane
@has_shared
@pytest.mark.parametrize(("n_expert", "n_used", "n_tokens", "rows"), ROUTES)
def test_moe_route(lane: str, n_expert: int, n_used: int, n_tokens: int, rows: int, has_shared: bool) -> None:
    lab = Lab(lane)
    logits, shared = lab.normal(rows, n_expert, scale=3.0), lab.normal(rows, scale=3.0)
    logits[n_tokens:] = shared[n_tokens:] = np.nan  # rows past the step's tokens must not be read
    check_route(lab, logits, Router(n_used, scale=2.5, shared=shared if has_shared else None), n_tokens)


@every_lane
def test_rows_that_choose_the_same_experts_share_tiles(lane: str) -> None:
    lab = Lab(lane)
    logits = np.repeat(lab.normal(1, 100), 32, axis=0)
    assert check_route(lab, logits, Router(6), 32).n_tiles.array[0] == 6


@every_lane
def test_rows_that_choose_different_experts_share_none(lane: str) -> None:
    lab = Lab(lane)
    logits = lab.normal(32, 256)
    for t in range(32):
        logits[t, lab.rng.permutation(8) + 8 * t] += 100
    assert check_route(lab, logits, Router(8), 32).n_tiles.array[0] == 256


@every_lane
def test_routing_prefers_the_lowest_id(lane: str) -> None:
    lab = Lab(lane)
    check_route(lab, lab.rng.integers(-2, 2, (16, 200)).astype(np.float32), Router(32), 13)


@every_lane
@pytest.mark.parametrize("score", ["logit", "sigmoid"])
def test_routing_equals_top_k_and_sort(lane: str, score: str) -> None:
    """The ids and weights are moe_topk's to the bit."""
    lab = Lab(lane)
    logits = lab.normal(8, 128)
    logits[1, 5:], logits[2, ::3] = np.nan, -np.inf
    router = Router(8, score) if score == "logit" else Router(8, score, bias=lab.normal(128), n_group=4, n_group_used=2)
    ids, weights = run_topk(lab, logits, router, 8)
    few = run_route(lab, logits, router, 8)
    assert np.array_equal(few.ids.array, ids)
    assert np.array_equal(few.weights.array.view(np.uint32), weights.view(np.uint32))
    slots, cut = Route(ids, 8, 128).sorted(32)
    assert np.array_equal(few.slots.array, slots)
    assert np.array_equal(few.tiles.array[: len(cut)], cut)


@every_lane
def test_both_ways_have_a_kernel(lane: str) -> None:
    names = set(Lab(lane).device.kernel_names())
    assert {"moe_topk", "moe_route"} <= names
