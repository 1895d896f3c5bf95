"""Progress bar on a terminal. Only this module knows tqdm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..device.buffers import Progress

_shown: list[Any] = []  # bars that are on the terminal now


def on_terminal() -> bool:
    """Return True if standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def bar(what: str, unit: str = "it", delay: float = 0) -> Iterator[Progress]:
    """Show a progress bar on standard error, and remove it at the end; without a terminal show nothing.

    Work that is done within ``delay`` seconds has no bar.
    """
    if not on_terminal():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    shown: list[Any] = []

    def update(done: int, total: int) -> None:
        if not shown:
            look: dict[str, Any] = {"desc": what, "unit": unit, "unit_scale": True, "leave": False, "delay": delay}
            shown.append(tqdm(total=total, file=sys.stderr, **look))
            _shown.append(shown[0])
        shown[0].update(done - shown[0].n)
        if done == total:
            shown[0].close()

    try:
        yield update
    finally:
        for b in shown:
            b.close()
            _shown.remove(b)


@contextmanager
def hidden_bar() -> Iterator[None]:
    """Take the bar off the terminal while a line is written."""
    for b in _shown:
        b.clear()
    try:
        yield
    finally:
        for b in _shown:
            b.refresh()
