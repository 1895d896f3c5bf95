"""JSON schemas with texts that they allow and texts that they do not: what each keyword means."""

from __future__ import annotations

from typing import Any, NamedTuple


class Case(NamedTuple):
    name: str
    schema: Any
    allowed: tuple[str, ...]
    refused: tuple[str, ...]


_TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }
    },
}


def _object(**more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, **more}


CASES = (
    Case("true", True, ("1", '"x"', "{}", "[null]"), ("", "{", "x")),
    Case("empty", {}, ("1", '{"a":[]}'), ("nul",)),
    Case("null", {"type": "null"}, ("null",), ("0", '"null"')),
    Case("boolean", {"type": "boolean"}, ("true", "false"), ("1", "null", "True")),
    Case("integer", {"type": "integer"}, ("0", "-7", "123456789012345678901"), ("1.5", "01", "+1", '"1"', "1e3")),
    Case("number", {"type": "number"}, ("0", "-0.5", "1e10", "2.5E-3"), (".5", "1.", "NaN", "Infinity", "0x1")),
    Case("minimum", {"type": "integer", "minimum": -3}, ("-3", "0", "99"), ("-4", "-30")),
    Case("maximum", {"type": "integer", "maximum": 12}, ("12", "-500", "3"), ("13", "100")),
    Case(
        "exclusive",
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        ("0.5", "0.001"),
        ("0", "1", "0.0"),
    ),
    Case(
        "safe integers", {"type": "integer", "minimum": -9007199254740991, "exclusiveMinimum": 0}, ("1",), ("0", "-1")
    ),
    Case("multipleOf", {"type": "integer", "multipleOf": 7}, ("0", "14", "-21"), ("1", "15")),
    Case("multipleOf a fraction", {"type": "number", "multipleOf": 0.01}, ("0.25", "1"), ("0.255",)),
    Case("length", {"type": "string", "minLength": 1, "maxLength": 3}, ('"a"', '"üñî"', '"\\n"'), ('""', '"abcd"')),
    Case("pattern", {"type": "string", "pattern": "^[a-c]+$"}, ('"abc"',), ('"abd"', '""')),
    Case("pattern inside", {"type": "string", "pattern": "b+"}, ('"abc"', '"b"'), ('"ac"', '""')),
    Case("pattern of digits", {"type": "string", "pattern": r"^\d{2}$"}, ('"12"',), ('"1"', '"123"', '"٣٣"')),
    Case("pattern with a slash", {"type": "string", "pattern": "^/[a-z/]*$"}, ('"/a/b"',), ('"a"',)),
    Case(
        "date", {"type": "string", "format": "date"}, ('"2024-02-29"', '"1999-12-31"'), ('"2023-02-29"', '"0000-01-01"')
    ),
    Case(
        "date-time",
        {"type": "string", "format": "date-time"},
        ('"2024-02-29T23:59:59Z"',),
        ('"2024-02-29"', '"2024-01-01T24:00:00Z"'),
    ),
    Case("uuid", {"type": "string", "format": "uuid"}, ('"123e4567-e89b-12d3-a456-426614174000"',), ('"123"',)),
    Case("a format without meaning", {"type": "string", "format": "color-name"}, ('"anything"',), ("1",)),
    Case(
        "enum",
        {"enum": ["a", 1, None, 'q"', True]},
        ('"a"', "1", "null", '"q\\""', "true"),
        ('"b"', "2", '"1"', "false"),
    ),
    Case("const", {"const": {"a": [1, "x"]}}, ('{"a":[1,"x"]}', '{ "a": [1, "x"] }'), ('{"a":[1]}', "{}")),
    Case("several types", {"type": ["string", "null"]}, ('"x"', "null"), ("1",)),
    Case(
        "required",
        _object(required=["a"]),
        ('{"a":1}', '{"a":1,"b":"x"}', '{"a":1,"b":"x","c":[]}'),
        ("{}", '{"b":"x"}'),
    ),
    Case("order of properties", _object(required=["a", "b"]), ('{"a":1,"b":""}',), ('{"b":"","a":1}',)),
    Case("no others", _object(additionalProperties=False), ("{}", '{"b":""}'), ('{"c":1}', '{"a":1,"c":1}')),
    Case(
        "others of a schema", _object(additionalProperties={"type": "null"}), ('{"c":null}',), ('{"c":1}', '{"a":null}')
    ),
    Case("no property twice", _object(), ('{"a":1}',), ('{"a":1,"a":2}', '{"a":1,"\\u0061":"x"}')),
    Case(
        "patternProperties",
        {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False},
        ('{"n_a":1}', "{}"),
        ('{"n_a":"x"}', '{"m":1}'),
    ),
    Case(
        "propertyNames of texts",
        {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
        ('{"x":1}',),
        ('{"x":""}',),
    ),
    Case(
        "propertyNames of a list",
        {"type": "object", "propertyNames": {"enum": ["x.y", "z"]}, "additionalProperties": {"type": "integer"}},
        ('{"x.y":1}', '{"z":2}'),
        ('{"xay":1}', '{"zz":1}'),
    ),
    Case(
        "maxProperties",
        {"type": "object", "maxProperties": 1, "additionalProperties": {"type": "integer"}},
        ("{}", '{"x":1}'),
        ('{"x":1,"y":2}',),
    ),
    Case("items", {"type": "array", "items": {"type": "integer"}}, ("[]", "[1]", "[1, 2,3]"), ('["x"]', "[1,]", "[1")),
    Case(
        "bounds of items",
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        ("[true]", "[true,false]"),
        ("[]", "[true,true,true]"),
    ),
    Case(
        "a tuple",
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 2},
        ('[1,"x"]',),
        ("[1]", '[1,"x",2]', '["x",1]'),
    ),
    Case(
        "a tuple of draft 7",
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "items": [{"type": "integer"}],
            "additionalItems": False,
        },
        ("[]", "[1]"),
        ('["x"]', "[1,2]"),
    ),
    Case(
        "anyOf",
        {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}}]},
        ("1", "[null]"),
        ('"x"', "[1]"),
    ),
    Case("allOf", {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}, ("3", "5"), ("2", "6")),
    Case("oneOf of types", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, ("1", '"x"'), ("null",)),
    Case(
        "oneOf by a tag",
        {
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
            "$defs": {
                kind: {
                    "type": "object",
                    "properties": {"kind": {"const": kind}, key: {"type": "integer"}},
                    "required": ["kind", key],
                    "additionalProperties": False,
                }
                for kind, key in (("cat", "lives"), ("dog", "tricks"))
            },
        },
        ('{"kind":"cat","lives":9}', '{"kind":"dog","tricks":0}'),
        ('{"kind":"cat","tricks":0}', '{"kind":"cow"}'),
    ),
    Case(
        "$ref", _TREE, ('{"v":1,"next":null}', '{"v":1,"next":{"v":2,"next":null}}'), ('{"v":1}', '{"v":1,"next":{}}')
    ),
    Case("definitions", {"$ref": "#/definitions/n", "definitions": {"n": {"type": "integer"}}}, ("1",), ('"x"',)),
    Case(
        "$schema, title, default",
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "title": "T",
            "default": 3,
            "type": "integer",
            "x-extra": {"not": 1},
        },
        ("1",),
        ('"x"',),
    ),
    Case(
        "names with signs",
        {
            "type": "object",
            "properties": {'q"\\/': {"type": "null"}, "ü": {"const": "\U0001f600"}},
            "required": ['q"\\/', "ü"],
        },
        ('{"q\\"\\\\/":null,"ü":"\U0001f600"}',),
        ('{"q":null}',),
    ),
    Case(
        "an empty name",
        {"type": "object", "properties": {"": {"type": "null"}}, "required": [""], "additionalProperties": False},
        ('{"":null}',),
        ("{}",),
    ),
    Case(
        "spaces",
        {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]},
        ('{\n  "a": [\n    1,\n    2\n  ]\n}', '{"a":[1,2]}', '{"a": [1, 2]}'),
        (' {"a":[]}', '{"a":[]} ', '{  "a":[]}', '{\n\n"a":[]}'),
    ),
)

#: (schema, keyword, place) of what no grammar follows.
UNSUPPORTED = (
    ({"not": {"type": "null"}}, "not", "#"),
    ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems", "#/properties/a"),
    ({"type": "array", "items": {"if": {"type": "null"}, "then": {}}}, "if", "#/items"),
    ({"type": "array", "contains": {"type": "null"}}, "contains", "#"),
    (
        {"type": "object", "properties": {"a/b": {"dependentRequired": {"x": ["y"]}}}},
        "dependentRequired",
        "#/properties/a~1b",
    ),
    ({"type": "object", "dependencies": {"x": ["y"]}}, "dependencies", "#"),
    ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties", "#"),
    (
        {"anyOf": [{"type": "null"}, {"type": "object", "propertyNames": {"maxLength": 3}}]},
        "propertyNames",
        "#/anyOf/1",
    ),
    ({"$defs": {"x": {"$dynamicRef": "#y"}}, "$ref": "#/$defs/x"}, "$dynamicRef", "#/$defs/x"),
    ({"type": "string", "format": "uri-reference"}, "format", "#"),
    ({"type": "object", "properties": {"a": {"$ref": "https://example.com/schema"}}}, "$ref", "#/properties/a"),
    ({"type": "object", "properties": {"p": {"type": "string", "pattern": "(?=x)y"}}}, "pattern", "#/properties/p"),
    (
        {"type": "object", "properties": {"p": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}},
        "oneOf",
        "#/properties/p",
    ),
    ({"type": "object", "minProperties": 3}, "minProperties", "#"),
    ({"type": "integer", "multipleOf": 999983}, "multipleOf", "#"),
)


def agent_tools() -> list[dict[str, Any]]:
    """Returns the schemas of arguments as coding agents send them."""
    schema = {"$schema": "http://json-schema.org/draft-07/schema#"}
    closed = {"type": "object", "additionalProperties": False}
    safe = {"minimum": -9007199254740991, "maximum": 9007199254740991}
    text = {"type": "string"}
    return [
        {
            **schema,
            **closed,
            "properties": {
                "command": {**text, "description": 'The command; "quoted" // and # signs'},
                "timeout": {"type": "integer", "exclusiveMinimum": 0, "maximum": 600000},
                "run_in_background": {"type": "boolean"},
            },
            "required": ["command"],
        },
        {
            **schema,
            **closed,
            "properties": {
                "file_path": text,
                "offset": {"type": "integer", **safe},
                "limit": {"type": "integer", "exclusiveMinimum": 0, **safe},
            },
            "required": ["file_path"],
        },
        {
            **schema,
            **closed,
            "properties": {
                "file_path": text,
                "old_string": text,
                "new_string": text,
                "replace_all": {"type": "boolean", "default": False},
            },
            "required": ["file_path", "old_string", "new_string"],
        },
        {
            **schema,
            **closed,
            "properties": {
                "pattern": text,
                "path": text,
                "output_mode": {"type": "string", "enum": ["content", "files_with_matches", "count"]},
                "-A": {"type": "number"},
                "-i": {"type": "boolean"},
            },
            "required": ["pattern"],
        },
        {
            **schema,
            **closed,
            "properties": {
                "todos": {
                    "type": "array",
                    "items": {
                        **closed,
                        "properties": {
                            "content": {**text, "minLength": 1},
                            "status": {"type": "string", "enum": ["pending", "in_progress", "completed"]},
                            "activeForm": {**text, "minLength": 1},
                        },
                        "required": ["content", "status", "activeForm"],
                    },
                }
            },
            "required": ["todos"],
        },
        {
            **schema,
            **closed,
            "properties": {"url": {**text, "format": "uri"}, "prompt": text},
            "required": ["url", "prompt"],
        },
        {
            **schema,
            **closed,
            "properties": {
                "questions": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 4,
                    "items": {
                        **closed,
                        "properties": {
                            "question": text,
                            "header": {**text, "maxLength": 12},
                            "options": {
                                "type": "array",
                                "minItems": 2,
                                "maxItems": 4,
                                "items": {
                                    **closed,
                                    "properties": {"label": text, "description": text},
                                    "required": ["label", "description"],
                                },
                            },
                            "multiSelect": {"type": "boolean"},
                        },
                        "required": ["question", "header", "options", "multiSelect"],
                    },
                },
                "answers": {"type": "object", "propertyNames": text, "additionalProperties": text},
            },
            "required": ["questions"],
        },
        {
            **closed,
            "properties": {
                "command": {"type": "array", "items": text},
                "workdir": text,
                "timeout_ms": {"type": "number"},
                "with_escalated_permissions": {"type": "boolean"},
            },
            "required": ["command"],
        },
        {
            **closed,
            "properties": {
                "explanation": text,
                "plan": {
                    "type": "array",
                    "items": {**closed, "properties": {"step": text, "status": text}, "required": ["step", "status"]},
                },
            },
            "required": ["plan"],
        },
        {**closed, "properties": {"input": {**text, "description": "The patch"}}, "required": ["input"]},
        {
            "type": "object",
            "properties": {
                "target": {"anyOf": [text, {"type": "integer"}, {"type": "null"}]},
                "edits": {
                    "type": "array",
                    "items": {
                        "anyOf": [
                            {
                                **closed,
                                "properties": {
                                    "op": {"const": "insert"},
                                    "line": {"type": "integer", "minimum": 0},
                                    "text": text,
                                },
                                "required": ["op", "line", "text"],
                            },
                            {
                                **closed,
                                "properties": {
                                    "op": {"const": "delete"},
                                    "lines": {
                                        "type": "array",
                                        "items": {"type": "integer", "minimum": 0},
                                        "minItems": 2,
                                        "maxItems": 2,
                                    },
                                },
                                "required": ["op", "lines"],
                            },
                        ]
                    },
                },
            },
            "required": ["target", "edits"],
        },
        {**schema, "type": "object", "properties": {}, "additionalProperties": {}},
        {"type": "object", "properties": {}},
        {
            "type": "object",
            "properties": {"query": text, "filters": {"$ref": "#/$defs/Filter"}},
            "required": ["query"],
            "$defs": {
                "Filter": {
                    "type": "object",
                    "properties": {
                        "and": {"type": "array", "items": {"$ref": "#/$defs/Filter"}, "maxItems": 2},
                        "field": text,
                    },
                }
            },
        },
    ]
