"""The attention kernels against float64 NumPy, over shuffled pages whose unused rows are poison."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from support.kernel_lab import Lab, assert_untouched, every_lane
from support.kernels.attention import Attention, Shape
from support.kv_cache import KV_TYPES, skip_unless_held
from support.step_rows import Run

KERNELS = ("attention_decode", "attention_prefill", "attention_prefill_exact")

every_kernel = pytest.mark.parametrize("kernel", KERNELS)
every_kv = pytest.mark.parametrize("kv", KV_TYPES)


SHAPES = [
    Shape.of_one(*sizes)
    for sizes in [
        (64, 1, 1, 1, 1, 0),
        (64, 2, 2, 3, 3, 100),
        (64, 1, 4, 33, 33, 31),
        (64, 1, 1, 1, 1, 515),
        (80, 2, 1, 8, 8, 1),
        (80, 1, 2, 33, 17, 0),
        (80, 1, 1, 3, 2, 515),
        (128, 1, 8, 3, 3, 1),
        (128, 1, 4, 17, 17, 31),
        (128, 1, 2, 33, 33, 0),
        (128, 1, 2, 8, 5, 100),
        (256, 1, 2, 1, 1, 100),
        (256, 2, 1, 17, 16, 1),
        (256, 1, 1, 33, 33, 31),
        (256, 1, 2, 3, 3, 0),
        (8, 2, 1, 33, 33, 515),
        (16, 3, 1, 70, 65, 3),
        (40, 1, 2, 8, 8, 0),
        (96, 1, 1, 17, 3, 31),
        (160, 1, 1, 8, 7, 31),
        (64, 1, 2, 3, 3, 100, 0, True),
        (256, 1, 2, 17, 16, 40, 0, True),
        # Head sizes that are multiples of 4 and not of 8, in every class.
        (4, 2, 2, 9, 9, 70),
        (12, 3, 1, 33, 17, 0, 0, True),
        (20, 2, 2, 1, 1, 130),
        (36, 3, 2, 17, 17, 60),
        (60, 1, 3, 3, 3, 515, 100, True),
        (68, 3, 1, 33, 33, 1),
        (100, 1, 2, 8, 5, 100),
        (132, 3, 1, 17, 17, 31, 20),
        (252, 1, 2, 17, 16, 40, 0, True),
        # Sinks, beside many keys and few, with a window and a gate, and with more simdgroups than keys.
        (64, 1, 8, 3, 3, 100, 0, False, True),
        (64, 2, 2, 33, 17, 0, 5, False, True),
        (256, 1, 2, 17, 16, 40, 0, True, True),
        (128, 1, 3, 1, 1, 0, 0, False, True),
        # The class of 512.
        (512, 1, 2, 17, 9, 60, 0, True),
        (512, 2, 1, 1, 1, 515),
        (512, 1, 8, 8, 8, 0),
        (260, 1, 2, 9, 9, 31, 20),
        (508, 3, 1, 3, 3, 130),
    ]
]

# Windows of one position, below and above n_kv, across tiles and pages; for one row, and for several tiles of rows.
WINDOWS = [
    Shape.of_one(64, 1, 2, rows, rows, pos, window)
    for rows, pos in [(1, 0), (1, 200), (3, 127), (70, 0), (40, 150)]
    for window in (1, 2, 37, 64, 100, 1000)
] + [
    Shape.of_one(256, 1, 2, 1, 1, 300, 70, True),
    Shape.of_one(256, 2, 1, 33, 19, 90, 33, True),
    Shape.of_one(32, 1, 1, 50, 33, 63, 1),
]


@every_lane
@every_kv
@every_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(lane: str, kv: str, kernel: str, shape: Shape) -> None:
    skip_unless_held(kv, shape.head_dim)
    case = Attention(Lab(lane), shape, kv)
    case.check(case.run(kernel), case.tolerance(kernel))


@every_lane
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@every_kernel
@pytest.mark.parametrize("shape", WINDOWS, ids=str)
def test_sliding_window(lane: str, kv: str, kernel: str, shape: Shape) -> None:
    case = Attention(Lab(lane), shape, kv)
    case.check(case.run(kernel), case.tolerance(kernel))


# Several sequences, with single rows first. Two runs of one sequence read the same pages.
SINGLES = (Run(5, 130), Run(1, 0), Run(2, 63), Run(7, 64))
BATCHES = [
    Shape(64, 1, 2, 9, SINGLES),
    Shape(128, 2, 1, 50, (*SINGLES, Run(3, 40, 37), Run(4, 0, 2)), 0, True),
    Shape(80, 1, 2, 90, (Run(0, 5, 33), Run(4, 100, 31), Run(2, 0, 20)), 50),
    Shape(256, 1, 2, 40, (Run(1, 70), Run(0, 127, 17), Run(3, 1, 16)), 30, True),
    Shape(20, 1, 1, 12, (Run(2, 90), Run(2, 3), Run(1, 200, 8)), 0, True, alone=True),
    Shape(512, 1, 2, 30, (Run(1, 70), Run(0, 127, 17), Run(3, 1, 9)), 30, True),
]


@every_lane
@every_kv
@every_kernel
@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_rows_of_several_sequences(lane: str, kv: str, kernel: str, shape: Shape) -> None:
    """Every row as if it were alone: its own position, page table and window.

    It has the same bits, except where rows of one tile share products of a GPU's matrix unit: these round.
    """
    skip_unless_held(kv, shape.head_dim)
    case = Attention(Lab(lane), shape, kv)
    out = case.run(kernel)
    case.check(out, case.tolerance(kernel))
    for t in case.lab.rng.choice(shape.n_tokens, min(3, shape.n_tokens), replace=False).tolist():
        alone = case.alone(t).run(kernel).array[0]
        if kernel != "attention_decode" and lane in ("metal", "cuda"):
            assert np.abs(alone - out.array[t]).max() < 1e-5
        else:
            assert np.array_equal(alone, out.array[t])


@every_lane
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("n_split", [3, 16])
@pytest.mark.parametrize("shape", [BATCHES[0], replace(BATCHES[0], window=40, gate=True)], ids=str)
def test_split_of_several_sequences(lane: str, kv: str, n_split: int, shape: Shape) -> None:
    case = Attention(Lab(lane), shape, kv)
    out = case.run_split(n_split)
    case.check(out)
    assert np.array_equal(case.alone(2).run_split(n_split).array[0], out.array[2])


# A window that is odd, within a tile, over tiles and pages, and wider than the run.
BOTH_WAYS = [
    replace(shape, window=window, both_ways=True)
    for shape, windows in [
        (Shape(64, 1, 2, 90, (Run(5, 0), Run(0, 0, 70), Run(4, 3, 15))), (0, 1, 7, 40, 1000)),
        (Shape(256, 2, 1, 140, (Run(1, 0, 137),), gate=True), (0, 33)),
    ]
    for window in windows
]


@every_lane
@pytest.mark.parametrize("kv", ["f32", "q8_0"])
@every_kernel
@pytest.mark.parametrize("shape", BOTH_WAYS, ids=str)
def test_rows_that_see_both_ways(lane: str, kv: str, kernel: str, shape: Shape) -> None:
    case = Attention(Lab(lane), shape, kv)
    case.check(case.run(kernel), case.tolerance(kernel))


@every_lane
@every_kv
@pytest.mark.parametrize("shape", BATCHES[1:], ids=str)
def test_single_rows_beside_runs(lane: str, kv: str, shape: Shape) -> None:
    """Decode writes the single rows and prefill the others, in either order, over any grid."""
    skip_unless_held(kv, shape.head_dim)
    case = Attention(Lab(lane), shape, kv)
    n_single, out = case.batch.n_single, case.run("attention_prefill", singles=True, grid=(shape.n_head, 2))
    assert_untouched(out.array[:n_single])
    decoded = case.run("attention_decode", singles=True)
    assert_untouched(decoded.array[n_single:])
    case.check(case.run("attention_decode", singles=True, out=out), case.tolerance("attention_prefill"))


@every_lane
@every_kernel
@pytest.mark.parametrize("size", [0.0, 90.0, 1e4])
def test_gates_open_and_shut(lane: str, kernel: str, size: float) -> None:
    """exp() of the gates overflows; the sigmoid is 0 or 1."""
    case = Attention(Lab(lane), Shape.of_one(64, 1, 1, 2, 2, 70, gate=True), "f32")
    signs = np.sign(case.inputs[6].array[:, :, 64:])
    case.inputs[6] = case.lab.input(np.concatenate([signs, signs * np.float32(size)], axis=2))
    ungated = Attention(Lab(lane), replace(case.shape, gate=False), "f32").want
    case.want = ungated * (0.5 if size == 0 else signs > 0)
    case.check(case.run(kernel), case.tolerance(kernel))


@every_lane
@pytest.mark.parametrize("kv", ["f32", "f16"])
@every_kernel
@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_key_that_is_not_seen_may_have_any_score(lane: str, kv: str, kernel: str, head_dim: int) -> None:
    """The next position's score is so high that the weights of all keys that the row sees would be zero beside it."""
    case = Attention(Lab(lane), Shape.of_one(head_dim, 1, 2, 40, 37, 3), kv, climb=300.0)
    case.check(case.run(kernel), case.tolerance(kernel))


@every_lane
@every_kernel
def test_long_context(lane: str, kernel: str) -> None:
    case = Attention(Lab(lane), Shape.of_one(64, 1, 1, 2, 2, 3001), "f16")
    case.check(case.run(kernel), case.tolerance(kernel))


SPLITS = [
    Shape.of_one(64, 2, 2, 1, 1, 1000),
    Shape.of_one(80, 1, 3, 2, 2, 300),
    Shape.of_one(256, 2, 4, 1, 1, 700, gate=True),
    Shape.of_one(128, 1, 2, 3, 2, 63, gate=True),
    Shape.of_one(32, 1, 1, 1, 1, 0),
    replace(Shape.of_one(64, 1, 2, 2, 2, 500, 170, gate=True), alone=True),
    Shape.of_one(20, 3, 2, 1, 1, 400, gate=True),
    Shape.of_one(100, 1, 3, 2, 2, 300),
    Shape.of_one(252, 2, 2, 1, 1, 200, 90),
    Shape.of_one(64, 1, 8, 2, 2, 300, sinks=True),
    Shape.of_one(512, 1, 4, 1, 1, 500, gate=True),
    Shape.of_one(260, 2, 1, 2, 2, 150),
]


@every_lane
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("n_split", [1, 3, 16])
@pytest.mark.parametrize("shape", SPLITS, ids=str)
def test_split(lane: str, kv: str, n_split: int, shape: Shape) -> None:
    """More parts than pages, page counts that do not divide, windows that begin within a page."""
    skip_unless_held(kv, shape.head_dim)
    case = Attention(Lab(lane), shape, kv)
    case.check(case.run_split(n_split))


@every_lane
def test_split_with_fewer_simdgroups(lane: str) -> None:
    case = Attention(Lab(lane), Shape.of_one(96, 1, 5, 1, 1, 400), "f32")
    case.check(case.run_split(7, heads_at_once=2, merge_threads=96))


@every_lane
def test_split_of_scores_far_apart(lane: str) -> None:
    """Most parts weigh nothing against the part with the largest score."""
    case = Attention(Lab(lane), Shape.of_one(32, 1, 2, 1, 1, 600), "f32", 300.0, 40.0)
    case.check(case.run_split(5), rel=2e-6 * 300 * 41 * 32**0.5)


@every_lane
@every_kernel
@pytest.mark.parametrize("q_scale", [1e-3, 300.0])
@pytest.mark.parametrize("k_shift", [0.0, 40.0])
def test_scores_far_from_zero(lane: str, kernel: str, q_scale: float, k_shift: float) -> None:
    """Scores of about 1e5 of either sign: their exp() is infinite or zero, their softmax is not."""
    case = Attention(Lab(lane), Shape.of_one(32, 1, 2, 17, 17, 40), "f32", q_scale, k_shift)
    largest_score = q_scale * (1 + k_shift) * 32**0.5
    case.check(case.run(kernel), rel=max(2e-6, 2e-6 * largest_score))


@every_lane
@pytest.mark.parametrize("threads", [32, 96])
def test_decode_with_fewer_simdgroups(lane: str, threads: int) -> None:
    case = Attention(Lab(lane), Shape.of_one(80, 1, 2, 2, 2, 150), "f32")
    case.check(case.run("attention_decode", threads=threads))


@every_lane
@pytest.mark.parametrize("head_dim", [64, 80, 256, 512])
def test_prefill_with_fewer_threadgroups_than_tiles(lane: str, head_dim: int) -> None:
    case = Attention(Lab(lane), Shape.of_one(head_dim, 1, 1, 70, 70, 5), "f16")
    case.check(case.run("attention_prefill", grid=(1, 1)), case.tolerance("attention_prefill"))


@every_lane
@pytest.mark.parametrize("groups", [1, 2, 3, 5, 40])
def test_prefill_of_many_runs_over_any_grid(lane: str, groups: int) -> None:
    """More tiles than threadgroups, and fewer."""
    runs = tuple(Run(i, 7 * i, n) for i, n in enumerate((2, 33, 5, 64, 3, 70)))
    case = Attention(Lab(lane), Shape(64, 1, 1, 180, runs), "f16")
    case.check(case.run("attention_prefill", grid=(1, groups)), case.tolerance("attention_prefill"))


@every_lane
@every_kernel
def test_a_step_without_tokens_writes_nothing(lane: str, kernel: str) -> None:
    lab, shape = Lab(lane), Shape.of_one(64, 1, 2, 33, 33, 4)
    case = Attention(lab, shape, "f32")
    case.inputs[0] = lab.step(0)
    assert_untouched(case.run(kernel).array)
