"""Server of scripted models on a port of this machine, with the connections that the real server has."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn

from zincmetal.serve.app import make_app
from zincmetal.serve.connection import uvicorn_options
from zincmetal.serve.serving import Serving


class _Quiet(uvicorn.Server):
    """Uvicorn without signal handlers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def served(serving: Serving, send_buffer: int = 0) -> AsyncIterator[int]:
    """Serves; gives the port. ``send_buffer``: bytes that the kernel keeps of a reply, 0 for its own choice."""
    config = uvicorn.Config(
        make_app(serving),
        loop="asyncio",
        lifespan="off",
        timeout_graceful_shutdown=1,
        **uvicorn_options(serving.limits),
    )
    server = _Quiet(config)
    with socket.socket() as listening:
        if send_buffer:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listening.bind(("127.0.0.1", 0))
        listening.listen(256)
        task = asyncio.create_task(server.serve([listening]))
        try:
            while not server.started:
                await asyncio.sleep(0)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            await task


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connects to a port, and hangs up at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def exchange(port: int, sent: bytes) -> bytes:
    """Sends bytes over a connection of their own; returns all that comes back until the server closes it."""
    async with connected(port) as (reader, writer):
        writer.write(sent)
        received = b""
        try:
            while piece := await reader.read(1 << 16):
                received += piece
        except ConnectionError:
            return received + b"<reset>"
        return received
