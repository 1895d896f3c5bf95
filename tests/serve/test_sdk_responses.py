"""OpenAI's Python client on the streams of /v1/responses, and what it makes of streams that are broken on purpose.

At the end: what the Open Responses suite checks.
"""

from __future__ import annotations

import asyncio
import copy

import httpx2
import openai
import pydantic
import pytest

from support.loopback import loopback
from support.scripted import Reply as Answer
from support.served import Served
from support.streams import ask
from support.wire_events import faults_of_responses, parse, written
from zincmetal.errors import DeviceError, QueueFullError

PATH = "/v1/responses"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "name": "weather", "description": "d", "parameters": SCHEMA, "strict": True}]
PATCH = {"type": "custom", "name": "apply_patch", "description": "d"}
ASKED = {"model": "scripted", "input": "hi"}


def client(served: Served) -> openai.AsyncOpenAI:
    transport = httpx2.ASGITransport(served.app)
    return openai.AsyncOpenAI(
        api_key="x", base_url="http://localhost/v1", max_retries=0, http_client=httpx2.AsyncClient(transport=transport)
    )


async def plain(asked, **fields):
    return await asked.responses.create(**{**ASKED, **fields})


async def raw(asked, **fields):
    """Takes the response of the last event, and checks that the items came one by one."""
    items, response = [], None
    async for event in await asked.responses.create(**{**ASKED, **fields}, stream=True):
        if event.type == "response.output_item.done":
            items.append(event.item)
        elif event.type in ("response.completed", "response.incomplete", "response.failed"):
            response = event.response
    assert response is not None
    assert [item.to_dict() for item in items] == [item.to_dict() for item in response.output]
    return response


async def helper(asked, **fields):
    async with asked.responses.stream(**{**ASKED, **fields}) as stream:
        return await stream.get_final_response()


WAYS = [plain, raw, helper]


def said(response):
    """What a response says, item by item."""
    found = []
    for item in response.output:
        if item.type == "message":
            found.append(("message", item.content[0].text))
        elif item.type == "reasoning":
            found.append(("reasoning", (item.content or item.summary)[0].text))
        elif item.type == "custom_tool_call":
            found.append((item.name, item.input))
        else:
            found.append((item.name, item.arguments))
    return found


KINDS = {
    "text": ("say Hello", {}, [("message", "Hello")]),
    "reasoning": ("think hm\nsay Hello", {}, [("reasoning", "hm"), ("message", "Hello")]),
    "summary": (
        "think hm\nsay Hello",
        {"reasoning": {"summary": "auto"}},
        [("reasoning", "hm"), ("message", "Hello")],
    ),
    "one tool": (
        'call weather\nargs {"city":\nargs "Bonn"}\nend {"city":"Bonn"}',
        {"tools": TOOLS},
        [("weather", '{"city":"Bonn"}')],
    ),
    "parallel tools": (
        'say I look.\ncall weather\nend {"city":"Bonn"}\ncall weather\nend {"city":"Ulm"}',
        {"tools": TOOLS, "tool_choice": "required"},
        [("message", "I look."), ("weather", '{"city":"Bonn"}'), ("weather", '{"city":"Ulm"}')],
    ),
    "tool that takes a text": (
        'call apply_patch\nend {"input":"*** Begin"}',
        {"tools": [PATCH]},
        [("apply_patch", "*** Begin")],
    ),
    "stop string": ("say Hello\nEND more", {"extra_body": {"stop": ["END"]}}, [("message", "Hello")]),
    "nothing": ("", {}, []),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_response(served, lines, name, way):
    script, fields, wanted = KINDS[name]
    served.says(script)
    response = asyncio.run(way(client(served), **fields))
    assert said(response) == wanted
    assert (response.status, response.model, response.error) == ("completed", "scripted", None)
    assert response.usage.input_tokens == len(served.asked.ids)
    assert response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens


@pytest.mark.parametrize("way", [plain, raw])
def test_length(served, lines, way):
    served.says(Answer("say Hello", reason="length"))
    response = asyncio.run(way(client(served)))
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert said(response) == [("message", "Hello")]


class City(pydantic.BaseModel):
    city: str


def test_parse(served):
    served.says('{"city": "Bonn"}')

    async def parsed():
        return await client(served).responses.parse(**ASKED, text_format=City)

    assert asyncio.run(parsed()).output_parsed == City(city="Bonn")
    assert "city" in served.asked.grammar.lark


def test_helper_parses_text_and_arguments(served, lines):
    served.says('say {"city": "Bonn"}\ncall City\nargs {"city":\nend {"city":"Ulm"}')
    fields = {"text_format": City, "tools": [openai.pydantic_function_tool(City)]}
    response = asyncio.run(helper(client(served), **fields))
    assert response.output_parsed == City(city="Bonn")
    assert response.output[1].parsed_arguments == City(city="Ulm")


def test_helper_streams_its_text(served):
    async def streamed():
        async with client(served).responses.stream(**ASKED) as stream:
            return [event.snapshot async for event in stream if event.type == "response.output_text.delta"]

    assert asyncio.run(streamed())[-1] == "Hello there"


def test_tool_loop(served, lines):
    """What the client got goes back as it came, with the output of the tool."""
    replies = iter(['think hm\nsay I look.\ncall weather\nend {"city":"Bonn"}', "say warm"])
    served.says(lambda prompt, asked: next(replies))

    async def loop():
        asked = client(served)
        first = await helper(asked, tools=TOOLS)
        given = [{"role": "user", "content": "hi"}, *(item.to_dict() for item in first.output)]
        output = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "22 °C"}
        return await helper(asked, tools=TOOLS, input=[*given, output])

    assert asyncio.run(loop()).output_text == "warm"
    assert "22 °C" in served.backend.prompts[-1]


def test_stored_responses(served):
    async def stored():
        asked = client(served)
        first = await plain(asked, input="my name is Alice")
        second = await raw(asked, previous_response_id=first.id)
        again = await asked.responses.retrieve(second.id)
        items = await asked.responses.input_items.list(first.id)
        count = await asked.responses.input_tokens.count(**ASKED)
        await asked.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await asked.responses.retrieve(first.id)
        ended = await asked.responses.cancel(second.id)
        return second, again, items, count, ended

    second, again, items, count, ended = asyncio.run(stored())
    assert "Alice" in served.backend.prompts[-1]
    assert again.to_dict() == second.to_dict() == ended.to_dict()
    assert items.data[0].content[0].text == "my name is Alice"
    assert count.input_tokens > 0


# ---- errors, cancel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_refusals(served, way):
    served.backend.refusal = QueueFullError("16 wait")
    with pytest.raises(openai.InternalServerError) as found:
        asyncio.run(way(client(served)))
    assert (found.value.status_code, found.value.code) == (503, "queue_full")
    with pytest.raises(openai.BadRequestError) as long:
        asyncio.run(way(client(served), input="x" * 5000))
    assert long.value.code == "context_length_exceeded"


def test_error_in_the_middle(served, lines):
    served.says(Answer("say Hello\nsay there", error=DeviceError("the device is lost"), error_after=12))
    response = asyncio.run(raw(client(served)))
    assert (response.status, response.error.code, response.error.message) == (
        "failed",
        "server_error",
        "the device is lost",
    )
    with pytest.raises(RuntimeError, match="completed"):
        asyncio.run(helper(client(served)))


async def leave_stream(asked, served):
    async with asked.responses.stream(**ASKED) as stream:
        async for event in stream:
            if event.type == "response.output_text.delta":
                return served.backend.running[0]


async def cancel_by_id(asked, served):
    async for event in await asked.responses.create(**ASKED, stream=True):
        if event.type == "response.created":
            running = served.backend.running[0] if served.backend.running else None
            assert (await asked.responses.cancel(event.response.id)).status == "cancelled"
        last = event
    assert last.response.status == "cancelled"
    return running or served.backend.ended[0]


@pytest.mark.parametrize("end", [leave_stream, cancel_by_id])
def test_cancel(served, end):
    """Over a real connection."""
    served.says(Answer("x" * 3000, delay=0.01))

    async def left():
        async with loopback(served.app) as url:
            async with openai.AsyncOpenAI(api_key="x", base_url=url + "/v1", max_retries=0) as asked:
                running = await end(asked, served)
            await asyncio.wait_for(running.cancelled.wait(), 30)

    asyncio.run(left())
    assert len(served.backend.ended) == 1


# ---- streams that are broken on purpose ---------------------------------------------------------------------


def without(*kinds):
    return lambda events: [event for event in events if event[0] not in kinds]


def lacking(*names):
    return lambda events: [(name, {k: v for k, v in data.items() if k not in names}) for name, data in events]


def at_the_end(change):
    def mutation(events):
        change(events[-1][1]["response"])
        return events

    return mutation


def no_details(response):
    response["usage"].pop("input_tokens_details"), response["usage"].pop("output_tokens_details")


def incomplete(events):
    events[-1][1]["response"] |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return [*events[:-1], ("response.incomplete", {**events[-1][1], "type": "response.incomplete"})]


def erring(events):
    return [*events[:8], ("error", {"type": "error", "code": "x", "message": "m", "param": None})]


def alive(events):
    return [*events[:2], *(("response.in_progress", copy.deepcopy(events[1][1])) for _ in range(3)), *events[2:]]


DELTAS = ("response.output_text.delta", "response.function_call_arguments.delta", "response.reasoning_text.delta")
DONES = ("response.output_text.done", "response.function_call_arguments.done")

#: What is changed, what the raw stream and the helper make of it, and whether it breaks our contract.
MATRIX = {
    "golden": (lambda events: events, None, None, False),
    "no sequence_number": (lacking("sequence_number"), None, None, True),
    "no output_index": (lacking("output_index"), None, RuntimeError, True),
    "no content_index": (lacking("content_index"), None, TypeError, True),
    "no item_id": (lacking("item_id"), None, None, True),
    "no output_item.added": (without("response.output_item.added"), None, RuntimeError, True),
    "no content_part.added": (without("response.content_part.added"), None, IndexError, True),
    "no response.created": (without("response.created"), None, RuntimeError, True),
    "no response.in_progress": (without("response.in_progress"), None, None, True),
    "no deltas": (without(*DELTAS), None, None, True),
    "no output_item.done": (without("response.output_item.done"), None, None, True),
    "no done of texts": (without(*DONES), None, None, True),
    "no response.completed": (without("response.completed"), None, RuntimeError, True),
    "ends incomplete": (incomplete, None, RuntimeError, False),
    "no usage": (at_the_end(lambda response: response.pop("usage")), None, None, True),
    "usage without details": (at_the_end(no_details), None, None, True),
    "usage with empty details": (
        at_the_end(lambda response: response["usage"].update(input_tokens_details={})),
        None,
        None,
        True,
    ),
    "no names": (lambda events: [("", data) for _, data in events], None, None, True),
    "an error in the middle": (erring, None, RuntimeError, True),
    "an unknown event": (lambda events: [*events[:4], ("x.y", {"type": "x.y"}), *events[4:]], None, None, True),
    "signs of life": (alive, None, None, False),
}


@pytest.fixture
def golden(served, lines):
    served.says('think hm\nsay I look.\ncall weather\nargs {"city":\nend {"city":"Bonn"}')
    return parse(ask(served.app, PATH, {**ASKED, "tools": TOOLS, "stream": True}).body)


def replayed(body: bytes) -> openai.OpenAI:
    """Makes a client of a server that sends these bytes."""
    headers = {"content-type": "text/event-stream"}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, headers=headers, content=body))
    return openai.OpenAI(
        api_key="x", base_url="http://localhost/v1", max_retries=0, http_client=httpx2.Client(transport=transport)
    )


def outcome(read):
    """Returns the type of the error, None for a good end."""
    try:
        read()
    except Exception as error:
        return type(error)
    return None


def helped(asked):
    with asked.responses.stream(**ASKED) as stream:
        return stream.get_final_response()


@pytest.mark.parametrize("name", MATRIX)
def test_client_and_contract_on_a_broken_stream(golden, name):
    mutation, by_raw, by_helper, breaks = MATRIX[name]
    events = mutation(copy.deepcopy(golden))
    if name != "no sequence_number":  # else a gap in the numbers would tell of each event that lacks
        events = [(named, {**data, "sequence_number": n}) for n, (named, data) in enumerate(events)]
    asked = replayed(written(events))
    assert outcome(lambda: list(asked.responses.create(**ASKED, stream=True))) == by_raw
    assert outcome(lambda: helped(asked)) == by_helper
    assert bool(faults_of_responses(events)) == breaks


@pytest.mark.parametrize("more", [b": comment\n\n", b"data: [DONE]\n\n"])
def test_what_changes_nothing(golden, more):
    assert said(helped(replayed(written(golden) + more)))[-1] == ("weather", '{"city":"Bonn"}')


# ---- what the Open Responses suite checks -------------------------------------------------------------------

#: Fields that its schema of a response demands.
DEMANDED = {
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id"),
    *("instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p"),
    *("presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "user", "usage"),
    *("max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "metadata", "safety_identifier"),
    "prompt_cache_key",
}
NUMBERS = (
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "top_logprobs",
    "temperature",
    "created_at",
    "completed_at",
)
FUNCTION = {"type": "function", "name": "weather", "description": "d", "parameters": SCHEMA}


def user(text):
    return {"type": "message", "role": "user", "content": text}


CASES = {
    "basic response": ("say Ahoy", {"input": [user("Say hello.")]}, "message"),
    "system prompt": (
        "say Ahoy",
        {"input": [{"type": "message", "role": "system", "content": "You are a pirate."}, user("Say hello.")]},
        "message",
    ),
    "tool calling": (
        'call weather\nargs {"city":\nend {"city":"Bonn"}',
        {"input": [user("How is the weather?")], "tools": [FUNCTION]},
        "function_call",
    ),
    "multi-turn": (
        "say Alice",
        {"input": [user("I am Alice."), {"type": "message", "role": "assistant", "content": "Hello!"}, user("Who?")]},
        "message",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("streams", [True, False])
def test_open_responses(served, lines, name, streams):
    script, fields, kind = CASES[name]
    served.says(script)
    reply = ask(served.app, PATH, {"model": "scripted", **fields, "stream": streams})
    assert reply.status == 200
    body = parse(reply.body)[-1][1]["response"] if streams else reply.json
    assert set(body) >= DEMANDED
    assert all(isinstance(body[number], (int, float)) for number in NUMBERS)
    assert (body["status"], body["service_tier"], body["metadata"]) == ("completed", "default", {})
    assert kind in [item["type"] for item in body["output"]]
    assert all({"id", "status"} <= set(item) for item in body["output"])
    assert all({"name", "description", "parameters", "strict"} <= set(tool) for tool in body["tools"])
    if streams:
        assert faults_of_responses(parse(reply.body)) == []


def test_open_responses_of_a_streamed_call(served, lines):
    script, fields, _ = CASES["tool calling"]
    served.says(script)
    events = parse(ask(served.app, PATH, {"model": "scripted", **fields, "stream": True}).body)
    items = [(name, data["item"]["type"]) for name, data in events if name.startswith("response.output_item.")]
    assert items == [("response.output_item.added", "function_call"), ("response.output_item.done", "function_call")]
    names = {name for name, _ in events}
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= names


def test_open_responses_of_an_image(served):
    """This server reads text: it says so, and names the part."""
    image = {"type": "input_image", "image_url": "data:image/png;base64,aaaa"}
    reply = ask(served.app, PATH, {"input": [{"type": "message", "role": "user", "content": [image]}]})
    assert (reply.status, reply.error["code"]) == (400, "unsupported_content")
    assert reply.error["param"] == "input[0].content[0]"
