"""Metrics: what is counted, under which names, and that no request can make a label."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as families

from support.asgi import Reply, ask, asked
from support.scripted import Reply as Answer
from support.scripted import ScriptedBackend, ScriptedModels, scripted
from zincmetal.api import cache_text
from zincmetal.engine.prefix_cache import Miss
from zincmetal.errors import DeviceError
from zincmetal.serve.app import make_app
from zincmetal.serve.metrics import Metrics, TokenHistogram, endpoint_of, miss_of
from zincmetal.serve.serving import Access, Serving

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = "hello"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ScriptedBackend:
    return scripted(tmp_path_factory.mktemp("models"), lambda prompt, given: TEXT, "tiny")


@pytest.fixture
def backend(base: ScriptedBackend) -> ScriptedBackend:
    found = copy.copy(base)
    found.running, found.ended = [], []
    return found


@pytest.fixture
def serving(backend: ScriptedBackend) -> Serving:
    return Serving(ScriptedModels([backend]))


def chat(serving: Serving, **fields: Any) -> Reply:
    return asked(make_app(serving), "POST", "/v1/chat/completions", [], {**CHAT, **fields})


def values(serving: Serving) -> dict[str, float]:
    """Reads /metrics; returns each sample by its name and its labels, in the order of their names."""
    text = asked(make_app(serving), "GET", "/metrics").body.decode()
    found = {}
    for family in families(text):
        for sample in family.samples:
            found[",".join([sample.name.removeprefix("zincmetal_"), *sample.labels.values()])] = sample.value
    return found


NAMES = """requests requests_in_flight queue_depth queue_seconds ttft_seconds itl_seconds e2e_seconds prompt_tokens
prompt_tokens_cached generated_tokens reasoning_tokens prefill_tokens_per_second decode_tokens_per_second batch_size
cache_entries memory_bytes device_errors tool_calls client_disconnects cancelled model_loads model_state
grammar_compile_seconds grammar_mask_seconds"""


@pytest.mark.parametrize("name", NAMES.split())
def test_the_names(serving: Serving, name: str) -> None:
    chat(serving)
    text = asked(make_app(serving), "GET", "/metrics").body.decode()
    assert f"zincmetal_{name}" in {family.name for family in families(text)}


def test_the_page_has_every_name() -> None:
    page = (Path(__file__).parents[2] / "docs/operate.md").read_text("utf-8")
    own = {family.name for family in Metrics().registry.collect() if family.name.startswith("zincmetal_")}
    assert set(re.findall(r"`(zincmetal_\w+?)(?:_total)?`", page)) == own


def test_both_forms_of_the_page(serving: Serving) -> None:
    chat(serving)
    app = make_app(serving)
    plain = asked(app, "GET", "/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert list(families(plain.body.decode()))
    modern = asked(app, "GET", "/metrics", [("accept", "application/openmetrics-text; version=1.0.0")])
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert list(open_metrics(modern.body.decode()))


def test_tokens_of_an_answer(serving: Serving, backend: ScriptedBackend) -> None:
    backend.script = lambda prompt, given: Answer(TEXT, reused=3)
    first = chat(serving).json()["usage"]
    second = chat(serving).json()["usage"]
    found = values(serving)
    assert found["prompt_tokens_total,tiny"] == first["prompt_tokens"] + second["prompt_tokens"]
    assert found["prompt_tokens_cached_total,tiny"] == 6
    assert found["generated_tokens_total,tiny"] == first["completion_tokens"] + second["completion_tokens"]
    assert found["turns_total,tiny,stop"] == 2
    assert found["cache_hits_total,tiny,memory"] == 2


def test_times_of_an_answer(serving: Serving) -> None:
    made = chat(serving).json()["usage"]["completion_tokens"]
    found = values(serving)
    for name in ("ttft_seconds", "e2e_seconds", "queue_seconds"):
        assert found[f"{name}_count,tiny"] == 1
    assert found["itl_seconds_count,tiny"] == made - 1
    assert found["batch_size_count,tiny"] == made
    assert found["batch_size_sum,tiny"] == made
    assert 0 < found["ttft_seconds_sum,tiny"] <= found["e2e_seconds_sum,tiny"]


def test_streams_count_as_plain_replies_do(serving: Serving, base: ScriptedBackend) -> None:
    other = Serving(ScriptedModels([copy.copy(base)]))
    chat(serving)
    chat(other, stream=True)
    counted = {k: v for k, v in values(serving).items() if "_total" in k and "seconds" not in k and "process" not in k}
    assert counted == {k: v for k, v in values(other).items() if k in counted}


def test_several_answers_are_one_prompt(serving: Serving) -> None:
    usage = chat(serving, n=3).json()["usage"]
    found = values(serving)
    assert found["prompt_tokens_total,tiny"] == usage["prompt_tokens"]
    assert found["generated_tokens_total,tiny"] == usage["completion_tokens"]
    assert (found["turns_total,tiny,stop"], found["queue_seconds_count,tiny"]) == (1, 1)


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ('<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>', "ok"),
        ('<tool_call>\n{"name": "look", "arguments": {"a": 1', "repaired"),
        ("<tool_call>\nI look\n</tool_call>", "text"),
    ],
)
def test_tool_calls_by_how_they_were_written(
    serving: Serving, backend: ScriptedBackend, said: str, outcome: str
) -> None:
    backend.script = lambda prompt, given: said
    reply = chat(serving, tools=[TOOL]).json()["choices"][0]
    assert (reply["finish_reason"] == "tool_calls") is (outcome != "text")
    found = {name: n for name, n in values(serving).items() if name.startswith("tool_calls_total")}
    assert list(found.values()) == [1]
    assert outcome in next(iter(found)).split(",")


def test_the_log_has_numbers_of_each_answer_and_no_text(
    serving: Serving, backend: ScriptedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.script = lambda prompt, given: Answer("an answer that nobody logs", reused=3)
    with caplog.at_level("INFO", "zincmetal.serve"):
        reply = chat(serving, messages=[{"role": "user", "content": "a question that nobody logs"}])
    usage, known = reply.json()["usage"], reply.headers["x-request-id"]
    turn, request = (record.getMessage() for record in caplog.records)
    prompt = f"prompt {usage['prompt_tokens']} tokens, 3 of them cached, answer {usage['completion_tokens']}"
    assert turn.startswith(f"{known} tiny: stop, {prompt}, first token after ")
    assert request.startswith("POST /v1/chat/completions 200 ")
    assert request.endswith(known)
    assert "nobody logs" not in caplog.text


def test_the_log_has_the_type_of_an_error_alone(
    serving: Serving, backend: ScriptedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.script = lambda prompt, given: Answer(TEXT, error=RuntimeError("it said: hello"), error_after=2)
    with caplog.at_level("INFO", "zincmetal.serve"):
        chat(serving)
    assert "tiny: error (RuntimeError), prompt " in caplog.text
    assert "it said" not in caplog.text


def test_an_answer_that_is_cut(serving: Serving) -> None:
    chat(serving, max_tokens=2)
    assert values(serving)["turns_total,tiny,length"] == 1


@pytest.mark.parametrize("after", [0, 2])
def test_errors_of_the_device(serving: Serving, backend: ScriptedBackend, after: int) -> None:
    backend.script = lambda prompt, given: Answer(TEXT, error=DeviceError("the GPU is gone"), error_after=after)
    chat(serving)
    found = values(serving)
    assert found["turns_total,tiny,device_error"] == 1
    assert found["device_errors_total,tiny,DeviceError"] == 1
    assert found.get("ttft_seconds_count,tiny", 0) == (after > 0)


@pytest.mark.parametrize(("reading", "phase"), [(60.0, "prompt"), (0.0, "answer")])
def test_clients_that_leave(serving: Serving, backend: ScriptedBackend, reading: float, phase: str) -> None:
    backend.script = lambda prompt, given: Answer(TEXT, reading=reading, delay=60.0)
    if phase == "answer":
        backend.script = lambda prompt, given: Answer(TEXT * 100, delay=0.001)

    async def leave() -> None:
        gone = asyncio.Event()
        body = {**CHAT, "stream": True}
        task = asyncio.create_task(ask(make_app(serving), "POST", "/v1/chat/completions", [], body, leaves=gone))
        while not backend.running or (phase == "answer" and not _begun(serving)):
            await asyncio.sleep(0)
        gone.set()
        await task

    asyncio.run(leave())
    found = values(serving)
    assert found["client_disconnects_total"] == 1
    assert found["turns_total,tiny,cancelled"] == 1
    assert found[f"cancelled_total,tiny,{phase}"] == 1


def _begun(serving: Serving) -> bool:
    return any(turn.first_at is not None for turns in serving.turns.values() for turn in turns)


def test_a_whole_reply_is_no_disconnect(serving: Serving) -> None:
    gone = asyncio.Event()
    gone.set()
    chat(serving, stream=True)
    assert values(serving)["client_disconnects_total"] == 0


def test_requests_by_route_and_status(serving: Serving) -> None:
    serving.access = Access(keys=("secret",))
    app = make_app(serving)
    key = [("x-api-key", "secret")]
    for path in ("/health", "/health/", "/v1/models", "/nope", "/v1/models/tiny", "/v1/models/x"):
        asked(app, "GET", path, key)
    asked(app, "GET", "/v1/models")
    asked(app, "POST", "/v1/chat/completions", key, b"{}")
    found = values(serving)
    assert found["requests_total,/health,200"] == 2
    assert found["requests_total,/v1/models,200"] == 1
    assert found["requests_total,/v1/models,401"] == 1
    assert found["requests_total,/v1/chat/completions,415"] == 1
    assert found["requests_total,other,404"] == 2
    assert found["requests_total,other,200"] == 1
    assert found["requests_in_flight"] == 1  # this one


def test_no_request_makes_a_label(serving: Serving) -> None:
    """A client that invents models, paths, ids and tools must not grow the page."""
    chat(serving)
    before = set(values(serving))
    for i in range(30):
        app = make_app(serving)
        asked(app, "GET", f"/v1/models/invented-{i}", [("x-request-id", f"id{i}"), ("user-agent", f"agent{i}")])
        asked(app, "GET", f"/invented/{i}?x={i}")
        chat(serving, model=f"invented-{i}", user=f"user{i}")
        tools = [{"type": "function", "function": {"name": f"tool{i}", "parameters": {"type": "object"}}}]
        chat(serving, tools=tools, prompt_cache_key=f"key{i}")
    new = set(values(serving)) - before
    assert "invented" not in str(new)
    assert len(new) <= 6  # each with the time of its creation: /metrics, "other" and a status of chats


def test_what_has_a_value_at_a_moment(serving: Serving, backend: ScriptedBackend) -> None:
    async def figures() -> dict[str, Any]:
        pool = {"all": 8, "free": 3, "most": 9}
        return {"running": [{}, {}], "waiting": 5, "pages": pool, "slots": pool, "bytes": {"kv": 77}}

    backend.figures = figures  # type: ignore[method-assign]
    backend.card = dataclasses.replace(backend.card, nbytes=123)
    found = values(serving)
    assert (found["running,tiny"], found["queue_depth,tiny"]) == (2, 5)
    assert (found["cache_entries,pages,tiny,free"], found["cache_entries,pages,tiny,used"]) == (3, 5)
    assert (found["memory_bytes,file,tiny"], found["memory_bytes,kv,tiny"]) == (123, 77)
    assert (found["model_state,tiny,loaded"], found["model_state,tiny,failed"]) == (1, 0)
    backend.card = dataclasses.replace(backend.card, state="failed")
    found = values(serving)
    assert (found["model_state,tiny,loaded"], found["model_state,tiny,failed"]) == (0, 1)
    assert "running,tiny" not in found  # nothing is known of it


@pytest.mark.parametrize(
    ("miss", "kind"),
    [
        (Miss("off"), "off"),
        (Miss("empty"), "empty"),
        (Miss("evicted", 64), "evicted"),
        (Miss("damaged"), "damaged"),
        (Miss("checkpoint", 64), "checkpoint"),
        (Miss("differs", 64, (1,), (2,)), "differs"),
    ],
)
def test_reasons_of_misses_are_kinds(miss: Miss, kind: str) -> None:
    """The engine's report quotes prompts: it must never become a label."""
    why = cache_text.cache_use(3, "memory", miss, lambda ids: "private words").why
    assert why
    assert miss_of(why) == kind


def test_unknown_reasons_are_one_kind() -> None:
    assert {miss_of(f"private words {i}") for i in range(10)} == {"other"}


def test_routes_of_the_app_have_labels(serving: Serving) -> None:
    paths = {route.path for route in make_app(serving).routes if "{" not in route.path}  # type: ignore[attr-defined]
    unlabelled = {path for path in paths if endpoint_of(path) == "other"}
    assert unlabelled <= {"/v1/health", "/api/hello"}


def test_names_of_llama_cpp(base: ScriptedBackend) -> None:
    plain = Serving(ScriptedModels([copy.copy(base)]))
    assert b"llamacpp:" not in asked(make_app(plain), "GET", "/metrics").body
    serving = Serving(ScriptedModels([copy.copy(base)]), metrics=Metrics(llama_names=True))
    usage = chat(serving).json()["usage"]
    found = values(serving)
    names = """prompt_tokens_total prompt_seconds_total tokens_predicted_total tokens_predicted_seconds_total
    prompt_tokens_seconds predicted_tokens_seconds requests_processing requests_deferred prompt_tokens_cached_total
    n_decode_total n_busy_slots_per_decode n_tokens_max"""
    assert all(math.isfinite(found[f"llamacpp:{name}"]) for name in names.split())
    assert found["llamacpp:prompt_tokens_total"] == usage["prompt_tokens"]
    assert found["llamacpp:tokens_predicted_total"] == usage["completion_tokens"]
    assert found["llamacpp:n_tokens_max"] == usage["total_tokens"]
    assert found["llamacpp:n_busy_slots_per_decode"] == 1


def test_names_of_vllm(base: ScriptedBackend) -> None:
    plain = Serving(ScriptedModels([copy.copy(base)]))
    assert b"vllm:" not in asked(make_app(plain), "GET", "/metrics").body
    serving = Serving(ScriptedModels([copy.copy(base)]), metrics=Metrics(vllm_names=True))
    usage = chat(serving).json()["usage"]
    page = asked(make_app(serving), "GET", "/metrics").body.decode()
    assert "# TYPE vllm:time_to_first_token_seconds histogram" in page
    assert "# TYPE vllm:num_requests_running gauge" in page
    assert 'vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="tiny"} 1.0' in page
    found = values(serving)
    assert found["vllm:prompt_tokens_total,tiny"] == found["vllm:prefix_cache_queries_total,tiny"] > 0
    assert found["vllm:prompt_tokens_total,tiny"] == usage["prompt_tokens"]
    assert found["vllm:generation_tokens_total,tiny"] == usage["completion_tokens"]
    assert "vllm:request_success_total,stop,tiny" in found
    assert [found[name] for name in found if name.startswith("vllm:request_success_total")] == [1]
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "inter_token_latency_seconds"):
        assert f"vllm:{name}_count,tiny" in found
    for name in ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting"):
        assert math.isfinite(found[f"vllm:{name},tiny"])


def test_histograms_of_tokens_agree_with_the_librarys() -> None:
    from prometheus_client import CollectorRegistry, Histogram

    bounds = (0.1, 0.5, 1.0)
    own, registry = TokenHistogram("x", "words", bounds), CollectorRegistry()
    theirs = Histogram("zincmetal_x", "words", ["model"], buckets=bounds, registry=registry)
    for value in (0.0, 0.05, 0.1, 0.3, 0.5, 0.99, 1.0, 7.0):
        own.of("m").add(value)
        theirs.labels("m").observe(value)
    found = [{(s.name, *s.labels.items()): s.value for f in c.collect() for s in f.samples} for c in (own, registry)]
    assert found[0] == {name: value for name, value in found[1].items() if not name[0].endswith("_created")}


def test_turns_leave_nothing_behind(serving: Serving) -> None:
    for _ in range(3):
        chat(serving)
    assert not vars(serving.metrics)["_turns"]


def test_two_servers_count_apart(serving: Serving, base: ScriptedBackend) -> None:
    other = Serving(ScriptedModels([copy.copy(base)]))
    chat(serving)
    assert "turns_total,tiny,stop" not in values(other)
