"""The kernel of short convolutions (kernels/short_conv.metal) against the formula in float64 NumPy.

The state of a slot carries the inputs before a run. Everything that a step must not read is NaN.
"""

from __future__ import annotations

import numpy as np
import pytest

from support.kernel_lab import Lab, assert_close, every_lane
from support.kernels.short_conv import ConvLayer, ConvShape
from support.kernels.states import assert_untouched_slots, random_runs
from support.step_rows import Run

SHAPES = [ConvShape(1, 2), ConvShape(31, 4), ConvShape(128, 3), ConvShape(130, 3), ConvShape(200, 8)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def check_step(layer: ConvLayer, runs: list[Run], n_slots: int, rows: int = 0) -> None:
    """Runs a step of these runs. Compares its outputs and all slots, also those that no run writes."""
    states = layer.states_before(runs, n_slots)
    before = states.array.copy()
    out = layer.run(runs, states, rows)
    want, scales = (np.concatenate(parts) for parts in zip(*(rows_of(layer, run) for run in runs), strict=True))
    assert_close(out, want, 1e-6, scales)
    for run in runs:
        after = layer.state(run.sequence, run.end)
        assert_close(states.array[run.slot_out], after, 1e-6, np.abs(after))
    assert_untouched_slots(states.array, before, runs)


def rows_of(layer: ConvLayer, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Returns the expected outputs of a run's rows, and the scales of their errors."""
    want, scales = layer.expected(run.sequence)
    return want[run.pos : run.end], scales[run.pos : run.end]


@every_lane
@every_shape
@pytest.mark.parametrize(("pos", "n", "rows"), [(0, 1, 1), (3, 1, 5), (0, 40, 40), (1, 9, 9), (5, 33, 40)])
def test_a_run(lane: str, shape: ConvShape, pos: int, n: int, rows: int) -> None:
    check_step(ConvLayer(Lab(lane), shape, pos + n), [Run(0, pos, n)], 1, rows)


@every_lane
@every_shape
@pytest.mark.parametrize(("n_single", "n_long", "longest"), [(7, 0, 0), (0, 6, 3), (5, 6, 19)])
def test_runs_of_many_sequences(lane: str, shape: ConvShape, n_single: int, n_long: int, longest: int) -> None:
    """In place, moved, from a shared slot, and at the start of a sequence; runs begin anywhere in a tile of rows."""
    layer = ConvLayer(Lab(lane), shape)
    runs, n_slots = random_runs(layer, n_single, n_long, longest)
    check_step(layer, runs, n_slots, sum(run.n for run in runs) + 3)


@every_lane
@every_shape
@pytest.mark.parametrize("chunks", [(1,) * 12, (1, 1, 3, 2, 20, 1, 8)], ids=len)
def test_chunks_give_the_whole(lane: str, shape: ConvShape, chunks: tuple[int, ...]) -> None:
    """The states go from step to step, in place, from poison."""
    layer, pos, parts = ConvLayer(Lab(lane), shape, sum(chunks)), 0, []
    states = layer.states_before([], 1)
    for n in chunks:
        parts.append(layer.run([Run(0, pos, n)], states))
        pos += n
    want, scales = layer.expected(0)
    assert_close(np.concatenate(parts), want, 1e-6, scales)


@every_lane
@pytest.mark.parametrize("before", range(1, 9))
def test_what_is_not_finite_stays_in_its_sequence(lane: str, before: int) -> None:
    """A run of NaN before another, wherever that one begins in a tile of rows."""
    layer = ConvLayer(Lab(lane), SHAPES[3], before, 12)
    layer.sequences[0][:] = np.nan
    runs = [Run(0, 0, before, slot_out=0), Run(1, 0, 12, slot_out=1)]
    out = layer.run(runs, layer.states_before(runs, 2))
    want, scales = layer.expected(1)
    assert np.isnan(out[:before]).all()
    assert_close(out[before:], want, 1e-6, scales)


@every_lane
def test_an_empty_step_changes_nothing(lane: str) -> None:
    layer = ConvLayer(Lab(lane), SHAPES[2], 9)
    states = layer.states_before([Run(0, 8)], 1)
    before = states.array.copy()
    assert layer.run([], states, rows=3).size == 0
    assert np.array_equal(states.array, before)
