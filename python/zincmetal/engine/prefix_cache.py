"""Prefix cache: K/V pages and recurrent states of earlier prompts and answers, found by their tokens.

Sequences share pages by reference count. A prompt takes over the pages of its longest cached prefix. The last, partial
page may be taken over too: whoever writes into a shared page copies it first.

Recurrent layers have one state, of all tokens so far. So a hybrid model can only go on from a checkpoint: a copy of its
states in a state slot. The longest usable prefix ends at the deepest checkpoint that the prompt agrees with.

Memory that the pools lack comes from :meth:`PrefixCache.evict`. Of checkpoints the marks of the grid go first, then the
oldest turns, then system prompts. Of pages the least recently used leaf goes first.

Layers with a window keep the keys and values of all positions, in the same pages as other layers. So a prefix of any
length is as good for them as for the others.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from .prefix_tree import Checkpoint, Mark, Node, Step, deepest_checkpoint, walk
from .sequence import common

if TYPE_CHECKING:
    from .pages import PagePool, StateSlots

__all__ = ["Cache", "Mark", "Match", "Miss", "NoCache", "PrefixCache"]

EVICT_AT_ONCE = 64  # pages, and at most an eighth of the cache: one look through the tree frees so many
REMEMBERED = 4096  # evicted pages, whose absence can be explained


@dataclass(frozen=True)
class Miss:
    """Reason why no more of a prompt was reused.

    ``kind``: "off" (there is no cache), "empty" (nothing is cached), "differs" (the cached tokens differ from position
    ``at`` on: ``cached`` in the place of ``asked``), "evicted" (what followed at ``at`` was evicted), "checkpoint" (the
    prompt agrees with the cache up to ``at``, and there is no checkpoint between the reused tokens and there),
    "damaged" (what was cached gave logits that are not finite).
    """

    kind: str
    at: int = 0
    cached: tuple[int, ...] = ()
    asked: tuple[int, ...] = ()


@dataclass
class Match:
    """Cached beginning of some ids: ``length`` tokens, their ``pages``, and the state ``slot`` after them on hybrids.

    Pages and slot are retained for the caller, who releases them. The slot is only read. ``source`` is "memory",
    "host" or "disk". ``miss`` is None if all of the ids, or all that was ever cached of them, is there.
    """

    length: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    source: str = "memory"
    miss: Miss | None = None

    def release(self, pages: PagePool, slots: StateSlots) -> None:
        """Give up what is not needed after all."""
        pages.release_all(self.pages)
        if self.slot is not None:
            slots.release(self.slot)


class Cache(Protocol):
    """Prefix cache as the scheduler sees it: an owner of pages and slots. The thread that steps calls it."""

    def match(self, ids: Sequence[int]) -> Match:
        """Return the longest beginning of ``ids`` whose keys, values and states are known."""

    def store(self, ids: Sequence[int], pages: Sequence[int], length: int) -> None:
        """Learn the pages of the first ``length`` tokens of ``ids``. Retain the pages that are kept."""

    def checkpoint(self, ids: Sequence[int], slot: int, mark: Mark = Mark.TURN) -> None:
        """Learn the slot with the states after ``ids``. Retain it if it is kept. The states do not change later."""

    def can_evict(self, pages: int, slots: int) -> bool:
        """Return True if :meth:`evict` could."""

    def evict(self, pages: int, slots: int) -> bool:
        """Give up so much that so many more pages and slots are free. Return False if that is not possible."""

    def let_go(self, pages: Sequence[int], slot: int | None) -> None:
        """Give up these pages and this slot as far as possible, so that their other owner may write to them."""

    def forget(self, ids: Sequence[int]) -> None:
        """Forget the pages and states that ``ids`` may have reused, and what follows them."""

    def clear(self) -> None:
        """Forget everything."""


class NoCache:
    """Cache that keeps nothing."""

    def match(self, ids: Sequence[int]) -> Match:
        """Return a match of no token."""
        return Match(miss=Miss("off"))

    def store(self, ids: Sequence[int], pages: Sequence[int], length: int) -> None:
        """Keep nothing."""

    def checkpoint(self, ids: Sequence[int], slot: int, mark: Mark = Mark.TURN) -> None:
        """Keep nothing."""

    def can_evict(self, pages: int, slots: int) -> bool:
        """Return False: there is nothing to give up."""
        return False

    def evict(self, pages: int, slots: int) -> bool:
        """Return False: there is nothing to give up."""
        return False

    def let_go(self, pages: Sequence[int], slot: int | None) -> None:
        """Give up nothing."""

    def forget(self, ids: Sequence[int]) -> None:
        """Forget nothing."""

    def clear(self) -> None:
        """Forget nothing."""


class PrefixCache:
    """Cache over the pools of an engine. Its caller is the thread that steps.

    ``spill`` is called with a node before its page is evicted, or with a node and one of its checkpoints before that
    is evicted: a lower tier may copy them.
    """

    def __init__(self, pages: PagePool, slots: StateSlots, page: int, recurrent: bool) -> None:
        self._pages, self._slots = pages, slots
        self._page, self._recurrent = page, recurrent
        self._root = Node(None, (), -1, 0)
        self._nodes: dict[int, Node] = {}  # by page
        self._points: dict[int, tuple[Node, int]] = {}  # by slot: where its checkpoint is, and its length
        self._clock = 0
        self._evicted: OrderedDict[tuple[int, int], None] = OrderedDict()  # (key of what is before, first token)
        self.spill: Callable[[Node, Checkpoint | None], None] | None = None

    # ---- use ----------------------------------------------------------------------------------------------------

    def match(self, ids: Sequence[int]) -> Match:
        """Find the longest beginning of ``ids`` that can be reused. Of a prompt these are all tokens but the last."""
        path = walk(self._root, ids, self._page)
        agreed = sum(step.n for step in path)
        self._clock += 1
        checkpoint = deepest_checkpoint(path, ids) if self._recurrent else None
        length = agreed if not self._recurrent else checkpoint.length if checkpoint else 0
        found = Match(length, miss=self._miss(ids, path, agreed, length))
        for node, _ in path[: -(-length // self._page)]:
            node.used = self._clock
            self._pages.retain(node.page)
            found.pages.append(node.page)
        if checkpoint:
            checkpoint.used = self._clock
            self._slots.retain(checkpoint.slot)
            found.slot = checkpoint.slot
        return found

    def store(self, ids: Sequence[int], pages: Sequence[int], length: int) -> None:
        """Keep the pages of the first ``length`` tokens that are not cached yet."""
        self._clock += 1
        node = self._root
        for i, page in enumerate(pages[: -(-length // self._page)]):
            tokens = tuple(ids[i * self._page : min((i + 1) * self._page, length)])
            child, n = node.child(tokens)
            if child is None or n < min(len(tokens), len(child.tokens)):
                child = Node(node, tokens, page, self._clock)
                self._nodes[self._pages.retain(page)] = child
                node.add(child)
            elif len(child.tokens) < len(tokens):
                self._pages.retain(page)
                self._pages.release(self._nodes.pop(child.page).page)
                child.extend(tokens, page)
                self._nodes[page] = child
            child.used = self._clock
            self._evicted.pop((node.key, tokens[0]), None)
            node = child

    def checkpoint(self, ids: Sequence[int], slot: int, mark: Mark = Mark.TURN) -> None:
        """Keep the states after ``ids``, which are in ``slot`` and do not change. Their pages were stored before."""
        length = len(ids)
        path = walk(self._root, ids, self._page)
        if not path or sum(step.n for step in path) < length:
            return
        node, known = path[-1].node, deepest_checkpoint(path[-1:], ids)
        if known and known.length == length:
            known.used, known.mark = self._clock, max(known.mark, mark)
            return
        self._points[self._slots.retain(slot)] = node, length
        node.checkpoints[length] = Checkpoint(length, slot, mark, self._clock)

    def has_checkpoint(self, ids: Sequence[int], length: int) -> bool:
        """Return True if there is a checkpoint after the first ``length`` ids."""
        found = deepest_checkpoint(self.path(ids[:length]), ids[:length])
        return found is not None and found.length == length

    def path(self, ids: Sequence[int]) -> list[Step]:
        """Return the pages that hold the beginning of ``ids``, as far as it is cached."""
        return walk(self._root, ids, self._page)

    def usable(self, ids: Sequence[int]) -> int:
        """Return the length of the match of ``ids``, without a use of it."""
        path = self.path(ids)
        if not self._recurrent:
            return sum(step.n for step in path)
        found = deepest_checkpoint(path, ids)
        return found.length if found else 0

    # ---- memory ---------------------------------------------------------------------------------------------

    @property
    def n_pages(self) -> int:
        """Pages that the cache keeps."""
        return len(self._nodes)

    @property
    def n_checkpoints(self) -> int:
        """Checkpoints that the cache keeps."""
        return len(self._points)

    def can_evict(self, pages: int = 0, slots: int = 0) -> bool:
        """Return True if only the cache keeps so many pages and slots."""
        return pages <= sum(self._pages.count(page) == 1 for page in self._nodes) and slots <= sum(
            self._slots.count(slot) == 1 for slot in self._points
        )

    def evict(self, pages: int = 0, slots: int = 0) -> bool:
        """Free at least so many pages and slots of those that only the cache keeps. Return True if it could."""
        pages, slots = self._pages.free + pages, self._slots.free + slots
        if self._pages.free < pages:
            self._evict_leaves(pages - self._pages.free)
        if self._pages.free < pages:
            self._evict_below_running(pages - self._pages.free)
        if self._slots.free < slots:  # checkpoints of pages that went are gone already
            self._evict_checkpoints(slots - self._slots.free)
        return self._pages.free >= pages and self._slots.free >= slots

    def let_go(self, pages: Sequence[int], slot: int | None) -> None:
        """Give up these pages, if nothing follows them, and this slot. Nothing is spilled."""
        if slot in self._points:
            self._drop_checkpoint(*self._points[slot])
        for page in reversed(pages):
            node = self._nodes.get(page)
            if node is not None and not node.children:
                self._drop(node)

    def forget(self, ids: Sequence[int]) -> None:
        """Forget the pages that begin as ``ids`` do, with all that follows them. Nothing is spilled."""
        for node in list(self._root.children.get(ids[0], ())):
            if common(node.tokens, ids) == min(len(node.tokens), len(ids)):
                for each in [*node.below()][::-1]:  # a child comes before its parent
                    self._drop(each)
                self._drop(node)

    def clear(self) -> None:
        """Forget everything."""
        for node in self._root.below():
            self._pages.release(node.page)
            for checkpoint in node.checkpoints.values():
                self._slots.release(checkpoint.slot)
        self._root = Node(None, (), -1, 0)
        self._nodes.clear()
        self._points.clear()
        self._evicted.clear()

    def _evict_checkpoints(self, wanted: int) -> None:
        points = [(node, node.checkpoints[length]) for node, length in self._points.values()]
        free = [(c.mark, c.used, c.length, node) for node, c in points if self._slots.count(c.slot) == 1]
        free.sort(key=lambda entry: entry[:3])
        for *_, length, node in free[:wanted]:
            if self.spill:
                self.spill(node, node.checkpoints[length])
            self._drop_checkpoint(node, length)

    def _evict_leaves(self, wanted: int) -> None:
        """Evict so many pages, or some more: leaf by leaf, the least recently used first, system prompts last."""
        wanted = max(wanted, min(EVICT_AT_ONCE, len(self._nodes) // 8))
        leaves = [(self._worth(node), node.page, node) for node in self._nodes.values() if self._is_free(node)]
        heapq.heapify(leaves)
        freed = 0
        while leaves and freed < wanted:
            *_, node = heapq.heappop(leaves)
            parent = node.parent
            if self.spill:
                self.spill(node, None)
            self._drop(node)
            freed += 1
            if parent is not None and parent is not self._root and self._is_free(parent):
                heapq.heappush(leaves, (self._worth(parent), parent.page, parent))

    def _evict_below_running(self, wanted: int) -> None:
        """Evict pages that only the cache has, although what follows them is in use. That is forgotten, too."""
        before = self._pages.free
        for node in [*self._root.below()][::-1]:  # a child comes before its parent
            if self._pages.free - before >= wanted:
                break
            if self._pages.count(node.page) != 1:
                continue
            for each in [*node.below()][::-1]:
                self._drop(each)
            if self.spill:
                self.spill(node, None)
            self._drop(node)

    def _is_free(self, node: Node) -> bool:
        return not node.children and self._pages.count(node.page) == 1

    def _worth(self, node: Node) -> tuple[int, int, int]:
        """Rank a leaf for eviction: on hybrids one without a checkpoint is of no use."""
        least = -1 if self._recurrent else 0
        mark = max((int(c.mark) for c in node.checkpoints.values()), default=least)
        return mark, node.used, -node.first

    def _drop(self, node: Node) -> None:
        assert node.parent is not None
        node.parent.remove(node)
        self._pages.release(self._nodes.pop(node.page).page)
        for length in list(node.checkpoints):
            self._drop_checkpoint(node, length)
        self._evicted[node.parent.key, node.tokens[0]] = None
        while len(self._evicted) > REMEMBERED:
            self._evicted.popitem(last=False)

    def _drop_checkpoint(self, node: Node, length: int) -> None:
        slot = node.checkpoints.pop(length).slot
        del self._points[slot]
        self._slots.release(slot)

    # ---- explanation ------------------------------------------------------------------------------------------

    def _miss(self, ids: Sequence[int], path: Sequence[tuple[Node, int]], agreed: int, length: int) -> Miss | None:
        if length < agreed:
            return Miss("checkpoint", agreed)
        if length == len(ids):
            return None
        last, n = path[-1] if path else (self._root, 0)
        tokens = tuple(ids[agreed : agreed + self._page])
        if n < len(last.tokens) and path:
            return Miss("differs", agreed, last.tokens[n:], tokens)
        if (last.key, tokens[0]) in self._evicted:
            return Miss("evicted", agreed)
        others = (node for alike in last.children.values() for node in alike)
        other = max(others, key=lambda node: node.used, default=None)
        if other is not None:
            return Miss("differs", agreed, other.tokens, tokens)
        return None if path else Miss("empty")
