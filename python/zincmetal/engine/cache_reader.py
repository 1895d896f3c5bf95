"""Reader of the cache's folder: a thread that reads and checks the files of a prompt that waits, while others step."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from .cache_folder import CacheFolder, Loaded

PATIENCE = 15.0  # seconds without another file, after which a prompt does not wait for the disk
_log = logging.getLogger("zincmetal.engine")


class Fetch:
    """Files that one prompt waits for. When it is ``over``, ``loaded`` has them by name, but those that gave an error.

    Its reader adds to it; the step thread may set ``stopped``. ``wake`` is called at the end, on the reader's thread.
    """

    def __init__(self, names: Sequence[str], wake: Callable[[], None]) -> None:
        self.names, self.wake = names, wake
        self.loaded: dict[str, Loaded] = {}
        self.over = self.stopped = False
        self._last = time.monotonic()  # when a file was read

    @property
    def hangs(self) -> bool:
        """True if the disk gives nothing any more, such as one of another machine that is gone."""
        return not self.over and time.monotonic() - self._last > PATIENCE

    def run(self, folder: CacheFolder) -> None:
        """Read the files, unless it is stopped before the last one."""
        try:
            for name in self.names:
                if self.stopped:
                    return
                self.loaded[name] = folder.load(name)
                self._last = time.monotonic()
        except Exception:  # such as no memory: the others are misses
            _log.exception("the cache folder %s was not read", folder.folder)
        finally:
            self.over = True
            self.wake()


class Reader:
    """Thread that reads files of a folder, one after another. The step thread calls its methods."""

    def __init__(self, folder: CacheFolder) -> None:
        self._folder = folder
        self._inbox: SimpleQueue[Fetch | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._warned = False

    def begin(self, names: Sequence[str], wake: Callable[[], None]) -> Fetch | None:
        """Begin to read files. Return None if the system starts no thread now."""
        if not self._has_thread():
            return None
        fetch = Fetch(names, wake)
        self._inbox.put(fetch)
        return fetch

    def close(self) -> None:
        """Let the thread end. This does not wait for a file that the disk has not given yet."""
        if self._thread is not None:
            self._inbox.put(None)

    def _has_thread(self) -> bool:
        if self._thread is None:
            thread = threading.Thread(
                target=_run, args=(self._folder, self._inbox), name="zincmetal-cache-reader", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                if not self._warned:
                    _log.warning("prompts from the cache folder let other sequences wait: %s", error)
                self._warned = True
                return False
            self._thread = thread
        return True


def _run(folder: CacheFolder, inbox: SimpleQueue[Fetch | None]) -> None:
    while (fetch := inbox.get()) is not None:
        fetch.run(folder)
        del fetch  # and what it has read, while the thread sleeps
