"""The arg max kernels against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from support.kernel_lab import Guarded, Lab, every_lane, tiles
from support.kernels.rows import F32


def argmax(logits: F32) -> int:
    """Returns the lowest id among the largest logits; -1 if one is not finite."""
    return int(np.argmax(logits)) if np.isfinite(logits).all() else -1


def run_argmax(lab: Lab, logits: F32, n_part: int | None = None, n_chosen: int = 0) -> int:
    """Runs both kernels; returns the arg max."""
    shapes = lab.core.shapes()
    threads = shapes["ARGMAX_THREADS"]
    n_part = n_part or min(tiles(len(logits), shapes["ARGMAX_COLUMNS"]), threads)
    value, ids = lab.output(n_part), lab.output(n_part, dtype=np.int32, align=4)
    params = {"n": len(logits), "n_part": n_part}
    first = [lab.input(logits, align=4), value, ids]
    lab.run("argmax_partial", params, "ArgmaxParams", first, (n_part,), threads)
    return run_argmax_final(lab, value, ids, n_chosen)


def run_argmax_final(lab: Lab, value: Guarded, ids: Guarded, n_chosen: int = 0) -> int:
    """Runs argmax_final after a step of 3 rows; returns the arg max, and checks the step buffer for the next step."""
    step, tokens = lab.step(3, 7, writable=True), lab.in_out(np.arange(5, dtype=np.int32), align=4)
    step.array["n_chosen"], step.array["chosen"] = n_chosen, -1
    params = {"n": 10**6, "n_part": len(value.array)}
    bindings, threads = [step, tokens, value, ids], lab.core.shapes()["ARGMAX_THREADS"]
    lab.run("argmax_final", params, "ArgmaxParams", bindings, (1,), threads)
    written = step.array[0]
    best = int(tokens.array[0])
    assert list(tokens.array[1:]) == [1, 2, 3, 4]
    assert [written[name] for name in ("n_tokens", "pos", "n_chosen")] == [1, 10, n_chosen + 1]
    assert not written["reserved"].any()
    assert list(written["chosen"][:, 0]) == [best if i == n_chosen % 4 else -1 for i in range(4)]
    assert np.all(written["chosen"][:, 1:] == -1)
    return best


@every_lane
@pytest.mark.parametrize("n", [1, 2, 31, 257, 4096, 4097, 20_011])
def test_argmax(lane: str, n: int) -> None:
    lab = Lab(lane)
    for n_chosen, n_part in enumerate((None, 1, 3, None, 2)):
        logits = lab.normal(n)
        assert run_argmax(lab, logits, n_part, n_chosen) == argmax(logits)


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
        assert run_argmax_final(lab, lab.input(value), lab.input(ids, align=4)) == want
        assert run_argmax_final(lab, lab.input(np.zeros_like(value)), lab.input(ids, align=4)) == 0


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
