"""Catalogue of a server, with verdicts that are made in a process of their own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from support.asgi import asked
from zincmetal.errors import DeviceError, UsageError
from zincmetal.hub.catalogue import ENTRIES
from zincmetal.serve import verdicts
from zincmetal.serve.app import make_app
from zincmetal.serve.channel import LoadOptions
from zincmetal.serve.residency import Named, Residency
from zincmetal.serve.serving import Serving
from zincmetal.serve.verdicts import Verdicts

PRINT = "import json, os, sys; print(json.dumps({'verdicts': [%s]}))"


def test_the_route_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks as a client does: a process is started, and judges the smallest and the largest model of the catalogue."""
    by_size = sorted(ENTRIES, key=lambda entry: entry.shape.n_params)
    fewer = f"c.ENTRIES = sorted(c.ENTRIES, key=lambda e: e.shape.n_params)[::{len(ENTRIES) - 1}]; "
    only = f"from zincmetal.hub import catalogue as c; {fewer}"
    monkeypatch.setattr(verdicts, "BOOT", verdicts.BOOT.replace("from zincmetal.serve", only + "from zincmetal.serve"))
    app = make_app(Serving(Residency([Named("a", LoadOptions("/nowhere", device="cpu"))])))
    rows = asked(app, "GET", "/v1/catalogue").json()["data"]
    assert [row["name"] for row in rows] == [by_size[0].name, by_size[-1].name]
    assert all(row["verdict"] for row in rows)
    assert [row["fits"] for row in rows] == [True, False]


def test_a_device_that_is_none() -> None:
    with pytest.raises(UsageError, match="abacus"):
        asyncio.run(Verdicts().of("abacus", "f16"))


def test_a_process_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "BOOT", "import os; os._exit(3)")
    with pytest.raises(DeviceError, match="status 3"):
        asyncio.run(Verdicts().of(None, "f16"))


def test_who_leaves_ends_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(verdicts, "BOOT", code)

    async def leave() -> int:
        task = asyncio.create_task(Verdicts().of(None, "f16"))
        while not mark.exists() or not mark.read_text():
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.wait({task})
        return int(mark.read_text())

    pid = asyncio.run(leave())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_key_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZINCMETAL_API_KEY", "sesame")
    monkeypatch.setattr(verdicts, "BOOT", PRINT % "os.environ.get('ZINCMETAL_API_KEY')")
    assert asyncio.run(Verdicts().of(None, "f16")) == [None]


def test_the_catalogue_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    questions, busy = list[Any](), [0]

    async def answer(*question: str) -> list[Any]:
        busy[0] += 1
        assert busy[0] == 1  # one process at a time
        questions.append(question)
        await asyncio.sleep(0)
        busy[0] -= 1
        return [{"name": "a"}]

    monkeypatch.setattr(verdicts, "_asked", answer)

    async def crowd() -> None:
        own = Verdicts()
        await asyncio.gather(*(own.of("cpu", kv) for kv in ("f16", "q8_0") * 5))

    asyncio.run(crowd())
    assert sorted(questions) == [("cpu", "f16"), ("cpu", "q8_0")]
