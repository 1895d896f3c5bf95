"""Memory of a server while it is asked, and how it grows."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Sequence

from .client import HttpFailure, Target, get

EVERY = 5.0  # seconds
_RESIDENT = re.compile(rb"^process_resident_memory_bytes (\S+)$", re.MULTILINE)


class Slope:
    """Bytes of a server at some times: of a process and all that it started, or by the server's own word."""

    def __init__(self, target: Target, pid: int | None) -> None:
        self._target, self._pid = target, pid
        self._points: list[tuple[float, float]] = []

    async def watch(self) -> None:
        """Measure until the task is cancelled."""
        while True:
            nbytes = await self._bytes()
            if nbytes:
                self._points.append((time.perf_counter(), nbytes))
            await asyncio.sleep(EVERY)

    async def _bytes(self) -> float:
        if self._pid is not None:
            return await resident(self._pid)
        try:
            found = _RESIDENT.search(await get(self._target, "/metrics"))
        except HttpFailure:
            return 0.0
        return float(found[1]) if found else 0.0

    @property
    def last(self) -> float:
        """Bytes at the end."""
        return self._points[-1][1] if self._points else math.nan

    def per_minute(self) -> float:
        """Return the growth in bytes a minute, without the first quarter: caches fill there."""
        return 60 * slope(self._points[len(self._points) // 4 :])


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line that fits best, NaN for fewer than three points."""
    if len(points) < 3:
        return math.nan
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else math.nan


async def resident(pid: int) -> float:
    """Return the resident bytes of a process and of all processes that it started, 0 if it is gone."""
    ps = await asyncio.create_subprocess_exec("ps", "-A", "-o", "pid=,ppid=,rss=", stdout=asyncio.subprocess.PIPE)
    rows = [line.split() for line in (await ps.communicate())[0].decode().splitlines()]
    kilobytes = {int(row[0]): int(row[2]) for row in rows if len(row) == 3}
    parents = {int(row[0]): int(row[1]) for row in rows if len(row) == 3}
    total = 0
    for one in kilobytes:
        at, seen = one, set[int]()
        while at != pid and at in parents and at not in seen:
            seen.add(at)
            at = parents[at]
        total += kilobytes[one] if at == pid else 0
    return 1024.0 * total


__all__ = ["Slope", "resident", "slope"]
