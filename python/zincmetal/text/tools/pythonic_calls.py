"""Calls as Python writes them: ``f(a=1, b="x")``."""

from __future__ import annotations

import json
import re

from .calls import Calls
from .json_text import JsonText
from .markers import begins
from .observers import Passing
from .shape import CallShape

# Names have a longest length, or a long text would wait for its "(" or "=" for ever. What is read must not depend on
# where it is cut, so a longer name is none also where it comes at once.
_LONGEST_HEAD = 160
_HEAD = re.compile(r"(?:\w+\s*=\s*)?(?P<name>[A-Za-z_][\w.-]*)\s*")
_IN_HEAD = re.compile(rf"[\w.=\s-]{{0,{_LONGEST_HEAD}}}")
_KEY = re.compile(r"([^\W\d][\w.-]{0,127})\s{0,16}=(?!=)")
_MAY_BE_KEY = re.compile(r"[^\W\d][\w.-]{0,127}\s{0,16}=?")
_METHOD = ".call"  # Llama's own tools: brave_search.call(query="…")


class PythonicCall:
    """Reads one call, from its name on. Arguments without a name get those of the tool's schema, in order."""

    def __init__(self, calls: Calls, shape: CallShape) -> None:
        self._calls, self._bare = calls, shape.bare
        self._stop = shape.close
        self._held = ""
        self._state = self._in_head
        self._name = ""
        self._written = 0  # arguments
        self._value: JsonText | None = None
        self._repaired = False
        self._done = False

    def push(self, text: str) -> str | None:
        """Take more text. See ``Reader``."""
        text, self._held = self._held + text, ""
        while text and not self._done:
            rest = self._state(text)
            if rest is None:
                return None
            text = rest
        return text if self._done else None

    def finish(self) -> None:
        """Take the end of the text. See ``Reader``."""
        if not self._calls.open:
            return
        held, self._held = self._held, ""
        if self._state == self._in_arguments and held:
            self._positional()
            self._in_value(held)
        if self._value:
            self._value.finish()
            if not self._value.begun:
                self._calls.write("null")
        self._repaired = True
        self._end()

    # --- states: each takes text and returns what it leaves of it, or None if it needs more

    def _in_head(self, text: str) -> str | None:
        at = text.find("(", 0, _LONGEST_HEAD + 1)
        if at < 0 and _IN_HEAD.fullmatch(text):
            self._held = text
            return None
        found = _HEAD.fullmatch(text, 0, at) if at >= 0 else None
        name = found["name"] if found else ""
        known = name.removesuffix(_METHOD)
        if not name or (self._bare and name not in self._calls.tools and known not in self._calls.tools):
            self._done = True
            return text
        self._name = name if name in self._calls.tools else known
        self._calls.begin(self._name)
        self._state = self._in_arguments
        return text[at + 1 :]

    def _in_arguments(self, text: str) -> str | None:
        text = text.lstrip(" \t\r\n,")
        if not text:
            return None
        if text[0] == ")":
            self._end()
            return text[1:]
        stops = begins(text, self._stop) if self._stop else False
        if stops:
            self._repaired = True
            self._end()
            return text
        if found := _KEY.match(text):
            if found.end() == len(text):  # "==" may follow
                self._held = text
                return None
            self._begin(found[1])
            return text[found.end() :]
        if stops is None or _MAY_BE_KEY.fullmatch(text):
            self._held = text
            return None
        self._positional()
        return text

    def _in_value(self, text: str) -> str | None:
        assert self._value
        rest = self._value.push(text)
        if rest is not None:
            # Quotes of Python are no fault here.
            if not self._value.begun:
                self._calls.write("null")
            self._value, self._state = None, self._in_arguments
        return rest

    def _positional(self) -> None:
        names = list(self._calls.properties(self._name))
        self._repaired = True
        self._begin(names[self._written] if self._written < len(names) else f"argument_{self._written + 1}")

    def _begin(self, key: str) -> None:
        self._calls.write(f"{', ' if self._written else '{'}{json.dumps(key, ensure_ascii=False)}: ")
        self._written += 1
        self._value = JsonText(Passing(self._calls.write), stop=self._stop, ends=",)", tuples=True)
        self._state = self._in_value

    def _end(self) -> None:
        self._done = True
        if self._written:
            self._calls.write("}")
        self._calls.end(self._repaired)
