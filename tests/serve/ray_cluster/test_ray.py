"""Server on a Ray cluster of this machine: where requests go, and what becomes of them when a replica dies.

``make test-ray`` installs Ray.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.scripted import Reply, ScriptedModels, scripted
from zincmetal.serve.serving import Serving

pytestmark = pytest.mark.skipif(not os.environ.get("ZINCMETAL_RAY"), reason="needs Ray: make test-ray")
REPLICAS, PARALLEL = 3, 4
GATE = Path(tempfile.gettempdir()) / f"zincmetal-ray-{os.getpid()}"  # held answers go on when it is there


def make(gate: str) -> Serving:
    """Makes a server whose answers name their process. "hold" waits for the gate."""

    def script(prompt: str, asked: Any) -> Reply:
        held = "hold" in prompt
        return Reply(
            f"{os.getpid()} {'x' * 40 if held else ''}", delay=0.05 if held and not Path(gate).exists() else 0.0
        )

    return Serving(ScriptedModels([scripted(Path(tempfile.mkdtemp()), script)]))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Returns the address of a cluster's front."""
    import ray
    from ray import serve

    from zincmetal.serve.ray import deploy

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = os.pathsep.join(p for p in sys.path if p)
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    gate = str(GATE)
    deploy(lambda: make(gate), port=port, replicas=REPLICAS, parallel=PARALLEL, cpus=0.5)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    GATE.unlink(missing_ok=True)


def body(*texts: str, stream: bool = False) -> dict[str, Any]:
    roles = ["system", "user", "assistant", "user"]
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)], "stream": stream}


async def ask(client: httpx.AsyncClient, *texts: str, **headers: str) -> str:
    reply = await client.post("/v1/chat/completions", json=body(*texts), headers=headers)
    reply.raise_for_status()
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text.split()[0]


def client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, headers={"host": "localhost"}, timeout=120)


def test_a_conversation_stays_and_conversations_spread(url: str) -> None:
    async def run() -> None:
        async with client(url) as c:
            homes = [await ask(c, f"system {i}", "hello") for i in range(24)]
            assert len(set(homes)) == REPLICAS
            again = [await ask(c, f"system {i}", "hello", "answer", "more") for i in range(24)]
            assert again == homes
            named = {await ask(c, f"system {i}", "x", **{"x-session-id": "mine"}) for i in range(12)}
            assert len(named) == 1

    asyncio.run(run())


def test_a_full_replica_spills_over(url: str) -> None:
    async def run() -> None:
        GATE.unlink(missing_ok=True)
        async with client(url) as c:
            answers = await asyncio.gather(*(ask(c, "hold", "hello") for _ in range(2 * PARALLEL)))
        counts = Counter(answers)
        assert len(counts) > 1
        assert max(counts.values()) >= PARALLEL

    asyncio.run(run())


def test_streams_come_through_piece_by_piece(url: str) -> None:
    async def run() -> None:
        GATE.touch()
        async with (
            client(url) as c,
            c.stream("POST", "/v1/chat/completions", json=body("s", "u", stream=True)) as reply,
        ):
            assert reply.headers["content-type"].startswith("text/event-stream")
            lines = [line async for line in reply.aiter_lines() if line.startswith("data:")]
        assert lines[-1] == "data: [DONE]"
        assert len(lines) > 5
        async with client(url) as c:
            refused = await c.post("/v1/chat/completions", json={"messages": 3})
            assert refused.status_code == 400
            assert refused.json()["error"]["type"] == "invalid_request_error"

    asyncio.run(run())


def test_when_a_replica_dies_no_plain_request_is_lost_or_answered_twice(url: str) -> None:
    async def run() -> None:
        GATE.unlink(missing_ok=True)
        async with client(url) as c:
            victim = int(await ask(c, "hold", "hello"))
            held = [asyncio.ensure_future(c.post("/v1/chat/completions", json=body("hold", "hello"))) for _ in range(6)]
            others = [asyncio.ensure_future(ask(c, f"system {i}", "hello")) for i in range(12)]
            begun: list[str] = []

            async def streamed() -> None:
                async with c.stream("POST", "/v1/chat/completions", json=body("hold", "hello", stream=True)) as reply:
                    async for line in reply.aiter_lines():
                        begun.append(line)

            stream = asyncio.ensure_future(streamed())
            while not any('"content":"' in line for line in begun):
                await asyncio.sleep(0.01)
            os.kill(victim, signal.SIGKILL)
            GATE.touch()
            replies = await asyncio.gather(*held)
            await asyncio.gather(*others)
            await stream
        assert [reply.status_code for reply in replies] == [200] * len(held)
        ids = [reply.json()["id"] for reply in replies]
        assert len(set(ids)) == len(ids)
        pids = {reply.json()["choices"][0]["message"]["content"].split()[0] for reply in replies}
        assert str(victim) not in pids or len(pids) > 1
        last = [line for line in begun if line.startswith("data:")][-1]
        assert last == "data: [DONE]" or json.loads(last[5:])["error"]["code"] == "device_error"

    asyncio.run(run())
