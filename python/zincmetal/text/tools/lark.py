"""Builds a grammar in llguidance's dialect of Lark: names of rules, markers, and texts up to a marker."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...sampling.constrain.grammar import control_term, json_term, regex_term, text_term

Json = dict[str, Any]

SPACE = r"/[ \t\r\n]{1,8}/"
_NO_LOOKING = re.compile(r"\(\?[=!<]|\\[1-9]")  # look-around and back references, which no grammar has
_ANCHOR = re.compile(r"(?<![\\\[])[\^$]|\\[bB]")
_ANY = r"/(?s:.*)/"


class Lark:
    """Grammar that grows. ``control`` has the texts of control tokens, which no text of a grammar matches."""

    def __init__(self, control: Iterable[str]) -> None:
        known = sorted((text for text in control if text), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, known)) or r"(?!)")
        self._rules: list[str] = [f"ANY: {_ANY}", f"SPACE: {SPACE}"]
        self._names: dict[str, str] = {}  # of rules that were made, by what they are
        self._n = 0

    @property
    def text(self) -> str:
        """The grammar."""
        return "\n".join(self._rules) + "\n"

    def rule(self, name: str, body: str) -> str:
        """Add a rule. Return its name."""
        self._rules.append(f"{name}: {body}")
        return name

    def lines(self, lines: str) -> None:
        """Add rules as they are."""
        self._rules.append(lines.rstrip("\n"))

    def name(self) -> str:
        """Return a new name for a rule."""
        self._n += 1
        return f"r{self._n}"

    def new(self, body: str, options: str = "", terminal: bool = False) -> str:
        """Add a rule under a new name, or find the one that is the same. Return its name."""
        key = f"{options}: {body}"
        if key not in self._names:
            self._n += 1
            self._names[key] = f"{'T' if terminal else 'r'}{self._n}"
            self._rules.append(f"{self._names[key]}{key}")
        return self._names[key]

    def parts(self, text: str) -> list[str]:
        """Split a text at the control tokens in it. Return a term for each part."""
        terms, at = [], 0
        for found in self._control.finditer(text):
            terms += (
                [text_term(text[at : found.start()]), control_term(found[0])]
                if found.start() > at
                else [control_term(found[0])]
            )
            at = found.end()
        return [*terms, text_term(text[at:])] if at < len(text) else terms

    def marker(self, text: str) -> str:
        """Return the terms of a text that may have control tokens in it."""
        return " ".join(self.parts(text))

    def is_text(self, marker: str) -> bool:
        """Tell if a marker begins with text, and not with a control token."""
        return self._control.match(marker) is None

    def until(self, marker: str, before: str = "ANY") -> str:
        """Return a term for any text up to a marker, with the marker. ``before`` is the terminal of the text."""
        first, *others = self.parts(marker)
        if first.startswith("<"):
            return " ".join([f"{before}?", first, *others])
        if not others:
            return self.new(f"{before} {first}", "[lazy]")
        return " ".join([self.new(f"{before} {first}", terminal=True), *others])  # a control token ends the text

    def without(self, markers: Iterable[str], beginning: str = "") -> str:
        """Return a terminal for any text that has none of the markers, and does not begin in a certain way."""
        texts = [re_escape(marker) for marker in markers if self.is_text(marker)]
        parts = [rf"~/(?s:.*)(?:{'|'.join(texts)})(?s:.*)/"] if texts else []
        parts += [f"~{regex_term(beginning + '(?s:.*)')}"] if beginning else []
        return self.new(" & ".join([_ANY, *parts]), terminal=True) if parts else "ANY"

    def json(self, schema: Any, root: Json | None = None, lenient: bool = True) -> str:
        """Return a term for the JSON that a schema allows. ``root`` has the definitions that it refers to."""
        if isinstance(schema, dict) and root:
            schema = {**{key: root[key] for key in ("$defs", "definitions") if key in root}, **schema}
        return self.new(json_term(schema, lenient))


def re_escape(text: str) -> str:
    """Escape a text for a regular expression of Rust, and for the slashes around it."""
    return (
        re.sub(r"[\\/.+*?()|\[\]{}^$#&\-~]", r"\\\g<0>", text)
        .replace("\n", "\\n")
        .replace("\r", "\\r")
        .replace("\0", "\\x00")
    )


def in_order(lark: Lark, members: Mapping[str, str], required: Iterable[str], between: str = '", "') -> str:
    """Return a term for members in their order, of which some may be missing, with a text between two of them."""
    needed, rest, start = set(required), "", ""
    for name, term in list(members.items())[::-1]:
        more = f"{between} {term} {rest}".strip()
        begun = f"{term} {rest}".strip()
        if name in needed:
            rest, start = lark.new(more), lark.new(begun)
        else:
            rest = lark.new(f"({more}) | {rest}" if rest else f"({more})?")
            start = lark.new(f"{begun} | {start}" if start else f"({begun})?")
    return start


def text_bounds(schema: Json) -> list[str]:
    """Return terminals for the length and the pattern of a text."""
    least, most = (schema.get(key) for key in ("minLength", "maxLength"))
    pattern = schema.get("pattern")
    bounds = []
    if isinstance(least, int) or isinstance(most, int):
        bounds.append(f"/(?s:.{{{least or 0},{'' if most is None else most}}})/")
    if isinstance(pattern, str) and (inside := _inside(pattern)) is not None:
        before, after = ("" if anchored else "(?s:.*)" for anchored in (pattern[:1] == "^", pattern[-1:] == "$"))
        bounds.append(regex_term(f"{before}(?:{inside}){after}"))
    return bounds


def _inside(pattern: str) -> str | None:
    """Return a pattern without the anchors at its ends, None if it has what no grammar follows."""
    inside = pattern.removeprefix("^").removesuffix("$")
    refused = inside.endswith("\\") or _NO_LOOKING.search(inside) or _ANCHOR.search(inside)
    return None if refused else inside
