"""JSON schemas: made at random, of the kinds that people write, and those of coding agents' tools."""

from __future__ import annotations

import random
from typing import Any

Json = dict[str, Any]

DRAFTS = ("https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-07/schema#")
NAMES = ("name", "a", "b", "path", "old_string", "ünï", "with space", 'quo"te', "back\\slash", "x-y", "0", "")
TEXTS = ("red", "green", "a/b", 'say "hi"', "back\\slash", "ünïcode", "emoji \U0001f600", "line\nbreak", "", "null")
PATTERNS = (r"^[a-z]+$", r"^\d{3}-\d{4}$", r"^(foo|bar)$", r"^[A-Z][a-z]{0,5}( [A-Z][a-z]{0,5})?$", r"x", r"^/[a-z/]*$")
FORMATS = ("date", "ipv4", "ipv6", "uuid", "email", "date-time", "time", "duration", "hostname", "uri", "int64")
NUMBERS = (-9007199254740991, 9007199254740991, -1, 0, 1, 7, 100, 0.5, -2.25, 1e3, 255, 65535)


class Schemas:
    """Makes schemas at random. Each can be satisfied."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.defs: Json = {}

    def any(self) -> Json:
        """Makes a schema with its definitions."""
        self.defs = {}
        if self.random.random() < 0.2:
            self.defs["leaf"] = self.scalar()
            if self.random.random() < 0.5:
                self.defs["tree"] = self._tree()
        made = self.object(3) if self.random.random() < 0.7 else self.value(3)
        if self.defs:
            made["$defs"] = self.defs
        if self.random.random() < 0.3:
            made["$schema"] = self.random.choice(DRAFTS[:1])
        if self.random.random() < 0.2:
            made |= {"title": "T", "description": 'says "something" // # %json {', "default": {}, "examples": [1]}
        return made

    def value(self, depth: int) -> Json:
        """Makes a schema of a value."""
        kinds = [self.scalar, self.scalar, self.enum, self.constant]
        if self.defs:
            kinds.append(self._reference)
        if depth > 0:
            kinds += [lambda: self.object(depth - 1), lambda: self.array(depth - 1), lambda: self.union(depth - 1)]
        return self.random.choice(kinds)()

    def _reference(self) -> Json:
        return {"$ref": f"#/$defs/{self.random.choice(list(self.defs))}"}

    def _tree(self) -> Json:
        tree = {"$ref": "#/$defs/tree"}
        return {
            "type": "object",
            "properties": {"value": self.scalar(), "children": {"type": "array", "items": tree, "maxItems": 2}},
            "required": ["value"],
            "additionalProperties": False,
        }

    def scalar(self) -> Json:
        """Makes a schema of a text, number, boolean or null."""
        return self.random.choice([self.string, self.string, self.integer, self.number, self.boolean, self.several])()

    def boolean(self) -> Json:
        return self.random.choice([{"type": "boolean"}, {"type": "null"}, {"type": "boolean", "description": "yes?"}])

    def several(self) -> Json:
        """Makes a schema of several types."""
        return {"type": self.random.sample(["string", "integer", "null", "boolean", "number"], 2)}

    def string(self) -> Json:
        made: Json = {"type": "string"}
        kind = self.random.random()
        if kind < 0.2:
            made["maxLength"] = self.random.randint(0, 12)
            if self.random.random() < 0.5:
                made["minLength"] = self.random.randint(0, made["maxLength"])
        elif kind < 0.3:
            made["minLength"] = self.random.randint(0, 5)
        elif kind < 0.45:
            made["pattern"] = self.random.choice(PATTERNS)
        elif kind < 0.6:
            made["format"] = self.random.choice(FORMATS)
        return made

    def integer(self) -> Json:
        return {"type": "integer", **self._bounds(whole=True)}

    def number(self) -> Json:
        return {"type": "number", **self._bounds(whole=False)}

    def _bounds(self, whole: bool) -> Json:
        made: Json = {}
        if self.random.random() < 0.5:
            low, high = sorted(self.random.sample(NUMBERS, 2))
            if self.random.random() < 0.7:
                made[self.random.choice(["minimum", "exclusiveMinimum"])] = low
            if self.random.random() < 0.7 and high - low > 2:
                made[self.random.choice(["maximum", "exclusiveMaximum"])] = high
        elif whole and self.random.random() < 0.2:
            made["multipleOf"] = self.random.choice([2, 5, 10])
        return made

    def enum(self) -> Json:
        values = self.random.sample([*TEXTS, 1, -5, 0.5, True, None], self.random.randint(1, 5))
        texts = self.random.sample(TEXTS, self.random.randint(1, 4))
        return self.random.choice([{"enum": values}, {"type": "string", "enum": texts}])

    def constant(self) -> Json:
        value = self.random.choice([*TEXTS, 3, True, None, {"a": [1, "b"]}, [], ["x", {"y": None}]])
        return {"const": value}

    def array(self, depth: int) -> Json:
        made: Json = {"type": "array"}
        if self.random.random() < 0.2:
            made["prefixItems"] = [self.value(depth) for _ in range(self.random.randint(1, 3))]
            made["items"] = self.random.choice([False, self.value(depth)])
        else:
            made["items"] = self.value(depth)
        if self.random.random() < 0.5 and made["items"] is not False:
            made["maxItems"] = self.random.randint(1, 4)
            if self.random.random() < 0.5:
                made["minItems"] = self.random.randint(0, made["maxItems"])
        return made

    def object(self, depth: int) -> Json:
        names = self.random.sample(NAMES, self.random.randint(0, 5))
        made: Json = {"type": "object", "properties": {name: self.value(depth) for name in names}}
        required = [name for name in names if self.random.random() < 0.6]
        self.random.shuffle(required)
        if required or self.random.random() < 0.3:
            made["required"] = required
        kind = self.random.random()
        if kind < 0.6:
            made["additionalProperties"] = False
        elif kind < 0.7:
            made["additionalProperties"] = self.value(depth - 1) if depth > 0 else self.scalar()
        elif kind < 0.8:
            made["patternProperties"] = {"^p_": self.scalar(), "^q_[0-9]+$": self.scalar()}
            made["additionalProperties"] = False
        elif kind < 0.85:
            made |= {"propertyNames": {"type": "string"}, "additionalProperties": self.scalar()}
        return made

    def union(self, depth: int) -> Json:
        word = self.random.choice(["anyOf", "anyOf", "oneOf", "allOf"])
        if word == "anyOf":
            return {"anyOf": [self.value(depth) for _ in range(self.random.randint(1, 3))]}
        if word == "oneOf":
            return {"oneOf": [self._tagged(kind, depth) for kind in ("cat", "dog")]}
        return {"allOf": [self.object(depth), {"type": "object", "description": "and no more"}]}

    def _tagged(self, kind: str, depth: int) -> Json:
        made = {"kind": {"type": "string", "const": kind}, "more": self.value(depth)}
        return {"type": "object", "properties": made, "required": ["kind"], "additionalProperties": False}
