"""JSON schemas as grammars: what each keyword means, what is refused by name, and random answers that must validate."""

from __future__ import annotations

import json
import os

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.constrain_lab import Walker, accepts, bytes_vocabulary, file_vocabulary, valid
from support.random_schemas import Schemas
from support.schema_cases import CASES, UNSUPPORTED, Case, agent_tools
from zincmetal.errors import UnsupportedSchemaError, UsageError
from zincmetal.sampling.constrain import compiler, schema
from zincmetal.sampling.constrain.grammar import Grammar
from zincmetal.sampling.constrain.masks import Masks
from zincmetal.sampling.constrain.schema import prepared

BYTES = bytes_vocabulary()
MASKS = Masks(BYTES)
MANY = int(os.environ.get("ZINCMETAL_SCHEMAS", "60"))  # random schemas; make test-schemas sets it


@pytest.fixture(scope="module")
def real(smollm2) -> Walker:
    return Walker(file_vocabulary(smollm2), seed=5)


# ---- what keywords mean --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_keyword_means_what_it_says(case: Case):
    grammar = compiler.of_schema(case.schema)
    for text in case.allowed:
        assert accepts(BYTES, grammar, text.encode(), MASKS), text
        valid(case.schema, text.encode())
    for text in case.refused:
        assert not accepts(BYTES, grammar, text.encode(), MASKS), text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_random_answers_to_each_keyword_validate(case: Case):
    walker = Walker(BYTES, seed=1)
    walker.masks = MASKS
    for _ in range(3):
        valid(case.schema, walker.walk(compiler.of_schema(case.schema)))


def test_definitions_that_nothing_needs_change_nothing():
    assert prepared({"type": "null", "$defs": {"x": {"type": "integer"}}}).dropped == ()


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "keyword", "place"), UNSUPPORTED, ids=[case[1] for case in UNSUPPORTED])
def test_what_no_grammar_follows_is_refused_by_keyword_and_place(given, keyword, place):
    with pytest.raises(UnsupportedSchemaError) as caught:
        compiler.of_schema(given)
    assert (caught.value.keyword, caught.value.path) == (keyword, place)
    assert keyword in str(caught.value)
    assert place in str(caught.value)


@pytest.mark.parametrize(("given", "keyword", "place"), UNSUPPORTED, ids=[case[1] for case in UNSUPPORTED])
def test_a_lenient_grammar_follows_the_rest(given, keyword, place):
    if keyword == "pattern":
        pytest.skip("a pattern is judged by the compiler, which cannot leave it out")
    assert f"{place}/{keyword}" in prepared(given, lenient=True).dropped
    compiler.of_schema(given, lenient=True)


@pytest.mark.parametrize("keyword", [k for k in schema.UNSUPPORTED if k not in ("extends", "disallow", "divisibleBy")])
def test_the_compiler_itself_would_refuse_or_overlook_these_keywords(keyword):
    """The list says what llguidance does not follow. If it learns a keyword, this test says so."""
    values = {"uniqueItems": True, "minContains": 1, "maxContains": 1, "unevaluatedItems": False}
    given = {"type": "object", keyword: values.get(keyword, {}), "x-guidance": {}}
    try:
        compiler.check(Grammar("start: %json " + json.dumps(given)))
    except UsageError:
        return
    assert keyword in ("dependencies", "$recursiveRef")  # of drafts that it does not know


def test_an_error_of_a_schema_survives_a_pipe():
    import pickle

    error = pickle.loads(pickle.dumps(UnsupportedSchemaError("not", "#/items", "why")))
    assert (error.keyword, error.path, error.why) == ("not", "#/items", "why")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "is an object"),
        ({"type": "strin"}, "Invalid type"),
        ({"properties": []}, "#/properties"),
        ({"type": "object", "required": 5}, "required"),
        ({"anyOf": {}}, "#/anyOf"),
        ({"type": "object", "properties": {"a": 5}}, "#/properties/a"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"enum": []}, "no answer can satisfy"),
        (False, "no answer can satisfy"),
        ({"type": "object", "required": ["a"], "properties": {"a": False}}, "no answer can satisfy"),
        ({"minimum": float("nan")}, "no JSON"),
        ({"minimum": object()}, "no JSON"),
        ({"type": "integer", "minimum": -(10**400)}, "number out of range"),
    ],
)
def test_what_is_no_schema_is_refused_with_its_reason(given, words):
    with pytest.raises(UsageError, match=words):
        compiler.of_schema(given)


def test_options_of_the_compiler_in_a_schema_do_not_count():
    with pytest.raises(UnsupportedSchemaError):
        compiler.of_schema({"x-guidance": {"lenient": True}, "type": "object", "not": {}})
    grammar = compiler.of_schema({"x-guidance": {"item_separator": ";"}, "type": "array"})
    assert accepts(BYTES, grammar, b"[1,2]", MASKS)
    assert not accepts(BYTES, grammar, b"[1;2]", MASKS)


@pytest.mark.parametrize("closed", [True, False])
def test_control_characters_can_be_written_where_no_name_can_be_written_twice(closed):
    text = {"type": "string"}
    grammar = compiler.of_schema({"type": "object", "properties": {"a": text}, "additionalProperties": not closed})
    assert accepts(BYTES, grammar, b'{"a":"\\u001b[0m"}', MASKS) is closed
    assert accepts(BYTES, grammar, b'{"a":"\\n"}', MASKS)


def test_a_constant_with_a_control_character_can_be_written():
    given = {"type": "object", "properties": {"a": {"const": "\x1b"}}, "required": ["a"]}
    assert accepts(BYTES, compiler.of_schema(given), b'{"a":"\\u001B"}', MASKS)


# ---- hostile schemas -----------------------------------------------------------------------------------------------


def nested(depth: int):
    made: dict = {"type": "string"}
    for _ in range(depth):
        made = {"type": "object", "properties": {"a": made}}
    return made


def itself():
    made: dict = {"type": "array"}
    made["items"] = made
    return made


def doubled(n: int):
    defs = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{n}": {"type": "string"}}}


def crossed(n: int):
    options = [{"anyOf": [{"required": [f"p{i}{j}"]} for j in range(3)]} for i in range(n)]
    return {"type": "object", "allOf": options}


HOSTILE = {
    "deep": nested(60),
    "deeper": nested(100),
    "in itself": itself(),
    "a very deep list": json.loads("[" * 900 + "]" * 900),
    "only itself": {"$ref": "#"},
    "each other": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "all of itself": {"allOf": [{"$ref": "#"}, {"type": "object"}]},
    "doubled references": doubled(40),
    "a product of options": crossed(30),
    "a long text": {"type": "string", "minLength": 10**9},
    "many items": {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    "many values": {"enum": [f"value {i}" for i in range(50_000)]},
    "many properties": {"type": "object", "properties": {f"p{i}": {} for i in range(20_000)}},
    "bytes": {"description": "x" * 2_000_000},
    "repeats": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "ambiguous": {"type": "string", "pattern": "^(a+)+(a|aa)+(.*a){50}$"},
    "a choice long ago": {"type": "string", "pattern": "(a|b)*a(a|b){60}$"},
    "a huge multiple": {"type": "integer", "multipleOf": 2**31 - 1},
    "multiples without a common one": {"allOf": [{"type": "integer", "multipleOf": n} for n in (997, 991, 983, 977)]},
    "tiny numbers": {"type": "number", "minimum": 1e-300, "maximum": 1e300},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_followed_or_refused(name):
    """It takes neither long nor much memory, which the bounds of the compiler see to; what it costs is not asserted."""
    try:
        mask = MASKS.of(compiler.of_schema(HOSTILE[name]), None, 0)
        assert mask is not None
        assert mask([]) is not None
    except UsageError:
        pass


@pytest.mark.parametrize("name", ["deeper", "in itself", "many properties", "bytes", "only itself", "a huge multiple"])
def test_these_are_refused(name):
    with pytest.raises(UsageError):
        MASKS.of(compiler.of_schema(HOSTILE[name]), None, 0)


# ---- random answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(agent_tools())))
def test_random_arguments_of_agents_tools_validate(number: int, real: Walker):
    given = agent_tools()[number]
    for lenient in (False, True):
        grammar = compiler.of_schema(given, lenient)
        for _ in range(4):
            valid(given, real.walk(grammar))


@pytest.mark.parametrize("part", range(4))
def test_random_answers_to_random_schemas_validate(part: int, real: Walker):
    """Half of them over the vocabulary of the demo model, half over single bytes."""
    walkers = real, Walker(BYTES, seed=part)
    for number in range(part, MANY, 4):
        given = Schemas(number).any()
        jsonschema.Draft202012Validator.check_schema(given)
        valid(given, walkers[number % 8 < 4].walk(compiler.of_schema(given)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value=JSON.filter(lambda value: "\\ud" not in json.dumps(value)), seed=st.integers(0, 9))
def test_a_constant_is_written_as_it_is(value, seed):
    walker = Walker(BYTES, seed)
    walker.masks = MASKS
    assert json.loads(walker.walk(compiler.of_schema({"const": value}))) == value
