"""What a scheduler tells: figures, progress, times, calls, and how drafts and masks leave the tokens as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from support.drafts import Guesses
from support.fake_executor import VOCAB, FakeExecutor
from support.scheduler_lab import SEEDED, Lab, Recorded, sink_of
from zincmetal.engine.governor import Always
from zincmetal.engine.request import Request, Stats
from zincmetal.errors import DeadlineError, DeviceError
from zincmetal.sampling.draws import mask_words
from zincmetal.sampling.params import SamplingParams

KINDS = pytest.mark.parametrize("recurrent", [False, True], ids=["dense", "hybrid"])
AHEAD = pytest.mark.parametrize("ahead", [False, True], ids=["in turns", "ahead"])


class Told(Recorded):
    """Sink that keeps progress and the time of its end. ``fails`` names the event that raises."""

    def __init__(self, executor: FakeExecutor, fails: str = "") -> None:
        super().__init__(executor)
        self.told: list[tuple[int, int]] = []
        self.ended_at = 0.0
        self.fails = fails

    def _may_fail(self, event: str) -> None:
        if event == self.fails:
            raise ValueError(f"{event} fails")

    def progress(self, done: int, total: int) -> None:
        super().progress(done, total)
        self.told.append((done, total))
        self._may_fail("progress")

    def started(self, stats: Stats) -> None:
        super().started(stats)
        self._may_fail("started")

    def done(self, reason: str, stats: Stats) -> None:
        super().done(reason, stats)
        self.ended_at = self.executor.now
        self._may_fail("done")

    def failed(self, error: BaseException) -> None:
        super().failed(error)
        self.ended_at = self.executor.now


def told(lab: Lab, ids: Sequence[int], max_tokens: int = 8, fails: str = "", **options: Any) -> tuple[Request, Told]:
    """Submits a request whose sink keeps more."""
    request = lab.request(ids, max_tokens, **options)
    request.sink = sink = Told(lab.executor, fails)
    lab.scheduler.submit(request)
    return request, sink


def stats_of(request: Request) -> Stats:
    stats = sink_of(request).stats
    assert stats is not None
    return stats


# ---- figures and events ----------------------------------------------------------------------------------------------


def test_figures_are_those_of_running_and_waiting_requests() -> None:
    lab = Lab(FakeExecutor(seats=1, recurrent=True, slots=3, slots_most=5, pages=9, pages_most=20))
    first, second = lab.submit(range(100), 20), lab.submit(range(300, 320), 2)
    assert not lab.scheduler.figures()["running"]
    assert lab.scheduler.figures()["waiting"] == 2
    assert lab.scheduler.busy
    while len(sink_of(first).tokens) < 5:
        lab.scheduler.step()
    third = lab.submit(range(50), 2)
    figures = lab.scheduler.figures()
    running = figures["running"][0]
    assert running == {"id": 0, "prompt": 100, "reused": 0, "position": running["position"], "made": 5}
    assert 104 <= running["position"] <= 106
    assert (len(figures["running"]), figures["waiting"], figures["steps"]) == (1, 2, len(lab.executor.batches))
    assert figures["pages"] == {"all": 9, "free": lab.pools.pages.free, "most": 20}
    assert figures["slots"] == {"all": 3, "free": lab.pools.slots.free, "most": 5}
    lab.run()
    lab.check_ended(first, second, third)
    assert not lab.scheduler.busy
    assert lab.scheduler.figures()["waiting"] == 0


def test_progress_counts_the_tokens_to_compute() -> None:
    lab = Lab(FakeExecutor(max_rows=64))
    first, sink = told(lab, range(200), 3)
    lab.run()
    assert sink.told == [(n, 200) for n in (0, 64, 128, 192, 199)]
    second, sink = told(lab, [*range(150), 5, 6, 7], 3)
    lab.run()
    lab.check_ended(first, second)
    total = 153 - stats_of(second).reused
    assert sink.told == [(0, total), (total - 1, total)]


def test_times_are_those_of_the_queue_the_prompt_and_the_answer() -> None:
    lab = Lab(FakeExecutor(seats=1))
    first, second = lab.submit(range(150), 9), lab.submit(range(200, 260), 5)
    lab.run()
    for request in (first, second):
        stats, times = stats_of(request), sink_of(request).times
        assert stats.queue + stats.prefill == pytest.approx(times[0])
        assert stats.queue + stats.prefill + stats.decode == pytest.approx(times[-1])
        assert stats.generated == request.max_tokens
    assert stats_of(first).queue == 0
    assert stats_of(second).queue >= sink_of(first).times[-1]


@pytest.mark.parametrize("event", ["progress", "started", "done"])
def test_a_sink_that_fails_ends_its_request_alone(event: str) -> None:
    lab = Lab()
    other = lab.submit(range(40), 9)
    _, sink = told(lab, range(100), 9, fails=event)
    lab.run()
    lab.check_ended(other)
    assert (sink.ends, len(sink.tokens)) == (1, 9 if event == "done" else 0)
    assert sink.reason == ("length" if event == "done" else "cancelled")
    lab.check_owners()


def test_a_cancel_has_its_reason_and_after_the_end_no_effect() -> None:
    lab = Lab()
    request, late = lab.submit(range(40), 30), lab.submit(range(50), 3)
    for _ in range(8):
        lab.scheduler.step()
    lab.scheduler.cancel(request, "closed")
    lab.run()
    lab.scheduler.cancel(late)
    lab.scheduler.cancel(request)
    lab.run()
    assert (sink_of(request).reason, sink_of(request).ends) == ("closed", 1)
    lab.check_ended(late)


@pytest.mark.parametrize(
    ("where", "n", "seats"), [("in the queue", 20, 1), ("in its prompt", 3000, 2), ("while decoding", 20, 2)]
)
def test_a_deadline_is_kept_and_says_where_the_request_was(where: str, n: int, seats: int) -> None:
    lab = Lab(FakeExecutor(n_ctx=4096, pages=200, pages_most=200, seats=seats))
    other = lab.submit(range(10), 900)
    _, sink = told(lab, [1] * n, 800, deadline=2.0)
    lab.run()
    lab.check_ended(other)
    assert isinstance(sink.error, DeadlineError)
    assert where in str(sink.error)
    assert 2.0 < sink.ended_at < 2.0 + 3 * lab.executor.seconds(64)


def test_a_call_runs_while_nothing_is_in_flight() -> None:
    lab, seen = Lab(), []
    request = lab.submit(range(100), 60)
    for calls in range(1, 6):
        for _ in range(4):
            lab.scheduler.step()
        assert lab.executor.in_flight
        lab.scheduler.call(lambda: seen.append(lab.executor.in_flight))
        lab.scheduler.call(lambda: seen.append(lab.executor.in_flight))
        for _ in range(3):
            lab.scheduler.step()
        assert seen == [0] * 2 * calls
    assert not sink_of(request).ends
    lab.run()
    lab.check_ended(request)


def test_calls_are_made_although_the_device_fails() -> None:
    lab, seen = Lab(), []
    request = lab.submit(range(100), 60)
    for _ in range(5):
        lab.scheduler.step()
    lab.executor.fail = "collect"
    lab.scheduler.call(lambda: seen.append(sink_of(request).error))
    lab.run()
    assert len(seen) == 1
    assert isinstance(seen[0], DeviceError)
    assert not lab.scheduler.busy


def test_an_interrupt_ends_all_requests_and_is_raised() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    lab = Lab()
    requests = [lab.submit(range(100), 60), lab.submit(range(50), 60)]
    for _ in range(5):
        lab.scheduler.step()
    with pytest.raises(KeyboardInterrupt):
        lab.scheduler.step(interrupt)
    assert [sink_of(request).ends for request in requests] == [1, 1]
    assert all(sink_of(request).error for request in requests)
    lab.check_owners()


# ---- drafts and masks ------------------------------------------------------------------------------------------------


def drafting(lab: Lab, ids: Sequence[int], n: int, rate: float, seed: int, **options: Any) -> Request:
    """Submits a request whose drafts are right with the probability ``rate``."""
    request = lab.request(ids, n, **options)
    request.drafter = Guesses(len(request.ids), lambda: lab.expected(request), rate, VOCAB, seed)
    lab.scheduler.submit(request)
    return request


@KINDS
@AHEAD
@pytest.mark.parametrize("rate", [0.0, 0.8, 1.0])
def test_requests_with_drafts_have_the_tokens_of_requests_without(recurrent: bool, ahead: bool, rate: float) -> None:
    lab = Lab(FakeExecutor(recurrent=recurrent, runs_ahead=ahead), governor=Always())
    params = (SamplingParams(), SEEDED)
    requests = [drafting(lab, range(i, 90 + 20 * i), 40 + i, rate, i, params=params[i % 2]) for i in range(3)]
    plain = lab.submit(range(500, 530), 20)
    lab.run()
    lab.check_ended(*requests, plain)
    for request in requests:
        drafts = stats_of(request).drafts
        tried, right = (sum(counts) for counts in zip(*drafts, strict=True))
        assert tried > 10
        assert right == (0 if rate == 0 else tried) or rate == 0.8
    assert any(batch.verifies for batch in lab.executor.batches)
    lab.check_owners()


@KINDS
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_drafts_end_with_their_request(recurrent: bool, rate: float) -> None:
    """By a cancel or by its sink, while a draft is in flight or not."""
    for steps in range(4, 12):
        lab = Lab(FakeExecutor(recurrent=recurrent), governor=Always())
        cancelled = drafting(lab, range(60), 50, rate, steps)
        stopped = drafting(lab, range(100, 130), 50, rate, steps)
        sink_of(stopped).stop_at = 2 + steps
        for _ in range(steps):
            lab.scheduler.step()
        lab.scheduler.cancel(cancelled)
        lab.run()
        for request, reason in ((cancelled, "cancelled"), (stopped, "stopped")):
            sink = sink_of(request)
            assert (sink.reason, sink.ends) == (reason, 1)
            assert sink.tokens == lab.expected(request)[: len(sink.tokens)]
        assert len(sink_of(stopped).tokens) == 2 + steps
        lab.check_owners()


class Sometimes:
    """Mask that allows all tokens but at some lengths, where each token is a multiple of ten."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.seen: list[int] = []

    def __call__(self, ids: Sequence[int]) -> np.ndarray | None:
        self.seen.append(len(ids))
        return mask_words(np.arange(VOCAB) % 10 == 0) if len(ids) in self.lengths else None


@KINDS
def test_a_mask_that_begins_later_holds_although_steps_run_ahead(recurrent: bool) -> None:
    lengths = [*range(27, 30), 35, *range(50, 61)]
    tokens = []
    for ahead in (False, True):
        lab = Lab(FakeExecutor(recurrent=recurrent, runs_ahead=ahead))
        mask = Sometimes(lengths)
        request, other = lab.submit(range(20), 60, mask=mask), lab.submit(range(30), 30)
        lab.run()
        lab.check_ended(other)
        tokens.append(sink_of(request).tokens)
        assert all(token % 10 == 0 for i, token in enumerate(tokens[-1], 20) if i in lengths)
        assert mask.seen == list(range(20, 80)), "once before each token"
        assert lab.executor.depth_seen == 1 + ahead
        lab.check_owners()
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 60
