"""Client of an ASGI application in this process, for tests that must say exactly which bytes arrive, and when."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

App = Callable[[Any, Any, Any], Awaitable[None]]
JSON = ("content-type", "application/json")
HOST = ("host", "localhost:8080")


@dataclass
class Reply:
    """Reply to a request. ``headers`` are in lower case."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    taken: int = 0  # messages of the request that the application took
    complete: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> Any:
        """Code of an error in OpenAI's form."""
        return self.json()["error"]["code"]

    @property
    def data(self) -> list[Any]:
        """Data of server-sent events that are JSON."""
        lines = self.body.decode().splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


async def ask(
    app: App,
    method: str,
    path: str,
    headers: Sequence[tuple[str, str]] = (),
    body: Any = b"",
    *,
    peer: str | None = "127.0.0.1",
    bare: bool = False,
    stalls: bool = False,
    leaves: asyncio.Event | None = None,
) -> Reply:
    """Sends one request and returns the reply.

    ``body``: bytes, a list of bytes (pieces without a Content-Length), or a value that is sent as JSON. ``bare``: no
    headers but those that are given. ``stalls``: the body never ends. ``leaves``: the client is gone once it is set.
    """
    fields = list(headers)
    in_pieces = isinstance(body, list) and bool(body) and isinstance(body[0], bytes)
    if not in_pieces and not isinstance(body, bytes):
        body, fields = json.dumps(body).encode(), [*fields, JSON]
    pieces = list(body) if in_pieces else [body]
    if not bare:
        known = {name.lower() for name, _ in fields}
        fields += [HOST] if "host" not in known else []
        if isinstance(body, bytes) and body and "content-length" not in known:
            fields.append(("content-length", str(len(body))))
        elif in_pieces and "content-length" not in known:
            fields.append(("transfer-encoding", "chunked"))
    raw_path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(raw_path),
        "raw_path": raw_path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode("utf-8", "surrogateescape")) for name, value in fields],
        "client": None if peer is None else (peer, 50000),
        "server": ("127.0.0.1", 8080),
        "state": {},
    }
    reply = Reply()
    never = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if pieces:
            reply.taken += 1
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces) or stalls}
        await (leaves or never).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert not reply.status, "a second reply"
            reply.status = message["status"]
            for name, value in message["headers"]:
                assert b"\r" not in value
                assert b"\n" not in value
                reply.headers[name.decode().lower()] = value.decode("latin-1")
        else:
            reply.body += message.get("body", b"")
            reply.complete = not message.get("more_body", False)

    await app(scope, receive, send)
    return reply


def asked(app: App, method: str, path: str, *arguments: Any, **keywords: Any) -> Reply:
    """Does what ``ask`` does, in an event loop of its own."""
    return asyncio.run(ask(app, method, path, *arguments, **keywords))
