"""Folder of the prefix cache: pages and states in files, for the next process with the same model.

Files are written by a thread of their own, under another name first, so a reader never finds half a file. A file that
is damaged, cut, of another model or not readable is a miss. The folder tells it by one warning and deletes the file.
If the disk is full, nothing is written for a while. The least recently used files go when the folder is too large.

The files hold what prompts said, in a form that can be read back. Only their owner may read them.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue

from .cache_keys import DIGEST_BYTES, FORMAT, Digest

MAGIC = b"ZMPC"
HEADER = struct.Struct(f"<4sIQ{DIGEST_BYTES}s{DIGEST_BYTES}s{DIGEST_BYTES}s")  # .., model, name, contents
SUFFIXES = (".page", ".state")
FOLDER = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}")  # of a model
UNFINISHED = re.compile(r"\..+\.(page|state)\.\d+\.[0-9a-f]+")
QUEUED_BYTES = 1 << 29  # that wait to be written; what comes beyond is not written
PAUSE_SECONDS = 60.0  # without writing, after a write has failed
OLD_SECONDS = 3600.0  # an unfinished file of this age has lost its writer
PATIENCE = 15.0  # seconds that a close waits for one file
CLOSE_SECONDS = 60.0  # that it waits for all of them
KEEP_SHARE = 0.9  # of the budget, after a cleaning
COUNTED_SHARE = 1 / 16  # of the budget: after so many bytes the folder is counted again
_log = logging.getLogger("zincmetal.engine")
Loaded = bytes | OSError | ValueError  # contents of a file, or why they cannot be used


class CacheFolder:
    """Files of one model in a folder that several models and processes may share.

    ``budget``: bytes of the whole folder. The step thread calls its methods, and the reader ``load``. None raises for
    what the disk does.
    """

    def __init__(self, folder: Path, model: Digest, budget: int) -> None:
        self.root, self.folder, self._model, self._budget = folder, folder / model.hex(), model, budget
        self.names: set[str] = set()
        self._queued: dict[str, bytes] = {}
        self._queued_bytes = 0
        self._inbox: SimpleQueue[tuple[str, str]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._paused_until = 0.0
        self._begun: float | None = None  # when the writer began what it does now
        self._warned = self._closed = False
        self._used = 0  # bytes of the whole folder, once the writer has counted
        self._uncounted = float("inf")  # bytes that this process has written since: others write, too
        try:
            for each in (self.root, self.folder):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.names.update(name for name in os.listdir(self.folder) if name.endswith(SUFFIXES))
        except OSError as error:
            self._fail(error)

    def has(self, name: str) -> bool:
        """Return True if there is a file of this name, or will be."""
        return name in self.names or name in self._queued

    @property
    def behind(self) -> bool:
        """True if so much waits to be written that nothing more should be read for it."""
        return self._queued_bytes > QUEUED_BYTES // 2

    def write(self, name: str, data: bytes) -> bool:
        """Let the writer make a file, if there is none. Return False if it takes none now, or too much waits."""
        if self.has(name):
            return True
        if self._closed or self._queued_bytes + len(data) > QUEUED_BYTES:
            return False
        if len(data) > self._budget or time.monotonic() < self._paused_until or not self._has_writer():
            return False
        self._queued[name] = data
        self._queued_bytes += len(data)
        self._inbox.put(("write", name))
        return True

    def read(self, name: str) -> bytes | None:
        """Return the contents of a file, or None if it is gone or not whole."""
        return self.taken(name, self.load(name))

    def load(self, name: str) -> Loaded:
        """Return the contents of a file, or why they cannot be used. For any thread: it changes nothing."""
        data = self._queued.get(name)
        if data is not None:
            return data
        try:
            with open(self.folder / name, "rb", buffering=0) as file:
                nbytes, digest = self._facts(name, file.read(HEADER.size))
                found = os.fstat(file.fileno()).st_size - HEADER.size
                if found != nbytes:  # it is not read: it may be of any size
                    raise ValueError(f"it has {found} bytes of {nbytes}")
                data = file.readall()
            if _digest(data) != digest:
                raise ValueError("its checksum is wrong")
            return data
        except (OSError, ValueError) as error:
            return error

    def taken(self, name: str, loaded: Loaded) -> bytes | None:
        """Return what :meth:`load` gave, as a use of the file. One that cannot be used is forgotten: None."""
        if isinstance(loaded, bytes):
            if name in self.names and self._has_writer():
                self._inbox.put(("touch", name))
            return loaded
        self.names.discard(name)
        if not isinstance(loaded, FileNotFoundError):  # then another process has cleaned up
            path = self.folder / name
            _log.warning("%s is not used and deleted: %s", path, loaded)
            with suppress(OSError):
                path.unlink()
        return None

    def delete(self, name: str) -> None:
        """Delete a file, now or once it is written."""
        self.names.discard(name)
        if name in self._queued:
            self._inbox.put(("delete", name))
        else:
            self._unlink(name)

    @property
    def hangs(self) -> bool:
        """True if the writer waits for the disk and does not get on, such as for one of a machine that is gone."""
        begun = self._begun
        return begun is not None and time.monotonic() - begun > PATIENCE

    def close(self) -> None:
        """Write what waits, and end the writer. A disk that hangs is not waited for: what it has not taken is lost.

        One warning says so. What was written stays, and the writer ends as soon as the disk lets it.
        """
        self._closed = True
        thread, until = self._thread, time.monotonic() + CLOSE_SECONDS
        if thread is None:
            return
        self._inbox.put(("end", ""))
        while thread.is_alive() and not self.hangs and time.monotonic() < until:
            thread.join(0.02)
        if thread.is_alive():
            lost = len(self._queued)
            self._queued.clear()  # the writer holds one of them
            _log.warning(
                "the cache folder %s does not answer: %d pages and states of the last prompts are not kept there",
                self.root,
                lost,
            )

    def _has_writer(self) -> bool:
        """Start the writer, once. Return False if the system starts no thread now."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="zincmetal-cache-writer", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                self._fail(error)
                return False
            self._thread = thread
        return True

    # ---- a file ------------------------------------------------------------------------------------------------

    def _facts(self, name: str, header: bytes) -> tuple[int, bytes]:
        """Return the size and the digest of a file's contents. Raises ValueError if it is not of this name."""
        if len(header) < HEADER.size:
            raise ValueError(f"it has {len(header)} bytes, fewer than its header")
        magic, version, nbytes, model, key, digest = HEADER.unpack(header)
        if magic != MAGIC or version != FORMAT:
            raise ValueError("it is no file of this version of the cache")
        if model != self._model or key != _digest(name.encode()):
            raise ValueError("it is of another model or place")
        return nbytes, digest

    def _fail(self, error: OSError | RuntimeError) -> None:
        """Write nothing for a while. The first failure is worth a warning."""
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        if not self._warned:
            self._warned = True
            _log.warning("the cache folder %s cannot be written to: %s", self.root, error)

    # ---- the writer --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            what, name = self._inbox.get()
            if what == "end":
                return
            self._begun = time.monotonic()
            try:
                self._do(what, name)
            finally:
                self._begun = None

    def _do(self, what: str, name: str) -> None:
        if what == "touch":
            with suppress(OSError):
                os.utime(self.folder / name)
        elif what == "delete":
            self._unlink(name)
        elif (data := self._queued.get(name)) is not None:
            try:
                if time.monotonic() >= self._paused_until:
                    self._write_now(name, data)
            except OSError as error:
                self._fail(error)
            finally:
                self._queued.pop(name, None)
                self._queued_bytes -= len(data)

    def _write_now(self, name: str, data: bytes) -> None:
        """Write a file under another name, then give it its own."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # somebody may have deleted it
        header = HEADER.pack(MAGIC, FORMAT, len(data), self._model, _digest(name.encode()), _digest(data))
        size = len(header) + len(data)
        if self._uncounted > COUNTED_SHARE * self._budget:
            self._count()
        if self._used + size > self._budget:
            self._clean(size)
        draft = self.folder / f".{name}.{os.getpid()}.{id(self):x}"
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(header)
                file.write(data)
            os.replace(draft, self.folder / name)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
        self._used, self._uncounted = self._used + size, self._uncounted + size
        self.names.add(name)

    def _unlink(self, name: str) -> None:
        self.names.discard(name)
        with suppress(OSError):
            (self.folder / name).unlink()

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Yield the time of last use, the size and the path of all files, of all models.

        The folder may hold what is not the cache's: a user can name any folder. That is left alone.
        """
        for folder in self.root.iterdir():
            if not FOLDER.fullmatch(folder.name) or not folder.is_dir():
                continue
            for path in folder.iterdir():
                with suppress(OSError):
                    found = path.stat()
                    if path.name.endswith(SUFFIXES):
                        yield found.st_mtime, found.st_size, path
                    elif UNFINISHED.fullmatch(path.name) and time.time() - found.st_mtime > OLD_SECONDS:
                        path.unlink()

    def _count(self) -> list[tuple[float, int, Path]]:
        """Count what all models and processes have written. Return it, the least recently used files first."""
        files = sorted(self._files())
        self._used, self._uncounted = sum(size for _, size, _ in files), 0
        self.names &= {path.name for _, _, path in files if path.parent == self.folder}
        return files

    def _clean(self, room: int) -> None:
        """Delete the least recently used files, until there is room for so many bytes and some more."""
        for _, size, path in self._count():
            if self._used + room <= KEEP_SHARE * self._budget:
                break
            path.unlink(missing_ok=True)
            self._used -= size
            if path.parent == self.folder:
                self.names.discard(path.name)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=DIGEST_BYTES).digest()
