"""Loops of agents through Messages and Responses: what a client sends back begins with the tokens of before.

The template and the format of answers are those of a family, in short. The client sends back what it got.
"""

from __future__ import annotations

import pytest

from support.served import Served
from support.streams import ask
from support.wire_events import faults_of_messages, faults_of_responses, parse
from zincmetal.serve.messages_write import collected

TEMPLATE = """\
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}<tools>{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools><|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{% if m.reasoning_content and loop.index0 > ns.asked %}<think>
{{ m.reasoning_content | trim }}
</think>

{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{% if m.content or not loop.first %}
{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif not (tools and loop.first and m.role == 'system') %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}}
#: What the model writes: turn by turn, with spaces and an order of keys that no client keeps.
RAW = [
    "<think>\nI look at the file.\n</think>\n\nLet me see.\n"
    '<tool_call>\n{"name": "SEEN", "arguments": {"path":  "a.txt"}}\n</tool_call>',
    "<think>\nNow I write.\n</think>\n\n"
    '<tool_call>\n{"name": "SEEN", "arguments": {"text": "é\\n", "path":"a.txt"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "SEEN", "arguments": {"path": "b.txt"}}\n</tool_call>',
    "Done.",
]


@pytest.fixture(scope="module")
def one_agent(tmp_path_factory):
    return Served(tmp_path_factory.mktemp("served"), template=TEMPLATE, n_ctx=8192)


@pytest.fixture
def served(one_agent):
    yield one_agent.reset()
    assert one_agent.models.leases == 0


class Claude:
    """Client of Messages, as Claude Code is: thinking comes back, and a system message stands in the middle."""

    seen = "edit"
    parts = (["thinking", "text", "tool_use"], ["thinking", "tool_use", "tool_use"], ["text"])

    def __init__(self, served):
        self.served = served
        self.messages = [
            {"role": "user", "content": [{"type": "text", "text": "reminder"}, {"type": "text", "text": "go"}]},
            {"role": "system", "content": [{"type": "text", "text": "rules", "cache_control": {"type": "ephemeral"}}]},
        ]
        self.header = 0

    def turn(self, streams):
        self.header += 1
        billing = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.332.{self.header:03x};"}
        body = {
            "max_tokens": 32000,
            "stream": streams,
            "system": [billing, {"type": "text", "text": "You code."}],
            "messages": self.messages,
            "tools": [{"name": "edit", "description": "d", "input_schema": SCHEMA}],
            "thinking": {"type": "adaptive"},
        }
        reply = ask(self.served.app, "/v1/messages?beta=true", body)
        assert reply.status == 200, reply.body
        content = self.streamed(parse(reply.body)) if streams else reply.json["content"]
        self.messages[1]["content"] = "rules"  # from the second turn on it is a text
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": f"result {block['id']}"}
            for block in content
            if block["type"] == "tool_use"
        ]
        self.messages += [{"role": "assistant", "content": content}, {"role": "user", "content": results}]
        return content

    def streamed(self, events):
        assert faults_of_messages(events) == []
        return collected([data for _, data in events])["content"]


class Codex:
    """Client of Responses, as Codex is: items come back as they were, and only summaries of the reasoning."""

    seen = "files.edit"
    parts = (["reasoning", "message", "function_call"], ["reasoning", "function_call", "function_call"], ["message"])

    def __init__(self, served):
        self.served = served
        self.input = [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "environment"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "go"}]},
        ]

    def turn(self, streams):
        edit = {"type": "function", "name": "edit", "description": "d", "parameters": SCHEMA, "strict": False}
        body = {
            "stream": streams,
            "store": False,
            "input": self.input,
            "tools": [{"type": "namespace", "name": "files", "description": "d", "tools": [edit]}],
            "reasoning": {"summary": "auto"},
            "include": ["reasoning.encrypted_content"],
        }
        reply = ask(self.served.app, "/v1/responses", body)
        assert reply.status == 200, reply.body
        if streams:
            events = parse(reply.body)
            assert faults_of_responses(events) == []
            output = [data["item"] for name, data in events if name == "response.output_item.done"]
        else:
            output = reply.json["output"]
        results = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": f"result {item['call_id']}"}
            for item in output
            if item["type"] == "function_call"
        ]
        self.input += [*output, *results]
        return output


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("client", [Claude, Codex])
def test_each_turn_begins_with_the_tokens_of_the_one_before(served, client, streams):
    raw = [text.replace("SEEN", client.seen) for text in RAW]
    answers = iter(raw)
    served.says(lambda prompt, asked: next(answers))
    agent = client(served)
    turns = [agent.turn(streams) for _ in RAW]
    assert [[part["type"] for part in turn] for turn in turns] == list(client.parts)
    for text, before, after in zip(raw, served.backend.asked, served.backend.asked[1:], strict=False):
        wrote = served.backend.text.tokenizer.encode(text, False, True, add_eos=False)
        assert after.ids[: len(before.ids) + len(wrote)] == [*before.ids, *wrote]
    last = served.backend.prompts[-1]
    assert last.count("result ") == 3
    assert ("rules" in last, "billing" in last) == (True, False)
