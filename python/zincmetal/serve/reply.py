"""Reply of OpenAI's chat and completion APIs: a stream of chunks, or the same chunks collected into one object."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from .errors import failure_of
from .figures import server_timing
from .plain import unless_gone
from .serving import Serving
from .sse import DONE, begun, frame
from .turn import Ended
from .wire import Json, request_id


class Reply:
    """Reply to one request. ``prefix`` begins its id. A module of an API makes the chunks, and collects them."""

    def __init__(self, request: Request, serving: Serving, prefix: str) -> None:
        self.serving, self.request_id = serving, request_id(request)
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.ended: list[Ended] = []

    def chunks(self) -> AsyncGenerator[Json, None]:
        """Yield the chunks. The first one, which is empty, says that the request was accepted."""
        raise NotImplementedError

    async def whole(self) -> Json:
        """Return the reply as one object."""
        raise NotImplementedError

    async def answer(self, request: Request, stream: bool) -> Response:
        """Send it, as a stream or whole."""
        if stream:
            return await begun(self._frames(), self._in_band, self.serving.limits)
        body = await unless_gone(request, self.whole())
        headers = {"server-timing": server_timing([ended.result for ended in self.ended])}
        return Response(msgspec.json.encode(body), headers=headers, media_type="application/json")

    async def _frames(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                yield frame(chunk) if chunk else b""
        yield DONE

    def _in_band(self, error: BaseException) -> bytes:
        """Return the frame of an error after the headers. No [DONE] follows it."""
        return frame(failure_of(error, self.request_id).openai())
