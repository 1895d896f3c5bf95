"""Events of a turn, as OpenAI's Responses API shows them: golden streams, and the response of the last event."""

from __future__ import annotations

import itertools
import json

import pytest

from support.turn_events import CACHED, PROMPT, THOUGHT, WORDS, call, ended, turn
from support.wire_events import faults_of_responses
from zincmetal.api.result import Logprob
from zincmetal.serve.ask import Tool
from zincmetal.serve.responses_write import ResponseWriter
from zincmetal.serve.turn import Delta
from zincmetal.text.tools.events import CallArguments, CallBegin, CallEnd, Reasoning, Text

TOOLS = {
    tool.seen: tool
    for tool in (Tool("get"), Tool("put"), Tool("spawn", space="agents"), Tool("apply_patch", free=True))
}
ABOUT = {"model": "m", "tools": [], "tool_choice": "auto", "parallel_tool_calls": True}


def written(events, summary=False):
    """Writes a turn, with events that end the same way in each run: ids become their numbers, times 0."""
    writer = ResponseWriter(ABOUT, TOOLS, summary)
    found = [*writer.begin(), *(wire for event in events for wire in writer.write(event))]
    return _numbered(found)


def _numbered(events):
    text, ids, counts = json.dumps(events), {}, {}
    for event in events:
        item = event.get("item") or {}
        for known in (event.get("response", {}).get("id"), item.get("id"), item.get("call_id")):
            if known and known not in ids:
                kind = known.partition("_")[0]
                ids[known] = f"{kind}_{counts.setdefault(kind, itertools.count()).__next__()}"
    for known, short in ids.items():
        text = text.replace(known, short)
    events = json.loads(text)
    for event in events:
        if "response" in event:
            event["response"].pop("created_at"), event["response"].pop("completed_at")
    return events


def response(status, output=(), usage=None, **more):
    about = {"id": "resp_0", "object": "response", "status": status, "error": None, "incomplete_details": None}
    return {**about, **ABOUT, "output": list(output), "usage": usage, **more}


def usage(made=7, reasoning=0):
    return {
        "input_tokens": PROMPT,
        "input_tokens_details": {"cached_tokens": CACHED, "cache_write_tokens": 0},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": PROMPT + made,
    }


def stream(*items, last="completed", status=None, made=7, reasoning=0, **more):
    """The whole stream of items, each as (its events, the item at its end)."""
    final = response(status or last, [item for _, item in items], usage(made, reasoning), **more)
    events = [
        {"type": "response.created", "response": response("in_progress")},
        {"type": "response.in_progress", "response": response("in_progress")},
        *(event for events, _ in items for event in events),
        {"type": f"response.{last}", "response": final},
    ]
    return [{"type": event["type"], "sequence_number": n, **event} for n, event in enumerate(events)]


def passage(index, begun, field, part, name, place, pieces, status="completed"):
    """Events of an item with one text. ``part`` makes it, ``name`` is that of its two kinds of events."""
    at = {"item_id": begun["id"], "output_index": index, place: 0}
    beside = {"logprobs": []} if begun["type"] == "message" else {}
    text = "".join(pieces)
    item = {**begun, field: [part(text)], "status": status}
    part_name, text_name = name
    events = [
        {"type": "response.output_item.added", "output_index": index, "item": {**begun, "status": "in_progress"}},
        {"type": f"response.{part_name}.added", **at, "part": part("")},
        *({"type": f"response.{text_name}.delta", **at, "delta": piece, **beside} for piece in pieces),
        {"type": f"response.{text_name}.done", **at, "text": text, **beside},
        {"type": f"response.{part_name}.done", **at, "part": part(text)},
        {"type": "response.output_item.done", "output_index": index, "item": item},
    ]
    return events, item


def message(index, number, *pieces, status="completed"):
    begun = {"type": "message", "id": f"msg_{number}", "role": "assistant", "content": []}
    names = ("content_part", "output_text")

    def part(text):
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    return passage(index, begun, "content", part, names, "content_index", pieces, status)


def reasoning(index, number, *pieces):
    begun = {"type": "reasoning", "id": f"rs_{number}", "summary": [], "content": []}
    names = ("content_part", "reasoning_text")
    return passage(
        index, begun, "content", lambda t: {"type": "reasoning_text", "text": t}, names, "content_index", pieces
    )


def summary(index, number, *pieces):
    begun = {"type": "reasoning", "id": f"rs_{number}", "summary": []}
    names = ("reasoning_summary_part", "reasoning_summary_text")
    return passage(
        index, begun, "summary", lambda t: {"type": "summary_text", "text": t}, names, "summary_index", pieces
    )


def function(index, number, name, *pieces, status="completed", **space):
    head = {"type": "function_call", "id": f"fc_{number}", "call_id": f"call_{number}", "name": name, **space}
    at = {"item_id": head["id"], "output_index": index}
    item = {**head, "arguments": "".join(pieces), "status": status}
    begun = {**head, "arguments": "", "status": "in_progress"}
    events = [
        {"type": "response.output_item.added", "output_index": index, "item": begun},
        *({"type": "response.function_call_arguments.delta", **at, "delta": piece} for piece in pieces),
        {"type": "response.function_call_arguments.done", **at, "arguments": item["arguments"], "name": name},
        {"type": "response.output_item.done", "output_index": index, "item": item},
    ]
    return events, item


def custom(index, name, text):
    head = {"type": "custom_tool_call", "id": "ctc_0", "call_id": "call_0", "name": name}
    at = {"item_id": "ctc_0", "output_index": index}
    item = {**head, "input": text, "status": "completed"}
    begun = {**head, "input": "", "status": "in_progress"}
    events = [
        {"type": "response.output_item.added", "output_index": index, "item": begun},
        {"type": "response.custom_tool_call_input.delta", **at, "delta": text},
        {"type": "response.custom_tool_call_input.done", **at, "input": text},
        {"type": "response.output_item.done", "output_index": index, "item": item},
    ]
    return events, item


CUT = {"incomplete_details": {"reason": "max_output_tokens"}}
GOLDEN = {
    "text": (turn(WORDS), stream(message(0, 0, "It is ", "sunny."))),
    "nothing": (turn([]), stream()),
    "reasoning": (
        turn([*THOUGHT, *WORDS], ended(reasoning=2)),
        stream(reasoning(0, 0, "Let me ", "see."), message(1, 0, "It is ", "sunny."), reasoning=2),
    ),
    "thinking again": (
        turn([Reasoning("a"), Text("b"), Reasoning("c"), Text("d")]),
        stream(reasoning(0, 0, "a"), message(1, 0, "b"), reasoning(2, 1, "c"), message(3, 1, "d")),
    ),
    "one tool": (
        turn(call(0, "get", '{"a"', ": 1}"), ended("tool_calls")),
        stream(function(0, 0, "get", '{"a"', ": 1}")),
    ),
    "text and a tool": (
        turn([*WORDS, *call(0, "get", "{}")], ended("tool_calls")),
        stream(message(0, 0, "It is ", "sunny."), function(1, 0, "get", "{}")),
    ),
    "parallel tools": (
        turn([*call(0, "get", '{"a":1}'), *call(1, "put", '{"b":2}')], ended("tool_calls")),
        stream(function(0, 0, "get", '{"a":1}'), function(1, 1, "put", '{"b":2}')),
    ),
    "tool of a namespace": (
        turn(call(0, "agents.spawn", "{}"), ended("tool_calls")),
        stream(function(0, 0, "spawn", "{}", namespace="agents")),
    ),
    "tool that nobody knows": (turn(call(0, "who", "{}"), ended("tool_calls")), stream(function(0, 0, "who", "{}"))),
    "tool that takes a text": (
        turn(call(0, "apply_patch", '{"input": "*** Be', 'gin\\n"}'), ended("tool_calls")),
        stream(custom(0, "apply_patch", "*** Begin\n")),
    ),
    "tool that takes a text and got something else": (
        turn(call(0, "apply_patch", '{"other": 1}'), ended("tool_calls")),
        stream(custom(0, "apply_patch", '{"other": 1}')),
    ),
    "arguments that are known at the end": (
        turn([CallBegin(0, "get"), CallEnd(0, '{"a":1}')], ended("tool_calls")),
        stream(function(0, 0, "get", '{"a":1}')),
    ),
    "repaired": (
        turn([*call(0, "get", "{}", repaired=True), *call(1, "put", "{}")], ended("tool_calls")),
        stream(function(0, 0, "get", "{}"), function(1, 1, "put", "{}")),
    ),
    "length": (
        turn(WORDS, ended("length")),
        stream(message(0, 0, "It is ", "sunny.", status="incomplete"), last="incomplete", **CUT),
    ),
    "cut inside a call": (
        turn([CallBegin(0, "get"), CallArguments(0, '{"a"'), CallEnd(0, '{"a":0}', True)], ended("length")),
        stream(function(0, 0, "get", '{"a"', ":0}", status="incomplete"), last="incomplete", **CUT),
    ),
    "stop string": (turn(WORDS, ended(stop="END")), stream(message(0, 0, "It is ", "sunny."))),
    "cancelled": (
        turn(WORDS[:1], ended("cancelled")),
        stream(message(0, 0, "It is ", status="incomplete"), last="incomplete", status="cancelled"),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_stream(name):
    events, wanted = GOLDEN[name]
    assert written(events) == wanted


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("with_summary", [False, True])
def test_golden_stream_keeps_the_contract(name, with_summary):
    found = written(GOLDEN[name][0], with_summary)
    assert faults_of_responses([(event["type"], event) for event in found]) == []


def test_summary_is_the_reasoning():
    found = written(turn([*THOUGHT, *WORDS]), summary=True)
    assert found == stream(summary(0, 0, "Let me ", "see."), message(1, 0, "It is ", "sunny."))


def test_failure_closes_what_is_open():
    writer = ResponseWriter(ABOUT, TOOLS)
    begun = [*writer.begin(), *(wire for event in turn(WORDS)[:-1] for wire in writer.write(event))]
    found = [*begun, *writer.failed("server_error", "the device is lost")]
    assert faults_of_responses([(event["type"], event) for event in found]) == []
    last = found[-1]["response"]
    assert (last["status"], last["error"]) == ("failed", {"code": "server_error", "message": "the device is lost"})
    assert last["output"][0]["status"] == "incomplete"


def test_failure_before_the_beginning_is_a_whole_stream():
    found = list(ResponseWriter(ABOUT, TOOLS).failed("context_length_exceeded", "too long"))
    assert faults_of_responses([(event["type"], event) for event in found]) == []


def test_signs_of_life_are_numbered_and_never_come_before_the_beginning():
    writer = ResponseWriter(ABOUT, TOOLS)
    events = turn(WORDS)
    found = [*writer.alive(), *writer.alive(), *writer.begin()]
    for event in events:
        found += [*writer.write(event), *(writer.alive() if event is not events[-1] else ())]
    assert faults_of_responses([(event["type"], event) for event in found]) == []
    assert [event["type"] for event in found].count("response.in_progress") == 2 + len(events) - 1


def test_events_do_not_change_after_they_were_made():
    writer = ResponseWriter(ABOUT, TOOLS)
    first = next(writer.begin())
    before = json.dumps(first)
    assert [wire for event in turn(WORDS) for wire in writer.write(event)]
    assert json.dumps(first) == before


def test_log_probabilities_stand_beside_the_text():
    writer = ResponseWriter(ABOUT, TOOLS)
    writer.logprob = lambda logprob: {"token": str(logprob.token)}
    events = [Delta(0, Reasoning("r"), (Logprob(1, -1.0),)), Delta(0, Text("t"), (Logprob(2, -1.0),)), ended()]
    found = [*writer.begin(), *(wire for event in events for wire in writer.write(event))]
    deltas = [event["logprobs"] for event in found if event["type"] == "response.output_text.delta"]
    part = found[-1]["response"]["output"][1]["content"][0]
    assert deltas == [[{"token": "2"}]] == [part["logprobs"]]
