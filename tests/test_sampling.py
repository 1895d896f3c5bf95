"""Sampling against straightforward definitions, on random logits."""

from __future__ import annotations

import numpy as np
import pytest

from zincmetal.errors import DeviceError, UsageError
from zincmetal.sampling import Sampler, SamplingParams, candidates, penalise


@pytest.fixture
def logits():
    return (np.random.default_rng().standard_normal(1000) * 3).astype(np.float32)


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def allowed(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Top-k, then top-p and min-p of what is left, by definition."""
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    p = softmax(logits[order])
    keep = [i for i in range(len(order)) if p[:i].sum() < top_p and p[i] >= min_p * p[0]]
    return set(order[keep].tolist())


@pytest.mark.parametrize("top_k", [0, 1, 40, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.5])
def test_filters(logits, top_k, top_p, min_p):
    ids, kept = candidates(logits, SamplingParams(1.0, top_k, top_p, min_p))
    assert set(ids.tolist()) == allowed(logits, top_k, top_p, min_p)
    assert (np.diff(kept) <= 0).all() or (top_k, top_p, min_p) == (0, 1.0, 0.0)
    assert (kept == logits[ids]).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature):
    logits = np.array([2.0, 1.0, 0.0, -1.0], np.float32)
    sampler = Sampler(SamplingParams(temperature, seed=11))
    n = 20000
    counts = np.bincount([sampler.sample(logits, []) for _ in range(n)], minlength=4)
    expected = softmax(logits / temperature)
    assert (np.abs(counts / n - expected) < 5 * np.sqrt(expected * (1 - expected) / n)).all()


def test_greedy_and_penalty(logits):
    best = int(logits.argmax())
    assert Sampler(SamplingParams()).sample(logits, [best]) == best
    before = logits.copy()
    penalised = penalise(logits, [best, best, 3], 1.3)
    assert (logits == before).all()
    for i in range(logits.size):
        scale = (1 / 1.3 if logits[i] > 0 else 1.3) if i in (best, 3) else 1
        assert penalised[i] == pytest.approx(logits[i] * scale, rel=1e-6)


@pytest.mark.parametrize(("last_n", "expected"), [(0, 0), (1, 0), (2, 1)])
def test_penalty_looks_back_as_far_as_asked(last_n, expected):
    """Token 0 is best, and stands two tokens back: only a window of two penalises it below token 1."""
    logits = np.array([1.0, 0.9, -5.0], np.float32)
    params = SamplingParams(repeat_penalty=2.0, repeat_last_n=last_n)
    assert Sampler(params).sample(logits, [0, 2]) == expected


def test_logits_that_are_no_numbers():
    logits = np.full(8, np.nan, np.float32)
    for params in (SamplingParams(1.0), SamplingParams(1.0, top_k=2), SamplingParams(0.0, repeat_penalty=1.1)):
        with pytest.raises(DeviceError, match="not finite"):
            Sampler(params).sample(logits, [1])


def test_seeds(logits):
    def draw(seed):
        sampler = Sampler(SamplingParams(1.0, seed=seed))
        return [sampler.sample(logits, []) for _ in range(50)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_ranges_are_checked():
    for wrong in ({"temperature": -0.1}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 1.1}, {"repeat_penalty": 0.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            SamplingParams(**wrong)
