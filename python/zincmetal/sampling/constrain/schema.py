"""Prepares JSON schemas for the compiler of grammars: checks, bounds, and forms that say the same in its words.

What a grammar cannot follow is refused by its keyword and place. Annotations, and words that JSON Schema does not
define, say nothing to a validator; they are left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from ...errors import UnsupportedSchemaError, UsageError, quote

Json = dict[str, Any]

MAX_BYTES = 1_000_000  # of a schema as JSON text
MAX_DEPTH = 64  # of schemas in schemas
MAX_PROPERTIES = 1000  # of an object
MAX_MULTIPLE = 10_000  # of multipleOf, in units of its last digit: the compiler makes as many states
MAX_COMMON = 100_000  # least common multiple of all of a schema's
MAX_NESTING = 2 * MAX_DEPTH  # of lists and objects: a schema in a schema is two of them

ONE = ("items", "additionalItems", "additionalProperties")  # keywords with a schema
MANY = ("allOf", "anyOf", "oneOf", "prefixItems")  # with a list of schemas
NAMED = ("properties", "patternProperties", "$defs", "definitions")  # with schemas by name
PLAIN = (
    *("$ref", "const", "enum", "type", "minItems", "maxItems", "required", "minProperties", "maxProperties"),
    *("minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("multipleOf", "$id", "$anchor"),
)
#: Keywords that no grammar follows. ``dependencies`` and the last three are of older drafts.
UNSUPPORTED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"),
    *("unevaluatedItems", "unevaluatedProperties", "dependentRequired", "dependentSchemas", "dependencies"),
    *("$dynamicRef", "$recursiveRef", "extends", "disallow", "divisibleBy"),
)
#: Formats that are followed. Others of JSON Schema are refused; names that it does not define mean nothing.
FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
OTHER_FORMATS = frozenset(
    {"idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template", "json-pointer"}
    | {"relative-json-pointer", "regex"}
)

_LONG, _SHORT = r"(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])", r"(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_DAYS = rf"(?:{_LONG}|{_SHORT}|02-(?:0[1-9]|1[0-9]|2[0-8]))"
_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|0[48]|[13579][26])00)-02-29"
_YEARS = r"(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_DATE = rf"(?:{_YEARS}-{_DAYS}|{_LEAP})"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
#: Formats whose values the compiler takes too widely: a 29th of February in any year, a second 60 in any minute.
EXACT = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


class Prepared(NamedTuple):
    """Schema for the compiler.

    - ``dropped``: places of what was left out although it says something.
    - ``open``: an object has properties by name, and others beside them.
    - ``controls``: a text has a control character that JSON can only write as a number, such as U+001B.
    """

    schema: Json | bool
    dropped: tuple[str, ...] = ()
    open: bool = False
    controls: bool = False


def prepared(schema: Any, lenient: bool = False) -> Prepared:
    """Check a schema, and put it into the form that the compiler takes.

    Raises UnsupportedSchemaError for a keyword that cannot be followed; ``lenient`` leaves it out instead. Raises
    UsageError for what is no schema, or too large.
    """
    if isinstance(schema, bool):
        return Prepared(schema)
    if not isinstance(schema, Mapping):
        raise UsageError(f"a JSON schema is an object, not {type(schema).__name__}")
    _check_nesting(schema)
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the schema is no JSON: {error}") from None
    if len(text) > MAX_BYTES:
        raise UsageError(f"a schema has at most {MAX_BYTES:,} bytes, and this one {len(text):,}")
    preparing = _Preparing(json.loads(text), lenient)
    made = preparing.schema(preparing.root, "#")
    controls = re.search(r"\\u00[01]", text) is not None
    return Prepared(made, tuple(preparing.dropped), preparing.open, controls)


def _check_nesting(schema: Any) -> None:
    """Refuse a schema that is nested too deeply, or contains itself, without recursion."""
    level = [schema]
    for _ in range(MAX_NESTING):
        inner = [value for value in level if isinstance(value, (Mapping, list, tuple))]
        level = [child for value in inner for child in (value.values() if isinstance(value, Mapping) else value)]
        if not level:
            return
        if len(level) > MAX_BYTES:
            break
    raise UsageError(f"the schema is nested more than {MAX_NESTING} deep, or too large")


class _Preparing:
    """One schema on its way."""

    def __init__(self, root: Json, lenient: bool) -> None:
        self.root, self.lenient, self.dropped = root, lenient, list[str]()
        self.open = False
        self._common = 1  # least common multiple

    def schema(self, given: Any, path: str, depth: int = 0) -> Json | bool:
        if isinstance(given, bool):
            return given
        if not isinstance(given, dict):
            raise UsageError(f"the schema at {path} is no object, but {quote(json.dumps(given), 40)}")
        if depth > MAX_DEPTH:
            raise UsageError(f"the schema at {path} is more than {MAX_DEPTH} schemas deep")
        given = self._in_new_words(given, path)
        if given.get("properties") or given.get("patternProperties"):
            self.open = self.open or given.get("additionalProperties") is not False
        made: Json = {}
        for key, value in given.items():
            if key in UNSUPPORTED:
                self._refuse(key, path)
            elif key == "oneOf" and isinstance(value, list) and "anyOf" not in given and self._as_any(value, path):
                made["anyOf"] = self._inside(key, value, path, depth)
            elif key in PLAIN:
                if self._followed(key, value, given, path):
                    made[key] = value
            elif key in ONE or key in MANY or key in NAMED:
                made[key] = self._inside(key, value, path, depth)
        return made

    def _as_any(self, options: list[Any], path: str) -> bool:
        """Return True if oneOf is to become anyOf: if that says the same, or if less will do."""
        if exclusive(options, self.root):
            return True
        if self.lenient:
            self.dropped.append(f"{path}/oneOf")
        return self.lenient

    def _inside(self, key: str, value: Any, path: str, depth: int) -> Any:
        """Prepare the schemas of a keyword."""
        path, depth = f"{path}/{escaped(key)}", depth + 1
        if key in ONE:
            return self.schema(value, path, depth)
        if key in MANY:
            if not isinstance(value, list):
                raise UsageError(f"a list of schemas is needed at {path}")
            return [self.schema(one, f"{path}/{i}", depth) for i, one in enumerate(value)]
        if not isinstance(value, dict):
            raise UsageError(f"an object of schemas is needed at {path}")
        if key == "properties" and len(value) > MAX_PROPERTIES:
            raise UsageError(f"at most {MAX_PROPERTIES:,} properties are possible, and {path} has {len(value):,}")
        return {name: self.schema(one, f"{path}/{escaped(name)}", depth) for name, one in value.items()}

    def _in_new_words(self, given: Json, path: str) -> Json:
        """Say the same in keywords of the newest draft, and leave out what says nothing."""
        given = dict(given)
        if isinstance(given.get("items"), list):  # a tuple, before 2020-12
            prefix, rest = given.pop("items"), given.pop("additionalItems", True)
            given |= {"prefixItems": prefix, "items": rest}
        given.pop("additionalItems", None)
        if given.get("uniqueItems") is False:
            del given["uniqueItems"]
        if "if" not in given or ("then" not in given and "else" not in given):
            for key in ("if", "then", "else"):
                given.pop(key, None)
        pattern = EXACT.get(given["format"]) if isinstance(given.get("format"), str) else None
        if pattern and "pattern" not in given:
            given = dict(("pattern", pattern) if key == "format" else (key, v) for key, v in given.items())
        if "contains" not in given:
            given.pop("minContains", None)
            given.pop("maxContains", None)
        return self._names_as_patterns(given)

    def _names_as_patterns(self, given: Json) -> Json:
        """Say ``propertyNames`` by ``patternProperties``, where it says anything."""
        names = given.get("propertyNames")
        if names is True or (isinstance(names, dict) and names.items() <= {"type": "string"}.items()):
            return {key: value for key, value in given.items() if key != "propertyNames"}
        pattern = _pattern_of(names) if isinstance(names, dict) else None
        if pattern is None or any(key in given for key in ("properties", "patternProperties", "required")):
            return given
        value = given.get("additionalProperties", True)
        rest = {k: v for k, v in given.items() if k not in ("propertyNames", "additionalProperties")}
        return {**rest, "patternProperties": {pattern: value}, "additionalProperties": False}

    def _followed(self, key: str, value: Any, given: Json, path: str) -> bool:
        """Return False for a keyword to leave out. Raises UnsupportedSchemaError for a value that is not followed."""
        if key == "format":
            if value in OTHER_FORMATS:
                self._refuse(key, path, f"the format {value}")
            return value in FORMATS
        if key == "$ref" and not (isinstance(value, str) and value.startswith("#")):
            self._refuse(key, path, "a reference to another document")
            return False
        if key == "multipleOf" and isinstance(value, (int, float)) and value > 0:
            units = int(f"{Decimal(repr(value)):f}".replace(".", "").strip("0") or 1)
            if units > MAX_MULTIPLE or math.lcm(self._common, units) > MAX_COMMON:
                self._refuse(key, path, f"multiples of {value}")
                return False
            self._common = math.lcm(self._common, units)
        if key == "minProperties" and isinstance(value, int) and value > 1:
            n_required = len(given["required"]) if isinstance(given.get("required"), list) else 0
            if value > n_required + 1:  # names beside the listed ones may repeat, so that they cannot be counted
                self._refuse(key, path, "more than one property beside the required ones")
                return False
        return True

    def _refuse(self, key: str, path: str, why: str = "") -> None:
        if not self.lenient:
            raise UnsupportedSchemaError(key, path, why)
        self.dropped.append(f"{path}/{escaped(key)}")


def parts(schema: Any, path: str = "#") -> Iterator[tuple[str, Any]]:
    """Yield the schemas in a schema that was prepared before, with their places, the outer ones first.

    References within them point to places of the whole, so that most schemas stand for themselves alone.
    """
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        place = f"{path}/{escaped(key)}"
        inner: list[tuple[str, Any]] = []
        if key in ONE and isinstance(value, dict):
            inner = [(place, value)]
        elif key in MANY or (key == "items" and isinstance(value, list)):
            inner = [(f"{place}/{i}", one) for i, one in enumerate(value)]
        elif key in NAMED:
            inner = [(f"{place}/{escaped(name)}", one) for name, one in value.items()]
        for where, one in inner:
            yield where, one
            yield from parts(one, where)


def escaped(name: str) -> str:
    """Write a name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def _pattern_of(names: Json) -> str | None:
    """Return the pattern of property names, of a schema that has a pattern or a list of them, and nothing else."""
    says = {key: value for key, value in names.items() if key not in ("type", "title", "description")}
    if says.keys() == {"pattern"} and isinstance(says["pattern"], str):
        return says["pattern"]
    values = says.get("enum", [says["const"]] if "const" in says else None)
    if len(says) == 1 and isinstance(values, list) and values and all(isinstance(v, str) for v in values):
        quoted = ("".join(c if c.isalnum() or ord(c) > 127 else f"\\x{{{ord(c):x}}}" for c in v) for v in values)
        return f"^({'|'.join(quoted)})$"
    return None


# ---- oneOf -------------------------------------------------------------------------------------------------------


def exclusive(options: list[Any], root: Json) -> bool:
    """Return True if no value can satisfy two of the options, so that oneOf says the same as anyOf."""
    if len(options) > 200:
        return False
    found = [_resolved(option, root) for option in options]
    return all(_apart(a, b, root) for i, a in enumerate(found) for b in found[:i])


def _resolved(schema: Any, root: Json) -> Json:
    """Follow references within the document. An empty schema stands for what is not understood."""
    for _ in range(8):
        if not isinstance(schema, dict):
            return {}
        ref = schema.get("$ref")
        if ref is None:
            return schema
        schema = next(_at(root, ref), None) if isinstance(ref, str) and ref.startswith("#") else None
    return {}


def _at(root: Any, ref: str) -> Iterator[Any]:
    """Yield what a JSON pointer points to, or nothing."""
    for part in ref[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(root, dict) or name not in root:
            return
        root = root[name]
    yield root


def _apart(a: Json, b: Json, root: Json) -> bool:
    """Return True if two schemas have no value in common, as far as their types and constants say."""
    if not (_kinds(a) & _kinds(b)):
        return True
    values = _values(a), _values(b)
    if values[0] is not None and values[1] is not None and not (values[0] & values[1]):
        return True
    if not (_kinds(a) & _kinds(b) <= {"object"}):
        return False
    properties = a.get("properties"), b.get("properties")
    if not isinstance(properties[0], dict) or not isinstance(properties[1], dict):
        return False
    required = {name for s in (a, b) for name in _texts(s.get("required"))}
    both = (name for name in required if name in properties[0] and name in properties[1])
    return any(
        (x := _values(_resolved(properties[0][name], root))) is not None
        and (y := _values(_resolved(properties[1][name], root))) is not None
        and not (x & y)
        for name in both
    )


def _kinds(schema: Json) -> set[str]:
    """Return the types of a schema's values."""
    every = {"null", "boolean", "number", "string", "array", "object"}
    given = schema.get("type")
    names = [given] if isinstance(given, str) else _texts(given)
    return {"number" if name == "integer" else name for name in names} or every


def _values(schema: Json) -> set[str] | None:
    """Return the texts and nothing else that a schema allows, None if it allows others too."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(v, str) for v in values):
        return set(values)
    return None


def _texts(value: Any) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []
