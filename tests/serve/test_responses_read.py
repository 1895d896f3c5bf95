"""Requests of OpenAI's Responses API, as an Ask."""

from __future__ import annotations

import pytest

from zincmetal.serve.ask import AnswerFormat, Thinking, Tool, ToolChoice
from zincmetal.serve.errors import HttpError
from zincmetal.serve.responses_read import read

STORED = {
    "resp_1": [
        {"type": "message", "role": "user", "content": "one"},
        {"type": "message", "role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "two"}]},
    ]
}
ITEMS = {"msg_1": STORED["resp_1"][1]}
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,aaaa"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "name": "weather", "description": "The weather", "parameters": SCHEMA, "strict": False}
AGENTS = {"type": "namespace", "name": "agents", "description": "d", "tools": [{"type": "function", "name": "spawn"}]}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Patch.", "format": {"type": "text"}}


def request(**fields):
    return read({"model": "m", "input": "hi", **fields}, {}, STORED.__getitem__, ITEMS.get)


def ask(**fields):
    return request(**fields).ask


def messages(*items, **fields):
    return list(ask(input=list(items), **fields).messages)


def message(role, *parts, **more):
    return {"type": "message", "role": role, "content": list(parts), **more}


def part(text, kind="input_text"):
    return {"type": kind, "text": text}


def call(number, name="weather", **more):
    return {
        "type": "function_call",
        "id": f"fc_{number}",
        "call_id": f"call_{number}",
        "name": name,
        "arguments": "{}",
        **more,
    }


def called(number, name="weather", arguments="{}"):
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def output(number, value, **more):
    return {"type": "function_call_output", "call_id": f"call_{number}", "output": value, **more}


USER = {"role": "user", "content": "hi"}
CASES = {
    "a message without its type": ([USER], [USER]),
    "one part is its text": ([message("user", part("hi"))], [USER]),
    "parts": (
        [message("user", part("a"), part("b"))],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    ),
    "developer, twice": (
        [message("developer", part("a")), message("developer", part("b"), part("c")), USER],
        [
            {"role": "developer", "content": "a"},
            {"role": "developer", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
            USER,
        ],
    ),
    "users, one after another": ([USER, USER], [USER, USER]),
    "an answer": (
        [USER, message("assistant", part("yes", "output_text"), id="msg_0", status="completed"), USER],
        [USER, {"role": "assistant", "content": "yes"}, USER],
    ),
    "a refusal": (
        [USER, message("assistant", {"type": "refusal", "refusal": "no"}), USER],
        [USER, {"role": "assistant", "content": "no"}, USER],
    ),
    "an answer with all": (
        [
            USER,
            {"type": "reasoning", "id": "rs_0", "summary": [], "content": [part("hm", "reasoning_text")]},
            message("assistant", part("I look.", "output_text")),
            call(0),
            call(1),
            output(0, "warm"),
            output(1, "cold", id="fco_1"),
        ],
        [
            USER,
            {
                "role": "assistant",
                "content": "I look.",
                "reasoning_content": "hm",
                "tool_calls": [called(0), called(1)],
            },
            {"role": "tool", "tool_call_id": "call_0", "content": "warm"},
            {"role": "tool", "tool_call_id": "call_1", "content": "cold"},
        ],
    ),
    "two rounds of calls": (
        [USER, call(0), output(0, "a"), call(1), output(1, "b")],
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [called(0)]},
            {"role": "tool", "tool_call_id": "call_0", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [called(1)]},
            {"role": "tool", "tool_call_id": "call_1", "content": "b"},
        ],
    ),
    "a summary stands for its reasoning": (
        [USER, {"type": "reasoning", "summary": [part("hm", "summary_text")], "encrypted_content": None}, call(0)],
        [USER, {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [called(0)]}],
    ),
    "reasoning that is encrypted has no text": (
        [
            USER,
            {"type": "reasoning", "summary": [], "encrypted_content": "x"},
            message("assistant", part("yes", "text")),
        ],
        [USER, {"role": "assistant", "content": "yes"}],
    ),
    "a call in a namespace": (
        [USER, call(0, "spawn", namespace="agents")],
        [USER, {"role": "assistant", "content": "", "tool_calls": [called(0, "agents.spawn")]}],
    ),
    "a call with a text": (
        [
            USER,
            {"type": "custom_tool_call", "call_id": "call_0", "name": "apply_patch", "input": "*** é\n"},
            {"type": "custom_tool_call_output", "call_id": "call_0", "output": "ok"},
        ],
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [called(0, "apply_patch", '{"input": "*** é\\n"}')]},
            {"role": "tool", "tool_call_id": "call_0", "content": "ok"},
        ],
    ),
    "unknown items are left out": ([{"type": "web_search_call", "id": "ws"}, USER], [USER]),
    "unknown items do not cut an answer": (
        [USER, message("assistant", part("a", "text")), {"type": "web_search_call"}, call(0)],
        [USER, {"role": "assistant", "content": "a", "tool_calls": [called(0)]}],
    ),
    "a reference": ([USER, {"type": "item_reference", "id": "msg_1"}], [USER, {"role": "assistant", "content": "two"}]),
    "a reference without its type": ([USER, {"id": "msg_1"}], [USER, {"role": "assistant", "content": "two"}]),
}


@pytest.mark.parametrize("name", CASES)
def test_messages(name):
    given, wanted = CASES[name]
    assert messages(*given) == wanted


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("warm", "warm"),
        ([part("warm"), part("dry")], "warm\ndry"),
        ([part("warm"), IMAGE], "warm\n[input_image: not shown, this model reads text only]"),
        ([], ""),
        ({"content": "warm", "success": True}, "warm"),
        ({"warm": True}, '{"warm": true}'),
    ],
)
def test_outputs_of_tools(value, content):
    assert messages(USER, call(0), output(0, value))[-1]["content"] == content


def test_input_may_be_a_text():
    assert list(ask(input="hi").messages) == [USER]


@pytest.mark.parametrize("instructions", ["be brief", [message("system", part("be brief"))]])
def test_instructions_come_first(instructions):
    assert messages(USER, instructions=instructions) == [{"role": "system", "content": "be brief"}, USER]


def test_previous_response_comes_before_the_input():
    found = request(previous_response_id="resp_1", instructions="be brief")
    assert [m["content"] for m in found.ask.messages] == ["be brief", "one", "two", "hi"]
    assert (len(found.items), len(found.inputs)) == (3, 1)


# ---- tools --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tools", "seen"),
    [
        ([WEATHER], ["weather"]),
        ([WEATHER, AGENTS, PATCH], ["weather", "agents.spawn", "apply_patch"]),
        ([{"type": "web_search"}, WEATHER], ["weather"]),
        ([{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}], ["weather"]),
    ],
)
def test_tools(tools, seen):
    assert list(request(tools=tools).tools) == seen


def test_tools_have_their_schemas():
    weather, spawn, patch = ask(tools=[WEATHER, AGENTS, PATCH]).tools
    assert weather == Tool("weather", "The weather", SCHEMA)
    assert (spawn.name, spawn.space) == ("spawn", "agents")
    assert (patch.free, patch.schema["required"], patch.description) == (True, ["input"], "Patch.")


def test_grammar_of_a_text_tool_is_told_to_the_model():
    form = {"type": "grammar", "syntax": "lark", "definition": "start: patch"}
    (tool,) = ask(tools=[{**PATCH, "format": form}]).tools
    assert tool.description == "Patch.\n\nThe input follows this grammar:\nstart: patch"


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, ToolChoice()),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ToolChoice("auto", (), False)),
        ({"tool_choice": "none"}, ToolChoice("none")),
        ({"tool_choice": "required"}, ToolChoice("required")),
        ({"tool_choice": {"type": "function", "name": "weather"}}, ToolChoice("required", ("weather",))),
        ({"tool_choice": {"type": "function", "name": "spawn"}}, ToolChoice("required", ("agents.spawn",))),
        (
            {"tool_choice": {"type": "function", "name": "spawn", "namespace": "agents"}},
            ToolChoice("required", ("agents.spawn",)),
        ),
        ({"tool_choice": {"type": "custom", "name": "apply_patch"}}, ToolChoice("required", ("apply_patch",))),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "weather"}, {"type": "web_search"}],
                }
            },
            ToolChoice("required", ("weather",)),
        ),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "weather"}],
                }
            },
            ToolChoice("auto", ("weather",)),
        ),
    ],
)
def test_tool_choice(fields, found):
    assert ask(tools=[WEATHER, AGENTS, PATCH], **fields).choice == found


# ---- the rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (None, AnswerFormat()),
        ({"type": "text"}, AnswerFormat()),
        ({"type": "json_object"}, AnswerFormat("json_object")),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA}, AnswerFormat("json_schema", SCHEMA)),
        (
            {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": False},
            AnswerFormat("json_schema", SCHEMA, False),
        ),
    ],
)
def test_form_of_the_answer(form, found):
    assert ask(text={"format": form, "verbosity": "low"}).format == found


@pytest.mark.parametrize(
    ("reasoning", "thinking", "summary"),
    [
        (None, Thinking(), False),
        ({"effort": "high"}, Thinking("high"), False),
        ({"effort": None, "summary": "auto"}, Thinking(), True),
        ({"summary": "none"}, Thinking(), False),
        ({"generate_summary": "concise"}, Thinking(), True),
    ],
)
def test_reasoning(reasoning, thinking, summary):
    found = request(reasoning=reasoning)
    assert (found.ask.thinking, found.summary) == (thinking, summary)


def test_bounds_and_session():
    found = ask(max_output_tokens=64, temperature=0.5, top_p=0.9, prompt_cache_key="session")
    assert (found.max_tokens, found.sampling["temperature"], found.affinity) == (64, 0.5, "session")
    assert read({"input": "hi"}, {"x-session-affinity": "s"}, STORED.get, ITEMS.get).ask.affinity == "s"


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"top_logprobs": 2}, 2),
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["x"]}, None),
    ],
)
def test_log_probabilities(fields, logprobs):
    assert ask(**fields).logprobs == logprobs


def test_response_repeats_the_request():
    fields = {
        "instructions": "be brief",
        "max_output_tokens": 64,
        "metadata": {"a": "b"},
        "prompt_cache_key": "k",
        "tool_choice": "required",
        "user": "u",
        "store": False,
    }
    tools = [{"type": "function", "name": "now"}]
    about = request(**fields, tools=tools, reasoning={"effort": "low"}).about
    assert {name: about[name] for name in fields} == fields
    assert about["tools"] == [{**tools[0], "description": None, "parameters": None, "strict": None}]
    assert (about["reasoning"], about["truncation"]) == ({"effort": "low", "summary": None}, "disabled")


def test_what_codex_sends_is_accepted(caplog):
    """Every key of its request; only the search of the web is named in the log."""
    body = {
        "model": "m",
        "stream": True,
        "input": [
            message("developer", part("a")),
            message("developer", part("b"), part("c")),
            message("user", part("environment")),
            message("user", part("go")),
        ],
        "tools": [WEATHER, AGENTS, {"type": "web_search", "external_web_access": True}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "session",
        "client_metadata": {"x": "y"},
    }
    with caplog.at_level("INFO", logger="zincmetal.serve"):
        found = read(body, {}, STORED.__getitem__, ITEMS.get)
    assert (found.stream, found.store, found.summary, found.ask.affinity) == (True, False, True, "session")
    assert [m["role"] for m in found.ask.messages] == ["developer", "developer", "user", "user"]
    assert all("web_search" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"input": 7}, "input"),
        ({"input": []}, "input"),
        ({"input": ["hi"]}, "input[0]"),
        ({"input": [message("user", part("a"), IMAGE)]}, "input[0].content[1]"),
        ({"input": [USER, output(0, [{"type": "x"}])]}, "input[1].output[0].type"),
        ({"input": [message("user", {"type": "x", "text": "y"})]}, "input[0].content[0].type"),
        ({"input": [message("robot", part("a"))]}, "input[0].role"),
        ({"input": [USER, {"type": "function_call", "call_id": "c"}]}, "input[1].name"),
        ({"input": [USER, {"type": "item_reference", "id": "msg_9"}]}, "input[1].id"),
        ({"instructions": 7}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
        ({"tools": [{**AGENTS, "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "some"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": [WEATHER]}, "tool_choice.name"),
        ({"tool_choice": {"type": "allowed_tools", "tools": [{"type": "mcp"}]}}, "tool_choice.tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
        ({"stream": 1}, "stream"),
    ],
)
def test_refusal_names_the_field(fields, param):
    with pytest.raises(HttpError) as refusal:
        request(**fields)
    assert refusal.value.param == param


def test_fields_of_our_own():
    found = ask(deadline=30, keep_alive="5m", chat_template_kwargs={"enable_thinking": False})
    assert (found.deadline, found.keep_alive, found.variables) == (30, 300, {"enable_thinking": False})
