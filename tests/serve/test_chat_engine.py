"""The chat and completions APIs on a real engine: a small random model on the CPU."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

import zincmetal
from support.scripted import ScriptedModels
from support.served import CHAT, COMPLETIONS, USER
from support.streams import Call, ask
from support.text_model import save
from zincmetal.api.model import Model
from zincmetal.serve.app import make_app
from zincmetal.serve.backend import ModelCard
from zincmetal.serve.local import LocalBackend
from zincmetal.serve.serving import Serving
from zincmetal.text.chat.template import CHATML

N_CTX = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    general = {"tokenizer.ggml.eos_token_id": 258, "context_length": N_CTX}
    path = save(tmp_path_factory.mktemp("engine") / "tiny.gguf", template=CHATML, general=general)
    with zincmetal.load(path, device="cpu", context=N_CTX, threads=1, max_sequences=4) as made:
        yield made


@pytest.fixture
def app(model: Model) -> Any:
    card = ModelCard("tiny", n_ctx=N_CTX, n_ctx_train=N_CTX, n_vocab=model.config.n_vocab, sequences=4)
    return make_app(Serving(ScriptedModels([LocalBackend(model, card)])))  # type: ignore[list-item]


def test_a_chat_is_what_the_model_says(app: Any, model: Model) -> None:
    (found,) = ask(app, CHAT, {"messages": USER, "max_tokens": 20, "temperature": 0}).json["choices"]
    want = model.chat(USER, 20, temperature=0, hide_special=True)
    assert (found["message"]["content"], found["finish_reason"]) == (want.text, want.finish_reason)


def test_a_completion_is_what_the_model_says(app: Any, model: Model) -> None:
    body = ask(app, COMPLETIONS, {"prompt": ["hello", "he"], "max_tokens": 9, "temperature": 0}).json
    for found, prompt in zip(body["choices"], ["hello", "he"], strict=True):
        assert found["text"] == model.generate(prompt, 9, temperature=0).text


@pytest.mark.parametrize("stream", [True, False])
def test_the_answer_fills_the_context_and_no_more(app: Any, stream: bool) -> None:
    long = [{"role": "user", "content": "x" * 900}]
    request = {"messages": long, "max_tokens": 32_000, "ignore_eos": True, "stream": stream}
    reply = ask(app, CHAT, {**request, "stream_options": {"include_usage": True}} if stream else request)
    body = reply.data[-2] if stream else reply.json
    assert body["usage"]["total_tokens"] == N_CTX + 1  # the last token needs no place
    reason = reply.data[-3]["choices"][0] if stream else body["choices"][0]
    assert reason["finish_reason"] == "length"


def test_the_same_seed_gives_the_same_answers(app: Any) -> None:
    request = {"messages": USER, "max_tokens": 12, "temperature": 1.5, "seed": 7, "n": 3}
    first, second = (ask(app, CHAT, request).json["choices"] for _ in range(2))
    texts = [[choice["message"]["content"] for choice in choices] for choices in (first, second)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_a_prompt_that_was_read_is_reused(app: Any) -> None:
    request = {"messages": [{"role": "user", "content": "once " * 20}], "max_tokens": 4}
    ask(app, CHAT, request)
    usage = ask(app, CHAT, request).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1
    assert usage["cache"]["source"] == "memory"


def test_a_miss_says_why(app: Any, model: Model) -> None:
    model.clear_cache()
    ask(app, CHAT, {"messages": [{"role": "user", "content": "a" * 100}], "max_tokens": 1})
    usage = ask(app, CHAT, {"messages": [{"role": "user", "content": "b" * 100}], "max_tokens": 1}).json["usage"]
    assert "differs" in usage["cache"]["why"]
    assert "bbbb" in usage["cache"]["why"]
    assert "aaaa" not in usage["cache"]["why"]  # another client's


def test_many_answers_share_the_prompt(app: Any, model: Model) -> None:
    model.clear_cache()
    request = {"messages": [{"role": "user", "content": "x" * 150}], "max_tokens": 3, "n": 3}
    before = model.figures()["steps"]
    usage = ask(app, CHAT, request).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0  # of the first
    after = model.figures()["steps"]
    ask(app, CHAT, {**request, "n": 1, "messages": [{"role": "user", "content": "y" * 150}]})
    alone = model.figures()["steps"] - after
    assert after - before < 3 * alone


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_a_schema_holds(app: Any, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    request = {"messages": USER, "temperature": 1.0, "seed": seed, "response_format": form}
    (found,) = ask(app, CHAT, request).json["choices"]
    value = json.loads(found["message"]["content"])
    assert set(value) == {"a", "b"}
    assert value["a"] in range(10)
    assert value["b"] in ("x", "y")
    assert found["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("given", "answers"),
    [({"guided_choice": ["yes", "no"]}, {"yes", "no"}), ({"grammar": {"type": "regex", "value": "ab{2}"}}, {"abb"})],
)
def test_a_grammar_holds(app: Any, given: dict[str, Any], answers: set[str]) -> None:
    (found,) = ask(app, CHAT, {"messages": USER, "temperature": 1.0, **given}).json["choices"]
    assert found["message"]["content"] in answers


TOOL = {"type": "function", "function": {"name": "pick", "strict": True, "parameters": SCHEMA}}
CLOSED = {"type": "object", "properties": {}, "additionalProperties": False}
OTHER = {"type": "function", "function": {"name": "stop", "strict": True, "parameters": CLOSED}}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pick"}}])
@pytest.mark.parametrize("seed", range(2))
def test_a_call_that_is_required_comes_and_fits(app: Any, choice: Any, seed: int, stream: bool) -> None:
    """A model of random weights calls a tool, with arguments that its schema allows."""
    request = {"messages": USER, "tools": [TOOL, OTHER], "tool_choice": choice, "parallel_tool_calls": False}
    reply = ask(app, CHAT, {**request, "temperature": 1.0, "seed": seed, "stream": stream})
    if stream:
        parts = [part for chunk in reply.data[:-1] for part in chunk["choices"]]
        deltas = [call for part in parts for call in part["delta"].get("tool_calls", ())]
        name, arguments = deltas[0]["function"]["name"], "".join(c["function"]["arguments"] for c in deltas)
        reason = parts[-1]["finish_reason"]
    else:
        (found,) = reply.json["choices"]
        (call,) = found["message"]["tool_calls"]
        name, arguments, reason = call["function"]["name"], call["function"]["arguments"], found["finish_reason"]
    assert reason == "tool_calls"
    assert name == "pick" or (choice == "required" and name == "stop")
    value = json.loads(arguments)
    if name == "pick":
        assert set(value) == {"a", "b"}
        assert value["a"] in range(10)


def test_scores_are_those_of_the_model(app: Any, model: Model) -> None:
    request = {"prompt": "hello he", "max_tokens": 1, "logprobs": 3, "echo": True, "temperature": 0}
    logprobs = ask(app, COMPLETIONS, request).json["choices"][0]["logprobs"]
    want = model.prompt_logprobs("hello he")
    assert logprobs["token_logprobs"][1:-1] == pytest.approx(want, abs=1e-5)
    logits = model.logits("hello he")
    for i, top in enumerate(logprobs["top_logprobs"][1:-1]):
        assert max(top.values()) >= logprobs["token_logprobs"][i + 1]
        assert len(top) in (3, 4)
        assert len({*logits[i].argsort()[-3:]}) == 3


def test_a_greedy_token_is_the_most_probable(app: Any) -> None:
    request = {"messages": USER, "max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    for entry in ask(app, CHAT, request).json["choices"][0]["logprobs"]["content"]:
        assert entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(app: Any, model: Model, stream: bool) -> None:
    async def main() -> None:
        request = {"messages": USER, "ignore_eos": True, "stream": stream, "n": 2}
        call = Call(app, CHAT, request)
        while not model.figures()["running"]:
            await asyncio.sleep(0.001)
        call.leave()
        await call.over()
        while model.figures()["running"]:
            await asyncio.sleep(0.001)
        assert app.state.serving.models.leases == 0

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_deadline_ends_a_generation(app: Any) -> None:
    reply = ask(app, CHAT, {"messages": USER, "ignore_eos": True, "deadline": 1e-6})
    assert (reply.status, reply.error["code"]) == (504, "timeout")
