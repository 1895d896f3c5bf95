"""Answers of gpt-oss: messages with a channel each, reasoning, calls and text among them.

A message is ``<|start|>assistant``, a head, ``<|message|>``, a body, and an end. The head has the channel and, for a
call, the recipient, in either order. Models make faults in heads. What cannot be a head is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .calls import Calls, object_in
from .events import Event, Reasoning, Text, joined
from .json_text import JsonText
from .markers import Markers, begins
from .observers import Passing

Json = dict[str, Any]

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNELS = re.compile(r"analysis|commentary|final")
_BEGINNINGS = (CHANNEL, "<|constrain|>", "to=", "assistant", START, MESSAGE, *ENDS)  # of a head
_NOBODY = frozenset({"user", "all", "assistant"})  # recipients that are no tool
_LONGEST = 400  # characters of a head


class HarmonyAnswer:
    """Parser of one answer. See ``Answer``."""

    refused = 0  # a head without a call is that of another message

    def __init__(self, tools: Mapping[str, Json], tail: str, split: bool) -> None:
        self._split = split
        self._events: list[Event] = []
        self._calls = Calls(tools, self._events)
        self._in_head = Markers({START, MESSAGE, *ENDS})
        self._in_body = Markers({START, CHANNEL, MESSAGE, *ENDS})
        self._held = ""
        self._raw = ""  # of the head
        self._name = ""  # of the tool that the message calls
        self._thinks = False
        self._said = False  # a text was said, and no call since then
        self._json: JsonText | None = None
        self._other: list[str] | None = None  # the body of a call, if it is no object
        self._state = self._head
        self._continue(tail)

    def push(self, text: str) -> Sequence[Event]:
        """Take more of the text; return what is certain now."""
        text, self._held = self._held + text, ""
        while text:
            text = self._state(text)
        return self._taken()

    def finish(self) -> Sequence[Event]:
        """Take the end of the text; return what is left."""
        held, self._held = self._held, ""
        if self._state != self._head:
            self._body_part(held)
            self._ended("")
        elif not any(marker in held for marker in (START, CHANNEL)):
            self._events.append(Text(held))
        return self._taken()

    # --- states

    def _head(self, text: str) -> str:
        at, marker = self._in_head.find(text[:_LONGEST])  # however much of the text is there already
        bare = text.lstrip()
        if not bare or (not marker and len(text) < _LONGEST and _may_be_head(bare)):
            self._held = text
            return ""
        if marker == START or marker in ENDS:
            if not _may_be_head(bare):
                self._open("", "")
                return bare
            return text[at + len(marker) :]
        if not marker or not _may_be_head(bare):
            self._open("", "")
            return bare.removeprefix(CHANNEL)  # it would end the message at once
        end = at + len(marker)
        self._open(text[:at], text[:end])
        return text[end:]

    def _body(self, text: str) -> str:
        at, marker = self._in_body.find(text)
        self._body_part(text[:at])
        if not marker:
            self._held = text[at:]
            return ""
        if marker == MESSAGE:
            return text[at + len(marker) :]
        self._ended(marker)
        return text[at:] if marker in (START, CHANNEL) else text[at + len(marker) :]

    # --- messages

    def _continue(self, tail: str) -> None:
        """Begin inside of a message that the prompt has begun."""
        head, found, body = tail[tail.rfind(START) + 1 :].rpartition(MESSAGE)
        if found and not any(marker in body for marker in (START, *ENDS)):
            self._open(head, "")
            self._said = False

    def _open(self, head: str, raw: str) -> None:
        """Begin the body of a message."""
        recipient = _RECIPIENT.search(head)
        channel = _CHANNELS.search(head)
        name = recipient[1] if recipient and recipient[1] not in _NOBODY else ""
        self._thinks = bool(channel) and channel[0] == "analysis" and not name if channel else False
        self._name = name
        self._state = self._body
        if name:
            self._calls.begin(name.removeprefix("functions."))
            self._json, self._other = None, None
        elif self._thinks:
            if not self._split:
                self._events.append(Text(raw))
        elif self._said:
            self._events.append(Text("\n\n"))

    def _body_part(self, text: str) -> None:
        if not text:
            return
        if self._name:
            self._argument(text)
        elif self._thinks:
            self._events.append(Reasoning(text) if self._split else Text(text))
        else:
            self._said = True
            self._events.append(Text(text))

    def _argument(self, text: str) -> None:
        if self._json is None and self._other is None:
            text = text.lstrip()
            if not text:
                return
            if text[0] == "{":
                self._json = JsonText(Passing(self._calls.write))
            else:
                self._other = []
        if self._other is not None:
            self._other.append(text)
        elif self._json:
            rest = self._json.push(text)
            if rest is not None:
                self._call_ended()
                self._body_part(rest.lstrip(" \t\r\n`}"))

    def _call_ended(self) -> None:
        repaired = False
        if self._json:
            self._json.finish()
            repaired = self._json.repaired
        elif self._other:
            text, repaired = object_in(json.dumps("".join(self._other), ensure_ascii=False), self._calls, self._name)
            self._calls.write(text)
        self._calls.end(repaired)
        self._name, self._said = "", False

    def _ended(self, marker: str) -> None:
        if self._name:
            self._call_ended()
        elif self._thinks and not self._split and marker in ENDS:
            self._events.append(Text(marker))
        self._state, self._thinks = self._head, False

    def _taken(self) -> Sequence[Event]:
        events = joined(self._events)
        self._events.clear()
        return events


def _may_be_head(text: str) -> bool:
    return any(begins(text, beginning) is not False for beginning in _BEGINNINGS)
