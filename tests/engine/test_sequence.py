"""A sequence as plain data: without a model."""

from __future__ import annotations

from zincmetal.engine.pages import PagePool, StateSlots
from zincmetal.engine.sequence import Sequence, common


def test_a_fork_shares_the_pages_of_its_tokens_and_the_states_at_the_end_alone() -> None:
    pages, slots = PagePool(8), StateSlots(2)
    sequence = Sequence([*range(150)], [pages.take() for _ in range(3)], slots.take(), computed=150, submitted=150)
    whole, part = sequence.fork(pages, slots), sequence.fork(pages, slots, 128)
    assert (whole.ids, whole.pages, whole.slot) == (sequence.ids, sequence.pages, sequence.slot)
    assert (part.ids, part.pages, part.slot) == (sequence.ids[:128], sequence.pages[:2], None)
    assert [pages.count(p) for p in sequence.pages] == [3, 3, 2]
    for each in (sequence, whole, part):
        each.release(pages, slots)
    assert (pages.free, slots.free) == (8, 2)


def test_a_common_prefix_ends_with_the_shorter() -> None:
    assert [common(*pair) for pair in (([], [1]), ([1, 2], [1, 2, 3]), ([1, 2], [2, 1]))] == [0, 2, 0]
