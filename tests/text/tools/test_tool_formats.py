"""Answers of all families become reasoning, text and calls, however they are cut, and whatever models do wrong."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.answers import TOOLS, Read, checked, events_of
from support.chat_forms import FORMS, Form, rendered
from zincmetal.text.tools.events import CallArguments, CallBegin, CallEnd, Reasoning, Text
from zincmetal.text.tools.format import Format, Wanted, format_of

WEATHER = (
    "get_weather",
    {"city": 'Zürich "a" <b> \\ {c}', "days": 3, "options": {"x": [1, 2.5, True, None], "y": "z"}},
)
NOW = ("now", {"zone": "UTC"})
ANSWERS = [
    Read("", "Look.", []),
    Read("", "", [WEATHER]),
    Read("Hm.\n\nSo.", "Look.", [NOW]),
    Read("", "Look.", [WEATHER, NOW]),
]
IDS = [f"{form.name}-{i}" for i, form in enumerate(FORMS)]


def _format(form: Form) -> Format:
    made = format_of(form.source, form.control)
    assert made.name == form.name
    return made


def _shows(form: Form, answer: Read) -> bool:
    one_call = form.name in ("llama", "harmony")  # a message of theirs has one call
    return not ((one_call and len(answer.calls) > 1) or (form.name == "llama" and answer.calls and answer.text))


@pytest.mark.parametrize("answer", ANSWERS, ids=("text", "call", "reasoning", "calls"))
@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_what_a_template_shows_is_read_back(form: Form, answer: Read) -> None:
    if not _shows(form, answer):
        pytest.skip("the family's messages have no such form")
    made = _format(form)
    tail, text = rendered(form, answer)
    events = events_of(made, text, tail)
    read = checked(events)
    assert Read(read.reasoning.strip(), read.text.strip(), read.calls) == answer
    assert events_of(made, [text], tail) == events
    for cut in range(len(text) if answer.reasoning else 0):
        assert events_of(made, [text[:cut], text[cut:]], tail) == events
    rng = random.Random(len(text))
    for _ in range(5):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(6))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert events_of(made, pieces, tail) == events


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_an_answer_may_be_cut_off_anywhere(form: Form) -> None:
    made = _format(form)
    tail, text = rendered(form, next(answer for answer in reversed(ANSWERS) if _shows(form, answer)))
    for end in range(len(text)):
        read = checked(events_of(made, [text[:end]], tail))
        assert len(read.calls) <= 2
        for name, arguments in read.calls:
            assert name in TOOLS
            known = list(TOOLS[name]["properties"])
            assert all(any(one.startswith(key) for one in known) for key in arguments)


def _markers(made: Format) -> list[str]:
    shape = made.shape
    texts = {*shape.turns, *shape.think, *shape.think_end}
    for one in shape.calls:
        texts |= {one.open, one.close, one.item, one.item_end, one.quote}
        if one.tags:
            texts |= {one.tags.key, one.tags.key_end, one.tags.value, one.tags.value_end, one.tags.text_value}
    texts |= {"<|channel|>", "<|message|>", "<|start|>", "<|end|>", " to=functions.now"} if shape.harmony else set()
    return sorted(text for text in texts if text)


FORMATS = list({form.name: _format(form) for form in FORMS}.values())
PIECES = [
    '{"name": "now", "arguments": {',
    '"zone": ',
    '"',
    "'",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\\",
    "\n",
    " ",
    "now",
    "f(",
]


@pytest.mark.parametrize("made", FORMATS, ids=lambda made: made.name)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_text_is_read_without_loss(made: Format, data: st.DataObject) -> None:
    words = st.sampled_from([*_markers(made), *PIECES, "α", "βγ", "δ", "ε"])
    pieces = data.draw(st.lists(words | st.text(max_size=3), max_size=25))
    tail = data.draw(
        st.sampled_from(["", *(f"{turn}{think}\n" for turn in made.shape.turns[:1] for think in made.shape.think)])
    )
    split = data.draw(st.booleans())
    whole = "".join(pieces)
    events = events_of(made, [whole], tail, split=split)
    assert events == events_of(made, whole, tail, split=split) == events_of(made, pieces, tail, split=split)
    read = checked(events)
    if not any(isinstance(event, CallBegin) for event in events) and not made.shape.harmony:
        said = read.reasoning + read.text
        marks = {*made.shape.turns, *made.shape.think, *made.shape.think_end}
        # Of a mark that begins with another, the end may be text: <|channel> and <|channel>thought.
        marks |= {mark.removeprefix(turn) for mark in made.shape.think for turn in made.shape.turns} - {""}
        hidden = "|".join(map(re.escape, sorted(marks, key=len, reverse=True)))
        assert re.sub(rf"{hidden}|\s", "", said) == re.sub(rf"{hidden}|\s", "", whole)
    greek = [char for char in whole if char in "αβγδε"]
    found = [char for event in events if isinstance(event, Text | Reasoning) for char in event.text if char in "αβγδε"]
    assert len(found) <= len(greek)


HERMES, XML = format_of("<tool_call>"), format_of("<tool_call><function=<parameter=")
DAYS = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\n{}\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)


def _calls(made: Format, text: str, tail: str = "") -> list[tuple[str, object]]:
    events = events_of(made, text, tail)
    assert events == events_of(made, [text], tail)
    return checked(events).calls


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"name": "now", "arguments": {"zone": "UTC"}', {"zone": "UTC"}),  # a bracket is missing
        ('{"name": "now", "arguments": {"zone": "UTC"', {"zone": "UTC"}),
        ('{"name": "now", "arguments": {"zone": "UT', {"zone": "UT"}),
        ('{"name": "now", "arguments": "{\\"zone\\": \\"UTC\\"}"}\n</tool_call>', {"zone": "UTC"}),
        ('{"name": "now", "arguments": {"zone": "UTC",}}\n</tool_call>', {"zone": "UTC"}),
        ("{'name': 'now', 'arguments': {'zone': 'it's'}}\n</tool_call>", {"zone": "it's"}),
        ('{"name": "now", "arguments": {"zone": "say "hi" now"}}\n</tool_call>', {"zone": 'say "hi" now'}),
        ('{"name": "now", "arguments": {"zone": "a\nb\\d"}}\n</tool_call>', {"zone": "a\nb\\d"}),
        ('{"name": "now", "arguments": {zone: None}}\n</tool_call>', {"zone": None}),
        ('{"arguments": {"zone": "UTC"}, "name": "now"}\n</tool_call>', {"zone": "UTC"}),
        (
            '{"type": "function", "function": {"name": "now", "parameters": {"zone": "UTC"}}}</tool_call>',
            {"zone": "UTC"},
        ),
        ('{"name": "now", "arguments": null}\n</tool_call>', {}),
        ('{"name": "now"}\n</tool_call>', {}),
        ('{"name": "now", "arguments": {"zone": "UTC"}, "arguments": {"zone": "CET"}}\n</tool_call>', {"zone": "UTC"}),
        ('{"name": "now", "arguments": {"zone": 5\u00a0, "x": 1\x1c}}\n</tool_call>', {"zone": 5, "x": 1}),
        ('{"name": "now", "arguments": "UTC"}\n</tool_call>', {"zone": "UTC"}),
        ('[{"name": "now", "arguments": {"zone": "UTC"}}]\n</tool_call>', {"zone": "UTC"}),
        ('{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>\n</tool_call>', {"zone": "UTC"}),
        ('{"name": "now", "arguments": {"zone": "</tool_call>"}}\n</tool_call>', {"zone": "</tool_call>"}),
    ],
)
def test_faults_in_json_are_mended(written: str, arguments: object) -> None:
    assert _calls(HERMES, f"<tool_call>\n{written}") == [("now", arguments)]


def test_what_was_mended_is_said() -> None:
    ends = [
        e
        for text in ('{"a": 1}', "{'a': 1}")
        for e in events_of(HERMES, f'<tool_call>{{"name": "f", "arguments": {text}}}</tool_call>')
    ]
    assert [event.repaired for event in ends if isinstance(event, CallEnd)] == [False, True]


@pytest.mark.parametrize(
    "city",
    ["a", "", "a\n\nb\n", "x </parameter> y", '{"json": 1}', "<b>&amp;</b>", "123", "null", "\\n\t\"'"],
)
def test_a_text_without_quotes_stays_as_it_is(city: str) -> None:
    assert _calls(XML, DAYS.format(city)) == [
        ("get_weather", {"city": city if city != "</parameter>" else "</parameter>", "days": 2})
    ]


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        (
            "<parameter=city>\na\n</parameter>\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
            {"city": "a", "days": 2},
        ),
        ("<parameter=city>\na\n<parameter=days>\n2\n</function>\n</tool_call>", {"city": "a", "days": 2}),
        ("<parameter=city>\na\n</function>\n</tool_call>", {"city": "a"}),
        ("<parameter=city>\na\n</parameter>\n</tool_call>", {"city": "a"}),
        ("<parameter=city>\na", {"city": "a"}),
        ("<parameter=days>\nsome\n</parameter>\n</function>", {"days": "some"}),
        ("<parameter=options>\n{'a': [True, None]}\n</parameter>\n</function>", {"options": {"a": [True, None]}}),
        (
            '<parameter=options>\n{"a": "</parameter>\\n</function>"}\n</parameter>\n</function>',
            {"options": {"a": "</parameter>\n</function>"}},
        ),
        ('{"city": "a"}\n</function>\n</tool_call>', {"city": "a"}),
        ("</function>\n</tool_call>", {}),
    ],
)
def test_faults_in_tags_are_mended(written: str, arguments: object) -> None:
    assert _calls(XML, f"<tool_call>\n<function=get_weather>\n{written}") == [("get_weather", arguments)]
    assert _calls(XML, f"So:\n<function=get_weather>\n{written}") == [("get_weather", arguments)]


def test_a_key_may_be_cut_inside_of_its_end() -> None:
    """A key after a value without its end: what ends the key comes in pieces, and is no text of the value."""
    glm = next(_format(form) for form in FORMS if form.name == "glm")
    text = "<arg_key>city</arg_key>\n<arg_value>a\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
    assert _calls(glm, f"<tool_call>get_weather\n{text}") == [("get_weather", {"city": "a\n", "days": 2})]


@pytest.mark.parametrize("n", [1, 127, 128, 129, 159, 160, 161, 300])
def test_a_name_of_any_length_is_read_the_same_however_it_is_cut(n: int) -> None:
    lfm2 = next(_format(form) for form in FORMS if form.name == "lfm2")
    for call in (f'get_weather({"c" * n}="a")', f'get_weather(city{" " * n}="a")', f'{"g" * n}(city="a")'):
        text = f"<|tool_call_start|>[{call}]<|tool_call_end|>"
        whole = events_of(lfm2, [text])
        assert events_of(lfm2, list(text)) == whole
        checked(whole)
    assert _calls(lfm2, f'<|tool_call_start|>[{"g" * 160}(city="a")]') == [("g" * 160, {"city": "a"})]
    assert _calls(lfm2, f'<|tool_call_start|>[get_weather({"c" * 128}="a")]') == [("get_weather", {"c" * 128: "a"})]


def test_a_call_in_open_reasoning_ends_it() -> None:
    text = 'Hm.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\nDone.'
    assert checked(events_of(HERMES, text, "<think>\n")) == ("Hm.", "Done.", [("now", {})])
    unknown = text.replace("now", "then")
    assert checked(events_of(HERMES, unknown, "<think>\n")) == (unknown, "", [])
    assert checked(events_of(HERMES, unknown, "")) == ("", "Hm.Done.", [("then", {})])


def test_reasoning_may_speak_of_calls() -> None:
    thought = "I write <tool_call> tags, or <tool_call>\n{ and so on"
    assert checked(events_of(HERMES, f"{thought}\n</think>\n\nYes.", "<think>\n")) == (thought, "Yes.", [])


@pytest.mark.parametrize(
    ("tail", "read"),
    [
        ("<|im_start|>assistant\n", Read("a", "b", [])),
        ("<|im_start|>assistant\n<think>\n", Read("<think>a", "b", [])),
        ("<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", Read("a", "b", [])),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", Read("a", "b", [])),
        ("<|im_start|>assistant\n<think>\nI wond", Read("<think>a", "b", [])),
    ],
)
def test_the_prompt_tells_how_an_answer_begins(tail: str, read: Read) -> None:
    assert checked(events_of(HERMES, "<think>a</think>b", tail)) == read


def test_reasoning_stays_in_the_text_if_wanted() -> None:
    text = "<think>\nHm.\n</think>\n\nYes."
    assert events_of(HERMES, text, split=False) == [Text(text)]
    harmony = format_of("<|channel|><|message|>")
    raw = "<|channel|>analysis<|message|>Hm.<|end|>"
    assert events_of(harmony, f"{raw}<|start|>assistant<|channel|>final<|message|>Yes.", split=False) == [
        Text(f"{raw}Yes.")
    ]


def test_control_tokens_of_turns_are_not_shown() -> None:
    made = format_of("<tool_call>", ("<|im_end|>", "<|extra|>", "<tool_call>"))
    assert events_of(made, "a<|im_end|>b<|extra|>c<|ext") == [Text("abc<|ext")]


def test_without_tools_there_are_no_calls() -> None:
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert events_of(HERMES, text, tools={}) == [Text(text)]


@pytest.mark.parametrize("source", ["<tool_call>", '<|start_header_id|> "parameters"', ""])
def test_json_alone_is_a_call_of_known_tools_only(source: str) -> None:
    made = format_of(source)
    assert _calls(made, '{"name": "now", "arguments": {"zone": "a"}}') == [("now", {"zone": "a"})]
    for text in (
        '{"name": "then", "arguments": {}}',
        '{"name": "now"}',
        '{"city": "now", "arguments": {}}',
        "[1, 2]",
        "{",
    ):
        assert events_of(made, text) == [Text(text)]


def test_llama_calls_in_other_ways() -> None:
    made = format_of("<|python_tag|>", ("<|python_tag|>",))
    assert _calls(made, '<|python_tag|>get_weather.call(city="a")') == [("get_weather", {"city": "a"})]
    assert _calls(made, '<|python_tag|>{"name": "now", "parameters": {}}') == [("now", {})]
    both = [("get_weather", {"city": "it's", "days": [1, 2]}), ("now", {"zone": None})]
    assert _calls(made, "[get_weather(city='it\\'s', days=(1, 2)), now(None)]") == both


@pytest.mark.parametrize(
    "head",
    [
        "<|channel|>commentary to=functions.now <|constrain|>json",
        "<|channel|>commentary to=functions.now",
        " to=functions.now<|channel|>commentary json",
        "<|channel|>analysis to=functions.now code",
        "<|channel|>odd to=now",
        "<|channel|>commentary<|channel|>commentary to=functions.now",
    ],
)
def test_heads_of_gpt_oss_may_be_broken(head: str) -> None:
    made = format_of("<|channel|><|message|>")
    assert _calls(made, f'{head}<|message|>{{"zone": "a"}}<|call|>') == [("now", {"zone": "a"})]
    assert _calls(made, f'{head}<|message|>{{"zone": "a"') == [("now", {"zone": "a"})]


def test_channels_of_gpt_oss() -> None:
    made = format_of("<|channel|><|message|>")
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>First.<|end|>"
        "<|start|>assistant<|channel|>strange<|message|>Odd.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    )
    assert events_of(made, text) == events_of(made, [text]) == [Reasoning("Hm."), Text("First.\n\nOdd.\n\nYes.")]
    assert events_of(made, "Plain text.") == [Text("Plain text.")]


def test_arguments_come_as_they_are_written() -> None:
    parser = HERMES.parser(TOOLS, "")
    seen = [
        parser.push(piece)
        for piece in ('<tool_call>{"name": "now", "argu', 'ments": {"zo', 'ne": "U', 'TC"}}', "</tool_call>")
    ]
    assert seen[:2] == [[CallBegin(0, "now")], [CallArguments(0, '{"zo')]]
    assert seen[2] == [CallArguments(0, 'ne": "U')]
    parser = XML.parser(TOOLS, "")
    list(parser.push("<tool_call>\n<function=get_weather>\n<parameter=city>\n"))
    assert parser.push('a "b') == [CallArguments(0, 'a \\"b')]


HOSTILE = (
    "<tool_call>" * 999,
    "<tool_call>{" * 999,
    '<tool_call>{"a":' * 999,
    "<" * 9999,
    "<tool_call>\n<function=now>\n<parameter=zone>\n" + "</parameter>\n" * 999,
    '<tool_call>{"name": "now", "arguments": ' + "[" * 9999,
    '<tool_call>{"name": "now", "arguments": {"zone": ' + "1" * 9999,
    '<tool_call>{"name": "now", "arguments": {"zone": "' + '"' * 9999,
    '<tool_call>{"name": "\\ud800", "arguments": {"\\udfff": 1}}',
    "<|channel|>" * 999,
    "[" * 9999,
    "<think>" * 999,
)


@pytest.mark.parametrize("text", HOSTILE, ids=[str(i) for i in range(len(HOSTILE))])
@pytest.mark.parametrize("source", ["<tool_call>", "<tool_call><function=<parameter=", "", "<|channel|><|message|>"])
def test_hostile_answers_are_read_to_the_end(source: str, text: str) -> None:
    events = events_of(format_of(source), [text[i : i + 97] for i in range(0, len(text), 97)])
    for name, _ in checked(events).calls:
        name.encode()


def test_references_of_schemas_may_go_in_circles() -> None:
    circle = [{"$ref": f"#/$defs/{i}"} for i in range(12)]
    schema = {
        "type": "object",
        "properties": {"a": {"anyOf": circle}},
        "$defs": {str(i): {"anyOf": circle} for i in range(12)},
    }
    for made in FORMATS:
        grammar = made.grammar(Wanted({"f": schema}), "")
        assert grammar is not None
        assert len(grammar.lark) < 50_000


def test_time_grows_with_the_length_alone() -> None:
    """Counts the characters that a parser looks at again, in place of time."""
    parser = HERMES.parser(TOOLS, "")
    list(parser.push('<tool_call>{"name": "now", "arguments": {"zone": "'))
    for _ in range(2000):
        assert sum(len(event.text) for event in parser.push("some text ") if isinstance(event, CallArguments)) == 10
