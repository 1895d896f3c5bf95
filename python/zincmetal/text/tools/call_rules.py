"""Rules of a grammar for one call of a tool, for each kind of calls."""

from __future__ import annotations

import json
import re
from typing import Any

from ...sampling.constrain.grammar import text_term
from .lark import Lark, in_order, re_escape, text_bounds
from .quoted_rules import quoted_object
from .schema_types import members_of, resolved, types_of
from .shape import CallShape, Tags

Json = dict[str, Any]

_DEEPEST = 4  # alternatives inside of each other
_MOST_OPTIONS = 200  # of a parameter
_NUMBERS = {"{index}": "/[0-9]{1,4}/", "{id}": "/[A-Za-z0-9_-]{1,40}/"}
PYTHON_NAME = re.compile(r"[^\W\d][\w.-]*")  # of an argument; a name of another form cannot be written


def call_rule(lark: Lark, shape: CallShape, name: str, schema: Json, lenient: bool) -> str:
    """Return the name of a rule for a call of one tool, with its marks, without those of the section."""
    kinds = {"json": _json, "tagged": _tagged, "named": _named, "pythonic": _pythonic}
    return lark.new(kinds[shape.kind](lark, shape, name, _object(schema), lenient))


def _object(schema: Json) -> Json:
    """Say that arguments are an object, if the schema does not."""
    says = any(key in schema for key in ("type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"))
    return schema if says else {"type": "object", **schema}


def _json(lark: Lark, shape: CallShape, name: str, schema: Json, lenient: bool) -> str:
    key, arguments = shape.keys
    identity = rf'"{shape.id_key}" ?: ?"[A-Za-z0-9_-]{{1,40}}"' if shape.id_key else ""
    first, last = (rf"({identity},[ \n]{{0,2}})?", rf"(,[ \n]{{0,2}}{identity})?") if identity else ("", "")
    head = lark.new(
        rf'/\{{[ \n]{{0,2}}{first}"{key}" ?: ?{re_escape(json.dumps(name))},[ \n]{{0,2}}"{arguments}" ?: ?/',
        terminal=True,
    )
    end = lark.new(rf"/{last}[ \n]{{0,2}}\}}/", terminal=True)
    return f"{head} {lark.json(schema, lenient=lenient)} {end}"


def _named(lark: Lark, shape: CallShape, name: str, schema: Json, lenient: bool) -> str:
    written = quoted_object(lark, schema, shape.quote) if shape.quote else lark.json(schema, lenient=lenient)
    form = (shape.item + shape.head_form).replace("{name}", name)
    parts = re.split(r"(\{index\}|\{id\})", form)
    head = " ".join(_NUMBERS.get(part) or lark.marker(part) for part in parts)
    end = lark.marker(shape.tail + shape.item_end)
    return f"{head} {written} {end}".strip()


# --- parameters between tags


def _tagged(lark: Lark, shape: CallShape, name: str, schema: Json, lenient: bool) -> str:
    assert shape.tags
    tags, line = shape.tags, '"\\n"' if shape.tags.lines else '"\\n"?'
    members, required = members_of(schema)
    head = f"{lark.marker(shape.item + name + tags.name_end)} {line}"
    end = lark.marker(shape.item_end)
    made = _Parameters(lark, shape, tags, schema, lenient)
    if members:
        written = {key: made.one(key, schema) for key, schema in members.items()}
        body = " ".join(term if key in required else f"({term})?" for key, term in written.items())
    elif "properties" in schema or schema.get("additionalProperties") is False:
        body = ""
    else:
        body = f"({made.any()})*"
    return f"{head} {body} {end}"


class _Parameters:
    """Rules of the parameters of one tool. A text stands there as it is, and other values as JSON."""

    def __init__(self, lark: Lark, shape: CallShape, tags: Tags, root: Json, lenient: bool) -> None:
        self._lark, self._tags, self._root, self._lenient = lark, tags, root, lenient
        self._left = 0  # alternatives that the parameter may still have
        self._line = '"\\n"' if tags.lines else '"\\n"?'
        opens, space = shape.item or shape.open, r"[ \t\r\n]*"
        behind_value = _any_of(tags.key, tags.value_end, shape.item_end or shape.close, opens, shape.close)
        names = _any_of(*members_of(root)[0])
        self._early = [
            f"{re_escape(tags.value_end)}{space}{behind_value}",
            f"{re_escape(shape.item_end or shape.close)}{space}{_any_of(opens, shape.close)}",
            f"{re_escape(tags.key)}{space}{names}{space}{re_escape(tags.key_end)}",
        ]

    def one(self, key: str, schema: Any) -> str:
        """Return a rule for a parameter."""
        head = self._lark.marker(self._tags.key + key + self._tags.key_end)
        self._left = _MOST_OPTIONS
        return self._lark.new(f"{head} ({' | '.join(self._options(schema, 0))}) {self._line}")

    def _options(self, schema: Any, depth: int) -> list[str]:
        """Return terms for the values of a schema: each is a text, or JSON, and what opens and ends it."""
        plain = resolved(schema, self._root)
        options = plain.get("anyOf") or plain.get("oneOf")
        self._left -= 1
        if isinstance(options, list) and depth < _DEEPEST and self._left > 0:
            return [term for option in options for term in self._options(option, depth + 1)]
        values = [plain["const"]] if "const" in plain else plain.get("enum")
        if isinstance(values, list) and values:
            texts = [value for value in values if isinstance(value, str)]
            others = [value for value in values if not isinstance(value, str)]
            return [self._texts(texts)] * bool(texts) + [self._json({"enum": others})] * bool(others)
        return [self._text(plain) if "string" in types_of(schema, self._root) else self._json(schema)]

    def _json(self, schema: Any) -> str:
        lark, tags, line = self._lark, self._tags, '"\\n"' if self._tags.lines else ""
        value = lark.json(schema, self._root, self._lenient)
        return f"{self._opening(tags.json_value or tags.value)} {line} {value} {line} {lark.marker(tags.value_end)}"

    def _texts(self, texts: list[str]) -> str:
        line = '"\\n"' if self._tags.lines else ""
        opening = self._opening(self._tags.text_value or self._tags.value)
        return f"{opening} {line} ({' | '.join(map(text_term, texts))}) {line} {self._lark.marker(self._text_end())}"

    def _text_end(self) -> str:
        return (self._tags.text_end if self._tags.text_value else "") + self._tags.value_end

    def any(self) -> str:
        """Return a rule for a parameter of any name, with a text."""
        lark, tags = self._lark, self._tags
        key = lark.new(r"/[^<>\x22\s=]{1,64}/", terminal=True)
        return lark.new(f"{lark.marker(tags.key)} {key} {lark.marker(tags.key_end)} {self._text({})} {self._line}")

    def _opening(self, marker: str) -> str:
        """Return what stands between the end of a name and a value."""
        return f'"\\n"? {self._lark.marker(marker)}' if self._tags.value else self._lark.marker(marker)

    def _text(self, schema: Json) -> str:
        """Return a rule for a text without quotes, with what opens and ends it."""
        lark, tags = self._lark, self._tags
        opening, end = self._opening(tags.text_value or tags.value), self._text_end()
        bounds = text_bounds(schema)
        body = lark.new(" & ".join(bounds), terminal=True) if bounds else "ANY"
        if len(lark.parts(end)) > 1 or not lark.is_text(end):
            return f"{opening} {lark.until(end, body)}"
        # What looks like the end of the value, and is followed by a tag, is the end.
        early = f"/(?s:.*)({'|'.join(self._early)})(?s:.*)/"
        whole = f"{body} {text_term(end)}"
        if tags.lines:
            whole = f'"\\n" {body} "\\n" {text_term(end)}' + ("" if bounds else f' | "\\n" {text_term(end)}')
        value = lark.new(lark.new(f"({whole}) & ~{early}", terminal=True), "[lazy]")
        return f"{opening} {value}"


def _any_of(*texts: str) -> str:
    """Return a regular expression for any of some texts."""
    return f"({'|'.join(re_escape(text) for text in texts if text)})"


# --- calls of Python's


def _pythonic(lark: Lark, shape: CallShape, name: str, schema: Json, lenient: bool) -> str:
    members, required = members_of(schema)
    written = {
        key: lark.new(f"{text_term(key + '=')} ({_literal(lark, one, schema, lenient)})")
        for key, one in members.items()
        if PYTHON_NAME.fullmatch(key)
    }
    arguments = in_order(lark, written, required) if written else ""
    return f'{text_term(name + "(")} {arguments} ")"'


def _literal(lark: Lark, schema: Any, root: Json, lenient: bool) -> str:
    """Return a rule for a value: as JSON, or as Python writes it where both are equally plain."""
    types = types_of(schema, root)
    options = [lark.json(schema, root, lenient)]
    plain = resolved(schema, root)
    if not plain.keys() & {"enum", "const", "pattern", "format", "minLength", "maxLength", "anyOf", "oneOf", "allOf"}:
        options += [lark.new(r"/'([^'\\\n]|\\[\\'nt])*'/", terminal=True)] if "string" in types else []
        options += ['"True"', '"False"'] if "boolean" in types else []
        options += ['"None"'] if "null" in types else []
    return " | ".join(options)
