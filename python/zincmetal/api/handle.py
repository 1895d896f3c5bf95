"""Handle of a generation that runs: an iterator of chunks, an asynchronous iterator, and a future of the result.

The thread that steps makes the text (:class:`Answer`, which is the request's sink) and puts chunks into a queue. So a
stop string ends a request within one step, and a slow reader holds up nobody. The handle takes the chunks out.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from ..engine.request import CANCELLED
from ..errors import UsageError
from ..text.stream import TextStream
from .result import CacheUse, Chunk, Logprob, Result, result_of

if TYPE_CHECKING:
    from types import TracebackType

    from ..device.buffers import Progress
    from ..engine.request import Stats
    from ..text.tokenizer import Tokenizer

_Event = Any  # a Chunk, a (done, total) of a prompt, or None at the end


class Answer:
    """Sink of a request: makes chunks of tokens on the thread that steps, and keeps them for a reader.

    ``explain(stats)`` makes the ``CacheUse`` of a result. ``logprob(choice)`` makes the log-probabilities of a token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        hide_special: bool,
        *,
        n_prompt: int,
        max_tokens: int,
        with_progress: bool,
        explain: Callable[[Stats], CacheUse],
        logprob: Callable[[Any], Logprob] | None = None,
    ) -> None:
        self._text = TextStream(tokenizer, stop, hide_special)
        self._eog = tokenizer.eog_ids
        self._n_prompt, self._max_tokens, self._with_progress = n_prompt, max_tokens, with_progress
        self._explain, self._logprob = explain, logprob
        # No lock: an interrupt could leave it held, and the thread that steps would wait for it.
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._listeners: deque[Callable[[], None]] = deque()  # of the next event
        self._waiters: deque[SimpleQueue[None]] = deque()  # of the end
        self._began = 0.0
        self._prompt_tps = 0.0
        self._n = 0
        self.chunks: list[Chunk] = []
        self.logprobs: list[Logprob] | None = None if logprob is None else []
        self.reason = ""
        self.stats: Stats | None = None
        #: Called on the thread that steps, with the answer, at its end.
        self.at_end: Callable[[Answer], None] | None = None
        self.ended_by = ""  # the call that ended the stream, if one did
        self.cache: CacheUse | None = None
        self.error: BaseException | None = None
        self.over = False

    # ---- the sink, called by the thread that steps ----------------------------------------------------------

    def progress(self, done: int, total: int) -> None:
        """Take the number of tokens of the prompt that are computed."""
        if self._with_progress:
            self._put((done, total))

    def started(self, stats: Stats) -> None:
        """Take the cost of reading the prompt, before the first token."""
        computed = stats.prompt - stats.reused
        self._prompt_tps = computed / (stats.prefill or 1e-9)
        self.progress(computed, computed)

    def token(self, token: int, choice: Any = None) -> str | None:
        """Take a token; return the reason to end, or None. An error of it goes to the reader."""
        try:
            return self._token(token, choice)
        except Exception as error:
            self.error = error
            raise

    def _token(self, token: int, choice: Any) -> str | None:
        self._n += 1
        if self._n == 1:
            self._began = time.perf_counter()
        ended = token in self._eog
        text = self._text
        piece = "" if ended else text.push(token)
        reason = "stop" if ended or text.stop_string is not None else "length" if self._n == self._max_tokens else None
        if reason and text.stop_string is None:
            piece += text.finish()
            reason = "stop" if text.stop_string is not None else reason  # the text held back was a stop string
        tps = (self._n - 1) / (time.perf_counter() - self._began or 1e-9)  # the first token came with the prompt
        stop_token = token if ended else None
        logprob = self._logprob(choice) if self._logprob else None
        if logprob and self.logprobs is not None:
            self.logprobs.append(logprob)
        of_prompt = (self._n_prompt, self._prompt_tps)
        chunk = Chunk(piece, token, reason, *of_prompt, tps, stop_token, text.stop_string, logprob)
        self.chunks.append(chunk)
        self._put(chunk)
        return reason

    def done(self, reason: str, stats: Stats) -> None:
        """End the text. ``stats`` are what the request cost."""
        self.reason, self.stats, self.cache = reason, stats, self._explain(stats)
        self._end()

    def failed(self, error: BaseException) -> None:
        """End with an error, for the reader to raise."""
        self.error = error
        self._end()

    def _end(self) -> None:
        try:
            if self.at_end:
                self.at_end(self)
        finally:
            self.over = True
            self._put(None)
            with suppress(IndexError):
                while True:
                    self._waiters.popleft().put(None)

    def _put(self, event: _Event) -> None:
        self._events.put(event)
        self._tell_listeners()

    def _tell_listeners(self) -> None:
        with suppress(IndexError):
            while True:
                self._listeners.popleft()()

    # ---- the reader ------------------------------------------------------------------------------------------

    def take(self, timeout: float | None = None) -> _Event:
        """Take the next event; wait for it. The end, None, stays for other readers. Raises TimeoutError."""
        try:
            event = self._events.get(timeout=timeout)
        except Empty:
            raise TimeoutError("no token came in time") from None
        if event is None:
            self._events.put(None)
        return event

    def when_ready(self, call: Callable[[], None]) -> None:
        """Call ``call`` once, on any thread, as soon as there is an event."""
        self._listeners.append(call)
        if not self._events.empty():
            self._tell_listeners()

    def wait(self, timeout: float | None) -> None:
        """Wait for the end. Raises TimeoutError."""
        mine: SimpleQueue[None] = SimpleQueue()
        self._waiters.append(mine)
        if self.over:
            return
        try:
            mine.get(timeout=timeout)
        except Empty:
            with suppress(ValueError):  # it has ended at this moment
                self._waiters.remove(mine)
            raise TimeoutError("the generation did not end in time; cancel() ends it") from None


class Generation:
    """Generation that runs, as :meth:`Model.submit` returns it.

    Iterate over it for chunks, with ``for`` or ``async for``; or take the :meth:`result`; or both, by any thread. Each
    chunk is read once, and the result has all of them. A handle that is dropped cancels its request. :meth:`cancel` and
    :meth:`close` end it within one step.
    """

    def __init__(self, answer: Answer, cancel: Callable[[], None], progress: Progress | None = None) -> None:
        self._answer, self._progress = answer, progress
        self._ended = False
        #: Completes the result by what only its caller knows, such as the value of an answer with a schema.
        self.complete: Callable[[Result], Result] | None = None
        self._finalizer = weakref.finalize(self, cancel)
        self._finalizer.atexit = False

    # ---- iteration ---------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = self._next(None)
        if chunk is None:
            raise StopIteration
        return chunk

    def _next(self, deadline: float | None) -> Chunk | None:
        """Wait for a chunk. None at the end. Raises TimeoutError at ``deadline``."""
        while not self._ended:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            chunk = self._read(self._answer.take(left))
            if chunk is not None:
                return chunk
        return None

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while not self._ended:
            chunk = self._read(await self._next_event())
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    async def events(self) -> AsyncIterator[Chunk | tuple[int, int]]:
        """Yield chunks, and before them (done, total) of the prompt's tokens if progress was asked for."""
        while not self._ended:
            event = await self._next_event()
            chunk = self._read(event)
            if event is not None:
                yield event if chunk is None else chunk

    def when_ready(self, call: Callable[[], None]) -> None:
        """Call ``call`` once, on any thread, as soon as there is something for :meth:`take_ready`."""
        self._answer.when_ready(call)

    def take_ready(self) -> tuple[list[Chunk | tuple[int, int]], bool]:
        """Take what there is, without waiting: chunks and (done, total), and whether the generation has ended."""
        found: list[Chunk | tuple[int, int]] = []
        with suppress(TimeoutError):
            while (event := self._answer.take(0)) is not None:
                found.append(event)
            return found, True
        return found, False

    async def _next_event(self) -> _Event:
        while True:
            await self._ready()
            with suppress(TimeoutError):  # another reader was quicker
                return self._answer.take(0)

    async def _ready(self) -> None:
        """Wait, without a thread, until there is an event."""
        loop = asyncio.get_running_loop()
        ready = loop.create_future()

        def set_ready() -> None:
            if not ready.done():
                ready.set_result(None)

        def tell() -> None:
            with suppress(RuntimeError):  # the loop has closed since
                loop.call_soon_threadsafe(set_ready)

        self._answer.when_ready(tell)
        await ready

    def _read(self, event: _Event) -> Chunk | None:
        """Return a chunk. Tell progress of the prompt. At the end raise the error, if there is one."""
        if event is None:
            self._ended = True
            self._finalizer.detach()
            self._raise()
        elif isinstance(event, Chunk):
            return event
        elif self._progress:
            self._progress(*event)
        return None

    # ---- the whole ------------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None, show: Callable[[Chunk], None] | None = None) -> Result:
        """Wait for the end; return the whole result. ``show`` is called with each chunk as it comes.

        Raises what ended the request, and TimeoutError after ``timeout`` seconds: then it goes on, and a later call may
        wait again.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while show or self._progress:
            chunk = self._next(deadline)
            if chunk is None:
                break
            if show:
                show(chunk)
        self._answer.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        self._finalizer.detach()
        self._raise()
        made = result_of(self._answer)
        return self.complete(made) if self.complete else made

    def _raise(self) -> None:
        """Raise what ended the request, if it was an error or another call."""
        if self._answer.ended_by and self._answer.reason in ("", CANCELLED):
            raise UsageError(f"this stream was ended by {self._answer.ended_by}")
        if self._answer.error is not None:
            raise self._answer.error

    @property
    def done(self) -> bool:
        """Whether the generation has ended, by itself, by cancel or by an error."""
        return self._answer.over

    def cancel(self) -> None:
        """End the generation within one step. What was made stays readable, and the result is what there is."""
        self._finalizer()

    def close(self) -> None:
        """Cancel, and read no more chunks."""
        self.cancel()
        self._ended = True

    def throw(self, error: BaseException) -> None:
        """Cancel, and raise ``error`` in the caller, as a generator would."""
        self.close()
        raise error

    def end_by(self, call: str) -> None:
        """End it, so that its reader learns of the ``call`` that did."""
        if not self._answer.over:
            self._answer.ended_by = call
            self.cancel()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
