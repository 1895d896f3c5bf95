"""Scheduler over a fake executor, with the real prefix cache and its lower tier."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from support.fake_executor import VOCAB, FakeExecutor, expected
from support.scheduler_lab import PAGE_BYTES, Recorded, sink_of
from zincmetal.engine.cache_folder import CacheFolder, Loaded
from zincmetal.engine.cache_tier import AT_ONCE_BYTES, Tier, Transfer
from zincmetal.engine.pages import PagePool, StateSlots
from zincmetal.engine.prefix_cache import PrefixCache
from zincmetal.engine.prefix_tree import Mark
from zincmetal.engine.request import Request
from zincmetal.engine.scheduler import Scheduler

MODEL = b"0123456789abcdef"
OTHER = b"another model..."
LARGE = 1 << 30
ALL_FILES = 1000  # more than a lab reads; a semaphore takes time for each
TIMEOUT = 60  # seconds after which a test has failed
A, B = ([(7 * i + 13 * k) % VOCAB for i in range(400)] for k in range(2))


LABS: list[Lab] = []


class GatedFolder(CacheFolder):
    """Folder whose files wait to be read until they are given. ``asked`` has their names, ``threads`` their readers."""

    def __init__(self, folder: Path, model: bytes, budget: int) -> None:
        super().__init__(folder, model, budget)
        self.asked: SimpleQueue[str] = SimpleQueue()
        self.loads = Counter[str]()
        self.threads = set[str]()
        self.is_open = False
        self._given = threading.Semaphore(0)

    def give(self, files: int | None = None) -> None:
        """Let so many files more be read, or all."""
        self.is_open = files is None
        self._given.release(ALL_FILES if files is None else files)

    def load(self, name: str) -> Loaded:
        self.loads[name] += 1
        self.threads.add(threading.current_thread().name)
        self.asked.put(name)
        assert self._given.acquire(timeout=TIMEOUT)
        return super().load(name)


class Lab:
    """Scheduler with the real prefix cache and its tier, over a fake executor."""

    def __init__(
        self,
        folder: Path | None,
        recurrent: bool = False,
        host: int = LARGE,
        model: bytes = MODEL,
        disk: int = LARGE,
        gated: bool = False,
        clock: Callable[[], float] | None = None,
        portion: int = AT_ONCE_BYTES,
        **executor: Any,
    ) -> None:
        self.executor = FakeExecutor(recurrent=recurrent, **executor)
        self.pages, self.slots = PagePool(self.executor.pages_now), StateSlots(self.executor.slots_now)
        self.cache = PrefixCache(self.pages, self.slots, PagePool.PAGE, recurrent)
        LABS.append(self)
        self.folder = (GatedFolder if gated else CacheFolder)(folder, model, disk) if folder else None
        self.tier = Tier(model, host, self.folder)
        self.transfer = Transfer(self.executor, self.cache, self.tier, PAGE_BYTES, portion=portion)
        self.scheduler = Scheduler(
            self.executor,
            self.cache,
            tier=self.transfer,
            pages=self.pages,
            slots=self.slots,
            clock=clock or (lambda: self.executor.now),
        )

    def submit(self, ids: Iterable[int], max_tokens: int = 3, marks: Iterable[int] = ()) -> Request:
        request = Request(list(ids), max_tokens, Recorded(self.executor), marks=dict.fromkeys(marks, Mark.TURN))
        self.scheduler.submit(request)
        return request

    def until(self, there: Callable[[], Any]) -> None:
        """Steps until something is there."""
        for _ in range(5000):
            if there():
                return
            self.step()
        raise AssertionError("it does not come")

    def step(self, message: Callable[[], None] | None = None) -> bool:
        """Steps, and waits for files that may be read: or else others would be at their end before them."""
        busy, fetch = self.scheduler.step(message), self.transfer._fetch  # noqa: SLF001
        if fetch and isinstance(self.folder, GatedFolder) and self.folder.is_open:
            until = time.monotonic() + TIMEOUT
            while not fetch.over:
                assert time.monotonic() < until, "the reader does not read"
                time.sleep(0.0002)
        return busy

    @property
    def gate(self) -> GatedFolder:
        assert isinstance(self.folder, GatedFolder)
        return self.folder

    def run(self) -> None:
        message = None
        for _ in range(5000):
            if not self.step(message):
                return
            message = self.scheduler.rest()
        raise AssertionError("there is work left")

    def ask(self, ids: Iterable[int], max_tokens: int = 3, marks: Iterable[int] = ()) -> tuple[int, str]:
        """Runs one prompt, whose tokens are right. Returns what was reused, and from where."""
        request = self.submit(ids, max_tokens, marks)
        self.run()
        self.check(request)
        stats = sink_of(request).stats
        assert stats is not None
        return stats.reused, stats.source

    def check(self, request: Request) -> None:
        sink = sink_of(request)
        assert sink.error is None, sink.error
        assert sink.tokens == expected(request.ids, request.max_tokens, request.params, self.executor.recurrent)

    def check_owners(self) -> None:
        """When nothing runs, pages and slots are the cache's, and no entry is held for a prompt."""
        owned = self.pages.size - self.pages.free, self.slots.size - self.slots.free
        assert owned == (self.cache.n_pages, self.cache.n_checkpoints)
        assert self.tier.pinned == 0

    def close(self) -> None:
        """Ends as a model does, whose last turn was answered."""
        self.run()
        self.tier.close()


def files_of(folder: Path, model: bytes = MODEL) -> list[Path]:
    return sorted((folder / model.hex()).iterdir())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
