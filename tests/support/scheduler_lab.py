"""Scheduler over a fake executor, with requests that record their events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from support.fake_cache import ListCache
from support.fake_executor import FakeExecutor, expected
from support.hand_reader import HandReader, MemoryFolder, OwnedCache
from zincmetal.engine.cache_tier import Tier, Transfer
from zincmetal.engine.pages import PagePool, StateSlots
from zincmetal.engine.request import Request, Stats
from zincmetal.engine.scheduler import Scheduler
from zincmetal.engine.sequence import Sequence
from zincmetal.sampling.params import SamplingParams

PAGE_BYTES = PagePool.PAGE * 2 * 8  # of the executor


class Recorded:
    """Sink that keeps its events, with the executor's time of each token. ``at_end`` is called with the reason."""

    def __init__(self, executor: FakeExecutor) -> None:
        self.executor = executor
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.reason = ""
        self.stats: Stats | None = None
        self.error: BaseException | None = None
        self.ends = 0
        self.stop_at = 0  # tokens after which it ends its request
        self.raises: BaseException | None = None

    def progress(self, done: int, total: int) -> None:
        assert not self.ends

    def started(self, stats: Stats) -> None:
        assert not self.tokens

    def token(self, id: int, choice: Any) -> str | None:
        assert not self.ends, "a token came after the end"
        self.tokens.append(id)
        self.times.append(self.executor.now)
        if self.raises:
            raise self.raises
        return "stopped" if len(self.tokens) == self.stop_at else None

    def done(self, reason: str, stats: Stats) -> None:
        self.ends += 1
        self.reason, self.stats = reason, stats

    def failed(self, error: BaseException) -> None:
        self.ends += 1
        self.error = error


class Lab:
    """Scheduler, fake executor and list cache. ``steps`` bounds each wait.

    With a ``host`` budget it has the real prefix cache, and its lower tier with a ``folder`` and a ``reader``.
    """

    def __init__(
        self, executor: FakeExecutor | None = None, cached: bool = True, host: int | None = None, **options: Any
    ) -> None:
        self.executor = executor or FakeExecutor()
        pages, slots = PagePool(self.executor.pages_now), StateSlots(self.executor.slots_now)
        self.cache: ListCache | OwnedCache | None = None
        self.tier: Tier | None = None
        if host is not None:
            self.folder = MemoryFolder()
            self.reader = HandReader(self.folder)
            self.cache = OwnedCache(pages, slots, PagePool.PAGE, self.executor.recurrent)
            self.tier = Tier(b"model", host, self.folder)
            self.tier.reader = self.reader
            self.transfer = Transfer(self.executor, self.cache, self.tier, PAGE_BYTES, portion=2 * PAGE_BYTES)
            options["tier"] = self.transfer
        elif cached:
            self.cache = ListCache(pages, slots, self.executor.recurrent)
        self.scheduler = Scheduler(
            self.executor, self.cache, pages=pages, slots=slots, clock=lambda: self.executor.now, **options
        )
        self.pools = self.scheduler.pools
        self.kept: list[Sequence] = []

    def request(self, ids: Iterable[int], max_tokens: int = 8, marks: Iterable[int] = (), **options: Any) -> Request:
        options["marks"] = dict.fromkeys(marks, 1)
        return Request(list(ids), max_tokens, Recorded(self.executor), **options)

    def submit(self, ids: Iterable[int], max_tokens: int = 8, **options: Any) -> Request:
        request = self.request(ids, max_tokens, **options)
        self.scheduler.submit(request)
        return request

    def run(self, steps: int = 2000) -> None:
        for _ in range(steps):
            if not self.scheduler.step():
                return
        raise AssertionError(f"there is work left after {steps} steps")

    def expected(self, request: Request) -> list[int]:
        executor = self.executor
        return expected(
            request.ids, request.max_tokens, request.params, executor.recurrent, executor.damaged, request.eog_ids
        )

    def check_ended(self, *requests: Request) -> None:
        """Each request has its own tokens, and one end."""
        for request in requests:
            sink = sink_of(request)
            assert sink.error is None, sink.error
            assert sink.ends == 1
            assert sink.tokens == self.expected(request)

    def check_owners(self, *others: Sequence) -> None:
        """When nothing runs, pages and slots belong to the cache and to sequences that were kept."""
        cached_pages = self.cache.owned_pages() if self.cache else []
        cached_slots = self.cache.owned_slots() if self.cache else []
        pages = Counter([*cached_pages, *(page for s in (*self.kept, *others) for page in s.pages)])
        slots = Counter([*cached_slots, *(s.slot for s in (*self.kept, *others) if s.slot is not None)])
        pool, slot_pool = self.pools.pages, self.pools.slots
        assert {i: pool.count(i) for i in range(pool.size) if pool.count(i)} == pages
        assert {i: slot_pool.count(i) for i in range(slot_pool.size) if slot_pool.count(i)} == slots
        assert pool.free == pool.size - len(pages)
        assert slot_pool.free == slot_pool.size - len(slots)


def sink_of(request: Request) -> Recorded:
    """Returns the sink that recorded a request."""
    assert isinstance(request.sink, Recorded)
    return request.sink


SEEDED = SamplingParams(temperature=0.8, seed=7)
EOG_HEAVY = frozenset(range(0, 1000, 9))
