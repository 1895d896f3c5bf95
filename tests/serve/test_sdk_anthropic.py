"""Anthropic's Python client on the streams of /v1/messages, and what it makes of streams that are broken on purpose."""

from __future__ import annotations

import asyncio
import copy

import anthropic
import httpx2
import pydantic
import pytest

from support.loopback import loopback
from support.scripted import Reply as Answer
from support.served import Served
from support.streams import ask
from support.wire_events import faults_of_messages, parse, written
from zincmetal.errors import DeviceError, QueueFullError

USER = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"name": "weather", "description": "d", "input_schema": SCHEMA}]
ASKED = {"model": "scripted", "max_tokens": 400, "messages": USER}


def client(served: Served) -> anthropic.AsyncAnthropic:
    transport = httpx2.ASGITransport(served.app)
    return anthropic.AsyncAnthropic(
        api_key="x", base_url="http://localhost", max_retries=0, http_client=httpx2.AsyncClient(transport=transport)
    )


async def plain(asked, **fields):
    return await asked.messages.create(**{**ASKED, **fields})


async def raw(asked, **fields):
    """Puts the message together from the events alone, as programs without the helper do."""
    message = None
    async for event in await asked.messages.create(**{**ASKED, **fields}, stream=True):
        if event.type == "message_start":
            message = event.message
        elif event.type == "content_block_start":
            assert event.index == len(message.content)
            message.content.append(event.content_block)
            pieces = []
        elif event.type == "content_block_delta":
            pieces.append(
                getattr(event.delta, event.delta.type.removesuffix("_delta").replace("input_json", "partial_json"))
            )
        elif event.type == "content_block_stop":
            block = message.content[event.index]
            if block.type == "tool_use":
                block.input = pydantic.TypeAdapter(dict).validate_json("".join(pieces))
            else:
                setattr(block, block.type, "".join(pieces))
        elif event.type == "message_delta":
            message.stop_reason, message.stop_sequence = event.delta.stop_reason, event.delta.stop_sequence
    return message


async def helper(asked, **fields):
    async with asked.messages.stream(**{**ASKED, **fields}) as stream:
        return await stream.get_final_message()


async def beta(asked, **fields):
    async with asked.beta.messages.stream(**{**ASKED, **fields}, betas=["interleaved-thinking-2025-05-14"]) as stream:
        return await stream.get_final_message()


WAYS = [plain, raw, helper, beta]
KINDS = {
    "text": ("say Hello", {}, [("text", "Hello")], "end_turn"),
    "reasoning": ("think hm\nsay Hello", {}, [("thinking", "hm"), ("text", "Hello")], "end_turn"),
    "one tool": (
        'call weather\nargs {"city":\nargs "Bonn"}\nend {"city":"Bonn"}',
        {"tools": TOOLS},
        [("tool_use", {"city": "Bonn"})],
        "tool_use",
    ),
    "parallel tools": (
        'say I look.\ncall weather\nend {"city":"Bonn"}\ncall weather\nend {"city":"Ulm"}',
        {"tools": TOOLS, "tool_choice": {"type": "any"}},
        [("text", "I look."), ("tool_use", {"city": "Bonn"}), ("tool_use", {"city": "Ulm"})],
        "tool_use",
    ),
    "length": (Answer("say Hello", reason="length"), {}, [("text", "Hello")], "max_tokens"),
    "stop string": ("say Hello\nEND more", {"stop_sequences": ["END"]}, [("text", "Hello")], "stop_sequence"),
    "nothing": ("", {}, [], "end_turn"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_message(served, lines, name, way):
    script, fields, blocks, reason = KINDS[name]
    served.says(script)
    message = asyncio.run(way(client(served), **fields))
    found = [
        (block.type, getattr(block, "input" if block.type == "tool_use" else block.type)) for block in message.content
    ]
    assert found == blocks
    assert message.stop_reason == reason
    assert message.stop_sequence == ("END" if name == "stop string" else None)
    assert (message.role, message.model, message.usage.input_tokens) == ("assistant", "scripted", len(served.asked.ids))


def test_helper_parses_the_form_of_the_answer(served):
    class City(pydantic.BaseModel):
        city: str

    served.says('{"city": "Bonn"}')

    async def parsed():
        async with client(served).messages.stream(**ASKED, output_format=City) as stream:
            return await stream.get_final_message()

    assert asyncio.run(parsed()).parsed_output == City(city="Bonn")
    assert "city" in served.asked.grammar.lark


def test_helper_streams_its_text(served):
    async def streamed():
        async with client(served).messages.stream(**ASKED) as stream:
            return [text async for text in stream.text_stream]

    assert "".join(asyncio.run(streamed())) == "Hello there"


def test_tool_loop(served, lines):
    """What the client got goes back as it came, with the result of the tool."""
    replies = iter(['think hm\nsay I look.\ncall weather\nend {"city":"Bonn"}', "say warm"])
    served.says(lambda prompt, asked: next(replies))

    async def loop():
        asked = client(served)
        first = await helper(asked, tools=TOOLS)
        call = first.content[-1]
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "22 °C"}
        history = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
        return await helper(asked, tools=TOOLS, messages=history)

    assert asyncio.run(loop()).content[0].text == "warm"
    assert "22 °C" in served.backend.prompts[-1]


def test_tool_runner(served, lines):
    """The client runs the tools itself."""
    replies = iter(['call weather\nargs {"city":\nend {"city":"Bonn"}', "say warm"])
    served.says(lambda prompt, asked: next(replies))

    @anthropic.beta_async_tool
    async def weather(city: str) -> str:
        """Tells the weather.

        Args:
            city: a city
        """
        return f"22 °C in {city}"

    async def run():
        return await client(served).beta.messages.tool_runner(**ASKED, tools=[weather]).until_done()

    assert asyncio.run(run()).content[0].text == "warm"
    assert "22 °C in Bonn" in served.backend.prompts[-1]


def test_count_of_tokens(served):
    async def count():
        return await client(served).messages.count_tokens(model="scripted", messages=USER, system="Be brief.")

    assert asyncio.run(count()).input_tokens > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("refusal", "error", "kind"),
    [
        (QueueFullError("16 wait"), anthropic.APIStatusError, "overloaded_error"),
        (DeviceError("lost"), anthropic.APIStatusError, "overloaded_error"),
    ],
)
def test_refusal(served, way, refusal, error, kind):
    served.backend.refusal = refusal
    with pytest.raises(error) as found:
        asyncio.run(way(client(served)))
    assert (found.value.status_code, found.value.body["error"]["type"]) == (529, kind)
    assert found.value.request_id


@pytest.mark.parametrize("way", WAYS)
def test_prompt_that_is_too_long(served, way):
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 4096 maximum"):
        asyncio.run(way(client(served), messages=[{"role": "user", "content": "x" * 5000}]))


@pytest.mark.parametrize("way", [raw, helper])
def test_error_in_the_middle_is_raised(served, lines, way):
    served.says(Answer("say Hello\nsay there", error=DeviceError("the device is lost"), error_after=12))
    with pytest.raises(anthropic.APIStatusError) as found:
        asyncio.run(way(client(served)))
    assert found.value.body["error"] == {"type": "api_error", "message": "the device is lost"}


async def leave_stream(asked, served):
    async with asked.messages.stream(**{**ASKED, "max_tokens": 3000}) as stream:
        async for _ in stream.text_stream:
            return served.backend.running[0]


async def leave_reply(asked, served):
    task = asyncio.ensure_future(plain(asked))
    while not served.backend.running:
        await asyncio.sleep(0.001)
    task.cancel()
    return served.backend.running[0]


@pytest.mark.parametrize("leave", [leave_stream, leave_reply])
def test_client_that_leaves_cancels(served, leave):
    """Over a real connection: the client closes it in the middle."""
    served.says(Answer("x" * 3000, delay=0.01))

    async def left():
        async with loopback(served.app) as url:
            async with anthropic.AsyncAnthropic(api_key="x", base_url=url, max_retries=0) as asked:
                running = await leave(asked, served)
            await asyncio.wait_for(running.cancelled.wait(), 30)

    asyncio.run(left())
    assert len(served.backend.ended) == 1


# ---- streams that are broken on purpose ---------------------------------------------------------------------


def without(kind):
    return lambda events: [event for event in events if event[0] != kind]


def changed(kind, change):
    """Changes the data of each event of a kind."""

    def mutation(events):
        for name, data in events:
            if name == kind:
                change(data)
        return events

    return mutation


def unsigned(events):
    found = [(n, d) for n, d in events if d.get("delta", {}).get("type") != "signature_delta"]
    return changed("content_block_start", lambda d: d["content_block"].pop("signature", None))(found)


def overlapping(events):
    """All stops stand at the end, as llama-server once had it."""
    stops = [event for event in events if event[0] == "content_block_stop"]
    others = [event for event in events if event[0] != "content_block_stop"]
    return [*others[:-2], *stops, *others[-2:]]


def shifted(events):
    return changed("content_block_start", lambda d: d.update(index=d["index"] * 2))(
        changed("content_block_delta", lambda d: d.update(index=d["index"] * 2))(
            changed("content_block_stop", lambda d: d.update(index=d["index"] * 2))(events)
        )
    )


def failing(kind):
    error = {"type": "error", "error": {"type": kind, "message": "m"}, "request_id": None}
    return lambda events: [*events[:6], ("error", error)]


#: What is changed, what the raw stream and the helper make of it, and whether it breaks our contract.
MATRIX = {
    "golden": (lambda events: events, None, None, False),
    "a call without input": (
        changed("content_block_start", lambda d: d["content_block"].pop("input", None)),
        None,
        None,
        True,
    ),
    "no signature": (unsigned, None, None, True),
    "no usage at the start": (
        changed("message_start", lambda d: d["message"].pop("usage")),
        None,
        AttributeError,
        True,
    ),
    "no usage at the end": (changed("message_delta", lambda d: d.pop("usage")), None, AttributeError, True),
    "no message_stop": (without("message_stop"), None, None, True),
    "no content_block_stop": (without("content_block_stop"), None, None, True),
    "blocks overlap": (overlapping, None, None, True),
    "a gap in index": (shifted, None, IndexError, True),
    "no message_start": (without("message_start"), None, AssertionError, True),
    "no names": (lambda events: [("", data) for _, data in events], "nothing", AssertionError, True),
    "no ping": (without("ping"), None, None, False),
    "pings": (lambda events: [e for event in events for e in (event, ("ping", {"type": "ping"}))], None, None, False),
    "overloaded in the middle": (
        failing("overloaded_error"),
        anthropic.APIStatusError,
        anthropic.APIStatusError,
        False,
    ),
    "an error in the middle": (failing("api_error"), anthropic.APIStatusError, anthropic.APIStatusError, False),
}


@pytest.fixture
def golden(served, lines):
    served.says('think hm\nsay I look.\ncall weather\nargs {"city":\nend {"city":"Bonn"}')
    return parse(ask(served.app, "/v1/messages", {**ASKED, "tools": TOOLS, "stream": True}).body)


def replayed(body: bytes) -> anthropic.Anthropic:
    """Makes a client of a server that sends these bytes."""
    headers = {"content-type": "text/event-stream"}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, headers=headers, content=body))
    return anthropic.Anthropic(
        api_key="x", base_url="http://localhost", max_retries=0, http_client=httpx2.Client(transport=transport)
    )


def outcome(read):
    """Returns the type of the error, None for a good end, "nothing" for a stream without events."""
    try:
        return None if read() else "nothing"
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", MATRIX)
def test_client_and_contract_on_a_broken_stream(golden, name):
    mutation, by_raw, by_helper, breaks = MATRIX[name]
    events = mutation(copy.deepcopy(golden))
    asked = replayed(written(events))

    def helped():
        with asked.messages.stream(**ASKED) as stream:
            return stream.get_final_message()

    assert_same(outcome(lambda: list(asked.messages.create(**ASKED, stream=True))), by_raw)
    assert_same(outcome(helped), by_helper)
    assert bool(faults_of_messages(events)) == breaks


def assert_same(found, wanted):
    assert found == wanted or (isinstance(wanted, type) and isinstance(found, type) and issubclass(found, wanted))


def test_comments_change_nothing(golden):
    body = written(golden).replace(b"\n\nevent", b"\n\n: comment\n\nevent")
    with replayed(body).messages.stream(**ASKED) as stream:
        assert stream.get_final_message().content[-1].input == {"city": "Bonn"}
