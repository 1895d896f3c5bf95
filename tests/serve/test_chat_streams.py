"""Streams and plain replies of /v1/chat/completions, chunk by chunk."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from support.scripted import Reply as Answer
from support.served import CHAT, USER, Served
from support.streams import Call, ask, events_of
from zincmetal.errors import ContextFullError, DeadlineError, DeviceError, QueueFullError
from zincmetal.serve.serving import Limits

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
PATCH = {"type": "custom", "custom": {"name": "patch"}}


def golden(data: list[Any]) -> list[Any]:
    """Leaves out of chunks what differs from run to run, and what all chunks have."""
    found = []
    for chunk in data:
        if not isinstance(chunk, dict) or "error" in chunk:
            found.append(chunk)
            continue
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["id"].startswith("chatcmpl-")
        assert chunk["id"] == data[0]["id"]
        assert type(chunk["created"]) is int
        assert chunk["model"] == "scripted"
        assert chunk["system_fingerprint"].startswith("zm-")
        kept = {k: v for k, v in chunk.items() if k in ("choices", "usage", "prompt_progress")}
        found.append(kept)
    return found


def choice(delta: dict[str, Any], reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}]}


ROLE = choice({"role": "assistant", "content": ""})


def call_ids(data: list[Any]) -> list[str]:
    """Takes the ids of calls out of chunks."""
    ids = []
    for chunk in data:
        for part in chunk["choices"] if isinstance(chunk, dict) else ():
            ids += [call.pop("id") for call in part["delta"].get("tool_calls", ()) if "id" in call]
    return ids


def test_text(served: Served) -> None:
    reply = served.says("Hé").chat(stream=True)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert golden(reply.data) == [
        ROLE,
        choice({"content": "H"}),
        choice({"content": "é"}),
        choice({}, "stop"),
        "[DONE]",
    ]
    assert reply.body.endswith(b"data: [DONE]\n\n")
    assert {event.name for event in reply.events} == {""}


def test_the_last_chunk_has_timings(served: Served) -> None:
    last = served.says("Hi").chat(stream=True).data[-2]
    assert last["choices"][0]["finish_reason"] == "stop"
    timings = last["timings"]
    assert (timings["cache_n"], timings["prompt_n"], timings["predicted_n"]) == (0, 21, 3)
    assert timings["prompt_ms"] == 10
    assert timings["prompt_per_second"] == 2100
    assert timings["predicted_ms"] == 20
    assert timings["predicted_per_second"] == 100  # without the first token, which came with the prompt


def test_timings_per_token(served: Served) -> None:
    data = served.says("Hi").chat(stream=True, timings_per_token=True).data
    texts = [chunk for chunk in data[:-1] if chunk["choices"][0]["delta"].get("content")]
    assert [chunk["timings"]["predicted_n"] for chunk in texts] == [1, 2]
    assert all(chunk["timings"]["prompt_n"] == 21 for chunk in texts)


def test_usage_comes_last_and_elsewhere_is_null(served: Served) -> None:
    data = (
        served.says(Answer("Hi", reused=16, why="no more"))
        .chat(stream=True, stream_options={"include_usage": True})
        .data
    )
    *chunks, last, done = data
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 21,
        "completion_tokens": 3,
        "total_tokens": 24,
        "prompt_tokens_details": {"cached_tokens": 16},
        "completion_tokens_details": {"reasoning_tokens": 0},
        "cache": {"reused": 16, "source": "memory", "why": "no more"},
    }


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_no_usage_unless_it_is_asked_for(served: Served, options: Any) -> None:
    data = served.chat(stream=True, stream_options=options).data
    assert all("usage" not in chunk for chunk in data[:-1])


def test_progress_comes_before_the_role(served: Served) -> None:
    data = served.says(Answer("H", reused=5)).chat(stream=True, return_progress=True).data
    first, second, role = golden(data)[:3]
    assert role == ROLE
    for chunk, done in ((first, 5), (second, 21)):
        assert chunk["choices"] == []
        progress = chunk["prompt_progress"]
        assert progress.pop("time_ms") >= 0
        assert progress == {"total": 21, "cache": 5, "processed": done}


def test_no_progress_unless_it_is_asked_for(served: Served) -> None:
    assert all(chunk["choices"] for chunk in served.chat(stream=True).data[:-1])


@pytest.mark.usefixtures("lines")
def test_reasoning_then_text(served: Served) -> None:
    data = served.says("think why\nsay so\n").chat(stream=True, stream_options={"include_usage": True}).data
    usage = data[-2]["usage"]
    for chunk in data[:-1]:
        chunk.pop("usage")
    assert golden(data[:-2]) == [
        ROLE,
        choice({"reasoning_content": "why"}),
        choice({"content": "so"}),
        choice({}, "stop"),
    ]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len("think why\n")}
    assert usage["completion_tokens"] == len("think why\nsay so\n") + 1


@pytest.mark.usefixtures("lines")
def test_one_call(served: Served) -> None:
    data = served.says('call f\nargs {"a"\nargs :1}\nend {"a":1}\n').chat(stream=True, tools=[TOOL]).data
    (id,) = call_ids(data)
    assert id.startswith("call_")
    begin = {"index": 0, "type": "function", "function": {"name": "f", "arguments": ""}}
    assert golden(data) == [
        ROLE,
        choice({"tool_calls": [begin]}),
        choice({"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}),
        choice({"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]}),
        choice({}, "tool_calls"),
        "[DONE]",
    ]


@pytest.mark.usefixtures("lines")
def test_parallel_calls_have_dense_indices_and_ids_of_their_own(served: Served) -> None:
    script = "say first\ncall f\nargs {}\nend {}\ncall g\nend {}\ncall f\nargs {}\nend {}\n"
    data = served.says(script).chat(stream=True, tools=[TOOL]).data
    ids = call_ids(data)
    assert len(set(ids)) == 3
    calls = [call for chunk in data[:-1] for part in chunk["choices"] for call in part["delta"].get("tool_calls", ())]
    assert [(call["index"], call["function"]["arguments"]) for call in calls] == [
        (0, ""),
        (0, "{}"),
        (1, ""),
        (1, "{}"),  # a call whose arguments came as a whole
        (2, ""),
        (2, "{}"),
    ]
    assert data[-2]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.usefixtures("lines")
def test_plain_calls(served: Served) -> None:
    body = served.says('call f\nargs {"a":1}\nend {"a":1}\ncall g\nend {}\n').chat(tools=[TOOL]).json
    message = body["choices"][0]["message"]
    ids = [call.pop("id") for call in message["tool_calls"]]
    assert len(set(ids)) == 2
    assert message == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
            {"type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }
    assert body["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.usefixtures("lines")
def test_text_before_a_call_stays(served: Served) -> None:
    message = served.says("say look\ncall f\nend {}\n").chat(tools=[TOOL]).json["choices"][0]["message"]
    assert message["content"] == "look"
    assert len(message["tool_calls"]) == 1


@pytest.mark.usefixtures("lines")
@pytest.mark.parametrize("stream", [True, False])
def test_a_custom_tool_gets_a_text(served: Served, stream: bool) -> None:
    script = 'call patch\nargs {"input": "*** Begin"}\nend {"input": "*** Begin"}\n'
    reply = served.says(script).chat(stream=stream, tools=[PATCH])
    if not stream:
        (call,) = reply.json["choices"][0]["message"]["tool_calls"]
        call.pop("id")
        assert call == {"type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
        return
    data = reply.data
    call_ids(data)
    assert golden(data)[1:3] == [
        choice({"tool_calls": [{"index": 0, "type": "custom", "custom": {"name": "patch", "input": ""}}]}),
        choice({"tool_calls": [{"index": 0, "custom": {"input": "*** Begin"}}]}),
    ]


@pytest.mark.usefixtures("lines")
def test_a_call_that_is_cut_off_ends_with_length(served: Served) -> None:
    answer = Answer('call f\nargs {"a\n', reason="length")
    data = served.says(answer).chat(stream=True, tools=[TOOL]).data
    assert data[-2]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_length(served: Served, stream: bool) -> None:
    reply = served.says("Hello there").chat(stream=stream, max_tokens=3)
    if stream:
        texts = [c["choices"][0]["delta"].get("content", "") for c in reply.data[:-1]]
        assert ("".join(texts), reply.data[-2]["choices"][0]["finish_reason"]) == ("Hel", "length")
    else:
        (found,) = reply.json["choices"]
        assert (found["message"]["content"], found["finish_reason"]) == ("Hel", "length")
        assert reply.json["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_text_before_it(served: Served, stream: bool) -> None:
    reply = served.says("Hello there").chat(stream=stream, stop=["o t"])
    if stream:
        texts = [c["choices"][0]["delta"].get("content", "") for c in reply.data[:-1]]
        assert ("".join(texts), reply.data[-2]["choices"][0]["finish_reason"]) == ("Hell", "stop")
    else:
        (found,) = reply.json["choices"]
        assert (found["message"]["content"], found["finish_reason"]) == ("Hell", "stop")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"n": 3},
        {"logprobs": True, "top_logprobs": 2},
        {"stop": ["re"]},
        {"max_tokens": 4},
        {"max_tokens": 0},
    ],
)
def test_a_plain_reply_is_the_stream_collected(served: Served, given: dict[str, Any]) -> None:
    data = served.chat(stream=True, stream_options={"include_usage": True}, **given).data[:-1]
    plain = served.chat(**given).json
    assert plain["object"] == "chat.completion"
    assert plain["usage"] == data[-1]["usage"]
    for i, found in enumerate(plain["choices"]):
        mine = [part for chunk in data for part in chunk["choices"] if part["index"] == i]
        assert found["index"] == i
        assert found["message"]["content"] == "".join(part["delta"].get("content", "") for part in mine)
        assert found["finish_reason"] == mine[-1]["finish_reason"]
        logprobs = [entry for part in mine if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert (found["logprobs"] or {"content": []})["content"] == logprobs


def test_a_plain_reply_has_its_times_in_a_header(served: Served) -> None:
    reply = served.chat()
    assert reply.headers["server-timing"] == "queue;dur=0, prefill;dur=10, decode;dur=20"


# ---- log-probabilities --------------------------------------------------------------------------------------------


def test_logprobs_stand_beside_their_text(served: Served) -> None:
    data = served.says("Hé").chat(stream=True, logprobs=True, top_logprobs=1).data
    parts = [part for chunk in data[:-1] for part in chunk["choices"]]
    texts = [(p["delta"].get("content"), p["logprobs"]) for p in parts if p["delta"].get("content")]
    assert [text for text, _ in texts] == ["H", "é"]
    first, second = (logprobs["content"] for _, logprobs in texts)
    top = {"token": "H", "bytes": [72], "logprob": -0.5, "id": 72}
    assert first == [{**top, "top_logprobs": [top]}]
    assert [entry["bytes"] for entry in second] == [[0xC3], [0xA9]]  # a character of two tokens
    assert all(p["logprobs"] is None for p in parts if not p["delta"].get("content"))


@pytest.mark.usefixtures("lines")
def test_reasoning_and_calls_have_no_logprobs(served: Served) -> None:
    data = served.says("think a\nsay b\ncall f\nend {}\n").chat(stream=True, logprobs=True, tools=[TOOL]).data
    for chunk in data[:-1]:
        (part,) = chunk["choices"]
        assert bool(part["logprobs"]) == ("content" in part["delta"] and part["delta"]["content"] != "")


def test_a_marker_in_front_of_a_text_has_no_logprobs(served: Served) -> None:
    """Where it is no token of its own, its letters are held back until the text comes."""
    (found,) = served.says("<think>abc</think>Yes").chat(logprobs=True).json["choices"]
    assert "".join(entry["token"] for entry in found["logprobs"]["content"]) == found["message"]["content"] == "Yes"


def test_the_end_token_has_no_logprobs(served: Served) -> None:
    content = served.says("Hi").chat(logprobs=True).json["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["H", "i"]


# ---- many answers -------------------------------------------------------------------------------------------------


def test_many_answers(served: Served) -> None:
    count = iter("abc")
    served.backend.script = lambda prompt, asked: next(count)
    body = served.chat(n=3).json
    assert [(c["index"], c["message"]["content"]) for c in body["choices"]] == [(0, "a"), (1, "b"), (2, "c")]
    assert body["usage"]["prompt_tokens"] == 21  # once
    assert body["usage"]["completion_tokens"] == 6


def test_each_answer_has_a_seed_of_its_own(served: Served) -> None:
    assert served.chat(n=3, seed=7).status == 200
    assert [asked.params.seed for asked in served.backend.asked] == [7, 8, 9]


def test_the_chunks_of_each_answer_are_in_order(served: Served) -> None:
    data = served.says("Hi").chat(stream=True, n=2).data
    for index in (0, 1):
        mine = [part for chunk in data[:-1] for part in chunk["choices"] if part["index"] == index]
        assert [part["delta"] for part in mine] == [
            {"role": "assistant", "content": ""},
            {"content": "H"},
            {"content": "i"},
            {},
        ]
        assert [part["finish_reason"] for part in mine] == [None, None, None, "stop"]


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFullError("8 requests are waiting already"), 503, "queue_full"),
        (DeviceError("the device is lost"), 503, "device_error"),
        (ContextFullError("no room"), 400, "context_length_exceeded"),
        (RuntimeError("secret"), 500, None),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_before_the_stream_has_a_status(
    served: Served, error: Exception, status: int, code: str | None, stream: bool
) -> None:
    served.backend.refusal = error
    reply = served.chat(stream=stream)
    assert reply.status == status
    assert reply.error["code"] == code
    assert ("retry-after" in reply.headers) == (status == 503)
    assert "secret" not in reply.body.decode()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DeviceError("the device failed"), "device_error"),
        (DeadlineError("too late"), "timeout"),
        (ZeroDivisionError("secret"), None),
    ],
)
def test_an_error_in_the_middle_is_the_last_event(served: Served, error: Exception, code: str | None) -> None:
    reply = served.says(Answer("Hello", error=error, error_after=2)).chat(stream=True)
    assert reply.status == 200
    *chunks, last = reply.data
    assert golden(chunks) == [ROLE, choice({"content": "H"}), choice({"content": "e"})]
    assert set(last) == {"error"}
    assert last["error"]["code"] == code
    assert b"[DONE]" not in reply.body
    assert b"secret" not in reply.body


def test_an_error_in_the_middle_of_a_plain_reply_has_a_status(served: Served) -> None:
    reply = served.says(Answer("Hello", error=DeviceError("the device failed"), error_after=2)).chat()
    assert (reply.status, reply.error["code"], reply.error["message"]) == (503, "device_error", "the device failed")


def test_an_error_of_one_of_many_answers_ends_all(served: Served) -> None:
    answers = iter([Answer("a" * 50, delay=0.01), Answer("b", error=DeviceError("lost"), error_after=1)])
    served.backend.script = lambda prompt, asked: next(answers)
    reply = served.chat(stream=True, n=2)
    assert reply.data[-1]["error"]["message"] == "lost"
    assert len(served.backend.ended) == 2


def test_a_draining_server_refuses(served: Served) -> None:
    served.serving.draining = True
    reply = served.chat()
    assert (reply.status, reply.error["code"]) == (503, "shutting_down")


# ---- signs of life, and clients that leave ------------------------------------------------------------------------


def test_a_comment_keeps_a_stream_alive_while_the_prompt_is_read(served: Served) -> None:
    served.reset(Limits(keep_alive=0.001)).says(Answer("H", reading=60))

    async def main() -> None:
        call = Call(served.app, CHAT, {"messages": USER, "stream": True})
        for _ in range(3):
            assert await call.piece() == b": keep-alive\n\n"
        call.leave()
        await call.over()

    asyncio.run(main())


def test_headers_come_before_the_prompt_is_read(served: Served) -> None:
    served.says(Answer("H", reading=60))

    async def main() -> None:
        call = Call(served.app, CHAT, {"messages": USER, "stream": True})
        await asyncio.wait_for(call.started.wait(), 30)
        assert call.status == 200
        call.leave()
        await call.over()

    asyncio.run(main())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("answer", [Answer("H", reading=60), Answer("Hello", delay=60)], ids=["prompt", "answer"])
def test_a_client_that_leaves_ends_the_generation(served: Served, answer: Answer, stream: bool) -> None:
    served.says(answer)

    async def main() -> None:
        call = Call(served.app, CHAT, {"messages": USER, "stream": stream})
        while not served.backend.running:
            await asyncio.sleep(0)
        (running,) = served.backend.running
        call.leave()
        await call.over()
        assert running.cancelled.is_set()
        assert served.backend.running == []
        assert served.models.leases == 0
        assert b"[DONE]" not in call_body(call)

    asyncio.run(main())


def call_body(call: Call) -> bytes:
    return b"".join(call.taken())


def test_a_client_that_leaves_ends_all_answers(served: Served) -> None:
    served.says(Answer("Hello", delay=60))

    async def main() -> None:
        call = Call(served.app, CHAT, {"messages": USER, "stream": True, "n": 3})
        while len(served.backend.running) < 3:
            await asyncio.sleep(0)
        running = list(served.backend.running)
        call.leave()
        await call.over()
        assert all(answer.cancelled.is_set() for answer in running)

    asyncio.run(main())


@pytest.mark.parametrize("which", ["request", "reply"])
def test_a_stream_is_cancelled_by_id(served: Served, which: str) -> None:
    served.says(Answer("Hello", delay=60))

    async def main() -> None:
        call = Call(
            served.app,
            CHAT,
            {"messages": USER, "stream": True, "return_progress": True},
            headers={"x-request-id": "mine-1"},
        )
        first = events_of(await call.piece())[0].data
        id = "mine-1" if which == "request" else first["id"]
        for turn in served.serving.turns[id]:
            turn.cancel()
        data = [event.data for event in events_of(await call.rest())]
        assert data[-1] == "[DONE]"
        assert data[-2]["choices"][0]["finish_reason"] == "stop"
        assert call.headers["x-request-id"] == "mine-1"

    asyncio.run(main())


def test_a_request_that_waits_too_long_ends_with_504(served: Served) -> None:
    served.reset(Limits(queue=0.01)).says(Answer("H", reading=60))
    reply = served.chat()
    assert (reply.status, reply.error["code"]) == (504, "timeout")


def test_input_tokens(served: Served) -> None:
    reply = ask(served.app, CHAT + "/input_tokens", {"messages": USER})
    assert reply.json["input_tokens"] == 21
    assert served.backend.asked == []
