"""Bodies of Messages and of Responses with junk at a random place: they are read, or refused by name. Nothing else."""

from __future__ import annotations

import copy
import os
import random
import secrets

import pytest

from support.streams import ask
from zincmetal.serve import messages_read, responses_read
from zincmetal.serve.errors import HttpError
from zincmetal.serve.store import ResponseStore

SEED = int(os.environ.get("ZINCMETAL_TEST_SEED", secrets.randbits(32)))
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
MESSAGES = {
    "model": "m",
    "max_tokens": 100,
    "stream": True,
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": ""},
                {"type": "text", "text": "b"},
                {"type": "tool_use", "id": "t1", "name": "n", "input": {"a": "b"}},
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "r"}]}],
        },
        {"role": "system", "content": "s"},
    ],
    "tools": [{"name": "n", "input_schema": SCHEMA}, {"type": "web_search_20250305", "name": "w"}],
    "tool_choice": {"type": "tool", "name": "n"},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}},
    "metadata": {"user_id": '{"session_id": "s"}'},
    "stop_sequences": ["END"],
}
RESPONSES = {
    "model": "m",
    "stream": True,
    "instructions": "i",
    "previous_response_id": "resp_1",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "d"}]},
        {"role": "user", "content": "a"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}], "content": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "namespace": "n", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "o"}]},
        {"type": "item_reference", "id": "msg_1"},
    ],
    "tools": [
        {"type": "function", "name": "f", "parameters": SCHEMA},
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]},
        {"type": "custom", "name": "p", "format": {"type": "grammar", "definition": "start: x"}},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    "reasoning": {"effort": "high", "summary": "auto"},
    "text": {"format": {"type": "json_schema", "schema": SCHEMA}},
    "include": ["message.output_text.logprobs"],
    "metadata": {"a": "b"},
}
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]}
JUNK = [None, True, 0, -1, 7, 1.5, 2**62, "", "x", "text", "message", [], [[]], [None], ["x"], {}, {"type": "text"}]
JUNK += [{"type": ["x"]}, {"type": {}}, {"text": 1}, {"id": {}}, {"role": []}, [{"type": "tool_result"}], [{}]]


def places(value, path=()):
    """Yields the path of every value inside another."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


def broken(body, chance):
    """Returns a copy with junk at one place or two."""
    found = copy.deepcopy(body)
    for _ in range(chance.choice((1, 1, 2))):
        *path, last = chance.choice(list(places(found)))
        inside = found
        for key in path:
            inside = inside[key]
        if chance.random() < 0.2:
            del inside[last]
        else:
            inside[last] = copy.deepcopy(chance.choice(JUNK))
        if not found:
            break
    return found


def read_messages(body):
    return messages_read.read(body, {})


def read_responses(body):
    store = ResponseStore()
    store.put({"id": "resp_1", "output": [{"id": "msg_1", **SAID}]}, [], 0)
    return responses_read.read(body, {}, store.conversation, store.item)


def test_good_bodies_are_read():
    assert read_messages(MESSAGES).stream
    assert read_responses(RESPONSES).stream


@pytest.mark.parametrize(("read", "body"), [(read_messages, MESSAGES), (read_responses, RESPONSES)])
def test_junk_is_refused_by_name(read, body):
    print(f"ZINCMETAL_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    refusals = []
    for _ in range(1500):
        given = broken(body, chance)
        try:
            read(given)
        except HttpError as error:  # anything else fails this test
            refusals.append((error.param, str(error)))
    assert len(refusals) > 300
    assert all(param and words for param, words in refusals)


@pytest.mark.parametrize(("path", "body"), [("/v1/messages", MESSAGES), ("/v1/responses", RESPONSES)])
def test_no_junk_is_an_error_of_the_server(served, path, body):
    chance = random.Random(SEED)
    print(f"ZINCMETAL_TEST_SEED={SEED}")
    served.serving.responses.put({"id": "resp_1", "output": [{"id": "msg_1", **SAID}]}, [], 0)
    given = [{**broken(body, chance), "model": "", "stream": chance.random() < 0.5} for _ in range(120)]
    found = [(ask(served.app, path, one).status, one) for one in given]
    assert [one for status, one in found if status not in (200, 400, 404)] == []
    assert {status for status, _ in found} >= {200, 400}
