"""POST /v1/messages and /v1/messages/count_tokens, of Anthropic's Messages API."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .ask import Ask
from .errors import failure_of
from .figures import server_timing
from .messages_read import read
from .messages_write import PING, MessageWriter, collected
from .plain import unless_gone
from .prepare import tokens_of
from .serving import Serving
from .sse import begun, frame
from .turn import Ended, opened
from .wire import Json, read_object, request_id


async def messages(request: Request) -> Response:
    """Answer a conversation."""
    serving: Serving = request.app.state.serving
    asked = read(await read_object(request, serving.limits.depth), request.headers)
    reply = _Reply(serving, replace(asked.ask, model=serving.models.resolve(asked.ask.model)), request_id(request))
    if asked.stream:
        return await begun(reply.frames(), reply.in_band, serving.limits, beat=_ping)
    body = await unless_gone(request, reply.whole())
    return Response(msgspec.json.encode(body), headers=reply.headers, media_type="application/json")


async def count_tokens(request: Request) -> Response:
    """Count the tokens of a prompt. No model needs to be loaded, and no generation is waited for."""
    serving: Serving = request.app.state.serving
    ask = read(await read_object(request, serving.limits.depth), request.headers).ask
    ids = await tokens_of(ask, await serving.models.text_of(ask.model))
    return Response(msgspec.json.encode({"input_tokens": len(ids)}), media_type="application/json")


class _Reply:
    """Reply to one request."""

    def __init__(self, serving: Serving, ask: Ask, request_id: str) -> None:
        self._serving, self._ask, self._request_id = serving, ask, request_id
        self._id = f"msg_{uuid.uuid4().hex}"
        self.headers: dict[str, str] = {}

    def in_band(self, error: BaseException) -> bytes:
        """Return the frame of an error after the headers."""
        return _frame(failure_of(error, self._request_id).anthropic(self._request_id, midway=True))

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Yield the reply as a stream. The first item, which is empty, says that the request was accepted."""
        async with aclosing(self._events()) as events:
            async for event in events:
                yield _frame(event) if event else b""

    async def whole(self) -> Json:
        """Return the reply as one object."""
        async with aclosing(self._events()) as events:
            return collected([event async for event in events if event])

    async def _events(self) -> AsyncGenerator[Json, None]:
        """Yield the events of the stream, after an empty one."""
        ask = self._ask
        async with opened(self._serving, [ask], self._request_id, self._id) as (turn,):
            yield {}
            card = turn.backend.card
            writer = MessageWriter(self._id, card.id, card.n_ctx, ask.max_tokens)
            async with aclosing(turn.events()) as events:
                async for event in events:
                    if isinstance(event, Ended):
                        self.headers["server-timing"] = server_timing([event.result])
                    for wire in writer.write(event):
                        yield wire


def _frame(event: Json) -> bytes:
    """Return an event as bytes. Anthropic's clients drop an event without a name."""
    return frame(event, event["type"])


def _ping() -> bytes:
    return _frame(PING)


routes = [
    Route("/v1/messages", messages, methods=["POST"]),
    Route("/v1/messages/count_tokens", count_tokens, methods=["POST"]),
]
