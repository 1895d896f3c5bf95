"""Asks an ASGI app without a network: whole replies, and streams that a test reads piece by piece and may leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ASGI = Any  # an application
LATEST = 30.0  # seconds after which a test that waits has failed


@dataclass(frozen=True)
class Event:
    """Event of a stream. ``data`` is decoded JSON, or the text that is none."""

    name: str
    data: Any


@dataclass(frozen=True)
class Reply:
    """Whole reply."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Event]:
        return events_of(self.body)

    @property
    def data(self) -> list[Any]:
        return [event.data for event in self.events]

    @property
    def error(self) -> Any:
        return self.json["error"]


def events_of(body: bytes) -> list[Event]:
    """Reads a stream of events as the standard of the Web says. Comments are left out."""
    found = []
    for block in body.decode().split("\n\n"):
        fields = [line.partition(":") for line in block.split("\n") if line and not line.startswith(":")]
        if not fields:
            continue
        name = next((value.strip() for key, _, value in fields if key == "event"), "")
        text = "\n".join(value.removeprefix(" ") for key, _, value in fields if key == "data")
        try:
            found.append(Event(name, json.loads(text)))
        except ValueError:
            found.append(Event(name, text))
    return found


class Call:
    """Request whose reply a test reads piece by piece. ``leave`` closes the connection, as a client does."""

    def __init__(
        self, app: ASGI, path: str, body: Any = None, method: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        given = {"host": "localhost", "content-type": "application/json", "content-length": str(len(raw))}
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method or ("GET" if body is None else "POST"),
            "scheme": "http",
            "path": path.partition("?")[0],
            "raw_path": path.partition("?")[0].encode(),
            "query_string": path.partition("?")[2].encode(),
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode()) for k, v in {**given, **(headers or {})}.items()],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }
        self._app = app
        self._in: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._out: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._in.put_nowait({"type": "http.request", "body": raw, "more_body": False})
        self.status = 0
        self.headers: dict[str, str] = {}
        self.started = asyncio.Event()
        self.task: asyncio.Task[None] = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._in.get, self._send)
        finally:
            self._out.put_nowait(None)
            self.started.set()

    async def _send(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            self.started.set()
        elif message["type"] == "http.response.body" and message.get("body"):
            self._out.put_nowait(message["body"])

    async def piece(self) -> bytes:
        """Waits for the next bytes of the reply; b"" at its end."""
        found = await asyncio.wait_for(self._out.get(), LATEST)
        if found is None:
            self._out.put_nowait(None)
        return found or b""

    def taken(self) -> list[bytes]:
        """Returns what has come and was not read."""
        found = []
        while not self._out.empty():
            found.append(self._out.get_nowait() or b"")
        return found

    async def rest(self) -> bytes:
        """Returns what is left, at the end of the reply."""
        pieces = []
        while found := await self.piece():
            pieces.append(found)
        await asyncio.wait_for(self.task, LATEST)
        return b"".join(pieces)

    def leave(self) -> None:
        """Closes the connection."""
        self._in.put_nowait({"type": "http.disconnect"})

    async def over(self) -> None:
        """Waits until the app is done with the request."""
        await asyncio.wait_for(asyncio.gather(self.task, return_exceptions=True), LATEST)


async def reply_of(call: Call) -> Reply:
    """Reads a reply to its end."""
    body = await call.rest()
    return Reply(call.status, call.headers, body)


def ask(app: ASGI, path: str, body: Any = None, method: str = "", headers: Mapping[str, str] | None = None) -> Reply:
    """Asks, and returns the whole reply."""

    async def one() -> Reply:
        return await reply_of(Call(app, path, body, method, headers))

    return asyncio.run(one())
