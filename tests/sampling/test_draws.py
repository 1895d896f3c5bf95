"""Records of draws for the device."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zincmetal.device import backend
from zincmetal.sampling.draws import (
    EVERY_TOKEN,
    bias_records,
    draw_record,
    draw_records,
    draw_values,
    log_probabilities,
    mask_words,
    noise_key,
    top_log_probabilities,
    unpacked,
)
from zincmetal.sampling.noise import Noise, NoiseSource
from zincmetal.sampling.params import SamplingParams

DTYPE = backend.load("cpu").params_dtype
INF = math.inf
FLOAT = np.finfo(np.float32)


def record(position=9, key=0, **options):
    params = {name: options.pop(name) for name in list(options) if name in SamplingParams.__dataclass_fields__}
    return draw_record(DTYPE("Draw"), SamplingParams(**params), position, key, **options)[0]


def test_a_record_has_the_options():
    options = {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "min_p": 0.25, "typical_p": 0.5, "repeat_penalty": 2.0}
    options |= {"presence_penalty": 1.5, "frequency_penalty": -0.5}
    draw = record(pages=12, bias_at=5, mask_at=0, n_logprobs=3, logit_bias={4: 1.0, 2: 3.0}, **options)
    assert {name: draw[name] for name in options} == options
    found = {
        name: int(draw[name]) for name in ("pos", "pages", "bias_at", "n_bias", "mask_at", "has_mask", "n_logprobs")
    }
    assert found == {"pos": 9, "pages": 12, "bias_at": 5, "n_bias": 2, "mask_at": 0, "has_mask": 1, "n_logprobs": 3}
    assert record()["has_mask"] == 0


def test_the_penalties_window():
    for last, want in ((64, 64), (-1, EVERY_TOKEN), (10**12, EVERY_TOKEN), (0, 0)):
        assert record(presence_penalty=1.0, repeat_last_n=last)["repeat_last_n"] == want
    assert record(repeat_last_n=64)["repeat_last_n"] == 0, "no penalty is on"


def test_numbers_beyond_float32_stay_finite_and_keep_their_meaning():
    draw = record(temperature=1e-200, repeat_penalty=1e-300, presence_penalty=1e300, frequency_penalty=-1e300)
    assert 0 < draw["temperature"] < 1e-20
    assert draw["repeat_penalty"] > 0
    assert (draw["presence_penalty"], draw["frequency_penalty"]) == (FLOAT.max, FLOAT.min)
    assert record(temperature=1e300)["temperature"] == FLOAT.max
    assert record(top_k=-1)["top_k"] == record(top_k=0)["top_k"] == 0
    assert record(top_k=2**60)["top_k"] == EVERY_TOKEN


def test_the_key_is_that_of_the_sampler():
    """A Sampler that draws after position 9 has a history of ten tokens."""
    ids = np.arange(50)
    key = noise_key(NoiseSource(5), 9)
    draw = record(key=key)
    assert (Noise(int(draw["key_high"]) << 32 | int(draw["key_low"])).of(ids) == NoiseSource(5).at(10).of(ids)).all()
    assert noise_key(NoiseSource(5), 8) != key


def test_biases_rise_by_id():
    biases = bias_records(DTYPE("Bias"), SamplingParams(logit_bias={9: 1.5, 3: -INF, 5: 1e300, 7: -1e300}))
    assert biases["id"].tolist() == [3, 5, 7, 9]
    assert biases["value"].tolist() == [-INF, FLOAT.max, FLOAT.min, 1.5]


@pytest.mark.parametrize("n", [1, 31, 32, 33, 500])
def test_a_mask_has_a_bit_for_each_token(n):
    allowed = np.random.default_rng().random(n) < 0.5
    words = mask_words(allowed)
    assert words.dtype == np.uint32
    assert words.size == -(-n // 32)
    assert [bool(int(words[i // 32]) >> i % 32 & 1) for i in range(n)] == allowed.tolist()


@pytest.mark.parametrize("n", [1, 31, 32, 33, 500])
def test_a_mask_is_read_as_it_is_packed(n):
    allowed = np.random.default_rng().random(n) < 0.5
    assert (unpacked(mask_words(allowed), n) == allowed).all()


def test_records_of_several_draws_are_those_of_each():
    values = [
        draw_values(SamplingParams(temperature=0.5 * i, top_k=i), 7 * i, i << 33, pages=9 * i, n_logprobs=i)
        for i in range(4)
    ]
    records = draw_records(DTYPE("Draw"), values)
    assert records.dtype == DTYPE("Draw")
    for i, found in enumerate(records):
        each = record(7 * i, i << 33, temperature=0.5 * i, top_k=i, pages=9 * i, n_logprobs=i)
        assert found.tobytes() == each.tobytes()


@pytest.mark.parametrize("n", [1, 3, 20])
def test_the_most_probable_tokens_of_the_host(n):
    logits = np.round(np.random.default_rng().standard_normal(200) * 2).astype(np.float32)  # many are equal
    want = np.log(np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum())
    of_token, top = top_log_probabilities(logits, 17, n)
    assert of_token == pytest.approx(want[17], rel=1e-12)
    assert [i for i, _ in top] == np.lexsort((np.arange(200), -want))[:n].tolist()
    assert [p for _, p in top] == pytest.approx(want[[i for i, _ in top]], rel=1e-12)
    assert len(top_log_probabilities(logits[:2], 0, 20)[1]) == 2


def test_log_probabilities_of_a_prompt():
    logits = np.random.default_rng().standard_normal((5, 100)).astype(np.float32) * 4
    ids = [3, 99, 0, 7, 7]
    x = logits.astype(np.float64)
    want = [math.log(math.exp(row[i]) / np.exp(row).sum()) for row, i in zip(x, ids, strict=True)]
    assert log_probabilities(logits, ids) == pytest.approx(want, rel=1e-12)
