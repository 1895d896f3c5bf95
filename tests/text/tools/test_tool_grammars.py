"""Grammars allow what templates show, and whatever they allow is read as calls that follow their schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

import jsonschema
import pytest

from support.answer_writer import Writer
from support.answers import TOOLS, Read, checked, events_of
from support.chat_forms import FORMS, Form, rendered
from support.random_schemas import Schemas
from zincmetal.sampling.constrain.grammar import Grammar
from zincmetal.text.tools.format import Format, Wanted, format_of

pytest.importorskip("llguidance")

WEATHER = ("get_weather", {"city": 'Zürich "a" \\ {c}', "days": 3, "options": {"x": "z"}})
NOW = ("now", {"zone": "UTC"})
IDS = [f"{form.name}-{i}" for i, form in enumerate(FORMS)]


def _grammar(made: Format, wanted: Wanted, tail: str) -> Grammar:
    grammar = made.grammar(wanted, tail)
    assert grammar is not None
    return grammar


def _format(form: Form) -> Format:
    return format_of(form.source, form.control)


def _answers(form: Form) -> Iterable[tuple[Read, str, str]]:
    for answer in (Read("", "", [WEATHER]), Read("Hm.", "", [NOW]), Read("Hm.", "", [WEATHER, NOW])):
        if len(answer.calls) == 1 or form.name not in ("llama", "harmony"):
            if form.name == "llama" and answer.reasoning:
                continue
            yield answer, *rendered(form, answer)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_what_a_template_shows_is_allowed(form: Form) -> None:
    made = _format(form)
    writer = Writer(made)
    for answer, tail, text in _answers(form):
        for mode in ("auto", "required"):
            for parallel in (True, False):
                refused = writer.refused(_grammar(made, Wanted(TOOLS, mode, parallel), tail), text)
                if parallel or len(answer.calls) == 1:
                    assert refused is None, text.encode()[refused:][:60]
                else:
                    assert refused is not None
        if made.name != "llama":  # whose calls have no marker
            assert writer.refused(_grammar(made, Wanted(TOOLS, "none"), tail), text) is not None


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_what_is_no_call_of_a_tool_is_not_allowed(form: Form) -> None:
    made = _format(form)
    writer = Writer(made)
    tail, text = rendered(form, Read("", "", [WEATHER]))
    for wrong in (text.replace("get_weather", "get_whether"), text.replace("days", "daze"), text.replace("3", "many")):
        assert wrong != text
        for mode in ("auto", "required"):
            free = made.name == "llama" and mode == "auto" and "whether" in wrong  # JSON that is no call
            assert (writer.refused(_grammar(made, Wanted(TOOLS, mode), tail), wrong) is None) == free, wrong


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_answers_drawn_at_random_call_tools(form: Form) -> None:
    made = _format(form)
    writer = Writer(made)
    tail = rendered(form, Read("", "Yes.", []))[0]
    for parallel in (True, False):
        grammar = _grammar(made, Wanted(TOOLS, "required", parallel), tail)
        for _ in range(4):
            text = writer.write(grammar)
            events = events_of(made, [text], tail)
            calls = checked(events).calls
            assert len(calls) == 1 or (parallel and calls), text
            assert not any(getattr(event, "repaired", False) for event in events), text
            for name, arguments in calls:
                jsonschema.validate(arguments, TOOLS[name])
    for _ in range(3):  # a free answer ends, and what is read in it never fails
        checked(events_of(made, [writer.write(_grammar(made, Wanted(TOOLS), tail))], tail))


def _plain_names(schema: object) -> object:
    """Gives members names that all formats can write."""
    if isinstance(schema, list):
        return [_plain_names(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _plain_names(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict):
        made["properties"] = {_plain(name): one for name, one in made["properties"].items()}
    if isinstance(made.get("required"), list):
        made["required"] = [_plain(name) for name in made["required"]]
    return made


def _plain(name: str) -> str:
    return re.sub(r"[^a-z]", "_", f"k{name.encode('ascii', 'xmlcharrefreplace').decode()}")


@pytest.mark.parametrize("form", FORMS[::2], ids=IDS[::2])
def test_arguments_drawn_at_random_follow_any_schema(form: Form) -> None:
    made = _format(form)
    writer, schemas = Writer(made), Schemas(len(form.source))
    tail = rendered(form, Read("", "Yes.", []))[0]
    for _ in range(6):
        schema = schemas.object(2) | ({"$defs": schemas.defs} if schemas.defs else {})
        if made.name in ("gemma4", "lfm2"):
            schema = _plain_names(schema)
            if "patternProperties" in json.dumps(schema):
                continue
        assert isinstance(schema, dict)
        text = writer.write(_grammar(made, Wanted({"f": schema}, "required", False), tail), 150)
        ((name, arguments),) = checked(events_of(made, [text], tail, {"f": schema})).calls
        assert name == "f"
        jsonschema.validate(arguments, schema)


@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[3], FORMS[7]], ids=["before", "inside", "xml", "harmony"])
def test_the_form_of_a_text_begins_behind_the_reasoning(form: Form) -> None:
    made = _format(form)
    writer = Writer(made)
    body = Grammar.of_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    tail = rendered(form, Read("", "Yes.", []))[0]
    for tools in ({}, TOOLS):
        grammar = _grammar(made, Wanted(tools, body=body), tail)
        for _ in range(5):
            read = checked(events_of(made, [writer.write(grammar)], tail, {}))
            assert isinstance(json.loads(read.text)["a"], int)


def test_names_of_control_tokens_are_used_where_there_are_any() -> None:
    source = "[TOOL_CALLS] [ARGS]"
    written = [format_of(source, control).grammar(Wanted(TOOLS), "") for control in ((), ("[TOOL_CALLS]", "[ARGS]"))]
    assert '"[TOOL_CALLS]"' in written[0].lark
    assert '"[TOOL_CALLS]"' not in written[1].lark


def test_nothing_is_asked_of_a_plain_answer() -> None:
    assert Format().grammar(Wanted({}), "") is None
    assert format_of("<tool_call>").grammar(Wanted({}), "") is None
    assert format_of('<|start_header_id|> "parameters"').grammar(Wanted(TOOLS, "none"), "") is None
