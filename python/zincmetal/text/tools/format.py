"""Format of a family's answers: how they show reasoning and tool calls."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

from ...sampling.constrain.grammar import Grammar
from .answer import Answer, Readers
from .answer_rules import answer_grammar
from .events import Event, Text
from .families import shape_of
from .harmony import HarmonyAnswer
from .harmony_rules import harmony_grammar
from .json_calls import JsonCall
from .named_calls import NamedCall
from .pythonic_calls import PythonicCall
from .shape import Shape
from .tagged_calls import TaggedCall
from .wanted import Wanted

Json = dict[str, Any]

_NEVER_MADE = re.compile(r"unused|reserved")  # thousands of control tokens in some vocabularies
_READERS: Readers = {"json": JsonCall, "tagged": TaggedCall, "named": NamedCall, "pythonic": PythonicCall}


class AnswerParser(Protocol):
    """Turns the text of an answer, piece by piece, into events. It never raises, and loses no text.

    ``refused`` counts what began with the marker of a call, and was none.
    """

    refused: int

    def push(self, text: str) -> Sequence[Event]:
        """Take more of the text; return what is certain now."""

    def finish(self) -> Sequence[Event]:
        """Take the end of the text; return what is left."""


@dataclass(frozen=True)
class Format:
    """Format of answers. The one without a shape knows neither reasoning nor calls.

    ``control`` has the texts of the model's control tokens. ``thinker``: the template or the tokenizer know a marker of
    reasoning. Others are read if they come, but a grammar lets only a thinker begin with one.
    """

    shape: Shape = field(default_factory=Shape)
    control: frozenset[str] = frozenset()
    thinker: bool = False

    @property
    def name(self) -> str:
        """Name of the family of formats."""
        return self.shape.name

    @property
    def reasons(self) -> bool:
        """True if answers may have reasoning."""
        return bool(self.shape.think) or self.shape.harmony

    @property
    def calls(self) -> bool:
        """True if answers may have tool calls."""
        return bool(self.shape.calls) or self.shape.harmony

    @property
    def needs_special(self) -> bool:
        """True if the parser must see the texts of control tokens. It keeps those of turns to itself."""
        return self.reasons or self.calls

    def parser(self, tools: Mapping[str, Json], tail: str, split_reasoning: bool = True) -> AnswerParser:
        """Make a parser of one answer. ``tail`` is the end of the prompt: an answer may begin inside its reasoning."""
        if not self.needs_special:
            return _Plain()
        if self.shape.harmony:
            return HarmonyAnswer(tools, tail, split_reasoning)
        return Answer(self.shape, _READERS, tools, self.thinks(tail), split_reasoning)

    def _begins(self, tail: str) -> Literal["inside", "behind", "before"]:
        """Tell where an answer begins: inside its reasoning, behind it, or before it may begin."""
        if self.thinks(tail):
            return "inside"
        return "before" if self.thinker and not tail.rstrip().endswith(self.shape.think_end) else "behind"

    def thinks(self, tail: str) -> bool:
        """Tell by the end of a prompt if the answer begins inside reasoning."""
        shape = self.shape
        turn = max((tail.rfind(text) + len(text) for text in shape.turns if text in tail), default=-1)
        if turn < 0:  # the turn began before the tail: a text may speak of the markers
            return tail.rstrip().endswith(shape.think)
        opens = max((tail.rfind(text, turn) for text in shape.think), default=-1)
        return opens >= 0 and opens > max(tail.rfind(text, turn) for text in shape.think_end)

    def grammar(self, wanted: Wanted, tail: str) -> Grammar | None:
        """Return the grammar of an answer, with its reasoning, or None if anything is allowed."""
        if self.shape.harmony:
            return harmony_grammar(wanted, self.control, tail)
        return answer_grammar(self.shape, wanted, self.control, self._begins(tail))


def format_of(source: str, control: Sequence[str] = ()) -> Format:
    """Recognise the format by the source of a chat template. ``control`` has the texts of control tokens.

    The parser hides control tokens that mean nothing to it.
    """
    return _format_of(source, tuple(control))


@lru_cache(maxsize=64)
def _format_of(source: str, control: tuple[str, ...]) -> Format:
    shape = shape_of(source)
    read = {*shape.think, *shape.think_end}.union(*((one.open, one.close) for one in shape.calls))
    hidden = dict.fromkeys((*shape.turns, *(text for text in control if not _NEVER_MADE.search(text))))
    thinker = any(text in source or text in control for text in shape.think)
    return Format(replace(shape, turns=tuple(text for text in hidden if text not in read)), frozenset(control), thinker)


__all__ = ["AnswerParser", "Format", "Wanted", "format_of"]


class _Plain:
    refused = 0

    def push(self, text: str) -> Sequence[Event]:
        return [Text(text)] if text else []

    def finish(self) -> Sequence[Event]:
        return []
