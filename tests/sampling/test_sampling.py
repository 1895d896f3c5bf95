"""Sampling against plain float64 definitions, and from candidates against all logits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zincmetal
from support.reference_models import reference_models
from support.sampling_definitions import INF, distribution, excess, probabilities, softmax
from zincmetal.errors import DeviceError, UsageError
from zincmetal.sampling.logits import N_CANDIDATES, Adjusted, StepLogits
from zincmetal.sampling.params import SamplingParams
from zincmetal.sampling.ranking import Ranking, Totals
from zincmetal.sampling.sampler import Sampler


def draws(logits, history, n, params):
    """Counts how often each token is drawn in ``n`` draws."""
    sampler, step = Sampler(params), StepLogits(logits)
    return np.bincount([sampler.sample(step, history) for _ in range(n)], minlength=logits.size)


def check_distribution(logits, history, n=300, **options):
    """Fails unless probabilities and counts of draws follow the definition; returns the probabilities."""
    params = SamplingParams(**options)
    want = distribution(logits, history, params)
    assert np.abs(probabilities(logits, history, params) - want).max() < 1e-9
    counts = draws(logits, history, n, params)
    assert counts[want == 0].sum() == 0
    assert excess(counts, want) < 6
    return want


@pytest.fixture
def logits():
    return (np.random.default_rng().standard_normal(2000) * 3).astype(np.float32)


# ---- every control ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 1, 40, 300, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.5])
def test_top_k_top_p_min_p(logits, top_k, top_p, min_p):
    check_distribution(logits, [], temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)


@pytest.mark.parametrize("typical_p", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("others", [{}, {"top_k": 50}, {"top_p": 0.7}, {"min_p": 0.2}])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_typical(logits, typical_p, others, scale):
    check_distribution(logits * np.float32(scale), [], temperature=1.0, typical_p=typical_p, **others)


@pytest.mark.parametrize("temperature", [1e-300, 0.01, 0.5, 1.0, 5.0, 1e300])
@pytest.mark.parametrize("filters", [{}, {"top_k": 20}])
def test_temperature(logits, temperature, filters):
    check_distribution(logits, [], temperature=temperature, **filters)


@pytest.mark.parametrize(
    "options",
    [
        {"repeat_penalty": 1.5},
        {"repeat_penalty": 0.8},
        {"presence_penalty": 2.0},
        {"presence_penalty": -2.0},
        {"frequency_penalty": 1.5},
        {"frequency_penalty": -0.5},
        {"repeat_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repeat_last_n": 7},
        {"repeat_penalty": 5.0, "repeat_last_n": 0},
        {"logit_bias": {3: 9.0, 5: -2.0, 7: -INF}},
        {"logit_bias": {3: 9.0}, "presence_penalty": 3.0, "repeat_penalty": 1.1},
    ],
)
@pytest.mark.parametrize("filters", [{}, {"top_k": 30, "top_p": 0.9}, {"min_p": 0.05}, {"typical_p": 0.6}])
def test_penalties_and_bias(logits, options, filters):
    best = np.argsort(-logits)
    logits[3], logits[11] = logits.max(), logits.max()  # so that a control of one token changes the result
    history = [int(t) for t in (*best[:5], 3, *best[1:4], *best[2:3], 9, 9) if t != 11]
    want = check_distribution(logits, history, temperature=0.9, **options, **filters)
    plain = distribution(logits, history, SamplingParams(temperature=0.9, **filters))
    assert np.abs(want - plain).max() > 1e-3 or options.get("repeat_last_n") == 0, "the control had no effect"


def test_penalties_look_back_as_far_as_asked():
    """Token 0 is best and stands two tokens back: only a window of two penalises it below token 1."""
    logits = np.array([1.0, 0.9, -5.0], np.float32)
    for control in ({"repeat_penalty": 2.0}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}):
        for last_n, expected in ((0, 0), (1, 0), (2, 1), (10**9, 1)):
            assert Sampler(SamplingParams(**control, repeat_last_n=last_n)).sample(logits, [0, 2]) == expected


def test_processors_see_ids_and_logits_and_come_first(logits):
    seen = []

    def forbid_odd(ids, x):
        seen.append((list(ids), x.copy()))
        x[1::2] = -np.inf
        return x

    def double(ids, x):
        return x * 2

    want = check_distribution(
        logits, [4, 8], 50, temperature=1.0, top_k=9, logits_processors=[forbid_odd, double], presence_penalty=1.0
    )
    assert seen[0][0] == [4, 8]
    assert (seen[0][1] == logits).all()
    assert want[1::2].sum() == 0


def test_greedy_takes_the_best_whatever_the_filters(logits):
    best = int(logits.argmax())
    for filters in ({}, {"top_k": 5}, {"typical_p": 0.01}, {"top_p": 0.1, "min_p": 0.9}):
        assert Sampler(SamplingParams(repeat_penalty=1.01, **filters)).sample(logits, []) == best
        assert Sampler(SamplingParams(**filters)).params.greedy
    assert not SamplingParams(logit_bias={1: 1.0}).greedy
    assert not SamplingParams(logits_processors=[lambda ids, x: x]).greedy
    assert Sampler(SamplingParams(logit_bias={best: -INF})).sample(logits, []) == int(np.argsort(-logits)[1])


# ---- few logits or all --------------------------------------------------------------------------------------


class Fewer(StepLogits):
    """The same logits, with only so many candidates."""

    n_candidates = N_CANDIDATES

    @classmethod
    def with_candidates(cls, logits, n):
        step = cls(logits)
        step.n_candidates = n
        return step

    def candidates(self):
        r = super().candidates()
        if r.ids.size <= self.n_candidates:
            return r
        n = self.n_candidates
        return Ranking(r.ids[:n], r.logits[:n], float(r.logits[n - 1]), r.known)


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.sampled_from([1, 2, 40, 256, 257, 900, 3000]))
    x = rng.standard_normal(n) * draw(st.sampled_from([0.01, 1.0, 3.0, 10.0]))
    if draw(st.booleans()):
        x = np.round(x)  # many equal ones
    history = rng.choice(np.concatenate([rng.integers(0, n, 5), np.argsort(-x)[:30]]), 12).tolist()
    biased = rng.choice(np.concatenate([rng.integers(0, n, 5), np.argsort(-x)[:300]]), draw(st.integers(0, 60)))
    biases = draw(st.sampled_from([[-INF], [-3.0, 3.0], [-INF, 30.0], [0.5]]))
    pick = st.sampled_from
    options = {
        "temperature": draw(pick([0.0, 0.3, 0.9, 1.0, 2.0])),
        "top_k": draw(pick([0, 0, 1, 5, 200, 256, 257, 1000])),
        "top_p": draw(pick([1.0, 1.0, 0.999, 0.9, 0.5, 0.01])),
        "min_p": draw(pick([0.0, 0.0, 0.001, 0.1, 1.0])),
        "typical_p": draw(pick([1.0, 1.0, 0.2, 0.9])),
        "repeat_penalty": draw(pick([1.0, 1.3, 0.7])),
        "presence_penalty": draw(pick([0.0, 0.7, -0.7])),
        "frequency_penalty": draw(pick([0.0, 0.4])),
        "logit_bias": {int(t): float(rng.choice(biases)) for t in biased} if n > 300 else {},
        "seed": draw(st.integers(0, 2**64)),
    }
    return x.astype(np.float32), history, options


def tokens_of(step, history, options, n=3):
    """Returns the first tokens of a sequence whose logits stay the same."""
    sampler, out = Sampler(SamplingParams(**options)), []
    for _ in range(n):
        out.append(sampler.sample(step, [*history, *out]))
    return out


@settings(max_examples=300, deadline=None)
@given(cases(), st.integers(1, N_CANDIDATES), st.sampled_from([10, 300, 8192]))
def test_any_number_of_candidates_gives_the_same_tokens(case, n_candidates, wider):
    """With one candidate nearly every step reads all logits; the tokens must be the same."""
    logits, history, options = case
    want = tokens_of(StepLogits(logits), history, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zincmetal.sampling.logits.WIDER", wider)
        for n in (1, n_candidates):
            assert tokens_of(Fewer.with_candidates(logits, n), history, options) == want


def test_rankings_agree_as_far_as_they_go(logits):
    """Also if changed tokens enter or leave, and if they tie with tokens that are no candidates."""
    logits = np.round(logits)
    order = np.argsort(-logits, kind="stable")
    ids = np.sort(np.concatenate([order[:5], order[250:262], order[-5:]]))
    floor = logits[order[255]]
    for values in (np.full(ids.size, floor, np.float64), np.full(ids.size, -INF), logits[ids].astype(np.float64) + 1):
        whole = np.array(logits, np.float64)
        whole[ids] = values
        want = [t for t in np.argsort(-whole, kind="stable") if whole[t] > -INF]
        step = Fewer.with_candidates(logits, 256)
        lengths = []
        for ranking in Adjusted(step, ids, step.at(ids), values).rankings():
            assert ranking.ids.tolist() == want[: ranking.ids.size]
            assert (ranking.logits == whole[ranking.ids]).all()
            assert ranking.whole == (ranking.ids.size == len(want))
            assert all(whole[t] <= ranking.floor for t in want[ranking.ids.size :])
            lengths.append(ranking.ids.size)
        assert lengths[0] > 200
        assert all(a < b for a, b in pairwise(lengths))


def test_totals_follow_the_changed_tokens(logits):
    best = np.sort(np.argsort(-logits)[:3])
    for values in (logits[best] + 2.0, logits[best] - 5.0, np.array([-INF, 0.0, 1.0])):
        values, x = values.astype(np.float64), logits.astype(np.float64)
        x[best] = values
        probs = softmax(x)
        entropy = -(probs[probs > 0] * np.log(probs[probs > 0])).sum()
        step = StepLogits(logits)
        totals = next(Adjusted(step, best, step.at(best), values).rankings()).known
        assert totals.entropy == pytest.approx(entropy, rel=1e-9)
        assert totals.log_sum_exp == pytest.approx(np.log(np.exp(x).sum()), rel=1e-9)


def test_totals_that_the_changed_tokens_took_with_them_are_not_guessed():
    """If the best token had all but 1e-9 of the probability, float32 sums say nothing of the rest."""
    logits = np.zeros(3000, np.float32)
    logits[7] = 40
    step = StepLogits(logits)
    assert next(Adjusted(step, np.array([7]), np.array([40.0]), np.array([-INF])).rankings()).known is None
    check_distribution(logits, [], 500, temperature=1.0, top_p=0.5, logit_bias={7: -INF})


def test_totals_of_float64():
    x = np.sort(np.random.default_rng().standard_normal(500) * 4)[::-1]
    probs = softmax(x)
    assert Totals.of(x).entropy == pytest.approx(-(probs * np.log(probs)).sum(), rel=1e-12)


# ---- seeds, errors ------------------------------------------------------------------------------------------


def test_seeds(logits):
    def draw(seed):
        sampler = Sampler(SamplingParams(1.0, seed=seed))
        return [sampler.sample(logits, []) for _ in range(50)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("share", [1, 8])
def test_logits_that_are_no_numbers(odd, share):
    logits = np.zeros(8, np.float32)
    logits[:share] = odd
    for params in (SamplingParams(1.0), SamplingParams(1.0, top_k=2), SamplingParams(0.0, repeat_penalty=1.1)):
        with pytest.raises(DeviceError, match=f"{share} of the model's logits are not finite"):
            Sampler(params).sample(logits, [1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}])
def test_no_token_left(temperature, filters):
    logits = np.zeros(8, np.float32)
    for forbid in (
        {"logit_bias": dict.fromkeys(range(8), -INF)},
        {"logits_processors": [lambda ids, x: np.full_like(x, -np.inf)]},
    ):
        with pytest.raises(UsageError, match="no token is left to choose"):
            Sampler(SamplingParams(temperature, **filters, **forbid)).sample(logits, [])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "NoneType|shape"),
        ("text", "str"),
        (np.zeros(7), r"shape \(7,\), not \(8,\)"),
        (np.full(8, np.nan), "NaN"),
        (np.full(8, np.inf), r"\+inf"),
    ],
)
def test_what_a_processor_may_return(result, message):
    sampler = Sampler(SamplingParams(1.0, logits_processors=[lambda ids, x: x, lambda ids, x: result]))
    with pytest.raises(UsageError, match=rf"logits_processors\[1\] .*({message})"):
        sampler.sample(np.zeros(8, np.float32), [])


def test_extreme_numbers_stay_numbers():
    logits = np.array([3e38, 1.0, -3e38, 0.0], np.float32)
    for options in (
        {"repeat_penalty": 1e308},
        {"repeat_penalty": 1e-308},
        {"presence_penalty": -1e308, "logit_bias": {0: 1e308, 2: 1e308}},
        {"frequency_penalty": 1e308},
    ):
        for filters in ({}, {"top_p": 0.9}, {"typical_p": 0.5}, {"top_k": 3, "min_p": 1e-300}):
            with np.errstate(invalid="raise", divide="raise"):
                token = Sampler(SamplingParams(1.0, **options, **filters)).sample(logits, [0, 1, 2, 2])
            assert 0 <= token < 4


def test_a_bias_for_no_token_of_the_model():
    params = SamplingParams(logit_bias={99: 1.0, 100: 1.0})
    params.check_vocabulary(101)
    with pytest.raises(UsageError, match="logit_bias: token id 100 is outside the vocabulary of 100"):
        params.check_vocabulary(100)


# ---- a model ------------------------------------------------------------------------------------------------

CONTROLS = [
    {"top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"typical_p": 0.8},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.01, "repeat_penalty": 1.2},
    {
        "top_p": 0.8,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": {7: 2.0, 9: -INF},
    },
    {"repeat_penalty": 1.3, "temperature": 0.0},
]


@pytest.mark.parametrize("lane", ["msl", "native"])
@pytest.mark.parametrize("path", reference_models("llama", "qwen3")[:2], ids=lambda p: p.stem)
def test_a_model_samples_on_the_device_as_on_the_host(path, lane, monkeypatch):
    """A processor that changes nothing makes the host draw, from all logits."""
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0" if lane == "msl" else "1")
    n = 6 if lane == "msl" else 24
    with zincmetal.load(path, device="cpu", context=64) as model:
        for control in CONTROLS if lane == "native" else CONTROLS[4:6]:
            options = {"temperature": 1.5, "seed": 5, **control}
            runs = [
                model.generate([5, 6, 7], max_tokens=n, **options, **extra).tokens
                for extra in ({}, {}, {"logits_processors": [lambda ids, x: x]})
            ]
            assert runs[0] == runs[1] == runs[2]
            assert 9 not in runs[0] or 9 not in control.get("logit_bias", {})


def test_a_bias_outside_the_vocabulary_is_refused_before_anything_runs():
    with zincmetal.load(reference_models("llama")[0], device="cpu", context=64) as model:
        with pytest.raises(UsageError, match=r"logit_bias: token id 512 is outside the vocabulary of 512"):
            model.stream_generate([1], logit_bias={512: 1.0})
        forced = model.generate([1, 2], max_tokens=3, logit_bias={77: 1000.0})
        assert forced.tokens == [77] * 3
