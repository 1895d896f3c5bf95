"""Connections of slow, broken and hostile clients, against the real HTTP server on this machine."""

from __future__ import annotations

import asyncio
import copy
import json
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from support.live_server import connected, exchange, served
from support.scripted import Reply as Answer
from support.scripted import ScriptedBackend, ScriptedModels, scripted
from zincmetal.serve.serving import Access, Limits, Serving

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
SHORT = Limits(header_seconds=0.2, body_seconds=0.4, read_seconds=0.2, write_seconds=0.2, body=1 << 20, headers=4096)
RESET = -1
PATIENCE = 20.0  # seconds after which a test that waits for the server fails


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ScriptedBackend:
    return scripted(tmp_path_factory.mktemp("models"), lambda prompt, given: Answer("hello"), "tiny", n_ctx=1 << 20)


@pytest.fixture
def backend(base: ScriptedBackend) -> ScriptedBackend:
    found = copy.copy(base)
    found.running, found.ended = [], []
    return found


@pytest.fixture
def serving(backend: ScriptedBackend) -> Serving:
    return Serving(ScriptedModels([backend]), SHORT)


def with_server(
    serving: Serving, work: Callable[[int], Awaitable[Any]], send_buffer: int = 0, patience: float = PATIENCE
) -> Any:
    """Does work against a server."""

    async def run() -> Any:
        async with served(serving, send_buffer) as port:
            return await asyncio.wait_for(work(port), patience)

    return asyncio.run(run())


def chat(body: dict[str, Any], *headers: str) -> bytes:
    data = json.dumps({"messages": [{"role": "user", "content": "hi"}], **body}).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


def status_of(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


async def read_while(feed: Coroutine[Any, Any, None], reader: asyncio.StreamReader) -> int:
    """Reads while bytes are sent, until the server closes. Bytes that come too late reset the connection."""
    feeder = asyncio.create_task(feed)
    try:
        return status_of(await reader.read())
    except ConnectionError:
        return RESET
    finally:
        feeder.cancel()
        await asyncio.wait({feeder})


# ---- slow clients ------------------------------------------------------------------------------------------------


def test_a_head_that_drips_is_ended(serving: Serving) -> None:
    async def drip(port: int) -> int:
        async with connected(port) as (reader, writer):

            async def feed() -> None:
                for byte in b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Padding: " + b"x" * 1000:
                    writer.write(bytes([byte]))
                    await asyncio.sleep(0.01)  # each byte comes well before any timeout of a single read

            return await read_while(feed(), reader)

    assert with_server(serving, drip) in (RESET, 408)


def test_a_silent_connection_is_closed(serving: Serving) -> None:
    assert with_server(serving, lambda port: exchange(port, b"")) == b""


def test_a_second_head_that_drips_is_ended(serving: Serving) -> None:
    """After a first request the connection is kept; the time of the next head counts from its first byte."""
    first = HEALTH.replace(b"Connection: close\r\n", b"")
    reply = with_server(serving, lambda port: exchange(port, first + b"GET /hea"))
    assert reply.count(b"HTTP/1.1 200") == 1


def test_slow_clients_hinder_nobody(serving: Serving) -> None:
    async def crowd(port: int) -> tuple[bytes, list[bytes]]:
        slow = [asyncio.create_task(exchange(port, b"POST /v1/chat/completions HTTP/1.1\r\nHo")) for _ in range(60)]
        await asyncio.sleep(0)
        return await exchange(port, HEALTH), await asyncio.gather(*slow)

    reply, slow = with_server(serving, crowd)
    assert status_of(reply) == 200
    assert {status_of(one) for one in slow} == {408}


def test_a_body_that_stops_is_ended(serving: Serving) -> None:
    sent = chat({})[:-5]
    reply = with_server(serving, lambda port: exchange(port, sent))
    assert status_of(reply) == 408
    assert b"connection: close" in reply.lower()


def test_a_body_that_drips_is_ended(serving: Serving) -> None:
    async def drip(port: int) -> int:
        async with connected(port) as (reader, writer):
            writer.write(chat({})[:-20].replace(b"Content-Length: ", b"Content-Length: 9"))

            async def feed() -> None:
                while True:
                    writer.write(b" ")
                    await asyncio.sleep(0.02)

            return await read_while(feed(), reader)

    assert with_server(serving, drip) in (RESET, 408)


def test_a_client_that_does_not_read_is_cut_off(serving: Serving, backend: ScriptedBackend) -> None:
    backend.script = lambda prompt, given: Answer("hello " * 2000)

    async def ignore(port: int) -> bool:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(chat({"stream": True}))
            while not backend.ended:
                await asyncio.sleep(0.01)
            return backend.ended[0].cancelled.is_set()

    assert with_server(serving, ignore, send_buffer=4096)
    assert not backend.running
    assert not serving.turns


def test_a_client_that_reads_slowly_is_served(serving: Serving, backend: ScriptedBackend) -> None:
    backend.script = lambda prompt, given: Answer("hello " * 300)

    async def read(port: int) -> bytes:
        async with connected(port) as (reader, writer):
            writer.write(chat({"stream": True}, "Connection: close"))
            received = b""
            while piece := await reader.read(20_000):
                received += piece
                await asyncio.sleep(0.002)
            return received

    assert b"data: [DONE]" in with_server(serving, read, send_buffer=4096)


# ---- too many ----------------------------------------------------------------------------------------------------


def test_connections_are_counted(backend: ScriptedBackend) -> None:
    async def crowd(port: int) -> tuple[bytes, bytes]:
        async with connected(port), connected(port), connected(port) as (reader, writer):
            writer.write(HEALTH)
            await reader.read()  # so all three are known to the server, and this one is closed
            async with connected(port) as (reader, writer):
                writer.write(HEALTH.replace(b"Connection: close\r\n", b""))
                await reader.readuntil(b"}")
                refused = await exchange(port, b"")
        while True:
            reply = await exchange(port, HEALTH)
            if status_of(reply) == 200:
                return refused, reply

    refused, _ = with_server(Serving(ScriptedModels([backend]), Limits(connections=3)), crowd)
    assert status_of(refused) == 503
    assert b"Retry-After: 2" in refused
    assert json.loads(refused.partition(b"\r\n\r\n")[2])["error"]["message"]


# ---- what is no HTTP ---------------------------------------------------------------------------------------------

BROKEN = {
    "noise": bytes(range(256)) + b"\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 200 + b"\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "a space in the path": b"GET /a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n",
    "a space before the colon": b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "no name": b"GET / HTTP/1.1\r\n: x\r\nHost: localhost\r\n\r\n",
    "NUL": b"GET / HTTP/1.1\r\nHost: local\x00host\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    "two lengths": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a negative length": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -2\r\n\r\n{}",
    "an encoding of its own": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: x, chunked\r\n\r\n",
    "a head without end": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 2000,
    "a line without end": b"GET /" + b"x" * 20_000,
    "a method without end": b"X" * 20_000,
}


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_http_is_refused(serving: Serving, sent: bytes) -> None:
    async def both(port: int) -> tuple[bytes, bytes]:
        return await exchange(port, sent), await exchange(port, HEALTH)

    reply, after = with_server(serving, both)
    assert status_of(reply) in (400, 431, 501)
    assert b"application/json" in reply
    assert b"Traceback" not in reply
    assert status_of(after) == 200


def test_a_body_with_two_ends_is_refused(serving: Serving) -> None:
    """Requests with both lengths are smuggled past proxies: the rest would be a second request."""
    sent = (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HEALTH
    )
    reply = with_server(serving, lambda port: exchange(port, sent))
    assert reply.count(b"HTTP/1.1 ") == 1
    assert status_of(reply) == 400


@pytest.mark.parametrize("chunk", [b"zz\r\n", b"-1\r\n", b"5\r\nhelloX", b"f" * 100 + b"\r\n"])
def test_chunks_that_are_none(serving: Serving, chunk: bytes) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"

    async def both(port: int) -> tuple[bytes, bytes]:
        return await exchange(port, head + b"\r\n\r\n" + chunk), await exchange(port, HEALTH)

    reply, after = with_server(serving, both)
    assert status_of(reply) == 400
    assert status_of(after) == 200


def test_a_websocket_is_not_opened(serving: Serving) -> None:
    sent = HEALTH.replace(b"close\r\n", b"Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n")
    assert status_of(with_server(serving, lambda port: exchange(port, sent))) in (200, 400)


# ---- whole exchanges ---------------------------------------------------------------------------------------------


def test_requests_one_after_another(serving: Serving) -> None:
    kept = HEALTH.replace(b"Connection: close\r\n", b"")
    reply = with_server(serving, lambda port: exchange(port, kept + kept + HEALTH))
    assert reply.count(b"HTTP/1.1 200") == 3


def test_a_client_that_asks_before_it_sends(serving: Serving) -> None:
    async def wait_for_continue(port: int) -> tuple[bytes, bytes]:
        head, _, body = chat({}, "Expect: 100-continue", "Connection: close").partition(b"\r\n\r\n")
        async with connected(port) as (reader, writer):
            writer.write(head + b"\r\n\r\n")
            first = await reader.readuntil(b"\r\n\r\n")
            writer.write(body)
            return first, await reader.read()

    first, reply = with_server(serving, wait_for_continue)
    assert (status_of(first), status_of(reply)) == (100, 200)


def test_a_refused_client_that_asks_before_it_sends_sends_nothing(serving: Serving) -> None:
    serving.access = Access(keys=("secret",))
    head = chat({}, "Expect: 100-continue").partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    reply = with_server(serving, lambda port: exchange(port, head))
    assert status_of(reply) == 401
    assert b"100 Continue" not in reply


def test_a_large_body_with_a_wrong_key_gets_its_reply(serving: Serving) -> None:
    """A connection that is closed while bytes come is reset, and the client never sees why."""
    serving.access = Access(keys=("secret",))
    reply = with_server(serving, lambda port: exchange(port, chat({"user": "x" * 1_000_000})))
    assert status_of(reply) == 401
    assert b"<reset>" not in reply


def test_a_body_that_is_too_large_gets_its_reply(serving: Serving) -> None:
    reply = with_server(serving, lambda port: exchange(port, chat({"user": "x" * 3_000_000})))
    assert status_of(reply) == 413
    assert b"<reset>" not in reply


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reading", [60.0, 0.0])
def test_a_client_that_hangs_up_ends_its_generation(
    serving: Serving, backend: ScriptedBackend, stream: bool, reading: float
) -> None:
    backend.script = lambda prompt, given: Answer("hello " * 5000, reading=reading, delay=0.001)

    async def hang_up(port: int) -> None:
        async with connected(port) as (_, writer):
            writer.write(chat({"stream": stream}))
            while not backend.running:
                await asyncio.sleep(0)
        while backend.running or serving.turns:
            await asyncio.sleep(0)

    with_server(serving, hang_up)
    assert backend.ended[0].cancelled.is_set()


def test_a_head_request_has_no_body(serving: Serving) -> None:
    reply = with_server(serving, lambda port: exchange(port, HEALTH.replace(b"GET", b"HEAD")))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert (status_of(head), body) == (200, b"")


def test_a_hundred_clients_that_vanish_leave_nothing(serving: Serving, backend: ScriptedBackend) -> None:
    backend.script = lambda prompt, given: Answer("hello " * 500, delay=0.001)

    async def storm(port: int) -> int:
        before = len(asyncio.all_tasks())

        async def vanish(number: int) -> None:
            async with connected(port) as (reader, writer):
                writer.write(chat({"stream": number % 3 > 0})[: 400 if number % 5 else 120])
                if number % 3 and number % 5:
                    await reader.read(100 * (number % 7) + 1)

        await asyncio.gather(*(vanish(i) for i in range(100)))
        while backend.running or serving.turns or len(asyncio.all_tasks()) > before:
            await asyncio.sleep(0.01)
        return serving.models.leases  # type: ignore[attr-defined,no-any-return]

    assert with_server(serving, storm) == 0
