"""The verdict: a pure function of the figures of both sides."""

from __future__ import annotations

import copy
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zincmetal.errors import UsageError
from zincmetal.measure.verdict import (
    LEAST_GAIN,
    LEAST_RUNS,
    LOSS,
    RULE,
    SAME,
    WIN,
    Figure,
    Outputs,
    decide,
    figures,
    outputs,
)

SAME_OUTPUTS = Outputs(True)
runs = st.lists(st.floats(0.1, 1e5), min_size=LEAST_RUNS, max_size=9).map(tuple)
sides = st.builds(Figure, st.just("f"), runs, runs, st.booleans())
some = st.lists(sides, max_size=3)
whole_model = st.lists(sides, min_size=1, max_size=3)


def swapped(figure: Figure) -> Figure:
    return Figure(figure.name, figure.b, figure.a, figure.higher)


def figure(a: float, b: float, noise: float = 0.0, higher: bool = True) -> Figure:
    return Figure("f", (a - noise, a, a + noise), (b - noise, b, b + noise), higher)


# ---- one figure -------------------------------------------------------------------------------------------------


@given(sides)
def test_a_win_of_one_side_is_the_loss_of_the_other(of):
    opposite = {WIN: LOSS, LOSS: WIN, SAME: SAME}
    assert swapped(of).judged == opposite[of.judged]


@given(runs, st.booleans())
def test_a_side_neither_wins_nor_loses_against_itself(of, higher):
    assert Figure("f", of, of, higher).judged == SAME


@given(sides, st.randoms())
def test_the_order_of_runs_is_of_no_matter(of, random):
    a, b = list(of.a), list(of.b)
    random.shuffle(a)
    random.shuffle(b)
    assert Figure("f", tuple(a), tuple(b), of.higher).judged == of.judged


@given(sides, st.integers(-8, 8))
def test_the_unit_is_of_no_matter(of, power):
    factor = 2.0**power
    assert Figure("f", *(tuple(x * factor for x in side) for side in (of.a, of.b)), of.higher).judged == of.judged


@given(sides)
def test_a_win_is_beyond_both_noises(of):
    apart = abs(median(of.a) - median(of.b))
    noise = sum((max(side) - min(side)) / 2 for side in (of.a, of.b))
    if of.judged != SAME:
        assert apart > noise
        assert apart > LEAST_GAIN * max(median(of.a), median(of.b))
        assert (of.gain > 0) == (of.judged == WIN)
    else:
        assert apart <= max(noise, LEAST_GAIN * max(median(of.a), median(of.b)))


@given(sides, st.floats(1.0, 10.0))
def test_a_faster_side_never_judges_worse(of, factor):
    """All runs of B better by one amount, which leaves the noise as it is."""
    order = (LOSS, SAME, WIN)
    step = factor if of.higher else -factor
    better = Figure("f", of.a, tuple(x + step for x in of.b), of.higher)
    if min(better.b) > 0:
        assert order.index(better.judged) >= order.index(of.judged)


@pytest.mark.parametrize(
    ("of", "judged"),
    [
        (figure(100, 104, noise=1), WIN),
        (figure(100, 101.9, noise=1), SAME),
        (figure(100, 96, noise=1), LOSS),
        (figure(100, 100.4), SAME),
        (figure(100, 100.6), WIN),
        (figure(100, 96, noise=1, higher=False), WIN),
        (Figure("f", (36.3, 36.5, 36.6), (38.1, 38.1, 38.2)), WIN),  # K/V of attention layers alone
        (Figure("f", (38.08, 38.11, 38.15), (38.03, 38.10, 38.16)), SAME),  # wider threadgroups
    ],
)
def test_figures(of, judged):
    assert of.judged == judged


# ---- the whole --------------------------------------------------------------------------------------------------


@given(some, whole_model)
def test_no_two_sides_are_both_kept(shapes, whole):
    there = decide(shapes, whole, SAME_OUTPUTS)
    back = decide([swapped(f) for f in shapes], [swapped(f) for f in whole], SAME_OUTPUTS)
    assert not (there.keep and back.keep)


@given(some, whole_model, st.floats(0, 10), st.floats(0, 10))
def test_other_outputs_are_never_kept(shapes, whole, nats, error):
    verdict = decide(shapes, whole, Outputs(False, nats), error)
    if verdict.keep:
        assert error > 0
        assert nats <= error
        assert decide(shapes, whole, SAME_OUTPUTS).keep


@given(some, whole_model)
def test_a_loss_anywhere_is_never_kept(shapes, whole):
    verdict = decide(shapes, whole, SAME_OUTPUTS)
    judged = [f.judged for f in (*shapes, *whole)]
    wins = WIN in [f.judged for f in whole] and (not shapes or WIN in [f.judged for f in shapes])
    assert verdict.keep == (LOSS not in judged and wins)


def test_exact_shapes_come_first():
    verdict = decide([figure(100, 100)], [figure(100, 90)], SAME_OUTPUTS)
    assert not verdict.keep
    assert verdict.why.startswith("exact shapes")


def test_a_win_of_a_shape_alone_is_not_kept():
    verdict = decide([figure(10, 5, higher=False)], [figure(100, 100)], SAME_OUTPUTS)
    assert (verdict.word, verdict.why) == ("revert", "the whole model: no win beyond the noise")


def test_a_win_of_both_is_kept_with_its_gain():
    verdict = decide([figure(10, 5, higher=False)], [figure(100, 110)], SAME_OUTPUTS)
    assert (verdict.word, verdict.why) == ("keep", "f +10.0%")


@pytest.mark.parametrize(
    ("shapes", "whole", "said"),
    [
        ([], [], "share no figure of the whole model"),
        ([], [Figure("pp512", (1.0, 2.0), (1.0, 2.0, 3.0))], "pp512 has 2 runs"),
        ([Figure("lm_head", (1.0,), (1.0,))], [figure(1, 1)], "lm_head has 1 runs"),
    ],
)
def test_too_few_figures_are_an_error(shapes, whole, said):
    with pytest.raises(UsageError, match=said):
        decide(shapes, whole, SAME_OUTPUTS)


def test_the_rule_says_its_numbers():
    assert f"{LEAST_GAIN:.1%}" in RULE
    assert "three runs" in RULE
    assert LEAST_RUNS == 3


# ---- from reports -----------------------------------------------------------------------------------------------


def report(speeds, digest="d", logprobs=(-1.0, -2.0), us=None):
    cases = [{"case": "c", "variant": "v", "threads": 64, "samples_us": us, "allowed": True, "swept": False}]
    return {
        "tests": [{"test": "tg8", "samples_ts": list(speeds), "digest": digest}],
        "cases": cases if us else [],
        "logprobs": list(logprobs),
    }


def test_reports_give_the_figures_that_both_have():
    a, b = report([1, 2, 3], us=[5, 5, 5]), report([4, 5, 6], us=[4, 4, 4])
    b["tests"].append({"test": "pp8", "samples_ts": [1], "digest": ""})
    shapes, whole, same = figures(a, b)
    assert [(f.name, f.a, f.b, f.higher) for f in whole] == [("tg8", (1, 2, 3), (4, 5, 6), True)]
    assert [(f.name, f.a, f.b, f.higher) for f in shapes] == [("c v", (5, 5, 5), (4, 4, 4), False)]
    assert same == SAME_OUTPUTS


def test_outputs_of_reports():
    a = report([1, 2, 3])
    assert outputs(a, copy.deepcopy(a)) == Outputs(True, 0.0)
    assert outputs(a, report([1, 2, 3], digest="e")) == Outputs(False, 0.0)
    assert outputs(report([1], digest="varies"), report([1], digest="varies")) == Outputs(False, 0.0)
    assert outputs(a, report([1, 2, 3], logprobs=(-1.0, -2.5))) == Outputs(False, 0.5)
    assert outputs(a, report([1, 2, 3], logprobs=(-1.0,))).nats == float("inf")
    wrong = report([1, 2, 3], us=[1, 1, 1])
    wrong["cases"][0]["allowed"] = False
    assert outputs(a, wrong).nats == float("inf")
    assert not outputs(a, wrong).agree(1e9)
