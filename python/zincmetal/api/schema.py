"""Forms of an answer: JSON schemas from Python's types, and the values that answers become."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args, get_origin

from ..errors import UsageError, quote
from ..sampling.constrain.grammar import Grammar
from .result import Result

Json = dict[str, Any]
Read = Callable[[Any], Any]
KNOWN = "a JSON schema (a dict), a pydantic model, a dataclass, a TypedDict, an Enum, or a type such as list[int]"


class Shape(NamedTuple):
    """JSON schema, and the function that turns a value which follows it into Python's. It raises ValueError."""

    schema: Json
    read: Read


class Form(NamedTuple):
    """Grammar of an answer, and the function that reads the value of its text. None: it stays a text."""

    grammar: Grammar
    read: Callable[[str], Any] | None = None


# ---- what callers ask for ------------------------------------------------------------------------------------------


def grammar_of(kind: str, value: Any = None) -> Grammar | None:
    """Make the grammar of an answer's text, and check it.

    ``kind`` is "text" (any: None), "json_object", "json_schema", "regex", "choice", "lark", "gbnf" or "grammar", which
    is one of the last two; ``value`` is the schema, the expression, the list of texts, or the grammar. Raises
    UnsupportedSchemaError or UsageError.
    """
    if kind == "text":
        return None
    from ..sampling.constrain import compiler

    if kind == "json_schema":
        return compiler.of_schema(value)
    makers: Mapping[str, Callable[[], Grammar]] = {
        "json_object": Grammar.of_object,
        "regex": lambda: Grammar.of_regex(value),
        "choice": lambda: Grammar.of_choices(value),
        "lark": lambda: Grammar(value),
        "gbnf": lambda: Grammar.of_gbnf(value),
        "grammar": lambda: Grammar.of_text(value),
    }
    if kind not in makers:
        raise UsageError(
            f"an answer has one of the forms text, json_schema, {', '.join(makers)}, not {quote(str(kind))}"
        )
    grammar = makers[kind]()
    compiler.check(grammar)
    return grammar


def form_of(
    schema: Any = None, regex: str | None = None, choices: Sequence[str] | None = None, grammar: Any = None
) -> Form | None:
    """Make the form of an answer from the keywords of a call, of which at most one is given. None for any text."""
    given = {"schema": schema, "regex": regex, "choices": choices, "grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} are given, and an answer has one form: give one of them")
    if names == ["schema"]:
        shape = shape_of(schema)
        made = grammar_of("json_schema", shape.schema)
        assert made is not None
        return Form(made, lambda text: shape.read(json.loads(text)))
    if isinstance(grammar, Grammar):
        return Form(grammar)
    kind = {"regex": "regex", "choices": "choice", "grammar": "grammar"}[names[0]]
    made = grammar_of(kind, given[names[0]])
    assert made is not None
    return Form(made)


def read_value(form: Form, text: str, complete: bool) -> Any:
    """Read the value of an answer. None for a text that ended before its form did."""
    if form.read is None:
        return text if complete else None
    try:
        return form.read(text)
    except json.JSONDecodeError:
        if complete:
            raise UsageError(f"the answer is no JSON: {quote(text)}") from None
        return None
    except RecursionError:  # some models open one list in another until they have no tokens left
        if complete:
            raise UsageError(f"the answer is nested too deeply: {quote(text)}") from None
        return None
    except ValueError as error:
        raise UsageError(f"the answer is not what its type asks for: {error}") from error


def with_value(form: Form, result: Result) -> Result:
    """Complete a result by the value of its text."""
    return replace(result, parsed=read_value(form, result.text, result.finish_reason == "stop"))


# ---- Python's types ------------------------------------------------------------------------------------------------


def shape_of(kind: Any) -> Shape:
    """Return the shape of a schema, or of a type. Raises UsageError for anything else."""
    if isinstance(kind, (Mapping, bool)):
        return Shape(dict(kind) if isinstance(kind, Mapping) else {} if kind else {"enum": []}, lambda value: value)
    shapes = Shapes()
    shape = shapes.of(kind)
    return Shape({**shape.schema, "$defs": shapes.defs} if shapes.defs else shape.schema, shape.read)


class Shapes:
    """Makes shapes of types. Classes are definitions of their own, so that a class may have fields of itself."""

    def __init__(self) -> None:
        self.defs: Json = {}
        self._classes: dict[Any, tuple[str, list[Read]]] = {}

    def of(self, kind: Any) -> Shape:
        """Return the shape of a type. Raises UsageError for one that has none."""
        origin, inside = get_origin(kind), get_args(kind)
        if origin is typing.Annotated:
            return self._annotated(inside[0], inside[1:])
        if getattr(origin, "_name", "") in ("Required", "NotRequired"):
            return self.of(inside[0])
        if not isinstance(kind, Hashable):
            raise UsageError(f"{quote(repr(kind))} is no type; use {KNOWN}")
        if kind in _PLAIN:
            return _PLAIN[kind]
        if origin is typing.Literal:
            return _one_of(inside)
        if origin in (typing.Union, types.UnionType):
            return self._union(inside)
        if origin in _LISTS or kind in _LISTS:
            return self._list(_LISTS[origin or kind], inside)
        if origin is tuple:
            return self._tuple(inside)
        if kind is dict or origin in (dict, Mapping):
            return self._dict(inside)
        if isinstance(kind, type) or typing.is_typeddict(kind):
            return self._class(kind)
        raise UsageError(f"{quote(str(kind))} has no JSON schema; use {KNOWN}")

    def _annotated(self, kind: Any, notes: tuple[Any, ...]) -> Shape:
        shape = self.of(kind)
        said = next((n if isinstance(n, str) else n.description for n in notes if _describes(n)), None)
        return Shape({**shape.schema, "description": said}, shape.read) if said else shape

    def _union(self, kinds: Sequence[Any]) -> Shape:
        shapes = [self.of(kind) for kind in kinds]

        def read(value: Any) -> Any:
            for shape in shapes:
                try:
                    return shape.read(value)
                except ValueError:
                    continue
            raise ValueError(f"{quote(repr(value))} is none of {len(shapes)} types")

        return Shape({"anyOf": [shape.schema for shape in shapes]}, read)

    def _list(self, make: Callable[[Any], Any], inside: Sequence[Any]) -> Shape:
        item = self.of(inside[0]) if inside else _ANYTHING
        return Shape(
            {"type": "array", "items": item.schema}, lambda value: make([item.read(v) for v in _checked(value, list)])
        )

    def _tuple(self, inside: Sequence[Any]) -> Shape:
        if len(inside) == 2 and inside[1] is Ellipsis:
            return self._list(tuple, inside)
        items = [self.of(kind) for kind in inside]

        def read(value: Any) -> Any:
            if len(_checked(value, list)) != len(items):
                raise ValueError(f"{len(value)} items are not {len(items)}")
            return tuple(item.read(v) for item, v in zip(items, value, strict=True))

        bounds = {"minItems": len(items), "maxItems": len(items)}
        return Shape({"type": "array", "prefixItems": [i.schema for i in items], "items": False, **bounds}, read)

    def _dict(self, inside: Sequence[Any]) -> Shape:
        if inside and inside[0] is not str:
            raise UsageError(f"the keys of JSON objects are texts: use dict[str, …], not dict[{inside[0]}, …]")
        value = self.of(inside[1]) if inside else _ANYTHING
        return Shape(
            {"type": "object", "additionalProperties": value.schema},
            lambda given: {k: value.read(v) for k, v in _checked(given, dict).items()},
        )

    def _class(self, kind: Any) -> Shape:
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            named = _one_of([member.value for member in kind])
            return Shape(named.schema, lambda value: kind(named.read(value)))
        if hasattr(kind, "model_json_schema") and hasattr(kind, "model_validate"):
            return self._pydantic(kind)
        if kind not in self._classes:
            name = _free_name(kind.__name__, self.defs)
            readers: list[Read] = []
            self._classes[kind] = name, readers
            self.defs[name] = {}
            schema, read = self._fields(kind)
            self.defs[name] = schema
            readers.append(read)
        name, readers = self._classes[kind]
        return Shape({"$ref": f"#/$defs/{name}"}, lambda value: readers[0](value))

    def _pydantic(self, kind: Any) -> Shape:
        schema = kind.model_json_schema()
        for name, definition in schema.pop("$defs", {}).items():
            if self.defs.setdefault(name, definition) != definition:
                raise UsageError(f"two classes are named {name}; rename one of them")
        return Shape(schema, kind.model_validate)

    def _fields(self, kind: Any) -> tuple[Json, Read]:
        """Return the schema of a class with fields, and the function that makes one."""
        try:
            hints = typing.get_type_hints(kind, include_extras=True)
        except Exception as error:
            raise UsageError(f"the annotations of {kind.__name__} cannot be read: {error}") from error
        if typing.is_typeddict(kind):
            required = [n for n in hints if n in kind.__required_keys__]
            make: Any = dict
        elif dataclasses.is_dataclass(kind):
            fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
            hints = {name: hints[name] for name in fields}
            required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
            make = typing.cast(Any, kind)
        else:
            raise UsageError(f"{kind.__name__} has no JSON schema; use {KNOWN}")
        shapes = {name: self.of(hint) for name, hint in hints.items()}
        about = _documented(kind)
        schema = object_schema({name: shape.schema for name, shape in shapes.items()}, required, about)
        return schema, lambda value: make(**read_fields(shapes, required, value))


def object_schema(properties: Json, required: Sequence[str], description: str = "") -> Json:
    """Return the schema of an object with these properties and no others."""
    about = {"description": description} if description else {}
    return {
        "type": "object",
        **about,
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def read_fields(shapes: Mapping[str, Shape], required: Sequence[str], value: Any) -> Json:
    """Read the properties of an object. Raises ValueError that names the one that is wrong, missing or unknown."""
    missing = [name for name in required if name not in _checked(value, dict)]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    made = {}
    for name, given in value.items():
        if name not in shapes:
            raise ValueError(f"{quote(name)} is unknown; known are {', '.join(shapes) or 'none'}")
        try:
            made[name] = shapes[name].read(given)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return made


def _made(kind: Any, **fields: Any) -> Any:
    return kind(**fields)


def _describes(note: Any) -> bool:
    return isinstance(note, str) or isinstance(getattr(note, "description", None), str)


def _documented(kind: Any) -> str:
    """Return the docstring that a class has of its own: not the one that dataclasses make."""
    said = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
    return "" if said.startswith(f"{kind.__name__}(") else said


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    return next(one for i in range(len(taken) + 2) if (one := f"{name}{i or ''}") not in taken)


def _checked(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{quote(repr(value))} is no {'object' if kind is dict else 'list'}")
    return value


def _scalar(name: str, *kinds: type) -> Shape:
    def read(value: Any) -> Any:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{quote(repr(value))} is no {name}")
        return value

    return Shape({"type": name}, read)


def _float(value: Any) -> float:
    return float(_scalar("number", int, float).read(value))


def _one_of(values: Sequence[Any]) -> Shape:
    if any(not isinstance(v, (str, int, float, bool, type(None))) for v in values):
        raise UsageError(f"values of JSON are texts, numbers, booleans and None, not {quote(repr(values))}")

    def read(value: Any) -> Any:
        for one in values:
            if one == value and type(one) is type(value):
                return one
        raise ValueError(f"{quote(repr(value))} is none of {quote(repr(list(values)), 200)}")

    return Shape({"enum": list(values)}, read)


_ANYTHING = Shape({}, lambda value: value)
_NULL = _scalar("null", type(None))
_PLAIN: dict[Any, Shape] = {
    Any: _ANYTHING,
    object: _ANYTHING,
    inspect.Parameter.empty: _ANYTHING,
    None: _NULL,
    type(None): _NULL,
    str: _scalar("string", str),
    bool: _scalar("boolean", bool),
    int: _scalar("integer", int),
    float: Shape({"type": "number"}, _float),
}
_LISTS: dict[Any, Callable[[Any], Any]] = {list: list, set: set, frozenset: frozenset, Sequence: list}
