"""Folder of the prefix cache in memory, whose files are read when a test says so, on the same thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from zincmetal.engine.cache_folder import CacheFolder, Loaded
from zincmetal.engine.cache_reader import Fetch, Reader
from zincmetal.engine.prefix_cache import PrefixCache


class MemoryFolder(CacheFolder):
    """Folder without files. Those in ``damaged`` are not whole when they are read."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.names: set[str] = set()
        self.damaged: set[str] = set()
        self._queued, self._queued_bytes, self._begun = {}, 0, None

    def write(self, name: str, data: bytes) -> bool:
        self.files[name] = data
        self.names.add(name)
        return True

    def load(self, name: str) -> Loaded:
        if name in self.damaged or name not in self.files:
            return ValueError("it is damaged")
        return self.files[name]

    def taken(self, name: str, loaded: Loaded) -> bytes | None:
        if isinstance(loaded, bytes):
            return loaded
        self.delete(name)
        return None

    def delete(self, name: str) -> None:
        self.names.discard(name)
        self.damaged.discard(name)
        self.files.pop(name, None)

    def close(self) -> None:
        """There is nothing to write."""


class HandReader(Reader):
    """Reader without a thread. ``go`` reads so many files of the first fetch, or all of all."""

    def __init__(self, folder: CacheFolder) -> None:
        super().__init__(folder)
        self._fetches: deque[Fetch] = deque()

    def begin(self, names: Sequence[str], wake: Callable[[], None]) -> Fetch:
        self._fetches.append(Fetch(names, wake))
        return self._fetches[-1]

    @property
    def reads(self) -> bool:
        """True if it has not finished."""
        return any(not fetch.over for fetch in self._fetches)

    def go(self, files: int | None = None) -> None:
        while self._fetches and files is None:
            self._fetches.popleft().run(self._folder)
        for fetch in [*self._fetches][:1]:
            for name in fetch.names[:files]:
                fetch.loaded[name] = self._folder.load(name)


class OwnedCache(PrefixCache):
    """Prefix cache that says what it owns."""

    def owned_pages(self) -> list[int]:
        return [*self._nodes]

    def owned_slots(self) -> list[int]:
        return [*self._points]
