"""Streams of server-sent events: their bytes, signs of life by the wall clock, and the end when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

if TYPE_CHECKING:
    from .serving import Limits

DONE = b"data: [DONE]\n\n"  # ends streams of chat/completions and completions
COMMENT = b": keep-alive\n\n"

encode = msgspec.json.Encoder().encode


def frame(data: Any, event: str = "") -> bytes:
    """Return an event as bytes. ``data`` becomes JSON, which has no line breaks."""
    named = b"event: " + event.encode() + b"\n" if event else b""
    return named + b"data: " + encode(data) + b"\n\n"


def comment() -> bytes:
    """Return the sign of life of chat/completions and completions. Codex and Anthropic's clients need an event."""
    return COMMENT


class EventStream(Response):
    """Reply whose frames come as they are made. Its headers are sent at once.

    ``beat()`` returns a sign of life, or nothing, which is sent after ``every`` seconds without a frame: also while a
    model is loaded or a long prompt is read. When the client leaves, the task that reads ``frames`` is cancelled and
    the generator is closed, which cancels the generation.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        beat: Callable[[], bytes] = comment,
        every: float = 8.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # No proxy may hold frames back.
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._frames, self._beat, self._every = frames, beat, every
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the frames, as an ASGI application."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pump = asyncio.ensure_future(self._pump(send))
        beats, left = asyncio.ensure_future(self._beats(send)), asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({pump, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pump, beats, left):
                task.cancel()
            await asyncio.gather(pump, beats, left, return_exceptions=True)
        if not pump.cancelled():
            pump.result()

    async def _pump(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._sent_at = loop.time()
        async with aclosing(self._frames) as frames:
            async for data in frames:
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    self._sent_at = loop.time()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _beats(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            wait = self._sent_at + self._every - loop.time()
            if wait > 0:
                await asyncio.sleep(wait)
                continue
            if beat := self._beat():
                await send({"type": "http.response.body", "body": beat, "more_body": True})
            self._sent_at = loop.time()


async def _left(receive: Receive) -> None:
    """Wait until the client has left. Its request was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def begun(
    frames: AsyncGenerator[bytes, None],
    in_band: Callable[[BaseException], bytes],
    limits: Limits,
    *,
    beat: Callable[[], bytes] = comment,
) -> EventStream:
    """Make the reply of a stream, once it is known whether the request is refused.

    The first item of ``frames``, which may be empty, says that the request is accepted. What is raised before it is
    raised here, so that the client gets a status. That wait is bounded by ``limits.patience``: then (a model is being
    loaded) the stream begins with signs of life, and an error is a frame, ``in_band``.
    """
    first = asyncio.ensure_future(anext(frames, b""))
    try:
        await asyncio.wait({first}, timeout=limits.patience)
    except BaseException:
        first.cancel()
        with suppress(BaseException):
            await first
        await frames.aclose()
        raise
    if first.done():
        first.result()
    told: list[bool] = []

    def alive() -> bytes:
        # A first frame that waits to be sent is older than a sign of life that is made now.
        return b"" if first.done() and not told else beat()

    return EventStream(_all(first, frames, in_band, told), beat=alive, every=limits.keep_alive)


async def _all(
    first: asyncio.Future[bytes],
    frames: AsyncGenerator[bytes, None],
    in_band: Callable[[BaseException], bytes],
    told: list[bool],
) -> AsyncGenerator[bytes, None]:
    """Yield all frames. An error becomes the last frame. ``told`` is no longer empty once the first one is given."""
    async with aclosing(frames):
        try:
            found = await first
            told.append(True)
            yield found
            async for data in frames:
                yield data
        except Exception as error:
            told.append(True)
            yield in_band(error)
