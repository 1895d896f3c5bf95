"""A progress bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..device.buffers import Progress


def on_terminal() -> bool:
    """Whether somebody sees standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def bar(what: str, disable: bool, unit: str = "it") -> Iterator[Progress]:
    """A progress bar on standard error that is gone when it is done; with ``disable``, nothing."""
    if disable:
        yield lambda done, total: None
        return
    from tqdm import tqdm

    shown: list[Any] = []

    def update(done: int, total: int) -> None:
        if not shown:
            shown.append(tqdm(total=total, desc=what, unit=unit, unit_scale=True, leave=False, file=sys.stderr))
        shown[0].update(done - shown[0].n)
        if done == total:
            shown[0].close()

    try:
        yield update
    finally:
        for b in shown:
            b.close()
