"""Forms of answers: schemas from Python's types, the values that answers become, and the forms that servers ask for."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Optional, TypedDict, Union

import jsonschema
import pytest

from support.constrain_lab import Walker, bytes_vocabulary
from zincmetal.api.schema import Form, form_of, grammar_of, read_value, shape_of
from zincmetal.errors import UnsupportedSchemaError, UsageError
from zincmetal.sampling.constrain import compiler
from zincmetal.sampling.constrain.grammar import Grammar

pydantic = pytest.importorskip("pydantic")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclass
class Point:
    """A place on the map."""

    x: float
    y: float = 0.0


@dataclass
class Tree:
    value: int
    children: list[Tree] = field(default_factory=list)
    cached: int = field(default=0, init=False)


class Movie(TypedDict):
    title: str
    year: int


class Partly(Movie, total=False):
    stars: int


class Address(pydantic.BaseModel):
    street: str
    number: int = pydantic.Field(ge=1, le=9999)


class Owner(pydantic.BaseModel):
    name: str
    home: Address
    pets: list[Literal["cat", "dog"]] = pydantic.Field(default_factory=list)


@dataclass
class Mixed:
    owner: Owner
    point: Point
    colours: list[Colour]


class Pair(NamedTuple):
    a: int
    b: int


CASES: list[tuple[Any, Any, Any]] = [
    (str, "x", "x"),
    (int, 3, 3),
    (float, 3, 3.0),
    (bool, True, True),
    (None, None, None),
    (Any, {"a": [1]}, {"a": [1]}),
    (Literal["a", 1, None], 1, 1),
    (Colour, "blue", Colour.BLUE),
    (Level, 2, Level.HIGH),
    (list[int], [1, 2], [1, 2]),
    (list, ["x", 1], ["x", 1]),
    (set[str], ["a", "b", "a"], {"a", "b"}),
    (frozenset[int], [1], frozenset({1})),
    (Sequence[bool], [True], [True]),
    (tuple[int, str], [1, "x"], (1, "x")),
    (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
    (dict[str, float], {"a": 1}, {"a": 1.0}),
    (Mapping[str, Colour], {"a": "red"}, {"a": Colour.RED}),
    (dict, {"a": None}, {"a": None}),
    (Optional[int], None, None),  # noqa: UP045
    (Union[int, str], "x", "x"),  # noqa: UP007
    (int | None, 5, 5),
    (list[Point | None], [{"x": 1}, None], [Point(1.0), None]),
    (Annotated[int, "How many"], 4, 4),
    (Point, {"x": 1, "y": 2.5}, Point(1.0, 2.5)),
    (Point, {"x": 1}, Point(1.0)),
    (Tree, {"value": 1, "children": [{"value": 2}]}, Tree(1, [Tree(2)])),
    (Movie, {"title": "t", "year": 1}, {"title": "t", "year": 1}),
    (Partly, {"title": "t", "year": 1}, {"title": "t", "year": 1}),
    (Owner, {"name": "n", "home": {"street": "s", "number": 7}}, Owner(name="n", home=Address(street="s", number=7))),
    (
        Mixed,
        {"owner": {"name": "n", "home": {"street": "s", "number": 7}}, "point": {"x": 0}, "colours": ["red"]},
        Mixed(Owner(name="n", home=Address(street="s", number=7)), Point(0.0), [Colour.RED]),
    ),
]


@pytest.mark.parametrize(  # a set is shown in the same order in every process
    ("kind", "given", "made"), CASES, ids=lambda value: str(sorted(value) if isinstance(value, set) else value)[:40]
)
def test_a_type_has_a_schema_and_its_values_are_read(kind, given, made):
    shape = shape_of(kind)
    jsonschema.Draft202012Validator.check_schema(shape.schema)
    jsonschema.validate(given, shape.schema)
    assert shape.read(given) == made
    assert type(shape.read(given)) is type(made)
    compiler.of_schema(shape.schema)


@pytest.mark.parametrize(
    "kind", [case[0] for case in CASES if case[0] not in (Any, dict, list)], ids=lambda k: str(k)[:40]
)
def test_random_answers_become_values(kind):
    shape, walker = shape_of(kind), Walker(bytes_vocabulary(), seed=3)
    for _ in range(3):
        value = json.loads(walker.walk(Grammar.of_schema(shape.schema)))
        jsonschema.validate(value, shape.schema)
        shape.read(value)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (int, "x"), (int, True), (int, 1.5), (str, 1), (bool, 1), (None, 0), (float, "1"), (float, True),
        (Literal["a"], "b"), (Literal[1], True), (Colour, "green"), (list[int], ["x"]), (list[int], {}),
        (tuple[int, str], [1]), (dict[str, int], {"a": "x"}), (dict[str, int], []), (int | None, "x"),
        (Point, {}), (Point, {"x": 1, "z": 2}), (Point, {"x": "1"}), (Movie, {"title": "t"}),
        (Address, {"street": "s", "number": 0}),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_refused(kind, wrong):
    with pytest.raises(ValueError, match=r"\w"):
        shape_of(kind).read(wrong)


def test_schemas_of_classes():
    assert shape_of(Point).schema == {
        "$ref": "#/$defs/Point",
        "$defs": {
            "Point": {
                "type": "object",
                "description": "A place on the map.",
                "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
    }
    assert shape_of(Annotated[int, "How many"]).schema == {"type": "integer", "description": "How many"}
    assert shape_of(Partly).schema["$defs"]["Partly"]["required"] == ["title", "year"]


def test_two_classes_of_one_name_are_two_definitions():
    def made(kind: Any) -> Any:
        @dataclass
        class Item:
            value: kind

        Item.__annotations__["value"] = kind
        return Item

    shape = shape_of(tuple[made(int), made(str)])
    assert len(shape.schema["$defs"]) == 2
    assert [one.value for one in shape.read([{"value": 1}, {"value": "x"}])] == [1, "x"]


@dataclass
class Unknown:
    value: Missing  # noqa: F821


@pytest.mark.parametrize(
    "kind", [object(), 5, "int", [int], Pair, complex, bytes, dict[int, str], Unknown, Literal[b"x"], lambda: 0]
)
def test_a_type_without_a_schema_is_refused(kind):
    with pytest.raises(UsageError):
        shape_of(kind)


def test_a_schema_is_taken_as_it_is():
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    shape = shape_of(schema)
    assert shape.schema == schema
    assert shape.read({"a": None}) == {"a": None}
    assert shape_of(True).schema == {}


# ---- what servers ask for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "made"),
    [
        ("text", None, None),
        ("json_object", None, Grammar.of_object()),
        ("json_schema", {"type": "null"}, Grammar.of_schema({"type": "null"})),
        ("regex", "a+", Grammar.of_regex("a+")),
        ("choice", ["a", "b"], Grammar.of_choices(["a", "b"])),
        ("lark", "start: /a/", Grammar("start: /a/")),
        ("gbnf", 'root ::= "a"', Grammar.of_gbnf('root ::= "a"')),
        ("grammar", 'root ::= "a"', Grammar.of_gbnf('root ::= "a"')),
        ("grammar", "start: /a/", Grammar("start: /a/")),
    ],
)
def test_the_grammar_of_a_form(kind, value, made):
    assert grammar_of(kind, value) == made


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("gbnf", "start: /a/", "line 1: ::= is expected"),
        ("gbnf", None, "a text"),
        ("xml", None, "json_schema"),
        ("regex", "(", "regex"),
        ("regex", None, "a text"),
        ("choice", [], "at least one"),
        ("lark", "start: nothing", "wrong"),
        ("lark", None, "a text"),
        ("json_schema", "x", "is an object"),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused(kind, value, words):
    with pytest.raises(UsageError, match=words):
        grammar_of(kind, value)


def test_an_unsupported_keyword_is_named():
    with pytest.raises(UnsupportedSchemaError) as caught:
        grammar_of("json_schema", {"type": "array", "items": {"not": {}}})
    assert (caught.value.keyword, caught.value.path) == ("not", "#/items")


# ---- what callers ask for ------------------------------------------------------------------------------------------


def test_forms_of_calls():
    assert form_of() is None
    assert form_of(choices=["a"]) == Form(Grammar.of_choices(["a"]))
    assert form_of(regex="a").grammar == Grammar.of_regex("a")
    assert form_of(grammar=Grammar("start: /a/")).grammar == Grammar("start: /a/")
    assert form_of(grammar="start: /a/").grammar == Grammar("start: /a/")
    form = form_of(schema=Point)
    assert read_value(form, '{"x": 1}', complete=True) == Point(1.0)
    assert read_value(form, '{"x": ', complete=False) is None


def test_an_answer_that_its_class_refuses_is_an_error_with_its_reason():
    class Even(pydantic.BaseModel):
        n: int

        @pydantic.field_validator("n")
        @classmethod
        def is_even(cls, n: int) -> int:
            if n % 2:
                raise ValueError("odd")
            return n

    form = form_of(schema=Even)
    assert read_value(form, '{"n": 2}', complete=True) == Even(n=2)
    with pytest.raises(UsageError, match="odd"):
        read_value(form, '{"n": 3}', complete=True)
    with pytest.raises(UsageError, match="no JSON"):
        read_value(form, '{"n": ', complete=True)


def test_an_answer_may_be_nested_deeper_than_it_can_be_read():
    form = form_of(schema={})
    assert read_value(form, "[" * 100_000, complete=False) is None
    with pytest.raises(UsageError, match="nested too deeply"):
        read_value(form, "[" * 100_000 + "]" * 100_000, complete=True)


def test_the_forms_of_answers_cost_nothing_until_they_are_asked_for():
    import subprocess

    code = (
        "import sys, zincmetal.api.model; "
        "bad = {'llguidance', 'pydantic', 'starlette', 'msgspec', 'jsonschema'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
