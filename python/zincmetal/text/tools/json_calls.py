"""Calls as JSON objects with a name and arguments: ``{"name": "f", "arguments": {…}}``."""

from __future__ import annotations

import json

from .calls import Calls, object_in
from .json_text import JsonText
from .shape import CallShape

_NAMES = frozenset({"name", "tool_name", "function_name", "function", "tool"})
_ARGUMENTS = frozenset({"arguments", "parameters", "args", "params", "input", "kwargs"})
_OTHERS = frozenset({"id", "type", "tool_call_id", "call_id", "index"})


class JsonCall:
    """Reads one object. The arguments may stand before the name, or be JSON inside of a string."""

    def __init__(self, calls: Calls, shape: CallShape) -> None:
        self._calls, self._bare = calls, shape.bare
        self._text = JsonText(self, stop=shape.close)
        self._n = calls.n
        self._open = 0  # values that are open
        self._key = ""
        self._reads = ""  # what the value is that is read now: "name", "arguments", "other"; "" in the object itself
        self._level = 0  # of that value
        self._streams = False  # the value goes to the events
        self._buffer: list[str] = []
        self._name = ""
        self._arguments: str | None = None  # that came before the name, or are no object
        self._repaired = False

    def push(self, text: str) -> str | None:
        """Take more text. See ``Reader``."""
        rest = self._text.push(text)
        if rest is not None:
            self._end()
        return rest

    def finish(self) -> None:
        """Take the end of the text. See ``Reader``."""
        if self._reads != "name":  # half of a name is no name
            self._text.finish()
        self._end()

    # --- what JsonText sees

    def write(self, text: str) -> None:
        """Take more of the JSON text."""
        if self._streams:
            self._calls.write(text)
        elif self._reads:
            self._buffer.append(text)

    def key(self, name: str) -> None:
        """Take the name of a member."""
        self._key = name
        if self._bare and not self._reads and name not in _NAMES | _ARGUMENTS | _OTHERS:
            self._refuse()

    def value(self, first: str) -> None:
        """See a value begin."""
        self._open += 1
        if self._open == 1:
            if first != "{":
                self._refuse()
        elif not self._reads:
            self._member(first)

    def ended(self) -> None:
        """See a value end."""
        self._open -= 1
        if not self._reads or self._open != self._level:
            return
        reads, self._reads, streamed, self._streams = self._reads, "", self._streams, False
        text, self._buffer = "".join(self._buffer), []
        if reads == "name":
            self._named(json.loads(text))
        elif reads == "arguments" and not streamed:
            self._arguments = text
            self._begin()

    def _member(self, first: str) -> None:
        self._level = self._open - 1
        if self._key in _NAMES and first in "\"'" and not self._name:
            self._reads = "name"
        elif self._key in _ARGUMENTS and self._arguments is None:
            self._reads = "arguments"
            if first == "{" and self._name:
                self._begin()
                self._streams = self._calls.n > self._n
                self._arguments = ""  # a second member of this name is none
        elif self._key not in _NAMES or first != "{":  # else {"function": {"name": …}}
            self._reads = "other"

    # --- the call

    def _named(self, name: str) -> None:
        self._name = name
        if self._bare and name not in self._calls.tools:
            self._refuse()
        elif self._arguments is not None or not self._bare:
            self._begin()

    def _begin(self) -> None:
        """Begin the call if its name is known. Write arguments that are there already."""
        if not self._name:
            return
        if self._calls.n == self._n:
            self._calls.begin(self._name)
        if self._arguments is not None:
            text, repaired = object_in(self._arguments, self._calls, self._name)
            self._repaired |= repaired
            self._calls.write(text)

    def _end(self) -> None:
        if self._calls.open:
            self._calls.end(self._repaired or self._text.repaired)

    def _refuse(self) -> None:
        self._text.done = True
