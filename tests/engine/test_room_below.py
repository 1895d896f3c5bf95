"""Pools over a lower tier of the cache: what a prompt takes over from it, and what is copied to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.pools_bench import PAGE, Bench
from zincmetal.engine.pools import Wait
from zincmetal.engine.prefix_cache import Mark


class Lower:
    """Tier that has the first ``n`` pages of every prompt, and its states if it is asked for ``states``."""

    def __init__(self, bench: Bench, n: int = 2, states: bool = False) -> None:
        self.bench, self.n, self.states = bench, n, states
        self.noted: list[list[int]] = []
        self.forgotten: list[list[int]] = []
        self.evicted: list[tuple[int, int]] = []
        self.released: list[object] = []
        self.left = 0  # turns to copy
        self.hangs = False
        self.behind = False  # after each turn, for a while
        self.fails = False

    @property
    def wanted(self) -> list[str]:
        return ["page"] * self.n + ["state"] * self.states

    def fetch(self, owner: object, ids: list[int], wake: object) -> tuple[Lower | None, bool]:
        return self if len(ids) >= self.n * PAGE else None, False

    def bring(self, ids: list[int], take: Callable[[bool], int | None], pools: Any, whole: bool) -> tuple[str, bool]:
        taken = [take(True) for _ in range(self.n)]
        pages = [page for page in taken if page is not None]
        slot = take(False) if self.states else None
        length = len(pages) * PAGE
        if pages:
            self.bench.cache.store(ids[:length], pages, length)
        if slot is not None:
            self.bench.cache.checkpoint(ids[:length], slot)
            self.bench.slots.release(slot)
        self.bench.pages.release_all(pages)
        return "host" if pages and (slot is not None) == self.states else "", False

    def release(self, owner: object = None) -> None:
        self.released.append(owner)

    def evict(self, pages: int, slots: int) -> bool:
        self.evicted.append((pages, slots))
        return self.bench.cache.evict(pages, slots)

    @property
    def pending(self) -> bool:
        return self.left > 0

    @property
    def may_save(self) -> bool:
        return self.pending and not self.behind

    def save(self) -> None:
        if self.fails:
            raise OSError("the disk is full")
        self.behind = not self.behind
        self.left -= self.behind

    def note(self, ids: list[int]) -> None:
        self.noted.append(ids)

    def forget(self, ids: list[int]) -> None:
        self.forgotten.append(ids)


def over(n: int = 2, states: bool = False, **options: Any) -> tuple[Bench, Lower]:
    """Returns pools over a tier."""
    bench = Bench(**options)
    tier = Lower(bench, n, states)
    bench.pools.forget_copies(tier)  # type: ignore[arg-type]
    return bench, tier


def wanted(bench: Bench, job: Any, running: list[Any]) -> Wait | None:
    """Returns what a job waits for while steps are in flight."""
    return bench.pools.admit(job, running, False, lambda: None)


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_prompt_takes_over_what_the_tier_has(recurrent: bool) -> None:
    bench, tier = over(states=recurrent, recurrent=recurrent)
    job = bench.job(list(range(200)))
    assert wanted(bench, job, []) is Wait.IDLE
    assert bench.admits(job, [])
    assert (job.sequence.computed, job.stats.reused, job.stats.source) == (128, 128, "host")
    assert len(job.sequence.pages) == 2
    assert tier.released == [job]
    assert bench.pages.size - bench.pages.free == 2


def test_a_prompt_takes_over_nothing_while_steps_are_in_flight_nor_anew() -> None:
    bench, _ = over(recurrent=False)
    short, anew, started = bench.job(list(range(128))), bench.job(list(range(200))), bench.job(list(range(200)))
    anew.anew = True
    started.begin = bench.sequence(50)
    assert wanted(bench, bench.job(list(range(200))), []) is Wait.IDLE
    for job, computed in ((short, 0), (anew, 0), (started, 50)):
        assert wanted(bench, job, []) is None
        assert job.sequence.computed == computed


def test_what_the_tier_brings_makes_pools_grow_beside_a_page_for_each_running_job() -> None:
    bench, tier = over(recurrent=False, pages=2, pages_most=9)
    job = bench.job([7] * 200, 1)
    assert bench.admits(job, [bench.running(PAGE)])
    assert job.sequence.computed == 128
    assert not tier.evicted
    assert bench.executor.asked == [(4, 0)]


def test_what_the_tier_brings_takes_the_place_of_what_is_cached() -> None:
    bench, tier = over(1, recurrent=False, pages=2, pages_most=2)
    bench.cached(2 * PAGE, first=500)
    job = bench.job(list(range(100)))
    assert bench.admits(job, [])
    assert (job.sequence.computed, job.stats.source) == (64, "host")
    assert tier.evicted == [(1, 0)]


@pytest.mark.parametrize(("slots", "brought"), [(3, True), (2, False)])
def test_states_that_the_tier_brings_leave_a_slot_for_each_running_job(slots: int, brought: bool) -> None:
    bench, _ = over(states=True, slots=slots, slots_most=slots)
    job = bench.job([7] * 200, 1)
    assert bench.admits(job, [bench.running(PAGE)])
    assert bool(bench.cache.points) is brought
    assert bool(job.sequence.computed) is brought
    assert bench.cache.stored


def test_states_that_the_tier_brings_take_the_place_of_states_alone() -> None:
    bench, tier = over(states=True, slots=1, slots_most=1)
    bench.cached(PAGE, first=500)
    job = bench.job(list(range(200)))
    assert bench.admits(job, [])
    assert job.sequence.computed == 128
    assert tier.evicted == [(0, 1)]
    assert len(bench.cache.stored) == 2


def test_while_steps_are_in_flight_nothing_is_evicted_that_the_tier_would_copy() -> None:
    bench, tier = over(pages=3, pages_most=3)
    sequence = bench.sequence(PAGE)
    assert bench.pools.evict(sequence, PAGE + 1)
    bench.cached(2 * PAGE, first=500)
    assert not bench.pools.evict(sequence, PAGE + 1)
    assert bench.cache.stored
    assert not tier.evicted
    assert bench.pools.make_room(sequence, PAGE + 1)
    assert tier.evicted == [(1, 0)]


@pytest.mark.parametrize("idle", [False, True])
def test_what_a_new_job_needs_is_evicted_through_the_tier_from_an_idle_device(idle: bool) -> None:
    bench, tier = over(9, pages=6, pages_most=6)
    bench.cached(2 * PAGE, first=500)
    job, running = bench.job([7] * 100, 1), [bench.running(100)]
    if not idle:
        assert wanted(bench, job, running) is Wait.IDLE
        assert bench.cache.stored
        assert not tier.evicted
    assert bench.admits(job, running)
    assert not bench.cache.stored
    assert tier.evicted == [(1, 0)]


def test_a_job_that_waits_for_others_wants_no_idle_device() -> None:
    bench, tier = over(1, pages=4, pages_most=4)
    bench.cached(PAGE, first=500)
    running = [bench.running(100)]
    for ids in ([7] * 100, [7] * 60):  # the tier has something of one of them
        assert wanted(bench, bench.job(ids * 2, 1), running) is Wait.ROOM
    assert bench.cache.stored
    assert not tier.evicted


def test_the_tier_hears_of_turns_that_end_and_of_damage() -> None:
    bench, tier = over()
    bench.pools.retire(bench.sequence(70), store=True)
    bench.pools.retire(bench.sequence(80), store=False)
    bench.pools.retire(bench.sequence(0), store=True)
    assert tier.noted == [list(range(70))]
    bench.pools.forget(bench.sequence(90))
    assert tier.forgotten == [list(range(90))]
    bench.pools.forget_copies(None)
    bench.pools.retire(bench.sequence(70), store=True)
    assert len(tier.noted) == 1


def test_turns_are_copied_one_by_one_or_all(caplog: pytest.LogCaptureFixture) -> None:
    bench, tier = over()
    assert not bench.pools.saving
    tier.left = 4
    assert bench.pools.saving
    assert bench.pools.may_save
    bench.pools.save()
    assert tier.left == 3
    assert bench.pools.saving
    assert not bench.pools.may_save
    bench.pools.save_all()
    assert tier.left == 0
    tier.left, tier.hangs = 3, True
    bench.pools.save_all()
    assert tier.left == 2, "nothing waits for a disk that hangs"
    assert "its disk is behind" in caplog.text
    tier.left, tier.fails = 2, True
    bench.pools.save_all()
    assert "the disk is full" in caplog.text
    bench.pools.forget_copies(None)
    bench.pools.save()
    assert not bench.pools.saving
    assert bench.pools.may_hold(Mark.GRID)
