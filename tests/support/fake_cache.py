"""Prefix cache for tests of the scheduler: a list of what ended, searched from end to end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from zincmetal.engine.pages import PagePool, StateSlots
from zincmetal.engine.prefix_cache import Match
from zincmetal.engine.sequence import common


class ListCache:
    """Cache that keeps all it is given, and evicts the oldest."""

    def __init__(self, pages: PagePool, slots: StateSlots, recurrent: bool) -> None:
        self.pool, self.slot_pool, self.recurrent = pages, slots, recurrent
        self.stored: list[tuple[list[int], list[int]]] = []
        self.points: list[tuple[list[int], int]] = []

    def match(self, ids: Sequence[int]) -> Match:
        length, pages, slot = 0, [], None
        for known, held in self.stored:
            n = common(known, ids)
            if self.recurrent:
                n, point = max(
                    ((len(at), s) for at, s in self.points if ids[: len(at)] == at and len(at) <= n), default=(0, 0)
                )
            if n > length:
                length, pages, slot = n, held[: self.pool.needed(n)], point if self.recurrent else None
        if slot is not None:
            self.slot_pool.retain(slot)
        return Match(length=length, pages=self.pool.retain_all(pages), slot=slot)

    def store(self, ids: Sequence[int], pages: Sequence[int], length: int) -> None:
        assert length <= len(ids)
        assert len(pages) == self.pool.needed(length)
        if length and not any(known[:length] == ids[:length] for known, _ in self.stored):
            self.stored.append((list(ids[:length]), self.pool.retain_all(pages)))

    def checkpoint(self, ids: Sequence[int], slot: int, mark: object = None) -> None:
        if not any(known == ids for known, _ in self.points):
            self.points.append((list(ids), self.slot_pool.retain(slot)))

    def can_evict(self, pages: int, slots: int) -> bool:
        mine, points = Counter(self.owned_pages()), Counter(self.owned_slots())
        alone = sum(self.pool.count(page) == n for page, n in mine.items())
        return pages <= alone and slots <= sum(self.slot_pool.count(slot) == n for slot, n in points.items())

    def evict(self, pages: int, slots: int) -> bool:
        pages, slots = self.pool.free + pages, self.slot_pool.free + slots
        while self.stored and self.pool.free < pages:
            self.pool.release_all(self.stored.pop(0)[1])
        while self.points and self.slot_pool.free < slots:
            self.slot_pool.release(self.points.pop(0)[1])
        return self.pool.free >= pages and self.slot_pool.free >= slots

    def let_go(self, pages: Sequence[int], slot: int | None) -> None:
        for i in [i for i, (_, held) in enumerate(self.stored) if set(held) & set(pages)][::-1]:
            self.pool.release_all(self.stored.pop(i)[1])
        for i in [i for i, (_, held) in enumerate(self.points) if held == slot][::-1]:
            self.slot_pool.release(self.points.pop(i)[1])

    def forget(self, ids: Sequence[int]) -> None:
        for i in [i for i, (known, _) in enumerate(self.stored) if common(known, ids)][::-1]:
            self.pool.release_all(self.stored.pop(i)[1])
        for i in [i for i, (known, _) in enumerate(self.points) if common(known, ids)][::-1]:
            self.slot_pool.release(self.points.pop(i)[1])

    def clear(self) -> None:
        self.evict(self.pool.size, self.slot_pool.size)

    def owned_pages(self) -> list[int]:
        return [page for _, pages in self.stored for page in pages]

    def owned_slots(self) -> list[int]:
        return [slot for _, slot in self.points]
