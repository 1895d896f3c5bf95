"""Ids of tool calls, in the forms that some chat templates demand. Clients have ids of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Message = Mapping[str, Any]

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_SHORT = 9  # letters and digits of a short id


def with_short_ids(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return the messages with ids of nine letters and digits, as Mistral's templates demand."""
    return [_with_ids(message, lambda _, known: _short(known), _short) for message in messages]


def with_named_ids(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Return the messages with ids that have the names of tools: ``functions.NAME:0``.

    In Kimi K2's prompts the name of a call stands nowhere else. Its calls are numbered through the conversation. The
    result of a call that is not there keeps its id.
    """
    made: list[dict[str, Any]] = []
    named: dict[str, str] = {}
    n = 0

    def new(name: str, known: str) -> str:
        nonlocal n
        named[known], n = f"functions.{name}:{n}", n + 1
        return named[known]

    for message in messages:
        made.append(_with_ids(message, new, lambda known: named.get(known, known)))
    return made


def _with_ids(message: Message, of_call: Callable[[str, str], str], of_result: Callable[[str], str]) -> dict[str, Any]:
    """Return a message with other ids. ``of_call`` takes a call's name and id, ``of_result`` the id of a result."""
    made = dict(message)
    if "tool_calls" in message:
        made["tool_calls"] = [
            {**call, "id": of_call(call["function"]["name"], call["id"])} for call in message["tool_calls"]
        ]
    if "tool_call_id" in message:
        made["tool_call_id"] = of_result(message["tool_call_id"])
    return made


def _short(name: str) -> str:
    """Return nine letters and digits for an id: the same for the same id."""
    if len(name) == _SHORT and name.isascii() and name.isalnum():
        return name
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    made = ""
    for _ in range(_SHORT):
        number, digit = divmod(number, len(_LETTERS))
        made += _LETTERS[digit]
    return made
