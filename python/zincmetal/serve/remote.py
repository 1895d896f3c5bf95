"""Model in a process of its own, as the server sees it: a ``Backend``, and the life of the process."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from .. import settings
from ..api.generation import Asked
from ..api.result import Chunk, Logprob, Result
from ..api.text import ModelText
from ..errors import CLOSED, DeadlineError, DeviceError, UsageError
from . import channel
from .backend import ModelCard, Reading, Vectors
from .channel import Call, Cancel, Close, Embed, Frames, Load, LoadOptions, Open, Rerank, Start, asked_to_data, error_of
from .worker import BOOT, LAST_SECONDS

UNREAD = 8192  # events of a request, at most, that its client has not read
LOOK_SECONDS = 0.01  # between two looks at a process that ends
DYING_SECONDS = 2.0  # from the end of the socket to that of the process
CLOSE_SECONDS = LAST_SECONDS + 5  # after which a process is ended by force
_TOO_SLOW = f"the client has left {UNREAD} pieces of the answer unread; it was cancelled"

OnLoading = Callable[[int, int], None]


class RemoteAnswer:
    """Generation in another process."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._events: deque[Reading | Chunk] = deque()
        self._ready = asyncio.Event()
        self._over = self._left = False
        self._result: Result | None = None
        self._error: Exception | None = None

    async def events(self) -> AsyncGenerator[Reading | Chunk, None]:
        """Yield what happens. See ``Answering``."""
        try:
            while True:
                while self._events:
                    yield self._events.popleft()
                if self._over:
                    self._raise()
                    return
                self._ready.clear()
                await self._ready.wait()
        finally:
            self._left = True
            self._events.clear()

    async def result(self) -> Result:
        """Return the whole, after the end."""
        while not self._over:
            self._ready.clear()
            await self._ready.wait()
        self._raise()
        assert self._result is not None, "it has ended without an error"
        return self._result

    def cancel(self) -> None:
        """End the generation within one step."""
        if not self._over:
            self._cancel()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # ---- the process --------------------------------------------------------------------------------------------

    def put(self, events: Sequence[Reading | Chunk]) -> None:
        """Take events for the reader. A reader who is too far behind ends the generation."""
        if self._over or self._left:
            return
        self._events += events
        if len(self._events) > UNREAD:
            self.cancel()
            self.end(None, DeadlineError(_TOO_SLOW))
        self._ready.set()

    def end(self, result: Result | None, error: Exception | None) -> None:
        """Take the end. Only the first counts."""
        if not self._over:
            self._over, self._result, self._error = True, result, error
            self._ready.set()


class RemoteModel:
    """Process of a model: a ``Backend`` once it is loaded. All methods are for one asyncio loop.

    ``text`` may be None for a model whose memory is only estimated.
    ``at_end`` is called when the process has ended without being asked to, with the error of its requests.
    """

    def __init__(self, name: str, text: ModelText | None, at_end: Callable[[DeviceError], None]) -> None:
        self._text, self.card = text, ModelCard(name, state="loading")
        self._at_end = at_end
        self._ids = itertools.count(1)
        self._answers: dict[int, RemoteAnswer] = {}
        self._waiting: dict[int, asyncio.Future[Any]] = {}  # for the reply to an order; 0: to that of the load
        self._on_loading: OnLoading = lambda done, total: None
        self._closing: Exception | None = None
        self._lost: Exception | None = None
        self._ended = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    # ---- the life of the process --------------------------------------------------------------------------------

    async def open(self, options: LoadOptions) -> channel.Planned:
        """Start the process, and let it read the file and estimate its memory."""
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            self._transport, _ = await asyncio.get_running_loop().create_connection(lambda: _Reports(self), sock=ours)
            try:
                self._process = subprocess.Popen(
                    command(theirs.fileno(), self.card.id),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={name: text for name, text in os.environ.items() if name != settings.API_KEY.name},
                )
            except OSError as error:
                self._transport.abort()
                raise DeviceError(f"the process of {self.card.id} cannot be started: {error.strerror}") from error
        planned: channel.Planned = await self._reply(0, Open(options))
        return planned

    async def load(self, order: Load, facts: channel.Facts, on_loading: OnLoading) -> None:
        """Load the model that was opened."""
        self._on_loading = on_loading
        ready: channel.Ready = await self._reply(0, order)
        self.card = replace(
            self.card,
            state="loaded",
            arch=facts.arch,
            quantization=facts.quantization,
            n_ctx=ready.n_ctx,
            n_ctx_train=facts.n_ctx_train,
            n_vocab=facts.n_vocab,
            n_params=facts.n_params,
            nbytes=facts.nbytes,
            sequences=ready.sequences,
            facts={"name": facts.name, "device": facts.device},
        )

    @property
    def text(self) -> ModelText:
        """Tokenizer, chat template and advised sampling of the model's file. One that is only opened has none."""
        assert self._text is not None, "it is not loaded"
        return self._text

    @property
    def pid(self) -> int:
        """Process id, 0 before the start."""
        return self._process.pid if self._process else 0

    @property
    def alive(self) -> bool:
        """False if the process has ended, or is about to."""
        return self._closing is None and self._ending is None

    async def ended(self) -> None:
        """Wait for the end of the process, whatever ends it."""
        await self._ended.wait()

    async def close(self, reason: Exception | None = None) -> None:
        """End the process, and wait for its end. Requests that run end with ``reason``."""
        if self._closing is None:
            self._closing = reason or UsageError(CLOSED)
            self._fail_all(self._closing)
            if self._process:
                self._send(Close())
        if self._process is None:
            return
        try:
            await asyncio.wait_for(self._ended.wait(), CLOSE_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):
            self._process.kill()
            await self._ended.wait()

    def lost_connection(self) -> None:
        """Learn that the process has closed its end of the socket."""
        if self._process is not None:
            self._ending = asyncio.get_running_loop().create_task(self._reap(self._process))

    async def _reap(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the end of the process; then end its requests."""
        if not await _has_ended(process, DYING_SECONDS):
            process.kill()
            await _has_ended(process, math.inf)
        error = self._lost or DeviceError(f"the process of {self.card.id} has ended: {_cause(process.returncode)}")
        self._fail_all(self._closing or error)
        self._ended.set()
        if self._closing is None:
            self._at_end(error if isinstance(error, DeviceError) else DeviceError(str(error)))

    def _fail_all(self, error: Exception) -> None:
        answers, waiting = list(self._answers.values()), list(self._waiting.values())
        self._answers.clear()
        self._waiting.clear()
        for answer in answers:
            answer.end(None, error)
        for future in waiting:
            if not future.done():
                future.set_exception(error)

    # ---- orders -------------------------------------------------------------------------------------------------

    async def start(self, asked: Asked) -> RemoteAnswer:
        """Begin a generation. See ``Backend``."""
        id = next(self._ids)
        answer = self._answers[id] = RemoteAnswer(lambda: self._send(Cancel(id)))
        try:
            await self._reply(id, Start(id, asked_to_data(asked)))
        except Exception:
            self._answers.pop(id, None)
            raise
        except BaseException:  # who asked has gone
            answer.cancel()
            raise
        return answer

    async def figures(self) -> dict[str, Any]:
        """Return what the engine has at this moment."""
        found: dict[str, Any] = await self._call("figures")
        return found

    async def clear_cache(self) -> None:
        """Forget all prompts that are cached."""
        await self._call("clear_cache")

    async def score(self, ids: Sequence[int], n_top: int) -> list[Logprob]:
        """Return the log-probabilities of a prompt. See ``Backend``."""
        found = await self._call("score", ids, n_top)
        return [Logprob(token, value, tuple(map(tuple, top))) for token, value, top in found]

    async def embed(self, texts: Sequence[str | Sequence[int]], normalize: bool, dimensions: int | None) -> Vectors:
        """Return the vectors of texts. See ``Backend``."""
        id, sent = next(self._ids), [text if isinstance(text, str) else list(text) for text in texts]
        return Vectors(*await self._reply(id, Embed(id, sent, normalize, dimensions)))

    async def rerank(self, query: str, documents: Sequence[str], instruction: str | None) -> Vectors:
        """Return the scores of documents. See ``Backend``."""
        id = next(self._ids)
        return Vectors(*await self._reply(id, Rerank(id, query, list(documents), instruction)))

    async def _call(self, what: str, ids: Sequence[int] = (), n_top: int = 0) -> Any:
        id = next(self._ids)
        return await self._reply(id, Call(id, what, list(ids), n_top))

    async def _reply(self, id: int, order: Any) -> Any:
        """Send an order and wait for its reply. Raises the error that it is."""
        if not self.alive:
            raise self._closing or self._lost or DeviceError(f"the process of {self.card.id} has ended")
        future = self._waiting[id] = asyncio.get_running_loop().create_future()
        try:
            self._send(order)
            return await future
        finally:
            self._waiting.pop(id, None)

    def _send(self, order: Any) -> None:
        try:
            frame = channel.frame_of([order])
        except (UnicodeEncodeError, OverflowError) as error:  # lone surrogates, integers of more than 64 bits
            raise UsageError(f"an option cannot be sent to the model's process: {error}") from error
        if not self._transport.is_closing():
            self._transport.write(frame)

    # ---- reports ------------------------------------------------------------------------------------------------

    def take(self, reports: list[channel.Report]) -> None:
        """Hand reports to whom they concern."""
        for report in reports:
            match report:
                case channel.Pieces(id, chunks):
                    self._put(id, chunks)
                case channel.Reading(id, done, total):
                    self._put(id, (Reading(done, total),))
                case channel.Ended(id, result):
                    self._end(id, result, None)
                case channel.Failed(id, problem):
                    self._failed(id, error_of(problem))
                case channel.Started(id):
                    self._answer(id, None)
                case channel.Answered(id, value):
                    self._answer(id, value)
                case channel.Planned() | channel.Ready():
                    self._answer(0, report)
                case channel.Loading(done, total):
                    self._on_loading(done, total)
                case channel.Lost(problem):
                    self._lost = error_of(problem)

    def _put(self, id: int, events: Sequence[Reading | Chunk]) -> None:
        if answer := self._answers.get(id):
            answer.put(events)

    def _end(self, id: int, result: Result | None, error: Exception | None) -> None:
        if answer := self._answers.pop(id, None):
            answer.end(result, error)

    def _failed(self, id: int, error: Exception) -> None:
        """Give an error to who waits for a reply, or else to the reader of the generation."""
        future = self._waiting.pop(id, None)  # now: an answer may start and fail in one frame
        if future is None:
            self._end(id, None, error)
        else:
            self._answers.pop(id, None)
            if not future.done():
                future.set_exception(error)

    def _answer(self, id: int, value: Any) -> None:
        future = self._waiting.pop(id, None)
        if future is not None and not future.done():
            future.set_result(value)

    @property
    def open_requests(self) -> int:
        """Generations and calls that have not ended."""
        return len(self._answers) + len(self._waiting)


class _Reports(asyncio.Protocol):
    """Reads the socket: the bytes that have come are one wake-up of the loop."""

    def __init__(self, model: RemoteModel) -> None:
        self._model, self._frames = model, Frames()

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        for body in self._frames.feed(data):
            self._model.take(channel.reports.decode(body))

    def connection_lost(self, exc: Exception | None) -> None:
        """Learn of the end."""
        self._model.lost_connection()


def command(fd: int, name: str) -> list[str]:
    """Return the command line of a model's process. It imports from where this process does."""
    shown = "".join(c if c.isprintable() else "?" for c in name)[:80]
    return [sys.executable, "-c", BOOT, str(fd), str(channel.PROTOCOL), shown, *sys.path]


async def _has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the end of a process, at most so many seconds. Return True if it has ended.

    A thread that waits would not do: the system may start none, and then nobody would hear of the end.
    """
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        await asyncio.sleep(LOOK_SECONDS)
    return process.returncode is not None


def _cause(status: int) -> str:
    if status < 0:
        hint = ", as the system does when memory runs out" if -status == signal.SIGKILL else ""
        with suppress(ValueError):
            return f"it was ended by {signal.Signals(-status).name}{hint}"
    return f"it left with status {status}"


__all__ = ["LoadOptions", "RemoteAnswer", "RemoteModel", "command"]
