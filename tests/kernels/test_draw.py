"""The kernels of a draw against the Sampler: the same options, logits, history and seed give the same token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from support.kernel_lab import MSL, Lab, every_lane
from support.kernels.draw import F32, Output, run_draws
from support.sampling_definitions import distribution, excess
from zincmetal.sampling.params import SamplingParams

INF = math.inf
CHOICE_FORBIDDEN = 1

#: Options that are tested alone: every way through the kernels.
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "hot": {"temperature": 1.6},
    "cold": {"temperature": 1e-4},
    "top_k": {"top_k": 40},
    "top_k of hundreds": {"top_k": 300},
    "top_k of thousands": {"top_k": 2500},
    "top_p": {"top_p": 0.95},
    "small top_p": {"top_p": 0.2},
    "no top_p": {"top_p": 0.0},
    "hot top_p": {"top_p": 0.6, "temperature": 3.0},
    "min_p": {"min_p": 0.05},
    "small min_p": {"min_p": 1e-4},
    "min_p of 1": {"min_p": 1.0},
    "typical": {"typical_p": 0.9},
    "small typical": {"typical_p": 0.3},
    "top_k and top_p": {"top_k": 50, "top_p": 0.8, "temperature": 0.7},
    "min_p and top_p": {"min_p": 0.02, "top_p": 0.9},
    "top_k and min_p": {"top_k": 1500, "min_p": 0.01},
    "typical and others": {"typical_p": 0.9, "top_p": 0.9, "min_p": 0.01},
    "all filters": {"top_k": 1000, "typical_p": 0.95, "top_p": 0.95, "min_p": 0.001, "temperature": 1.2},
}
PENALTIES: dict[str, dict[str, Any]] = {
    "none": {},
    "repeat": {"repeat_penalty": 1.3},
    "presence": {"presence_penalty": 1.5},
    "frequency of all": {"frequency_penalty": 0.4, "repeat_last_n": -1},
    "all": {"repeat_penalty": 0.8, "presence_penalty": -0.5, "frequency_penalty": 0.3, "repeat_last_n": 100},
}


def shaped(lab: Lab, shape: str, n: int) -> F32:
    """Makes logits: flat, peaked as a trained model's, with many equals, or with clusters of probable tokens."""
    x = lab.normal(n)
    if shape == "peaked":
        x *= 3
        x[lab.rng.integers(0, n, 12)] += 15 + lab.rng.normal(size=12).astype(np.float32)
    elif shape == "equals":
        x = np.round(x * 2)
    elif shape == "clusters":
        x[: min(n, 300)] += 4
    return x


SHAPES = ("flat", "peaked", "equals", "clusters")


def check(lab: Lab, outputs: Sequence[Output], **plan: Any) -> None:
    """Fails unless the kernels choose as the Sampler does; one of many may differ, where float32 cannot tell."""
    got, want = run_draws(lab, outputs, **plan).ids, [o.reference() for o in outputs]
    differ = [(o.params, a, b) for o, a, b in zip(outputs, got, want, strict=True) if a != b]
    assert len(differ) <= len(outputs) // 20, differ


def cases(lab: Lab, n: int, options: Iterable[dict[str, Any]], shape: str, **more: Any) -> list[Output]:
    """Makes an output of each of these options, with a history of tokens that are probable."""
    outputs = []
    for option in options:
        logits = shaped(lab, shape, n)
        likely = np.argsort(-logits)[:20]
        history = np.where(lab.rng.random(150) < 0.5, lab.rng.choice(likely, 150), lab.rng.integers(0, n, 150))
        length = int(lab.rng.integers(1, 151))
        seed = int(lab.rng.integers(0, 2**63))
        params = SamplingParams(**{"temperature": 0.9, "seed": seed, **option, **more})
        outputs.append(Output(logits, history[:length].tolist(), params))
    return outputs


def sizes(lane: str) -> tuple[int, ...]:
    return (9_001,) if lane == MSL else (9_001, 49_152)


@every_lane
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_every_option(lane: str, shape: str, penalty: str) -> None:
    lab = Lab(lane)
    if lane == MSL and penalty in ("repeat", "presence"):
        pytest.skip("slow, and other penalties go the same way")
    for n in sizes(lane):
        check(lab, cases(lab, n, OPTIONS.values(), shape, **PENALTIES[penalty]))


@every_lane
@pytest.mark.parametrize("n", [1, 2, 31, 33, 70, 512, 4096, 4097])
def test_small_vocabularies(lane: str, n: int) -> None:
    lab = Lab(lane)
    check(lab, cases(lab, n, OPTIONS.values(), "flat", repeat_penalty=1.1))


@every_lane
def test_options_together(lane: str) -> None:
    """Random options, biases and masks; as many outputs as a step can have, and fewer than its plan has."""
    lab = Lab(lane)
    n = 5_000
    pick = lab.rng.choice
    for number, (n_out, rows) in enumerate(((1, 1), (32, 32), (21, 32))):
        outputs = []
        for _ in range(n_out):
            option = {
                "temperature": float(pick([0.0, 0.3, 1.0, 2.0])),
                "top_k": int(pick([0, 0, 1, 20, 700])),
                "top_p": float(pick([1.0, 0.99, 0.5])),
                "min_p": float(pick([0.0, 0.0, 0.1])),
                "typical_p": float(pick([1.0, 1.0, 0.8])),
                **PENALTIES[str(pick(list(PENALTIES)))],
            }
            (o,) = cases(lab, n, [option], str(pick(SHAPES)))
            biased = pick(n, int(pick([0, 1, 300])), replace=False)
            biases = {int(t): float(pick([-INF, -2.0, 3.0])) for t in biased}
            seed = int(lab.rng.integers(2**63))
            o.params = SamplingParams(**{**option, "logit_bias": biases, "seed": seed})
            if pick([False, True]):
                o.allowed = lab.rng.random(n) < pick([0.002, 0.5])
            outputs.append(o)
        check(lab, outputs, rows=rows, number=number + 5)


@every_lane
def test_logits_over_the_whole_range_of_float32(lane: str) -> None:
    lab = Lab(lane)
    for few in ([3e38, -3e38, 0, 1], [3.4e38] * 4, [-3e38, -3e38, -3.4e38, -3.4e38], [1e-39, 0, -1e-39, -0.0]):
        logits = np.repeat(np.array(few, np.float32), 100)
        options = ({}, {"top_p": 0.9999}, {"typical_p": 0.99}, {"min_p": 1e-6}, {"top_k": 350}, {"temperature": 0.0})
        outputs = [
            Output(logits, [1], SamplingParams(**{"temperature": t, "seed": s, **option}))
            for option in options
            for t in (1e-20, 0.7, 2.0)
            for s in range(3)
        ]
        check(lab, outputs)


@every_lane
def test_penalties_and_biases_beyond_float32(lane: str) -> None:
    lab = Lab(lane)
    logits = np.array([3e38, 1.0, -3e38, 0.0], np.float32)
    huge = 1.7e308
    for options in (
        {"repeat_penalty": huge},
        {"repeat_penalty": 1 / huge},
        {"presence_penalty": huge, "frequency_penalty": huge},
        {"presence_penalty": -huge, "frequency_penalty": huge},
        {"presence_penalty": huge, "logit_bias": {0: -huge}},
    ):
        for t in range(4):
            only = {i: -INF for i in range(4) if i != t}
            params = SamplingParams(1.0, **{**options, "logit_bias": {**options.get("logit_bias", {}), **only}})
            assert run_draws(lab, [Output(logits, [0, 1, 2, 2, 3], params)]).ids == [t]


@every_lane
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(lane: str, odd: float) -> None:
    """The output has no token, and the count of such logits; other outputs are as without it."""
    lab = Lab(lane)
    logits = lab.normal(5_000)
    good, wrong = logits.copy(), logits.copy()
    wrong[lab.rng.choice(5_000, 7, replace=False)] = odd
    for option in ({}, {"temperature": 0.0}, {"top_k": 5}, {"presence_penalty": 1.0}, {"logit_bias": {3: -INF}}):
        params = SamplingParams(**{"temperature": 1.0, "seed": 3, **option})
        outputs = [Output(x, [3, 4], params, n_logprobs=3) for x in (good, wrong, good)]
        drawn = run_draws(lab, outputs)
        assert drawn.ids == [outputs[0].reference(), -1, outputs[0].reference()]
        assert drawn.choices["n_not_finite"].tolist() == [0, 7, 0]
        assert drawn.choices["flags"].tolist() == [0, 0, 0]
        assert drawn.logprobs["n"].tolist() == [3, 0, 3]


@every_lane
def test_no_token_left(lane: str) -> None:
    lab = Lab(lane)
    n = 600
    for option in ({}, {"temperature": 0.0}, {"top_k": 5}, {"typical_p": 0.5}, {"top_p": 0.5}):
        params = SamplingParams(**{"temperature": 1.0, **option})
        biases = SamplingParams(**{"temperature": 1.0, **option, "logit_bias": dict.fromkeys(range(n), -INF)})
        outputs = [Output(lab.normal(n), [0], params, np.zeros(n, np.bool_)), Output(lab.normal(n), [0], biases)]
        drawn = run_draws(lab, outputs)
        assert drawn.ids == [-1, -1]
        assert drawn.choices["n_not_finite"].tolist() == [0, 0]
        assert drawn.choices["flags"].tolist() == [CHOICE_FORBIDDEN] * 2


@every_lane
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probabilities(lane: str, shape: str) -> None:
    """Of the drawn token and of the most probable ones, under the logits as they are, whatever is changed."""
    lab = Lab(lane)
    n = 9_001
    options = (
        {},
        {"temperature": 0.0},
        {"top_k": 9},
        {"top_p": 0.9},
        {"presence_penalty": 2.0},
        {"top_k": 30, "logit_bias": {5: 8.0, 7: -INF}, "repeat_penalty": 1.5},
    )
    outputs = cases(lab, n, options, shape)
    outputs[3].allowed = lab.rng.random(n) < 0.5
    for i, o in enumerate(outputs):
        o.n_logprobs = (20, 1, 5, 20, 7, 0)[i]
    drawn = run_draws(lab, outputs)
    for o, choice, found in zip(outputs, drawn.choices, drawn.logprobs, strict=True):
        x = o.logits.astype(np.float64)
        logprobs = x - x.max() - np.log(np.exp(x - x.max()).sum())
        assert choice["logprob"] == pytest.approx(logprobs[choice["id"]], abs=1e-5)
        if not o.n_logprobs:
            continue
        best = np.lexsort((np.arange(n), -x))[: o.n_logprobs]
        assert found["n"] == o.n_logprobs
        assert found["id"][: o.n_logprobs].tolist() == best.tolist()
        assert found["logprob"][: o.n_logprobs] == pytest.approx(logprobs[best], abs=1e-5)


@every_lane
def test_the_same_draw_gives_the_same_bits(lane: str) -> None:
    """Alone, beside others, in another place of the ring."""
    lab = Lab(lane)
    outputs = cases(lab, 5_000, OPTIONS.values(), "flat", presence_penalty=0.5)
    together = run_draws(lab, outputs, number=2)
    for i in range(0, len(outputs), 4):
        alone = run_draws(lab, [outputs[i]], rows=3, number=7)
        assert alone.choices.tobytes() == together.choices[i : i + 1].tobytes()


@every_lane
@pytest.mark.parametrize(
    "option", [{}, {"top_k": 100}, {"top_p": 0.8}, {"typical_p": 0.7}, {"temperature": 1.5}], ids=str
)
def test_the_distribution_over_seeds(lane: str, option: dict[str, Any]) -> None:
    """Chi-square over many seeds, each an output."""
    lab = Lab(lane)
    logits, history = lab.normal(300), [7, 9, 9, 250]
    n, drawn = (192, []) if lane == MSL else (6400, [])
    options = {"temperature": 1.0, "presence_penalty": 0.4, **option}
    for first in range(0, n, 64):
        seeds = range(first, first + 64)
        drawn += run_draws(lab, [Output(logits, history, SamplingParams(seed=s, **options)) for s in seeds]).ids
    want = distribution(logits, history, SamplingParams(**options))
    counts = np.bincount(drawn, minlength=300)
    assert counts[want == 0].sum() == 0
    assert excess(counts, want) < 4
