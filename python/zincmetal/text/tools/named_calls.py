"""Calls with a head that has the name, and the arguments as an object behind it: ``f[ARGS]{…}``."""

from __future__ import annotations

import re

from .calls import Calls
from .json_text import JsonText
from .markers import Markers, begins
from .observers import Passing
from .shape import CallShape

_LONGEST = 256  # characters of a head
_ENDING = " \t\r\n`"  # a fence may stand behind the arguments


class NamedCall:
    """Reads one call, from behind ``CallShape.item``. The head is all text in front of the object."""

    def __init__(self, calls: Calls, shape: CallShape) -> None:
        self._calls, self._bare = calls, shape.bare
        self._head = re.compile(shape.head)
        stop = shape.close if shape.item_end == "}" else shape.item_end or shape.close
        self._head_ends = Markers({"{", shape.item_end, shape.close})
        self._text = JsonText(Passing(calls.write), stop=stop, quote=shape.quote)
        self._item_end = shape.item_end
        self._held = ""
        self._state = self._in_head

    def push(self, text: str) -> str | None:
        """Take more text. See ``Reader``."""
        text, self._held = self._held + text, ""
        return self._state(text)

    def finish(self) -> None:
        """Take the end of the text. See ``Reader``."""
        if self._calls.open:
            self._text.finish()
            self._calls.end(True)

    def _in_head(self, text: str) -> str | None:
        at, marker = self._head_ends.find(text[:_LONGEST])  # however much of the text is there already
        if not marker and len(text) < _LONGEST and "\n\n" not in text:
            self._held = text
            return None
        found = self._head.fullmatch(text[:at]) if "\n\n" not in text[:at] else None
        name = found["name"].strip() if found and marker else ""
        if not name or (self._bare and name not in self._calls.tools):
            return text
        self._calls.begin(name)
        self._state = self._in_arguments if marker == "{" else self._behind
        return self._state(text[at:])

    def _in_arguments(self, text: str) -> str | None:
        rest = self._text.push(text)
        if rest is None:
            return None
        self._state = self._behind
        return self._behind(rest)

    def _behind(self, text: str) -> str | None:
        """Expect the end of the call."""
        bare = text.lstrip(_ENDING)
        ends = begins(bare, self._item_end) if self._item_end else False
        if ends is None:
            self._held = text
            return None
        self._calls.end(self._text.repaired or (bool(self._item_end) and not ends))
        return bare[len(self._item_end) :] if ends else text
