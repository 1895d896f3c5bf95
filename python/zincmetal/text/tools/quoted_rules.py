"""Rules of a grammar for objects as Gemma writes them: names without quotes, and strings between long quotes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ...sampling.constrain.grammar import json_term, text_term
from .lark import Lark, in_order, text_bounds
from .schema_types import members_of, resolved, types_of

Json = dict[str, Any]

_DEEPEST = 8  # objects and lists inside of each other; what is deeper may be any value
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")  # of a number
_PLAIN = r'"true" | "false" | "null" | /-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?/'


def quoted_object(lark: Lark, schema: Json, quote: str) -> str:
    """Return a term for an object that a schema allows. Raises UsageError for what is no schema, or too large."""
    json_term(schema, lenient=True)
    return _Quoted(lark, schema, quote).object(schema, 0)


class _Quoted:
    """Rules of one schema."""

    def __init__(self, lark: Lark, root: Json, quote: str) -> None:
        self._lark, self._root, self._quote = lark, root, quote
        self._named: dict[str, str] = {}  # rules by the references that they stand for, which may go in circles

    def object(self, schema: Json, depth: int) -> str:
        members, required = members_of({**self._definitions(), **schema})
        if not members:
            return self._any_object() if "properties" not in schema else '"{" "}"'
        written = {
            key: self._lark.new(f"{text_term(key + ':')} {self.value(one, depth + 1)}") for key, one in members.items()
        }
        return f'"{{" {in_order(self._lark, written, required, chr(34) + "," + chr(34))} "}}"'

    def value(self, schema: Any, depth: int) -> str:
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if isinstance(reference, str):
            return self._referenced(reference, schema)
        schema = self._merged(resolved(schema, self._root))
        if depth > _DEEPEST:
            return self._any()
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(values, list) and values:
            return f"({' | '.join(map(self._constant, values))})"
        options = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(options, list):
            return f"({' | '.join(self.value(one, depth + 1) for one in options)})"
        types = types_of(schema, self._root)
        if len(types) == 7:
            return self._any()
        return f"({' | '.join(self._typed(kind, schema, depth) for kind in sorted(types))})"

    def _referenced(self, reference: str, schema: Json) -> str:
        if reference not in self._named:
            self._named[reference] = name = self._lark.name()
            self._lark.rule(name, self.value(resolved(schema, self._root), 0))
        return self._named[reference]

    def _merged(self, schema: Json) -> Json:
        """Join the schemas of ``allOf``, as far as their keywords are different."""
        every = schema.get("allOf")
        merged: Json = {}
        for one in every if isinstance(every, list) else ():
            merged = {**merged, **{k: v for k, v in resolved(one, self._root).items() if k != "description"}}
        return {**merged, **{key: value for key, value in schema.items() if key != "allOf"}}

    def _typed(self, kind: str, schema: Json, depth: int) -> str:
        if kind == "object":
            return self._lark.new(self.object(schema, depth))
        if kind == "array":
            return self._list(schema, depth)
        if kind == "string":
            return self._string(schema)
        bounds = {key: schema[key] for key in _BOUNDS if key in schema}
        return self._lark.json({"type": kind, **bounds})

    def _list(self, schema: Json, depth: int) -> str:
        """Return a term for a list. All places of ``prefixItems`` are filled."""
        first = [self._lark.new(self.value(one, depth + 1)) for one in schema.get("prefixItems", ())]
        items, least, most = (schema.get(key) for key in ("items", "minItems", "maxItems"))
        begun = ' "," '.join(first)
        if items is False or (most is not None and most <= len(first)):
            return f'"[" {begun} "]"'
        item = self._lark.new(self.value(items, depth + 1))
        beside = 0 if begun else 1  # the first item has no comma in front of it
        fewest = max((least or 0) - len(first) - beside, 0)
        more = None if most is None else most - len(first) - beside
        rest = "" if more == 0 else f'("," {item}){{{fewest},{"" if more is None else more}}}'
        if begun:
            return f'"[" {begun} {rest} "]"'
        return f'"[" {item} {rest} "]"' if least else f'"[" ({item} {rest})? "]"'

    def _string(self, schema: Json) -> str:
        lark, quote, bounds = self._lark, self._lark.marker(self._quote), text_bounds(schema)
        if not bounds:
            return f"{quote} {lark.until(self._quote)}"
        text = lark.new(" & ".join([*bounds, lark.without([self._quote])]), terminal=True)
        return f"{quote} {lark.until(self._quote, text)}"

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            quote = self._lark.marker(self._quote)
            return f"{quote} {text_term(value)} {quote}" if value else f"{quote} {quote}"
        if isinstance(value, list):
            return f'"[" {" ".join(self._separated(map(self._constant, value)))} "]"'
        if isinstance(value, dict):
            members = (f"{text_term(f'{key}:')} {self._constant(one)}" for key, one in value.items())
            return f'"{{" {" ".join(self._separated(members))} "}}"'
        return text_term(json.dumps(value))

    def _separated(self, terms: Iterable[str]) -> list[str]:
        return [part for term in terms for part in ('","', term)][1:]

    def _any_object(self) -> str:
        lark, value = self._lark, self._any()
        member = lark.new(f'/[A-Za-z_][A-Za-z0-9_]{{0,40}}/ ":" {value}')
        return f'"{{" ({member} ("," {member})*)? "}}"'

    def _any(self) -> str:
        """Return a rule for a value of any type that has no other values inside."""
        return self._lark.new(f"{self._string({})} | {_PLAIN}")

    def _definitions(self) -> Json:
        return {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
