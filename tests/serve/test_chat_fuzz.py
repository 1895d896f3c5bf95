"""Whatever a client sends, the server answers it, or refuses it with a status of the client's own fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.served import CHAT, COMPLETIONS, USER, Served
from support.streams import ask

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
NAMES = (
    *(
        "model",
        "messages",
        "prompt",
        "stream",
        "stream_options",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "n_predict",
    ),
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty"),
    *("repeat_penalty", "repeat_last_n", "seed", "stop", "logit_bias", "logprobs", "top_logprobs", "tools"),
    *("tool_choice", "parallel_tool_calls", "response_format", "grammar", "json_schema", "structured_outputs"),
    *("guided_choice", "reasoning_effort", "reasoning", "thinking", "enable_thinking", "chat_template_kwargs"),
    *("reasoning_budget", "reasoning_format", "return_progress", "timings_per_token", "continue_final_message"),
    *("add_generation_prompt", "echo", "suffix", "best_of", "deadline", "keep_alive", "ttl", "ignore_eos", "user"),
    *("modalities", "audio", "functions", "function_call", "prompt_cache_key"),
)
# Near misses: values of the right form with something wrong inside, which reach further than noise does.
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "x"])},
        optional={
            "content": values
            | st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "x"]), "text": values})),
            "tool_calls": st.lists(
                st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": scalars, "arguments": values})})
            ),
            "reasoning_content": scalars,
            "tool_call_id": scalars,
        },
    ),
    max_size=4,
)
tools = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": scalars})}),
    max_size=3,
)
special = {
    "messages": messages,
    "tools": tools,
    "prompt": st.text(max_size=8)
    | st.lists(st.integers(-2, 300), max_size=5)
    | st.lists(st.text(max_size=4), max_size=3),
    "tool_choice": st.sampled_from(["auto", "none", "required"]),
    "n": st.integers(0, 3),
    "stream": st.booleans(),
    "echo": st.booleans(),
    "logprobs": st.booleans() | st.integers(0, 5),
}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(NAMES), max_size=6, unique=True))
    body = {name: draw(values | special.get(name, values)) for name in names}
    if draw(st.booleans()):
        body |= {"messages": USER, "prompt": "hi"}
    return body


def check(served: Served, path: str, raw: bytes) -> None:
    reply = ask(served.app, path, raw)
    assert reply.status in (200, 400, 404), reply.body
    if reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.body.endswith(b"data: [DONE]\n\n"), reply.body
    elif reply.status == 200:
        assert reply.json["choices"]
    else:
        assert set(reply.error) >= {"message", "type", "param", "code"}
    assert served.serving.turns == {}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies())
def test_bodies_of_any_values(served: Served, path: str, body: dict[str, Any]) -> None:
    check(served, path, json.dumps(body).encode())


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_bodies_of_any_bytes(served: Served, path: str, raw: bytes) -> None:
    reply = ask(served.app, path, raw)
    assert reply.status == 400
    assert reply.error["code"] in ("invalid_json", "missing_required_parameter", None)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 200), at=st.integers(0, 200), put=st.binary(max_size=3))
def test_good_bodies_with_a_wound(served: Served, cut: int, at: int, put: bytes) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "é \U0001f600 \\u"}], "stop": ["x"], "n": 1}).encode()
    check(served, CHAT, good[:at] + put + good[min(at + cut % 7, len(good)) :])
