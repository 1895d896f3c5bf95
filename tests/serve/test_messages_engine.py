"""Messages and Responses on a real engine: a small random model on the CPU. Grammars make it say what is wanted."""

from __future__ import annotations

import json

import jsonschema
import pytest

import zincmetal
from support.scripted import ScriptedModels
from support.streams import ask
from support.text_model import TURNS, save
from support.thinker import SPECIAL, THINKER
from support.wire_events import faults_of_messages, faults_of_responses, parse
from zincmetal.serve.app import make_app
from zincmetal.serve.backend import ModelCard
from zincmetal.serve.local import LocalBackend
from zincmetal.serve.messages_write import collected
from zincmetal.serve.serving import Serving

N_CTX = 2048
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Ulm"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    general = {"tokenizer.ggml.eos_token_id": 258, "context_length": N_CTX}
    path = save(tmp_path_factory.mktemp("engine") / "tiny.gguf", {**TURNS, **SPECIAL}, THINKER, general=general)
    with zincmetal.load(path, device="cpu", context=N_CTX, threads=1, max_sequences=4) as made:
        yield made


@pytest.fixture
def app(model):
    model.clear_cache()
    card = ModelCard("tiny", n_ctx=N_CTX, n_ctx_train=N_CTX, n_vocab=model.config.n_vocab, sequences=4)
    return make_app(Serving(ScriptedModels([LocalBackend(model, card)])))


class Messages:
    """Asks /v1/messages, and takes the answer apart. Reasoning is off: a random model would not end it."""

    def __init__(self, app):
        self.app = app

    def free(self):
        """Returns the field that lets the model reason as it likes."""
        return {"thinking": {"type": "adaptive"}}

    def ask(self, messages=USER, stream=False, schema=None, tool=None, most=200, **more):
        body = {"messages": messages, "max_tokens": most, "thinking": {"type": "disabled"}, "stream": stream, **more}
        if schema:
            body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        if tool:
            body |= {"tools": [{"name": "weather", "input_schema": tool}], "tool_choice": {"type": "any"}}
        reply = ask(self.app, "/v1/messages", body)
        assert reply.status == 200, reply.body
        if stream:
            assert faults_of_messages(parse(reply.body)) == []
        return collected([data for _, data in parse(reply.body)]) if stream else reply.json

    def text(self, found):
        return "".join(block["text"] for block in found["content"] if block["type"] == "text")

    def arguments(self, found):
        return [block["input"] for block in found["content"] if block["type"] == "tool_use"]

    def usage(self, found):
        usage = found["usage"]
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + cached, cached, usage["output_tokens"]

    def loop(self, found):
        """Returns the conversation with the results of the answer's calls."""
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": "22"}
            for block in found["content"]
            if block["type"] == "tool_use"
        ]
        return [*USER, {"role": "assistant", "content": found["content"]}, {"role": "user", "content": results}]

    def cut(self, found):
        return found["stop_reason"]


class Responses(Messages):
    """Asks /v1/responses."""

    def free(self):
        return {"reasoning": {}}

    def ask(self, messages=USER, stream=False, schema=None, tool=None, most=200, **more):
        body = {"input": messages, "max_output_tokens": most, "reasoning": {"effort": "none"}, "stream": stream, **more}
        if schema:
            body["text"] = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
        if tool:
            body |= {"tools": [{"type": "function", "name": "weather", "parameters": tool}], "tool_choice": "required"}
        reply = ask(self.app, "/v1/responses", body)
        assert reply.status == 200, reply.body
        if stream:
            assert faults_of_responses(parse(reply.body)) == []
        return parse(reply.body)[-1][1]["response"] if stream else reply.json

    def text(self, found):
        return "".join(item["content"][0]["text"] for item in found["output"] if item["type"] == "message")

    def arguments(self, found):
        return [json.loads(item["arguments"]) for item in found["output"] if item["type"] == "function_call"]

    def usage(self, found):
        usage = found["usage"]
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"], usage["output_tokens"]

    def loop(self, found):
        results = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "22"}
            for item in found["output"]
            if item["type"] == "function_call"
        ]
        return [*USER, *found["output"], *results]

    def cut(self, found):
        return found["incomplete_details"]["reason"]


@pytest.fixture(params=[Messages, Responses])
def api(request, app):
    return request.param(app)


def test_stream_and_plain_reply_say_the_same(api, model):
    plain, streamed = api.ask(temperature=0, most=30), api.ask(temperature=0, most=30, stream=True)
    assert api.text(plain) == api.text(streamed)
    assert api.usage(plain)[2] == api.usage(streamed)[2] > 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_answer_has_the_form_that_was_asked_for(api, stream, seed):
    found = api.ask(schema=SCHEMA, stream=stream, temperature=1.5, seed=seed)
    jsonschema.validate(json.loads(api.text(found)), SCHEMA)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_call_that_is_demanded_follows_its_schema(api, stream, seed):
    found = api.ask(tool=SCHEMA, stream=stream, temperature=1.5, seed=seed)
    calls = api.arguments(found)
    assert calls
    for call in calls:
        jsonschema.validate(call, SCHEMA)


def test_next_turn_reuses_the_prompt_and_the_answer(api):
    """With reasoning as the model likes: where it is off, the template closes it in the prompt, and later does not."""
    first = api.ask(tool=SCHEMA, temperature=1.5, seed=1, **api.free())
    prompt, cached, made = api.usage(first)
    assert api.arguments(first)
    second = api.usage(api.ask(api.loop(first), tool=SCHEMA, temperature=1.5, seed=2, **api.free()))
    assert cached == 0
    assert second[1] >= prompt + made - 1  # the last token, which ends the answer, was never computed


def test_answer_that_fills_the_context_says_so(api):
    found = api.ask([{"role": "user", "content": "x" * 1900}], most=32_000, ignore_eos=True)
    assert api.usage(found)[0] + api.usage(found)[2] == N_CTX + 1
    assert api.cut(found) in ("model_context_window_exceeded", "max_output_tokens")


def test_count_is_what_the_engine_reads(app):
    body = {"messages": USER, "tools": [{"name": "weather", "input_schema": SCHEMA}], "max_tokens": 1}
    count = ask(app, "/v1/messages/count_tokens", body).json["input_tokens"]
    usage = ask(app, "/v1/messages", body).json["usage"]
    assert count == usage["input_tokens"] + usage["cache_read_input_tokens"]
