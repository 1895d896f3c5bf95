"""The kernels that end a plan, the cap of logits and their arg max, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, every_lane, tiles
from support.kernels.rows import F32


def argmax(logits: F32) -> int:
    """Returns the lowest id among the largest logits; -1 if one is not finite."""
    return int(np.argmax(logits)) if np.isfinite(logits).all() else -1


def run_argmax(lab: Lab, logits: F32, n_part: int | None = None, number: int = 0) -> int:
    """Runs both kernels for one row of logits; returns the arg max."""
    return run_rows(lab, logits[None], n_part, number)[0]


def run_rows(lab: Lab, logits: F32, n_part: int | None = None, number: int = 0, outs: int | None = None) -> list[int]:
    """Runs both kernels for rows of logits [O, n], of which ``outs`` are real; returns the arg max of these."""
    shapes, (rows, n) = lab.core.shapes(), logits.shape
    threads = shapes["ARGMAX_THREADS"]
    n_part = n_part or min(tiles(n, shapes["ARGMAX_COLUMNS"]), threads)
    value, ids = lab.output(rows, n_part), lab.output(rows, n_part, dtype=np.int32, align=4)
    params, outs = {"n": n, "n_part": n_part}, rows if outs is None else outs
    first = [lab.step(rows, outs), lab.input(logits, align=4), value, ids]
    lab.run("argmax_partial", params, "ArgmaxParams", first, (n_part, rows), threads)
    for part in (value, ids):
        assert_untouched(part.array[outs:])
    return run_argmax_final(lab, value, ids, number, outs)


def run_argmax_final(lab: Lab, value: Guarded, ids: Guarded, number: int = 0, outs: int | None = None) -> list[int]:
    """Runs argmax_final over parts [O, n_part]; returns the arg max of each output, and checks both places of it."""
    shapes, (rows, n_part) = lab.core.shapes(), value.array.shape
    outs = rows if outs is None else outs
    step = lab.step(rows, outs)
    step.array["number"] = number
    step = lab.input(step.array)
    chosen = lab.output(rows, dtype=np.int32, align=4)
    results = lab.output(shapes["STEP_RING"], shapes["MAX_OUT"], dtype=lab.core.params_dtype("Choice"))
    params, threads = {"n": 10**6, "n_part": n_part}, shapes["ARGMAX_THREADS"]
    lab.run("argmax_final", params, "ArgmaxParams", [step, value, ids, chosen, results], (rows,), threads)
    place = number % shapes["STEP_RING"]
    written = results.array[place, :outs]
    best = chosen.array[:outs].tolist()
    assert written["id"].tolist() == best
    assert written["n_not_finite"].tolist() == [int(id == -1) for id in best]
    assert not written["logprob"].any()
    assert not written["flags"].any()
    assert_untouched(chosen.array[outs:])
    assert_untouched(results.array[place, outs:])
    assert_untouched(np.delete(results.array, place, axis=0))
    return best


@every_lane
@pytest.mark.parametrize("number", [0, 6, 2**32 - 1])
def test_argmax_of_rows(lane: str, number: int) -> None:
    """Each output as if it were alone. Rows past the outputs are not touched."""
    lab = Lab(lane)
    logits = lab.normal(7, 5001)
    logits[2] = np.nan
    logits[4, [17, 4000]] = 9.5
    got = run_rows(lab, logits, number=number, outs=6)
    assert got == [argmax(row) for row in logits[:6]]


@every_lane
@pytest.mark.parametrize("n", [1, 2, 31, 257, 4096, 4097, 20_011])
def test_argmax(lane: str, n: int) -> None:
    lab = Lab(lane)
    for number, n_part in enumerate((None, 1, 3, None, 2)):
        logits = lab.normal(n)
        assert run_argmax(lab, logits, n_part, number) == argmax(logits)


@every_lane
def test_argmax_takes_the_lowest_of_equals(lane: str) -> None:
    lab = Lab(lane)
    logits = lab.normal(9000)
    winners = np.sort(lab.rng.choice(9000, 50, replace=False))
    logits[winners] = 9.5
    assert run_argmax(lab, logits) == winners[0]
    assert run_argmax(lab, logits, 40) == winners[0]


@every_lane
def test_argmax_of_more_parts_than_threads(lane: str) -> None:
    """A thread of argmax_final has several parts, whose ids are in no order."""
    lab = Lab(lane)
    value = lab.rng.integers(-3, 4, 700).astype(np.float32)
    for ids in (lab.rng.permutation(700).astype(np.int32), np.arange(700, dtype=np.int32)[::-1]):
        want = ids[value == value.max()].min()
        assert run_argmax_final(lab, lab.input(value[None]), lab.input(ids[None], align=4)) == [want]
        assert run_argmax_final(lab, lab.input(np.zeros_like(value[None])), lab.input(ids[None], align=4)) == [0]


@every_lane
@pytest.mark.parametrize("value", [1.5, -1.5])
def test_argmax_of_neighbouring_floats(lane: str, value: float) -> None:
    lab = Lab(lane)
    logits = np.full(9000, value, np.float32)
    winner = int(lab.rng.integers(3000, 9000))  # where its thread has seen other logits before
    logits[winner] = np.nextafter(logits[0], np.float32(np.inf))
    for n_part in (None, 1, 40):
        assert run_argmax(lab, logits, n_part) == winner


@every_lane
@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF])
def test_argmax_with_a_logit_that_is_not_finite(lane: str, bits: int) -> None:
    """The id is -1 for an infinity or a NaN of any bits, wherever it stands."""
    lab = Lab(lane)
    logits = lab.normal(3000)
    for where in (0, 1, 1500, 2998, 2999):
        odd = logits.copy()
        odd.view(np.uint32)[where] = bits
        for n_part in (None, 1, 7):
            assert run_argmax(lab, odd, n_part) == -1
    logits.view(np.uint32)[:] = bits
    assert run_argmax(lab, logits) == -1


@every_lane
@pytest.mark.parametrize("n_part", [1, 4, 40])
def test_argmax_of_the_smallest_logits(lane: str, n_part: int) -> None:
    """Parts without logits must not win, however small the logits of the others."""
    lab = Lab(lane)
    lowest = np.finfo(np.float32).min
    assert run_argmax(lab, np.full(9, lowest, np.float32), n_part) == 0
    assert run_argmax(lab, np.array([lowest, lowest, -1e38], np.float32), n_part) == 2


@every_lane
@pytest.mark.parametrize("background", [np.nan, -np.inf, -3e38, -1.0, -0.0])
def test_argmax_of_odd_floats(lane: str, background: float) -> None:
    lab = Lab(lane)
    nan_where = lab.rng.random(9000) < 0.3
    for winner in (np.nan, -np.inf, -1e38, -1e-40, -0.0, 0.0, 1e-40, np.inf):
        logits = np.full(9000, background, np.float32)
        logits[lab.rng.integers(9000, size=3)] = winner
        assert run_argmax(lab, logits) == argmax(logits)
        logits[nan_where] = np.nan
        assert run_argmax(lab, logits) == -1


@every_lane
@pytest.mark.parametrize("cap", [0.0, 30.0])
@pytest.mark.parametrize("n", [1, 255, 1025, 5003])
def test_logits_are_scaled_and_capped(lane: str, n: int, cap: float) -> None:
    """In place, for the outputs of the step. What is not finite stays: the host refuses it."""
    lab, scale, shapes = Lab(lane), 0.7, Lab(lane).core.shapes()
    logits = lab.normal(3, n, scale=40)
    logits[0, : min(n, 4)] = [np.nan, np.inf, -np.inf, 1e30][: min(n, 4)]
    logits[1, 0] = -1e30
    out = lab.in_out(logits, align=4)
    grid, params = (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), 3), {"n": n, "scale": scale, "cap": cap}
    lab.run("cap_logits", params, "LogitParams", [lab.step(3, 2), out], grid, shapes["ELEMENTWISE_THREADS"])
    finite = np.isfinite(logits[:2])
    x = logits[:2].astype(np.float64) * np.float32(scale)
    want = (cap * np.tanh(x / cap) if cap else x)[finite]
    assert_close(out.array[:2][finite], want, 1e-6, np.maximum(np.abs(want), cap or 0))
    assert np.array_equal(out.array[:2][~finite], logits[:2][~finite], equal_nan=True)
    assert np.array_equal(out.array[2], logits[2])
