"""The prefix cache: what it finds, why no more, what it evicts first; and random use of it against brute force."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from zincmetal.engine import prefix_cache
from zincmetal.engine.pages import PagePool, StateSlots
from zincmetal.engine.prefix_cache import Mark, Match, Miss, NoCache, PrefixCache
from zincmetal.engine.prefix_tree import Node
from zincmetal.engine.sequence import common

PAGE = 4  # tokens: small, so that few tokens fill many pages


class Lab:
    """Cache over small pools. ``held`` says what each page and slot holds: all tokens up to the last one in it."""

    def __init__(self, recurrent: bool = False, pages: int = 64, slots: int = 16) -> None:
        self.pages, self.slots = PagePool(pages), StateSlots(slots)
        self.cache = PrefixCache(self.pages, self.slots, PAGE, recurrent)
        self.recurrent = recurrent
        self.held_pages: dict[int, tuple[int, ...]] = {}
        self.held_slots: dict[int, tuple[int, ...]] = {}

    def compute(self, ids: Sequence[int], found: Match | None = None) -> list[int]:
        """Takes over what was found, and computes the rest of ``ids``. Returns the pages, of which it is an owner."""
        length, pages = (found.length, list(found.pages)) if found else (0, [])
        if length % PAGE and length < len(ids):  # somebody writes into the last page
            self.pages.release(pages.pop())
        while len(pages) * PAGE < len(ids):
            pages.append(self.pages.take())
            self.held_pages[pages[-1]] = tuple(ids[: len(pages) * PAGE])
        return pages

    def state(self, ids: Sequence[int]) -> int:
        """Returns a slot with the states after ``ids``, whose owner is the caller."""
        slot = self.slots.take()
        self.held_slots[slot] = tuple(ids)
        return slot

    def learn(self, ids: Sequence[int], *marks: int, mark: Mark = Mark.TURN) -> None:
        """Computes ``ids`` and gives the cache what there is, with checkpoints after so many tokens."""
        pages = self.compute(ids)
        self.cache.store(ids, pages, len(ids))
        for at in marks:
            slot = self.state(ids[:at])
            self.cache.checkpoint(ids[:at], slot, mark)
            self.slots.release(slot)
        self.pages.release_all(pages)

    def match(self, ids: Sequence[int]) -> Match:
        """Asks the cache. What it returns holds a true beginning of ``ids``."""
        found = self.cache.match(ids)
        assert found.length <= len(ids)
        assert len(found.pages) == -(-found.length // PAGE)
        for i, page in enumerate(found.pages):
            end = min((i + 1) * PAGE, found.length)
            assert self.held_pages[page][:end] == tuple(ids[:end])
            assert self.pages.count(page) > 1
        if self.recurrent and found.length:
            assert found.slot is not None
            assert self.held_slots[found.slot] == tuple(ids[: found.length])
        return found

    def release(self, found: Match) -> None:
        found.release(self.pages, self.slots)

    def reused(self, ids: Sequence[int]) -> tuple[int, Miss | None]:
        found = self.match(ids)
        self.release(found)
        return found.length, found.miss


IDS = list(range(10, 40))


# ---- what is found -------------------------------------------------------------------------------------------------


def test_an_empty_cache_says_so():
    assert Lab().reused(IDS) == (0, Miss("empty"))
    assert NoCache().match(IDS) == Match(miss=Miss("off"))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 30])
def test_a_prompt_takes_over_all_that_is_known_of_it(n: int):
    lab = Lab()
    lab.learn(IDS[:n])
    assert lab.reused(IDS) == (n, None)
    assert lab.reused(IDS[:n]) == (n, None)
    assert lab.cache.n_pages == -(-n // PAGE)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 6, 8])
def test_a_prompt_ends_where_it_differs_also_within_a_page(n: int):
    lab = Lab()
    lab.learn(IDS[:10])
    length, miss = lab.reused([*IDS[:n], 1, 2, 3])
    assert length == n
    assert miss is not None
    assert (miss.kind, miss.at, miss.cached[0], miss.asked) == ("differs", n, IDS[n], (1, 2, 3))


def test_the_next_sequence_fills_the_last_page_further():
    lab = Lab()
    lab.learn(IDS[:6])
    lab.learn(IDS[:7])
    assert lab.cache.n_pages == 2
    assert lab.reused(IDS) == (7, None)
    lab.learn([*IDS[:6], 1, 2])  # from the same page on another way
    assert lab.cache.n_pages == 3
    assert lab.reused(IDS)[0] == 7
    assert lab.reused([*IDS[:6], 1, 2, 3])[0] == 8


def test_a_page_that_is_extended_is_given_back():
    lab = Lab()
    lab.learn(IDS[:5])
    lab.learn(IDS[:8])
    assert lab.pages.size - lab.pages.free == 2


def test_without_a_checkpoint_a_hybrid_reuses_nothing():
    lab = Lab(recurrent=True)
    lab.learn(IDS[:10])
    assert lab.reused(IDS) == (0, Miss("checkpoint", 10))


@pytest.mark.parametrize("marks", [(3,), (4,), (2, 7), (8, 9)])
def test_a_hybrid_goes_on_from_the_deepest_checkpoint(marks: tuple[int, ...]):
    lab = Lab(recurrent=True)
    lab.learn(IDS[:10], *marks)
    assert lab.reused(IDS) == (max(marks), Miss("checkpoint", 10))
    fitting = max((at for at in marks if at <= 7), default=0)
    assert lab.reused([*IDS[:7], 1])[0] == fitting
    assert lab.cache.has_checkpoint(IDS, marks[0])
    assert not lab.cache.has_checkpoint(IDS, 6)


def test_a_checkpoint_counts_although_another_page_agrees_further():
    lab = Lab(recurrent=True)
    lab.learn([1, 2, 3, 9], 3)
    lab.learn([1, 2, 3, 4, 5])
    assert lab.reused([1, 2, 3, 4, 7]) == (3, Miss("checkpoint", 4))


def test_a_checkpoint_is_kept_once_with_its_best_mark():
    lab = Lab(recurrent=True)
    lab.learn(IDS[:8], 8, mark=Mark.GRID)
    lab.learn(IDS[:8], 8, mark=Mark.SYSTEM)
    lab.learn(IDS[8:16], 8, mark=Mark.TURN)
    assert lab.cache.n_checkpoints == 2
    assert lab.cache.evict(slots=1)
    assert lab.reused(IDS[:8])[0] == 8


def test_a_checkpoint_without_pages_is_not_kept():
    lab = Lab(recurrent=True)
    slot = lab.state(IDS[:8])
    lab.cache.checkpoint(IDS[:8], slot)
    assert lab.slots.count(slot) == 1


# ---- eviction ------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first_and_is_missed():
    lab = Lab()
    lab.learn(IDS[:4])
    lab.learn(IDS[4:8])
    lab.reused(IDS[:4])
    assert lab.cache.evict(pages=1)
    assert lab.reused(IDS[:5])[0] == 4
    assert lab.reused(IDS[4:9]) == (0, Miss("evicted"))
    lab.learn(IDS[4:8])
    assert lab.reused(IDS[4:9]) == (4, None)


@pytest.mark.parametrize("use", [Lab.learn, Lab.reused], ids=["stored", "found"])
def test_what_is_stored_or_found_once_more_is_used(use: Callable[[Lab, Sequence[int]], object]):
    lab = Lab()
    for begin in (0, 4, 8):
        lab.learn(IDS[begin : begin + 4])
    for begin in (4, 8, 0):
        use(lab, IDS[begin : begin + 4])
    for begin in (4, 8, 0):
        assert lab.cache.evict(pages=1)
        assert lab.reused(IDS[begin : begin + 4]) == (0, Miss("evicted"))


def test_what_followed_a_page_that_was_filled_later_is_missed():
    lab = Lab()
    lab.learn(IDS[:6])
    lab.learn(IDS[:12])
    assert lab.cache.evict(pages=3)
    lab.learn(IDS[:8])
    assert lab.reused(IDS) == (8, Miss("evicted", 8))


def test_a_chain_is_evicted_from_its_end_in_one_look():
    lab = Lab()
    lab.learn(IDS[:30])
    assert lab.cache.evict(pages=5)
    assert lab.reused(IDS) == (12, Miss("evicted", 12))
    assert lab.cache.evict(pages=3)
    assert lab.cache.n_pages == 0
    assert not lab.cache.evict(pages=1)
    assert lab.pages.free == lab.pages.size


def test_the_older_chain_goes_whole_before_a_younger_page():
    lab = Lab()
    lab.learn(IDS[:8])
    lab.learn(IDS[8:12])
    assert lab.cache.evict(pages=2)
    assert lab.reused(IDS[:9]) == (0, Miss("evicted"))
    assert lab.reused(IDS[8:13]) == (4, None)


def test_only_what_the_cache_alone_keeps_can_be_evicted():
    lab = Lab(recurrent=True)
    lab.learn(IDS[:8], 4, 8)
    lab.learn(IDS[8:12])
    assert lab.cache.can_evict(3, 2)
    assert not lab.cache.can_evict(4, 2)
    assert not lab.cache.can_evict(3, 3)
    found = lab.match(IDS[:9])  # two pages and a slot
    assert lab.cache.can_evict(1, 1)
    assert not lab.cache.can_evict(2, 1)
    assert not lab.cache.can_evict(1, 2)
    lab.release(found)


def test_slots_are_freed_without_pages():
    lab = Lab(recurrent=True)
    for at in range(16):
        lab.learn([at] * 4, 4)
    assert lab.cache.evict(slots=1)
    assert (lab.cache.n_pages, lab.cache.n_checkpoints) == (16, 15)


def test_what_a_sequence_uses_is_not_evicted():
    lab = Lab(recurrent=True)
    lab.learn(IDS[:8], 8)
    found = lab.match(IDS)
    assert not lab.cache.evict(pages=1)
    assert not lab.cache.evict(slots=1)
    lab.release(found)
    assert lab.cache.evict(pages=1, slots=0)


def test_what_follows_a_page_in_use_does_not_keep_others_alive():
    lab = Lab()
    lab.learn(IDS[:4])
    pages = lab.compute(IDS[:8])  # without the cache: its first page is another
    lab.cache.store(IDS[:8], pages, 8)
    spilled = list[tuple[int, ...]]()
    lab.cache.spill = lambda node, point: spilled.append(node.tokens)
    assert lab.cache.evict(pages=1)
    assert spilled == [tuple(IDS[:4])]
    assert [lab.pages.count(page) for page in pages] == [1, 1]
    assert lab.pages.free == lab.pages.size - 2


def test_no_more_is_evicted_below_what_runs_than_is_wanted():
    lab = Lab()
    for ids in (IDS[:8], IDS[8:16], IDS[16:24]):
        lab.learn(ids[:4])
        lab.cache.store(ids, lab.compute(ids), 8)
    free = lab.pages.free
    assert lab.cache.evict(pages=2)
    assert (lab.pages.free, lab.cache.n_pages) == (free + 2, 2)


def test_of_checkpoints_the_grid_goes_first_then_old_turns_then_system_prompts():
    lab = Lab(recurrent=True)
    lab.learn(IDS[4:8], 4, mark=Mark.TURN)
    lab.learn(IDS[12:16], 4, mark=Mark.GRID)
    lab.learn(IDS[8:12], 4, mark=Mark.TURN)
    lab.learn(IDS[:4], 4, mark=Mark.SYSTEM)
    lab.reused(IDS[4:8])
    left = [IDS[at : at + 4] for at in (0, 4, 8, 12)]
    for gone in (3, 2, 1, 0):
        assert [lab.reused(ids)[0] for ids in left[: gone + 1]] == [4] * (gone + 1)
        lab.reused(left[1])
        assert lab.cache.evict(slots=1)
        assert lab.reused(left[gone]) == (0, Miss("checkpoint", 4))


def test_of_pages_those_without_a_checkpoint_go_first_and_system_prompts_last():
    lab = Lab(recurrent=True)
    lab.learn(IDS[:4], 4, mark=Mark.SYSTEM)
    lab.learn(IDS[4:8], 4)
    lab.learn(IDS[12:16], 4, mark=Mark.GRID)
    lab.learn(IDS[8:12])
    for gone in (IDS[8:12], IDS[12:16], IDS[4:8], IDS[:4]):
        assert lab.cache.evict(pages=1)
        assert lab.reused(gone) == (0, Miss("evicted"))


def test_a_page_is_worth_its_best_checkpoint():
    lab = Lab(recurrent=True)
    lab.learn(IDS[:4], 2, mark=Mark.SYSTEM)
    lab.learn(IDS[:4], 3, mark=Mark.GRID)
    lab.learn(IDS[4:8], 4)
    for gone in (IDS[4:8], IDS[:4]):
        assert lab.cache.evict(pages=1)
        assert lab.reused(gone) == (0, Miss("evicted"))


def test_so_many_evicted_pages_are_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefix_cache, "REMEMBERED", 2)
    lab = Lab()
    for begin in (0, 4, 8, 12):
        lab.learn(IDS[begin : begin + 4])
    assert lab.cache.evict(pages=3)
    misses = [lab.reused(IDS[begin : begin + 4])[1] for begin in (0, 4, 8)]
    assert [miss.kind for miss in misses if miss] == ["differs", "evicted", "evicted"]


def test_what_is_evicted_once_more_is_the_last_to_be_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefix_cache, "REMEMBERED", 2)
    lab = Lab()
    for begin in (0, 4, 0, 8):
        lab.learn(IDS[begin : begin + 4])
        assert lab.cache.evict(pages=1)
    lab.learn(IDS[20:24])
    misses = [lab.reused(IDS[begin : begin + 4])[1] for begin in (0, 4, 8)]
    assert [miss.kind for miss in misses if miss] == ["evicted", "differs", "evicted"]


def test_an_emptied_cache_remembers_nothing():
    lab = Lab()
    lab.learn(IDS[:4])
    assert lab.cache.evict(pages=1)
    lab.cache.clear()
    assert lab.reused(IDS[:4]) == (0, Miss("empty"))


def test_a_miss_shows_what_was_used_last():
    lab = Lab()
    for begin in (0, 4, 8):
        lab.learn(IDS[begin : begin + 4])
    lab.reused(IDS[4:8])
    assert lab.reused(IDS[12:16])[1] == Miss("differs", 0, tuple(IDS[4:8]), tuple(IDS[12:16]))


@pytest.mark.parametrize(("n", "gone"), [(7, 1), (40, 5), (600, 64)])
def test_a_look_through_the_tree_evicts_a_share_of_it(n: int, gone: int):
    lab = Lab(pages=n)
    for i in range(n):
        lab.learn([i, 5, 5, 5])
    assert lab.cache.evict(pages=1)
    assert lab.pages.free == gone


def test_what_is_evicted_is_spilled_before():
    lab, spilled = Lab(recurrent=True), []
    lab.learn(IDS[:8], 6, 8)
    lab.cache.spill = lambda node, point: spilled.append(
        (node.tokens, point and point.length, lab.pages.count(node.page))
    )
    assert lab.cache.evict(slots=1)
    assert lab.cache.evict(pages=2)
    assert spilled == [(tuple(IDS[4:8]), 6, 1), (tuple(IDS[4:8]), None, 1), (tuple(IDS[:4]), None, 1)]


def test_the_cache_lets_go_what_a_sequence_writes():
    lab = Lab(recurrent=True)
    ids = IDS[:6]
    pages, slot = lab.compute(ids), lab.state(ids)
    lab.cache.store(ids, pages, 6)
    lab.cache.checkpoint(ids, slot)
    other = lab.pages.take()  # what the cache does not have
    lab.cache.let_go([*pages[:1], other], None)
    assert [lab.pages.count(page) for page in pages] == [2, 2]
    lab.cache.let_go(pages[1:], slot)
    assert [lab.pages.count(page) for page in pages] == [2, 1]
    assert lab.slots.count(slot) == 1
    lab.cache.clear()
    assert lab.pages.count(pages[0]) == 1


def test_the_cache_lets_go_states_alone():
    lab = Lab(recurrent=True)
    lab.learn(IDS[:6], 3)
    slot = lab.state(IDS[:6])
    lab.cache.checkpoint(IDS[:6], slot)
    lab.cache.let_go([], slot)
    assert lab.slots.count(slot) == 1
    assert lab.reused(IDS) == (3, Miss("checkpoint", 6))


@pytest.mark.parametrize("n", [3, 4, 10, 12])
def test_what_begins_as_damaged_tokens_do_is_forgotten_with_all_that_follows(n: int):
    lab = Lab(recurrent=True)
    lab.learn(IDS[:12], 3, 5, 12)
    lab.learn([*IDS[:8], 1, 2], 10)
    others = [[*IDS[:2], 5, 6, 7], IDS[20:26]]
    for other in others:
        lab.learn(other, len(other))
    lab.cache.forget(IDS[:n])
    assert lab.reused(IDS[:12])[0] == 0
    assert lab.reused([*IDS[:8], 1, 2])[0] == 0
    assert [lab.reused(other) for other in others] == [(5, None), (6, None)]
    assert (lab.cache.n_pages, lab.cache.n_checkpoints) == (4, 2)
    assert lab.pages.size - lab.pages.free == 4
    assert lab.slots.size - lab.slots.free == 2


def test_a_page_that_is_not_full_is_forgotten_too():
    lab = Lab()
    lab.learn(IDS[:2])
    lab.cache.forget(IDS)
    assert lab.cache.n_pages == 0
    lab.cache.forget(IDS)


def test_pages_that_follow_each_other_go_together():
    lab = Lab()
    pages = lab.compute(IDS[:12])
    lab.cache.store(IDS[:12], pages, 12)
    lab.cache.let_go(pages[1:], None)
    assert [lab.pages.count(page) for page in pages] == [2, 1, 1]
    assert lab.cache.n_pages == 1


# ---- random use ----------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class Machine(RuleBasedStateMachine):
    """Prompts over two tokens, so that most share something. ``kept`` are sequences that still run."""

    @initialize(recurrent=st.booleans(), roomy=st.booleans())
    def open(self, recurrent: bool, roomy: bool) -> None:
        self.lab = Lab(recurrent, *((400, 400) if roomy else (40, 12)))
        self.roomy = roomy  # nothing is evicted, so all that was ever cached is found
        self.known: list[tuple[int, ...]] = []
        self.points: list[tuple[int, ...]] = []
        self.evicted = False
        self.kept: list[tuple[list[int], int | None]] = []

    @rule(ids=TOKENS, marks=st.lists(st.integers(1, 14), max_size=3), keep=st.booleans(), kind=st.sampled_from(Mark))
    def run(self, ids: list[int], marks: list[int], keep: bool, kind: Mark) -> None:
        """Takes over what is cached of a prompt, computes the rest, and learns it."""
        lab = self.lab
        wanted = len(ids) // PAGE + 2
        if lab.pages.free < wanted or (lab.recurrent and lab.slots.free < len(marks) + 2):
            self.evicted = True
            if not lab.cache.evict(wanted, len(marks) + 2 if lab.recurrent else 0):
                return
        found = lab.match(ids[:-1])
        self.check_match(ids[:-1], found)
        pages = lab.compute(ids, found)
        lab.cache.store(ids, pages, len(ids))
        self.known.append(tuple(ids))
        slot = None
        if lab.recurrent:
            slot = lab.state(ids)
            for at in {at for at in marks if found.length < at < len(ids)}:
                point = lab.state(ids[:at])
                self.learn_point(ids[:at], point, kind)
                lab.slots.release(point)
            self.learn_point(ids, slot, Mark.TURN)
            if found.slot is not None:
                lab.slots.release(found.slot)
        if keep:
            self.kept.append((pages, slot))
        else:
            self.end(pages, slot)

    def learn_point(self, ids: list[int], slot: int, kind: Mark) -> None:
        self.lab.cache.checkpoint(ids, slot, kind)
        self.points.append(tuple(ids))
        assert self.lab.cache.has_checkpoint(ids, len(ids))

    def end(self, pages: list[int], slot: int | None) -> None:
        self.lab.pages.release_all(pages)
        if slot is not None:
            self.lab.slots.release(slot)

    def check_match(self, ids: list[int], found: Match) -> None:
        agreed = max((common(known, ids) for known in self.known), default=0)
        longest = agreed
        if self.lab.recurrent:
            longest = max((len(p) for p in self.points if tuple(ids[: len(p)]) == p), default=0)
        assert found.length <= longest
        assert found.length == longest or self.evicted
        assert self.lab.cache.usable(ids) == found.length
        miss = found.miss
        if miss is None:
            return
        if miss.kind == "differs":
            assert miss.at == found.length
            assert miss.cached[0] != miss.asked[0] == ids[miss.at]
            assert any(known[: miss.at] == tuple(ids[: miss.at]) for known in self.known)
        elif miss.kind == "empty":
            assert self.lab.cache.n_pages == 0
        elif miss.kind == "evicted":
            assert self.evicted
        else:
            assert miss.kind == "checkpoint"
            assert found.length < miss.at <= agreed

    @precondition(lambda self: self.kept)
    @rule(which=st.integers(0, 20))
    def stop(self, which: int) -> None:
        self.end(*self.kept.pop(which % len(self.kept)))

    @precondition(lambda self: self.kept and not self.roomy)
    @rule(which=st.integers(0, 20))
    def let_go(self, which: int) -> None:
        pages, slot = self.kept[which % len(self.kept)]
        self.evicted = True
        self.lab.cache.let_go(pages[-1:], slot)

    @precondition(lambda self: not self.roomy)
    @rule(pages=st.integers(0, 9), slots=st.integers(0, 4))
    def evict(self, pages: int, slots: int) -> None:
        lab, before = self.lab, (self.lab.pages.free, self.lab.slots.free)
        self.evicted = True
        done = lab.cache.evict(pages, slots)
        if done:
            assert lab.pages.free >= before[0] + pages
            assert lab.slots.free >= before[1] + slots

    @precondition(lambda self: self.known)
    @rule(dice=st.integers(0, 9))
    def clear(self, dice: int) -> None:
        if dice:
            return
        self.lab.cache.clear()
        self.known, self.points = [], []

    @invariant()
    def every_page_and_slot_has_its_owners(self) -> None:
        if not hasattr(self, "lab"):
            return
        lab = self.lab
        pages = Counter(page for held, _ in self.kept for page in held)
        slots = Counter(slot for _, slot in self.kept if slot is not None)
        for pool, owned, cached in ((lab.pages, pages, lab.cache.n_pages), (lab.slots, slots, lab.cache.n_checkpoints)):
            counts: Any = [pool.count(i) for i in range(pool.size)]
            assert sum(counts) == sum(owned.values()) + cached
            assert all(counts[i] - owned[i] in (0, 1) for i in range(pool.size)), "the cache has it twice"

    def teardown(self) -> None:
        if not hasattr(self, "lab"):
            return
        while self.kept:
            self.end(*self.kept.pop())
        lab = self.lab
        assert lab.cache.evict(lab.cache.n_pages, 0)
        assert (lab.cache.n_pages, lab.cache.n_checkpoints) == (0, 0)
        assert (lab.pages.free, lab.slots.free) == (lab.pages.size, lab.slots.size)


def test_the_child_that_agrees_furthest_is_found_among_many():
    """Children come, grow and go at random, and begin alike."""
    rng, root, page = random.Random(5), Node(None, (), -1, 0), 0
    children: list[Node] = []
    for _ in range(3000):
        tokens = tuple(rng.randrange(3) for _ in range(rng.randint(1, 9)))
        child, n = root.child(list(tokens))
        agreed = [common(each.tokens, tokens) for each in children]
        assert n == max(agreed, default=0)
        assert n == (common(child.tokens, tokens) if child else 0)
        if child is None or n < min(len(tokens), len(child.tokens)):
            children.append(Node(root, tokens, page, 0))
            root.add(children[-1])
        elif len(child.tokens) < len(tokens):
            child.extend(tokens, page)
        if len(children) > 60:
            root.remove(children.pop(rng.randrange(len(children))))
    assert len(children) == sum(map(len, root.children.values())) > 50


def test_every_match_is_true_and_nothing_is_lost():
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=120,
            stateful_step_count=40,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # to make a failure small takes minutes
            suppress_health_check=list(HealthCheck),
        ),
    )
