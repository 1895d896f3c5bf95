"""Checks the messages of a chat, and brings the ways in which callers write them into one form.

The results are dicts, lists, strings and numbers. A content is a string, a list of parts, or absent. A part is
``{"type": …}``, and text is ``{"type": "text", "text": …}``. A key may still be None:
``message_forms.py`` decides about it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UsageError, quote

Message = dict[str, Any]

TEXT_TYPES = ("text", "input_text", "output_text")
WITH_CONTENT = ("user", "system", "developer", "tool", "function")  # roles whose messages need a content
_MEDIA = ("image", "video", "audio", "file")


def conversation(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Check ``messages``. Raises UsageError, which names the wrong message."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise UsageError(f"messages is of type {type(messages).__name__}; a list of dicts is needed")
    if not messages:
        raise UsageError("messages is empty: a chat needs at least one message")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def plain(where: str, value: Any) -> Any:
    """Convert ``value`` to JSON's own types. Raises UsageError for a value that JSON cannot represent."""
    try:
        made = _plain(value)
        json.dumps(made)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: a chat template takes JSON values only: {error}") from error
    return made


def _plain(value: Any) -> Any:
    if callable(dump := getattr(value, "model_dump", None)):  # objects of clients such as OpenAI's
        value = dump()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "dtype") and callable(items := getattr(value, "tolist", None)):  # NumPy's scalars and arrays
        return items()
    return value


def checked_list(name: str, value: Any) -> list[dict[str, Any]] | None:
    """Check ``tools`` or ``documents``: a list of dicts, or None."""
    made = plain(name, value)
    if made is None or (isinstance(made, list) and all(isinstance(item, dict) for item in made)):
        return made
    raise UsageError(f"{name} must be a list of dicts of JSON values, not {quote(str(made))}")


def _message(where: str, given: Any) -> Message:
    message = plain(where, given)
    if not isinstance(message, dict):
        raise UsageError(f"{where} is of type {type(given).__name__}; a dict is needed")
    if not isinstance(message.get("role"), str):
        raise UsageError(f"{where} needs a 'role' that is a string, such as 'user'")
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [_part(f"{where}.content[{i}]", part) for i, part in enumerate(content)] or ""
    elif content is None and message["role"] in WITH_CONTENT and not message.get("tool_calls"):
        raise UsageError(f"{where} needs a 'content' that is a string or a list of parts")
    elif content is not None and not isinstance(content, str):
        kind = type(content).__name__
        raise UsageError(f"{where} needs a 'content' that is a string or a list of parts, not of type {kind}")
    if message.get("tool_calls") is None and message.get("function_call") is not None:  # the older key, with one call
        message["tool_calls"] = [message.pop("function_call")]
    if message.get("tool_calls") is not None:
        message["tool_calls"] = _tool_calls(f"{where}.tool_calls", message["tool_calls"])
    return message


def _part(where: str, given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        return {"type": "text", "text": given}
    if not isinstance(given, dict):
        raise UsageError(f"{where} is of type {type(given).__name__}; a part is a dict such as {{'type': 'text', …}}")
    part = _without_none(given)
    kind = part.get("type", "text" if "text" in part else None)
    if not isinstance(kind, str):
        raise UsageError(f"{where} needs a 'type' that is a string, such as 'text'")
    if any(word in kind for word in _MEDIA):
        raise UsageError(f"{where} is of type {quote(kind)}: zincmetal reads text only")
    if kind not in TEXT_TYPES:
        return part
    if not isinstance(part.get("text"), str):
        raise UsageError(f"{where} needs a 'text' that is a string")
    return part | {"type": "text"}


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise UsageError(f"{where} is of type {type(calls).__name__}; a list is needed")
    return [_tool_call(f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _tool_call(where: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise UsageError(f"{where} is of type {type(given).__name__}; a dict is needed")
    call = _without_none(given)
    if "function" in call:
        if not isinstance(call["function"], dict):
            raise UsageError(f"{where}.function must be a dict with 'name' and 'arguments'")
        return call | {"function": _function(f"{where}.function", call["function"])}
    return _function(where, call)


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


def _function(where: str, function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if arguments is not None and not isinstance(arguments, (str, dict)):
        kind = type(arguments).__name__
        raise UsageError(f"{where}.arguments must be a dict or a string of JSON, not of type {kind}")
    empty = arguments is None or (isinstance(arguments, str) and not arguments.strip())
    if "arguments" in function and empty:  # some clients write a call without arguments so
        return function | {"arguments": {}}
    return function


def arguments_as_object(where: str, arguments: str) -> dict[str, Any]:
    """Parse the arguments of a tool call that are JSON text. Raises UsageError if they are no JSON object."""
    try:
        made = json.loads(arguments)
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        raise UsageError(f"{where}.arguments is not a JSON object, and this template needs one: {quote(arguments)}")
    return made


def joined(parts: list[dict[str, Any]]) -> str:
    """Join the texts of parts that are all text."""
    return "".join(part["text"] for part in parts)
