"""Calls of an answer: what the readers of all kinds of calls write to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from .events import CallArguments, CallBegin, CallEnd, Event
from .json_text import rewritten

Json = dict[str, Any]


class Calls:
    """Writes the events of calls to a list: numbers the calls, and joins the arguments of each."""

    def __init__(self, tools: Mapping[str, Json], events: list[Event]) -> None:
        self.tools, self._events = tools, events
        self._written: list[str] = []
        self.n = 0  #: calls that have begun
        self.open = False  #: a call has begun, and not ended

    def begin(self, name: str) -> None:
        """Begin a call."""
        name = name.encode("utf-8", "replace").decode()  # an escape may have made half of a character
        known = name.strip().removeprefix("functions.")
        self._events.append(CallBegin(self.n, known if known in self.tools else name))
        self._written, self.open = [], True
        self.n += 1

    def write(self, text: str) -> None:
        """Write more of the arguments of the call."""
        if text:
            self._written.append(text)
            self._events.append(CallArguments(self.n - 1, text))

    def end(self, repaired: bool = False) -> None:
        """End the call. Without arguments they are an empty object."""
        if not self._written:
            self.write("{}")
        self._events.append(CallEnd(self.n - 1, "".join(self._written), repaired))
        self.open = False

    def properties(self, name: str) -> Json:
        """Return the schemas of a tool's parameters by their names."""
        found = self.tools.get(name, {}).get("properties")
        return found if isinstance(found, dict) else {}


class Reader(Protocol):
    """Reads one call. It never raises. What it read is a call only if ``Calls.n`` has grown."""

    def push(self, text: str) -> str | None:
        """Take more text. Return None, or, after the call's end or where it is no call, the text that follows."""

    def finish(self) -> None:
        """Take the end of the text: end the call."""


def object_in(value: str, calls: Calls, name: str) -> tuple[str, bool]:
    """Make the object of a call's arguments of any JSON value. Return it, and whether it was repaired.

    A string may have the object inside. Any other value is that of the tool's only parameter, or of "input".
    """
    if value.startswith("{"):
        return value, False
    if value in ("null", '""', "[]"):
        return "{}", True
    inner = json.loads(value) if value.startswith('"') else ""
    if inner.lstrip().startswith("{") and (found := rewritten(inner)) is not None:
        return found, True
    properties = list(calls.properties(name))
    return f"{{{json.dumps(properties[0] if len(properties) == 1 else 'input')}: {value}}}", True
