"""What a scheduler tells: figures, progress, times, calls, and how drafts and masks leave the tokens as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from support.drafts import Guesses
from support.fake_executor import VOCAB, FakeExecutor
from support.scheduler_lab import SEEDED, Lab, Recorded, sink_of
from zincmetal.engine.batch import Batch, Choice
from zincmetal.engine.governor import Account, Always, Kind
from zincmetal.engine.request import Request, Stats
from zincmetal.engine.scheduler import SAVE_STEPS
from zincmetal.errors import DeadlineError, DeviceError, QueueFullError, UsageError
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


def test_the_end_of_a_model_ends_all_requests_also_those_that_nobody_saw() -> None:
    lab = Lab(FakeExecutor(seats=1, recurrent=True))
    running, waiting = lab.submit(range(100), 60), lab.submit(range(50), 60)
    keeping = lab.submit(range(40), 60, keep=True)
    for _ in range(5):
        lab.scheduler.step()
    new = lab.submit(range(30), 60)
    error = UsageError("the model is closed")
    lab.scheduler.end_all(error)
    for request in (running, waiting, keeping, new):
        assert (sink_of(request).error, sink_of(request).ends) == (error, 1)
    assert not lab.scheduler.busy
    assert lab.executor.in_flight == 0
    lab.check_owners()


def test_a_step_whose_copy_fails_is_not_submitted() -> None:
    lab = Lab(FakeExecutor(runs_ahead=False))
    lab.submit(range(100), 0)
    lab.run()
    decoding = lab.submit(range(500, 530), 50)
    for _ in range(4):
        lab.scheduler.step()
    n, lab.executor.fail = len(lab.executor.batches), "copy_page"
    copying = lab.submit([*range(100), 1], 5)
    lab.scheduler.step()
    assert len(lab.executor.batches) == n
    assert all(isinstance(sink_of(request).error, DeviceError) for request in (decoding, copying))
    lab.check_owners()


# ---- room and order --------------------------------------------------------------------------------------------------


@KINDS
@AHEAD
def test_pools_grow_for_a_request_that_is_alone(recurrent: bool, ahead: bool) -> None:
    lab = Lab(FakeExecutor(recurrent=recurrent, runs_ahead=ahead, pages=1, pages_most=9, slots=0, slots_most=2))
    request = lab.submit(range(50), 200)
    lab.run()
    lab.check_ended(request)
    lab.check_owners()


@KINDS
def test_prompts_of_a_few_tokens(recurrent: bool) -> None:
    lab = Lab(FakeExecutor(recurrent=recurrent))
    requests = [lab.submit(range(7 * n, 8 * n), 4, marks=range(n)) for n in range(1, 6)]
    lab.run()
    lab.check_ended(*requests)


def test_the_queue_has_its_limit_after_requests_have_ended() -> None:
    lab = Lab(FakeExecutor(seats=1), queue_limit=2)
    for i in range(3):
        lab.submit(range(9 + i), 2)
        lab.run()
    lab.scheduler.cancel(lab.submit(range(30), 9))
    lab.run()
    lab.submit(range(40)), lab.submit(range(41))
    with pytest.raises(QueueFullError):
        lab.submit(range(42))


def test_a_sequence_that_is_kept_leaves_its_seat_to_others() -> None:
    lab = Lab(FakeExecutor(seats=1))
    kept, other = lab.submit(range(40), 3, keep=True), lab.submit(range(50), 3)
    lab.run()
    lab.check_ended(kept, other)
    assert lab.pools.seats.free == 1


def test_a_prompt_is_shared_while_its_request_goes_on() -> None:
    lab = Lab()
    first = lab.submit(range(300), 90)
    while not sink_of(first).tokens:
        lab.scheduler.step()
    second = lab.submit([*range(300), 1], 5)
    lab.run()
    lab.check_ended(first, second)
    assert stats_of(second).reused == 256


def test_what_an_ended_request_has_in_flight_is_known() -> None:
    """Its last row is one too many, but what it computed is right. Zero is a token as others are."""

    class Zeros(FakeExecutor):
        def collect(self) -> list[Choice]:
            choices = super().collect()
            self.last = [0] * len(choices)
            return [Choice(0)] * len(choices)

    lab = Lab(Zeros())
    first = lab.submit(range(100), 50)
    sink_of(first).stop_at = 5
    lab.run()
    assert sink_of(first).reason == "stopped"
    second = lab.submit([*range(100), *[0] * 5, 7], 2)
    lab.run()
    assert stats_of(second).reused == 105
    lab.check_owners()


class Pending:
    """Lower tier with ``most`` turns to copy, which finds nothing."""

    saved = 0
    most = 1000

    @property
    def pending(self) -> bool:
        return self.saved < self.most

    may_save = pending

    def fetch(self, *_: object) -> tuple[None, bool]:
        return None, False

    def release(self, owner: object = None) -> None:
        pass

    def evict(self, pages: int, slots: int) -> bool:
        return False

    def note(self, ids: list[int]) -> None:
        pass

    def save(self) -> None:
        self.saved += 1


def test_turns_are_copied_once_in_some_steps() -> None:
    tier = Pending()
    lab = Lab(tier=tier)
    request = lab.submit(range(20), 200)
    while not sink_of(request).ends:
        lab.scheduler.step()
    assert 200 // SAVE_STEPS - 1 <= tier.saved <= 200 // SAVE_STEPS + 3
    assert lab.scheduler.busy, "the turns are still to be copied"
    tier.most = 0
    lab.run()
    lab.check_ended(request)


@pytest.mark.parametrize("error", [UsageError("the model is closed"), DeviceError("the device is lost")])
def test_turns_are_copied_before_the_end_if_the_device_is_well(error: Exception) -> None:
    tier = Pending()
    lab = Lab(tier=tier)
    tier.most = 5
    lab.scheduler.end_all(error)
    assert tier.saved == (5 if isinstance(error, UsageError) else 0)


# ---- measurements ----------------------------------------------------------------------------------------------------


@AHEAD
def test_the_pace_is_the_time_of_a_row(ahead: bool) -> None:
    lab = Lab(FakeExecutor(runs_ahead=ahead, seconds=lambda rows: 0.01 * rows))
    requests = [lab.submit(range(i, 200 + i), 9) for i in range(3)]
    lab.run()
    lab.check_ended(*requests)
    assert lab.scheduler.pace.seconds_per_row == pytest.approx(0.01)


@AHEAD
def test_the_time_of_a_plan_is_not_that_of_the_step_that_runs_ahead(ahead: bool) -> None:
    class Planning(FakeExecutor):
        def submit(self, batch: Batch) -> None:
            self.now += 5.0
            super().submit(batch)

    lab = Lab(Planning(runs_ahead=ahead, seconds=lambda rows: 0.01 * rows))
    lab.submit(range(60), 0)
    lab.run()
    assert lab.scheduler.pace.seconds_per_row == pytest.approx(0.01 if ahead else 0.01 + 5.0 / 60)


class Measuring(Always):
    """Governor that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, Kind, float]] = []

    def measured(self, accounts: Sequence[tuple[Account, int]], kind: Kind, seconds: float) -> None:
        self.told.append((sum(n for _, n in accounts), kind, seconds))


def test_the_governor_learns_the_time_and_the_tokens_of_steps_with_drafts() -> None:
    governor = Measuring()
    lab = Lab(FakeExecutor(seconds=lambda rows: 0.01 * rows), governor=governor)
    request = drafting(lab, range(40), 60, 1.0, 3)
    lab.run()
    lab.check_ended(request)
    steps = [batch for batch in lab.executor.batches if batch.drawings]
    assert len(steps) - 3 <= len(governor.told) < len(steps)
    for made, kind, seconds in governor.told:
        rows = round(seconds / 0.01)
        assert seconds == pytest.approx(0.01 * rows)
        assert 1 <= made <= rows <= kind.rows
        assert kind.verifies == (rows > 1)
    assert 60 - 20 <= sum(made for made, _, _ in governor.told) < 60


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
