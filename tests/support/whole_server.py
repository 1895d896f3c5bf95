"""Whole server in this process, with a small model in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from support import text_model
from zincmetal.serve.channel import LoadOptions
from zincmetal.serve.residency import ModelStatus
from zincmetal.serve.server import Options, Ready, Server
from zincmetal.text.chat.template import CHATML

#: Tokens that end an answer are forbidden: it goes on until the context is full.
ENDLESS = {"258": -100}


def chat_model(folder: Path, name: str = "tiny") -> Path:
    """Saves a small random model with a chat template."""
    return text_model.save(
        folder / f"{name}.gguf",
        text_model.TURNS,
        CHATML,
        general={"tokenizer.ggml.eos_token_id": 258, "context_length": 4096},
    )


def options(*models: Path | str, **changes: Any) -> Options:
    """Options of a server on the CPU, at any port, without a lock."""
    load = LoadOptions("", device="cpu", **changes.pop("load", {}))
    return Options(**{"models": tuple(map(str, models)), "port": 0, "lock": False, "load": load, **changes})


@dataclass
class Live:
    """Server that runs. ``ended`` is the task of ``Server.run``."""

    server: Server
    ready: Ready
    client: httpx.AsyncClient
    ended: asyncio.Task[None]
    states: list[ModelStatus] = field(default_factory=list)

    async def chat(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json=body(**fields))


def body(**fields: Any) -> dict[str, Any]:
    """Body of a chat request."""
    return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, **fields}


def transport(ready: Ready) -> httpx.AsyncHTTPTransport:
    path = ready.url.removeprefix("unix:")
    return httpx.AsyncHTTPTransport(uds=path if path != ready.url else None)


@asynccontextmanager
async def live(chosen: Options) -> AsyncIterator[Live]:
    """Runs a server for the time of the block."""
    server, states = Server(chosen), list[ModelStatus]()
    ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
    ended = asyncio.ensure_future(server.run(ready.set_result, states.append))
    both: set[asyncio.Future[Any]] = {ready, ended}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if ended.done():
        ended.result()
    told = ready.result()
    url = "http://localhost" if told.url.startswith("unix:") else told.url
    async with httpx.AsyncClient(base_url=url, transport=transport(told), timeout=60) as client:
        try:
            yield Live(server, told, client, ended, states)
        finally:
            server.stop()
            server.stop()
            await asyncio.wait_for(ended, 60)
