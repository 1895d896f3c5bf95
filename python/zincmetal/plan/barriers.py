"""Barriers: a dispatch waits for earlier dispatches if both touch the same bytes and one of them writes."""

from __future__ import annotations

from collections.abc import Sequence

from .addresses import Region
from .launch import Dispatch, Launch, touched


def place_barriers(launches: Sequence[Launch], regions: Sequence[tuple[Region, ...]]) -> list[Dispatch]:
    """Return each launch with its regions, and a barrier if it conflicts with a launch since the last barrier."""
    out: list[Dispatch] = []
    read, written = list[Region](), list[Region]()  # since the last barrier
    for launch, at in zip(launches, regions, strict=True):
        reads, writes = touched(launch, at, "r"), touched(launch, at, "w")
        barrier = _any_overlap(written, reads) or _any_overlap(read, writes) or _any_overlap(written, writes)
        if barrier:
            read, written = [], []
        read += reads
        written += writes
        out.append(Dispatch(launch, at, barrier))
    return out


def hazards(dispatches: Sequence[Dispatch]) -> list[tuple[int, int]]:
    """Return pairs of dispatches that conflict without a barrier between them. A correct plan has none."""
    found, since = [], 0
    for i, d in enumerate(dispatches):
        since = i if d.barrier else since
        found += [(j, i) for j in range(since, i) if conflict(dispatches[j], d)]
    return found


def conflict(earlier: Dispatch, later: Dispatch) -> bool:
    """Return True if the order matters: read after write, write after read, or write after write, on a shared byte."""
    return (
        _any_overlap(earlier.touching("w"), later.touching("r"))
        or _any_overlap(earlier.touching("r"), later.touching("w"))
        or _any_overlap(earlier.touching("w"), later.touching("w"))
    )


def longest_chain(dispatches: Sequence[Dispatch]) -> int:
    """Return the number of dispatches in the longest chain in which each conflicts with the one before it.

    A device that runs all other dispatches side by side still runs these one after the other.
    """
    longest = 0
    before: dict[str, list[tuple[Region, bool, int]]] = {}  # by buffer: a region, whether it was written, its chain
    written = {region.buffer for d in dispatches for region in d.touching("w")}
    for d in dispatches:
        touching = [(r, mode == "w") for mode in "rw" for r in d.touching(mode) if r.buffer in written]
        chain = 1 + max(
            (n for r, w in touching for other, v, n in before.get(r.buffer, ()) if (w or v) and r.overlaps(other)),
            default=0,
        )
        for region, w in touching:
            entries = before.setdefault(region.buffer, [])
            if w:  # who touches a byte of a region later follows this dispatch, and so what it hides
                entries[:] = [entry for entry in entries if not _within(entry[0], region)]
            entries.append((region, w, chain))
        longest = max(longest, chain)
    return longest


def _within(inner: Region, outer: Region) -> bool:
    return outer.offset <= inner.offset and inner.offset + inner.nbytes <= outer.offset + outer.nbytes


def _any_overlap(a: Sequence[Region], b: Sequence[Region]) -> bool:
    return any(x.overlaps(y) for x in a for y in b)
