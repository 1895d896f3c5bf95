"""Many requests of all kinds against a server with a scripted model, and what must be the same after them.

Each request has a number, and its answer repeats it: an answer that reaches the wrong client is seen. Clients hang up
at random, the device fails at random, the model is loaded again now and then, and sometimes there is no room.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.live_server import served
from support.scripted import Reply as Answer
from support.scripted import ScriptedBackend, ScriptedModels, scripted
from zincmetal.api.generation import Asked
from zincmetal.errors import DeviceError, QueueFullError
from zincmetal.serve.echo import Beginnings, Echo
from zincmetal.serve.prompt import memory_of
from zincmetal.serve.serving import Serving
from zincmetal.serve.store import ResponseStore

LEAVES = 0.2  # share of the clients that hang up
FAULTY = 100  # each such request meets a fault of the device
RELOAD = 500  # leases between two loads of the model
FULL = 997  # leases between two refusals
WORKERS = 8
NUMBER = re.compile(r"number=(\d+);")
LOST_SECONDS = 60.0


class _Forgetful(list[Any]):
    """List that keeps nothing: a scripted backend writes down all that it was asked."""

    def append(self, value: Any) -> None:
        pass


def said(number: int) -> str:
    """Returns the answer to a request."""
    return f"answer {number} " * (1 + number % 4)


def is_faulty(number: int) -> bool:
    return number % FAULTY == 7


def _script(prompt: str, asked: Asked) -> Answer:
    found = NUMBER.findall(prompt)
    number = int(found[-1])
    error = DeviceError("the device was lost") if is_faulty(number) else None
    return Answer(said(number), error=error, error_after=number // FAULTY % 12, reused=min(3, len(asked.ids) - 1))


@dataclass
class Reloading(ScriptedModels):
    """Models of a server whose model is replaced now and then, as after an eviction."""

    loads: int = 0
    refused: int = 0
    asked_for: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def lease(self, name: str, keep: float | None = None) -> AsyncIterator[ScriptedBackend]:
        self.asked_for += 1
        if self.asked_for % FULL == 0:
            self.refused += 1
            raise QueueFullError("others are waiting; ask again")
        if self.asked_for % RELOAD == 0:
            self.backends = [fresh(self.backends[0])]
            self.loads += 1
            await asyncio.sleep(0.002)  # the load; others ask meanwhile
        async with super().lease(name) as backend:
            yield backend


def fresh(backend: ScriptedBackend) -> ScriptedBackend:
    """Returns a backend with the same file and nothing else."""
    found = ScriptedBackend.__new__(ScriptedBackend)
    found.__dict__.update(backend.__dict__)
    found.running, found.ended, found.asked, found.prompts = [], _Forgetful(), _Forgetful(), _Forgetful()
    return found


@dataclass
class Findings:
    """What happened. ``outcomes`` counts them; ``wrong`` has the first answers that were wrong."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    resident: list[tuple[int, int]] = field(default_factory=list)  # requests, and bytes
    loads: int = 0

    @property
    def bytes_per_request(self) -> float:
        """Growth of the resident bytes in the second half."""
        half = self.resident[len(self.resident) // 2 :]
        return (half[-1][1] - half[0][1]) / max(1, half[-1][0] - half[0][0])


class Wire:
    """Connection of one client, which is opened again after each hang-up."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, path: str, body: Any) -> asyncio.StreamReader:
        """Sends a request; returns what the reply is read from."""
        if self._streams is None or self._streams[1].is_closing() or self._streams[0].at_eof():
            self.hang_up()
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._streams[1].write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return self._streams[0]

    def hang_up(self) -> None:
        """Ends the connection at once."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


async def read_reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Reads a whole reply; returns its status and its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head.split(b" ", 2)[1])
    if b"transfer-encoding: chunked" not in head:
        found = re.search(rb"content-length: (\d+)", head)
        assert found
        return status, await reader.readexactly(int(found[1]))
    body = b""
    while size := int(await reader.readline(), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return status, body


# ---- kinds of requests -------------------------------------------------------------------------------------------


def request(number: int, kind: str) -> tuple[str, dict[str, Any]]:
    """Returns path and body of a request."""
    text = f"number={number};"
    message = [{"role": "user", "content": text}]
    stream = kind.endswith("stream")
    if kind.startswith("chat"):
        return "/v1/chat/completions", {"messages": message, "stream": stream}
    if kind.startswith("messages"):
        return "/v1/messages", {"model": "tiny", "max_tokens": 500, "messages": message, "stream": stream}
    if kind.startswith("responses"):
        return "/v1/responses", {"input": text, "stream": stream, "store": number % 2 == 0}
    return "/v1/completions", {"prompt": text, "max_tokens": 500, "stream": stream}


KINDS = [f"{api} {form}" for api in ("chat", "messages", "responses", "completions") for form in ("stream", "plain")]


def text_of(kind: str, body: bytes) -> tuple[str, bool, bool]:
    """Returns the text of a reply, whether it is whole, and whether it ends in an error."""
    if kind.endswith("plain"):
        found = json.loads(body)
        if found.get("error"):
            return "", False, True
        return _plain_text(kind, found), True, False
    text, whole, error = "", False, False
    for line in body.split(b"\n"):
        if line == b"data: [DONE]":
            whole = True
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            if event.get("error") or event.get("type") in ("error", "response.failed"):
                error = True
            whole = whole or event.get("type") in ("message_stop", "response.completed")
            text += _delta(event)
    return text, whole, error


def _plain_text(kind: str, found: Any) -> str:
    if kind.startswith("chat"):
        return str(found["choices"][0]["message"]["content"])
    if kind.startswith("messages"):
        return "".join(block["text"] for block in found["content"])
    if kind.startswith("responses"):
        return "".join(part["text"] for item in found["output"] for part in item["content"])
    return str(found["choices"][0]["text"])


def _delta(event: Any) -> str:
    if event.get("type") == "response.output_text.delta":
        return str(event["delta"])
    if event.get("type") == "content_block_delta":
        return str(event["delta"]["text"])
    for choice in event.get("choices") or ():
        return str(choice.get("text") or (choice.get("delta") or {}).get("content") or "")
    return ""


# ---- the soak ----------------------------------------------------------------------------------------------------


async def soak(folder: Path, requests: int, seed: int, warm_up: int = 200) -> Findings:
    """Sends requests; returns what happened. What is counted before and after is counted after some requests."""
    backend = fresh(scripted(folder, _script, "tiny", n_ctx=1 << 16))
    models = Reloading([backend])
    serving = Serving(models, responses=ResponseStore(1 << 14))  # full before the count begins, as what follows
    memory_of(backend.text).echo, memory_of(backend.text).beginnings = Echo(1 << 14), Beginnings(16)
    findings = Findings()
    async with served(serving) as port:
        await _requests(port, findings, range(warm_up), seed)
        await _quiet(serving, models)
        await _all_threads()
        findings.outcomes.clear()
        refused = models.refused
        findings.before = _counted()
        step = max(1, requests // (40 if requests > 10_000 else 4))
        for first in range(warm_up, warm_up + requests, step):
            await _requests(port, findings, range(first, min(first + step, warm_up + requests)), seed)
            gc.collect()
            findings.resident.append((first - warm_up, resident()))
        await _quiet(serving, models)
        findings.after = _counted()
        findings.loads = models.loads
        findings.outcomes["refused by the server"] = models.refused - refused
        findings.outcomes["left running"] = len(serving.turns) + models.leases + len(models.backends[0].running)
    return findings


async def _requests(port: int, findings: Findings, numbers: range, seed: int) -> None:
    waiting = iter(numbers)

    async def worker() -> None:
        wire = Wire(port)
        for number in waiting:
            chance = random.Random(f"{seed} {number}")
            kind = chance.choice(KINDS)
            try:
                outcome = await asyncio.wait_for(_one(wire, number, kind, chance), LOST_SECONDS)
            except (OSError, EOFError, ValueError, LookupError, asyncio.TimeoutError) as error:
                outcome = "lost"
                findings.wrong.append(f"{number} {kind}: {error!r}")
                wire.hang_up()
            findings.outcomes[outcome] += 1
            if outcome == "wrong":
                findings.wrong.append(f"{number} {kind}")
        wire.hang_up()

    await asyncio.gather(*(worker() for _ in range(WORKERS)))


async def _one(wire: Wire, number: int, kind: str, chance: random.Random) -> str:
    """Sends one request; returns its outcome."""
    reader = await wire.send(*request(number, kind))
    if chance.random() < LEAVES:
        pieces = chance.choice((0, 0, 1, 3))
        for _ in range(pieces):
            await reader.readuntil(b"\n")
        if not pieces:
            await asyncio.sleep(chance.choice((0.0, 0.001, 0.003)))
        wire.hang_up()
        return "hung up"
    status, body = await read_reply(reader)
    if status in (503, 529) and b"others are waiting" in body:
        return "no room"
    text, whole, error = text_of(kind, body)
    if is_faulty(number):
        return "fault" if (error or status in (503, 529, 500)) and said(number).startswith(text) else "wrong"
    return "right" if status == 200 and whole and not error and text == said(number) else "wrong"


async def _quiet(serving: Serving, models: Reloading) -> None:
    """Waits until the server has ended what clients gave up."""
    while serving.turns or models.leases or models.backends[0].running:
        await asyncio.sleep(0.005)
    for _ in range(20):
        await asyncio.sleep(0.005)


async def _all_threads() -> None:
    """Starts all threads that the loop may have for work beside it: it starts them one by one, when all are busy."""
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.01) for _ in range(64)))


def _counted() -> dict[str, int]:
    gc.collect()
    return {
        "files": len(os.listdir("/dev/fd")),
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
        "objects": len(gc.get_objects()),
    }


def resident() -> int:
    """Returns the resident bytes of this process, 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
