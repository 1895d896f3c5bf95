"""Second tier of the prefix cache: pages and states in host memory, and in a folder if there is one.

What the pools of the device evict goes here. With a folder, so does what a turn leaves at its end. A prompt that goes
on in the tier where it ends in the pools is given fresh pages, and on hybrids a fresh slot.

Another thread reads the files that a prompt needs (``cache_reader.py``), while that prompt waits. What it needs is
pinned until it is admitted or ends, whatever the budget of host memory is. That is one prompt at a time: the next one.
The step thread copies it to the device, in portions while others run.

``Tier`` holds the entries by name (``cache_keys.py``). ``Transfer`` moves them from and to the device.
"""

from __future__ import annotations

import logging
import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from .batch import Executor
from .cache_folder import CacheFolder, Loaded
from .cache_keys import (
    Digest,
    chain,
    digest_of_node,
    page_name,
    parsed_state,
    state_name,
)
from .cache_reader import Fetch, Reader
from .pages import PagePool, StateSlots
from .prefix_cache import PrefixCache
from .prefix_tree import Checkpoint, Mark, Node

AT_ONCE_BYTES = 64 << 20  # that are copied from or to the device before the next step
PENDING = 256  # ends of turns that wait to be copied
STATES = 3  # the deepest checkpoints of a turn are saved, and those of system prompts
TRIES = 4  # entries may turn out to be damaged
STATES_LOOKED_THROUGH = 4096  # pages with states, for those whose states are all gone
_STATE = struct.Struct("<BQ")  # mark, bytes of the page
_log = logging.getLogger("zincmetal.engine")


class Tier:
    """Entries by name: in host memory, up to ``budget`` bytes, and in the folder. The least recently used go first.

    Entries that are pinned stay, whatever the budget is.
    """

    def __init__(self, model: Digest, budget: int, folder: CacheFolder | None = None) -> None:
        self.model, self.folder, self._budget = model, folder, budget
        self.reader = Reader(folder) if folder else None
        self._held: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._pinned: dict[str, tuple[bytes, str]] = {}  # with where they were
        self._states: dict[str, set[str]] = {}  # by the full page before them; some may be gone
        self._most_states = STATES_LOOKED_THROUGH
        for name in folder.names.copy() if folder else ():
            self._learn(name)

    def has(self, name: str) -> bool:
        """Return True if there is an entry of this name."""
        return self.is_held(name) or bool(self.folder and self.folder.has(name))

    def is_held(self, name: str) -> bool:
        """Return True if host memory has an entry of this name."""
        return name in self._pinned or name in self._held

    def states_after(self, digest: Digest) -> list[tuple[int, str]]:
        """Return (tokens after the page, name) of all states after a full page, the most tokens first."""
        names = self._states.get(digest.hex(), set())
        for name in [name for name in names if not self.has(name)]:
            names.discard(name)
        return sorted(((int(name.split("-")[1]), name) for name in names), reverse=True)

    def put(self, name: str, data: bytes) -> bool:
        """Keep an entry. Return False if there is a folder that does not take it."""
        taken = self.folder.write(name, data) if self.folder else True
        self._hold(name, data)
        self._learn(name)
        return taken

    def get(self, name: str) -> tuple[bytes | None, str]:
        """Return the contents of an entry, or None, and where it was: "host" or "disk"."""
        if name in self._pinned:
            return self._pinned[name]
        data = self._held.get(name)
        if data is not None:
            self._held.move_to_end(name)
            return data, "host"
        data = self.folder.read(name) if self.folder else None
        if data is not None:
            self._hold(name, data)
        return data, "disk"

    def pin(self, names: Sequence[str]) -> list[str]:
        """Keep these entries until :meth:`unpin`. Return those that are in files alone: they are not kept yet."""
        for name in names:
            if name in self._held and name not in self._pinned:
                self._pinned[name] = self._held[name], "host"
                self._held.move_to_end(name)
        return [name for name in names if name not in self._pinned]

    def pin_loaded(self, name: str, loaded: Loaded) -> bytes | None:
        """Keep an entry that was read from its file until :meth:`unpin`. Return it, or None if it is not whole."""
        data = self.folder.taken(name, loaded) if self.folder else None
        if data is not None:
            self._hold(name, data)
            self._pinned[name] = data, "disk"
        return data

    @property
    def pinned(self) -> int:
        """Number of entries that are pinned."""
        return len(self._pinned)

    def unpin(self) -> None:
        """Let the budget decide which entries stay."""
        self._pinned.clear()

    def drop(self, name: str) -> None:
        """Give up an entry that cannot be used."""
        self._forget(name)
        if self.folder:
            self.folder.names.discard(name)

    def delete(self, name: str) -> None:
        """Give up an entry, and its file."""
        self._forget(name)
        if self.folder:
            self.folder.delete(name)

    def close(self) -> None:
        """Write what is to be written, and end the threads."""
        if self.reader:
            self.reader.close()
        if self.folder:
            self.folder.close()

    def _hold(self, name: str, data: bytes) -> None:
        self._let_go(name)
        if len(data) > self._budget:
            return
        self._held[name] = data
        self._bytes += len(data)
        while self._bytes > self._budget:
            self._let_go(next(iter(self._held)))

    def _let_go(self, name: str) -> None:
        data = self._held.pop(name, None)
        self._bytes -= len(data or b"")

    def _forget(self, name: str) -> None:
        """Give up the copy in host memory."""
        self._let_go(name)
        self._pinned.pop(name, None)

    def _learn(self, name: str) -> None:
        state = parsed_state(name)
        if not state:
            return
        self._states.setdefault(state[0], set()).add(name)
        if len(self._states) > self._most_states:  # once in a while, for they come and go without end
            there = {page: {name for name in names if self.has(name)} for page, names in self._states.items()}
            self._states = {page: names for page, names in there.items() if names}
            self._most_states = max(STATES_LOOKED_THROUGH, 2 * len(self._states))


class Found(NamedTuple):
    """Beginning of a prompt that the tier makes whole: ``pages`` full pages, the first ``known`` of them in the pools.

    ``state`` is the name of the states ``tail`` tokens later, on hybrids. ``names``: of all full pages of the prompt.
    """

    names: list[str]
    known: int
    pages: int
    tail: int = 0
    state: str = ""

    @property
    def wanted(self) -> list[str]:
        """Names of what the pools lack."""
        return self.names[min(self.known, self.pages) : self.pages] + ([self.state] if self.state else [])


class _Turn(NamedTuple):
    """Turn that has ended and is to be copied, and the names of its entries that were ``offered`` to the folder."""

    ids: list[int]
    offered: set[str]


_Entry = tuple[str, Callable[[], bytes]]  # a name, and what reads its contents from the device


class Transfer:
    """Moves pages and states between the pools and a tier, for the thread that steps. The device is idle for it."""

    def __init__(
        self,
        executor: Executor,
        cache: PrefixCache,
        tier: Tier,
        page_bytes: int = 0,
        slot_bytes: int = 0,
        portion: int = AT_ONCE_BYTES,
    ) -> None:
        self._executor, self._cache, self.tier, self._portion = executor, cache, tier, portion
        self._page_bytes, self._slot_bytes = page_bytes, slot_bytes  # 0: any
        self._pending: deque[_Turn] = deque(maxlen=PENDING)
        self._owner: object = None  # the prompt for which entries are pinned
        self._fetch: Fetch | None = None  # of the owner
        self._hung: Fetch | None = None  # until it is over, files count as none
        self._known: tuple[list[int], list[Digest]] | None = None  # ids and names of pages: they are looked up often

    # ---- out of the pools -----------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """True if a turn has ended that is not copied yet."""
        return bool(self._pending)

    @property
    def may_save(self) -> bool:
        """True if there is a turn to copy, and the folder's writer is not behind."""
        return bool(self._pending and self.tier.folder and not self.tier.folder.behind)

    @property
    def hangs(self) -> bool:
        """True if the folder's writer waits for a disk that does not answer."""
        return bool(self.tier.folder and self.tier.folder.hangs)

    def note(self, ids: list[int]) -> None:
        """Remember the end of a turn, whose pages are in the cache. With a folder it is to be copied."""
        if self.tier.folder:
            self._pending.append(_Turn(ids, set()))

    def save(self) -> None:
        """Copy a portion of the pages and states of turns that have ended."""
        left = self._portion
        while left > 0 and self.may_save:
            left = self._copy(self._pending[0], left)

    def _copy(self, turn: _Turn, left: int) -> int:
        """Copy of the first turn about so many bytes. Return how many more may be copied.

        Each entry is offered once. If the folder takes nothing now, the turn is not copied further.
        """
        folder = self.tier.folder
        assert folder
        for name, read in self._entries(turn.ids):
            if name in turn.offered or folder.has(name):
                continue
            if left <= 0 or folder.behind:
                return left
            turn.offered.add(name)
            data = read()
            left -= len(data)
            if not self.tier.put(name, data):
                break
        self._pending.popleft()
        return left

    def _entries(self, ids: list[int]) -> list[_Entry]:
        """Return what the cache has of ``ids``, in the order in which it is copied."""
        page, path = PagePool.PAGE, self._cache.path(ids)
        points = [(node, c) for node, n in path for c in node.checkpoints.values() if c.length <= node.first + n]
        points.sort(key=lambda point: -point[1].length)
        points = [p for i, p in enumerate(points) if i < STATES or p[1].mark == Mark.SYSTEM]
        entries = [self._page_of(node) for node, n in path if n == page]
        return entries + [self._state_of(node, checkpoint) for node, checkpoint in points]

    def evict(self, pages: int, slots: int) -> bool:
        """Evict from the cache, and keep a copy of what goes."""
        self._cache.spill = self.spill
        try:
            return self._cache.evict(pages, slots)
        finally:
            self._cache.spill = None

    def spill(self, node: Node, checkpoint: Checkpoint | None) -> None:
        """Copy a page and its checkpoints, or one checkpoint alone, before they are evicted."""
        entries = list[_Entry]()
        if checkpoint is None and len(node.tokens) == PagePool.PAGE:
            entries.append(self._page_of(node))
        gone = node.checkpoints.values() if checkpoint is None else (checkpoint,)
        entries += [self._state_of(node, each) for each in gone]
        for name, read in entries:
            if not self.tier.has(name):
                self.tier.put(name, read())

    def _page_of(self, node: Node) -> _Entry:
        return page_name(self._digest(node)), partial(self._executor.read_page, node.page)

    def _state_of(self, node: Node, checkpoint: Checkpoint) -> _Entry:
        def read() -> bytes:
            tail = checkpoint.length - node.first
            page = self._executor.read_page(node.page) if tail < PagePool.PAGE else b""
            return _STATE.pack(int(checkpoint.mark), len(page)) + page + self._executor.read_slot(checkpoint.slot)

        return self._name_of(node, checkpoint), read

    def _digest(self, node: Node | None) -> Digest:
        return digest_of_node(self.tier.model, node)

    def _name_of(self, node: Node, checkpoint: Checkpoint) -> str:
        """Return the name of a checkpoint of a page. Before the page's end it belongs to the page before."""
        n = checkpoint.length - node.first
        if n == PagePool.PAGE:
            return state_name(self._digest(node), ())
        return state_name(self._digest(node.parent), node.tokens[:n])

    def forget(self, ids: Sequence[int]) -> None:
        """Give up all pages and states of ``ids``, also for later processes."""
        self.release()
        for digest in chain(self.tier.model, ids, PagePool.PAGE):
            for name in (page_name(digest), *(name for _, name in self.tier.states_after(digest))):
                self.tier.delete(name)

    # ---- into the pools -------------------------------------------------------------------------------------

    def find(self, ids: Sequence[int]) -> Found | None:
        """Return the longest beginning of ``ids`` that tier and pools have together, if the pools have less."""
        page, length = PagePool.PAGE, self._cache.usable(ids)
        known = sum(n == page for _, n in self._cache.path(ids))
        if self._known is None or self._known[0] != ids:
            self._known = list(ids), chain(self.tier.model, ids, page)
        digests = self._known[1]
        names, reach = [page_name(digest) for digest in digests[1:]], known
        has = self.tier.has if self._hung is None or self._hung.over else self.tier.is_held
        while reach < len(names) and has(names[reach]):
            reach += 1
        if not self._executor.recurrent:
            return Found(names, known, reach) if reach > known and reach * page > length else None
        for pages in range(reach, length // page - 1, -1):
            for n, name in self.tier.states_after(digests[pages]):
                at = pages * page
                fits = length < at + n <= len(ids) and name == state_name(digests[pages], ids[at : at + n])
                if fits and has(name):
                    return Found(names, known, pages, n, name)
        return None

    def fetch(self, owner: object, ids: Sequence[int], wake: Callable[[], None]) -> tuple[Found | None, bool]:
        """Return what :meth:`find` finds, for the prompt of ``owner``, and True while files of it are read.

        The first call begins it. What the prompt needs is pinned until :meth:`release`. ``wake`` is called on another
        thread, when it is there.
        """
        if self._owner is owner and self._fetch is not None:
            if not self._fetch.over and not self._fetch.hangs:
                return None, True
            self._take_loaded()
        found = self.find(ids)
        if found is None:
            return None, False
        if self._owner is not owner:
            self.release()
            self._owner = owner
        lacking, reader = self.tier.pin(found.wanted), self.tier.reader
        self._fetch = reader.begin(lacking, wake) if lacking and reader else None
        return found, self._fetch is not None

    def release(self, owner: object = None) -> None:
        """End what was begun for this prompt, or for any. What was read of it stays, as far as the budget allows."""
        if owner is None or owner is self._owner:
            self._take_loaded()
            self.tier.unpin()
            self._owner = None

    def _take_loaded(self) -> None:
        """Stop the fetch, and take what was read. What is not whole is forgotten."""
        fetch, self._fetch = self._fetch, None
        if fetch is None:
            return
        if fetch.hangs:
            _log.warning("the cache folder does not answer: until it does, prompts are computed")
            self._hung = fetch
        fetch.stopped, over = True, fetch.over
        loaded = fetch.loaded.copy()  # the reader may still add to it
        for name in fetch.names if over else loaded:
            data = self.tier.pin_loaded(name, loaded[name]) if name in loaded else None
            if data is None or not self._fits(name, data):
                self.tier.drop(name)

    def bring(
        self,
        ids: Sequence[int],
        take: Callable[[bool], int | None],
        pools: tuple[PagePool, StateSlots],
        whole: bool = True,
    ) -> tuple[str, bool]:
        """Put what :meth:`find` finds now into the cache, or if not ``whole``, a portion of it.

        What it found before no longer counts: room was made since, and pages may have gone that were known. Return its
        source, or "" if there is nothing, and whether there is more. ``take(True)`` gives a page, ``take(False)`` a
        slot, or None.
        """
        sources = set[str]()
        for _ in range(TRIES):
            found = self.find(ids)
            if found is None:
                break
            part = found if whole else self._beginning(found)
            read = self._read(part, sources)
            if read is not None:
                length = self._write(ids, part, *read, take, pools)
                more = part is not found and length == part.pages * PagePool.PAGE
                return ("disk" if "disk" in sources else "host") if length else "", more
        return "", False

    def _beginning(self, found: Found) -> Found:
        """Return the pages of a portion, or all that is left. The states come last."""
        page, lacking = self._page_bytes, max(0, found.pages - found.known)
        fit = max(1, self._portion // max(1, page))
        if lacking > fit:
            return found._replace(pages=found.known + fit, tail=0, state="")
        if lacking and found.state and (lacking + (found.tail > 0)) * page + self._slot_bytes > self._portion:
            return found._replace(tail=0, state="")
        return found

    def _read(self, found: Found, sources: set[str]) -> tuple[list[bytes], bytes | None] | None:
        """Return pages and states, or None if one of them is not whole: then it is forgotten. Adds to ``sources``."""
        wanted, held = found.wanted, list[bytes]()
        for name in wanted:
            data, source = self.tier.get(name)
            if data is None or not self._fits(name, data):
                self.tier.drop(name)  # and look at the others: what is damaged is written anew
                continue
            held.append(data)
            sources.add(source)
        if len(held) < len(wanted):
            return None
        state = held.pop() if found.state else None
        return held, state

    def _fits(self, name: str, data: bytes) -> bool:
        if name.endswith(".page"):
            return self._page_bytes in (0, len(data))
        if len(data) < _STATE.size:
            return False
        page = _STATE.unpack_from(data)[1]
        tail = (parsed_state(name) or ("", 0))[1]
        if bool(page) != bool(tail):
            return False
        return self._slot_bytes in (0, len(data) - _STATE.size - page) and page in (0, self._page_bytes or page)

    def _write(
        self,
        ids: Sequence[int],
        found: Found,
        data: list[bytes],
        state: bytes | None,
        take: Callable[[bool], int | None],
        pools: tuple[PagePool, StateSlots],
    ) -> int:
        """Write pages and states to the device, and learn them. Return the tokens up to there, 0 if none are new.

        If there is no room, pages are written as far as there is, and with states nothing is learnt.
        """
        executor, (page_pool, slot_pool), page = self._executor, pools, PagePool.PAGE
        known = [node.page for node, _ in self._cache.path(ids)[: min(found.known, found.pages)]]
        pages, slot = page_pool.retain_all(known), None
        mark, tail_bytes, states = Mark.TURN, b"", b""
        if state is not None:
            number, n = _STATE.unpack_from(state)
            mark, at = Mark(min(number, Mark.SYSTEM)), _STATE.size + n
            tail_bytes, states = state[_STATE.size : at], state[at:]
        try:
            for each in [*data, *([tail_bytes] if found.tail else [])]:
                new = take(True)
                if new is None:
                    break
                pages.append(new)
                executor.write_page(new, each)
            length = min(len(pages) * page, found.pages * page + found.tail)
            whole = length == found.pages * page + found.tail
            if state is not None:
                slot = take(False) if whole else None
                if slot is None:
                    return 0
                executor.write_slot(slot, states)
            begun = list(ids[:length])
            self._cache.store(begun, pages, length)
            if slot is not None:
                self._cache.checkpoint(begun, slot, mark)
            return length if slot is not None or length > len(known) * page else 0
        finally:
            page_pool.release_all(pages)
            if slot is not None:
                slot_pool.release(slot)
