"""Grammar of a whole answer: its reasoning, its text, and its calls."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Literal

from ...sampling.constrain.grammar import Grammar
from .call_rules import call_rule
from .lark import Lark, re_escape
from .shape import CallShape, Shape
from .wanted import Wanted

_BLANK = r"/[ \t\r\n]{0,4}/"
Begins = Literal["inside", "behind", "before"]  # where an answer begins, as its reasoning is concerned


def answer_grammar(shape: Shape, wanted: Wanted, control: Iterable[str], begins: Begins) -> Grammar | None:
    """Return the grammar of an answer, None if anything is allowed."""
    rules = _Rules(shape, wanted, Lark(control), begins)
    start = rules.start()
    if start is None:
        return None
    return Grammar(f"start: {start}\n{rules.lark.text}")


class _Rules:
    def __init__(self, shape: Shape, wanted: Wanted, lark: Lark, begins: Begins) -> None:
        self.lark = lark
        self._shape, self._wanted = shape, wanted
        self._begins: Begins = begins if shape.think else "behind"
        self._call_shape = shape.calls[0] if shape.calls else None

    def start(self) -> str | None:
        """Return the body of the first rule."""
        wanted = self._wanted
        if wanted.mode == "required" and wanted.tools and self._call_shape:
            return self._behind_reasoning(f"SPACE? {self._calls(self._call_shape)}")
        if wanted.body:
            self.lark.lines(wanted.body.rule("body"))
            return self._behind_reasoning("body")
        if not wanted.tools or not self._call_shape:
            return None
        return self._without_calls() if wanted.mode == "none" else self._with_calls(self._call_shape)

    # --- reasoning

    def _behind_reasoning(self, body: str) -> str:
        """Return the rule of an answer whose text is ``body``."""
        if self._begins == "inside":
            return f"{self._up_to_end()} SPACE? {body}"
        if self._begins == "behind":
            return body
        return f"(SPACE? {self._reasoning()} SPACE?)? {body}"

    def _up_to_end(self) -> str:
        return self.lark.until(self._shape.think_end[0])

    def _reasoning(self, space: str = "") -> str:
        """Return a term for the whole of a reasoning, with its markers. ``space`` is a pattern of what is before it."""
        lark, opens, ends = self.lark, self._shape.think[0], self._shape.think_end[0]
        if lark.is_text(opens) and len(lark.parts(opens)) == 1:
            return lark.until(ends, lark.new(f"{space} {lark.marker(opens)} ANY".strip(), terminal=True))
        return f"{lark.marker(opens)} {lark.until(ends)}"

    def _marks(self) -> list[str]:
        """Return the markers of reasoning that are control tokens: they may stand anywhere in a free answer."""
        texts = (*self._shape.think, *self._shape.think_end)
        return [self.lark.marker(text) for text in texts if not self.lark.is_text(text)]

    def _thinks_in_text(self) -> bool:
        """Tell if the markers of reasoning are text, so that a grammar can look for calls behind it alone."""
        return bool(self._shape.think) and self.lark.is_text(self._shape.think_end[0])

    # --- calls

    def _calls(self, shape: CallShape) -> str:
        """Return a rule for one section of calls or, if parallel ones are wanted, for several."""
        section = self._section(shape, "")
        if not self._wanted.parallel or not shape.open:
            return f"{section} SPACE?"
        return f"{section} (SPACE? {section})* SPACE?"

    def _section(self, shape: CallShape, before: str) -> str:
        """Return a rule for a section of calls. ``before`` is the terminal of the text in front of it, or ""."""
        lark, wanted = self.lark, self._wanted
        rules = [
            call_rule(lark, shape, name, schema, name not in wanted.strict) for name, schema in wanted.tools.items()
        ]
        call = lark.new(" | ".join(rules))
        opens = "" if not shape.open else lark.until(shape.open, before) if before else lark.marker(shape.open)
        closes = lark.marker(shape.close)
        if shape.listed:
            more = f'("," SPACE? {call})*' if wanted.parallel else ""
            body = f'SPACE? "[" SPACE? {call} {more} SPACE? "]"'
        elif shape.many and wanted.parallel:
            body = f"SPACE? {call} (SPACE? {call})*"
        else:
            body = f"SPACE? {call}" if shape.open and shape.kind != "named" else call
        return lark.new(f"{opens} {body} {f'SPACE? {closes}' if closes else ''}".strip())

    # --- free answers

    def _with_calls(self, shape: CallShape) -> str:
        """Return the rule of a free answer: what begins a call must be one."""
        rest = self._free(shape) if shape.open else self._whole_call(shape)
        if not self._thinks_in_text() or self._begins == "behind":
            return rest
        if self._begins == "inside":
            return f"{self._up_to_end()} {rest} | ANY"
        if not shape.open:
            return rest
        # An answer that begins with reasoning is apart from one that does not: inside of it, markers mean nothing.
        opens = rf"\s*{re_escape(self._shape.think[0])}"
        plain = self.lark.without((), opens)
        unclosed = self.lark.new(f"/{opens}(?s:.*)/", terminal=True)
        more = rest if self._wanted.parallel else "SPACE?"
        return f"{self._reasoning(_BLANK)} {rest} | {self._section(shape, plain)} {more} | {plain} | {unclosed}"

    def _free(self, shape: CallShape) -> str:
        section, marks = self._section(shape, "ANY"), [f"ANY? {mark}" for mark in self._marks()]
        if self._wanted.parallel:
            return self.lark.new(f"({' | '.join([section, *marks])})* ANY?")
        before = f"({' | '.join(marks)})* " if marks else ""
        return self.lark.new(f"{before}({section} SPACE? | ANY?)")

    def _whole_call(self, shape: CallShape) -> str:
        """Return a rule for a text, or a call that is the whole answer: its first characters tell."""
        names = "|".join(re_escape(json.dumps(name)) for name in self._wanted.tools)
        text = self.lark.without((), rf'\s*\{{\s*"{shape.keys[0]}"\s*:\s*({names})')
        options = [text, f"SPACE? {self._section(shape, '')} SPACE?"]
        marked = next((one for one in self._shape.calls if one.open and not self.lark.is_text(one.open)), None)
        if marked:
            options.append(f"{self._section(marked, text)} SPACE?")
        return self.lark.new(" | ".join(options))

    def _without_calls(self) -> str | None:
        """Return the rule of a free answer in which no call can begin."""
        if not self._shape.calls[0].open:  # a call that is the whole answer cannot be told from other JSON
            return None
        opens = [one.open for one in self._shape.calls if one.open and not one.bare]
        # No NUL: a grammar that allows any text is not asked at each token, and so forbids no control token.
        text = self.lark.without([*opens, "\0"])
        marks = " | ".join(f"{text}? {mark}" for mark in self._marks())
        return f"({marks})* {text}?" if marks else text
