"""What grammars cost so far: how many were compiled, how many masks were computed, and the seconds of both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Spent:
    """Numbers and seconds by kind of work. Of two threads at once one may be missed: these are figures alone."""

    def __init__(self) -> None:
        self.times: dict[str, int] = {"compile": 0, "mask": 0}
        self.seconds: dict[str, float] = {"compile": 0.0, "mask": 0.0}

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Count a piece of work."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.times[kind] += 1
            self.seconds[kind] += time.perf_counter() - began
