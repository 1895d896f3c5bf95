"""Events of a turn, as Anthropic's Messages API shows them: golden streams, and a reply that is collected."""

from __future__ import annotations

import pytest

from support.turn_events import CACHED, PROMPT, THOUGHT, WORDS, call, ended, turn
from support.wire_events import faults_of_messages
from zincmetal.serve.messages_write import MessageWriter, collected
from zincmetal.text.tools.events import CallArguments, CallBegin, CallEnd, Reasoning, Text

N_CTX = 4096
USAGE = {"input_tokens": PROMPT - CACHED, "cache_read_input_tokens": CACHED, "cache_creation_input_tokens": 0}


def written(events, max_tokens=None, n_ctx=N_CTX):
    """Writes a turn. The random part of the ids of calls becomes their number."""
    writer = MessageWriter("msg_1", "m", n_ctx, max_tokens)
    found, calls = [wire for event in events for wire in writer.write(event)], 0
    for wire in found:
        block = wire.get("content_block", {})
        if "id" in block:
            assert block["id"].startswith("toolu_")
            block["id"], calls = f"toolu_{calls}", calls + 1
    return found


def start(index, **block):
    return {"type": "content_block_start", "index": index, "content_block": block}


def delta(index, **fields):
    return {"type": "content_block_delta", "index": index, "delta": fields}


def text(index, *pieces):
    deltas = [delta(index, type="text_delta", text=piece) for piece in pieces]
    return [start(index, type="text", text=""), *deltas, stop(index)]


def thinking(index, *pieces):
    deltas = [delta(index, type="thinking_delta", thinking=piece) for piece in pieces]
    signed = delta(index, type="signature_delta", signature="")
    return [start(index, type="thinking", thinking="", signature=""), *deltas, signed, stop(index)]


def tool(index, number, name, *pieces):
    deltas = [delta(index, type="input_json_delta", partial_json=piece) for piece in pieces]
    return [start(index, type="tool_use", id=f"toolu_{number}", name=name, input={}), *deltas, stop(index)]


def stop(index):
    return {"type": "content_block_stop", "index": index}


def whole(*blocks, reason="end_turn", sequence=None, made=7, thought=0):
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": []}
    ends = {"stop_reason": None, "stop_sequence": None}
    usage = {**USAGE, "output_tokens": made, "output_tokens_details": {"thinking_tokens": thought}}
    return [
        {"type": "message_start", "message": {**message, **ends, "usage": {**USAGE, "output_tokens": 0}}},
        {"type": "ping"},
        *(event for block in blocks for event in block),
        {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": sequence}, "usage": usage},
        {"type": "message_stop"},
    ]


GOLDEN = {
    "text": (turn(WORDS), whole(text(0, "It is ", "sunny."))),
    "nothing": (turn([]), whole()),
    "reasoning": (
        turn([*THOUGHT, *WORDS], ended(reasoning=2)),
        whole(thinking(0, "Let me ", "see."), text(1, "It is ", "sunny."), thought=2),
    ),
    "reasoning alone": (turn(THOUGHT), whole(thinking(0, "Let me ", "see."))),
    "thinking again": (
        turn([Reasoning("a"), Text("b"), Reasoning("c"), Text("d")]),
        whole(thinking(0, "a"), text(1, "b"), thinking(2, "c"), text(3, "d")),
    ),
    "one tool": (
        turn(call(0, "get", '{"a"', ": 1}"), ended("tool_calls")),
        whole(tool(0, 0, "get", '{"a"', ": 1}"), reason="tool_use"),
    ),
    "text and a tool": (
        turn([*WORDS, *call(0, "get", "{}")], ended("tool_calls")),
        whole(text(0, "It is ", "sunny."), tool(1, 0, "get", "{}"), reason="tool_use"),
    ),
    "parallel tools": (
        turn([*call(0, "get", '{"a":1}'), *call(1, "put", '{"b":2}')], ended("tool_calls")),
        whole(tool(0, 0, "get", '{"a":1}'), tool(1, 1, "put", '{"b":2}'), reason="tool_use"),
    ),
    "arguments that are known at the end": (
        turn([CallBegin(0, "get"), CallEnd(0, '{"a":1}')], ended("tool_calls")),
        whole(tool(0, 0, "get", '{"a":1}'), reason="tool_use"),
    ),
    "the rest of the arguments": (
        turn([CallBegin(0, "get"), CallArguments(0, '{"a"'), CallEnd(0, '{"a":1}', True)], ended("tool_calls")),
        whole(tool(0, 0, "get", '{"a"', ":1}"), reason="tool_use"),
    ),
    "length": (turn(WORDS, ended("length")), whole(text(0, "It is ", "sunny."), reason="max_tokens")),
    "stop string": (
        turn(WORDS, ended(stop="END")),
        whole(text(0, "It is ", "sunny."), reason="stop_sequence", sequence="END"),
    ),
    "cut inside a call": (
        turn([CallBegin(0, "get"), CallArguments(0, '{"a"')], ended("length")),
        whole(tool(0, 0, "get", '{"a"'), reason="max_tokens"),
    ),
    "cancelled": (turn(WORDS[:1], ended("cancelled")), whole(text(0, "It is "))),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_stream(name):
    events, wanted = GOLDEN[name]
    assert written(events) == wanted


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_stream_keeps_the_contract(name):
    found = written(GOLDEN[name][0])
    assert faults_of_messages([(event["type"], event) for event in found]) == []


@pytest.mark.parametrize("name", GOLDEN)
def test_plain_reply_is_the_stream_collected(name):
    found = collected(written(GOLDEN[name][0]))
    last = next(event for event in GOLDEN[name][1] if event["type"] == "message_delta")
    assert (found["stop_reason"], found["stop_sequence"]) == tuple(last["delta"].values())
    assert found["usage"] == last["usage"]
    starts = [e["content_block"]["type"] for e in GOLDEN[name][1] if e["type"] == "content_block_start"]
    assert [block["type"] for block in found["content"]] == starts


def test_collected_blocks_have_their_texts_and_inputs():
    events = [*THOUGHT, *WORDS, *call(0, "get", '{"a"', ': [1, "é"]}')]
    assert collected(written(turn(events, ended("tool_calls"))))["content"] == [
        {"type": "thinking", "thinking": "Let me see.", "signature": ""},
        {"type": "text", "text": "It is sunny."},
        {"type": "tool_use", "id": "toolu_0", "name": "get", "input": {"a": [1, "é"]}},
    ]


@pytest.mark.parametrize(
    ("arguments", "found"), [("", {}), ('{"a"', {"arguments": '{"a"'}), ("[" * 9999, {"arguments": "[" * 9999})]
)
def test_collected_input_that_is_no_json_ends_nothing(arguments, found):
    events = [CallBegin(0, "get"), CallArguments(0, arguments)] if arguments else [CallBegin(0, "get")]
    assert collected(written(turn(events, ended("length"))))["content"][0]["input"] == found


@pytest.mark.parametrize(
    ("made", "max_tokens", "n_ctx", "reason"),
    [
        (7, 7, 4096, "max_tokens"),
        (7, None, PROMPT + 6, "model_context_window_exceeded"),
        (7, 32000, PROMPT + 6, "model_context_window_exceeded"),
        (7, 7, PROMPT + 6, "max_tokens"),
        (7, 32000, PROMPT + 7, "max_tokens"),
    ],
)
def test_reason_of_an_answer_that_was_cut(made, max_tokens, n_ctx, reason):
    found = written(turn(WORDS, ended("length", made)), max_tokens, n_ctx)
    assert found[-2]["delta"]["stop_reason"] == reason


def test_answer_that_is_cancelled_before_it_began_is_whole():
    found = written([ended("cancelled", made=0)])
    assert [event["type"] for event in found] == ["message_start", "ping", "message_delta", "message_stop"]


def test_message_starts_before_the_prompt_is_read():
    writer = MessageWriter("msg_1", "m", N_CTX)
    first = list(writer.write(turn([])[0]))
    assert [event["type"] for event in first] == ["message_start", "ping"]
    assert first[0]["message"]["usage"] == {**USAGE, "output_tokens": 0}
