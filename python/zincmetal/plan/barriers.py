"""Barriers: a dispatch waits for the earlier ones where they touch the same bytes and one of them writes."""

from __future__ import annotations

from collections.abc import Sequence

from .addresses import Region
from .launch import Dispatch, Launch


def place_barriers(launches: Sequence[Launch], regions: Sequence[tuple[Region, ...]]) -> list[Dispatch]:
    """Each launch with its regions, and a barrier where it conflicts with a launch since the last barrier."""
    out: list[Dispatch] = []
    since = 0
    for launch, at in zip(launches, regions, strict=True):
        d = Dispatch(launch, at, barrier=False)
        if any(conflict(earlier, d) for earlier in out[since:]):
            d = Dispatch(launch, at, barrier=True)
            since = len(out)
        out.append(d)
    return out


def hazards(dispatches: Sequence[Dispatch]) -> list[tuple[int, int]]:
    """Numbers of two dispatches that conflict without a barrier between them. A correct plan has none."""
    found, since = [], 0
    for i, d in enumerate(dispatches):
        since = i if d.barrier else since
        found += [(j, i) for j in range(since, i) if conflict(dispatches[j], d)]
    return found


def conflict(earlier: Dispatch, later: Dispatch) -> bool:
    """Whether the order matters: read after write, write after read, or write after write, on a shared byte."""
    return (
        _any_overlap(earlier.touching("w"), later.touching("r"))
        or _any_overlap(earlier.touching("r"), later.touching("w"))
        or _any_overlap(earlier.touching("w"), later.touching("w"))
    )


def _any_overlap(a: Sequence[Region], b: Sequence[Region]) -> bool:
    return any(x.overlaps(y) for x in a for y in b)
