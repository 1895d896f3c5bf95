"""POST /v1/chat/completions, of OpenAI's chat API: streams, and plain replies, which are streams that are collected."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..text.tools.events import CallArguments, CallBegin, CallEnd, Event, Reasoning, Text
from .backend import Backend
from .chat_request import ChatRequest, chat_request
from .figures import fingerprint, timings, timings_so_far, usage
from .prepare import tokens_of
from .reply import Reply
from .serving import Serving
from .tokens import chat_logprobs
from .turn import Delta, Ended, Progress, Turn, opened
from .wire import Json, read_object

#: Reasons of an end as OpenAI's clients know them. A cancelled answer ended early, by its client's own wish.
REASONS = {"cancelled": "stop"}


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    serving: Serving = request.app.state.serving
    asked = chat_request(request, await read_object(request, serving.limits.depth), serving.limits)
    return await _Reply(request, serving, asked).answer(request, asked.stream)


class _Reply(Reply):
    """Reply to one request."""

    def __init__(self, request: Request, serving: Serving, asked: ChatRequest) -> None:
        super().__init__(request, serving, "chatcmpl")
        self._asked = asked

    async def whole(self) -> Json:
        """Return the reply as one object."""
        whole = Collected()
        async with aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                whole.add(chunk)
        return whole.completion()

    async def chunks(self) -> AsyncGenerator[Json, None]:
        """Yield the chunks of the stream, after an empty one."""
        async with opened(self.serving, [self._asked.ask], self.request_id, self.id) as (turn,):
            yield {}
            writer = _Writer(self._asked, turn, self.id)
            async with aclosing(turn.events()) as events:
                async for event in events:
                    if isinstance(event, Ended):
                        self.ended.append(event)
                    for chunk in writer.chunks(event):
                        yield chunk
            if self._asked.usage or not self._asked.stream:
                yield writer.usage_chunk()


class _Writer:
    """Writes the events of a turn as chunks."""

    def __init__(self, asked: ChatRequest, turn: Turn, id: str) -> None:
        self._asked, self._turn = asked, turn
        self._backend: Backend = turn.backend
        card = turn.backend.card
        self._base: Json = {
            "id": id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": card.id,
            "system_fingerprint": fingerprint(card),
        }
        self._extra: Json = {"usage": None} if asked.usage else {}
        self._free = {tool.seen for tool in asked.ask.tools if tool.free}
        self._answers = [_Answer(self._free) for _ in range(asked.ask.n)]

    def chunks(self, event: Any) -> Iterator[Json]:
        """Yield the chunks of an event."""
        if isinstance(event, Delta):
            yield from self._delta(event)
        elif isinstance(event, Ended):
            yield from self._opening(event.choice)
            reason = REASONS.get(event.reason, event.reason)
            if event.choice:
                yield self._choice(event.choice, {}, reason)
            else:
                yield {**self._choice(0, {}, reason), "timings": timings(event.result)}
        elif isinstance(event, Progress) and self._asked.progress:
            told = {"total": event.total, "cache": event.cached, "processed": event.done}
            told["time_ms"] = round(event.seconds * 1000)
            yield {**self._base, "choices": [], "prompt_progress": told, **self._extra}

    def _delta(self, event: Delta) -> Iterator[Json]:
        yield from self._opening(event.choice)
        for delta in self._answers[event.choice].deltas(event.event):
            chunk = self._choice(event.choice, delta)
            if event.logprobs:
                tokenizer = self._backend.text.id_tokenizer
                chunk["choices"][0]["logprobs"] = chat_logprobs(event.logprobs, tokenizer)
            if self._asked.timings:
                chunk["timings"] = timings_so_far(self._turn, event.made)
            yield chunk

    def _opening(self, choice: int) -> Iterator[Json]:
        answer = self._answers[choice]
        if not answer.opened:
            answer.opened = True
            yield self._choice(choice, {"role": "assistant", "content": ""})

    def _choice(self, index: int, delta: Json, reason: str | None = None) -> Json:
        choice: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._base, "choices": [choice], **self._extra}

    def usage_chunk(self) -> Json:
        """Return the chunk after all others."""
        return {**self._base, "choices": [], "usage": usage(self._turn)}


class _Answer:
    """Deltas of one answer. ``free``: names of tools that take a text, whose arguments are sent as a whole."""

    def __init__(self, free: set[str]) -> None:
        self.opened = False
        self._free = free
        self._custom: set[int] = set()
        self._sent: set[int] = set()  # calls of which arguments were sent

    def deltas(self, event: Event) -> Iterator[Json]:
        """Yield the deltas of an event."""
        if isinstance(event, Text):
            yield {"content": event.text}
        elif isinstance(event, Reasoning):
            yield {"reasoning_content": event.text}
        elif isinstance(event, CallBegin):
            yield {"tool_calls": [self._begin(event)]}
        elif isinstance(event, CallArguments) and event.call not in self._custom:
            self._sent.add(event.call)
            yield {"tool_calls": [{"index": event.call, "function": {"arguments": event.text}}]}
        elif isinstance(event, CallEnd) and event.call in self._custom:
            yield {"tool_calls": [{"index": event.call, "custom": {"input": free_input(event.arguments)}}]}
        elif isinstance(event, CallEnd) and event.call not in self._sent:
            yield {"tool_calls": [{"index": event.call, "function": {"arguments": event.arguments}}]}

    def _begin(self, event: CallBegin) -> Json:
        head: Json = {"index": event.call, "id": f"call_{uuid.uuid4().hex[:24]}"}
        if event.name in self._free:
            self._custom.add(event.call)
            return {**head, "type": "custom", "custom": {"name": event.name, "input": ""}}
        return {**head, "type": "function", "function": {"name": event.name, "arguments": ""}}


def free_input(arguments: str) -> str:
    """Return the text that a tool of free text gets, which the model wrote as a JSON object with ``input``."""
    try:
        return str(msgspec.json.decode(arguments)["input"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return arguments


class Collected:
    """Chunks of a stream, put together to one object."""

    def __init__(self) -> None:
        self._whole: Json = {}
        self._choices: dict[int, Json] = {}

    def add(self, chunk: Json) -> None:
        """Take a chunk."""
        self._whole.update((k, v) for k, v in chunk.items() if k != "choices" and v is not None)
        for part in chunk.get("choices", ()):
            choice = self._choices.setdefault(part["index"], _empty_choice(part["index"]))
            _join(choice["message"], part["delta"])
            choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
            if part["logprobs"]:
                if choice["logprobs"] is None:
                    choice["logprobs"] = {"content": [], "refusal": None}
                choice["logprobs"]["content"] += part["logprobs"]["content"]

    def completion(self) -> Json:
        """Return the whole."""
        choices = [self._choices[i] for i in sorted(self._choices)]
        for choice in choices:
            message = choice["message"]
            if message.get("tool_calls") and not message["content"]:
                message["content"] = None
        whole = {**self._whole, "object": "chat.completion", "choices": choices}
        whole.pop("prompt_progress", None)
        return whole


def _empty_choice(index: int) -> Json:
    message = {"role": "assistant", "content": "", "refusal": None}
    return {"index": index, "message": message, "logprobs": None, "finish_reason": None}


def _join(message: Json, delta: Json) -> None:
    """Add a delta to a message."""
    for name in ("content", "reasoning_content"):
        if delta.get(name):
            message[name] = message.get(name, "") + delta[name]
    for call in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if call["index"] == len(calls):
            calls.append({k: (dict(v) if isinstance(v, dict) else v) for k, v in call.items() if k != "index"})
            continue
        known = calls[call["index"]]
        for kind, name in (("function", "arguments"), ("custom", "input")):
            if kind in call:
                known[kind][name] += call[kind][name]


async def input_tokens(request: Request) -> Response:
    """Count the tokens of a conversation's prompt. It waits for no generation."""
    serving: Serving = request.app.state.serving
    asked = chat_request(request, await read_object(request, serving.limits.depth), serving.limits)
    text = await serving.models.text_of(asked.ask.model)
    ids = await tokens_of(asked.ask, text)
    return Response(msgspec.json.encode({"input_tokens": len(ids)}), media_type="application/json")


routes = [
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/chat/completions/input_tokens", input_tokens, methods=["POST"]),
]
