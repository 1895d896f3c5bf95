"""Reads answers with the parsers of formats, in pieces of any kind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from zincmetal.text.tools.events import CallArguments, CallBegin, CallEnd, Event, Reasoning, Text, joined
from zincmetal.text.tools.format import Format

#: Schemas of the arguments of two tools.
TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where."},
            "days": {"type": "integer", "description": "How long."},
            "options": {"type": "object", "description": "How."},
        },
        "required": ["city"],
    },
    "now": {"type": "object", "properties": {"zone": {"type": "string", "description": "Where."}}},
}


class Read(NamedTuple):
    """What an answer says, in parts that can be compared."""

    reasoning: str
    text: str
    calls: list[tuple[str, Any]]


def events_of(
    form: Format,
    pieces: Iterable[str],
    tail: str = "",
    tools: Mapping[str, Any] = TOOLS,
    split: bool = True,
) -> list[Event]:
    """Feed a parser with pieces of an answer. Neighbours of one kind are joined."""
    parser = form.parser(tools, tail, split)
    events: list[Event] = []
    for piece in pieces:
        events += parser.push(piece)
    return joined([*events, *parser.finish()])


def checked(events: Iterable[Event]) -> Read:
    """Collect events, and check what holds for any answer: calls are numbered, whole, and JSON objects."""
    reasoning, text, fragments = "", "", ""
    calls: list[tuple[str, Any]] = []
    name: str | None = None
    for event in events:
        if isinstance(event, Reasoning):
            reasoning += event.text
        elif isinstance(event, Text):
            text += event.text
        elif isinstance(event, CallBegin):
            assert name is None
            assert event.call == len(calls)
            name, fragments = event.name, ""
        elif isinstance(event, CallArguments):
            assert event.call == len(calls)
            fragments += event.text
        else:
            assert isinstance(event, CallEnd)
            assert name is not None
            assert event.arguments == fragments
            arguments = json.loads(event.arguments)
            assert isinstance(arguments, dict)
            calls.append((name, arguments))
            name = None
        assert name is not None or not isinstance(event, CallArguments)
    assert name is None
    return Read(reasoning, text, calls)
