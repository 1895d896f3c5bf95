"""Routes that operate a server, and routes of its models."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from support.asgi import Reply, ask, asked
from support.scripted import Reply as Answer
from support.scripted import ScriptedBackend, ScriptedModels, scripted
from support.text_model import END, START
from zincmetal.errors import OutOfMemoryError, UsageError
from zincmetal.serve.app import make_app
from zincmetal.serve.channel import LoadOptions
from zincmetal.serve.residency import ModelStatus, Named, Residency
from zincmetal.serve.serving import Serving

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = {"messages": MESSAGES}
SECOND = "own/second:Q4_K_M"


class Skilled(ScriptedModels):
    """Models that can do everything. ``done`` has what was asked of them."""

    def __init__(self, backends: list[ScriptedBackend]) -> None:
        super().__init__(backends)
        self.done: list[Any] = []
        self.coming: asyncio.Queue[ModelStatus | None] = asyncio.Queue()
        self.refusal: Exception | None = None

    def peek(self, name: str) -> ScriptedBackend | None:
        return next((b for b in self.backends if b.card.id == name and b.card.state == "loaded"), None)

    async def load(self, name: str) -> None:
        if self.refusal:
            raise self.refusal
        self.done.append(("load", name))

    async def unload(self, name: str) -> None:
        self.done.append(("unload", name))

    async def plan(self, name: str, context: int | None, parallel: int | None) -> dict[str, Any]:
        return {"context": context, "parallel": parallel, "total": 1000, "budget": 2000, "fits": True}

    async def catalogue(self) -> list[dict[str, Any]]:
        return [{"name": "smollm2-135m"}]

    async def pull(self, name: str) -> None:
        self.done.append(("pull", name))

    async def remove(self, name: str) -> None:
        self.done.append(("remove", name))

    async def changes(self) -> AsyncIterator[ModelStatus]:
        while (event := await self.coming.get()) is not None:
            yield event


def script(prompt: str, given: Any) -> Answer:
    return Answer("hello there", delay=0.001)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[ScriptedBackend, ScriptedBackend]:
    folder = tmp_path_factory.mktemp("models")
    return scripted(folder, script, "first"), scripted(folder, script, "second", n_ctx=512)


@pytest.fixture
def backends(files: tuple[ScriptedBackend, ScriptedBackend]) -> list[ScriptedBackend]:
    facts = {"path": "/home/someone/secret/first.gguf", "file": "first.gguf", "device": "cpu"}
    numbers = {"quantization": "Q4_K_M", "n_params": 1000, "nbytes": 4000}
    first, second = (copy.copy(backend) for backend in files)
    first.card = dataclasses.replace(first.card, aliases=("one", "default-model"), facts=facts, **numbers)
    second.card = dataclasses.replace(second.card, id=SECOND, state="unloaded")
    for backend in (first, second):
        backend.asked, backend.prompts, backend.running, backend.ended = [], [], [], []
    return [first, second]


@pytest.fixture
def models(backends: list[ScriptedBackend]) -> Skilled:
    return Skilled(backends)


@pytest.fixture
def serving(models: Skilled) -> Serving:
    return Serving(models)


def get(serving: Serving, path: str, *arguments: Any) -> Reply:
    return asked(make_app(serving), "GET", path, *arguments)


def post(serving: Serving, path: str, body: Any = b"") -> Reply:
    return asked(make_app(serving), "POST", path, [], body)


def set_state(serving: Serving, state: str, number: int = 0) -> None:
    backend = serving.models.backends[number]  # type: ignore[attr-defined]
    backend.card = dataclasses.replace(backend.card, state=state, why="no memory" if state == "failed" else "")


# ---- is it alive -------------------------------------------------------------------------------------------------

STATES = [("loaded", 200), ("unloaded", 200), ("sleeping", 200), ("loading", 503), ("failed", 503)]


@pytest.mark.parametrize(("state", "status"), STATES)
@pytest.mark.parametrize("path", ["/health", "/v1/health", "/readyz"])
def test_readiness(serving: Serving, path: str, state: str, status: int) -> None:
    set_state(serving, state)
    reply = get(serving, path)
    assert reply.status == status
    if status == 200:
        assert reply.json() == {"status": "ok"}
    else:
        error = reply.json()["error"]
        assert (error["code"], error["type"]) == (503, "unavailable_error")
    if state == "loading":
        assert error["message"] == "Loading model"  # clients of llama.cpp's server wait for these words
    assert "first" not in reply.body.decode()


@pytest.mark.parametrize(("state", "status"), STATES)
def test_a_second_model_decides_nothing(serving: Serving, state: str, status: int) -> None:
    set_state(serving, state, number=1)
    assert get(serving, "/readyz").status == 200


@pytest.mark.parametrize("state", ["loading", "failed"])
def test_a_process_lives_whatever_its_model_does(serving: Serving, state: str) -> None:
    set_state(serving, state)
    assert get(serving, "/livez").json() == {"status": "ok"}
    assert get(serving, "/api/hello").status == 200


def test_a_server_without_models_is_not_ready() -> None:
    assert get(Serving(ScriptedModels([])), "/readyz").status == 503


# ---- the models --------------------------------------------------------------------------------------------------


def test_the_list_of_models(serving: Serving) -> None:
    found = get(serving, "/v1/models").json()
    assert found["object"] == "list"
    assert [row["id"] for row in found["data"]] == ["first", SECOND]
    assert (found["has_more"], found["first_id"], found["last_id"]) == (False, "first", SECOND)
    assert get(serving, "/models").json() == found


def test_a_server_without_models_lists_none() -> None:
    found = get(Serving(ScriptedModels([])), "/v1/models").json()
    assert (found["data"], found["first_id"], found["last_id"]) == ([], None, None)


def test_every_client_finds_the_served_context(serving: Serving) -> None:
    row = get(serving, "/v1/models/own/second:Q4_K_M").json()
    names = ("max_model_len", "context_length", "context_window", "max_input_tokens", "max_tokens")
    assert {row[name] for name in names} == {512}
    assert row["meta"]["n_ctx"] == 512


def test_the_record_of_a_model(serving: Serving) -> None:
    row = get(serving, "/v1/models/first").json()
    assert (row["object"], row["type"], row["owned_by"]) == ("model", "model", "zincmetal")
    assert row["status"] == {"value": "loaded"}
    assert row["aliases"] == ["one", "default-model"]
    assert row["meta"]["quantization"] == "Q4_K_M"
    assert (row["meta"]["n_params"], row["meta"]["size"], row["meta"]["arch"]) == (1000, 4000, "llama")
    assert row["created_at"].endswith("Z")
    assert row["architecture"]["input_modalities"] == ["text"]


def test_records_show_no_paths(serving: Serving) -> None:
    for path in ("/v1/models", "/v1/models/first", "/props", "/slots", "/metrics", "/v1/cache/stats"):
        assert "/home/someone" not in get(serving, path).body.decode()


def test_a_failed_model_says_why(serving: Serving) -> None:
    set_state(serving, "failed")
    assert get(serving, "/v1/models/first").json()["status"] == {"value": "failed", "why": "no memory"}


@pytest.mark.parametrize("name", ["one", "default-model", "first", "own%2Fsecond:Q4_K_M"])
def test_a_model_by_any_name(serving: Serving, name: str) -> None:
    assert get(serving, f"/v1/models/{name}").status == 200


@pytest.mark.parametrize(
    "name",
    [
        "nope",
        "..",
        "../../etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "first/../../x",
        "/etc/passwd",
        "first.gguf",
        "x" * 600,
    ],
)
def test_an_unknown_model(serving: Serving, name: str) -> None:
    reply = get(serving, f"/v1/models/{name}")
    assert reply.status in (400, 404)
    if reply.status == 404:
        assert reply.json()["error"]["type"] == "not_found_error"
    assert "root:" not in reply.body.decode()


def test_anthropics_client_reads_the_same_list(serving: Serving) -> None:
    import anthropic
    from anthropic.types import ModelInfo

    row = get(serving, "/v1/models/first", [("anthropic-version", "2023-06-01")]).json()
    info = ModelInfo.model_validate(row)
    assert (info.id, info.type, info.display_name) == ("first", "model", "first")
    assert anthropic.__version__


def test_openais_client_reads_the_same_list(serving: Serving) -> None:
    from openai.types import Model

    model = Model.model_validate(get(serving, "/v1/models/first").json())
    assert (model.id, model.object, model.owned_by) == ("first", "model", "zincmetal")


# ---- loading, files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["load", "unload"])
def test_loading_by_hand(serving: Serving, models: Skilled, what: str) -> None:
    reply = post(serving, f"/models/{what}", {"model": "one"})
    assert reply.json() == {"success": True, "model": "first"}
    assert models.done == [(what, "first")]


def test_a_load_that_fails(serving: Serving, models: Skilled) -> None:
    models.refusal = OutOfMemoryError("the model needs 9 GB, and 4 GB are left")
    reply = post(serving, "/models/load", {"model": "first"})
    assert reply.status == 503
    assert "9 GB" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [{}, {"model": ""}, {"model": 1}, {"model": ["first"]}, {"model": "a\nb"}, [1], "first"]
)
@pytest.mark.parametrize("path", ["/models/load", "/models/unload"])
def test_a_name_must_be_one(serving: Serving, models: Skilled, path: str, body: Any) -> None:
    assert post(serving, path, body).status == 400
    assert not models.done


def test_a_model_that_is_not_there_is_not_loaded(serving: Serving, models: Skilled) -> None:
    assert post(serving, "/models/load", {"model": "../x"}).status == 404
    assert not models.done


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/models"), ("DELETE", "/models"), ("DELETE", "/models?model=first")]
)
def test_clients_change_no_files(serving: Serving, models: Skilled, method: str, path: str) -> None:
    reply = asked(make_app(serving), method, path, [], {"model": "first"})
    assert (reply.status, reply.json()["error"]["type"]) == (403, "permission_error")
    assert not models.done


def test_clients_may_change_files_if_allowed(serving: Serving, models: Skilled) -> None:
    serving.files = models
    assert post(serving, "/models", {"model": "owner/repo:Q4_K_M"}).status == 202
    app = make_app(serving)
    assert asked(app, "DELETE", "/models?model=one").status == 200
    assert asked(app, "DELETE", "/models", [], {"model": SECOND}).status == 200
    assert models.done == [("pull", "owner/repo:Q4_K_M"), ("remove", "first"), ("remove", SECOND)]


def test_the_plan_of_a_model(serving: Serving) -> None:
    found = get(serving, "/v1/models/own/second:Q4_K_M/plan?context=2048&parallel=2").json()
    assert (found["id"], found["context"], found["parallel"]) == (SECOND, 2048, 2)
    assert get(serving, "/v1/models/first/plan").json()["context"] is None


@pytest.mark.parametrize(
    "query", ["context=0", "context=-1", "context=x", "context=1e3", "parallel=9999999999999", "parallel="]
)
def test_a_plan_of_nonsense(serving: Serving, query: str) -> None:
    assert get(serving, f"/v1/models/first/plan?{query}").status == 400


def test_the_catalogue(serving: Serving) -> None:
    assert get(serving, "/v1/catalogue").json()["data"] == [{"name": "smollm2-135m"}]


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/models/load"), ("POST", "/models/unload"), ("GET", "/v1/catalogue"), ("GET", "/v1/models/first/plan")],
)
def test_models_without_a_skill(backends: list[ScriptedBackend], method: str, path: str) -> None:
    body = {"model": "first"} if method == "POST" else b""
    reply = asked(make_app(Serving(ScriptedModels(backends))), method, path, [], body)
    assert reply.status == 501


# ---- states as they change ---------------------------------------------------------------------------------------


def test_states_as_they_change(serving: Serving, models: Skilled) -> None:
    async def watch() -> Reply:
        for state in (ModelStatus("first", "loading", 0.5), ModelStatus("first", "failed", 0.0, "no memory"), None):
            models.coming.put_nowait(state)
        return await ask(make_app(serving), "GET", "/models/sse")

    reply = asyncio.run(watch())
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert [event["status"] for event in reply.data] == [
        {"value": "loading", "progress": 0.5},
        {"value": "failed", "progress": 0.0, "why": "no memory"},
    ]
    assert {event["model"] for event in reply.data} == {"first"}
    assert reply.body.count(b"event: model_status\n") == 2


def test_states_of_a_server_that_ends(tmp_path: Path) -> None:
    """The models of a real server: their stream begins with the state of each, and ends when they are closed."""

    async def watch() -> Reply:
        models = Residency([Named(name, LoadOptions(str(tmp_path / name))) for name in ("a", "b")])
        app = make_app(Serving(models))
        task = asyncio.create_task(ask(app, "GET", "/models/sse"))
        for _ in range(10):
            await asyncio.sleep(0)
        await models.close()
        return await task

    reply = asyncio.run(watch())
    assert reply.complete
    assert [(event["model"], event["status"]["value"]) for event in reply.data] == [
        ("a", "unloaded"),
        ("b", "unloaded"),
    ]


def test_a_stream_of_states_ends_with_the_server(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zincmetal.serve.cards.WATCH_SECONDS", 0.01)

    async def watch() -> Reply:
        task = asyncio.create_task(ask(make_app(serving), "GET", "/models/sse"))
        await asyncio.sleep(0)
        serving.draining = True
        return await task

    serving.models = ScriptedModels(serving.models.backends)  # type: ignore[attr-defined]
    reply = asyncio.run(watch())
    assert reply.complete or reply.status == 503


def test_who_leaves_a_stream_of_states_leaves_nothing(serving: Serving, models: Skilled) -> None:
    async def watch() -> int:
        gone = asyncio.Event()
        task = asyncio.create_task(ask(make_app(serving), "GET", "/models/sse", leaves=gone))
        models.coming.put_nowait(ModelStatus("first", "loaded", 1.0))
        await asyncio.sleep(0.01)
        gone.set()
        await task
        return len(asyncio.all_tasks())

    assert asyncio.run(watch()) == 1


# ---- what it has -------------------------------------------------------------------------------------------------


def test_props(serving: Serving) -> None:
    found = get(serving, "/props").json()
    assert found["default_generation_settings"]["n_ctx"] == found["n_ctx"] == 4096
    assert (found["total_slots"], found["model_alias"], found["model_path"]) == (4, "first", "first.gguf")
    assert "<|im_start|>" in found["chat_template"]
    assert found["eos_token"] == "<|im_end|>"
    assert found["build_info"].startswith("zincmetal")
    assert found["is_sleeping"] is False


def test_props_of_another_model_do_not_load_it(serving: Serving, models: Skilled) -> None:
    found = get(serving, "/props?model=own/second:Q4_K_M").json()
    assert (found["n_ctx"], found["is_sleeping"]) == (512, True)
    assert models.leases == 0
    assert not models.done
    assert get(serving, "/props?model=nope").status == 404


def while_answering(serving: Serving, path: str, method: str = "GET") -> tuple[Reply, Reply]:
    """Asks for a path while a stream runs; returns that reply and the stream."""

    async def both() -> tuple[Reply, Reply]:
        app = make_app(serving)
        backend = serving.models.backends[0]  # type: ignore[attr-defined]
        hold = asyncio.Event()
        backend.script = lambda prompt, given: Answer("hello there", reading=60.0)
        body = {**CHAT, "stream": True}
        stream = asyncio.create_task(
            ask(app, "POST", "/v1/chat/completions", [("x-request-id", "mine")], body, leaves=hold)
        )
        while not backend.running:
            await asyncio.sleep(0)
        reply = await ask(app, method, path)
        hold.set()
        return reply, await stream

    return asyncio.run(both())


def test_slots_show_who_runs_and_no_prompt(serving: Serving) -> None:
    idle = get(serving, "/slots").json()
    assert [slot["is_processing"] for slot in idle] == [False] * 4
    reply, _ = while_answering(serving, "/slots")
    rows = reply.json()
    assert [slot["is_processing"] for slot in rows] == [True, False, False, False]
    assert rows[0]["state"] == "prefill"
    assert rows[0]["n_prompt"] > 0
    assert "user" not in reply.body.decode()
    assert [slot["id"] for slot in rows] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("?action=save", 501, "--cache-dir"),
        ("?action=restore", 501, "--cache-dir"),
        ("?action=erase", 501, "POST /v1/cache/clear"),
        ("?action=paint", 400, "save, restore, erase"),
        ("", 400, "save, restore, erase"),
    ],
)
def test_slots_are_not_changed_and_the_remedy_is_named(serving: Serving, query: str, status: int, words: str) -> None:
    reply = post(serving, f"/slots/0{query}", {"filename": "prompt.bin"})
    assert reply.status == status
    error = reply.json()["error"]
    assert error["type"] == ("not_supported_error" if status == 501 else "invalid_request_error")
    assert words in error["message"]
    assert error["param"] == "action"


def test_slots_that_are_all_taken(serving: Serving) -> None:
    backend = serving.models.backends[0]  # type: ignore[attr-defined]
    backend.card = dataclasses.replace(backend.card, sequences=1)
    assert get(serving, "/slots?fail_on_no_slot=1").status == 200
    assert while_answering(serving, "/slots?fail_on_no_slot=1")[0].status == 503


def test_the_cache(serving: Serving, models: Skilled) -> None:
    found = get(serving, "/v1/cache/stats").json()
    assert found["models"]["first"]["pages"] == {"all": 8, "free": 8, "most": 8}
    assert list(found["models"]) == ["first"]  # the other is not loaded
    assert post(serving, "/v1/cache/clear").json() == {"cleared": ["first"]}
    assert post(serving, "/v1/cache/clear", {"model": "one"}).json() == {"cleared": ["first"]}
    assert post(serving, "/v1/cache/clear", {"model": SECOND}).json() == {"cleared": []}
    assert post(serving, "/v1/cache/clear", {"model": "nope"}).status == 404
    assert [backend.cache_cleared for backend in models.backends] == [2, 0]
    assert models.leases == 0


def test_an_engine_that_does_not_answer_hides_no_other(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zincmetal.serve.ops.FIGURES_SECONDS", 0.01)

    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    set_state(serving, "loaded", 1)
    serving.models.backends[0].figures = never  # type: ignore[attr-defined]
    assert list(get(serving, "/v1/cache/stats").json()["models"]) == [SECOND]
    assert get(serving, "/metrics").status == 200


def test_cancelling_by_id(serving: Serving) -> None:
    reply, stream = while_answering(serving, "/v1/requests/mine/cancel", "POST")
    assert reply.json() == {"id": "mine", "cancelled": True}
    assert stream.complete
    assert not serving.turns


def test_cancelling_what_is_not_there(serving: Serving) -> None:
    assert post(serving, "/v1/requests/nope/cancel").json() == {"id": "nope", "cancelled": False}


# ---- text --------------------------------------------------------------------------------------------------------


def test_tokens_of_a_text(serving: Serving) -> None:
    ids = post(serving, "/tokenize", {"content": "hi"}).json()["tokens"]
    assert post(serving, "/detokenize", {"tokens": ids}).json() == {"content": "hi", "prompt": "hi"}


@pytest.mark.parametrize(("parse", "ids"), [(True, [START]), (False, None)])
def test_tokens_of_a_control_token(serving: Serving, parse: bool, ids: list[int] | None) -> None:
    found = post(serving, "/tokenize", {"content": "<|im_start|>", "parse_special": parse}).json()["tokens"]
    assert found == ids if ids else START not in found


def test_pieces_are_text_or_bytes(serving: Serving) -> None:
    found = post(serving, "/tokenize", {"content": "a\u00e9", "with_pieces": True}).json()["tokens"]
    assert [row["piece"] for row in found] == ["a", [0xC3], [0xA9]]
    assert all(type(row["id"]) is int for row in found)


def test_tokens_as_vllms_clients_ask(serving: Serving) -> None:
    found = post(serving, "/tokenize", {"prompt": "hi", "return_token_strs": True}).json()
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 4096)
    assert "".join(found["token_strs"]) == "hi"
    chat = post(serving, "/tokenize", CHAT).json()
    assert chat["tokens"][0] == START
    assert END in chat["tokens"]


def test_tokens_of_an_unloaded_model(serving: Serving, models: Skilled) -> None:
    assert post(serving, "/tokenize", {"content": "hi", "model": SECOND}).status == 200
    assert not models.done
    assert post(serving, "/tokenize", {"content": "hi", "model": "nope"}).status == 404


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"content": 1},
        {"content": ["a"]},
        {"prompt": 1},
        {"messages": []},
        {"messages": [1]},
        {"messages": "x"},
        [],
        "x",
    ],
)
def test_nothing_to_tokenize(serving: Serving, body: Any) -> None:
    reply = post(serving, "/tokenize", body)
    assert (reply.status, reply.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    "tokens", [None, "abc", [1.5], ["1"], [True], [-1], [10**6], [2**63], [10**30], [None], {"a": 1}, [[1]]]
)
def test_ids_that_are_none(serving: Serving, tokens: Any) -> None:
    assert post(serving, "/detokenize", {"tokens": tokens}).status == 400


def test_no_ids_are_no_text(serving: Serving) -> None:
    assert post(serving, "/detokenize", {"tokens": []}).json()["content"] == ""


def test_the_prompt_of_a_chat(serving: Serving, models: Skilled) -> None:
    shown = post(serving, "/apply-template", CHAT).json()["prompt"]
    post(serving, "/v1/chat/completions", CHAT)
    assert models.backends[0].prompts == [shown]
    assert shown.endswith("<|im_start|>assistant\n")


def test_the_prompt_of_a_chat_that_goes_on(serving: Serving) -> None:
    body = {
        "messages": [*MESSAGES, {"role": "assistant", "content": "Once"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    assert post(serving, "/apply-template", body).json()["prompt"].endswith("Once")


@pytest.mark.parametrize(
    "body", [{}, {"messages": []}, {"messages": [{"role": "king", "content": "x"}]}, {"messages": 1}]
)
def test_no_chat_to_show(serving: Serving, body: Any) -> None:
    assert post(serving, "/apply-template", body).status == 400


def test_a_model_without_a_template(tmp_path: Path) -> None:
    backend = scripted(tmp_path, lambda prompt, given: "x", "bare", template="")
    serving = Serving(ScriptedModels([backend]))
    assert post(serving, "/apply-template", CHAT).status == 400
    assert get(serving, "/props").json()["chat_template"] == ""
    assert post(serving, "/tokenize", {"content": "hi"}).status == 200


def test_a_model_in_use_is_not_unloaded(serving: Serving, models: Skilled) -> None:
    async def busy(name: str) -> None:
        raise UsageError("first is in use by 1 requests")

    models.unload = busy  # type: ignore[method-assign]
    assert post(serving, "/models/unload", {"model": "first"}).status == 400
