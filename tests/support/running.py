"""Looks below a model, between its steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zincmetal.api.model import Model
from zincmetal.engine.running import Running

TIMEOUT = 30  # seconds after which a test has failed


def running_of(model: Model) -> Running:
    """Returns the engine of a model, with its scheduler, its prefix cache and the thread that steps."""
    running = model.running
    return running


def until(true: Callable[[], object]) -> None:
    """Waits until something is true. Fails if that takes too long."""
    end = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


@contextmanager
def paused(model: Model) -> Iterator[None]:
    """Holds the thread that steps between two steps: what is submitted in the block begins together."""
    go = threading.Event()

    def wait() -> None:
        go.wait(TIMEOUT)

    model.running.loop.call(lambda: None)  # the thread has started
    model.running.scheduler.call(wait)
    try:
        yield
    finally:
        go.set()
