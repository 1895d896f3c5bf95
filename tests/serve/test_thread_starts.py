"""Threads that the system does not start: each in turn, in the server, in a model's process, and for a download.

The error is typed, nothing is left behind, and the next call works.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from support import text_model, thread_starts
from support.asgi import ask
from support.remote_models import asked, remote_model, soon, text_of
from support.thread_starts import WORDS, refused
from zincmetal import settings
from zincmetal.errors import DeviceError
from zincmetal.hub.fit import measure
from zincmetal.serve import remote, residency
from zincmetal.serve.app import make_app
from zincmetal.serve.channel import LoadOptions
from zincmetal.serve.downloads import Downloads
from zincmetal.serve.remote import RemoteModel
from zincmetal.serve.residency import Named, Residency
from zincmetal.serve.serving import Serving

TURN = {"messages": text_model.HELLO, "max_tokens": 2, "model": "tiny"}
#: A request for each place where the server works aside.
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": TURN,
    "/v1/messages": TURN,
    "/v1/messages/count_tokens": TURN,
    "/v1/responses": {"input": "hi", "max_output_tokens": 2, "model": "tiny"},
    "/v1/completions": {"prompt": "hi", "max_tokens": 2, "model": "tiny"},
    "/tokenize": {"content": "hi"},
    "/detokenize": {"tokens": [104]},
    "/apply-template": {"messages": text_model.HELLO},
    "/props": {},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model.save(tmp_path_factory.mktemp("model") / "tiny.gguf", template="{{ messages[0].content }}")


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def settled(before: tuple[int, int]) -> bool:
    """Returns True once no more is held than before."""
    for _ in range(500):
        if all(now <= then for now, then in zip(held(), before, strict=True)):
            return True
        time.sleep(0.01)
    return False


async def served(tiny: Path, first: int) -> tuple[list[str], list[tuple[int, str]]]:
    """Sends all requests to a new server whose start number ``first`` fails, and then those again that failed.

    Returns the threads that did not start, and status and text of the replies.
    """
    models = Residency([Named("tiny", LoadOptions(str(tiny), device="cpu"))])
    app, replies, again = make_app(Serving(models)), [], []
    try:
        with refused(first) as failed:
            for path, body in REQUESTS.items():
                reply = await ask(app, "POST" if body else "GET", path, [], body or b"")
                replies.append((reply.status, reply.body.decode()))
                if reply.status != 200:
                    again.append(path)
        for path in again:
            body = REQUESTS[path]
            reply = await ask(app, "POST" if body else "GET", path, [], body or b"")
            assert reply.status == 200, (path, reply.body)
        await soon(models.when_idle())
    finally:
        await soon(models.close())
    return failed, replies


def test_a_server_whose_threads_do_not_start(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "BACK_OFF", 0.0)
    assert asyncio.run(served(tiny, 10**6))[0] == []
    before = held()
    refusals = 0
    for number in range(1, 100):
        failed, replies = asyncio.run(served(tiny, number))
        wrong = [(status, text) for status, text in replies if status != 200]
        assert settled(before)
        if not failed:
            assert not wrong
            break
        refusals += 1
        assert wrong, failed
        for status, text in wrong:
            assert status == 503
            assert WORDS in text
    assert refusals


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_the_end_of_a_process_needs_no_thread(tiny: Path) -> None:
    async def run() -> None:
        ended = asyncio.get_running_loop().create_future()
        async with remote_model(tiny, ended.set_result) as model:
            with refused(1):
                os.kill(model.pid, 9)
                assert "SIGKILL" in str(await soon(ended))
        with refused(1):
            async with remote_model(tiny) as model:
                assert await text_of(await model.start(asked()))

    asyncio.run(run())


def test_a_process_whose_threads_do_not_start(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, or the request fails; the server learns why, and nothing is left of it."""
    monkeypatch.setattr(remote, "BOOT", thread_starts.BOOT)
    outcomes = []

    async def tried(model: RemoteModel) -> str | DeviceError:
        try:
            return await text_of(await model.start(asked()))
        except DeviceError as error:
            return error

    async def run() -> str:
        try:
            async with remote_model(tiny) as model:
                first, second = [await tried(model) for _ in range(2)]
                if isinstance(first, str):
                    return first
                assert WORDS in str(first)
                assert second == fine
                return "request"
        except DeviceError:
            return "process"

    monkeypatch.setenv(thread_starts.START, str(10**6))
    fine = asyncio.run(run())
    before = held()
    for number in range(1, 100):
        monkeypatch.setenv(thread_starts.START, str(number))
        outcomes.append(asyncio.run(run()))
        assert settled(before)
        if outcomes[-1] == fine and outcomes[-2:-1] == [fine]:  # the timer of the end is the last
            break
    assert {"process", "request"} <= set(outcomes)
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True)
    assert "support.thread_starts" not in children.stdout


def test_a_download_whose_thread_does_not_start(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it, and it can be asked for again."""
    monkeypatch.setenv(settings.MODELS.name, str(tmp_path / "models"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    name = "them/Tiny-GGUF:Q4_K_M"

    def fetched(*_: Any) -> Path:
        folder = settings.models_folder() / "them/Tiny-GGUF"
        folder.mkdir(parents=True)
        return text_model.save(folder / "Tiny-Q4_K_M.gguf")

    async def run() -> None:
        models = Residency([Named("first", LoadOptions(str(tiny), device="cpu"))])
        own = Downloads(models, LoadOptions("", device="cpu"), fetched)
        app = make_app(Serving(models, files=own))
        with refused(1) as failed:
            reply = await ask(app, "POST", "/models", [], {"model": name})
        assert failed == ["download"]
        assert (reply.status, WORDS in reply.json()["error"]["message"]) == (503, True)
        await soon(own.wait(name))
        assert (await ask(app, "POST", "/models", [], {"model": name})).status == 202
        await soon(own.wait(name))
        assert models.path_of(name)
        await models.close()

    asyncio.run(run())


def test_bandwidth_without_threads_is_not_known() -> None:
    for number in range(1, (os.cpu_count() or 1) + 1):
        with refused(number) as failed:
            found = measure()
        assert (found is None) == bool(failed)
    assert measure() is not None
