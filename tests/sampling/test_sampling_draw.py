"""The draw: its distribution; and logits that differ in their last bits nearly always give the same token."""

from __future__ import annotations

import math

import numpy as np
import pytest

import zincmetal
from support.reference_models import reference_models
from support.sampling_definitions import distribution, excess, probabilities
from zincmetal.errors import DeviceError
from zincmetal.sampling.logits import StepLogits
from zincmetal.sampling.noise import MASK, STEP, Noise, NoiseSource, _mix
from zincmetal.sampling.params import SamplingParams
from zincmetal.sampling.ranking import Totals
from zincmetal.sampling.sampler import Sampler

SETTINGS = {
    "nothing": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 40},
    "top_k beyond the candidates": {"top_k": 400},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.7},
    "penalties": {"repeat_penalty": 1.3, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "bias": {"logit_bias": {5: 3.0, 8: -math.inf}},
    "processor": {"logits_processors": [lambda ids, x: x * np.float32(1.3)]},
    "all": {
        "temperature": 0.8,
        "top_k": 100,
        "top_p": 0.95,
        "min_p": 0.02,
        "typical_p": 0.98,
        "repeat_penalty": 1.1,
        "logit_bias": {3: 1.0},
    },
}
every_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


def flat_logits(seed, n=600):
    """Logits so flat that the tokens beyond the 128 most probable have half of the probability."""
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


# ---- the distribution -----------------------------------------------------------------------------------------


@every_setting
def test_the_distribution_is_the_one_of_the_definition(options):
    """Chi-square over 12,000 draws at as many positions. A temperature that is a fifth off would fail."""
    params = SamplingParams(**{"temperature": 1.0, "seed": 11, **options})
    logits, recent = flat_logits(3), [7, 9, 9, 500]
    sampler, step, n = Sampler(params), StepLogits(logits), 12_000
    history = recent * 16  # penalties see the same history at every position
    drawn = [sampler.sample(step, [0] * i + history) for i in range(n)]
    counts = np.bincount(drawn, minlength=logits.size)
    want = distribution(logits, history, params)
    assert counts[want == 0].sum() == 0
    assert excess(counts, want) < 4
    warmer = distribution(logits, history, SamplingParams(**{**options, "temperature": 1.2 * params.temperature}))
    assert excess(counts, warmer) > 4, "the test could not fail"


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_the_distribution_over_seeds(temperature):
    """The first draw of every seed, without filters: improbable tokens are drawn too."""
    logits, n = flat_logits(4, 300), 12_000
    step = StepLogits(logits)
    drawn = [Sampler(SamplingParams(temperature, seed=seed)).sample(step, [1, 2, 3]) for seed in range(n)]
    counts, want = np.bincount(drawn, minlength=300), distribution(logits, [], SamplingParams(temperature))
    assert excess(counts, want) < 4
    others = np.argsort(-logits)[128:]
    assert counts[others].sum() > 1000
    assert excess(counts[others], want[others] / want[others].sum()) < 4
    assert abs(counts[others].sum() - n * want[others].sum()) < 4 * math.sqrt(n / 4)


def test_two_draws_in_a_row_are_independent():
    logits = np.array([0.0, 0.5, 1.0], np.float32)
    want = distribution(logits, [], SamplingParams(1.0))
    for at in ((0, 1), (0, 0)):  # neighbours, and the same position again
        pairs = np.zeros((3, 3))
        for seed in range(6000):
            sampler = Sampler(SamplingParams(1.0, seed=seed))
            first, second = (sampler.sample(logits, [0] * n) for n in at)
            pairs[first, second] += 1
        assert excess(pairs.ravel(), np.outer(want, want).ravel()) < 4


# ---- the noise ------------------------------------------------------------------------------------------------


def test_noise_is_of_splitmix64():
    """The first outputs from state 0 are those of the authors' program."""
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [_mix(STEP * n & MASK) for n in (1, 2, 3)] == first
    uniform = [((x >> 12) + 0.5) / 2**52 for x in first]
    assert Noise(0).of(np.array([1, 2, 3])) == pytest.approx([-math.log(-math.log(u)) for u in uniform], rel=1e-12)


def test_noise_is_a_function_of_seed_position_and_token():
    ids = np.arange(1000)
    noise = NoiseSource(5).at(7).of(ids)
    source = NoiseSource(5)
    for position in (3, 900, 2):
        source.at(position)
    assert (source.at(7).of(ids[::-3]) == noise[::-3]).all()
    others = [NoiseSource(5).at(8), NoiseSource(6).at(7), NoiseSource(5 + 2**64).at(7), source.at(7)]
    for other in others:
        assert (other.of(ids) != noise).all()


@pytest.mark.parametrize("over", ["tokens", "positions", "seeds"])
def test_noise_is_gumbel_distributed(over):
    n = 20_000
    one = np.array([42])
    x = {
        "tokens": lambda: NoiseSource(1).at(0).of(np.arange(n)),
        "positions": lambda: np.array([NoiseSource(1).at(i).of(one)[0] for i in range(n)]),
        "seeds": lambda: np.array([NoiseSource(i).at(0).of(one)[0] for i in range(n)]),
    }[over]()
    uniform = np.sort(np.exp(-np.exp(-x)))
    assert np.abs(uniform - (np.arange(n) + 0.5) / n).max() < 1.7 / math.sqrt(n), "Kolmogorov and Smirnov"
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 4 / math.sqrt(n)


# ---- last bits ------------------------------------------------------------------------------------------------


@every_setting
def test_last_bits_seldom_change_the_token(options):
    """Draws from two distributions differ at least with their total variation's probability; here at most twice it."""
    rng = np.random.default_rng(8)
    changes, distance, n, history = 0, 0.0, 1500, [7, 9, 9, 500]
    for seed in range(n):
        params = SamplingParams(**{"temperature": 1.0, "seed": seed, **options})
        logits = (rng.standard_normal(600) * 3).astype(np.float32)
        other = (logits + rng.standard_normal(600) * 2e-3).astype(np.float32)
        a, b = (Sampler(params).sample(x, history) for x in (logits, other))
        changes += a != b
        p, q = (probabilities(x, history, params) for x in (logits, other))
        distance += np.abs(p - q).sum() / 2
    assert distance < 0.01 * n
    assert changes <= 2 * distance + 4 * math.sqrt(2 * distance)


def test_a_draw_depends_on_the_position_and_not_on_the_draws_before():
    """So a text that is continued from its middle goes on as before."""
    rng = np.random.default_rng(2)
    steps = [(rng.standard_normal(500) * 2).astype(np.float32) for _ in range(30)]

    def text(prompt, until):
        ids, sampler = list(prompt), Sampler(SamplingParams(0.9, top_p=0.9, repeat_penalty=1.1, seed=3))
        while len(ids) < until:
            ids.append(sampler.sample(steps[len(ids)], ids))
        return ids

    whole = text([1, 2], 30)
    assert text(whole[:13], 30) == whole


# ---- numbers --------------------------------------------------------------------------------------------------

EXTREMES = [
    ([3e38, -3e38, 0, 1], [1, 0, 0, 0]),
    ([3e38, 3e38, -3e38, 1], [0.5, 0.5, 0, 0]),
    ([-3e38, -3e38, -3.4e38, -3.4e38], [0.5, 0.5, 0, 0]),
    ([3.4e38] * 4, [0.25] * 4),
    ([1e-45, 0, -1e-45, -0.0], [0.25] * 4),
    ([3.4e38, -3.4e38, -3.4e38, -3.4e38], [1, 0, 0, 0]),
]


@pytest.mark.parametrize(("few", "want"), EXTREMES)
@pytest.mark.parametrize("n", [1, 100])
def test_logits_over_the_whole_range_of_float32(few, want, n):
    """Differences of logits that float32 cannot hold."""
    logits, want = np.repeat(np.array(few, np.float32), n), np.repeat(want, n) / n
    step = StepLogits(logits)
    for options in ({}, {"top_p": 0.9999}, {"typical_p": 1 - 1e-9}, {"min_p": 1e-6}, {"top_k": 350}):
        for temperature in (1e-20, 0.7, 1.0, 2.0):
            with np.errstate(all="raise", under="ignore"):
                sampler = Sampler(SamplingParams(temperature, seed=1, **options))
                drawn = [sampler.sample(step, []) for _ in range(60)]
                assert want[drawn].min() > 0
                assert len(set(drawn)) > 1 or max(want) == 1


def test_one_token_alone():
    """In every setting, a distribution of one token gives that token."""
    for x in (0.0, 3.4e38, -3.4e38):
        for options in SETTINGS.values():
            options = {k: v for k, v in options.items() if k not in ("logit_bias", "logits_processors")}
            params = SamplingParams(**{"temperature": 1.0, **options})
            assert Sampler(params).sample(np.array([x], np.float32), [0, 0]) == 0


def test_penalties_beyond_all_numbers_forbid_nothing():
    logits = np.array([3e38, 1.0, -3e38, 0.0], np.float32)
    huge = 1.7e308
    for options in (
        {"repeat_penalty": huge},
        {"repeat_penalty": huge, "frequency_penalty": -huge},
        {"presence_penalty": huge, "frequency_penalty": huge},
        {"presence_penalty": -huge, "frequency_penalty": huge},
        {"presence_penalty": huge, "logit_bias": {0: -huge}},
    ):
        for t in range(4):
            only = {i: -math.inf for i in range(4) if i != t}
            params = SamplingParams(1.0, **{**options, "logit_bias": {**options.get("logit_bias", {}), **only}})
            with np.errstate(all="raise", under="ignore"):
                assert Sampler(params).sample(logits, [0, 1, 2, 2, 3]) == t


def test_totals_hold_near_the_end_of_the_range():
    x = np.array([3e38, 3e38, 2e38])
    assert Totals.of(x).entropy == pytest.approx(math.log(2))
    assert np.exp(-Totals.of(x).surprisal(x)) == pytest.approx([0.5, 0.5, 0])


# ---- models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "repeat_penalty": 1.2}], ids=str)
def test_a_call_that_is_repeated_gives_the_same_text(smollm2, options):
    """The first call computes the prompt; the second finds all of it but the last token."""
    prompt = "Once upon a time in a small village by the sea, there lived an old fisherman who"
    with zincmetal.load(smollm2, device="cpu", context=128) as model:
        differ = 0
        for seed in range(6):
            model.reset()
            options = {"max_tokens": 50, "temperature": 1.0, "seed": seed, **options}
            first, second = (model.generate(prompt, **options).tokens for _ in range(2))
            differ += first != second
    assert differ == 0


QWEN2 = reference_models("qwen2")[0]


def damaged(folder, tensor, at, value):
    """Writes a small model with this value in a float tensor, or as the scale of a row's first block."""
    with zincmetal.gguf.open(QWEN2) as file:
        info = file.tensors[tensor]
        row = info.nbytes // info.shape[0] if len(info.shape) > 1 else 0
    image = bytearray(QWEN2.read_bytes())
    if row:
        image[info.offset + at * row : info.offset + at * row + 2] = np.float16(value).tobytes()
    else:
        image[info.offset + 4 * at : info.offset + 4 * at + 4] = np.float32(value).tobytes()
    path = folder / "damaged.gguf"
    path.write_bytes(image)
    return path


@pytest.mark.parametrize("lane", ["msl", "native"])
@pytest.mark.parametrize(
    ("tensor", "at", "value"),
    [
        ("output_norm.weight", 0, math.inf),
        ("output_norm.weight", 3, math.nan),
        ("output_norm.weight", 5, -3e38),
        ("output.weight", 0, math.inf),
        ("output.weight", 40, math.nan),
        ("output.weight", 77, -math.inf),
    ],
)
def test_logits_that_are_not_finite_end_a_text_in_every_setting(tmp_path, monkeypatch, lane, tensor, at, value):
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0" if lane == "msl" else "1")
    with zincmetal.load(damaged(tmp_path, tensor, at, value), device="cpu", context=32) as model:
        for options in ({}, {"temperature": 1.0}, {"repeat_penalty": 1.1}, {"logits_processors": [lambda ids, x: x]}):
            for prompt in ([1], [1, 2, 3]):
                with pytest.raises(DeviceError, match="the model's logits are"):
                    model.generate(prompt, max_tokens=4, **options)


def test_a_text_goes_on_from_its_middle_as_it_did():
    with zincmetal.load(reference_models("llama")[0], device="cpu", context=64) as model:
        options = {"temperature": 1.0, "seed": 4, "top_k": 50}
        whole = [5, 6, 7, *model.generate([5, 6, 7], max_tokens=24, **options).tokens]
        rest = model.generate(whole[:12], max_tokens=15, **options).tokens
    assert whole[12:] == rest
