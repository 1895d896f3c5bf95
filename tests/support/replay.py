"""Runs recorded requests on a hybrid: what its prefix cache gives to each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.agents import Run
from zincmetal import gguf
from zincmetal.engine.engine import Engine
from zincmetal.engine.loaded import Loaded
from zincmetal.engine.request import Request, Stats
from zincmetal.engine.running import Running
from zincmetal.sampling.params import SamplingParams


class Sink:
    """Takes the end of one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.stats: Stats | None = None
        self.error: BaseException | None = None

    def progress(self, done: int, total: int) -> None: ...

    def started(self, stats: Stats) -> None: ...

    def token(self, id: int, choice: Any) -> str | None:
        self.tokens.append(id)
        return None

    def done(self, reason: str, stats: Stats) -> None:
        self.stats = stats

    def failed(self, error: BaseException) -> None:
        self.error = error


def reused(path: Path, runs: Sequence[Run]) -> list[int]:
    """Runs the requests one after another. Returns how many tokens of each prompt came from the cache."""
    running = Running(Engine(Loaded(gguf.open(path), context=8192, device="cpu")), True, None)
    leave = running.use()
    try:
        return [_reused(running, run) for run in runs]
    finally:
        leave()


def _reused(running: Running, run: Run) -> int:
    sink = Sink()
    params = SamplingParams(temperature=0, logits_processors=(_only(run),))
    running.loop.submit(Request(run.ids, len(run.made), sink, params, marks=run.marks))
    while sink.stats is None and sink.error is None:
        running.loop.call(lambda: None)
    assert sink.stats is not None, sink.error
    assert sink.tokens == run.made
    return sink.stats.reused


def _only(run: Run) -> Callable[[Sequence[int], NDArray[np.float32]], NDArray[np.float32]]:
    """Makes the processor that leaves only the token that the script wrote."""

    def only(ids: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        left = np.full_like(logits, -np.inf)
        left[run.made[len(ids) - len(run.ids)]] = 0
        return left

    return only
