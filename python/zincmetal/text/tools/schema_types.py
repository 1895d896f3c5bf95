"""Types of a parameter by its JSON schema, for formats that write values without quotes."""

from __future__ import annotations

import json
import re
from typing import Any

from .json_text import rewritten

Json = dict[str, Any]

_ALL = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
_NUMBERS = frozenset({"integer", "number"})
_WORDS = {"True": "true", "False": "false", "None": "null"}
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,999})(?:\.[0-9]{1,999})?(?:[eE][-+]?[0-9]{1,9})?")
_DEEPEST = 16  # references and alternatives inside of each other


def types_of(schema: Any, root: Json) -> frozenset[str]:
    """Return the types that a value may have: all, if the schema says nothing or is not understood."""
    return _types(schema, root, 0, set())


def _types(schema: Any, root: Json, depth: int, seen: set[str]) -> frozenset[str]:
    """Return the types of a value. Each reference counts once: they may go in circles."""
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return _ALL
    if isinstance(reference := schema.get("$ref"), str):
        if reference in seen:
            return frozenset()
        seen.add(reference)
        return _types(_referenced(reference, root), root, depth + 1, seen)
    found = _ALL
    if (named := schema.get("type")) is not None:
        names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        found &= {name for name in names if isinstance(name, str)}
    if "const" in schema:
        found &= {_type(schema["const"])}
    if isinstance(values := schema.get("enum"), list):
        found &= {_type(value) for value in values}
    for word in ("anyOf", "oneOf"):
        if isinstance(some := schema.get(word), list) and some:
            found &= frozenset[str]().union(*(_types(one, root, depth + 1, seen) for one in some))
    if isinstance(every := schema.get("allOf"), list):
        for one in every:
            found &= _types(one, root, depth + 1, seen) or _ALL
    if schema.get("nullable") is True:
        found |= {"null"}
    return found or _ALL


def typed(text: str, types: frozenset[str]) -> tuple[str, bool]:
    """Make JSON of a value that was written without quotes. Return it, and whether it had to become a string.

    The text is JSON already if it may be: then it is not changed.
    """
    word = text.strip()
    word = _WORDS.get(word, word if "string" in types else word.lower() if word.isalpha() else word)
    kind = _kind(word)
    if kind in types or (kind in _NUMBERS and types & _NUMBERS):
        return word, False
    if "string" in types:
        return json.dumps(text, ensure_ascii=False), False
    if word[:1] in ("{", "[") and types & {"object", "array"} and (found := rewritten(word)) is not None:
        return found, True
    return json.dumps(text, ensure_ascii=False), True


def _kind(word: str) -> str:
    """Tell the type of a JSON text that is no string; "" for everything else."""
    if word in ("true", "false"):
        return "boolean"
    if word == "null":
        return "null"
    if _NUMBER.fullmatch(word):
        return "number" if any(char in word for char in ".eE") else "integer"
    if word[:1] not in ("{", "["):
        return ""
    try:
        value = json.loads(word, parse_constant=_refused)
    except (ValueError, RecursionError):
        return ""
    return _type(value)


def _refused(word: str) -> None:
    raise ValueError(word)


def _type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    names = {str: "string", int: "integer", float: "number", dict: "object", list: "array"}
    return names.get(type(value), "")


def resolved(schema: Any, root: Json) -> Json:
    """Follow the references of a schema. An empty schema stands for what is not understood."""
    for _ in range(_DEEPEST):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str):
            break
        schema = _referenced(reference, root)
    return schema if isinstance(schema, dict) and "$ref" not in schema else {}


def members_of(root: Json) -> tuple[Json, frozenset[str]]:
    """Return the schemas of an object's members by name, and the names that it must have."""
    whole = resolved(root, root)
    members, required = whole.get("properties"), whole.get("required")
    members = members if isinstance(members, dict) else {}
    names = required if isinstance(required, list) else []
    return members, frozenset(name for name in names if isinstance(name, str) and name in members)


def _referenced(reference: str, root: Json) -> Any:
    """Find what a reference inside the same schema names."""
    found: Any = root
    for name in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) and name else found
    return found
