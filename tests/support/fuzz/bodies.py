"""Any body on any route of the server: it is answered, or refused by name. No status of 500, no turn left behind."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from support.asgi import JSON, ask
from support.fuzz.reading import Reading, spelled
from support.scripted import Reply as Answer
from support.scripted import ScriptedModels, scripted
from zincmetal.serve.app import make_app
from zincmetal.serve.serving import Serving

T = TypeVar("T")

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/v1/embeddings": {"input": ["hi"]},
    "/v1/rerank": {"query": "hi", "documents": ["hi"]},
    "/v1/messages": {"model": "", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi", "max_output_tokens": 1},
    "/tokenize": {"content": "hi"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/cache/clear": {},
}
ROUTES = tuple(BODIES)
WORDS = (
    *("{", "}", "[", "]", ":", ",", "null", "true", "false", "0", "1", "-1", "1.5", "1e99", '"hi"', '""', '"model"'),
    *(
        '"messages"',
        '"role"',
        '"user"',
        '"assistant"',
        '"system"',
        '"tool"',
        '"content"',
        '"type"',
        '"text"',
        '"prompt"',
    ),
    *('"max_tokens"', '"stream"', '"stop"', '"n"', '"tools"', '"function"', '"name"', '"parameters"', '"tool_calls"'),
    *('"arguments"', '"{}"', '"id"', '"tool_call_id"', '"tool_choice"', '"auto"', '"required"', '"response_format"'),
    *('"json_schema"', '"schema"', '"input"', '"input_text"', '"message"', '"instructions"', '"reasoning"', '"effort"'),
    *('"previous_response_id"', '"thinking"', '"budget_tokens"', '"enabled"', '"logprobs"', '"top_logprobs"', '"seed"'),
    *('"temperature"', '"top_p"', '"logit_bias"', '"query"', '"documents"', '"tokens"', '"add_special"', '"grammar"'),
    *('"stream_options"', '"include_usage"', '"stop_sequences"', '"tool_use"', '"tool_result"', '"image"', '"source"'),
)


class _Here(ThreadPoolExecutor):
    """Executor that runs a job at once, in the thread that asks: a change of threads takes longer than most jobs."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@cache
def _server() -> tuple[Any, Serving, asyncio.AbstractEventLoop]:
    folder = Path(tempfile.mkdtemp(prefix="zincmetal-fuzz-"))
    serving = Serving(ScriptedModels([scripted(folder, lambda prompt, given: Answer("hello"), "tiny")]))
    loop = asyncio.new_event_loop()
    loop.set_default_executor(_Here())
    return make_app(serving), serving, loop


def run(data: bytes) -> None:
    """Ask a route with a body of words and characters."""
    app, serving, loop = _server()
    given = Reading(data)
    path = given.one(ROUTES)
    body = spelled(given.rest(), WORDS).encode("latin-1")  # bytes above the words are no UTF-8
    reply = loop.run_until_complete(asyncio.wait_for(ask(app, "POST", path, [JSON], body), 20))
    assert reply.status in (200, 400, 404, 413, 422), (reply.status, reply.body)
    assert serving.turns == {}
    if reply.status != 200:
        assert json.loads(reply.body)["error"]["message"]


def seeds() -> list[bytes]:
    """A good body for each route, and one in words."""
    return [bytes([i]) + json.dumps(body).encode() for i, body in enumerate(BODIES.values())] + [
        bytes([i]) + json.dumps({**body, "stream": True, "stop": ["x"], "tools": [], "n": 1}).encode()
        for i, body in enumerate(BODIES.values())
    ]
