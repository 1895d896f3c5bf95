"""What clients of llama-server rely on, as a table: a request of theirs, and what must be true of the reply.

Where this server differs on purpose, the case says so: OpenAI's names of errors in place of llama-server's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from support.scripted import Reply as Answer
from support.served import CHAT, COMPLETIONS, USER, Served
from support.streams import Reply, ask

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
LONG = "x" * 5000


class Case(NamedTuple):
    """Request, and its check. ``says``: the model's answer. "Hello there" has 10 tokens, and the end token."""

    name: str
    body: dict[str, Any]
    check: Callable[[Reply, Served], object]
    says: Answer | str = "Hello there"


def choice(reply: Reply, i: int = 0) -> Any:
    return reply.json["choices"][i]


def content(reply: Reply) -> str:
    """Text of a whole stream."""
    parts = [part for chunk in reply.data[:-1] for part in chunk["choices"]]
    return "".join(part["delta"].get("content") or "" if "delta" in part else part["text"] for part in parts)


def refused(*words: str) -> Callable[[Reply, Served], object]:
    def check(reply: Reply, served: Served) -> bool:
        return (
            reply.status == 400 and all(word in reply.error["message"] for word in words) and not served.backend.asked
        )

    return check


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_object", "schema": value}}


CHATS = [
    Case("a whole reply has all fields", {}, lambda r, s: set(r.json) >= {"id", "object", "created", "model", "usage"}),
    Case("the object is named", {}, lambda r, s: r.json["object"] == "chat.completion"),
    Case("the fingerprint names the build", {}, lambda r, s: len(r.json["system_fingerprint"].split("-")) >= 3),
    Case("an answer ends with stop", {}, lambda r, s: choice(r)["finish_reason"] == "stop"),
    Case("max_tokens ends it with length", {"max_tokens": 2}, lambda r, s: choice(r)["finish_reason"] == "length"),
    Case("n_predict is max_tokens", {"n_predict": 2}, lambda r, s: r.json["usage"]["completion_tokens"] == 2),
    Case("n_predict -1 has no limit", {"n_predict": -1}, lambda r, s: s.asked.max_tokens == -1),
    Case("max_tokens 0 only reads", {"max_tokens": 0}, lambda r, s: r.json["usage"]["completion_tokens"] == 0),
    Case("usage adds up", {}, lambda r, s: r.json["usage"]["total_tokens"] == 21 + 11),
    Case("timings come along", {}, lambda r, s: r.json["timings"]["prompt_n"] == 21),
    Case(
        "cached tokens are told twice",
        {},
        lambda r, s: r.json["timings"]["cache_n"] == r.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 10,
        Answer("a", reused=10),
    ),
    Case("a stream is the same text", {"stream": True}, lambda r, s: content(r) == "Hello there"),
    Case(
        "a stream begins with the role",
        {"stream": True},
        lambda r, s: r.data[0]["choices"][0]["delta"]["role"] == "assistant",
    ),
    Case("a stream has one id", {"stream": True}, lambda r, s: len({chunk["id"] for chunk in r.data[:-1]}) == 1),
    Case("a stream ends with [DONE]", {"stream": True}, lambda r, s: r.data[-1] == "[DONE]"),
    Case("the last chunk has the timings", {"stream": True}, lambda r, s: r.data[-2]["timings"]["predicted_n"] == 11),
    Case(
        "usage is a chunk of its own",
        {"stream": True, "stream_options": {"include_usage": True}},
        lambda r, s: r.data[-2]["choices"] == [] and r.data[-2]["usage"]["prompt_tokens"] == 21,
    ),
    Case(
        "timings per token count up",
        {"stream": True, "timings_per_token": True},
        lambda r, s: (
            (n := [c["timings"]["predicted_n"] for c in r.data[1:-1]]) == sorted(n) and (n[0], n[-1]) == (1, 11)
        ),
    ),
    Case(
        "progress counts up to the prompt",
        {"stream": True, "return_progress": True},
        lambda r, s: [c["prompt_progress"]["processed"] for c in r.data if "prompt_progress" in c] == [0, 21],
    ),
    Case("no progress without asking", {"stream": True}, lambda r, s: b"prompt_progress" not in r.body),
    Case("a json object", {"response_format": {"type": "json_object"}}, lambda r, s: s.asked.grammar is not None),
    Case("a schema in a json object", schema({"const": "42"}), lambda r, s: "42" in s.asked.grammar.lark),
    Case("a schema alone", {"json_schema": {"const": "42"}}, lambda r, s: "42" in s.asked.grammar.lark),
    Case("an unknown form", {"response_format": {"type": "sound"}}, refused("response_format.type")),
    Case("a schema that is a number", schema(123), refused("response_format.schema")),
    Case("a schema with a number for a type", schema({"type": 123}), refused("schema")),
    Case("a schema with an unknown type", schema({"type": "hiccup"}), refused("schema")),
    Case("messages are missing", {"messages": None}, refused("messages")),
    Case("messages are a text", {"messages": "string"}, refused("messages")),
    Case("a message is a number", {"messages": [123]}, refused("messages[0]")),
    Case("a message is empty", {"messages": [{}]}, refused("messages[0].role")),
    Case("a role is a number", {"messages": [{"role": 123}]}, refused("messages[0].role")),
    Case("a content is a number", {"messages": [{"role": "system", "content": 123}]}, refused("messages[0].content")),
    Case(
        "an image",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        refused("image_url"),
    ),
    Case("biases by id", {"logit_bias": {"104": -100}}, lambda r, s: set(s.asked.params.logit_bias) == {104}),
    Case("biases in pairs", {"logit_bias": [[104, 1]]}, lambda r, s: s.asked.params.logit_bias == {104: 1.0}),
    Case("biases of words", {"logit_bias": [["ab", 1]]}, lambda r, s: set(s.asked.params.logit_bias) == {97, 98}),
    Case(
        "a bias of false forbids",
        {"logit_bias": [[104, False]]},
        lambda r, s: s.asked.params.logit_bias == {104: float("-inf")},
    ),
    Case(
        "log-probabilities of each token",
        {"logprobs": True, "top_logprobs": 3},
        lambda r, s: [len(entry["top_logprobs"]) for entry in choice(r)["logprobs"]["content"]] == [3] * 10,
    ),
    Case("none without asking", {}, lambda r, s: choice(r)["logprobs"] is None),
    Case(
        "a full context names both numbers",
        {"messages": [{"role": "user", "content": LONG}]},
        lambda r, s: r.status == 400 and (r.error["n_prompt_tokens"], r.error["n_ctx"]) == (5019, 4096),
    ),
    Case(
        "a full context has a status in a stream too",
        {"messages": [{"role": "user", "content": LONG}], "stream": True},
        lambda r, s: r.status == 400 and r.error["code"] == "context_length_exceeded",  # OpenAI's name
    ),
    Case("several answers", {"n": 2}, lambda r, s: [c["index"] for c in r.json["choices"]] == [0, 1]),
    Case("n_cmpl is n", {"n_cmpl": 2}, lambda r, s: len(r.json["choices"]) == 2),
    Case(
        "an answer that is begun goes on",
        {"messages": [*USER, {"role": "assistant", "content": "So"}], "add_generation_prompt": False},
        lambda r, s: s.backend.prompts[-1].endswith("assistant\nSo"),
    ),
    Case("a wrong grammar", {"grammar": {"type": "lark", "value": "start: ("}}, refused("grammar")),
    Case("a call must have tools", {"tool_choice": "required"}, refused("tool_choice")),
    Case(
        "a call that must come is forced",
        {"tools": [TOOL], "tool_choice": "required"},
        lambda r, s: s.asked.grammar is not None,
    ),
    Case("samplers that are not there", {"mirostat": 2}, refused("mirostat")),
    Case(
        "samplers that are off",
        {"mirostat": 0, "dry_multiplier": 0, "xtc_probability": 0},
        lambda r, s: r.status == 200,
    ),
    Case("settings of slots", {"id_slot": 1, "cache_prompt": False, "n_keep": 3}, lambda r, s: r.status == 200),
    Case("null is the default", {"temperature": None, "stop": None, "n": None}, lambda r, s: r.status == 200),
]

TEXTS = [
    Case("a text goes on", {"prompt": "I"}, lambda r, s: choice(r)["text"] == "Hello there"),
    Case("the object is named", {"prompt": "I"}, lambda r, s: r.json["object"] == "text_completion"),
    Case("ids go on", {"prompt": [72, 73]}, lambda r, s: s.asked.ids == [72, 73]),
    Case("several prompts", {"prompt": ["a", "b"]}, lambda r, s: len(r.json["choices"]) == 2),
    Case(
        "texts beside ids", {"prompt": ["a", [98]]}, lambda r, s: sorted(a.ids for a in s.backend.asked) == [[97], [98]]
    ),
    Case("a stream is the same text", {"prompt": "I", "stream": True}, lambda r, s: content(r) == "Hello there"),
    Case("n_predict 0 only reads", {"prompt": "I", "n_predict": 0}, lambda r, s: choice(r)["text"] == ""),
    Case("stop ends before the word", {"prompt": "I", "stop": ["th"]}, lambda r, s: choice(r)["text"] == "Hello "),
    Case("stop in a stream", {"prompt": "I", "stop": ["th"], "stream": True}, lambda r, s: content(r) == "Hello "),
    Case("n_probs is logprobs", {"prompt": "I", "n_probs": 2}, lambda r, s: len(choice(r)["logprobs"]["tokens"]) == 11),
    Case(
        "a character of several tokens comes whole",
        {"prompt": "I", "stream": True},
        lambda r, s: [p["text"] for c in r.data[:-2] for p in c["choices"]] == ["\u20ac", "\U0001f600"],
        "\u20ac\U0001f600",
    ),
    Case(
        "ignore_eos forbids the end", {"prompt": "I", "ignore_eos": True}, lambda r, s: 258 in s.asked.params.logit_bias
    ),
    Case("a seed counts", {"prompt": "I", "seed": 7}, lambda r, s: s.asked.params.seed == 7),
    Case("seed -1 is another one each time", {"prompt": "I", "seed": -1}, lambda r, s: s.asked.params.seed is None),
    Case("special tokens in a text are text", {"prompt": "<|im_end|>"}, lambda r, s: 258 not in s.asked.ids),
    Case("a prompt is missing", {}, refused("prompt")),
    Case("a prompt is empty", {"prompt": ""}, refused("prompt")),
    Case("a prompt is an object", {"prompt": {"a": 1}}, refused("prompt")),
    Case("an id that is none", {"prompt": [99999]}, refused("99999")),
    Case("echo", {"prompt": "I", "echo": True}, lambda r, s: choice(r)["text"] == "IHello there"),
]


def run(served: Served, case: Case, path: str, body: dict[str, Any]) -> None:
    reply = ask(served.says(case.says).app, path, body)
    assert reply.status in (200, 400)
    assert case.check(reply, served), reply.body


@pytest.mark.parametrize("case", CHATS, ids=[case.name for case in CHATS])
def test_chat(served: Served, case: Case) -> None:
    run(served, case, CHAT, {"messages": USER, **case.body})


@pytest.mark.parametrize("case", TEXTS, ids=[case.name for case in TEXTS])
def test_text(served: Served, case: Case) -> None:
    run(served, case, COMPLETIONS, case.body)
