"""/v1/responses over HTTP, with a scripted model."""

from __future__ import annotations

import asyncio

import pytest

from support.scripted import Reply as Answer
from support.served import Served
from support.slow_models import slow
from support.streams import Call, ask
from support.wire_events import faults_of_responses, parse
from zincmetal.errors import DeviceError, QueueFullError
from zincmetal.serve.serving import Limits
from zincmetal.serve.store import ResponseStore

PATH = "/v1/responses"
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
AGENTS = {"type": "namespace", "name": "agents", "description": "", "tools": [{"type": "function", "name": "spawn"}]}
PATCH = {"type": "custom", "name": "apply_patch"}
CALLS = 'think hm\nsay I look.\ncall weather\nargs {"city":\nargs "Bonn"}\nend {"city":"Bonn"}\ncall weather\nend {}'


def send(served: Served, headers=None, **body):
    return ask(served.app, PATH, {"model": "scripted", "input": "hi", **body}, headers=headers)


def get(served: Served, path, method="GET"):
    return ask(served.app, f"{PATH}/{path}", method=method)


def stream(served: Served, **body):
    """Asks for a stream that keeps the contract, and returns the data of its events."""
    reply = send(served, stream=True, **body)
    assert reply.status == 200, reply.body
    events = parse(reply.body)
    assert faults_of_responses(events) == []
    return [data for _, data in events]


def texts(response):
    return [part["text"] for item in response["output"] for part in item.get("content", ())]


def test_plain_reply(served):
    body = send(served).json
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "scripted")
    assert texts(body) == ["Hello there"]
    assert (body["error"], body["incomplete_details"]) == (None, None)
    assert body["completed_at"] >= body["created_at"]


def test_stream_and_plain_reply_say_the_same(served, lines):
    served.says(CALLS)
    plain, last = send(served, tools=[WEATHER]).json, stream(served, tools=[WEATHER])[-1]["response"]
    for body in (plain, last):
        for item in body["output"]:
            assert item.pop("id")
            item.pop("call_id", None)
    assert [item["type"] for item in plain["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert (plain["output"], plain["usage"]) == (last["output"], last["usage"])
    assert plain["output"][2]["arguments"] == '{"city":"Bonn"}'


def test_usage_has_both_details(served, lines):
    served.says(Answer("think a\nsay b", reused=15))
    usage = send(served).json["usage"]
    made = len("think a\nsay b") + 1
    assert (usage["input_tokens"], usage["output_tokens"]) == (len(served.asked.ids), made)
    assert usage["total_tokens"] == usage["input_tokens"] + made
    assert usage["input_tokens_details"] == {"cached_tokens": 15, "cache_write_tokens": 0}
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < made


def test_summary_is_written_when_it_is_asked_for(served, lines):
    served.says("think hm\nsay yes")
    events = stream(served, reasoning={"summary": "auto"})
    assert events[-1]["response"]["output"][0]["summary"] == [{"type": "summary_text", "text": "hm"}]
    assert "response.reasoning_summary_text.delta" in [event["type"] for event in events]


def test_tool_of_a_namespace_comes_back_with_it(served, lines):
    served.says("call agents.spawn\nargs {}\nend {}")
    item = stream(served, tools=[AGENTS])[-1]["response"]["output"][0]
    assert (item["name"], item["namespace"]) == ("spawn", "agents")


def test_tool_that_takes_a_text(served, lines):
    served.says('call apply_patch\nend {"input":"*** Begin"}')
    item = stream(served, tools=[PATCH])[-1]["response"]["output"][0]
    assert (item["type"], item["input"]) == ("custom_tool_call", "*** Begin")


def test_bound_of_tokens_leaves_the_response_incomplete(served):
    body = stream(served, max_output_tokens=4)[-1]
    assert (body["type"], body["response"]["status"]) == ("response.incomplete", "incomplete")
    assert body["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["response"]["output"][0]["status"] == "incomplete"


def test_bound_beyond_the_context_is_clamped(served):
    served.says(Answer("x" * 5000))
    assert send(served, max_output_tokens=32000).json["status"] == "incomplete"


def test_response_tells_the_sampling_that_counts(served):
    body = send(served, temperature=0.5, frequency_penalty=0.25).json
    assert (body["temperature"], body["top_p"], body["frequency_penalty"]) == (0.5, 1.0, 0.25)


def test_log_probabilities(served):
    body = send(served, top_logprobs=2, include=["message.output_text.logprobs"]).json
    logprobs = body["output"][0]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in logprobs) == "Hello there"
    assert [len(entry["top_logprobs"]) for entry in logprobs] == [2] * len(logprobs)


def test_form_of_the_answer_reaches_the_grammar(served):
    send(served, text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}})
    assert "object" in served.asked.grammar.lark


@pytest.mark.parametrize("name", ["spawn", "agents.spawn"])
def test_choice_of_a_tool_in_a_namespace_reaches_the_grammar(served, lines, name):
    choice = {"type": "function", "name": name}
    send(served, tools=[WEATHER, AGENTS], tool_choice=choice)
    assert served.asked.grammar.lark == "required agents.spawn"


# ---- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [True, False])
def test_prompt_that_is_too_long(served, streams):
    reply = send(served, input="x" * 5000, stream=streams)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("streams", [True, False])
def test_full_queue(served, streams):
    served.backend.refusal = QueueFullError("16 wait")
    reply = send(served, stream=streams)
    assert (reply.status, reply.error["code"]) == (503, "queue_full")
    assert reply.headers["retry-after"]


@pytest.mark.parametrize(
    ("error", "code"), [(DeviceError("lost"), "server_error"), (RuntimeError("secret"), "server_error")]
)
def test_error_in_the_middle_is_a_response_that_failed(served, error, code):
    served.says(Answer("some words", error=error, error_after=3))
    last = stream(served)[-1]
    assert (last["type"], last["response"]["error"]["code"]) == ("response.failed", code)
    assert "secret" not in str(last)
    assert last["response"]["output"][0]["status"] == "incomplete"


def test_error_of_a_plain_reply_is_a_status(served):
    served.says(Answer("some words", error=DeviceError("lost"), error_after=3))
    assert send(served).status == 503


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "nobody"}, 404, "model_not_found"),
        ({"previous_response_id": "resp_9"}, 404, "previous_response_not_found"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 404, "item_not_found"),
        ({"background": True}, 400, "unsupported_parameter"),
        ({"truncation": "auto"}, 400, "unsupported_parameter"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "unsupported_content"),
        ({"temperature": 101}, 400, "invalid_value"),
    ],
)
def test_refusals(served, fields, status, code):
    reply = send(served, **fields)
    assert (reply.status, reply.error["code"]) == (status, code)


# ---- signs of life, cancel, disconnect ----------------------------------------------------------------------


def test_signs_of_life_are_responses_in_progress(served):
    served.reset(Limits(keep_alive=0.01)).says(Answer("yes", reading=60))

    async def read():
        call = Call(served.app, PATH, {"input": "hi", "stream": True})
        events = [event for _ in range(5) for event in parse(await call.piece())]
        served.serving.turns[events[0][1]["response"]["id"]][0].cancel()
        return [*events, *parse(await call.rest())]

    events = asyncio.run(read())
    assert faults_of_responses(events) == []
    assert [name for name, _ in events[:5]] == ["response.created", *["response.in_progress"] * 4]


def test_stream_of_a_model_that_loads_begins_with_its_creation(served, monkeypatch):
    """Signs of life come before the model has the request: the SDKs want response.created first of all."""
    served.reset(Limits(keep_alive=0.01, patience=0.0))
    loaded = slow(served, monkeypatch)

    async def read():
        call = Call(served.app, PATH, {"input": "hi", "stream": True})
        first = [event for _ in range(3) for event in parse(await call.piece())]
        loaded.set()
        return [*first, *parse(await call.rest())]

    events = asyncio.run(read())
    assert faults_of_responses(events) == []
    assert [name for name, _ in events[:3]] == ["response.created", "response.in_progress", "response.in_progress"]


def test_error_while_a_model_loads_is_a_response_that_failed(served, monkeypatch):
    served.reset(Limits(keep_alive=0.01, patience=0.0))
    loaded = slow(served, monkeypatch)

    async def read():
        call = Call(served.app, PATH, {"input": "x" * 5000, "stream": True})
        first = parse(await call.piece())
        loaded.set()
        return [*first, *parse(await call.rest())]

    events = asyncio.run(read())
    assert faults_of_responses(events) == []
    assert events[-1][1]["response"]["error"]["code"] == "context_length_exceeded"


def test_response_is_cancelled_by_its_id(served):
    served.says(Answer("yes", reading=60))

    async def cancel():
        call = Call(served.app, PATH, {"input": "hi", "stream": True})
        first = parse(await call.piece())
        known = first[0][1]["response"]["id"]
        shown = await _reply(Call(served.app, f"{PATH}/{known}"))
        told = await _reply(Call(served.app, f"{PATH}/{known}/cancel", {}, "POST"))
        return known, shown, told, [*first, *parse(await call.rest())]

    known, shown, told, events = asyncio.run(cancel())
    assert faults_of_responses(events) == []
    assert (shown["id"], shown["status"]) == (known, "in_progress")
    assert (told["id"], told["status"]) == (known, "cancelled")
    assert events[-1][1]["response"]["status"] == "cancelled"
    assert get(served, f"{known}/cancel", "POST").json["status"] == "cancelled"


async def _reply(call):
    import json

    return json.loads(await call.rest())


def test_cancel_of_a_response_that_has_ended_changes_nothing(served):
    body = send(served).json
    assert get(served, f"{body['id']}/cancel", "POST").json == body


@pytest.mark.parametrize("streams", [True, False])
def test_client_that_leaves_ends_its_generation(served, streams):
    served.says(Answer("yes", reading=60))

    async def leave():
        call = Call(served.app, PATH, {"input": "hi", "stream": streams})
        while not served.backend.running:
            await asyncio.sleep(0)
        call.leave()
        await call.over()

    asyncio.run(leave())
    assert [answer.cancelled.is_set() for answer in served.backend.ended] == [True]
    assert served.serving.responses.running == {}
    assert len(served.serving.responses) == 0


# ---- stored responses ---------------------------------------------------------------------------------------


def test_response_is_stored_unless_the_client_says_no(served):
    kept, other = send(served).json, send(served, store=False).json
    assert get(served, kept["id"]).json == kept
    assert get(served, other["id"]).status == 404


def test_streamed_response_is_stored(served):
    last = stream(served)[-1]["response"]
    assert get(served, last["id"]).json == last


def test_conversation_goes_on_by_id(served):
    first = send(served, input="my name is Alice", instructions="be brief").json
    second = send(served, input="and mine?", previous_response_id=first["id"]).json
    prompt = served.backend.prompts[-1]
    assert [prompt.find(words) > 0 for words in ("Alice", "Hello there", "and mine?")] == [True] * 3
    assert "be brief" not in prompt  # instructions are those of one request
    assert second["previous_response_id"] == first["id"]
    third = send(served, input="so?", previous_response_id=second["id"]).json
    assert third["status"] == "completed"
    assert "Alice" in served.backend.prompts[-1]


def test_item_is_sent_by_reference(served):
    first = send(served).json
    send(served, input=[{"type": "item_reference", "id": first["output"][0]["id"]}, {"role": "user", "content": "go"}])
    assert "Hello there" in served.backend.prompts[-1]


def test_deleted_response_is_gone(served):
    known = send(served).json["id"]
    assert get(served, known, "DELETE").json == {"id": known, "object": "response", "deleted": True}
    assert (get(served, known).status, get(served, known, "DELETE").status) == (404, 404)
    assert send(served, previous_response_id=known).error["code"] == "previous_response_not_found"


def test_forgotten_response_is_not_found(served):
    served.serving.responses = ResponseStore(4000)
    known = [send(served, input="x" * 500).json["id"] for _ in range(4)]
    assert get(served, known[0]).error["code"] == "response_not_found"
    assert get(served, known[-1]).status == 200


def test_stream_of_a_stored_response_is_refused(served):
    known = send(served).json["id"]
    assert get(served, f"{known}?stream=true").error["code"] == "unsupported_parameter"


ITEMS = [{"role": "user", "content": str(n)} for n in range(5)]


@pytest.mark.parametrize(
    ("query", "found", "more"),
    [
        ("", "43210", False),
        ("order=asc", "01234", False),
        ("order=asc&limit=2", "01", True),
        ("order=asc&limit=2&after=FIRST", "12", True),
        ("order=asc&limit=4&after=FIRST", "1234", False),
    ],
)
def test_list_of_the_items(served, query, found, more):
    known = send(served, input=ITEMS).json["id"]
    first = get(served, f"{known}/input_items?order=asc").json["data"][0]["id"]
    page = get(served, f"{known}/input_items?{query.replace('FIRST', first)}").json
    assert ("".join(item["content"] for item in page["data"]), page["has_more"]) == (found, more)
    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
    assert {item["type"] for item in page["data"]} == {"message"}


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "after=nothing"])
def test_list_refuses_what_it_does_not_know(served, query):
    known = send(served).json["id"]
    assert get(served, f"{known}/input_items?{query}").status == 400


@pytest.mark.parametrize(
    ("path", "method"), [("resp_9", "GET"), ("resp_9/input_items", "GET"), ("resp_9/cancel", "POST")]
)
def test_unknown_response(served, path, method):
    assert get(served, path, method).error["code"] == "response_not_found"


def test_count_of_tokens(served):
    body = {"model": "scripted", "input": "hi", "tools": [WEATHER]}
    reply = ask(served.app, f"{PATH}/input_tokens", body)
    send(served, tools=[WEATHER])
    assert reply.json == {"object": "response.input_tokens", "input_tokens": len(served.asked.ids)}
