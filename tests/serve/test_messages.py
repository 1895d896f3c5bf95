"""POST /v1/messages and its count of tokens, over HTTP, with a scripted model."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from support.scripted import Reply as Answer
from support.served import USER, Served
from support.slow_models import slow
from support.streams import Call, ask
from support.wire_events import faults_of_messages, parse
from zincmetal.errors import ContextFullError, DeadlineError, DeviceError, OutOfMemoryError, QueueFullError
from zincmetal.serve.serving import Limits

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
WEATHER = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALLS = 'think hm\nsay I look.\ncall weather\nargs {"city":\nargs "Bonn"}\nend {"city":"Bonn"}\ncall weather\nend {}'


def send(served: Served, headers=None, path=PATH, **body):
    return ask(served.app, path, {"model": "scripted", "max_tokens": 500, "messages": USER, **body}, headers=headers)


def stream(served: Served, **body):
    """Asks for a stream that keeps the contract, and returns the data of its events."""
    reply = send(served, stream=True, **body)
    assert reply.status == 200, reply.body
    events = parse(reply.body)
    assert faults_of_messages(events) == []
    return [data for _, data in events]


def test_plain_reply(served):
    body = send(served).json
    assert body["content"] == [{"type": "text", "text": "Hello there"}]
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "scripted")
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)


def test_stream_and_plain_reply_say_the_same(served, lines):
    served.says(CALLS)
    plain, events = send(served, tools=[WEATHER]).json, stream(served, tools=[WEATHER])
    texts = [e["delta"]["text"] for e in events if e.get("delta", {}).get("type") == "text_delta"]
    inputs = [e["delta"]["partial_json"] for e in events if e.get("delta", {}).get("type") == "input_json_delta"]
    assert [block["type"] for block in plain["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert plain["content"][1]["text"] == "".join(texts)
    assert (plain["content"][2]["input"], inputs) == ({"city": "Bonn"}, ['{"city":', '"Bonn"}', "{}"])
    assert plain["stop_reason"] == events[-2]["delta"]["stop_reason"] == "tool_use"
    assert plain["usage"] == events[-2]["usage"]


def test_usage_tells_what_the_cache_gave(served):
    served.says(Answer("yes", reused=15))
    events = stream(served)
    start, end = events[0]["message"]["usage"], events[-2]["usage"]
    assert (start["input_tokens"] + 15, start["cache_read_input_tokens"]) == (len(served.asked.ids), 15)
    assert (end["input_tokens"], end["cache_read_input_tokens"]) == (start["input_tokens"], 15)
    assert (start["output_tokens"], end["output_tokens"]) == (0, len("yes") + 1)


def test_thinking_tokens_are_counted(served, lines):
    served.says("think a\nsay b")
    details = send(served).json["usage"]["output_tokens_details"]
    assert 0 < details["thinking_tokens"] < len("think a\nsay b")


def test_message_starts_while_the_prompt_is_read(served):
    served.says(Answer("yes", reading=60))

    async def begin():
        call = Call(served.app, PATH, {"model": "", "messages": USER, "stream": True})
        first = parse(await call.piece())
        assert served.backend.running
        call.leave()
        await call.over()
        return first

    assert [name for name, _ in asyncio.run(begin())] == ["message_start"]


def test_pings_keep_a_client(served):
    served.reset(Limits(keep_alive=0.01)).says(Answer("yes", reading=60))

    async def three():
        call = Call(served.app, PATH, {"model": "", "messages": USER, "stream": True})
        names = [name for _ in range(5) for name, _ in parse(await call.piece())]
        call.leave()
        await call.over()
        return names

    assert asyncio.run(three()) == ["message_start", *["ping"] * 4]


def test_error_while_a_model_loads_is_an_event(served, monkeypatch):
    served.reset(Limits(keep_alive=0.01, patience=0.0))
    loaded = slow(served, monkeypatch)

    async def read():
        body = {"messages": [{"role": "user", "content": "x" * 5000}], "stream": True}
        call = Call(served.app, PATH, body)
        first = parse(await call.piece())
        loaded.set()
        return [*first, *parse(await call.rest())]

    events = asyncio.run(read())
    assert faults_of_messages(events) == []
    assert events[0][0] == "ping"
    assert events[-1][1]["error"]["message"].startswith("prompt is too long: ")


@pytest.mark.parametrize("streams", [True, False])
def test_client_that_leaves_ends_its_generation(served, streams):
    served.says(Answer("yes", reading=60))

    async def leave():
        call = Call(served.app, PATH, {"model": "", "messages": USER, "stream": streams})
        while not served.backend.running:
            await asyncio.sleep(0)
        call.leave()
        await call.over()

    asyncio.run(leave())
    assert [answer.cancelled.is_set() for answer in served.backend.ended] == [True]


def test_stop_sequence_is_named(served):
    served.says("one two END three")
    body = send(served, stop_sequences=["END"]).json
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "END")
    assert body["content"] == [{"type": "text", "text": "one two "}]


def test_bound_of_tokens_ends_an_answer(served):
    served.says("many words")
    body = send(served, max_tokens=4).json
    assert (body["stop_reason"], body["usage"]["output_tokens"]) == ("max_tokens", 4)


def test_bound_beyond_the_context_is_clamped(served):
    """Claude Code asks for 32000 tokens of any model."""
    served.says(Answer("x" * 5000))
    body = send(served, max_tokens=32000).json
    room = served.backend.card.n_ctx + 1 - body["usage"]["input_tokens"]
    assert (body["stop_reason"], body["usage"]["output_tokens"]) == ("model_context_window_exceeded", room)


def test_end_of_the_context_ends_an_answer_without_a_bound(served):
    served.says(Answer("x" * 5000))
    assert send(served, max_tokens=None).json["stop_reason"] == "model_context_window_exceeded"


@pytest.mark.parametrize("streams", [True, False])
def test_prompt_that_is_too_long_is_refused_in_words_that_agents_know(served, streams):
    reply = send(served, messages=[{"role": "user", "content": "x" * 5000}], stream=streams)
    error = reply.json["error"]
    assert (reply.status, error["type"]) == (400, "invalid_request_error")
    number, _, bound = error["message"].removeprefix("prompt is too long: ").partition(" tokens > ")
    assert (int(number) > 5000, bound) == (True, "4096 maximum")


@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (QueueFullError("16 wait"), 529, "overloaded_error"),
        (DeviceError("the device is lost"), 529, "overloaded_error"),
        (OutOfMemoryError("no room"), 529, "overloaded_error"),
        (DeadlineError("too late"), 504, "timeout_error"),
        (ContextFullError("no room"), 400, "invalid_request_error"),
    ],
)
@pytest.mark.parametrize("streams", [True, False])
def test_refusal_of_the_engine(served, refusal, status, kind, streams):
    served.backend.refusal = refusal
    reply = send(served, stream=streams)
    assert (reply.status, reply.json["type"], reply.json["error"]["type"]) == (status, "error", kind)
    assert ("retry-after" in reply.headers) == (status == 529)


def test_error_has_the_id_of_its_request(served):
    reply = send(served, {"x-request-id": "r1"}, messages=[])
    assert (reply.status, reply.json["request_id"], reply.headers["request-id"]) == (400, "r1", "r1")
    assert send(served).headers["request-id"]


@pytest.mark.parametrize(("error", "kind"), [(DeviceError("lost"), "api_error"), (RuntimeError("secret"), "api_error")])
def test_error_in_the_middle_is_an_event(served, error, kind):
    served.says(Answer("some words", error=error, error_after=3))
    events = parse(send(served, stream=True).body)
    assert faults_of_messages(events) == []
    assert events[-1][1]["error"]["type"] == kind
    assert "secret" not in str(events)


def test_error_of_a_plain_reply_is_a_status(served):
    served.says(Answer("some words", error=DeviceError("lost"), error_after=3))
    reply = send(served)
    assert (reply.status, reply.json["type"]) == (529, "error")


def test_refusal_names_the_field(served):
    image = {"type": "image", "source": {}}
    reply = send(served, messages=[{"role": "user", "content": [image]}])
    assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_request_error")
    message = reply.json["error"]["message"]
    assert message == "messages[0].content[0]: this model reads text, and no block of type 'image'"


@pytest.mark.parametrize(("model", "status"), [("scripted", 200), ("", 200), ("nobody", 404)])
def test_models(served, model, status):
    reply = send(served, model=model)
    assert reply.status == status
    assert reply.json["model" if status == 200 else "error"] in ("scripted", reply.json.get("error"))


@pytest.mark.parametrize("headers", [{"anthropic-version": "2026-10-21"}, {"anthropic-beta": "x,y"}])
def test_any_version_and_beta_is_accepted(served, headers):
    assert send(served, headers, path=PATH + "?beta=true").status == 200


def test_conversation_reaches_the_model(served):
    send(served, system="Be brief.", messages=[*USER, {"role": "assistant", "content": "yes"}, *USER])
    prompt = served.backend.prompts[-1]
    assert [prompt.find(word) >= 0 for word in ("Be brief.", "yes")] == [True, True]


def test_choice_of_tools_reaches_the_grammar(served, lines):
    send(served, tools=[WEATHER, {"name": "other"}], tool_choice={"type": "tool", "name": "weather"})
    assert served.asked.grammar.lark == "required weather"


def test_tool_that_a_search_has_found_leaves_the_beginning_of_the_prompt(served, lines):
    search = {"name": "ToolSearch", "input_schema": {"type": "object"}}
    tools = [search, {**WEATHER, "defer_loading": True}]
    call = {"type": "tool_use", "id": "t1", "name": "ToolSearch", "input": {}}
    found = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [{"type": "tool_reference", "tool_name": "weather"}],
    }
    send(served, tools=tools)
    asked = [*USER, {"role": "assistant", "content": [call]}, {"role": "user", "content": [found]}]
    send(served, tools=tools, messages=asked, tool_choice={"type": "tool", "name": "weather"})
    first, second = served.backend.prompts
    opened = first.rpartition("<|im_start|>assistant")[0]
    assert second.startswith(opened)
    assert ("city" in first, "city" in second) == (False, True)
    assert served.asked.grammar.lark == "required weather"


def test_form_of_the_answer_reaches_the_grammar(served):
    form = {"type": "json_schema", "schema": {"type": "object"}}
    send(served, output_config={"format": form})
    assert "object" in served.asked.grammar.lark


# ---- count_tokens -------------------------------------------------------------------------------------------


def test_count_is_that_of_the_prompt(served):
    reply = send(served, path=COUNT, max_tokens=None, system="Be brief.", tools=[WEATHER])
    send(served, system="Be brief.", tools=[WEATHER])
    assert reply.json == {"input_tokens": len(served.asked.ids)}


def test_count_needs_neither_a_lease_nor_a_turn(served):
    """It is never queued behind generations, and needs no model in memory."""
    served.models.lease = None
    try:
        assert send(served, path=COUNT).json["input_tokens"] > 0
    finally:
        del served.models.lease


def test_count_of_a_prompt_beyond_the_context(served):
    reply = send(served, path=COUNT, messages=[{"role": "user", "content": "x" * 5000}])
    assert reply.json["input_tokens"] > 5000


@pytest.mark.parametrize("body", [{"messages": []}, {"messages": USER, "model": "nobody"}])
def test_count_refuses_what_messages_refuses(served, body):
    count, messages = send(served, path=COUNT, **body), send(served, **body)
    assert (count.status, count.json["error"]) == (messages.status, messages.json["error"])


def test_turn_is_known_by_both_ids_while_it_runs(served):
    served.says(Answer("yes", reading=60))

    async def cancel():
        call = Call(served.app, PATH, {"model": "", "messages": USER, "stream": True}, headers={"x-request-id": "r1"})
        first = parse(await call.piece())[0][1]["message"]["id"]
        assert set(served.serving.turns) == {"r1", first}
        served.serving.turns["r1"][0].cancel()
        return parse(await call.rest())

    events = asyncio.run(cancel())
    assert [name for name, _ in events] == ["ping", "message_delta", "message_stop"]


def test_limits_of_the_body_hold(served):
    served.reset(replace(Limits(), depth=4))
    schema = {"a": {"b": {"c": {"d": {}}}}}
    assert send(served, tools=[{"name": "x", "input_schema": schema}]).status == 400
