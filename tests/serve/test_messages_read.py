"""Requests of Anthropic's Messages API, as an Ask."""

from __future__ import annotations

import json

import pytest

from zincmetal.serve import wire
from zincmetal.serve.ask import AnswerFormat, Thinking, Tool, ToolChoice
from zincmetal.serve.errors import BadRequest
from zincmetal.serve.messages_read import read

HELLO = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "The weather", "input_schema": SCHEMA}
MARK = {"cache_control": {"type": "ephemeral"}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aaaa"}}


def ask(**fields):
    return read({"model": "m", "max_tokens": 100, "messages": HELLO, **fields}, {}).ask


def messages(*given, **fields):
    return list(ask(messages=list(given), **fields).messages)


def user(*blocks):
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks):
    return {"role": "assistant", "content": list(blocks)}


def text(words, **more):
    return {"type": "text", "text": words, **more}


def result(content, **more):
    return {"type": "tool_result", "tool_use_id": "t1", "content": content, **more}


CALL = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bonn"}}
CALLED = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}

MESSAGES = {
    "a text": ([{"role": "user", "content": "hi"}], [{"role": "user", "content": "hi"}]),
    "one block is its text": ([user(text("hi", **MARK))], [{"role": "user", "content": "hi"}]),
    "blocks stay in order": (
        [user(text("a"), text("b", **MARK))],
        [{"role": "user", "content": [text("a"), text("b")]}],
    ),
    "no blocks": ([user()], [{"role": "user", "content": []}]),
    "two users": (
        [user(text("a")), user(text("b"))],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    ),
    "system in the middle, as a list": (
        [*HELLO, {"role": "system", "content": [text("be brief", **MARK)]}],
        [*HELLO, {"role": "system", "content": "be brief"}],
    ),
    "system in the middle, as a text": (
        [*HELLO, {"role": "system", "content": "be brief"}],
        [*HELLO, {"role": "system", "content": "be brief"}],
    ),
    "thinking and a call": (
        [*HELLO, assistant({"type": "thinking", "thinking": "hm", "signature": ""}, CALL), user(result("warm"))],
        [
            *HELLO,
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALLED]},
            {"role": "tool", "tool_call_id": "t1", "content": "warm"},
        ],
    ),
    "redacted thinking is dropped": (
        [*HELLO, assistant({"type": "redacted_thinking", "data": "x"}, text("yes")), *HELLO],
        [*HELLO, {"role": "assistant", "content": "yes"}, *HELLO],
    ),
    "thinking without a text": (
        [*HELLO, assistant({"type": "thinking", "thinking": "", "signature": ""}, text("yes")), *HELLO],
        [*HELLO, {"role": "assistant", "content": "yes"}, *HELLO],
    ),
    "blocks of Anthropic's servers are dropped": (
        [
            *HELLO,
            assistant({"type": "server_tool_use", "id": "s"}, {"type": "web_search_tool_result"}, text("y")),
            *HELLO,
        ],
        [*HELLO, {"role": "assistant", "content": "y"}, *HELLO],
    ),
    "results come first": (
        [*HELLO, assistant(CALL), user(text("and now?"), result("warm"))],
        [
            *HELLO,
            {"role": "assistant", "content": "", "tool_calls": [CALLED]},
            {"role": "tool", "tool_call_id": "t1", "content": "warm"},
            {"role": "user", "content": "and now?"},
        ],
    ),
    "document of plain text": (
        [user({"type": "document", "title": "T", "source": {"type": "text", "data": "words"}})],
        [{"role": "user", "content": "T\nwords"}],
    ),
    "document of blocks": (
        [user({"type": "document", "source": {"type": "content", "content": [text("a"), text("b")]}})],
        [{"role": "user", "content": "a\nb"}],
    ),
    "search result": (
        [user({"type": "search_result", "title": "T", "source": "s", "content": [text("a")]})],
        [{"role": "user", "content": "T\ns\na"}],
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    given, wanted = MESSAGES[name]
    assert messages(*given) == wanted


@pytest.mark.parametrize(
    ("block", "content"),
    [
        (result("warm"), "warm"),
        (result([text("warm"), text("dry")]), "warm\ndry"),
        (result([]), ""),
        ({"type": "tool_result", "tool_use_id": "t1"}, ""),
        (result("no city", is_error=True), "Error: no city"),
        (result("Error: no city", is_error=True), "Error: no city"),
        (result("<tool_use_error>no</tool_use_error>", is_error=True), "<tool_use_error>no</tool_use_error>"),
        (result([], is_error=True), "Error"),
        (result([{"type": "tool_reference", "tool_name": "weather"}]), "weather"),
        (result([text("a"), IMAGE]), "a\n[image: not shown, this model reads text only]"),
        (
            result([{"type": "document", "source": {"type": "base64"}}]),
            "[document: not shown, this model reads text only]",
        ),
        (result([{"type": "document", "source": {"type": "text", "data": "words"}}]), "words"),
    ],
)
def test_results_of_tools(block, content):
    assert messages(user(block)) == [{"role": "tool", "tool_call_id": "t1", "content": content}]


def test_blocks_of_the_system_prompt_stay_apart():
    """Canonicalisation drops the block that bills, which it only finds if it stands alone."""
    billing = text("x-anthropic-billing-header: cc_version=2.1.332.1c9;")
    found = messages(*HELLO, system=[billing, text("You code.", **MARK)])
    assert found == [{"role": "system", "content": [billing, text("You code.")]}, *HELLO]


@pytest.mark.parametrize(
    ("system", "found"), [("be brief", [{"role": "system", "content": "be brief"}]), ("", []), ([], []), (None, [])]
)
def test_system_prompts(system, found):
    assert messages(*HELLO, system=system) == [*found, *HELLO]


@pytest.mark.parametrize(
    ("last", "continues", "left"),
    [
        ({"role": "assistant", "content": "It is"}, True, 2),
        ({"role": "assistant", "content": ""}, False, 1),
        (assistant(CALL), False, 2),
        ({"role": "user", "content": "go"}, False, 2),
    ],
)
def test_prefill_is_continued(last, continues, left):
    found = ask(messages=[*HELLO, last])
    assert (found.continue_final, len(found.messages)) == (continues, left)


# ---- tools --------------------------------------------------------------------------------------------------

DEFERRED = {**WEATHER, "name": "hidden", "defer_loading": True}


@pytest.mark.parametrize(
    ("tools", "names"),
    [
        ([WEATHER], ["weather"]),
        ([{**WEATHER, "type": "custom", **MARK, "eager_input_streaming": True}], ["weather"]),
        ([WEATHER, DEFERRED], ["weather"]),
        ([{"type": "web_search_20250305", "name": "web_search"}, WEATHER], ["weather"]),
        ([{"type": "bash_20250124", "name": "bash"}], []),
        ([{"name": "z", "input_schema": SCHEMA}, {"name": "a", "input_schema": SCHEMA}], ["z", "a"]),
    ],
)
def test_tools(tools, names):
    assert [tool.name for tool in ask(tools=tools).tools] == names


def test_tool_has_its_schema():
    assert ask(tools=[{**WEATHER, "strict": True}]).tools == (Tool("weather", "The weather", SCHEMA, strict=True),)
    assert ask(tools=[{"name": "now"}]).tools == (Tool("now", "", {"type": "object"}),)


def test_deferred_tool_is_shown_once_a_search_has_found_it():
    found = user(result([{"type": "tool_reference", "tool_name": "hidden"}]))
    seen = ask(messages=[*HELLO, assistant(CALL), found], tools=[DEFERRED, WEATHER])
    assert [(tool.name, tool.listed) for tool in seen.tools] == [("weather", True), ("hidden", False)]
    told = json.loads(seen.messages[-1]["content"])
    assert told["function"] == {"name": "hidden", "description": "The weather", "parameters": SCHEMA}


def test_tools_that_are_left_out_are_logged_once(caplog):
    tool = {"type": "web_search_20990101", "name": "web_search"}
    with caplog.at_level("INFO", logger="zincmetal.serve"):
        ask(tools=[tool]), ask(tools=[tool, WEATHER])
    assert [record.message.count("web_search_20990101") for record in caplog.records] == [1]


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        (None, ToolChoice()),
        ({"type": "auto"}, ToolChoice()),
        ({"type": "any"}, ToolChoice("required")),
        ({"type": "none"}, ToolChoice("none")),
        ({"type": "tool", "name": "weather"}, ToolChoice("required", ("weather",))),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice("auto", (), False)),
        ({"type": "any", "disable_parallel_tool_use": True}, ToolChoice("required", (), False)),
    ],
)
def test_tool_choice(choice, found):
    assert ask(tools=[WEATHER], tool_choice=choice).choice == found


# ---- the rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, Thinking()),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, Thinking()),
        ({"thinking": {"type": "between_tools"}}, Thinking()),
        ({"thinking": {"type": "disabled"}}, Thinking("none")),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, Thinking("none")),
        ({"thinking": {"type": "enabled", "budget_tokens": 31999}}, Thinking("medium", 31999)),
        ({"thinking": {"type": "enabled"}, "output_config": {"effort": "max"}}, Thinking("max")),
        ({"output_config": {"effort": "high"}}, Thinking("high")),
    ],
)
def test_thinking(fields, found):
    assert ask(**fields).thinking == found


@pytest.mark.parametrize(
    "fields",
    [
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        {"output_format": {"type": "json_schema", "schema": SCHEMA}},
    ],
)
def test_form_of_the_answer(fields):
    assert ask(**fields).format == AnswerFormat("json_schema", SCHEMA)


def test_sampling_and_bounds():
    found = ask(temperature=1, top_p=0.9, top_k=40, stop_sequences=["END"])
    assert (found.sampling["temperature"], found.sampling["top_p"], found.sampling["top_k"]) == (1, 0.9, 40)
    assert (found.stop, found.max_tokens) == (("END",), 100)
    assert ask(max_tokens=None).max_tokens is None


@pytest.mark.parametrize(
    ("headers", "user_id", "found"),
    [
        ({}, None, ""),
        ({"x-claude-code-session-id": "s1"}, '{"session_id":"s2"}', "s1"),
        ({}, '{"device_id":"d","session_id":"s2"}', "s2"),
        ({}, "u1", "u1"),
        ({}, "{broken", "{broken"),
        ({}, "{" * 9999, "{" * 200),
    ],
)
def test_session(headers, user_id, found):
    body = {"messages": HELLO, "metadata": {"user_id": user_id}}
    assert read(body, headers).ask.affinity == found


def test_what_claude_code_sends_is_accepted(caplog):
    """Every key of its request, and no line in the log."""
    body = {
        "model": "m",
        "max_tokens": 32000,
        "stream": True,
        "system": [text("x-anthropic-billing-header: x"), text("a", **MARK), text("b", **MARK)],
        "messages": [user(text("reminder"), text("go")), {"role": "system", "content": [text("rules", **MARK)]}],
        "tools": [WEATHER, {"name": "DeferredToolPlaceholder", "defer_loading": True}],
        "thinking": {"type": "adaptive", "display": "omitted"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "metadata": {"user_id": json.dumps({"device_id": "d", "session_id": "s"})},
    }
    with caplog.at_level("INFO", logger="zincmetal.serve"):
        found, stream = read(body, {"anthropic-beta": "claude-code-20250219"})
    assert (stream, found.max_tokens, found.thinking.effort, caplog.records) == (True, 32000, "high", [])
    assert [message["role"] for message in found.messages] == ["system", "user", "system"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [user({"text": "hi"})]}, "messages[0].content[0].type"),
        ({"messages": [user(text("a"), IMAGE)]}, "messages[0].content[1]"),
        ({"messages": [user(result([{"text": "x"}]))]}, "messages[0].content[0].content[0].type"),
        ({"messages": [user({"type": "document", "source": {"type": "base64"}})]}, "messages[0].content[0]"),
        ({"messages": [user({"type": "tool_result", "content": "x"})]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [*HELLO, assistant({"type": "tool_use", "id": "t"})]}, "messages[1].content[0].name"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"system": 7}, "system"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"tools": [{"description": "x"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [{"name": "x", "input_schema": "y"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": [WEATHER]}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "hard"}}, "thinking.type"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_refusal_names_the_field(fields, param):
    with pytest.raises(BadRequest) as refusal:
        ask(**fields)
    assert refusal.value.param == param
    assert param.split("[")[0].split(".")[0] in str(refusal.value)


def test_unknown_fields_are_logged_and_change_nothing(caplog, monkeypatch):
    monkeypatch.setattr(wire, "_known_unknown", set())
    with caplog.at_level("INFO", logger="zincmetal.serve"):
        assert ask(frobnicate=1) == ask()
    assert ["frobnicate" in record.message for record in caplog.records] == [True]


def test_fields_of_our_own():
    found = ask(deadline=30, keep_alive="5m", chat_template_kwargs={"enable_thinking": False})
    assert (found.deadline, found.keep_alive, found.variables) == (30, 300, {"enable_thinking": False})
