"""Tokens that the host draws, and outputs from which none was drawn."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from support.fake_executor import FakeExecutor
from support.scheduler_lab import Lab, Recorded, sink_of
from zincmetal.engine import flight
from zincmetal.engine.batch import Choice
from zincmetal.errors import UsageError
from zincmetal.sampling.params import SamplingParams
from zincmetal.sampling.sampler import FORBIDDEN

HOST = SamplingParams(logits_processors=[lambda ids, logits: logits])


class Scored(Recorded):
    """Sink that keeps the choices too."""

    def __init__(self, executor: FakeExecutor) -> None:
        super().__init__(executor)
        self.choices: list[Any] = []

    def token(self, id: int, choice: Any) -> str | None:
        self.choices.append(choice)
        return super().token(id, choice)


def test_the_time_of_draws_counts_where_the_host_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flight, "perf_counter", itertools.count().__next__)  # each look is a second later
    lab = Lab()
    host, device = lab.submit(range(20), 7, params=HOST), lab.submit(range(30), 7)
    lab.run()
    lab.check_ended(host, device)
    assert [sink_of(request).stats.sampling for request in (host, device)] == [7, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_tokens_that_the_host_draws_have_log_probabilities_if_they_are_wanted(n: int) -> None:
    lab = Lab()
    request = lab.request(range(20), 4, params=HOST, n_logprobs=n)
    request.sink = sink = Scored(lab.executor)
    lab.scheduler.submit(request)
    lab.run()
    lab.check_ended(request)
    for token, choice in zip(sink.tokens, sink.choices, strict=True):
        assert len(choice.top) == n
        if n:
            likely = -np.log1p((lab.executor.n_vocab - 1) * np.exp(-9.0))  # all others' logits are 9 less
            assert choice.top[0] == (token, choice.logprob)
            assert choice.logprob == pytest.approx(likely, rel=1e-5)


def test_a_mask_that_forbids_all_tokens_is_an_error_of_its_request() -> None:
    """The logits are finite, so nothing is damaged, and what is cached stays."""

    class Forbidden(FakeExecutor):
        def collect(self) -> list[Choice]:
            return [Choice(-1) if choice.id % 2 else choice for choice in super().collect()]

    lab = Lab(Forbidden())
    warm = lab.submit(range(300), 0)
    lab.run()
    requests = [lab.submit([*range(300), i], 20) for i in range(4)]
    lab.run()
    assert sink_of(warm).reason == "length"
    for request in requests:
        sink = sink_of(request)
        odd = [token % 2 for token in lab.expected(request)].index(1)
        assert sink.tokens == lab.expected(request)[:odd]
        assert isinstance(sink.error, UsageError)
        assert str(sink.error) == FORBIDDEN
    again = lab.submit([*range(300), 7], 0)
    lab.run()
    assert sink_of(again).stats.reused == 300  # type: ignore[union-attr]
    lab.check_owners()
