"""Pools: who waits, what makes room and in which order, and what is moved out. Over the fake device and list cache."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from support.pools_bench import PAGE, Bench
from zincmetal.engine import pools as pools_module
from zincmetal.engine.pace import Pace
from zincmetal.engine.pages import PagePool
from zincmetal.engine.pools import Wait
from zincmetal.engine.prefix_cache import Mark
from zincmetal.engine.request import Job
from zincmetal.engine.sequence import Sequence

# ---- what is missing ---------------------------------------------------------------------------------------------


def test_pages_are_missing_that_are_neither_there_nor_free() -> None:
    bench = Bench(pages=3, pages_most=3)
    sequence = bench.sequence(60)
    assert [bench.pools.missing(sequence, end)[0] for end in (64, 65, 192, 193, 257)] == [0, 0, 0, 1, 2]


def test_a_shared_page_that_is_written_needs_another() -> None:
    bench = Bench(pages=2, pages_most=2)
    sequence = bench.sequence(100)
    other = sequence.fork(bench.pages, bench.slots)
    assert bench.pools.missing(sequence, 101) == (1, 0)
    assert bench.pools.missing(sequence, 129) == (2, 0)
    other.release(bench.pages, bench.slots)
    assert bench.pools.missing(sequence, 101) == (0, 0)
    whole = Bench(pages=2, pages_most=2)
    full = whole.sequence(64)
    full.fork(whole.pages, whole.slots)
    assert whole.pools.missing(full, 65) == (0, 0), "nobody writes into a full page"


def test_a_slot_is_missing_for_states_that_cannot_be_where_they_are() -> None:
    bench = Bench(slots=1, slots_most=1)
    without = bench.sequence(10, with_slot=False)
    assert bench.pools.missing(without, 11) == (0, 0)
    own = bench.sequence(10)
    assert bench.pools.missing(without, 11) == (0, 1)
    assert bench.pools.missing(own, 11) == (0, 0)
    assert bench.pools.missing(own, 11, new_slot=True) == (0, 1)
    bench.slots.retain(own.slot)  # type: ignore[arg-type]
    assert bench.pools.missing(own, 11) == (0, 1)
    dense = Bench(recurrent=False)
    assert dense.pools.missing(dense.sequence(10), 11, new_slot=True) == (0, 0)


# ---- room --------------------------------------------------------------------------------------------------------


def test_pools_grow_to_twice_their_size_and_no_further_than_they_may() -> None:
    bench = Bench(pages=2, pages_most=7, slots=1, slots_most=8)
    sequence = bench.sequence(100)
    for end, sizes in ((129, (4, 1)), (257, (7, 1))):
        assert bench.pools.make_room(sequence, end)
        assert (bench.pages.size, bench.slots.size) == (bench.executor.pages_now, bench.executor.slots_now) == sizes
        while PagePool.needed(end) > len(sequence.pages):
            sequence.pages.append(bench.pages.take())
    bench.slots.retain(sequence.slot)  # type: ignore[arg-type]
    assert bench.pools.make_room(sequence, 258)
    assert (bench.pages.size, bench.slots.size) == (7, 2)
    assert not bench.pools.make_room(sequence, 7 * PAGE + 1)


def test_pools_grow_by_what_is_missing_if_that_is_more() -> None:
    bench = Bench(pages=2, pages_most=40)
    assert bench.pools.make_room(bench.sequence(10), 20 * PAGE)
    assert bench.pages.size == 20


def test_without_memory_for_twice_the_size_pools_grow_by_what_is_missing_and_then_no_more() -> None:
    bench = Bench(pages=4, pages_most=40, slots=2, slots_most=2)
    bench.executor.room = 7
    sequence = bench.sequence(4 * PAGE)
    assert bench.pools.make_room(sequence, 4 * PAGE + 1)
    assert bench.executor.asked == [(8, 2), (5, 2)]
    sequence.pages.append(bench.pages.take())
    bench.executor.room = 0
    for _ in range(2):
        assert not bench.pools.make_room(sequence, 5 * PAGE + 1)
    assert bench.executor.asked[2:] == [(10, 2), (6, 2)]


def test_the_cache_evicts_where_pools_cannot_grow() -> None:
    bench = Bench(pages=4, pages_most=4)
    sequence = bench.sequence(PAGE)
    bench.cached(2 * PAGE, first=500)
    assert bench.pages.free == 1
    assert bench.pools.make_room(sequence, 2 * PAGE)
    assert len(bench.cache.stored) == 1
    assert bench.pools.make_room(sequence, 2 * PAGE + 1)
    assert not bench.cache.stored
    assert not bench.pools.make_room(sequence, 4 * PAGE + 1)


def test_the_cache_lets_go_what_only_it_shares() -> None:
    bench = Bench(pages=2, pages_most=2, slots=1, slots_most=1)
    sequence = bench.sequence(100)
    bench.cache.store(sequence.ids, sequence.pages, 100)
    bench.cache.checkpoint(sequence.ids, sequence.slot)  # type: ignore[arg-type]
    evict, bench.cache.evict = bench.cache.evict, lambda pages, slots: False  # type: ignore[method-assign]
    assert bench.pools.missing(sequence, 101) == (1, 1)
    assert bench.pools.make_room(sequence, 101)
    assert bench.pools.missing(sequence, 101) == (0, 0)
    bench.cache.evict = evict  # type: ignore[method-assign]


def test_while_steps_are_in_flight_the_cache_evicts_and_no_pool_grows() -> None:
    bench = Bench(pages=3, pages_most=3, slots=3, slots_most=3)
    sequence = bench.sequence(PAGE)
    bench.cached(2 * PAGE, first=500)
    assert bench.pools.evict(sequence, PAGE + 1)
    assert not bench.cache.stored


@pytest.mark.parametrize("more", [{"pages_most": 9}, {"slots": 2, "slots_most": 9, "pages": 9, "pages_most": 9}])
def test_nothing_is_evicted_for_steps_in_flight_where_pools_can_grow(more: dict[str, int]) -> None:
    bench = Bench(**{"pages": 3, "pages_most": 3, "slots": 3, "slots_most": 3, **more})
    sequence = bench.sequence(PAGE)
    bench.cached(2 * PAGE, first=500)
    if bench.slots.free == 0:
        bench.slots.retain(sequence.slot)  # type: ignore[arg-type]
    assert bench.pools.missing(sequence, PAGE + 1) != (0, 0)
    assert not bench.pools.evict(sequence, PAGE + 1)
    assert bench.cache.stored
    assert bench.cache.points
    assert not bench.executor.asked


def test_a_draft_has_a_slot_of_its_own() -> None:
    bench = Bench(pages=2, pages_most=3, slots=1, slots_most=2)
    sequence = bench.sequence(PAGE)
    assert bench.pools.make_room_for_draft(sequence, PAGE + 3)
    assert (bench.slots.free, bench.slots.size) == (1, 2)
    bench.slots.take()
    assert not bench.pools.make_room_for_draft(sequence, PAGE + 3)
    assert bench.pools.make_room(sequence, PAGE + 3)


def test_a_draft_takes_the_place_of_what_is_cached() -> None:
    bench = Bench(pages=3, pages_most=3, slots=2, slots_most=2)
    sequence = bench.sequence(PAGE)
    bench.cached(2 * PAGE, first=500)
    assert bench.pools.make_room_for_draft(sequence, PAGE + 3)
    assert (len(bench.cache.stored), len(bench.cache.points)) == (0, 0)


def test_a_checkpoint_of_a_grid_takes_no_other_ones_slot() -> None:
    bench = Bench(slots=2, slots_most=2)
    assert bench.pools.may_hold(Mark.GRID)
    bench.cached(5, first=500)
    bench.slots.take()
    assert not bench.pools.may_hold(Mark.GRID)
    assert bench.pools.may_hold(Mark.TURN)
    assert not bench.cache.points
    bench.slots.take()
    assert not bench.pools.may_hold(Mark.SYSTEM)
    roomy = Bench(slots=1, slots_most=2)
    roomy.slots.take()
    assert roomy.pools.may_hold(Mark.GRID)


# ---- in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "pages", "fits"), [(100, 5, True), (100, 4, False), (128, 5, False), (127, 5, True)])
def test_a_job_waits_until_the_pages_of_all_its_tokens_are_there(n: int, pages: int, fits: bool) -> None:
    """Beside it each running job has one page more. The token after a prompt counts."""
    bench = Bench(pages=pages, pages_most=pages)
    job, running = bench.job([7] * n, 1), bench.running(100)
    assert bench.admits(job, [running]) is fits
    assert (job.sequence.seat is None) is not fits
    alone = Bench(pages=1, pages_most=1)
    assert alone.admits(alone.job([7] * n), [])


@pytest.mark.parametrize(("slots", "fits"), [(2, True), (1, False)])
def test_a_job_waits_until_there_is_a_slot(slots: int, fits: bool) -> None:
    bench = Bench(slots=slots, slots_most=slots)
    assert bench.admits(bench.job([7] * 9, 1), [bench.running(100)]) is fits
    dense = Bench(recurrent=False)
    assert dense.admits(dense.job([7] * 9, 1), [dense.running(100)])


def test_a_job_whose_states_are_shared_waits_for_one_more_slot() -> None:
    for slots, fits in ((3, True), (2, False)):
        bench = Bench(slots=slots, slots_most=slots)
        bench.cached(70, first=500)
        bench.slots.retain(bench.cache.points[0][1])  # so that it is not evicted
        job = bench.job(list(range(500, 580)), 1)
        assert bench.admits(job, [bench.running(100)]) is fits
        assert job.sequence.computed == (70 if fits else 0)


def test_what_can_grow_or_be_evicted_counts_as_free() -> None:
    bench = Bench(pages=2, pages_most=5, slots=1, slots_most=2)
    assert bench.admits(bench.job([7] * 100, 1), [bench.running(100)])
    bench = Bench(pages=6, pages_most=6, slots=3, slots_most=3)
    bench.cached(2 * PAGE, first=500)
    assert bench.admits(bench.job([7] * 100, 1), [bench.running(100)])
    assert not bench.cache.stored


@pytest.mark.parametrize(("pages", "slots"), [(5, 4), (8, 2)])
def test_nothing_is_evicted_for_a_job_that_waits_all_the_same(pages: int, slots: int) -> None:
    bench = Bench(pages=pages, pages_most=pages, slots=slots, slots_most=slots)
    bench.cached(2 * PAGE, first=500)
    if slots == 2:
        bench.slots.retain(bench.cache.points[0][1])
    assert bench.pools.admit(bench.job([7] * 200, 1), [bench.running(100)], True, lambda: None) is Wait.ROOM
    assert bench.cache.stored
    assert bench.cache.points


def test_the_longest_known_beginning_is_taken_over() -> None:
    bench = Bench(recurrent=False, pages=20)
    ids = list(range(200))
    start = bench.sequence(150)
    for cached, wanted, source in ((100, 150, "start"), (180, 180, "memory")):
        sequence = bench.sequence(cached)
        bench.cache.store(sequence.ids, sequence.pages, cached)
        sequence.release(bench.pages, bench.slots)
        job = bench.job(ids)
        job.begin = start.fork(bench.pages, bench.slots)
        assert bench.admits(job, [])
        assert (job.sequence.computed, job.stats.reused, job.stats.source) == (wanted, wanted, source)
        assert len(job.sequence.pages) == PagePool.needed(wanted)
        job.begin.release(bench.pages, bench.slots)
        job.sequence.release(bench.pages, bench.slots)
    owned = [*bench.cache.owned_pages(), *start.pages]
    assert bench.pages.size - bench.pages.free == len(owned)


def test_the_last_token_is_always_computed() -> None:
    bench = Bench(recurrent=False)
    bench.cached(100, first=500)
    job = bench.job(list(range(500, 600)))
    assert bench.admits(job, [])
    assert job.sequence.computed == 99
    job = bench.job(list(range(500, 560)))
    job.begin = Sequence(job.sequence.ids[:60], [bench.pages.take()], None, computed=60, submitted=60)
    assert bench.admits(job, [])
    assert (job.sequence.computed, job.stats.source) == (59, "start")


def test_a_start_without_its_last_states_is_of_no_use_to_a_hybrid() -> None:
    bench = Bench()
    for n, wanted in ((80, 70), (71, 70), (70, 0), (60, 0)):
        job = bench.job(list(range(n)))
        job.begin = bench.sequence(70)
        assert bench.admits(job, [])
        assert job.sequence.computed == wanted
        assert (job.sequence.slot is not None) == bool(wanted)


# ---- out ---------------------------------------------------------------------------------------------------------


def pace(seconds_per_row: float | None, gap_seconds: float = 1000.0) -> Pace:
    made = Pace(gap_seconds, 512)
    made.seconds_per_row = seconds_per_row
    return made


def moved_out(
    n: int, seconds_per_page: float, seconds_per_row: float | None, gap_seconds: float = 1000.0, **options: Any
) -> tuple[Bench, Job]:
    """Moves a job out whose pages take so long to read."""
    bench = Bench(**options)
    job = bench.running(n)
    read = bench.executor.read_page

    def slow(page: int) -> bytes:
        bench.seconds += seconds_per_page
        return read(page)

    bench.executor.read_page = slow  # type: ignore[method-assign]
    bench.pools.move_out(job, pace(seconds_per_row, gap_seconds))
    assert job.sequence.pages == []
    assert job.stats.moved_out == 1
    return bench, job


@pytest.mark.parametrize(("per_row", "saved"), [(0.9, False), (1.1, True), (None, False), (0.0, False)])
def test_pages_are_saved_if_that_is_the_faster_way(per_row: float | None, saved: bool) -> None:
    """Two pages of 50 rows each, read and written once, take as long as 100 rows."""
    bench, job = moved_out(100, seconds_per_page=25.0, seconds_per_row=per_row)
    assert (job.saved is not None) is saved
    assert bool(bench.cache.stored) is not saved
    assert bench.pages.size - bench.pages.free == (0 if saved else 2)


def test_one_page_is_computed_again() -> None:
    assert moved_out(PAGE, 0.0, 1.0)[1].saved is None
    assert moved_out(PAGE + 1, 0.0, 1.0)[1].saved is not None


def test_a_copy_takes_no_longer_than_others_may_wait() -> None:
    """The beginning of a longer sequence is copied, and the rest is computed again. Its states are those of its end."""
    bench, job = moved_out(5 * PAGE + 9, 0.1, 1.0, gap_seconds=0.5, recurrent=False, pages=16, pages_most=16)
    assert job.saved
    assert job.saved.length == 4 * PAGE
    assert len(job.saved.pages) == 4
    assert bench.seconds <= 0.5
    assert bench.admits(job, [])
    assert (job.sequence.computed, len(job.sequence.pages)) == (4 * PAGE, 4)
    assert moved_out(5 * PAGE + 9, 0.1, 1.0, 0.5, recurrent=True, pages=16, pages_most=16)[1].saved is None
    assert moved_out(5 * PAGE + 9, 0.3, 1.0, 0.5, recurrent=False, pages=16, pages_most=16)[1].saved is None


@pytest.mark.parametrize("recurrent", [False, True])
def test_what_was_moved_out_comes_back(recurrent: bool) -> None:
    bench = Bench(recurrent=recurrent, pages=3, pages_most=3)
    job = bench.running(100)
    bench.executor.keys[job.sequence.pages] = [[[7, 8]], [[9, 10]]]
    if recurrent:
        bench.executor.states[job.sequence.slot] = 11  # type: ignore[index]
    bench.pools.move_out(job, pace(1.0))
    assert bench.pools.admit(job, [], False, lambda: None) is Wait.IDLE
    other = bench.running(2 * PAGE)
    assert not bench.admits(job, [])
    assert (job.sequence.pages, job.sequence.seat) == ([], None)
    other.sequence.release(bench.pages, bench.slots)
    assert bench.admits(job, [])
    assert bench.executor.keys[job.sequence.pages, 0].tolist() == [[7, 8], [9, 10]]
    assert (job.sequence.computed, job.sequence.submitted, job.saved) == (100, 100, None)
    if recurrent:
        assert bench.executor.states[job.sequence.slot] == 11  # type: ignore[index]


def test_a_job_that_came_back_is_not_kept() -> None:
    bench = Bench(recurrent=False)
    job = bench.running(100)
    bench.pools.move_out(job, pace(1.0))
    assert bench.admits(job, [])
    bench.pools.retire(job.sequence, store=False)
    left = weakref.ref(job)
    del job
    gc.collect()
    assert left() is None


def test_host_memory_has_a_limit_and_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(recurrent=False, pages=20)
    page = len(bench.executor.read_page(0))
    monkeypatch.setattr(pools_module, "HOST_BYTES", 4 * page)
    jobs = [bench.running(2 * PAGE, order=i) for i in range(4)]
    for job in jobs[:3]:
        bench.pools.move_out(job, pace(1.0))
    assert [job.saved is not None for job in jobs] == [True, True, False, False]
    bench.pools.forget_copies_for(jobs[0])
    bench.pools.forget_copies_for(jobs[0])
    bench.pools.move_out(jobs[3], pace(1.0))
    assert [job.saved is not None for job in jobs] == [False, True, False, True]
    bench.pools.forget_copies(None)
    assert [job.saved for job in jobs] == [None] * 4
    assert bench.pages.free == bench.pages.size


# ---- the end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", [False, True])
def test_a_retired_sequence_leaves_what_is_computed_to_the_cache(store: bool) -> None:
    bench = Bench()
    sequence = bench.sequence(70)
    sequence.ids += [5, 6, 7]
    sequence.sit(bench.pools.seats.take())
    bench.pools.retire(sequence, store)
    assert bench.pools.seats.free == 4
    assert (sequence.seat, sequence.pages, sequence.slot) == (None, [], None)
    found = bench.cache.match(list(range(80)))
    wanted = (70, 2, True) if store else (0, 0, False)
    assert (found.length, len(found.pages), found.slot is not None) == wanted
    bench.pools.retire(bench.sequence(0), store=True)
    assert len(bench.cache.stored) == store


def test_a_damaged_sequence_is_forgotten() -> None:
    bench = Bench(recurrent=False)
    bench.cached(70, first=0)
    sequence = bench.sequence(70)
    assert bench.pools.forget(sequence) is sequence
    assert not bench.cache.stored


def test_a_checkpoint_has_its_pages() -> None:
    bench = Bench()
    sequence = bench.sequence(100)
    bench.pools.checkpoint(sequence, 65, sequence.slot, Mark.TURN)  # type: ignore[arg-type]
    found = bench.cache.match(sequence.ids)
    assert (found.length, found.pages, found.slot) == (65, sequence.pages, sequence.slot)
