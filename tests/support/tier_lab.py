"""Scheduler over a fake executor, with the real prefix cache and its lower tier."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from support.fake_executor import VOCAB, FakeExecutor, expected
from support.scheduler_lab import Recorded, sink_of
from zincmetal.engine.cache_folder import CacheFolder
from zincmetal.engine.cache_tier import Tier, Transfer
from zincmetal.engine.pages import PagePool, StateSlots
from zincmetal.engine.prefix_cache import PrefixCache
from zincmetal.engine.prefix_tree import Mark
from zincmetal.engine.request import Request
from zincmetal.engine.scheduler import Scheduler

MODEL = b"0123456789abcdef"
OTHER = b"another model..."
LARGE = 1 << 30
A, B = ([(7 * i + 13 * k) % VOCAB for i in range(400)] for k in range(2))


LABS: list[Lab] = []


class Lab:
    """Scheduler with the real prefix cache and its tier, over a fake executor."""

    def __init__(
        self,
        folder: Path | None,
        recurrent: bool = False,
        host: int = LARGE,
        model: bytes = MODEL,
        disk: int = LARGE,
        **executor: Any,
    ) -> None:
        self.executor = FakeExecutor(recurrent=recurrent, **executor)
        self.pages, self.slots = PagePool(self.executor.pages_now), StateSlots(self.executor.slots_now)
        self.cache = PrefixCache(self.pages, self.slots, PagePool.PAGE, recurrent)
        LABS.append(self)
        self.tier = Tier(model, host, CacheFolder(folder, model, disk) if folder else None)
        transfer = Transfer(self.executor, self.cache, self.tier)
        self.scheduler = Scheduler(
            self.executor,
            self.cache,
            tier=transfer,
            pages=self.pages,
            slots=self.slots,
            clock=lambda: self.executor.now,
        )

    def submit(self, ids: Iterable[int], max_tokens: int = 3, marks: Iterable[int] = ()) -> Request:
        request = Request(list(ids), max_tokens, Recorded(self.executor), marks=dict.fromkeys(marks, Mark.TURN))
        self.scheduler.submit(request)
        return request

    def run(self) -> None:
        for _ in range(5000):
            if not self.scheduler.step():
                return
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

    def close(self) -> None:
        """Ends as a model does, whose last turn was answered."""
        self.run()
        self.tier.close()


def files_of(folder: Path, model: bytes = MODEL) -> list[Path]:
    return sorted((folder / model.hex()).iterdir())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
