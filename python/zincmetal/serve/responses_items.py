"""Items of a response's output, each with the events that tell of it.

An item begins, grows, and ends. Its events have no ``sequence_number`` yet.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from .ask import Tool

Json = dict[str, Any]


class Item(Protocol):
    """Item that is being written. ``item`` is as far as it is known."""

    item: Json

    def begin(self) -> Iterator[Json]:
        """Yield the first events."""

    def more(self, text: str, logprobs: Sequence[Json] = ()) -> Iterator[Json]:
        """Yield the events of more text."""

    def end(self, status: str) -> Iterator[Json]:
        """Yield the last events. ``status``: "completed", or "incomplete" for an item that was cut."""


class Form(NamedTuple):
    """Form of an item whose text is one part.

    ``field`` of the item has its parts. Events name their part by ``place``, and begin with ``part_event`` or
    ``text_event``.
    """

    type: str
    prefix: str  # of the item's id
    fields: Json
    field: str
    part: str
    place: str
    part_event: str
    text_event: str


MESSAGE = Form(
    "message",
    "msg",
    {"role": "assistant", "content": []},
    "content",
    "output_text",
    "content_index",
    "response.content_part",
    "response.output_text",
)
REASONING = Form(
    "reasoning",
    "rs",
    {"summary": [], "content": []},
    "content",
    "reasoning_text",
    "content_index",
    "response.content_part",
    "response.reasoning_text",
)
#: Codex and others show summaries alone: the text is then sent as its own summary.
SUMMARY = Form(
    "reasoning",
    "rs",
    {"summary": []},
    "summary",
    "summary_text",
    "summary_index",
    "response.reasoning_summary_part",
    "response.reasoning_summary_text",
)


class Passage:
    """Message or reasoning: an item with one text."""

    def __init__(self, form: Form, index: int) -> None:
        self.form = form
        self.item: Json = {"type": form.type, "id": new_id(form.prefix), **form.fields, "status": "in_progress"}
        self._at = {"item_id": self.item["id"], "output_index": index, form.place: 0}
        self._pieces: list[str] = []
        self._logprobs: list[Json] = []

    def begin(self) -> Iterator[Json]:
        """Yield the first events."""
        yield {"type": "response.output_item.added", "output_index": self._at["output_index"], "item": dict(self.item)}
        yield {"type": f"{self.form.part_event}.added", **self._at, "part": self._part("", [])}

    def more(self, text: str, logprobs: Sequence[Json] = ()) -> Iterator[Json]:
        """Yield the events of more text."""
        self._pieces.append(text)
        self._logprobs += logprobs
        yield {"type": f"{self.form.text_event}.delta", **self._at, "delta": text, **self._beside(list(logprobs))}

    def end(self, status: str) -> Iterator[Json]:
        """Yield the last events."""
        text = "".join(self._pieces)
        part = self._part(text, self._logprobs)
        self.item = {**self.item, self.form.field: [part], "status": status}
        yield {"type": f"{self.form.text_event}.done", **self._at, "text": text, **self._beside(self._logprobs)}
        yield {"type": f"{self.form.part_event}.done", **self._at, "part": part}
        yield {"type": "response.output_item.done", "output_index": self._at["output_index"], "item": self.item}

    def _part(self, text: str, logprobs: list[Json]) -> Json:
        noted: Json = {"annotations": []} if self.form is MESSAGE else {}
        return {"type": self.form.part, "text": text, **noted, **self._beside(logprobs)}

    def _beside(self, logprobs: list[Json]) -> Json:
        return {"logprobs": logprobs} if self.form is MESSAGE else {}


class Call:
    """Call of a function: the client gets its arguments as they come."""

    FIELD, EVENT = "arguments", "response.function_call_arguments"

    def __init__(self, tool: Tool, index: int) -> None:
        space = {"namespace": tool.space} if tool.space else {}
        names = {"call_id": new_id("call"), "name": tool.name, **space}
        kind, prefix = ("custom_tool_call", "ctc") if tool.free else ("function_call", "fc")
        self.item: Json = {
            "type": kind,
            "id": new_id(prefix),
            **names,
            self.FIELD: "",
            "status": "in_progress",
        }
        self._index = index
        self._sent = ""

    def begin(self) -> Iterator[Json]:
        """Yield the first events."""
        yield {"type": "response.output_item.added", "output_index": self._index, "item": dict(self.item)}

    def more(self, text: str, logprobs: Sequence[Json] = ()) -> Iterator[Json]:
        """Yield the events of more arguments."""
        if text:
            self._sent += text
            yield {"type": f"{self.EVENT}.delta", **self._at(), "delta": text}

    def whole(self, arguments: str) -> Iterator[Json]:
        """Yield what is missing of the whole arguments. Clients join the fragments."""
        if arguments.startswith(self._sent):
            yield from self.more(arguments[len(self._sent) :])

    def end(self, status: str) -> Iterator[Json]:
        """Yield the last events."""
        text = self._shown()
        self.item = {**self.item, self.FIELD: text, "status": status}
        named = {"name": self.item["name"]} if self.FIELD == "arguments" else {}
        yield {"type": f"{self.EVENT}.done", **self._at(), self.FIELD: text, **named}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.item}

    def _at(self) -> Json:
        return {"item_id": self.item["id"], "output_index": self._index}

    def _shown(self) -> str:
        return self._sent


class FreeCall(Call):
    """Call of a tool that takes a text. The model writes ``{"input": …}``; the client gets the text, at the end."""

    FIELD, EVENT = "input", "response.custom_tool_call_input"

    def more(self, text: str, logprobs: Sequence[Json] = ()) -> Iterator[Json]:
        """Keep more arguments: the text inside is known when they are complete."""
        self._sent += text
        yield from ()

    def end(self, status: str) -> Iterator[Json]:
        """Yield the last events, and the text before them."""
        yield {"type": f"{self.EVENT}.delta", **self._at(), "delta": self._shown()}
        yield from super().end(status)

    def _shown(self) -> str:
        try:
            found = json.loads(self._sent)["input"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return self._sent
        return found if isinstance(found, str) else self._sent


def new_id(prefix: str) -> str:
    """Return a new id, which nobody can guess."""
    return f"{prefix}_{uuid.uuid4().hex}"


__all__ = ["MESSAGE", "REASONING", "SUMMARY", "Call", "Form", "FreeCall", "Item", "Passage", "new_id"]
