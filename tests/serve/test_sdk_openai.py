"""OpenAI's own client against the server, and against replies with one fault each: what it checks, it checks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion import Completion

from support.scripted import Reply as Answer
from support.served import USER, Served
from support.streams import events_of
from zincmetal.errors import DeviceError, QueueFullError

App = Callable[[Any, Any, Any], Awaitable[None]]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "f",
        "strict": True,
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False},
    },
}
CALL = 'say look\ncall f\nargs {"a"\nargs : 1}\nend {"a": 1}\n'


def client_of(app: App, **keys: Any) -> AsyncOpenAI:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
    return AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, **{"max_retries": 0, **keys})


def with_client(app: App, use: Callable[[AsyncOpenAI], Awaitable[Any]], **keys: Any) -> Any:
    async def main() -> Any:
        async with client_of(app, **keys) as client:
            return await use(client)

    return asyncio.run(main())


# ---- streams ------------------------------------------------------------------------------------------------------


async def raw(client: AsyncOpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    """Reads ``create(stream=True)``."""
    stream = await client.chat.completions.create(model="scripted", messages=USER, stream=True, **fields)  # type: ignore[call-overload]
    return [chunk async for chunk in stream]


async def helped(client: AsyncOpenAI, **fields: Any) -> tuple[list[Any], ChatCompletion]:
    """Reads ``chat.completions.stream()``, which puts the chunks together and checks them."""
    async with client.chat.completions.stream(model="scripted", messages=USER, **fields) as stream:  # type: ignore[arg-type]
        events = [event async for event in stream]
        return events, await stream.get_final_completion()


def test_text(served: Served) -> None:
    chunks = with_client(served.app, raw)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello there"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_text_by_the_helper(served: Served) -> None:
    events, whole = with_client(served.app, helped)
    assert whole.choices[0].message.content == "Hello there"
    assert "content.done" in [event.type for event in events]
    assert "".join(event.delta for event in events if event.type == "content.delta") == "Hello there"


@pytest.mark.usefixtures("lines")
def test_reasoning(served: Served) -> None:
    served.says("think why\nsay so\n")
    chunks = with_client(served.app, raw)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.reasoning_content for delta in deltas if getattr(delta, "reasoning_content", None)] == ["why"]
    _, whole = with_client(served.app, helped)
    assert whole.choices[0].message.content == "so"


@pytest.mark.usefixtures("lines")
def test_a_call_by_the_helper(served: Served) -> None:
    events, whole = with_client(served.says(CALL).app, lambda client: helped(client, tools=[TOOL]))
    (choice,) = whole.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", "f", '{"a": 1}')
    assert call.function.parsed_arguments == {"a": 1}
    assert call.id.startswith("call_")
    assert choice.message.content == "look"
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.name, event.parsed_arguments) for event in done] == [("f", {"a": 1})]


@pytest.mark.usefixtures("lines")
def test_parallel_calls_by_the_helper(served: Served) -> None:
    served.says('call f\nargs {"a": 1}\nend {"a": 1}\ncall f\nargs {"a": 2}\nend {"a": 2}\n')
    _, whole = with_client(served.app, lambda client: helped(client, tools=[TOOL]))
    calls = whole.choices[0].message.tool_calls
    assert [call.function.parsed_arguments for call in calls] == [{"a": 1}, {"a": 2}]
    assert calls[0].id != calls[1].id


def test_a_schema_by_the_helper(served: Served) -> None:
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int

    served.says('{"x": 3}')
    _, whole = with_client(served.app, lambda client: helped(client, response_format=Point))
    assert whole.choices[0].message.parsed == Point(x=3)
    assert '"x"' in served.asked.grammar.lark


def test_length_is_an_error_of_the_helper(served: Served) -> None:
    """As it is with OpenAI's own servers: for schemas and strict tools only."""
    with pytest.raises(openai.LengthFinishReasonError):
        with_client(served.app, lambda client: helped(client, max_tokens=2, tools=[TOOL]))


def test_many_answers_by_the_helper(served: Served) -> None:
    _, whole = with_client(served.app, lambda client: helped(client, n=2))
    assert [choice.message.content for choice in whole.choices] == ["Hello there"] * 2


def test_usage_by_the_helper(served: Served) -> None:
    served.says(Answer("Hi", reused=9))
    _, whole = with_client(served.app, lambda client: helped(client, stream_options={"include_usage": True}))
    assert whole.usage.prompt_tokens_details.cached_tokens == 9
    assert whole.usage.completion_tokens_details.reasoning_tokens == 0
    assert whole.usage.total_tokens == 24


def test_logprobs_by_the_helper(served: Served) -> None:
    events, whole = with_client(served.app, lambda client: helped(client, logprobs=True, top_logprobs=1))
    content = whole.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == "Hello there"
    assert content[0].bytes == [72]
    assert any(event.type == "logprobs.content.delta" for event in events)


def test_progress_does_not_disturb_the_helper(served: Served) -> None:
    _, whole = with_client(served.app, lambda client: helped(client, extra_body={"return_progress": True}))
    assert whole.choices[0].message.content == "Hello there"


def test_an_error_in_the_middle_is_raised(served: Served) -> None:
    served.says(Answer("Hello", error=DeviceError("the device failed"), error_after=2))
    for use in (raw, helped):
        with pytest.raises(openai.APIError, match="the device failed"):
            with_client(served.app, use)


# ---- plain replies and errors -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("lines")
def test_a_plain_reply(served: Served) -> None:
    async def use(client: AsyncOpenAI) -> ChatCompletion:
        return await client.chat.completions.create(model="scripted", messages=USER, tools=[TOOL])  # type: ignore[arg-type]

    whole = with_client(served.says(CALL).app, use)
    ChatCompletion.model_validate(whole.model_dump())
    assert whole.choices[0].message.tool_calls[0].function.arguments == '{"a": 1}'
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 50


def test_parse_gives_the_object(served: Served) -> None:
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int

    async def use(client: AsyncOpenAI) -> Any:
        return await client.chat.completions.parse(model="scripted", messages=USER, response_format=Point)  # type: ignore[arg-type]

    assert with_client(served.says('{"x": 3}').app, use).choices[0].message.parsed == Point(x=3)


@pytest.mark.parametrize("stream", [True, False])
def test_completions(served: Served, stream: bool) -> None:
    async def use(client: AsyncOpenAI) -> Any:
        found = await client.completions.create(model="scripted", prompt=["a", "b"], logprobs=1, stream=stream)  # type: ignore[call-overload]
        return [chunk async for chunk in found] if stream else found

    found = with_client(served.says("Hi").app, use)
    if stream:
        texts = ["", ""]
        for chunk in found:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == ["Hi", "Hi"]
    else:
        Completion.model_validate(found.model_dump())
        assert [(c.index, c.text, c.logprobs.tokens[:2]) for c in found.choices] == [
            (0, "Hi", ["H", "i"]),
            (1, "Hi", ["H", "i"]),
        ]


def test_models(served: Served) -> None:
    async def use(client: AsyncOpenAI) -> list[Any]:
        return [*(await client.models.list()).data, await client.models.retrieve("scripted")]

    for model in with_client(served.app, use):
        assert (model.id, model.object, model.owned_by) == ("scripted", "model", "zincmetal")
        assert type(model.created) is int
        assert model.max_model_len == 4096


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"temperature": -1}, openai.BadRequestError, "invalid_value"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.BadRequestError, "context_length_exceeded"),
        ({"model": "nope"}, openai.NotFoundError, "model_not_found"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_errors_have_their_types(
    served: Served, fields: dict[str, Any], error: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    async def use(client: AsyncOpenAI) -> Any:
        given = {"model": "scripted", "messages": USER, "stream": stream, **fields}
        return await client.chat.completions.create(**given)

    with pytest.raises(error) as caught:
        with_client(served.app, use)
    assert caught.value.code == code
    assert caught.value.request_id


def test_a_full_queue_is_asked_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits as long as the server says, and then its request succeeds."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        served.backend.refusal = None

    monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)
    served.backend.refusal = QueueFullError("full")
    chunks = with_client(served.app, raw, max_retries=2)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert waits == [2.0]


# ---- the checks bite ----------------------------------------------------------------------------------------------


class Altered:
    """App whose stream of data is altered: a function takes each chunk, and returns it, another, or None to drop it."""

    def __init__(self, app: App, alter: Callable[[Any], Any]) -> None:
        self._app, self._alter = app, alter

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def altered(message: Any) -> None:
            if message["type"] == "http.response.body" and message.get("body"):
                data = [self._alter(event.data) for event in events_of(message["body"])]
                kept = [item if isinstance(item, str) else json.dumps(item) for item in data if item is not None]
                message = {**message, "body": "".join(f"data: {item}\n\n" for item in kept).encode()}
            await send(message)

        await self._app(scope, receive, altered)


def without(chunk: Any, *path: Any) -> Any:
    """Deletes a key of a chunk, wherever the path leads there."""
    if isinstance(chunk, dict) and len(path) == 1:
        chunk.pop(path[0], None)
    elif isinstance(chunk, dict) and path[0] in chunk:
        without(chunk[path[0]], *path[1:])
    elif isinstance(chunk, list):
        for item in chunk:
            without(item, *path)
    return chunk


CALLS = ("choices", "delta", "tool_calls")


@pytest.mark.parametrize(
    ("alter", "fails"),
    [
        (lambda chunk: chunk, None),
        (lambda chunk: without(chunk, *CALLS, "index"), TypeError),
        (lambda chunk: without(chunk, "object"), AssertionError),
        (lambda chunk: without(chunk, *CALLS, "id"), AssertionError),
        (lambda chunk: without(chunk, *CALLS, "type"), AssertionError),
        (lambda chunk: without(chunk, *CALLS, "function", "name"), AssertionError),
        (lambda chunk: without(chunk, "choices", "finish_reason"), AssertionError),
        (lambda chunk: None if "tool_calls" in json.dumps(chunk) else chunk, AssertionError),
        (lambda chunk: None if chunk == "[DONE]" else chunk, None),  # the client does not need it
    ],
    ids=["golden", "no index", "no object", "no id", "no type", "no name", "no reason", "no calls", "no [DONE]"],
)
@pytest.mark.usefixtures("lines")
def test_the_check_of_calls_sees_a_fault(
    served: Served, alter: Callable[[Any], Any], fails: type[BaseException] | None
) -> None:
    app = Altered(served.says(CALL).app, alter)

    def check() -> None:
        _, whole = with_client(app, lambda client: helped(client, tools=[TOOL]))
        (choice,) = whole.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls
        (call,) = choice.message.tool_calls
        assert call.id
        assert call.function.name == "f"
        assert call.function.parsed_arguments == {"a": 1}

    if fails is None:
        check()
    else:
        with pytest.raises(fails):
            check()
