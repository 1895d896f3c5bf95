"""The scheduler over an executor whose tokens show every page, slot, position and order."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from support.fake_cache import ListCache
from support.fake_executor import NOT_FINITE, FakeExecutor
from support.scheduler_lab import EOG_HEAVY, SEEDED, Lab, Recorded, sink_of
from zincmetal.engine.pace import LEAST_ROWS, SHARE, Pace, shares
from zincmetal.engine.prefix_cache import Miss
from zincmetal.engine.request import Job, Request
from zincmetal.errors import ContextFullError, DeadlineError, DeviceError, QueueFullError, UsageError
from zincmetal.sampling.draws import mask_words
from zincmetal.sampling.params import SamplingParams

KINDS = pytest.mark.parametrize("recurrent", [False, True], ids=["dense", "hybrid"])
LONG = list(range(300))
HOST = SamplingParams(logits_processors=[lambda ids, logits: logits])


def prompts(n: int, seed: int = 1) -> list[list[int]]:
    """Prompts of random lengths, some of which begin alike."""
    rng = random.Random(seed)
    common = [rng.randrange(1000) for _ in range(130)]
    return [
        common[: rng.choice((0, 70, 130))] + [rng.randrange(1000) for _ in range(rng.randint(1, 150))] for _ in range(n)
    ]


@KINDS
@pytest.mark.parametrize("ahead", [False, True], ids=["in turns", "ahead"])
def test_requests_in_a_batch_have_the_tokens_of_requests_alone(recurrent: bool, ahead: bool) -> None:
    lab = Lab(FakeExecutor(recurrent=recurrent, runs_ahead=ahead))
    requests = [
        lab.submit(ids, 5 + i, params=SEEDED if i % 3 == 0 else SamplingParams(), eog_ids=EOG_HEAVY if i % 2 else ())
        for i, ids in enumerate(prompts(12))
    ]
    lab.run()
    lab.check_ended(*requests)
    assert {sink_of(r).reason for r in requests} == {"stop", "length"}
    assert lab.executor.depth_seen == 1 + ahead
    assert max(len(batch.drawings) for batch in lab.executor.batches) > 3
    lab.check_owners()


@KINDS
def test_a_second_turn_computes_new_tokens_alone(recurrent: bool) -> None:
    lab = Lab(FakeExecutor(recurrent=recurrent))
    first = lab.submit(LONG, 20)
    lab.run()
    answer = sink_of(first).tokens
    second = lab.submit([*LONG, *answer, 5, 6, 7], 4)
    before = len(lab.executor.batches)
    lab.run()
    lab.check_ended(first, second)
    stats = sink_of(second).stats
    assert stats is not None
    assert stats.reused >= len(LONG) + len(answer) - 1
    assert sum(b.n_rows for b in lab.executor.batches[before:]) <= 4 + 4
    lab.check_owners()


def test_a_mark_makes_a_checkpoint_to_which_another_prompt_returns() -> None:
    lab = Lab(FakeExecutor(recurrent=True))
    first = lab.submit([*LONG, 1, 2, 3], 4, marks=(100, 250))
    lab.run()
    second = lab.submit([*LONG[:260], 9, 9], 4)
    lab.run()
    lab.check_ended(first, second)
    stats = sink_of(second).stats
    assert stats is not None
    assert stats.reused == 250
    lab.check_owners()


@KINDS
def test_a_kept_sequence_is_forked(recurrent: bool) -> None:
    lab = Lab(FakeExecutor(recurrent=recurrent), cached=False)
    first = lab.submit(LONG, 6, keep=True)
    lab.run()
    stats = sink_of(first).stats
    assert stats is not None
    sequence = stats.sequence
    assert sequence is not None
    twins = [lab.submit([*sequence.ids[: sequence.computed], 50 + i], 5, start=sequence) for i in range(3)]
    lab.scheduler.release(sequence)
    lab.run()
    lab.check_ended(first, *twins)
    for twin in twins:
        twin_stats = sink_of(twin).stats
        assert twin_stats is not None
        assert twin_stats.source == "start"
        assert twin_stats.reused >= len(LONG)
    lab.check_owners()


def test_a_released_sequence_is_no_start() -> None:
    lab = Lab()
    first = lab.submit(LONG, 6, keep=True)
    lab.run()
    sequence = sink_of(first).stats.sequence  # type: ignore[union-attr]
    lab.scheduler.release(sequence)  # type: ignore[arg-type]
    late = lab.submit([*LONG, 1], 5, start=sequence)
    lab.run()
    lab.check_ended(late)  # a released sequence has no tokens to begin with
    lab.check_owners()


# ---- room ------------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_the_youngest_is_moved_out_and_comes_back(recurrent: bool, cached: bool) -> None:
    executor = FakeExecutor(recurrent=recurrent, pages=8, pages_most=8, slots=6, slots_most=6)
    lab = Lab(executor, cached)
    requests = [lab.submit([i] * 60, 150) for i in range(4)]
    lab.run()
    lab.check_ended(*requests)
    moved = [sink_of(r).stats.moved_out for r in requests]  # type: ignore[union-attr]
    assert moved[0] == 0
    assert sum(moved) > 0
    ends = [sink_of(r).times[-1] for r in requests]
    assert ends == sorted(ends)
    lab.check_owners()


@KINDS
def test_a_sequence_waits_in_host_memory_where_that_is_faster(recurrent: bool) -> None:
    executor = FakeExecutor(recurrent=recurrent, pages=8, pages_most=8, seconds=lambda rows: 1.0 * rows)
    lab = Lab(executor, cached=False)
    requests = [lab.submit([i] * 150, 150) for i in range(2)]
    lab.run()
    lab.check_ended(*requests)
    assert sink_of(requests[1]).stats.moved_out > 0  # type: ignore[union-attr]
    rows = sum(batch.n_rows for batch in executor.batches)
    assert rows <= 2 * (150 + 150)  # nothing was computed twice
    lab.check_owners()


def test_a_sequence_of_which_the_beginning_was_copied_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page takes 0.15 s of the executor's clock, and the others wait for half a second at most."""
    executor = FakeExecutor(pages=12, pages_most=12, seconds=lambda rows: 1.0 * rows)
    lab, read, copied = Lab(executor, cached=False), executor.read_page, list[int]()

    def slow(page: int) -> bytes:
        executor.now += 0.15
        copied.append(page)
        return read(page)

    monkeypatch.setattr(executor, "read_page", slow)
    requests = [lab.submit([i] * 250, 250) for i in range(2)]
    lab.run()
    lab.check_ended(*requests)
    times_out = sink_of(requests[1]).stats.moved_out  # type: ignore[union-attr]
    assert times_out > 0
    assert len(copied) == 2 * times_out
    lab.check_owners()


def test_pools_grow_before_anything_is_moved_out() -> None:
    executor = FakeExecutor(recurrent=True, pages=2, pages_most=40, slots=1, slots_most=8)
    lab = Lab(executor, cached=False)
    requests = [lab.submit([i] * 100, 100) for i in range(6)]
    lab.run()
    lab.check_ended(*requests)
    assert executor.pages_now >= 6 * 4
    assert [sink_of(r).stats.moved_out for r in requests] == [0] * 6  # type: ignore[union-attr]
    lab.check_owners()


def test_without_memory_to_grow_requests_take_turns() -> None:
    executor = FakeExecutor(pages=4, pages_most=40)
    executor.fail = "grow"
    lab = Lab(executor, cached=False)
    requests = [lab.submit([i] * 100, 100) for i in range(3)]
    lab.run()
    lab.check_ended(*requests)
    assert executor.pages_now == 4


def test_a_prompt_beyond_the_pool_is_refused_and_an_answer_ends_with_it() -> None:
    lab = Lab(FakeExecutor(pages=2, pages_most=2))
    with pytest.raises(ContextFullError):
        lab.submit([1] * 129)
    request = lab.submit([1] * 100, 200)
    lab.run()
    sink = sink_of(request)
    assert (sink.reason, len(sink.tokens)) == ("length", 29)  # 128 positions, and a token that needs none
    lab.check_owners()


def test_a_context_that_is_full_ends_a_request() -> None:
    lab = Lab(FakeExecutor(n_ctx=100))
    request = lab.submit([1] * 90, -1)
    whole = lab.submit([2] * 100, -1)
    lab.run()
    assert [len(sink_of(r).tokens) for r in (request, whole)] == [11, 1]
    with pytest.raises(ContextFullError):
        lab.submit([1] * 101)


# ---- ends ------------------------------------------------------------------------------------------------------------


@KINDS
def test_a_cancel_takes_effect_before_the_next_step(recurrent: bool) -> None:
    for steps in range(1, 14):
        lab = Lab(FakeExecutor(recurrent=recurrent))
        request, other = lab.submit(LONG, 50, marks=(64, 70)), lab.submit(range(50), 20)
        for _ in range(steps):
            lab.scheduler.step()
        lab.scheduler.cancel(request)
        n = len(lab.executor.batches)
        lab.scheduler.step()
        assert sink_of(request).reason == "cancelled"
        assert all(run.tokens[0] != 299 or run.sequence.ids[0] for b in lab.executor.batches[n:] for run in b.runs)
        again = lab.submit([*LONG, *sink_of(request).tokens, 5], 6)
        lab.run()
        lab.check_ended(other, again)
        lab.check_owners()


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    lab = Lab(FakeExecutor(seats=1))
    running, waiting = lab.submit(LONG, 500, deadline=1.0), lab.submit(LONG, 5, deadline=0.5)
    calm = lab.submit(range(40), 5)
    lab.run()
    for request in (running, waiting):
        assert isinstance(sink_of(request).error, DeadlineError)
        assert isinstance(sink_of(request).error, TimeoutError)
    lab.check_ended(calm)
    lab.check_owners()


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    lab = Lab(FakeExecutor(damaged=40))
    requests = [lab.submit(ids, 60) for ids in prompts(10)]
    lab.run()
    wanted = [lab.expected(r) for r in requests]
    assert {tokens[-1] < 0 for tokens in wanted} == {False, True}
    for request, tokens in zip(requests, wanted, strict=True):
        sink = sink_of(request)
        assert sink.ends == 1
        assert sink.tokens == [t for t in tokens if t >= 0]
        assert isinstance(sink.error, DeviceError) == (tokens[-1] < 0)
    lab.check_owners()


@KINDS
@pytest.mark.parametrize(
    "options", [{}, {"keep": True}, {"params": HOST}, {"params": SEEDED}], ids=["", "keep", "host", "seed"]
)
@pytest.mark.parametrize("ahead", [False, True], ids=["in turns", "ahead"])
def test_what_others_left_damaged_is_computed_anew(recurrent: bool, options: dict[str, Any], ahead: bool) -> None:
    """Those that reuse it have their own tokens. Who had nothing but its own ends with an error."""
    lab = Lab(FakeExecutor(recurrent=recurrent, runs_ahead=ahead))
    left = lab.submit(LONG, 0, keep=True)
    lab.run()
    kept = sink_of(left).stats.sequence
    lab.executor.keys[kept.pages[1], 5] = NOT_FINITE
    prompts = [[*LONG[:n], 7] for n in (299, 250, 299)]
    again = [lab.submit(ids, 9, marks=[70], **options) for ids in prompts]
    own = lab.submit([*LONG, 8], 9, start=kept)
    lab.run()
    lab.check_ended(*again)
    for request in again:
        stats = sink_of(request).stats
        assert stats.miss == Miss("damaged") or stats.reused == 0
    assert isinstance(sink_of(own).error, DeviceError)
    assert sink_of(own).ends == 1
    for each in (kept, *(sink_of(r).stats.sequence for r in again if r.keep)):
        lab.scheduler.release(each)
    lab.run()
    lab.check_owners()


def test_processors_run_on_the_host_and_end_their_own_request_alone() -> None:
    def refuse(ids: list[int], logits: np.ndarray) -> np.ndarray:
        if len(ids) == 103:
            raise LookupError("no more")
        return logits

    lab = Lab()
    good = lab.submit([3] * 100, 9, params=SamplingParams(logits_processors=[lambda ids, logits: logits]))
    bad = lab.submit([4] * 100, 9, params=SamplingParams(logits_processors=[refuse]))
    plain = lab.submit([5] * 100, 9)
    lab.run()
    lab.check_ended(good, plain)
    assert isinstance(sink_of(bad).error, LookupError)
    assert len(sink_of(bad).tokens) == 3
    lab.check_owners()


def test_a_mask_sees_all_ids_before_each_token() -> None:
    lab, seen = Lab(), []

    def mask(ids: list[int]) -> np.ndarray:
        seen.append(len(ids))
        if len(ids) == 46:
            raise LookupError("no grammar goes on")
        return np.full(32, 0xFFFFFFFF, np.uint32)

    masked, plain = lab.submit(range(40), 9, mask=mask), lab.submit(range(50), 30)
    lab.run()
    assert seen == [40, 41, 42, 43, 44, 45, 46]
    assert isinstance(sink_of(masked).error, LookupError)
    assert sink_of(masked).tokens == lab.expected(masked)[:6]
    lab.check_ended(plain)
    assert all(d.mask is None or d.mask.size == 32 for b in lab.executor.batches for d in b.drawings)
    lab.check_owners()


def test_a_device_that_cannot_draw_leaves_it_to_the_host() -> None:
    lab = Lab(FakeExecutor(draws=False))
    sampled, greedy = lab.submit(range(20), 4, params=SEEDED), lab.submit(range(30), 4)
    lab.run()
    lab.check_ended(greedy)
    assert len(sink_of(sampled).tokens) == 4
    assert {batch.output for batch in lab.executor.batches} == {"argmax", "none"}


def test_more_biases_than_a_step_takes_leave_it_to_the_host() -> None:
    lab = Lab()
    few, many = (dict.fromkeys(range(n), 0.0) for n in (lab.executor.max_biases, lab.executor.max_biases + 1))
    lab.submit(range(20), 4, params=SamplingParams(temperature=0.8, seed=7, logit_bias=few))
    lab.run()
    assert not any(batch.by_host for batch in lab.executor.batches)
    lab.submit(range(40), 4, params=SamplingParams(temperature=0.8, seed=7, logit_bias=many))
    lab.run()
    assert lab.executor.batches[-1].by_host


@pytest.mark.parametrize("draws", [True, False])
def test_a_mask_holds_where_the_host_draws(draws: bool) -> None:
    """The fake device ignores masks, so only the host's draw can keep to them."""

    def mask(ids: object) -> object:
        return mask_words(np.arange(1000) % 10 == 3)

    params = SamplingParams(logits_processors=[lambda ids, logits: logits] if draws else [])
    lab = Lab(FakeExecutor(draws=draws))
    request = lab.submit(range(20), 5, mask=mask, params=params)
    lab.run()
    assert len(sink_of(request).tokens) == 5
    assert {token % 10 for token in sink_of(request).tokens} == {3}


@pytest.mark.parametrize("where", ["submit", "collect", "copy_page"])
@KINDS
def test_an_error_of_the_device_ends_all_requests_once_and_the_next_ones_run(where: str, recurrent: bool) -> None:
    for steps in range(1, 10):
        lab = Lab(FakeExecutor(recurrent=recurrent, seats=3))
        for ids in (LONG, LONG[:200]):
            lab.submit(ids, 3, marks=(100,))
        lab.run()
        requests = [lab.submit([*LONG[: 100 + 10 * i], 1, 2], 40, marks=(50, 110)) for i in range(5)]
        for _ in range(steps):
            lab.scheduler.step()
        lab.executor.fail = where
        lab.run()
        failed = [r for r in requests if sink_of(r).error]
        assert failed == requests or where == "copy_page"
        assert all(isinstance(sink_of(r).error, DeviceError) for r in failed)
        assert all(sink_of(r).ends == 1 for r in requests)
        lab.executor.fail = ""
        again = lab.submit(LONG, 5)
        lab.run()
        lab.check_ended(again)
        lab.check_owners()


def test_a_sink_ends_its_request_and_its_errors_are_its_own(caplog: pytest.LogCaptureFixture) -> None:
    lab = Lab()
    stopping, raising, plain = (lab.submit(range(30 + i), 9) for i in range(3))
    sink_of(stopping).stop_at, sink_of(raising).raises = 4, ValueError("a bad sink")
    lab.run()
    assert (sink_of(stopping).reason, sink_of(stopping).tokens) == ("stopped", lab.expected(stopping)[:4])
    assert (sink_of(raising).reason, len(sink_of(raising).tokens)) == ("cancelled", 1)
    assert "a bad sink" in caplog.text
    lab.check_ended(plain)
    lab.check_owners()


def test_a_prompt_is_computed_without_a_token() -> None:
    lab = Lab()
    warm = lab.submit(LONG, 0)
    lab.run()
    assert (sink_of(warm).reason, sink_of(warm).tokens) == ("length", [])
    request = lab.submit([*LONG, 1], 3)
    lab.run()
    lab.check_ended(request)
    assert sink_of(request).stats.reused == len(LONG)  # type: ignore[union-attr]


# ---- order -----------------------------------------------------------------------------------------------------------


def test_the_queue_has_a_limit() -> None:
    lab = Lab(FakeExecutor(seats=1), queue_limit=2)
    first, second = lab.submit(range(9)), lab.submit(range(10))
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        lab.submit(range(11))
    lab.scheduler.step()  # the first one leaves the queue
    third = lab.submit(range(12))
    with pytest.raises(QueueFullError):
        lab.submit(range(13))
    lab.scheduler.cancel(third)
    lab.scheduler.step()
    fourth = lab.submit(range(14))
    lab.run()
    lab.check_ended(first, second, fourth)
    with pytest.raises(UsageError):
        lab.submit([])


def test_a_request_that_is_wrong_is_an_error_of_its_caller() -> None:
    lab = Lab(FakeExecutor(recurrent=True), queue_limit=1)
    with pytest.raises(TypeError):
        lab.scheduler.submit(Request([1, 2], 3, Recorded(lab.executor), marks=None))  # type: ignore[arg-type]
    good = lab.submit([1, 2])
    lab.run()
    lab.check_ended(good)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_place_is_taken_while_the_last_row_of_another_request_is_in_flight(goes_on: bool) -> None:
    """The next turn of that request waits until its tokens are in the cache."""
    lab = Lab()
    one, other = lab.submit(range(10), 50), lab.submit(range(20, 30), 50)
    sink_of(one).stop_at = 5
    while not sink_of(one).ends:
        lab.scheduler.step()
    known = [*one.ids, *sink_of(one).tokens]
    last = lab.submit([*known, 3] if goes_on else [*known[1:], 3])
    lab.scheduler.step()
    assert lab.scheduler.state().running == [other] + [last] * (not goes_on)
    lab.run()
    lab.check_ended(other, last)
    stats = sink_of(last).stats
    assert stats
    assert stats.reused == (len(known) if goes_on else 0)


def test_a_prompt_that_waits_for_room_is_looked_up_when_there_can_be_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take pages meanwhile. It goes on when one of them shows what it needs, or ends."""
    lab = Lab(FakeExecutor(pages=10, pages_most=10, max_rows=32))
    assert isinstance(lab.cache, ListCache)
    match, looks = lab.cache.match, list[int]()
    monkeypatch.setattr(lab.cache, "match", lambda ids: looks.append(len(ids)) or match(ids))
    one, two = lab.submit(range(300), 80), lab.submit(range(100, 110), 200)
    for _ in range(4):
        lab.scheduler.step()
    same, third = lab.submit([*range(290), 5], 2), lab.submit([*range(500, 800)], 2)
    while not sink_of(one).tokens:
        lab.scheduler.step()
    assert looks.count(290) == 1
    while not sink_of(same).ends:
        lab.scheduler.step()
    assert not sink_of(one).ends
    while not sink_of(one).ends:
        lab.scheduler.step()
    assert 1 <= looks.count(299) <= 6
    lab.run()
    lab.check_ended(one, two, same, third)


def test_requests_are_admitted_in_the_order_of_their_arrival() -> None:
    lab = Lab(FakeExecutor(seats=2))
    requests = [lab.submit(ids, 6) for ids in prompts(9)]
    lab.run()
    queued = [sink_of(r).stats.queue for r in requests]  # type: ignore[union-attr]
    assert queued == sorted(queued)
    lab.check_ended(*requests)


def test_a_short_prompt_does_not_wait_for_a_long_one_and_the_long_one_goes_on() -> None:
    lab = Lab(FakeExecutor(n_ctx=4096, pages=200, pages_most=200))
    long = lab.submit([1] * 3000, 2)
    for _ in range(5):
        lab.scheduler.step()
    shorts = [lab.submit([2 + i] * 40, 2) for i in range(8)]
    lab.run()
    lab.check_ended(long, *shorts)
    assert all(sink_of(s).times[-1] < sink_of(long).times[0] for s in shorts)


def test_later_short_prompts_take_at_most_half_of_the_rows() -> None:
    lab = Lab(FakeExecutor(n_ctx=4096, pages=200, pages_most=200, max_rows=64), cached=False)
    long = lab.submit([1] * 640, 1)
    lab.scheduler.step()
    steps, shorts = 0, []
    while not sink_of(long).ends:
        shorts.append(lab.submit([2, *range(62)], 1))
        lab.scheduler.step()
        steps += 1
    assert steps <= 2 * 640 // 32
    lab.run()
    lab.check_ended(long, *shorts)


def test_decoders_beyond_a_step_take_turns() -> None:
    lab = Lab(FakeExecutor(max_singles=3, seats=8))
    requests = [lab.submit([i] * 5, 30) for i in range(8)]
    lab.run()
    lab.check_ended(*requests)
    ends = [sink_of(r).times[-1] for r in requests]
    assert max(ends) - min(ends) <= 5 * 0.02


@pytest.mark.parametrize("max_rows", [512, 2048])
@pytest.mark.parametrize("per_row", [1e-4, 0.002, 0.01])
def test_a_long_prompt_keeps_the_gaps_of_decoders_below_the_bound(per_row: float, max_rows: int) -> None:
    executor = FakeExecutor(
        n_ctx=8192, pages=300, pages_most=300, max_rows=max_rows, seconds=lambda rows: 0.02 + per_row * rows
    )
    lab = Lab(executor, gap_seconds=0.5)
    first = lab.submit(range(max_rows + 88), 1)  # from which the rows' time is learned
    lab.run()
    decoders = [lab.submit([i] * 20, 120) for i in range(3)]
    while not all(sink_of(r).tokens for r in decoders):
        lab.scheduler.step()
    long = lab.submit([7] * 3000, 2)
    lab.run()
    lab.check_ended(first, long, *decoders)
    for request in decoders:
        times = sink_of(request).times
        assert max(b - a for a, b in pairwise(times)) < 0.5
    beside = [b.n_rows for b in executor.batches if b.n_single == 3 and len(b.runs) == 4]
    assert max(beside) > 0.5 * min(0.4 / per_row, max_rows)  # and the rows are used
    assert max(b.n_rows for b in executor.batches) == max_rows  # where nobody decodes, the longest step


def test_the_pace_follows_the_device() -> None:
    pace = Pace(0.5, 512)
    assert pace.rows(0, 0) == 512
    assert pace.rows(4, 1) < 512
    for _ in range(30):
        pace.measured(128, 128 * 0.004)
    assert 64 <= pace.rows(4, 1) < 125
    pace.measured(128, 1000.0)
    assert pace.rows(4, 1) >= LEAST_ROWS
    for _ in range(30):
        pace.measured(128, 128 * 1e-5)
    assert pace.rows(4, 1) == 512
    pace.measured(1, 1e9)
    for _ in range(30):
        pace.measured(8, 1e9)
    assert pace.rows(4, 1) == LEAST_ROWS


@pytest.mark.parametrize(("fitting", "rows"), [(200, 192), (63, 32), (33, 32), (32, 32), (31, 31), (20, 20), (5, 8)])
def test_slices_are_whole_grains_if_there_is_room_for_one(fitting: int, rows: int) -> None:
    pace = Pace(1.0, 512)
    pace.measured(1, SHARE / (fitting + 1.5))  # besides one decoder
    assert pace.rows(1, 1) == rows


def test_no_prompt_has_no_share() -> None:
    assert shares([], 9) == []


def test_shares_are_all_rows_and_no_more() -> None:
    rng = random.Random(5)
    for _ in range(300):
        executor = FakeExecutor()
        jobs = [Job(Request([0] * rng.randint(2, 90), 1, None), i, 0.0, executor) for i in range(rng.randint(1, 6))]  # type: ignore[arg-type]
        rows = rng.randint(1, 200)
        given = dict(shares(jobs, rows))
        assert sum(given.values()) <= max(rows, sum(job.left for job in jobs))
        assert min(given[jobs[0]], jobs[0].left) >= min(jobs[0].left, rows // 2)
        assert sum(min(n, job.left) for job, n in given.items()) == min(rows, sum(job.left for job in jobs))
