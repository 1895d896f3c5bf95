"""Client that measures: one connection, one request, the time of each token. It costs little: sockets and lines."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ...errors import UsageError, quote

Json = dict[str, Any]
LINE = 1 << 24  # bytes of the longest line
CONNECT_SECONDS = 10.0


class HttpFailure(Exception):
    """Reply that is no answer. ``status`` is 0 if there was none."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Target:
    """Server that is measured. ``name`` stands in the reports, ``model`` in the requests."""

    url: str
    name: str = ""
    model: str = ""
    key: str = field(default="", repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields of each request

    @property
    def host(self) -> str:
        """Name or address of the server."""
        return urlsplit(self.url).hostname or ""

    @property
    def is_local(self) -> bool:
        """True if the server is on this machine."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def check_url(url: str) -> str:
    """Return the base of a server's URL, without "/v1" and a slash at the end. Raises UsageError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise UsageError(f"{quote(url)} is no URL of a server, such as http://127.0.0.1:9462")
    return url.rstrip("/").removesuffix("/v1")


@dataclass
class Reply:
    """Head of a reply, and its body to read."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self.reader.readline()).split(b";")[0], 16):
                yield await self.reader.readexactly(size)
                await self.reader.readexactly(2)
        elif "content-length" in self.headers:
            yield await self.reader.readexactly(int(self.headers["content-length"]))
        else:
            while piece := await self.reader.read(1 << 16):
                yield piece

    async def body(self) -> bytes:
        """Return the whole body."""
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncIterator[tuple[bytes, float]]:
        """Yield the data of server-sent events, each with the time when it was there."""
        rest = b""
        async for piece in self.pieces():
            now = time.perf_counter()
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip(), now


@asynccontextmanager
async def asked(target: Target, method: str, path: str, body: Json | None = None) -> AsyncIterator[Reply]:
    """Send a request over a connection of its own, which is closed at the end. Raises HttpFailure without a reply."""
    parts = urlsplit(target.url)
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if secure else 80)
    try:
        opening = asyncio.open_connection(target.host, port, ssl=secure, limit=LINE)
        reader, writer = await asyncio.wait_for(opening, CONNECT_SECONDS)
    except (OSError, TimeoutError, asyncio.TimeoutError) as error:
        raise HttpFailure(0, f"{target.url} cannot be reached: {error or 'no reply'}") from None
    try:
        writer.write(_request(target, method, parts.path + path, parts.netloc, body))
        yield await _head(reader)
    except (TimeoutError, asyncio.TimeoutError):  # the caller's
        raise
    except (OSError, EOFError, ValueError, LookupError, asyncio.LimitOverrunError) as error:
        raise HttpFailure(0, f"the connection ended: {type(error).__name__}") from None
    finally:
        writer.transport.abort()  # a whole reply was read, or nobody wants the rest


def _request(target: Target, method: str, path: str, host: str, body: Json | None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", "Connection: close", "Accept: */*"]
    if target.key:
        lines.append(f"Authorization: Bearer {target.key}")
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


async def _head(reader: asyncio.StreamReader) -> Reply:
    while True:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(first.split(" ", 2)[1])
        if status >= 200:
            named = (line.partition(":") for line in lines if line)
            return Reply(status, {name.strip().lower(): value.strip() for name, _, value in named}, reader)


async def get(target: Target, path: str) -> bytes:
    """Return the body of a route. Raises HttpFailure if its status is no success."""
    async with asked(target, "GET", path) as reply:
        body = await reply.body()
    if reply.status != 200:
        raise HttpFailure(reply.status, f"GET {path}: status {reply.status}")
    return body


async def first_model(target: Target) -> Json:
    """Return the first model that a server lists. Raises HttpFailure."""
    try:
        found: Json = json.loads(await get(target, "/v1/models"))["data"][0]
        return found
    except (ValueError, LookupError, TypeError):
        raise HttpFailure(0, f"{target.url} lists no models") from None


__all__ = ["HttpFailure", "Json", "Reply", "Target", "asked", "check_url", "first_model", "get"]
