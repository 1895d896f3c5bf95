"""Events of an answer: what an answer's text turns into, as soon as it is certain."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Reasoning(NamedTuple):
    """More of what the model thinks before it answers."""

    text: str


class Text(NamedTuple):
    """More of the answer itself."""

    text: str


class CallBegin(NamedTuple):
    """A tool call begins. ``call`` counts the calls of an answer from 0."""

    call: int
    name: str


class CallArguments(NamedTuple):
    """More of the arguments of a call: the fragments of a call join to one JSON object."""

    call: int
    text: str


class CallEnd(NamedTuple):
    """A tool call is complete. ``arguments`` is the whole JSON text. ``repaired``: the model's was not well-formed."""

    call: int
    arguments: str
    repaired: bool = False


Event = Reasoning | Text | CallBegin | CallArguments | CallEnd


def joined(events: Iterable[Event]) -> list[Event]:
    """Join neighbours of one kind. Events without a text are left out."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Text | Reasoning) and type(last) is type(event):
            found[-1] = event._replace(text=last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.call == event.call:
            found[-1] = CallArguments(event.call, last.text + event.text)
        elif not isinstance(event, Text | Reasoning) or event.text:
            found.append(event)
    return found
