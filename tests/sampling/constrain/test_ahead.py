"""Steps run ahead of a mask that says it constrains nothing for two tokens, and the tokens are the same."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import zincmetal
from support import text_model
from support.constrain_lab import bytes_vocabulary
from support.fake_executor import VOCAB, FakeExecutor, allowed, expected
from support.scheduler_lab import Lab, sink_of
from zincmetal.api.generation import Asked, sampling_params
from zincmetal.engine.request import Request
from zincmetal.sampling.constrain.budget import Budget
from zincmetal.sampling.constrain.grammar import Grammar
from zincmetal.sampling.constrain.masks import Masks
from zincmetal.sampling.draws import mask_words
from zincmetal.sampling.params import SamplingParams


class Free:
    """Mask that constrains nothing, and knows it for a number of tokens."""

    def __init__(self, known: int = 10**6) -> None:
        self.known, self.asked = known, list[int]()

    def __call__(self, ids: Any) -> None:
        self.asked.append(len(ids))

    def ahead(self, ids: Any) -> bool:
        return len(ids) < self.known


@pytest.mark.parametrize("recurrent", [False, True])
def test_steps_run_ahead_of_a_mask_that_knows_more(recurrent):
    lab = Lab(FakeExecutor(recurrent=recurrent))
    request = lab.submit([5], 9, mask=Free())
    lab.run()
    lab.check_ended(request)
    assert lab.executor.depth_seen == 2


def words_of(number: int, free: int) -> NDArray[np.uint32] | None:
    """Mask of a part of the tokens, or None for one in ``free`` of the numbers."""
    hashed = zlib.crc32(b"%d" % number)
    return None if free and hashed % free else mask_words(np.arange(VOCAB) % 7 == hashed % 7)


class Part:
    """Mask that depends on the last token alone, and is a function of the ids: often None, or never."""

    def __init__(self, free: int) -> None:
        self.free, self.asked = free, list[int]()

    def __call__(self, ids: Any) -> NDArray[np.uint32] | None:
        self.asked.append(len(ids))
        return words_of(ids[-1], self.free)


def expected_of(request: Request, recurrent: bool) -> list[int]:
    """The tokens of a request that is alone, one after another, each with its mask."""
    ids: list[int] = list(request.ids)
    for _ in range(request.max_tokens):
        token = expected(ids, 1, request.params, recurrent)[0]
        ids.append(allowed(token, request.mask(ids) if request.mask else None))
        if ids[-1] in request.eog_ids:
            break
    return ids[len(request.ids) :]


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("free", [0, 2, 3, 30])
def test_a_mask_is_asked_once_for_each_token_and_holds(free, recurrent):
    lab, mask = Lab(FakeExecutor(recurrent=recurrent)), Part(free)
    request = lab.submit([5], 60, mask=mask)
    lab.run()
    assert mask.asked == list(range(1, 61))
    assert sink_of(request).tokens == expected_of(request, recurrent)
    assert lab.executor.depth_seen == (1 if recurrent or not free else 2)
    lab.check_owners()


@pytest.mark.parametrize("seed", range(30))
def test_requests_with_masks_have_their_tokens_whatever_the_others_do(seed):
    """Many at once, with few pages, cancels and end tokens: each has the tokens that it has alone."""
    rng = np.random.default_rng(seed)
    recurrent = bool(seed % 3 == 0)
    pages = int(rng.integers(8, 40))
    lab = Lab(FakeExecutor(recurrent=recurrent, pages=pages, pages_most=pages, max_singles=int(rng.integers(2, 8))))
    requests, cancelled = list[Request](), list[Request]()
    for _ in range(12):
        params = SamplingParams(temperature=float(rng.choice([0.0, 0.8])), seed=int(rng.integers(0, 99)))
        options: dict[str, Any] = {"params": params, "eog_ids": frozenset(range(0, VOCAB, int(rng.choice([50, 5000]))))}
        if rng.random() < 0.8:
            options["mask"] = Part(int(rng.choice([0, 2, 4, 40])))
        ids = rng.integers(1, VOCAB, int(rng.integers(1, 150)))
        requests.append(lab.submit(ids.tolist(), int(rng.integers(1, 60)), **options))
        for _ in range(int(rng.integers(0, 12))):
            lab.scheduler.step()
        if rng.random() < 0.2:
            cancelled.append(requests[int(rng.integers(0, len(requests)))])
            lab.scheduler.cancel(cancelled[-1])
    lab.run(5000)
    for request in requests:
        sink, alone = sink_of(request), expected_of(request, recurrent)
        assert sink.error is None
        if request in cancelled and sink.reason == "cancelled":
            assert sink.tokens == alone[: len(sink.tokens)]
        else:
            assert sink.tokens == alone
    lab.check_owners()
    # What the cache has is what the tokens say: prompts that go on from there have their own tokens too.
    again = [lab.submit([*r.ids, *sink_of(r).tokens, 9], 20, params=r.params, mask=r.mask) for r in requests[:4]]
    lab.run(5000)
    for request in again:
        assert sink_of(request).tokens == expected_of(request, recurrent)


def test_an_error_where_a_guess_is_confirmed_ends_this_request_alone():
    class Failing(Part):
        def __call__(self, ids: Any) -> None:
            if len(ids) == 12:
                raise LookupError("no grammar goes on")

    lab = Lab()
    failing, other = lab.submit([5], 30, mask=Failing(0)), lab.submit([6], 30, mask=Part(3))
    lab.run()
    assert isinstance(sink_of(failing).error, LookupError)
    assert len(sink_of(failing).tokens) == 11
    assert sink_of(other).tokens == expected_of(other, False)
    lab.check_owners()


@pytest.mark.parametrize("known", range(20, 32))
def test_where_a_mask_knows_no_more_it_sees_all_ids_before_each_token(known):
    lab, mask = Lab(), Free(known)
    request, other = lab.submit(range(20), 12, mask=mask), lab.submit(range(40), 12)
    lab.run()
    lab.check_ended(request, other)
    assert set(range(known + 1 if known > 20 else 20, 32)) <= set(mask.asked)


def test_an_error_of_ahead_is_no_error_of_the_answer():
    class Odd(Free):
        def ahead(self, ids: Any) -> bool:
            raise LookupError("odd")

    lab = Lab()
    request, other = lab.submit(range(20), 9, mask=Odd()), lab.submit(range(30), 9)
    lab.run()
    lab.check_ended(request, other)


def test_a_host_that_draws_does_not_run_ahead():
    lab = Lab(FakeExecutor(draws=False))
    params = sampling_params("test", {"temperature": 1.0, "seed": 1})
    request = lab.submit([5], 9, mask=Free(), params=params)
    lab.run()
    assert len(sink_of(request).tokens) == 9
    assert lab.executor.depth_seen == 1


def test_a_budget_knows_how_far_nothing_is_constrained():
    """Whatever the next token is, the mask after it is None too, where ``ahead`` says so."""
    masks, rng = Masks(bytes_vocabulary("<think>", "</think>")), np.random.default_rng(5)
    told = 0
    for _ in range(300):
        budget = Budget(int(rng.integers(0, 6)), "</think>", begin="<think>" if rng.random() < 0.5 else "")
        mask, ids = masks.of(None, budget, 0), list[int]()
        for _ in range(10):
            sure = mask.ahead(ids)
            words = mask(ids)
            assert not sure or words is None
            token = int(rng.choice([257, 258, 97, 195, 10])) if words is None else 258
            ids.append(token)
            if sure:
                told += 1
                assert mask(ids) is None
    assert told > 300


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = text_model.save(tmp_path_factory.mktemp("tiny") / "tiny.gguf", eos_token_id=text_model.END)
    with zincmetal.load(path, device="cpu", context=256) as model:
        yield model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_budget_forces_the_same_tokens_with_and_without_running_ahead(tiny, temperature, monkeypatch):
    def texts() -> list[list[int]]:
        handles = []
        for seed in range(12):
            params = sampling_params("test", {"temperature": temperature, "seed": seed})
            budget = Budget(seed * 2, "[END]", begin="h" if seed % 3 == 0 else "")
            grammar = Grammar("start: /(.|\\n)*/") if seed % 4 == 3 else None
            handles.append(tiny.start(Asked([104 + seed, 105], 40, params, reasoning=budget, grammar=grammar)))
        return [handle.result().tokens for handle in handles]

    ahead = texts()
    made = tiny.text.mask
    monkeypatch.setattr(tiny.text, "mask", lambda *args: made(*args).__call__)  # without the method ``ahead``
    assert texts() == ahead
    assert any(b"[END]" in bytes(t for t in tokens if t < 256) for tokens in ahead)


OFTEN = Grammar('start: (free /[0-9]{1,3}/ ";")* tail\nfree[lazy]: /(.|\\n)*[a-f@]/\ntail: /(.|\\n)*/')


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.2, "top_k": 20, "repeat_penalty": 1.2}]
)
def test_a_model_that_runs_ahead_of_a_grammar_makes_the_same_tokens(tiny, options, monkeypatch):
    def texts(together: bool) -> list[list[int]]:
        asked = [
            Asked([104, 97 + seed], 60, sampling_params("test", {**options, "seed": seed}), grammar=OFTEN)
            for seed in range(10)
        ]
        if not together:
            return [tiny.start(one).result().tokens for one in asked]
        handles = [tiny.start(one) for one in asked]
        return [handle.result().tokens for handle in handles]

    ahead = texts(together=True)
    assert texts(together=False) == ahead
    monkeypatch.setattr(tiny.engine, "runs_ahead", False)
    assert texts(together=True) == ahead
    assert sum(tokens.count(ord(";")) for tokens in ahead) > 5 or not options
