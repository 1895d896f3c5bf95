"""Format of answers for tests: each line of an answer is one event, so that a script says exactly which come.

``think …`` is reasoning, ``say …`` text, ``call NAME`` begins a call, ``args …`` is a fragment of its arguments, and
``end {…}`` completes it. What is no such line is text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zincmetal.sampling.constrain.grammar import Grammar
from zincmetal.text.tools.events import CallArguments, CallBegin, CallEnd, Event, Reasoning, Text
from zincmetal.text.tools.format import Format, Wanted


class LinesParser:
    """Parser of the lines."""

    def __init__(self) -> None:
        self._held, self._calls, self.refused = "", 0, 0

    def push(self, text: str) -> Sequence[Event]:
        *lines, self._held = (self._held + text).split("\n")
        return [event for line in lines for event in self._event(line)]

    def finish(self) -> Sequence[Event]:
        held, self._held = self._held, ""
        return self._event(held) if held else []

    def _event(self, line: str) -> list[Event]:
        word, _, rest = line.partition(" ")
        if word == "call":
            self._calls += 1
            return [CallBegin(self._calls - 1, rest)]
        if word == "args":
            return [CallArguments(self._calls - 1, rest)]
        if word == "end":
            return [CallEnd(self._calls - 1, rest)]
        if word == "think":
            return [Reasoning(rest)]
        return [Text(rest if word == "say" else line)]


@dataclass(frozen=True)
class LinesFormat(Format):
    """Format of the lines. Its grammar only says what was wanted."""

    name: str = "lines"
    reasons: bool = True
    calls: bool = True

    def parser(self, tools: Mapping[str, Any], tail: str, split_reasoning: bool = True) -> LinesParser:
        return LinesParser()

    def grammar(self, wanted: Wanted, tail: str) -> Grammar | None:
        if wanted.body is None and wanted.mode == "auto" and len(wanted.tools) != 1:
            return None
        body = wanted.body.lark if wanted.body else ""
        return Grammar(f"{wanted.mode} {','.join(wanted.tools)} {body}".strip())
