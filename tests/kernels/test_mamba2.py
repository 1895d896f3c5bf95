"""The kernels of Mamba2 (kernels/mamba2.metal) against the formulas in float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from support.kernel_lab import Lab, assert_close, assert_untouched, every_lane
from support.kernels.mamba2 import SHAPES, Layer, Shape, grouped_norm, scan
from support.kernels.recurrent import f64
from support.kernels.rows import padded
from support.kernels.states import (
    assert_same_bits,
    assert_untouched_slots,
    check_empty_step,
    check_end,
    check_side_by_side,
    random_runs,
    state_scales,
)
from support.step_rows import Run, StepRows

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
#: Runs of one row, longer runs, and the most rows of those.
MIXTURES = [(0, 1, 40), (5, 0, 0), (4, 3, 20)]
every_mixture = pytest.mark.parametrize(("n_single", "n_long", "longest"), MIXTURES)


# ---- kernel by kernel --------------------------------------------------------------------------------------------


@every_lane
@every_shape
@every_mixture
def test_mamba2_conv1d(lane: str, shape: Shape, n_single: int, n_long: int, longest: int) -> None:
    layer = Layer(Lab(lane), shape)
    runs, n_slots = random_runs(layer, n_single, n_long, longest)
    batch = StepRows(layer.lab, runs, sum(run.n for run in runs) + 3)
    conv_state, _ = layer.states_before(runs, n_slots)
    out = layer.conv1d(batch, conv_state)
    want = np.concatenate([layer.convolved(run.sequence)[run.pos : run.end] for run in runs])
    assert_close(out.array[: batch.n_tokens], want, 1e-6)
    assert_untouched(out.array[batch.n_tokens :])


@every_lane
@every_shape
@every_mixture
def test_mamba2_scan(lane: str, shape: Shape, n_single: int, n_long: int, longest: int) -> None:
    layer = Layer(Lab(lane), shape)
    lab = layer.lab
    runs, n_slots = random_runs(layer, n_single, n_long, longest)
    batch = StepRows(lab, runs, sum(run.n for run in runs) + 3)
    xbc = padded(lab, len(batch.rows), batch.n_tokens, shape.channels)
    conv_state, state = layer.states_before(runs, n_slots)
    rings, before = conv_state.array.copy(), state.array.copy()
    out = layer.scan(batch, lab.input(xbc), conv_state, state, n_z=int(lab.rng.integers(1, 9)))
    first = 0
    for run in runs:
        start = f64(before[run.slot]) if run.pos else np.zeros(before.shape[1:])
        part = slice(first, first := first + run.n)
        dt = layer.dt(run.sequence)[run.pos :]
        want, want_state, scale = scan(shape, f64(xbc[part]), dt, f64(layer.a), f64(layer.d), start)
        assert_close(out.array[part].reshape(want.shape), want, 1e-6, scale)
        assert_close(state.array[run.slot_out], want_state, 1e-6, state_scales(want_state))
    assert_untouched(out.array[batch.n_tokens :])
    assert_untouched_slots(state.array, before, runs)
    assert_same_bits(conv_state.array, layer.rings_after(rings, runs))


@every_lane
@every_shape
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e6])
def test_mamba2_norm(lane: str, shape: Shape, scale: float) -> None:
    lab = Lab(lane)
    layer = Layer(lab, shape, 3)
    o = padded(lab, 5, 3, shape.d_inner, scale=scale)
    out = layer.norm(StepRows(lab, [Run(0, 0, 3)], 5), lab.input(o))
    z = f64(layer.sequences[0][:, : shape.d_inner])
    assert_close(out.array[:3], grouped_norm(shape, f64(o[:3]), z, f64(layer.norm_w)), 1e-6)
    assert_untouched(out.array[3:])


# ---- sequences: the same in whatever steps -----------------------------------------------------------------------


@every_lane
@every_shape
@pytest.mark.parametrize("threads", [32, 0, 1024], ids=["32 threads", "as launched", "1024 threads"])
def test_a_chunk_and_then_token_by_token(lane: str, shape: Shape, threads: int) -> None:
    layer = Layer(Lab(lane), shape, 28)
    if threads > layer.lab.device.limits(f"mamba2_step_{shape.state_class}")[0]:
        pytest.skip("more threads than this kernel may have on this device")
    conv_state, state = layer.poisoned()
    parts = [layer.chunk(StepRows(layer.lab, [Run(0, 0, 19)], 24), conv_state, state)]
    parts += [layer.step(StepRows(layer.lab, [Run(0, pos)]), conv_state, state, threads) for pos in range(19, 28)]
    check_end(layer, 0, np.concatenate(parts), conv_state.array[0], state.array[0])


@every_lane
@every_shape
def test_sequences_side_by_side_in_slots(lane: str, shape: Shape) -> None:
    """Runs of several sequences, in place and moved; forks read one slot and write others."""
    check_side_by_side(Layer(Lab(lane), shape, 9, 21, 14, 3))


@every_lane
@pytest.mark.parametrize("kernel", ["step", "chunk"])
def test_an_empty_step_changes_nothing(lane: str, kernel: str) -> None:
    check_empty_step(Layer(Lab(lane), SHAPES[2], 9), kernel)


@every_lane
@pytest.mark.parametrize("dt_scale", [30.0, 1e4])
def test_extreme_steps_of_time(lane: str, dt_scale: float) -> None:
    """Heads that forget all, and heads that keep all and take up nothing."""
    layer = Layer(Lab(lane), SHAPES[1], 20, dt_scale=dt_scale)
    conv_state, state = layer.poisoned()
    parts = [layer.run([Run(0, 0, 17)], conv_state, state)]
    parts += [layer.run([Run(0, pos)], conv_state, state) for pos in range(17, 20)]
    want, want_state, scales = layer.expected()
    assert_close(np.concatenate(parts), want, 1e-5, scales)
    assert_close(state.array[0], want_state, 1e-5, state_scales(want_state))
