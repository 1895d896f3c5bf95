"""Pools over the fake device and the list cache, for tests."""

from __future__ import annotations

from typing import Any

from support.fake_cache import ListCache
from support.fake_executor import FakeExecutor
from zincmetal.engine.pages import PagePool, Seats, StateSlots
from zincmetal.engine.pools import Pools
from zincmetal.engine.request import Job, Request
from zincmetal.engine.sequence import Sequence

PAGE = PagePool.PAGE


class SmallMemory(FakeExecutor):
    """Device that refuses to grow beyond ``room`` pages and slots together. ``asked``: the sizes that it was asked."""

    room = 1000

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[tuple[int, int]] = []

    def grow(self, pages: int, slots: int) -> bool:
        self.asked.append((pages, slots))
        return pages + slots <= self.room and super().grow(pages, slots)


class Bench:
    """Pools over small memory, and a clock that stands still."""

    def __init__(self, **options: Any) -> None:
        self.executor = SmallMemory(**{"n_ctx": 4096, "recurrent": True, **options})
        self.pages, self.slots = PagePool(self.executor.pages_now), StateSlots(self.executor.slots_now)
        self.cache = ListCache(self.pages, self.slots, self.executor.recurrent)
        self.seconds = 0.0
        self.pools = Pools(self.executor, self.cache, self.pages, self.slots, Seats(4), lambda: self.seconds)

    def sequence(self, n: int, with_slot: bool = True) -> Sequence:
        """Returns a sequence of which ``n`` tokens are computed."""
        pages = [self.pages.take() for _ in range(PagePool.needed(n))]
        slot = self.slots.take() if with_slot and self.executor.recurrent else None
        return Sequence(list(range(n)), pages, slot, computed=n, submitted=n, layout=self.pools.layout)

    def job(self, ids: list[int], order: int = 0) -> Job:
        return Job(Request(ids, 5, None), order, 0.0, self.executor)  # type: ignore[arg-type]

    def running(self, n: int, order: int = 0) -> Job:
        """Returns a job that has computed all its ids."""
        job = self.job(list(range(n)), order)
        job.sequence = self.sequence(n)
        return job

    def admits(self, job: Job, running: list[Job], idle: bool = True) -> bool:
        """Lets a job run, if it need not wait."""
        return self.pools.admit(job, running, idle, lambda: None) is None

    def cached(self, n: int, first: int) -> None:
        """Lets the cache have tokens that nobody uses, and their states."""
        sequence = self.sequence(n)
        sequence.ids = list(range(first, first + n))
        self.cache.store(sequence.ids, sequence.pages, n)
        if sequence.slot is not None:
            self.cache.checkpoint(sequence.ids, sequence.slot)
        sequence.release(self.pages, self.slots)
