"""Items of OpenAI's Responses API as a conversation in the form of the chat API. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .errors import BadRequest, Unsupported
from .wire import Fields, log_once

Json = dict[str, Any]

API = "responses"
CONTENT = "unsupported_content"
NOT_SHOWN = "[{}: not shown, this model reads text only]"
TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
#: Parts that this model cannot read. Left out, they would change the answer.
UNREADABLE = ("input_image", "input_file", "input_audio", "image_url", "computer_screenshot")


def items_of(given: Any) -> list[Json]:
    """Return the items of an ``input``, which may be a text."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    if given is None:
        return []
    if not isinstance(given, list):
        raise BadRequest("input must be a string or a list of items", "input", "invalid_type")
    for at, item in enumerate(given):
        Fields.of(item, f"input[{at}]")
    return given


def messages_of(items: Sequence[Json]) -> list[Json]:
    """Return the messages of a conversation. All that the model said between two others is one answer."""
    messages: list[Json] = []
    answer: _Answer | None = None
    for at, item in enumerate(items):
        fields = Fields(item, f"input[{at}]")
        kind = kind_of(item)
        if kind in _SAID or (kind == "message" and item.get("role") == "assistant"):
            answer = answer or _Answer()
            answer.take(kind, fields)
            continue
        message = _heard(kind, fields)
        if message is None:
            continue
        if answer:
            messages.append(answer.message())
            answer = None
        messages.append(message)
    return [*messages, answer.message()] if answer else messages


def kind_of(item: Json) -> str:
    """Return the type of an item. A message may lack it, and so may a reference."""
    kind = item.get("type") or ("message" if "role" in item else "item_reference" if "id" in item else "")
    return str(kind)


_SAID = ("reasoning", "function_call", "custom_tool_call")


class _Answer:
    """Answer of the model, of the items that it wrote."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[Json] = []

    def take(self, kind: str, fields: Fields) -> None:
        """Take an item."""
        if kind == "message":
            self._texts += _texts(fields, "content")
        elif kind == "reasoning":
            self._thoughts += _texts(fields, "content") or _texts(fields, "summary")
        else:
            self._calls.append(_call(kind, fields))

    def message(self) -> Json:
        """Return the whole."""
        message: Json = {"role": "assistant", "content": "".join(self._texts)}
        if any(self._thoughts):
            message["reasoning_content"] = "".join(self._thoughts)
        if self._calls:
            message["tool_calls"] = self._calls
        return message


def _heard(kind: str, fields: Fields) -> Json | None:
    """Return the message of an item that the model did not write, None if it has no meaning here."""
    if kind == "message":
        role = fields.choice("role", of=("user", "system", "developer", "assistant"), default="user")
        texts = _texts(fields, "content")
        # One part is the same as its text alone: the prompt must not change when a client sends one or the other.
        content = "".join(texts) if len(texts) < 2 else [{"type": "text", "text": text} for text in texts]
        return {"role": role, "content": content}
    if kind in ("function_call_output", "custom_tool_call_output"):
        return {"role": "tool", "tool_call_id": fields.text("call_id"), "content": _output(fields)}
    log_once(API, [kind], "is a kind of item that has no meaning here")
    return None


def _call(kind: str, fields: Fields) -> Json:
    space, name = fields.text("namespace"), fields.text("name")
    if not name:
        raise BadRequest(f"{fields.at('name')} is missing", fields.at("name"), "missing_required_parameter")
    free = kind == "custom_tool_call"
    arguments = json.dumps({"input": fields.text("input")}, ensure_ascii=False) if free else fields.text("arguments")
    seen = f"{space}.{name}" if space else name
    return {
        "id": fields.text("call_id", "id"),
        "type": "function",
        "function": {"name": seen, "arguments": arguments or "{}"},
    }


def _output(fields: Fields) -> str:
    """Return the output of a tool: a text, parts, or (from older clients) an object."""
    value = fields.given("output")
    if isinstance(value, dict):
        content = value.get("content")
        return content if isinstance(content, str) else json.dumps(value, ensure_ascii=False)
    return "\n".join(_texts(fields, "output", NOT_SHOWN))


def _texts(fields: Fields, name: str, unread: str = "") -> list[str]:
    """Return the texts of a field that is a text or a list of parts. ``unread`` stands for what is no text.

    Without it, such a part is refused. In the output of a tool a refusal would be final: the output stays in the
    conversation, so each later request would be refused too.
    """
    value = fields.given(name)
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    parts = [Fields.of(part, f"{fields.at(name)}[{at}]") for at, part in enumerate(fields.items(name) or [])]
    return [_text(part, unread) for part in parts]


def _text(part: Fields, unread: str) -> str:
    kind = part.text("type")
    if kind in TEXTS or (not kind and part.given("text") is not None):
        return part.text("text")
    if kind == "refusal":
        return part.text("refusal")
    if kind in UNREADABLE and unread:
        return unread.format(kind)
    if kind in UNREADABLE:
        raise Unsupported(part.path, f"{part.path}: this model reads text, and no part of type {kind!r}", CONTENT)
    raise BadRequest(f"{part.at('type')}: {kind!r:.60} is no type of a part", part.at("type"))


__all__ = ["items_of", "kind_of", "messages_of"]
