"""Reads an answer that comes in pieces: where reasoning, text and calls begin and end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .calls import Calls, Reader
from .events import Event, Reasoning, Text, joined
from .markers import Markers, begins
from .shape import CallShape, Shape

Json = dict[str, Any]
Readers = Mapping[str, Callable[[Calls, CallShape], Reader]]

_SPACE = " \t\r\n"
_BETWEEN = ",;[]"  # stands between the calls of a section, where they are in a list or of a kind that may be


class Answer:
    """Parser of one answer.

    ``thinks``: the answer begins inside reasoning. ``split``: reasoning is apart from the text. Without it, the
    reasoning is text, as the model wrote it.

    A marker begins a section of calls only if a call follows. Until this is certain, the text is kept in ``_raw``, and
    given back if it was none. ``refused`` counts these.
    """

    def __init__(self, shape: Shape, readers: Readers, tools: Mapping[str, Json], thinks: bool, split: bool) -> None:
        self._shape, self._readers, self._split = shape, readers, split
        self._events: list[Event] = []
        self._calls = Calls(tools, self._events)
        shapes = shape.calls if tools else ()
        self._opens = {one.open: [s for s in shapes if s.open == one.open] for one in shapes if one.open}
        self._bare = [one for one in shapes if not one.open]
        self._closes = {one.close for one in shapes if one.close}
        self._in_text = Markers({*self._opens, *self._closes, *shape.turns, *shape.think, *shape.think_end})
        self._in_thought = Markers({*self._opens, *shape.turns, *shape.think_end})
        self._thought_ends = Markers(shape.think_end)
        self._thinks = thinks
        self._state = self._thought if thinks else self._text
        self._held = ""
        self._final = False  # no text follows
        self._space = ""  # at the end of what was said: it is not shown if a call follows
        self._blank = True  # nothing was said since the answer, or a text behind reasoning or calls, began
        self._trims = thinks  # line breaks there are not part of the text
        self._section: list[CallShape] = []  # ways to read this section; the first of them is tried
        self._in_section = 0  # calls of this section
        self._reader: Reader | None = None
        self._n = 0  # calls before the reader's
        self._raw: list[str] = []
        self.refused = 0

    def push(self, text: str) -> Sequence[Event]:
        """Take more of the text; return what is certain now."""
        text, self._held = self._held + text, ""
        while text:
            text = self._state(text)
        return self._taken()

    def finish(self) -> Sequence[Event]:
        """Take the end of the text; return what is left."""
        self._final = True
        text, self._held = self._held, ""
        while text:
            text = self._state(text)
        if self._reader:
            self._reader.finish()
            if self._calls.n > self._n:
                self._raw, self._held = [], ""
        if self._state != self._between or not self._in_section:  # else it is what stands between calls
            if self._raw:
                self._note_refusal()
            self._say("".join(self._raw) + self._held)
        if self._space and not (self._blank and self._trims):
            self._tell(self._space)
        self._held, self._space, self._raw, self._reader = "", "", [], None
        return self._taken()

    # --- states: each takes text, and returns what is left of it for the next state

    def _text(self, text: str) -> str:
        if self._blank and self._bare:
            begun = text.lstrip()
            if not begun:
                self._space += text
                return ""
            if begun[0] in "{[":
                return self._open(self._bare, self._space + text[: -len(begun)], begun)
        at, marker = self._in_text.find(text, self._final)
        self._say(text[:at])
        if not marker:
            return self._hold(text[at:])
        rest = text[at + len(marker) :]
        if marker in self._opens:
            return self._opened(marker, rest)
        if self._blank and marker in self._shape.think:
            self._turn_to(True, marker)
        elif self._blank and marker in self._shape.think_end:
            self._turn_to(False, marker)
        elif marker not in self._shape.turns and not (self._blank and self._calls.n):
            self._say(marker)
        return rest

    def _thought(self, text: str) -> str:
        at, marker = self._in_thought.find(text, self._final)
        self._say(text[:at])
        if not marker:
            return self._hold(text[at:])
        rest = text[at + len(marker) :]
        if marker in self._opens:
            return self._opened(marker, rest)
        if marker in self._shape.think_end:
            self._turn_to(False, marker)
        return rest

    def _between(self, text: str) -> str:
        """Expect a call of the section, or its end."""
        shape = self._section[0]
        in_list = shape.listed or shape.kind in ("json", "pythonic")
        bare = text.lstrip(_SPACE + _BETWEEN if in_list else _SPACE)
        if not bare:
            self._raw.append(text)
            return ""
        ends = begins(bare, shape.close) if shape.close else False
        calls = begins(bare, shape.item) if shape.item else self._may_call(bare[0])
        if ends is None or (calls is None and not ends):
            return self._hold(text)
        skipped = text[: len(text) - len(bare)]
        if ends and self._in_section:
            self._leave()
            return bare[len(shape.close) :]
        if calls and not ends:
            self._raw.append(skipped + shape.item)
            # Reasoning may speak of calls: there, only those of known tools are calls.
            wary = replace(shape, bare=True) if self._thinks else shape
            self._n, self._reader = self._calls.n, self._readers[shape.kind](self._calls, wary)
            self._state = self._call
            return bare[len(shape.item) :]
        if not self._in_section:
            self._raw.append(skipped)
            return self._refuse(bare)
        self._leave()
        return bare

    def _may_call(self, first: str) -> bool:
        """Tell if a call may begin with a character, in a section whose calls have no marker of their own."""
        kind = self._section[0].kind
        if kind == "json":
            return first == "{"
        return first.isidentifier() if kind == "pythonic" else not self._in_section

    def _call(self, text: str) -> str:
        assert self._reader
        if self._thinks:
            return self._call_in_thought(text)
        rest = self._reader.push(text)
        return self._read(text, rest)

    def _call_in_thought(self, text: str) -> str:
        """Read what may be a call inside of reasoning: it is none if the reasoning ends there."""
        at, marker = self._thought_ends.find(text, self._final)
        rest = self._reader.push(text[:at]) if self._reader and at else None
        if rest is None and marker and self._calls.n == self._n:
            self._raw.append(text[:at])
            return self._refuse(text[at:])
        if rest is None:
            self._read(text[:at], None)
            return self._hold(text[at:]) if not marker else text[at:]
        return self._read(text[:at], rest) + text[at:]

    def _read(self, text: str, rest: str | None) -> str:
        """Take what the reader made of a text."""
        if self._calls.n > self._n:  # it is a call
            self._thinks, self._space, self._raw = False, "", []
            if rest is not None:
                self._reader, self._state = None, self._between
                self._in_section += 1
            return rest or ""
        if rest is None:
            self._raw.append(text)
            return ""
        read = "".join(self._raw) + text
        self._raw = [read[: len(read) - len(rest)]]
        return self._refuse(rest)

    # --- sections of calls

    def _opened(self, marker: str, rest: str) -> str:
        own_line = self._blank or self._space.rstrip(" \t").endswith("\n")
        shapes = [one for one in self._opens[marker] if own_line or not one.bare]
        if not shapes:
            self._say(marker)
            return rest
        return self._open(shapes, marker, rest)

    def _open(self, shapes: list[CallShape], raw: str, rest: str) -> str:
        self._section, self._raw, self._in_section = list(shapes), [raw], 0
        self._state = self._between
        return rest

    def _refuse(self, rest: str) -> str:
        """Give back what is no call, after all ways to read it were tried."""
        self._reader = None
        if not self._in_section and len(self._section) > 1:
            first, *others = self._raw
            return self._open(self._section[1:], first, "".join(others) + rest)
        raw, self._raw = "".join(self._raw), []
        self._note_refusal()
        self._state = self._thought if self._thinks else self._text
        self._say(raw)
        return rest

    def _note_refusal(self) -> None:
        """Count a section whose marker models write for calls alone, and that has none."""
        shape = self._section[-1] if self._section else None
        if shape and shape.open and not shape.bare and not self._in_section and not self._thinks:
            self.refused += 1

    def _leave(self) -> None:
        self._raw, self._section = [], []
        self._state, self._blank, self._trims = self._text, True, True

    # --- what is said

    def _turn_to(self, thinks: bool, marker: str) -> None:
        """Begin or end the reasoning."""
        if self._split:
            self._space = ""
        else:
            self._tell(self._space + marker)
            self._space = ""
        self._thinks = thinks
        self._state = self._thought if thinks else self._text
        self._blank, self._trims = True, self._split

    def _say(self, text: str) -> None:
        body = text.rstrip()
        if not body:
            self._space += text
            return
        said = self._space + body
        self._tell(said.lstrip("\r\n") if self._blank and self._trims else said)
        self._blank, self._space = False, text[len(body) :]

    def _tell(self, text: str) -> None:
        self._events.append(Reasoning(text) if self._thinks and self._split else Text(text))

    def _hold(self, text: str) -> str:
        self._held = text
        return ""

    def _taken(self) -> Sequence[Event]:
        events = joined(self._events)
        self._events.clear()
        return events
