"""Lets the start of a thread fail, as it does where a system has no room for more.

As a program it stands in place of ``zincmetal.serve.worker``: the process of a model whose thread number ``START`` of
the environment does not start.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zincmetal.serve import worker

START = "REFUSED_START"
WORDS = "can't start new thread"
BOOT = "import sys; sys.path[:] = sys.argv[4:]; from support.thread_starts import main; main()"


@contextmanager
def refused(number: int) -> Iterator[list[str]]:
    """Lets start ``number`` fail, from 1 on. The list has the name of its thread once it has failed."""
    start, count, failed = threading.Thread.start, 0, list[str]()

    def refuse(thread: threading.Thread) -> Any:
        nonlocal count
        count += 1
        if count == number:
            failed.append(thread.name)
            raise RuntimeError(WORDS)
        return start(thread)

    threading.Thread.start = refuse  # type: ignore[assignment, method-assign]
    try:
        yield failed
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]


def main() -> None:
    """Serves a model."""
    with refused(int(os.environ[START])):
        worker.main()
