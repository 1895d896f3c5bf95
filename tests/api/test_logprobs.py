"""Log-probabilities of tokens and of prompts, against a softmax in float64 over all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import zincmetal
from support.reference_models import reference_models
from zincmetal.errors import UsageError
from zincmetal.plan.target import Target

MODELS = [reference_models("llama")[0], reference_models("qwen35")[0]]
PROMPT = [5, 6, 7]
NEAR = {"rtol": 0, "atol": 2e-4}  # the steps of one row and of many differ in the last bits of their logits


@pytest.fixture(params=MODELS, ids=["attention", "hybrid"], scope="module")
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    with zincmetal.load(request.param, device="cpu", context=128, kv="f32", threads=1) as m:
        m.text.id_tokenizer.eog_ids = frozenset()
        yield m


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    shifted: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return shifted


def expected(model: Any, tokens: list[int]) -> NDArray[np.float64]:
    """Log-probabilities of all tokens in the place of each of ``tokens``, which follow the prompt."""
    return log_softmax(model.logits(PROMPT + tokens)[len(PROMPT) - 1 : -1])


def check(model: Any, result: Any, n: int) -> None:
    want = expected(model, result.tokens)
    assert len(result.logprobs) == len(result.tokens)
    for found, row, token in zip(result.logprobs, want, result.tokens, strict=True):
        assert found.token == token
        np.testing.assert_allclose(found.logprob, row[token], **NEAR)
        assert len(found.top) == len({id_ for id_, _ in found.top}) == n
        np.testing.assert_allclose([p for _, p in found.top], np.sort(row)[::-1][:n], **NEAR)
        np.testing.assert_allclose([p for _, p in found.top], [row[id_] for id_, _ in found.top], **NEAR)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.2, "seed": 3},
    "filtered": {"temperature": 0.9, "seed": 4, "top_k": 5, "top_p": 0.9},
    "penalised": {"temperature": 1.0, "seed": 5, "repeat_penalty": 1.3, "presence_penalty": 0.5},
    "biased": {"logit_bias": {9: 50.0, 10: 1.0}},
    "by the host": {"logits_processors": [lambda ids, logits: logits - 3 * (np.arange(logits.size) % 2)]},
    "biased by the host": {"logit_bias": dict.fromkeys(range(0, 500, 2), -1.0)},
}


@pytest.mark.parametrize("n", [0, 1, 20])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_log_probabilities_are_of_the_logits_as_they_are(model: Any, options: dict[str, Any], n: int) -> None:
    result = model.generate(PROMPT, 8, logprobs=n, **options)
    check(model, result, n)
    assert model.generate(PROMPT, 8, **options).tokens == result.tokens
    chunks = list(model.submit(PROMPT, 8, logprobs=n, **options))
    assert tuple(chunk.logprob for chunk in chunks) == result.logprobs


def test_nothing_is_told_that_was_not_asked_for(model: Any) -> None:
    result = model.generate(PROMPT, 3)
    assert result.logprobs is None
    assert [chunk.logprob for chunk in model.submit(PROMPT, 3)] == [None] * 3
    assert model.generate(PROMPT, 0, logprobs=2).logprobs == ()
    for wrong in (-1, 21, True, 1.5):
        with pytest.raises(UsageError, match="logprobs must be an integer from 0 to 20"):
            model.generate(PROMPT, 3, logprobs=wrong)


def test_requests_beside_each_other_have_their_own(model: Any) -> None:
    plans: list[dict[str, Any]] = [
        {"logprobs": 3},
        {},
        {"logprobs": 20, "temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "seed": 2},
        {"logprobs": 0, **OPTIONS["by the host"]},
    ]
    handles = [model.submit(PROMPT, 12, **options) for options in plans]
    for handle, options in zip(handles, plans, strict=True):
        if "logprobs" in options:
            check(model, handle.result(), options["logprobs"])
        else:
            assert handle.result().logprobs is None


def test_a_device_that_cannot_draw_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "ranked_by_host", property(lambda self: True))
    with zincmetal.load(MODELS[0], device="cpu", context=128, kv="f32", threads=1) as m:
        m.text.id_tokenizer.eog_ids = frozenset()
        assert not m.engine.draws
        for name in ("greedy", "filtered"):
            check(m, m.generate(PROMPT, 6, logprobs=4, **OPTIONS[name]), 4)


def test_biases_that_fit_no_record_are_applied_by_the_host(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"temperature": 1.0, "seed": 7, "logit_bias": {i: -0.01 * i for i in range(300)}}
    on_device = model.generate(PROMPT, 12, **options).tokens
    monkeypatch.setattr(model.engine, "max_biases", 299)
    assert model.generate(PROMPT, 12, **options).tokens == on_device


def test_a_prompt_has_log_probabilities(model: Any) -> None:
    ids = [(7 * i) % 250 + 1 for i in range(100)]
    want = log_softmax(model.logits(ids))[np.arange(99), ids[1:]]
    np.testing.assert_allclose(model.prompt_logprobs(ids), want, **NEAR)
    assert model.prompt_logprobs([1]) == []
    with pytest.raises(UsageError, match="no tokens"):
        model.prompt_logprobs([])
    with pytest.raises(UsageError, match="vocabulary"):
        model.prompt_logprobs([10**6])


def test_a_prompt_has_scores_with_the_best_tokens(model: Any) -> None:
    ids = [(7 * i) % 250 + 1 for i in range(40)]
    scores = model.prompt_scores(ids, 3)
    assert [score.token for score in scores] == ids[1:]
    np.testing.assert_allclose([score.logprob for score in scores], model.prompt_logprobs(ids), **NEAR)
    logits = log_softmax(model.logits(ids))
    for row, score in zip(logits, scores, strict=False):
        assert [token for token, _ in score.top] == np.argsort(-row, kind="stable")[:3].tolist()
        np.testing.assert_allclose([value for _, value in score.top], np.sort(row)[::-1][:3], **NEAR)
    assert model.prompt_scores([1]) == []
    with pytest.raises(UsageError, match="n_top"):
        model.prompt_scores(ids, 21)
