"""Models of a server: which there are, which are loaded, and which must go when memory is short.

The life of a model: *unloaded*, *loading*, *loaded*, and *failed* if its load or its process failed. A lease loads it.
All who want it meanwhile wait for the one load, which nobody's leaving aborts. One ledger has the bytes that each
loaded model may take. If there are too few for another, those go that are idle and not pinned, the least recently used
first. If all are busy, the load waits for a while.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .. import gguf
from ..api.text import ModelText
from ..errors import (
    DeviceError,
    FileChangedError,
    ModelNotFoundError,
    OutOfMemoryError,
    QueueFullError,
    UsageError,
    did_you_mean,
    quote,
)
from ..plan.estimate import in_units
from . import described
from .aside import aside
from .backend import ModelCard
from .channel import Load, LoadOptions, Planned, error_of, problem_of
from .fit import Fit, fit, least, needed, wished
from .remote import RemoteModel
from .verdicts import Verdicts

TTL = 1800.0  # seconds that a model stays loaded after its last use, if nobody says otherwise
PATIENCE = 120.0  # seconds that a load waits for memory
BACK_OFF, LONGEST_BACK_OFF = 2.0, 300.0  # seconds between loads that fail
OTHERS = ("claude-", "gpt-3", "gpt-4", "gpt-5", "codex-")  # names of others' models, which agents ask for unasked
RETRY_SECONDS = 5  # that a client is asked to wait
KEPT_EVENTS = 256  # for a reader of events who is slow
CLOSING = "the server is shutting down; ask again when it is back"

_log = logging.getLogger("zincmetal.serve")


@dataclass(frozen=True)
class Named:
    """Model that a server knows. ``keep``: seconds that it stays loaded after its last use; infinity: for good."""

    id: str
    options: LoadOptions
    aliases: tuple[str, ...] = ()
    keep: float = TTL


class ModelStatus(NamedTuple):
    """State of a model, when it changes. ``progress`` of a load is from 0 to 1."""

    id: str
    state: str
    progress: float = 0.0
    why: str = ""


@dataclass(eq=False)
class _Entry:
    """Model with all that is known of it now."""

    named: Named
    card: ModelCard
    keep: float
    state: str = "unloaded"
    pinned: bool = False
    remote: RemoteModel | None = None
    text: ModelText | None = None
    file: gguf.File | None = None
    loading: asyncio.Task[None] | None = None
    planned: Planned | None = None
    fit: Fit | None = None
    granted: int = 0  # bytes
    leases: int = 0  # who uses it, or waits for it
    used: float = 0.0  # when the last of them ended
    expiry: asyncio.TimerHandle | None = None
    error: Exception | None = None
    failures: int = 0
    retry_at: float = 0.0
    progress: float = 0.0
    stopping: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.named.id


class Residency:
    """Models of a server: see ``Models``. All methods are for one asyncio loop.

    ``patience``: seconds that a load waits for memory. ``process`` makes the process of a model. ``any_name``: an
    unknown name stands for the default model.
    """

    def __init__(
        self,
        models: Iterable[Named],
        patience: float = PATIENCE,
        process: Callable[..., RemoteModel] = RemoteModel,
        any_name: bool = False,
    ) -> None:
        self._entries = {named.id: _new(named) for named in models}
        self._patience, self._process, self._any_name = patience, process, any_name
        self._budget = 0  # bytes that the device grants to all; known with the first model
        self._admission = asyncio.Lock()  # one load at a time looks for memory, in the order of arrival
        self._planning = asyncio.Lock()
        self._changed = asyncio.Event()
        self._readers: set[_Reader] = set()
        self._told: set[str] = set()
        self._closed = False
        self._verdicts = Verdicts()

    # ---- questions ----------------------------------------------------------------------------------------------

    def cards(self) -> list[ModelCard]:
        """Return the models that can be asked for, the default one first."""
        return [self._card(entry) for entry in self._entries.values()]

    def _card(self, entry: _Entry) -> ModelCard:
        facts = {**entry.card.facts, "pinned": entry.pinned, "progress": round(entry.progress, 3)}
        if entry.fit:
            facts |= {"granted": entry.granted, "tokens": entry.fit.tokens}
        why = str(entry.error) if entry.state == "failed" else ""
        return replace(entry.card, state=entry.state, why=why, facts=facts)

    def resolve(self, name: str) -> str:
        """Return the id of a model by its id, an alias, or "" for the default. Raises ModelNotFoundError."""
        if not self._entries:
            raise ModelNotFoundError("this server has no models: name one when you start it")
        default = next(iter(self._entries))
        if not name or name == "default":
            return default
        for same in (str, str.casefold):
            for entry in self._entries.values():
                if same(name) in map(same, (entry.id, *entry.named.aliases, entry.named.options.path)):
                    return entry.id
        if self._any_name or name.startswith(OTHERS):
            self._tell_once(name, default)
            return default
        known = [known for entry in self._entries.values() for known in (entry.id, *entry.named.aliases)]
        raise ModelNotFoundError(f"there is no model {quote(name)} on this server{did_you_mean(name, known)}")

    @property
    def closed(self) -> bool:
        """Whether the server ends. Any thread may ask."""
        return self._closed

    def path_of(self, name: str) -> Path:
        """Return the file of a model."""
        return Path(self._entries[self.resolve(name)].named.options.path)

    def add(self, named: Named) -> str:
        """Add a model, unless its file is known already. Returns its id, which has a number if another has the name."""
        for entry in self._entries.values():
            if entry.named.options.path == named.options.path:
                return entry.id
        id, number = named.id, 2
        while id in self._entries:
            id, number = f"{named.id}-{number}", number + 1
        entry = self._entries[id] = _new(replace(named, id=id))
        self._publish(entry)
        return id

    async def read_files(self, first_is_loaded: bool = False) -> None:
        """Read the facts of the models that are not loaded from their files, one after another.

        ``first_is_loaded``: the default model is being loaded, and its file's errors are told then.
        """
        for i, entry in enumerate(list(self._entries.values())):
            alone, quiet = len(self._entries) == 1, first_is_loaded and i == 0
            card = await aside(described.read, entry.card, entry.named.options, alone, quiet)
            if entry.state != "loaded" and not entry.card.n_ctx_train:
                entry.card = card

    def _tell_once(self, name: str, default: str) -> None:
        if name not in self._told and len(self._told) < KEPT_EVENTS:
            self._told.add(name)
            _log.warning("a client asks for %s and gets %s", quote(name), default)

    @property
    def busy(self) -> int:
        """Requests that have a model, or wait for one."""
        return sum(entry.leases for entry in self._entries.values())

    async def when_idle(self) -> None:
        """Wait until no request has a model, or waits for one."""
        while self.busy:
            await self._changed.wait()

    def peek(self, name: str) -> RemoteModel | None:
        """Return a model if it is loaded. It is not kept loaded by that."""
        entry = self._entries[self.resolve(name)]
        return entry.remote if entry.state == "loaded" else None

    def fit_of(self, name: str) -> Fit | None:
        """Return what a model was loaded with, None if it is not loaded."""
        return self._entries[self.resolve(name)].fit

    async def catalogue(self) -> list[dict[str, Any]]:
        """Return the models of the catalogue, each with a verdict for the device of this server."""
        options = next((entry.named.options for entry in self._entries.values()), LoadOptions(""))
        return await self._verdicts.of(options.device, options.kv)

    async def text_of(self, name: str) -> ModelText:
        """Return the text side of a model, loaded or not."""
        entry = self._entries[self.resolve(name)]
        text = await self._text(entry)
        if not entry.leases:
            self._stop_expiry(entry)
            self._start_expiry(entry)
        return text

    def forget(self, name: str) -> None:
        """Know a model no longer. It must be unloaded."""
        entry = self._entries.pop(self.resolve(name))
        self.tell(ModelStatus(entry.id, "removed"))

    def tell(self, status: ModelStatus) -> None:
        """Send an event to all who read them."""
        for reader in self._readers:
            reader.put(status)

    # ---- use ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, name: str, keep: float | None = None) -> AsyncIterator[RemoteModel]:
        """Give a loaded model for the time of a request. See ``Models``.

        ``keep``: seconds that the model stays loaded after it, below 0: for good.
        """
        entry = self._entries[self.resolve(name)]
        if self._closed:
            raise _busy(CLOSING)
        entry.leases += 1
        self._stop_expiry(entry)
        try:
            remote = await self._loaded(entry)
            if keep is not None:
                entry.pinned, entry.keep = keep < 0, max(0.0, keep)
            yield remote
            entry.failures = 0
        except FileChangedError as error:  # the next request loads the file as it is now
            if entry.state == "loaded":
                self._unload(entry, error)
            raise
        finally:
            entry.leases -= 1
            self._idle(entry)

    async def load(self, name: str) -> None:
        """Load a model, and wait until it is loaded. One that failed is tried at once."""
        entry = self._entries[self.resolve(name)]
        entry.retry_at = 0.0
        async with self.lease(entry.id):
            pass

    async def unload(self, name: str) -> None:
        """Unload a model. Raises UsageError if requests use it."""
        entry = self._entries[self.resolve(name)]
        if entry.leases:
            raise UsageError(f"{entry.id} is in use by {entry.leases} requests; unload it when they have ended")
        if entry.loading is not None:
            entry.loading.cancel()
            await asyncio.wait({entry.loading})
        await self._unloaded(entry)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep a model loaded whatever happens, or no longer. It is not loaded by that."""
        entry = self._entries[self.resolve(name)]
        entry.pinned = pinned
        self._publish(entry)
        self._idle(entry)

    async def plan(self, name: str, context: int | None = None, parallel: int | None = None) -> dict[str, Any]:
        """Return the bytes of a model with a context and so many sequences of it, and whether they fit the device.

        None stands for what the model has, or would have with the whole device to itself. Nothing is loaded.
        """
        entry = self._entries[self.resolve(name)]
        planned = await self._planned(entry)
        estimate = planned.estimate
        if context is None:
            chosen = entry.fit or fit(estimate, entry.named.options, planned.budget, alone=True)
            context = chosen.context
        nbytes = needed(estimate, context, parallel or 1)
        return {
            "n_ctx": context,
            "n_ctx_train": estimate.n_ctx_train,
            "parallel": parallel or 1,
            "bytes": nbytes,
            "weights": sum(estimate.weights.values()),
            "budget": planned.budget,
            "granted": sum(other.granted for other in self._entries.values() if other is not entry),
            "fits": nbytes <= planned.budget,
        }

    async def _planned(self, entry: _Entry) -> Planned:
        """Estimate the memory of a model, the first time in a process of its own, which ends then."""
        async with self._planning:  # who asks often waits, and starts no crowd
            if entry.planned is None:
                process = self._process(entry.id, None, lambda error: None)
                try:
                    entry.planned = await process.open(entry.named.options)
                finally:
                    await process.close()
            return entry.planned

    async def close(self, reason: Exception | None = None) -> None:
        """Close all models. Requests that run end with an error: ``reason``, or that the server shuts down."""
        self._closed = True
        why = reason or _busy(CLOSING)
        loads = [entry.loading for entry in self._entries.values() if entry.loading]
        for task in loads:
            task.cancel()
        if loads:
            await asyncio.wait(loads)
        await asyncio.gather(*(self._unloaded(entry, why) for entry in self._entries.values()))
        for reader in list(self._readers):
            reader.end()

    # ---- events -------------------------------------------------------------------------------------------------

    async def changes(self) -> AsyncGenerator[ModelStatus, None]:
        """Yield the state of every model, and from then on each change. Ends when the server does."""
        async with aclosing(self.events()) as events:
            async for event in events:
                if isinstance(event, ModelStatus):
                    yield event

    async def events(self) -> AsyncGenerator[ModelStatus, None]:
        """Yield what ``changes`` does, and what is given to ``tell``, in the order in which it happens."""
        reader = _Reader()
        self._readers.add(reader)
        try:
            for entry in self._entries.values():
                reader.put(self._status(entry))
            if self._closed:
                reader.end()
            async for event in reader.read():
                yield event
        finally:
            self._readers.discard(reader)

    def _status(self, entry: _Entry) -> ModelStatus:
        why = str(entry.error) if entry.state == "failed" else ""
        return ModelStatus(entry.id, entry.state, entry.progress, why)

    def _publish(self, entry: _Entry) -> None:
        self.tell(self._status(entry))

    def _set(self, entry: _Entry, state: str, error: Exception | None = None) -> None:
        entry.state, entry.error = state, error
        entry.progress = 1.0 if state == "loaded" else 0.0
        _log.info("%s is %s", entry.id, state)
        self._publish(entry)
        self._tell_change()

    def _tell_change(self) -> None:
        """Wake the load that waits for memory."""
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- loading ------------------------------------------------------------------------------------------------

    async def _loaded(self, entry: _Entry) -> RemoteModel:
        """Return the process of a model; load it first if need be. Raises what made the load fail."""
        while entry.remote is None or entry.state != "loaded" or not entry.remote.alive:
            if self._closed:
                raise _busy(CLOSING)
            if entry.remote is not None and entry.state == "loaded":  # its process is ending
                await entry.remote.ended()
                continue
            if entry.loading is None:
                self._check_back_off(entry)
                entry.loading = asyncio.create_task(self._load(entry))
            await asyncio.wait({entry.loading})  # a cancelled wait leaves the load alone
            if entry.error is not None:
                raise error_of(problem_of(entry.error))  # one of its own for each who waits
        return entry.remote

    def _check_back_off(self, entry: _Entry) -> None:
        """Raise the error of the last load, if it is too early for another."""
        wait = entry.retry_at - time.monotonic()
        if entry.error is not None and wait > 0:
            error = error_of(problem_of(entry.error))
            error.__dict__["retry_after"] = math.ceil(wait)
            raise error

    async def _load(self, entry: _Entry) -> None:
        """Load a model; its state tells how it went."""
        self._set(entry, "loading")
        remote: RemoteModel | None = None
        reading: asyncio.Future[tuple[str, ...]] | None = None
        try:
            if entry.stopping is not None:
                await asyncio.wait({entry.stopping})
            text = await self._text(entry)
            if entry.file is not None:
                reading = asyncio.ensure_future(aside(described.ready, entry.file, text))
            remote = entry.remote = self._process(entry.id, text, lambda error: self._died(entry, remote, error))
            planned = entry.planned = await remote.open(entry.named.options)
            async with self._admission:
                entry.fit = await self._make_room(entry, planned)
                entry.granted = entry.fit.nbytes
            order = Load(entry.fit.context, entry.fit.parallel, entry.fit.nbytes)
            await remote.load(order, planned.facts, lambda done, total: self._progress(entry, done, total))
            can = () if reading is None else await reading
            entry.card = described.loaded(remote.card, entry.card, can)
            entry.keep = entry.named.keep
            self._set(entry, "loaded")
        except BaseException as error:
            if remote is not None:
                await asyncio.shield(remote.close())
            entry.remote, entry.granted, entry.fit = None, 0, None
            if not isinstance(error, Exception):  # unloaded, or the server ends
                self._set(entry, "unloaded")
                raise
            self._failed(entry, error, first_is_free=False)
        finally:
            if reading is not None:
                await asyncio.wait({reading})
            entry.loading = None
            self._idle(entry)

    def _progress(self, entry: _Entry, done: int, total: int) -> None:
        entry.progress = done / max(1, total)
        self._publish(entry)

    def _failed(self, entry: _Entry, error: Exception, first_is_free: bool) -> None:
        """Remember a failure, and when to try again. A process that has ended is replaced at once, the first time."""
        entry.failures += 1
        waits = entry.failures - first_is_free
        entry.retry_at = time.monotonic() + (min(LONGEST_BACK_OFF, BACK_OFF * 2 ** (waits - 1)) if waits else 0.0)
        self._set(entry, "failed", error)

    def _died(self, entry: _Entry, remote: RemoteModel | None, error: DeviceError) -> None:
        """Learn that the process of a model has ended by itself."""
        if entry.state == "loaded" and entry.remote is remote:
            entry.remote, entry.granted, entry.fit = None, 0, None
            _log.error("%s: %s", entry.id, error)
            self._failed(entry, error, first_is_free=True)

    async def _text(self, entry: _Entry) -> ModelText:
        """Open the file for its text side. It stays open until the model is unloaded."""
        if entry.text is None:
            file = await aside(gguf.open, Path(entry.named.options.path))
            if entry.text is None:
                entry.file, entry.text = file, ModelText(file, entry.named.options.template_fix)
        return entry.text

    # ---- memory -------------------------------------------------------------------------------------------------

    async def _make_room(self, entry: _Entry, planned: Planned) -> Fit:
        """Choose the memory of a model; unload others for it. Raises OutOfMemoryError, QueueFullError."""
        self._budget = max(self._budget, planned.budget)
        estimate, options = planned.estimate, entry.named.options
        enough, wish = least(estimate, options), wished(estimate, options)
        until = time.monotonic() + self._patience
        while True:
            others = [other for other in self._entries.values() if other is not entry and other.granted]
            left = min(self._budget - sum(other.granted for other in others), max(estimate.budget, 0))
            idle = [other for other in others if self._may_go(other)]
            if left < wish and idle:
                await self._unloaded(min(idle, key=lambda other: other.used))
                continue
            busy = [other for other in others if not other.pinned]
            if left >= enough or not busy:
                with _naming(others):
                    return fit(estimate, options, left, alone=len(self._entries) == 1)
            await self._wait_for_change(entry, until, enough - left, busy)

    def _may_go(self, other: _Entry) -> bool:
        return other.state == "loaded" and not other.leases and not other.pinned

    async def _wait_for_change(self, entry: _Entry, until: float, lacking: int, busy: Sequence[_Entry]) -> None:
        """Wait until a model may have become idle. Raises QueueFullError in the end."""
        try:
            await asyncio.wait_for(self._changed.wait(), max(0.0, until - time.monotonic()))
        except (TimeoutError, asyncio.TimeoutError):
            names = ", ".join(other.id for other in busy)
            raise _busy(f"{entry.id} lacks {in_units(lacking)} of memory, and others are busy: {names}") from None

    def _idle(self, entry: _Entry) -> None:
        """Note that nobody may need a model any more, and when it is to be unloaded."""
        if entry.leases:
            return
        entry.used = time.monotonic()
        self._tell_change()
        self._stop_expiry(entry)
        self._start_expiry(entry)

    def _start_expiry(self, entry: _Entry) -> None:
        """Note when a model, or the text side of one that is not loaded, is to go."""
        loaded = entry.state == "loaded"
        keep = entry.keep if loaded and not entry.pinned else TTL if not loaded and entry.file else math.inf
        if keep < math.inf and not self._closed:
            entry.expiry = asyncio.get_running_loop().call_later(keep, self._expire, entry)

    def _expire(self, entry: _Entry) -> None:
        if self._may_go(entry):
            self._unload(entry)
        elif entry.state in ("unloaded", "failed") and not entry.leases:
            self._close_file(entry)

    def _stop_expiry(self, entry: _Entry) -> None:
        if entry.expiry:
            entry.expiry.cancel()
            entry.expiry = None

    async def _unloaded(self, entry: _Entry, reason: Exception | None = None) -> None:
        """Unload a model, and wait for the end of its process."""
        self._unload(entry, reason)
        if entry.stopping is not None:
            await asyncio.wait({entry.stopping})

    def _unload(self, entry: _Entry, reason: Exception | None = None) -> None:
        """Begin to unload a model. Its next load waits for the end of its process."""
        self._stop_expiry(entry)
        remote, entry.remote = entry.remote, None
        if entry.state == "loaded":
            self._set(entry, "unloaded")
        if remote is not None:
            entry.stopping = asyncio.get_running_loop().create_task(self._stop(entry, remote, reason))
        elif entry.stopping is None:
            self._close_file(entry)

    async def _stop(self, entry: _Entry, remote: RemoteModel, reason: Exception | None) -> None:
        """End the process of a model, and give its memory back."""
        await remote.close(reason)
        entry.granted, entry.fit, entry.stopping = 0, None, None
        self._close_file(entry)
        self._tell_change()

    def _close_file(self, entry: _Entry) -> None:
        file, entry.file, entry.text = entry.file, None, None
        if file is not None:
            file.close()


class _Reader:
    """Reader of events. One who is slow misses the oldest."""

    def __init__(self) -> None:
        self._events: deque[Any] = deque(maxlen=KEPT_EVENTS)
        self._ready = asyncio.Event()
        self._ended = False

    def put(self, event: Any) -> None:
        self._events.append(event)
        self._ready.set()

    def end(self) -> None:
        self._ended = True
        self._ready.set()

    async def read(self) -> AsyncIterator[Any]:
        while True:
            while self._events:
                yield self._events.popleft()
            if self._ended:
                return
            self._ready.clear()
            await self._ready.wait()


def _new(named: Named) -> _Entry:
    return _Entry(named, described.unread(named.id, named.aliases, named.options), named.keep)


def _busy(why: str) -> QueueFullError:
    error = QueueFullError(why)
    error.__dict__["retry_after"] = RETRY_SECONDS
    return error


@contextmanager
def _naming(others: Sequence[_Entry]) -> Iterator[None]:
    """Add to an error about memory which other models have some."""
    try:
        yield
    except OutOfMemoryError as error:
        if not others:
            raise
        held = ", ".join(f"{other.id} {in_units(other.granted)}" for other in others)
        raise OutOfMemoryError(f"{error}; loaded and pinned: {held}") from None
