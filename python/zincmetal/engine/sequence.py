"""Sequence of tokens, and the pages and the state slot that hold their keys, values and states. Plain data."""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field

from .pages import PagePool, StateSlots


@dataclass(eq=False)
class Sequence:
    """Tokens with their place in memory.

    ``ids`` are the tokens that are known. ``computed`` of them have keys and values in ``pages``, and ``slot`` holds
    the recurrent states after them. ``submitted`` counts the tokens whose rows were submitted: those beyond
    ``computed`` are in flight, and the id of the last one may not be known yet. ``slot`` is the slot after
    ``submitted`` tokens.

    Pages and slots may have other owners. Then nobody writes to them: see ``Builder`` in ``batch.py``.

    ``seat`` is the page table of the sequence on the device, whose first ``tabled`` entries are right.

    ``layout`` says which contents the pages have. A block that drafts adds some: see ``Pools.forget_copies``.

    ``drafting``: a row of that block is in flight, at the position of a token that is not known yet.
    """

    ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    seat: int | None = None
    computed: int = 0
    submitted: int = 0
    tabled: int = 0
    layout: int = 0
    drafting: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def in_flight(self) -> int:
        """Rows in flight."""
        return self.submitted - self.computed + self.drafting

    def sit(self, seat: int) -> None:
        """Take a seat, whose page table has to be written anew."""
        self.seat, self.tabled = seat, 0

    def fork(self, pages: PagePool, slots: StateSlots, length: int | None = None) -> Sequence:
        """Return a sequence of the first ``length`` tokens (all that are computed), which shares pages and states.

        States exist at the end alone: a shorter fork has no slot. Nothing may be in flight.
        """
        assert not self.in_flight, "the states of a sequence in flight are not at its end"
        length = self.computed if length is None else min(length, self.computed)
        slot = self.slot if length == self.computed else None
        return Sequence(
            ids=self.ids[:length],
            pages=pages.retain_all(self.pages[: pages.needed(length)]),
            slot=None if slot is None else slots.retain(slot),
            computed=length,
            submitted=length,
            layout=self.layout,
        )

    def release(self, pages: PagePool, slots: StateSlots) -> None:
        """Give the pages and the slot back. The ids stay, and nothing of them is computed."""
        assert not self.in_flight, "steps in flight still read the pages"
        held, self.pages = self.pages, []
        pages.release_all(held)
        slot, self.slot = self.slot, None
        if slot is not None:
            slots.release(slot)
        self.computed = self.submitted = self.tabled = 0


def common(a: AnySequence[int], b: AnySequence[int]) -> int:
    """Return the length of the common prefix."""
    n = min(len(a), len(b))
    if tuple(a[:n]) == tuple(b[:n]):  # the usual case, in one comparison
        return n
    return next(i for i in range(n) if a[i] != b[i])
