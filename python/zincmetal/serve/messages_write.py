"""Events of Anthropic's Messages API, made of a turn's events. A plain reply is these events, collected."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from ..text.tools.events import CallArguments, CallBegin, CallEnd, Event, Reasoning, Text
from .turn import Delta, Ended, Matched, TurnEvent

Json = dict[str, Any]

PING: Json = {"type": "ping"}


class MessageWriter:
    """Writes one answer. Blocks have dense indices, and a block is closed before the next one opens.

    ``n_ctx`` and ``max_tokens`` tell an answer that filled the context from one that reached its own bound.
    """

    def __init__(self, id: str, model: str, n_ctx: int, max_tokens: int | None = None) -> None:
        self.id = id
        self._model, self._n_ctx, self._max_tokens = model, n_ctx, max_tokens
        self._begun = False
        self._index = -1
        self._open = ""  # type of the block that is open
        self._arguments = ""  # of the call that is open, as far as they were sent
        self._usage: Json = {}

    def write(self, event: TurnEvent) -> Iterator[Json]:
        """Yield the wire events of an event."""
        if isinstance(event, Matched):
            yield from self._start(event.prompt, event.cached)
        elif isinstance(event, Delta):
            yield from self._delta(event.event)
        elif isinstance(event, Ended):
            yield from self._end(event)

    # ---- the parts of an answer -----------------------------------------------------------------------------

    def _start(self, prompt: int, cached: int) -> Iterator[Json]:
        self._begun = True
        self._usage = {
            "input_tokens": prompt - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
        }
        message = {"id": self.id, "type": "message", "role": "assistant", "model": self._model, "content": []}
        ends = {"stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": {**message, **ends, "usage": {**self._usage, "output_tokens": 0}}}
        yield PING

    def _delta(self, event: Event) -> Iterator[Json]:
        if isinstance(event, Reasoning):
            if self._open != "thinking":
                yield from self._next({"type": "thinking", "thinking": "", "signature": ""})
            yield self._more({"type": "thinking_delta", "thinking": event.text})
        elif isinstance(event, Text):
            if self._open != "text":
                yield from self._next({"type": "text", "text": ""})
            yield self._more({"type": "text_delta", "text": event.text})
        elif isinstance(event, CallBegin):
            call = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": event.name, "input": {}}
            yield from self._next(call)
            self._arguments = ""
        elif isinstance(event, CallArguments):
            yield from self._more_arguments(event.text)
        elif isinstance(event, CallEnd):
            # Clients join the fragments. What a parser only knew at the end is sent as the last one.
            if event.arguments.startswith(self._arguments):
                yield from self._more_arguments(event.arguments[len(self._arguments) :])
            yield from self._close()

    def _more_arguments(self, text: str) -> Iterator[Json]:
        if text:
            self._arguments += text
            yield self._more({"type": "input_json_delta", "partial_json": text})

    def _end(self, event: Ended) -> Iterator[Json]:
        result = event.result
        if not self._begun:  # cancelled before the cache was asked
            yield from self._start(result.prompt_tokens, result.cache.reused)
        yield from self._close()
        made = {"output_tokens": len(result.tokens), "output_tokens_details": {"thinking_tokens": event.reasoning}}
        delta = {"stop_reason": self._reason(event), "stop_sequence": result.stop_string}
        yield {"type": "message_delta", "delta": delta, "usage": {**self._usage, **made}}
        yield {"type": "message_stop"}

    def _reason(self, event: Ended) -> str:
        result = event.result
        if event.reason == "tool_calls":
            return "tool_use"
        if event.reason == "length":
            own = self._max_tokens is not None and len(result.tokens) >= self._max_tokens
            full = result.prompt_tokens + len(result.tokens) > self._n_ctx
            return "model_context_window_exceeded" if full and not own else "max_tokens"
        return "stop_sequence" if result.stop_string is not None else "end_turn"

    # ---- blocks ---------------------------------------------------------------------------------------------

    def _next(self, block: Json) -> Iterator[Json]:
        """Close the open block, and open another."""
        yield from self._close()
        self._index += 1
        self._open = block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _more(self, delta: Json) -> Json:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[Json]:
        if self._open == "thinking":
            yield self._more({"type": "signature_delta", "signature": ""})
        if self._open:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = ""


def collected(events: Iterable[Json]) -> Json:
    """Return the message that a stream of events describes."""
    message: Json = {}
    pieces: list[str] = []  # of the block that is open
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            message = {**event["message"], "content": []}
        elif kind == "content_block_start":
            message["content"].append(dict(event["content_block"]))
            pieces = []
        elif kind == "content_block_delta":
            pieces.append(event["delta"][_FIELDS[event["delta"]["type"]]])
        elif kind == "content_block_stop":
            _fill(message["content"][-1], "".join(pieces))
        elif kind == "message_delta":
            message |= event["delta"]
            message["usage"] = message["usage"] | event["usage"]
    return message


_FIELDS = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "signature_delta": "signature",
    "input_json_delta": "partial_json",
}


def _fill(block: Json, text: str) -> None:
    if block["type"] == "tool_use":
        block["input"] = _arguments(text)
    else:
        block[block["type"]] = text  # a signature is empty


def _arguments(text: str) -> Any:
    """Return the arguments of a call. Parsers repair them; what is no JSON still has no reason to end an answer."""
    try:
        return json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {"arguments": text}


__all__ = ["PING", "MessageWriter", "collected"]
