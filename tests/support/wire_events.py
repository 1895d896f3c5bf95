"""Streams of server-sent events as clients read them, and what is wrong with those of Messages and of Responses.

Each check names a fault. ``tests/serve`` breaks good streams on purpose, and compares with the official clients.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

Json = dict[str, Any]
Named = tuple[str, Json]  # name of the event, and its data


def parse(body: bytes | str) -> list[Named]:
    """Reads a body of events. Comments are left out."""
    text = body.decode() if isinstance(body, bytes) else body
    found = []
    for block in text.split("\n\n"):
        lines = [line.partition(": ") for line in block.split("\n") if line and not line.startswith(":")]
        data = "\n".join(value for name, _, value in lines if name == "data")
        if data:
            found.append((next((value for name, _, value in lines if name == "event"), ""), json.loads(data)))
    return found


def written(events: Sequence[Named]) -> bytes:
    """Writes events as a body."""
    return b"".join(
        (f"event: {name}\n" if name else "").encode() + f"data: {json.dumps(data)}\n\n".encode()
        for name, data in events
    )


# ---- Messages -----------------------------------------------------------------------------------------------

REASONS = {"end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"}
DELTAS = {
    "text": {"text_delta"},
    "thinking": {"thinking_delta", "signature_delta"},
    "tool_use": {"input_json_delta"},
}
BLOCKS = {"text": {"text"}, "thinking": {"thinking", "signature"}, "tool_use": {"id", "name", "input"}}


def faults_of_messages(events: Sequence[Named]) -> list[str]:
    """Says what is wrong with a stream of Messages."""
    return [*_misnamed(events), *_message_faults([data for _, data in events if data["type"] != "ping"])]


def _misnamed(events: Sequence[Named]) -> Iterator[str]:
    for name, data in events:
        if name != data.get("type"):
            yield f"event {name!r} has the type {data.get('type')!r}"


def _message_faults(events: Sequence[Json]) -> Iterator[str]:
    if events and events[-1]["type"] == "error":
        if not isinstance(events[-1].get("error", {}).get("message"), str):
            yield "error without a message"
        return
    kinds = [event["type"] for event in events]
    if kinds[:1] != ["message_start"]:
        yield "no message_start"
    elif not {"input_tokens", "output_tokens"} <= set(events[0]["message"].get("usage") or ()):
        yield "message_start without usage"
    if kinds[-2:] != ["message_delta", "message_stop"]:
        yield "the end is not message_delta and message_stop"
    yield from _block_faults(events)
    for event in events:
        if event["type"] == "message_delta":
            if event["delta"].get("stop_reason") not in REASONS:
                yield "no stop_reason"
            if "output_tokens" not in (event.get("usage") or {}):
                yield "message_delta without usage"


def _block_faults(events: Sequence[Json]) -> Iterator[str]:
    n, block = 0, None
    for event in events:
        kind = event["type"]
        if kind == "content_block_start":
            if block is not None:
                yield "a block begins inside another"
            if event["index"] != n:
                yield f"block {event['index']} follows {n - 1}"
            n, block = n + 1, event["content_block"]
            missing = BLOCKS[block["type"]] - set(block)
            if missing:
                yield f"a block lacks {', '.join(sorted(missing))}"
        elif kind == "content_block_delta":
            if block is None or event["index"] != n - 1:
                yield "a delta outside its block"
            elif event["delta"]["type"] not in DELTAS[block["type"]]:
                yield f"{event['delta']['type']} in {block['type']}"
        elif kind == "content_block_stop":
            if block is None or event["index"] != n - 1:
                yield "a stop outside its block"
            block = None
        elif kind == "message_delta" and block is not None:
            yield "a block without its stop"


# ---- Responses ----------------------------------------------------------------------------------------------

LAST = {"response.completed", "response.incomplete", "response.failed"}
#: The parts of items: events that begin and end one, and those of its text.
PARTS = {
    "response.content_part": ("response.output_text", "response.reasoning_text"),
    "response.reasoning_summary_part": ("response.reasoning_summary_text",),
}
ARGUMENTS = {
    "response.function_call_arguments": "arguments",
    "response.custom_tool_call_input": "input",
}
INSIDE = {*PARTS, *ARGUMENTS, *(text for texts in PARTS.values() for text in texts)}


def faults_of_responses(events: Sequence[Named]) -> list[str]:
    """Says what is wrong with a stream of Responses."""
    return [*_misnamed(events), *_lifecycle_faults([data for _, data in events]), *_Items().faults(events)]


def _lifecycle_faults(events: Sequence[Json]) -> Iterator[str]:
    if [event.get("sequence_number") for event in events] != list(range(len(events))):
        yield "sequence_number does not count from 0"
    kinds = [event["type"] for event in events]
    if kinds[:2] != ["response.created", "response.in_progress"]:
        yield "the beginning is not response.created and response.in_progress"
    if not kinds or kinds[-1] not in LAST or any(kind in LAST for kind in kinds[:-1]):
        yield "the end is not one of response.completed, response.incomplete, response.failed"
        return
    if len({event["response"]["id"] for event in events if "response" in event}) != 1:
        yield "the response changes its id"
    response = events[-1]["response"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    if response["output"] != done:
        yield "the output is not what was written"
    if kinds[-1] == "response.failed":
        if not isinstance((response.get("error") or {}).get("code"), str):
            yield "response.failed without an error"
        return
    usage = response.get("usage") or {}
    for group, name in (("input_tokens_details", "cached_tokens"), ("output_tokens_details", "reasoning_tokens")):
        if name not in usage.get(group, {}):
            yield f"usage without {group}.{name}"


class _Items:
    """Follows the items of a stream."""

    def __init__(self) -> None:
        self.n, self.item = 0, None
        self.part: Json | None = None
        self.text, self.complete = "", False

    def faults(self, events: Sequence[Named]) -> Iterator[str]:
        """Yields what is wrong."""
        for _, event in events:
            kind = event["type"]
            stem, _, verb = kind.rpartition(".")
            if kind == "response.output_item.added":
                yield from self._added(event)
            elif kind == "response.output_item.done":
                yield from self._done(event)
            elif stem in INSIDE:
                yield from self._inside(event, stem, verb)
            elif "response" not in event:
                yield f"{kind} is no event of this API"
        if self.item is not None:
            yield "an item without response.output_item.done"

    def _added(self, event: Json) -> Iterator[str]:
        if self.item is not None:
            yield "an item begins inside another"
        if event.get("output_index") != self.n:
            yield f"output_index {event.get('output_index')} in place of {self.n}"
        self.item, self.part, self.text, self.complete = event["item"], None, "", False
        if event["item"].get("status") != "in_progress":
            yield "an item begins without in_progress"

    def _done(self, event: Json) -> Iterator[str]:
        item, done = self.item, event["item"]
        if item is None or event.get("output_index") != self.n:
            yield "response.output_item.done without its item"
        elif (item["id"], item["type"]) != (done["id"], done["type"]):
            yield "an item changes its id or type"
        if self.part is not None:
            yield "a part without its end"
        if not self.complete:
            yield "a text without its end"
        parts = [*done.get("content", ()), *done.get("summary", ())]
        whole = parts[0]["text"] if parts else done.get("arguments", done.get("input", ""))
        if whole != self.text:
            yield "the item has another text than its deltas"
        self.n, self.item = self.n + 1, None

    def _inside(self, event: Json, stem: str, verb: str) -> Iterator[str]:
        if self.item is None:
            yield f"{event['type']} outside an item"
            return
        if event.get("item_id") != self.item["id"] or event.get("output_index") != self.n:
            yield f"{event['type']} names another item"
        if stem in PARTS:
            place = "summary_index" if "summary" in stem else "content_index"
            if event.get(place) != 0:
                yield f"{event['type']} without {place}"
            if (verb == "added") != (self.part is None):
                yield f"{event['type']} at the wrong place"
            self.part = event["part"] if verb == "added" else None
        elif stem in ARGUMENTS:
            yield from self._text(event, verb, ARGUMENTS[stem])
        else:
            place = "summary_index" if "summary" in stem else "content_index"
            if event.get(place) != 0:
                yield f"{event['type']} without {place}"
            if self.part is None:
                yield f"{event['type']} outside a part"
            yield from self._text(event, verb, "text")

    def _text(self, event: Json, verb: str, field: str) -> Iterator[str]:
        self.complete = verb == "done"
        if verb == "delta":
            self.text += event["delta"]
        elif event.get(field) != self.text:
            yield f"{event['type']} has another text than its deltas"
