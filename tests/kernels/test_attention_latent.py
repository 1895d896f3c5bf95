"""The kernels of latent attention against float64 NumPy, over shuffled pages whose unused rows are poison."""

from __future__ import annotations

import numpy as np
import pytest

from support.kernel_lab import Lab, assert_close, assert_untouched, every_lane
from support.kernels.attention_latent import LatentAttention, RopeLatent, Shape
from support.kernels.rows import assert_quantised
from support.kv_cache import KV_TYPES
from support.step_rows import Run

every_kv = pytest.mark.parametrize("kv", KV_TYPES)

SINGLES = (Run(5, 130), Run(1, 0), Run(2, 63), Run(7, 64))
SHAPES = [
    Shape(64, 32, 4, 1, (Run(0, 0),)),
    Shape(64, 32, 20, 9, SINGLES),
    Shape(128, 64, 3, 40, (Run(0, 5, 33),)),
    Shape(96, 32, 5, 50, (*SINGLES, Run(3, 40, 37), Run(4, 0, 2))),
    Shape(512, 64, 20, 2, (Run(1, 70), Run(0, 200))),
    Shape(512, 64, 16, 6, (Run(0, 61, 5),)),
    Shape(160, 32, 17, 4, (Run(2, 100, 3),)),
]


@every_lane
@every_kv
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_latent_attention(lane: str, kv: str, shape: Shape) -> None:
    """Every row as if it were alone: the same bits, except on GPUs, whose matrix unit rounds by its tile."""
    case = LatentAttention(Lab(lane), shape, kv)
    out = case.run()
    case.check(out)
    t = int(case.lab.rng.integers(shape.n_tokens))
    alone = case.alone(t).run().array[0]
    if lane in ("metal", "cuda"):
        assert np.abs(alone - out.array[t]).max() < 1e-5
    else:
        assert np.array_equal(alone, out.array[t])


@every_lane
@pytest.mark.parametrize("groups", [1, 3, 40])
def test_tiles_over_any_grid(lane: str, groups: int) -> None:
    """More tiles than threadgroups, and fewer."""
    runs = tuple(Run(i, 7 * i, n) for i, n in enumerate((1, 2, 9, 3)))
    case = LatentAttention(Lab(lane), Shape(64, 32, 5, 20, runs), "f16")
    case.check(case.run(groups))


@every_lane
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("n_split", [1, 3, 16])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=str)
def test_split(lane: str, kv: str, n_split: int, shape: Shape) -> None:
    case = LatentAttention(Lab(lane), shape, kv)
    case.check(case.run_split(n_split))


@every_lane
def test_scores_far_from_zero(lane: str) -> None:
    """Scores of some hundreds of either sign: their exp() is infinite or zero, their softmax is not."""
    case = LatentAttention(Lab(lane), Shape(64, 32, 4, 7, (Run(0, 90, 7),)), "f32", q_scale=300.0)
    case.check(case.run(), rel=2e-6 * 300 * 10)


@every_lane
def test_a_step_without_tokens_writes_nothing(lane: str) -> None:
    case = LatentAttention(Lab(lane), SHAPES[2], "f32")
    case.inputs[0] = case.lab.step(0)
    assert_untouched(case.run().array)


@every_lane
@every_kv
@pytest.mark.parametrize(("shape", "temperature"), [(SHAPES[3], 0.1), (SHAPES[4], 0.0)], ids=str)
def test_rope_latent(lane: str, kv: str, shape: Shape, temperature: float) -> None:
    case, n = RopeLatent(Lab(lane), shape, kv, temperature=temperature), shape.n_tokens
    case.run()
    assert_close(case.q_still.array[:n], case.want_still, 1e-6)
    assert_close(case.q_rot.array[:n], case.want_rot, 1e-6)
    places = case.batch.new_places
    stored = case.cache.array[places, 0]
    if kv == "q8_0":
        assert_quantised(stored, case.want_rows, 1e-6)
    else:
        assert_close(stored.astype(np.float32), case.want_rows, 1e-6 if kv == "f32" else 2.0**-11)
    for rest in (case.q_still.array[n:], case.q_rot.array[n:], np.delete(case.cache.array, places, axis=0)):
        assert_untouched(rest)
