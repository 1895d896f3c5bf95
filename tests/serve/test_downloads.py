"""Downloads and deletions that clients ask for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.asgi import ask
from support.text_model import save
from zincmetal import settings
from zincmetal.errors import DownloadError, ModelNotFoundError, UsageError
from zincmetal.serve.app import make_app
from zincmetal.serve.channel import LoadOptions
from zincmetal.serve.downloads import MOST, Downloads
from zincmetal.serve.residency import ModelStatus, Named, Residency
from zincmetal.serve.serving import Serving

NAME = "them/Tiny-GGUF:Q4_K_M"
Progress = Callable[[int, int], None]
Judge = Callable[[Path], None]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(settings.MODELS.name, str(tmp_path / "models"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def models(home: Path) -> Residency:
    return Residency([Named("first", LoadOptions(str(save(home / "first.gguf")), device="cpu"))])


def fetched(name: str, progress: Progress, judge: Judge) -> Path:
    """Does what a download does: the file is there at the end, in the folder of its repository."""
    folder = settings.models_folder() / "them/Tiny-GGUF"
    folder.mkdir(parents=True, exist_ok=True)
    for done in range(0, 1001, 5):
        progress(done, 1000)
    return save(folder / "Tiny-Q4_K_M.gguf")


def failing(name: str, progress: Progress, judge: Judge) -> Path:
    raise DownloadError("the hub is away; ask again")


def judging(path: Path) -> Callable[[str, Progress, Judge], Path]:
    """Returns a download that asks about a file, as a real one does when a header has arrived."""

    def fetch(name: str, progress: Progress, judge: Judge) -> Path:
        judge(path)
        return fetched(name, progress, judge)

    return fetch


async def events_of(models: Residency, until: str) -> list[ModelStatus]:
    found = []
    async for event in models.changes():
        found.append(event)
        if event.state == until and event.id != "first":
            break
    return found


def test_a_download_becomes_a_model(models: Residency) -> None:
    async def go() -> list[ModelStatus]:
        own = Downloads(models, LoadOptions("", device="cpu"), fetched)
        watching = asyncio.create_task(events_of(models, "unloaded"))
        await asyncio.sleep(0)
        await own.pull(NAME)
        await own.wait(NAME)
        return await watching

    seen = [event for event in asyncio.run(go()) if event.id == NAME]
    assert [event.state for event in seen][-1] == "unloaded"
    shares = [event.progress for event in seen if event.state == "downloading"]
    assert shares == sorted(shares)
    assert 2 < len(shares) <= 102  # a step is a hundredth
    assert [card.id for card in models.cards()] == ["first", NAME]
    assert str(models.path_of(NAME)).endswith("them/Tiny-GGUF/Tiny-Q4_K_M.gguf")


def test_a_download_that_fails_says_why(models: Residency) -> None:
    async def go() -> ModelStatus:
        own = Downloads(models, LoadOptions(""), failing)
        watching = asyncio.create_task(events_of(models, "failed"))
        await asyncio.sleep(0)
        await own.pull(NAME)
        found = (await watching)[-1]
        await own.wait(NAME)
        await own.pull(NAME)  # it may be tried again
        await own.wait(NAME)
        return found

    assert asyncio.run(go()) == ModelStatus(NAME, "failed", 0.0, "the hub is away; ask again")
    assert [card.id for card in models.cards()] == ["first"]


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "no-such-model-anywhere"])
def test_what_is_no_name_is_refused_at_once(models: Residency, name: str) -> None:
    with pytest.raises((UsageError, ModelNotFoundError)):
        asyncio.run(Downloads(models, LoadOptions(""), fetched).pull(name))


def test_downloads_are_few_and_each_is_one(models: Residency) -> None:
    go_on, began = threading.Event(), list[str]()

    def slow(name: str, progress: Progress, judge: Judge) -> Path:
        began.append(name)
        go_on.wait()
        raise DownloadError("enough")

    async def go() -> None:
        own = Downloads(models, LoadOptions(""), slow)
        names = [f"them/Tiny{i}-GGUF" for i in range(MOST)]
        for name in [*names, *names]:
            await own.pull(name)
        with pytest.raises(UsageError, match="being downloaded"):
            await own.pull("them/Another-GGUF")
        go_on.set()
        for name in names:
            await own.wait(name)
        assert sorted(began) == names

    asyncio.run(go())


def pulled(models: Residency) -> Downloads:
    """Downloads a model, in an event loop that is gone at the end."""
    own = Downloads(models, LoadOptions("", device="cpu"), fetched)

    async def go() -> None:
        await own.pull(NAME)
        await own.wait(NAME)

    asyncio.run(go())
    return own


def test_a_download_can_be_deleted(models: Residency) -> None:
    own = pulled(models)
    path = Path(models.path_of(NAME))
    assert path.exists()
    asyncio.run(own.remove(NAME))
    assert not path.exists()
    assert [card.id for card in models.cards()] == ["first"]


def test_files_of_others_are_not_deleted(models: Residency, home: Path) -> None:
    own = pulled(models)
    with pytest.raises((UsageError, ModelNotFoundError)):
        asyncio.run(own.remove("first"))
    assert (home / "first.gguf").exists()


def test_a_model_that_only_has_the_name_of_a_download_is_not_deleted(home: Path) -> None:
    """Of two files with one name, the one of another folder is not the download."""
    path = save(home / "Tiny-Q4_K_M.gguf")
    models = Residency([Named(NAME, LoadOptions(str(path)))])
    fetched(NAME, lambda done, total: None, lambda header: None)
    with pytest.raises(UsageError, match="not downloaded"):
        asyncio.run(Downloads(models, LoadOptions("")).remove(NAME))
    assert path.exists()
    assert (settings.models_folder() / "them/Tiny-GGUF/Tiny-Q4_K_M.gguf").exists()


def test_a_model_in_use_is_not_deleted(models: Residency) -> None:
    own = pulled(models)

    async def busy(name: str) -> None:
        raise UsageError("it is in use by 1 requests")

    models.unload = busy  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="in use"):
        asyncio.run(own.remove(NAME))
    assert Path(models.path_of(NAME)).exists()


def test_the_routes(models: Residency) -> None:
    async def go() -> list[Any]:
        own = Downloads(models, LoadOptions("", device="cpu"), fetched)
        app = make_app(Serving(models, files=own))
        begun = await ask(app, "POST", "/models", [], {"model": NAME})
        await own.wait(NAME)
        listed = await ask(app, "GET", "/v1/models")
        gone = await ask(app, "DELETE", "/models", [], {"model": NAME})
        wrong = await ask(app, "POST", "/models", [], {"model": "/etc/passwd"})
        return [begun.status, [row["id"] for row in listed.json()["data"]], gone.status, wrong.status]

    assert asyncio.run(go()) == [202, ["first", NAME], 200, 400]


@pytest.mark.parametrize(
    ("arch", "state", "words"), [("llama", "unloaded", ""), ("unheard-of", "failed", "unheard-of")], ids=["runs", "not"]
)
def test_a_model_that_does_not_run_here_is_not_downloaded(
    models: Residency, home: Path, arch: str, state: str, words: str
) -> None:
    path = save(home / "header.gguf")
    if arch != "llama":
        path = save(home / "other.gguf", general={"general.architecture": arch})

    async def go() -> list[ModelStatus]:
        own = Downloads(models, LoadOptions("", device="cpu"), judging(path))
        watching = asyncio.create_task(events_of(models, state))
        await asyncio.sleep(0)
        await own.pull(NAME)
        await own.wait(NAME)
        return await watching

    last = asyncio.run(go())[-1]
    assert words in last.why
