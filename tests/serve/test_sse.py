"""Streams of events: when they begin, their signs of life, and their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from support.scripted import ScriptedBackend
from support.served import CHAT, USER, Served
from support.streams import Call, events_of
from zincmetal.errors import OutOfMemoryError
from zincmetal.serve.serving import Limits
from zincmetal.serve.sse import COMMENT, EventStream, begun, comment, frame


def test_frames() -> None:
    assert frame({"a": "é\n"}) == b'data: {"a":"\xc3\xa9\\n"}\n\n'
    assert frame({}, "ping") == b"event: ping\ndata: {}\n\n"
    assert events_of(frame({"a": [1]}, "x"))[0].name == "x"


def test_a_comment_is_no_event() -> None:
    assert comment() == COMMENT
    assert events_of(COMMENT) == []


class Source:
    """Generator of frames that a test feeds."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()
        self.closed = asyncio.Event()

    async def frames(self) -> AsyncGenerator[bytes, None]:
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.closed.set()

    def put(self, *items: bytes | BaseException | None) -> Source:
        for item in items:
            self.queue.put_nowait(item)
        return self


def in_band(error: BaseException) -> bytes:
    return f"data: {type(error).__name__}\n\n".encode()


def call_of(source: Source, **limits: float) -> Call:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        reply = await begun(source.frames(), in_band, Limits(**limits))  # type: ignore[arg-type]
        await reply(scope, receive, send)

    return Call(app, "/", {})


def test_an_empty_first_frame_begins_the_stream_and_is_not_sent() -> None:
    async def main() -> None:
        source = Source()
        call = call_of(source.put(b""))
        await asyncio.wait_for(call.started.wait(), 30)
        assert call.status == 200
        source.put(b"data: 1\n\n", None)
        assert await call.rest() == b"data: 1\n\n"
        assert source.closed.is_set()

    asyncio.run(main())


def test_an_error_before_the_first_frame_is_raised() -> None:
    async def main() -> None:
        call = call_of(Source().put(ZeroDivisionError()))
        await call.over()
        assert isinstance(call.task.exception(), ZeroDivisionError)
        assert call.status == 0

    asyncio.run(main())


def test_an_error_after_it_is_the_last_frame() -> None:
    async def main() -> None:
        source = Source().put(b"", b"data: 1\n\n", ZeroDivisionError())
        assert await call_of(source).rest() == b"data: 1\n\ndata: ZeroDivisionError\n\n"

    asyncio.run(main())


@pytest.mark.parametrize("ends", [None, ZeroDivisionError()])
def test_patience_ends_and_the_stream_begins(ends: Any) -> None:
    async def main() -> None:
        source = Source()
        call = call_of(source, patience=0.0, keep_alive=0.001)
        await asyncio.wait_for(call.started.wait(), 30)
        assert await call.piece() == COMMENT
        source.put(b"", b"data: 1\n\n", ends)
        rest = (await call.rest()).replace(COMMENT, b"")
        assert rest == b"data: 1\n\n" + (b"data: ZeroDivisionError\n\n" if ends else b"")

    asyncio.run(main())


def test_signs_of_life_come_only_while_nothing_else_does() -> None:
    async def main() -> None:
        source = Source().put(b"", *[b"data: 1\n\n"] * 50, None)
        assert COMMENT not in await call_of(source, keep_alive=30).rest()

    asyncio.run(main())


def test_no_sign_of_life_is_made_behind_a_first_frame_that_waits_to_be_sent() -> None:
    """Frames have numbers: what is made later must not be sent before."""

    async def main() -> None:
        source, numbers = Source(), iter(range(9))

        async def numbered() -> AsyncGenerator[bytes, None]:
            async with aclosing(source.frames()) as frames:
                async for _ in frames:
                    yield str(next(numbers)).encode()

        reply = await begun(numbered(), in_band, Limits(patience=0.0), beat=lambda: str(next(numbers)).encode())
        assert reply._beat() == b"0"  # noqa: SLF001
        source.put(b"first", None)
        for _ in range(9):
            await asyncio.sleep(0)  # it is made, and nobody has sent it
        assert reply._beat() == b""  # noqa: SLF001
        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        await reply({}, asyncio.Event().wait, send)  # type: ignore[arg-type]
        assert b"".join(sent) == b"1"

    asyncio.run(main())


@pytest.mark.parametrize("patience", [0.0, 30.0])
def test_a_client_that_leaves_closes_the_frames(patience: float) -> None:
    async def main() -> None:
        source = Source()
        call = call_of(source.put(b"") if patience else source, patience=patience)
        await asyncio.wait_for(call.started.wait(), 30)
        call.leave()
        await call.over()
        assert source.closed.is_set()

    asyncio.run(main())


def test_a_reply_that_is_cancelled_before_it_begins_closes_the_frames() -> None:
    async def main() -> None:
        source = Source()
        call = call_of(source)
        await asyncio.sleep(0)
        call.task.cancel()
        await call.over()
        assert source.closed.is_set()

    asyncio.run(main())


def test_no_length_and_no_buffering() -> None:
    headers = EventStream(Source().frames()).headers
    assert "content-length" not in headers
    assert headers["x-accel-buffering"] == "no"
    assert headers["content-type"] == "text/event-stream; charset=utf-8"


# ---- a model that is loaded first ---------------------------------------------------------------------------------


def loads(served: Served, monkeypatch: pytest.MonkeyPatch, failure: BaseException | None = None) -> asyncio.Event:
    """Makes the model load until the event is set."""
    loaded, lease = asyncio.Event(), served.models.lease

    @asynccontextmanager
    async def slow(name: str, keep: float | None = None) -> AsyncIterator[ScriptedBackend]:
        await loaded.wait()
        if failure:
            raise failure
        async with lease(name, keep) as backend:
            yield backend

    monkeypatch.setattr(served.models, "lease", slow)
    return loaded


def test_a_stream_lives_while_its_model_is_loaded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        served.reset(Limits(patience=0.0, keep_alive=0.001))
        loaded = loads(served, monkeypatch)
        call = Call(served.app, CHAT, {"messages": USER, "stream": True})
        assert await call.piece() == COMMENT
        loaded.set()
        data = [event.data for event in events_of(await call.rest())]
        assert data[0]["choices"][0]["delta"]["role"] == "assistant"
        assert data[-1] == "[DONE]"

    asyncio.run(main())


def test_a_load_that_fails_is_told_in_the_stream(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        served.reset(Limits(patience=0.0, keep_alive=0.001))
        loaded = loads(served, monkeypatch, OutOfMemoryError("it does not fit"))
        call = Call(served.app, CHAT, {"messages": USER, "stream": True})
        assert await call.piece() == COMMENT
        loaded.set()
        (error,) = [event.data for event in events_of(await call.rest())]
        assert error["error"]["code"] == "out_of_memory"

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_the_model_is_loaded(served: Served, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    async def main() -> None:
        served.reset(Limits(patience=0.0))
        loads(served, monkeypatch)
        call = Call(served.app, CHAT, {"messages": USER, "stream": stream})
        if stream:
            await asyncio.wait_for(call.started.wait(), 30)
        call.leave()
        await call.over()
        assert served.backend.asked == []

    asyncio.run(main())
