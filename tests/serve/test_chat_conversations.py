"""Conversations with a model that thinks and calls tools: what it sees, what comes back, and what is remembered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.served import CHAT, USER, Served
from support.streams import ask
from support.thinker import SPECIAL, THINKER
from support.vocab_builder import CONTROL
from zincmetal.sampling.constrain.budget import Budget

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHT = "<think>\nLet me see.\n</think>\n\n"


@pytest.fixture(scope="module")
def one_thinker(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("thinker"), name="thinker", template=THINKER, special=SPECIAL)


@pytest.fixture
def thinker(one_thinker: Served) -> Iterator[Served]:
    yield one_thinker.reset()
    assert one_thinker.models.leases == 0
    assert one_thinker.serving.turns == {}


def message_of(served: Served, **body: Any) -> dict[str, Any]:
    reply = served.chat(**body)
    assert reply.status == 200, reply.body
    message: dict[str, Any] = reply.json["choices"][0]["message"]
    return message


# ---- reasoning ----------------------------------------------------------------------------------------------------


def test_reasoning_is_split_off(thinker: Served) -> None:
    message = message_of(thinker.says(THOUGHT + "Sunny."))
    assert (message["reasoning_content"].strip(), message["content"]) == ("Let me see.", "Sunny.")


def test_reasoning_stays_in_the_text_if_it_is_asked_for(thinker: Served) -> None:
    message = message_of(thinker.says(THOUGHT + "Sunny."), reasoning_format="none")
    assert message["content"] == THOUGHT + "Sunny."
    assert "reasoning_content" not in message


def test_tokens_of_reasoning_are_counted(thinker: Served) -> None:
    usage = thinker.says("<think>abc</think>d").chat().json["usage"]
    assert usage["completion_tokens"] == 7
    assert usage["completion_tokens_details"]["reasoning_tokens"] in (4, 5)  # with the marker or without


@pytest.mark.parametrize(
    ("given", "closed"),
    [
        ({}, False),
        ({"reasoning_effort": "high"}, False),
        ({"reasoning_effort": "none"}, True),
        ({"reasoning": {"effort": "none"}}, True),
        ({"reasoning": {"enabled": False}}, True),
        ({"reasoning": {"effort": "low"}}, False),
        ({"enable_thinking": False}, True),
        ({"enable_thinking": True}, False),
        ({"thinking": {"type": "disabled"}}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}, False),  # the plainest counts
        ({"reasoning_budget": 0}, True),
    ],
)
def test_reasoning_is_turned_off(thinker: Served, given: dict[str, Any], closed: bool) -> None:
    message_of(thinker, **given)
    assert thinker.backend.prompts[-1].endswith("<think>\n\n</think>\n\n") == closed


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({}, None),
        ({"reasoning_budget": -1}, None),
        ({"reasoning_budget": 50}, 50),
        ({"thinking_budget_tokens": 50}, 50),
        ({"reasoning": {"max_tokens": 50}}, 50),
        ({"thinking": {"type": "enabled", "budget_tokens": 50}}, 50),
    ],
)
def test_a_budget_of_reasoning(thinker: Served, given: dict[str, Any], tokens: int | None) -> None:
    message_of(thinker, **given)
    want = None if tokens is None else Budget(tokens, "</think>", begin="<think>")
    assert thinker.asked.reasoning == want


def test_log_probabilities_are_of_the_text_alone(thinker: Served) -> None:
    reply = thinker.says("<think>abc</think>Yes").chat(logprobs=True)
    content = reply.json["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == "Yes"


def test_a_budget_where_the_prompt_has_opened_the_reasoning(tmp_path: Path) -> None:
    opens = THINKER.replace("'<think>\\n\\n</think>\\n\\n'", "''").replace(
        "{{ '<|im_start|>assistant\\n' }}\n{%- if enable", "{{ '<|im_start|>assistant\\n<think>\\n' }}\n{%- if enable"
    )
    served = Served(tmp_path, name="opens", template=opens, special=SPECIAL)
    message = message_of(served.says("Hm.</think>Yes."), reasoning_budget=50)
    assert served.backend.prompts[-1].endswith("<think>\n")
    assert served.asked.reasoning == Budget(50, "</think>")
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")


def test_a_budget_of_harmony(tmp_path: Path) -> None:
    turn = "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
    template = "{# <|channel|> #}{% for m in messages %}" + turn + "{% endfor %}<|start|>assistant"
    special = dict.fromkeys(("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"), CONTROL)
    served = Served(tmp_path, name="harmony", template=template, special=special)
    answer = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    message = message_of(served.says(answer), reasoning_budget=50)
    assert served.asked.reasoning == Budget(50, "<|end|>", begin="<|channel|>analysis<|message|>")
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")


# ---- tools --------------------------------------------------------------------------------------------------------


def test_a_call(thinker: Served) -> None:
    message = message_of(thinker.says(THOUGHT + "I look." + CALL), tools=[WEATHER])
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": call["function"]["arguments"]}
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert message["content"].strip() == "I look."


def test_the_model_sees_the_tools_in_their_order(thinker: Served) -> None:
    other = {"type": "function", "function": {"name": "aaa"}}
    message_of(thinker, tools=[WEATHER, other])
    prompt = thinker.backend.prompts[-1]
    assert prompt.index('"weather"') < prompt.index('"aaa"')
    assert "$schema" not in prompt


def test_arguments_come_in_pieces(thinker: Served) -> None:
    data = thinker.says(CALL).chat(tools=[WEATHER], stream=True).data[:-1]
    calls = [call for chunk in data for part in chunk["choices"] for call in part["delta"].get("tool_calls", ())]
    pieces = [call["function"]["arguments"] for call in calls[1:]]
    assert len(pieces) > 3
    assert json.loads("".join(pieces)) == {"city": "Paris"}
    assert data[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_tools_stay_in_the_prompt_whatever_may_be_called(thinker: Served, choice: str) -> None:
    """So the prompt has the same prefix, which is cached. The grammar says what may come."""
    message_of(thinker, tools=[WEATHER], tool_choice="auto")
    prompt = thinker.asked.ids
    message_of(thinker, tools=[WEATHER], tool_choice=choice)
    assert thinker.asked.ids == prompt
    assert thinker.asked.grammar is not None


def test_an_answer_that_looks_like_a_call_is_text_if_none_may_be_called(thinker: Served) -> None:
    """Some families write a call as bare JSON, which no grammar tells from an answer in JSON."""
    bare = '{"name": "weather", "arguments": {"city": "Paris"}}'
    assert message_of(thinker.says(bare), tools=[WEATHER])["tool_calls"]
    message = message_of(thinker.says(bare), tools=[WEATHER], tool_choice="none")
    assert (message["content"], message.get("tool_calls")) == (bare, None)


def test_the_grammar_knows_the_tools_that_are_allowed(thinker: Served) -> None:
    other = {"type": "function", "function": {"name": "clock"}}
    named = {"type": "function", "function": {"name": "clock"}}
    message_of(thinker, tools=[WEATHER, other], tool_choice=named)
    assert "clock" in thinker.asked.grammar.lark
    assert "weather" not in thinker.asked.grammar.lark


def test_a_strict_tool_with_a_schema_that_cannot_hold_is_refused(thinker: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    reply = thinker.chat(tools=[tool])
    assert (reply.status, reply.error["code"]) == (400, "unsupported_schema")
    assert "not" in reply.error["message"]
    loose = {"type": "function", "function": {**tool["function"], "strict": False}}
    assert thinker.chat(tools=[loose]).status == 200


def test_a_call_without_tools_is_no_call_of_anything(thinker: Served) -> None:
    """A model may write one all the same; it must not end the stream."""
    reply = thinker.says("Hm. " + CALL).chat()
    assert reply.status == 200


# ---- what comes back ----------------------------------------------------------------------------------------------


def conversation(thinker: Served, keeps: bool) -> tuple[list[int], list[int]]:
    """Has a turn with a call, and asks again as a client does. Returns the ids of the first turn, and of the second."""
    thinker.says(THOUGHT + CALL)
    message = message_of(thinker, tools=[WEATHER])
    first = [*thinker.asked.ids, *thinker.backend.text.tokenizer.encode(THOUGHT + CALL, False, True, add_eos=False)]
    if not keeps:
        del message["reasoning_content"]
    del message["refusal"]
    call = message["tool_calls"][0]
    call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), indent=1)
    result = {"role": "tool", "tool_call_id": call["id"], "content": "18 degrees"}
    message_of(thinker, tools=[WEATHER], messages=[*USER, message, result])
    return first, thinker.asked.ids


@pytest.mark.parametrize("keeps", [True, False], ids=["with its reasoning", "without its reasoning"])
def test_an_echo_is_what_was_written(thinker: Served, keeps: bool) -> None:
    """However a client writes the answer, the second prompt begins with all tokens of the first turn."""
    first, second = conversation(thinker, keeps)
    assert second[: len(first)] == first
    assert len(second) > len(first)


def test_an_echo_of_a_stream_is_known_by_its_call(thinker: Served) -> None:
    thinker.says(THOUGHT + CALL)
    data = thinker.chat(tools=[WEATHER], stream=True).data[:-1]
    begin = next(c for chunk in data for p in chunk["choices"] for c in p["delta"].get("tool_calls", ()))
    call = {"id": begin["id"], "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
    first = list(thinker.asked.ids)
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "18 degrees"},
    ]
    message_of(thinker, tools=[WEATHER], messages=messages)
    assert thinker.asked.ids[: len(first)] == first
    assert "Let me see." in thinker.backend.prompts[-1]


def test_reasoning_of_earlier_turns_is_kept(thinker: Served) -> None:
    thinker.says(THOUGHT + "Sunny.")
    message = message_of(thinker)
    del message["reasoning_content"]
    message_of(thinker, messages=[*USER, message, {"role": "user", "content": "And now?"}])
    assert "Let me see." in thinker.backend.prompts[-1]


def test_a_client_may_have_the_reasoning_dropped(thinker: Served) -> None:
    thinker.says(THOUGHT + "Sunny.")
    message = message_of(thinker)
    messages = [*USER, message, {"role": "user", "content": "And now?"}]
    message_of(thinker, messages=messages, chat_template_kwargs={"preserve_thinking": False})
    assert "Let me see." not in thinker.backend.prompts[-1]


def test_a_developer_is_a_system(thinker: Served) -> None:
    message_of(thinker, messages=[{"role": "developer", "content": "Be kind."}, *USER])
    assert thinker.backend.prompts[-1].startswith("<|im_start|>system\nBe kind.<|im_end|>")


def test_lists_and_strings_are_the_same_prompt(thinker: Served) -> None:
    message_of(thinker, messages=[{"role": "user", "content": "ab"}])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message_of(thinker, messages=[{"role": "user", "content": parts}])
    assert thinker.backend.prompts[0] == thinker.backend.prompts[1]


# ---- schemas ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "object", "not": {}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": 5}, "schema"),
    ],
)
def test_a_schema_that_cannot_hold_is_refused_by_its_keyword(thinker: Served, schema: Any, word: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    reply = thinker.chat(response_format=form)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "unsupported_schema", "response_format")
    assert word in reply.error["message"]


@pytest.mark.parametrize(
    "given", [{"grammar": "start: ("}, {"grammar": "root ::= ("}, {"grammar": {"type": "regex", "value": "("}}]
)
def test_a_wrong_grammar_is_refused(thinker: Served, given: dict[str, Any]) -> None:
    reply = thinker.chat(**given)
    assert (reply.status, reply.error["code"]) == (400, "invalid_grammar")


def test_input_tokens_are_those_of_the_prompt(thinker: Served) -> None:
    body = {"messages": USER, "tools": [WEATHER]}
    counted = ask(thinker.app, CHAT + "/input_tokens", body).json["input_tokens"]
    assert counted == ask(thinker.app, CHAT, body).json["usage"]["prompt_tokens"]
