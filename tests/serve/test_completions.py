"""/v1/completions: texts that go on, and texts that are scored."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from support.scripted import Reply as Answer
from support.served import COMPLETIONS, Served
from support.streams import Call
from support.text_model import TURNS
from support.vocab_builder import CONTROL
from zincmetal.errors import DeviceError


def golden(data: list[Any]) -> list[Any]:
    """Keeps what chunks do not have in common."""
    found = []
    for chunk in data:
        if isinstance(chunk, dict) and "error" not in chunk:
            assert chunk["object"] == "text_completion"
            assert chunk["id"].startswith("cmpl-")
            assert chunk["id"] == data[0]["id"]
            assert (type(chunk["created"]), chunk["model"]) == (int, "scripted")
            chunk = {k: v for k, v in chunk.items() if k in ("choices", "usage")}
        found.append(chunk)
    return found


def choice(text: str, reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": text, "logprobs": None, "finish_reason": reason}]}


def test_a_stream(served: Served) -> None:
    reply = served.says("Hé").complete(stream=True)
    assert golden(reply.data) == [choice("H"), choice("é"), choice("", "stop"), "[DONE]"]
    assert reply.data[-2]["timings"]["predicted_n"] == 4


def test_usage_of_a_stream(served: Served) -> None:
    *chunks, last, _ = served.says("H").complete(stream=True, stream_options={"include_usage": True}).data
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == ([], 2, 2)


def test_a_plain_reply(served: Served) -> None:
    reply = served.says("Hello").complete()
    body = reply.json
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["total_tokens"] == 2 + 6
    assert "decode;dur=20" in reply.headers["server-timing"]


def test_no_template_is_applied(served: Served) -> None:
    served.complete(prompt="<|im_start|>hi")
    assert served.backend.prompts == ["<|im_start|>hi"]
    assert 257 not in served.asked.ids  # control tokens in a text stay text


def test_sixteen_tokens_are_the_default(served: Served) -> None:
    body = served.says("x" * 40).complete().json
    assert (len(body["choices"][0]["text"]), body["choices"][0]["finish_reason"]) == (16, "length")


@pytest.mark.parametrize(
    ("given", "most"), [({"max_tokens": 3}, 3), ({"n_predict": -1}, -1), ({"max_tokens": 10**9}, 10**9)]
)
def test_the_most_tokens(served: Served, given: dict[str, Any], most: int) -> None:
    assert served.complete(**given).status == 200
    assert served.asked.max_tokens == most


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [99]], [[97, 98], [99]]),
        (["ab", [99]], [[97, 98], [99]]),
        ("he", [[256]]),
    ],
)
def test_forms_of_the_prompt(served: Served, prompt: Any, ids: list[list[int]]) -> None:
    body = served.complete(prompt=prompt).json
    assert sorted(asked.ids for asked in served.backend.asked) == sorted(ids)
    assert [c["index"] for c in body["choices"]] == list(range(len(ids)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_each_prompt_has_its_own_answer(served: Served) -> None:
    served.backend.script = lambda prompt, asked: prompt.upper()
    body = served.complete(prompt=["ab", "cd", "ef", "gh", "ij", "kl"]).json
    assert [c["text"] for c in body["choices"]] == ["AB", "CD", "EF", "GH", "IJ", "KL"]


def test_prompts_times_answers(served: Served) -> None:
    served.backend.script = lambda prompt, asked: f"{prompt}{asked.params.seed}"
    body = served.complete(prompt=["a", "b"], n=2, seed=5).json
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a5"), (1, "a6"), (2, "b5"), (3, "b6")]


def test_a_long_list_does_not_fill_the_queue(served: Served) -> None:
    most = 0

    def script(prompt: str, asked: Any) -> Answer:
        nonlocal most
        most = max(most, len(served.backend.asked) - len(served.backend.ended))
        return Answer("x", delay=0.001)

    served.backend.script = script
    assert len(served.complete(prompt=["a"] * 40).json["choices"]) == 40
    assert most <= served.backend.card.sequences + 1  # the first is started before the others


def test_a_stream_of_many_prompts(served: Served) -> None:
    data = served.says("Hi").complete(prompt=["a", "b"], n=2, stream=True).data[:-1]
    for index in range(4):
        mine = [part for chunk in data for part in chunk["choices"] if part["index"] == index]
        assert [part["text"] for part in mine] == ["H", "i", ""]
        assert [part["finish_reason"] for part in mine] == [None, None, "stop"]


# ---- echo and log-probabilities -----------------------------------------------------------------------------------


def test_echo(served: Served) -> None:
    (found,) = served.says("Hello").complete(prompt="say ", echo=True).json["choices"]
    assert (found["text"], found["logprobs"]) == ("say Hello", None)
    assert served.backend.scored == []


def test_echo_of_ids_is_their_text(served: Served) -> None:
    (found,) = served.says("!").complete(prompt=[104, 105], echo=True).json["choices"]
    assert found["text"] == "hi!"


def test_logprobs(served: Served) -> None:
    (found,) = served.says("Hé").complete(logprobs=1).json["choices"]
    assert found["logprobs"] == {
        "tokens": ["H", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{"H": -0.5}, {"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.5}, {"<|im_end|>": -0.5}],
        "text_offset": [0, 1, 1, 2],
    }


@pytest.mark.parametrize("given", [0, 1, 5, 20, True])
def test_the_token_itself_is_among_the_top_ones(served: Served, given: Any) -> None:
    (found,) = served.says("Hi").complete(logprobs=given).json["choices"]
    assert [set(top) for top in found["logprobs"]["top_logprobs"]] == [{"H"}, {"i"}, {"<|im_end|>"}]


def test_echo_with_logprobs(served: Served) -> None:
    (found,) = served.says("!").complete(prompt="hi", echo=True, logprobs=2).json["choices"]
    assert found["text"] == "hi!"
    logprobs = found["logprobs"]
    assert logprobs["tokens"] == ["h", "i", "!", "<|im_end|>"]
    assert logprobs["token_logprobs"] == [None, -1.0, -0.5, -0.5]  # nothing stands before the first
    assert logprobs["top_logprobs"][:2] == [None, {"i": -1.0, "j": -2.0}]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert served.backend.scored == [[104, 105]]


def test_only_scored(served: Served) -> None:
    body = served.complete(prompt=["hi", "abc"], echo=True, logprobs=0, max_tokens=0).json
    assert [c["text"] for c in body["choices"]] == ["hi", "abc"]
    assert [len(c["logprobs"]["tokens"]) for c in body["choices"]] == [2, 3]
    assert {c["finish_reason"] for c in body["choices"]} == {"length"}
    assert body["usage"]["completion_tokens"] == 0
    assert served.backend.asked == []  # nothing was generated


def test_no_tokens_without_echo(served: Served) -> None:
    body = served.complete(max_tokens=0).json
    assert body["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]


def test_as_an_evaluation_harness_asks(served: Served) -> None:
    """The form of lm-evaluation-harness: the score of a continuation, and whether it is what greedy would choose."""
    context, continuation = [104, 105], [32, 256]
    request = {"prompt": [context + continuation], "echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0}
    (found,) = served.says("x").complete(model="scripted", seed=1234, **request).json["choices"]
    logprobs = found["logprobs"]
    scores = logprobs["token_logprobs"][len(context) : -1]
    tops = logprobs["top_logprobs"][len(context) : -1]
    assert scores == [-1.0, -1.0]
    assert [max(top.values()) for top in tops] == scores
    assert len(logprobs["tokens"]) == 5  # one token was generated, which the harness leaves out


def test_the_end_token_counts_for_the_harness(served: Served) -> None:
    request = {"prompt": [[104, 105]], "echo": True, "max_tokens": 1, "logprobs": 1}
    (found,) = served.says("").complete(**request).json["choices"]
    assert found["logprobs"]["tokens"] == ["h", "i", "<|im_end|>"]


def test_echo_in_a_stream(served: Served) -> None:
    data = served.says("!").complete(prompt="hi", echo=True, logprobs=1, stream=True).data
    parts = [part for chunk in data[:-1] for part in chunk["choices"]]
    assert [part["text"] for part in parts] == ["hi", "!", "", ""]
    assert [len(part["logprobs"]["tokens"]) for part in parts if part["logprobs"]] == [2, 1, 1]
    assert parts[1]["logprobs"]["text_offset"] == [2]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"n": 2},
        {"prompt": ["a", "b"]},
        {"echo": True, "logprobs": 1},
        {"max_tokens": 3, "logprobs": 0},
        {"stop": "l"},
    ],
)
def test_a_plain_reply_is_the_stream_collected(served: Served, given: dict[str, Any]) -> None:
    data = served.complete(stream=True, **given).data[:-1]
    for found in served.complete(**given).json["choices"]:
        mine = [part for chunk in data for part in chunk["choices"] if part["index"] == found["index"]]
        assert found["text"] == "".join(part["text"] for part in mine)
        assert found["finish_reason"] == mine[-1]["finish_reason"]
        offsets = [at for part in mine if part["logprobs"] for at in part["logprobs"]["text_offset"]]
        assert (found["logprobs"] or {"text_offset": []})["text_offset"] == offsets


def test_a_gap_between_two_texts_is_filled(tmp_path: Path) -> None:
    marks = dict.fromkeys(("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), CONTROL)
    served = Served(tmp_path, special=TURNS | marks)
    assert served.complete(prompt="a", suffix="b").status == 200
    assert served.backend.prompts == ["<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"]
    assert served.complete(prompt="", suffix="<|fim_middle|>").status == 200
    prefix, suffix, *text, middle = served.asked.ids
    assert not {prefix, suffix, middle} & set(text)  # what a client writes is text
    assert served.complete(prompt=[104, 105], suffix="b").status == 200
    assert served.asked.ids[1:3] == [104, 105]
    reply = served.complete(prompt="a", suffix="b", echo=True)
    assert (reply.status, reply.error["param"]) == (400, "suffix")


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "param", "code"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": []}, "prompt", "invalid_type"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_type"),
        ({"prompt": 7}, "prompt", "invalid_type"),
        ({"prompt": [1, "a"]}, "prompt[1]", "invalid_type"),
        ({"prompt": ["a", []]}, "prompt[1]", "invalid_type"),
        ({"prompt": [["a"]]}, "prompt[0][0]", "invalid_type"),
        ({"prompt": ["a", 1]}, "prompt[0]", "invalid_type"),
        ({"prompt": ["a"] * 2049}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [259]}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"best_of": 0}, "best_of", "invalid_value"),
        ({"logprobs": 21}, "logprobs", "invalid_value"),
        ({"logprobs": "x"}, "logprobs", "invalid_type"),
        ({"n": 99}, "n", "invalid_value"),
        ({"echo": "yes"}, "echo", "invalid_type"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"mirostat": 1}, "mirostat", "unsupported_parameter"),
    ],
)
def test_a_wrong_field_is_named(served: Served, given: dict[str, Any], param: str | None, code: str | None) -> None:
    reply = served.complete(**given)
    assert reply.status == 400
    assert (reply.error["param"], reply.error["code"]) == (param, code)


@pytest.mark.parametrize("given", [{"suffix": ""}, {"best_of": 1}, {"n": 2, "best_of": 2}, {"user": "me"}, {"new": 1}])
def test_harmless_fields(served: Served, given: dict[str, Any]) -> None:
    assert served.complete(**given).status == 200


def test_a_prompt_that_fills_the_context(served: Served) -> None:
    reply = served.complete(prompt=["hi", "x" * 5000])
    assert (reply.status, reply.error["code"], reply.error["n_prompt_tokens"]) == (400, "context_length_exceeded", 5000)
    assert served.backend.asked == []


def test_an_error_of_one_prompt_ends_the_stream(served: Served) -> None:
    answers = {"a": Answer("x" * 50), "b": Answer("y", error=DeviceError("lost"), error_after=1)}
    served.backend.script = lambda prompt, asked: answers[prompt]
    reply = served.complete(prompt=["a", "b"], stream=True)
    assert reply.data[-1]["error"]["message"] == "lost"
    assert b"[DONE]" not in reply.body


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_all_prompts(served: Served, stream: bool) -> None:
    served.says(Answer("Hello", delay=60))

    async def main() -> None:
        call = Call(served.app, COMPLETIONS, {"prompt": ["a", "b", "c"], "stream": stream})
        while len(served.backend.running) < 3:
            await asyncio.sleep(0)
        running = list(served.backend.running)
        call.leave()
        await call.over()
        assert all(answer.cancelled.is_set() for answer in running)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("given", "grammar"),
    [({"response_format": {"type": "json_object"}}, "object"), ({"grammar": {"type": "regex", "value": "a+"}}, "a+")],
)
def test_forms_of_the_answer(served: Served, given: dict[str, Any], grammar: str) -> None:
    assert served.complete(**given).status == 200
    assert grammar in served.asked.grammar.lark
