"""Tree of cached pages: each node is a page, found by the tokens of its page and of all pages before it.

A node has up to a page of tokens. Only a full node has children. Siblings may begin with the same tokens: the page that
a sequence filled further is a node of its own, unless it goes on where a node ends.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from enum import IntEnum
from operator import attrgetter
from typing import NamedTuple

from .sequence import common


class Mark(IntEnum):
    """Why a checkpoint was taken, the first to be evicted first."""

    GRID = 0  # every so many tokens of a long prompt
    TURN = 1  # the beginning of a turn, the end of a prompt or of an answer
    SYSTEM = 2  # the end of the system prompt and its tools


class Checkpoint:
    """Copy of the recurrent states after ``length`` tokens, in a state slot."""

    __slots__ = ("length", "mark", "slot", "used")

    def __init__(self, length: int, slot: int, mark: Mark, used: int) -> None:
        self.length, self.slot, self.mark, self.used = length, slot, mark, used


class Node:
    """Page of K/V, and the ``tokens`` that it holds, from position ``first`` on.

    ``checkpoints`` are by length: the ends of prefixes that end in this page. ``used`` is the time of the last use.
    ``digest`` names the tokens up to the page's end, for a full page, once a lower tier has asked for it.
    """

    __slots__ = ("checkpoints", "children", "digest", "first", "key", "page", "parent", "tokens", "used")

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], page: int, used: int) -> None:
        self.parent, self.tokens, self.page, self.used = parent, tokens, page, used
        self.first: int = parent.first + len(parent.tokens) if parent else 0
        self.key: int = hash((parent.key if parent else 0, tokens))
        self.children: dict[int, list[Node]] = {}  # by the first token, and sorted: there may be thousands
        self.checkpoints: dict[int, Checkpoint] = {}
        self.digest: bytes | None = None

    def child(self, tokens: Sequence[int]) -> tuple[Node | None, int]:
        """Return the child that shares the most of its first tokens with ``tokens``, and the number of these."""
        alike = self.children.get(tokens[0], []) if tokens else []
        at = bisect_left(alike, tuple(tokens), key=_tokens)
        near = [(node, common(node.tokens, tokens)) for node in alike[max(0, at - 1) : at + 1]]
        return max(near, key=lambda found: found[1], default=(None, 0))

    def add(self, node: Node) -> None:
        """Make ``node`` a child."""
        insort(self.children.setdefault(node.tokens[0], []), node, key=_tokens)

    def remove(self, node: Node) -> None:
        """Remove a child."""
        alike = self.children[node.tokens[0]]
        at = bisect_left(alike, node.tokens, key=_tokens)
        assert alike[at] is node, "no two children have the same tokens"
        del alike[at]
        if not alike:
            del self.children[node.tokens[0]]

    def extend(self, tokens: tuple[int, ...], page: int) -> None:
        """Replace page and tokens by those of a page that begins with the same tokens and has more."""
        assert self.parent
        self.parent.remove(self)  # its place among the others may be another one
        self.tokens, self.page = tokens, page
        self.key = hash((self.parent.key, tokens))
        self.parent.add(self)

    def fitting(self, ids: Sequence[int]) -> list[Checkpoint]:
        """Return the checkpoints after tokens with which ``ids`` begin. They begin with the tokens before the page."""
        agreed = self.first + common(self.tokens, ids[self.first : self.first + len(self.tokens)])
        return [checkpoint for checkpoint in self.checkpoints.values() if checkpoint.length <= agreed]

    def below(self) -> Iterator[Node]:
        """Yield all nodes below this one, parents first."""
        left = [node for alike in self.children.values() for node in alike]
        while left:
            node = left.pop()
            yield node
            left += [child for alike in node.children.values() for child in alike]


_tokens = attrgetter("tokens")


def deepest_checkpoint(path: Sequence[Step], ids: Sequence[int]) -> Checkpoint | None:
    """Return the checkpoint of the longest prefix of ``ids`` that has one. Its page may be a sibling of the path's."""
    for node, _ in reversed(path):
        assert node.parent is not None
        alike = node.parent.children[node.tokens[0]]
        fitting = [each for sibling in alike if sibling.checkpoints for each in sibling.fitting(ids)]
        if fitting:
            return max(fitting, key=lambda checkpoint: checkpoint.length)
    return None


class Step(NamedTuple):
    """Node on the way of a prompt, and the number of its tokens that the prompt has."""

    node: Node
    n: int


def walk(root: Node, ids: Sequence[int], page: int) -> list[Step]:
    """Return the nodes that the ids run through, as far as they agree. Pages hold ``page`` tokens."""
    path, node, at = list[Step](), root, 0
    while at < len(ids):
        child, n = node.child(ids[at : at + page])
        if child is None:
            break
        path.append(Step(child, n))
        at += n
        if n < page:
            break
        node = child
    return path
