"""The table of errors: one typed error, and what each API's clients get of it."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from support.served import CHAT, COMPLETIONS, USER, Served
from support.streams import Call, ask
from zincmetal import errors as typed
from zincmetal.serve.errors import (
    ANTHROPIC,
    KINDS,
    OPENAI,
    TABLE,
    BadRequest,
    HttpError,
    PromptTooLong,
    Unsupported,
    error_response,
    failure_of,
    family_of,
)
from zincmetal.serve.guard import Guard

#: The rows of the contract: the error, OpenAI's status, type and code, Anthropic's status and type.
ROWS: list[tuple[BaseException, int, str, str | None, int, str]] = [
    (BadRequest("bad", "a.b"), 400, "invalid_request_error", "invalid_value", 400, "invalid_request_error"),
    (Unsupported("audio"), 400, "invalid_request_error", "unsupported_parameter", 400, "invalid_request_error"),
    (PromptTooLong(9, 8), 400, "invalid_request_error", "context_length_exceeded", 400, "invalid_request_error"),
    (
        typed.ContextFullError("full"),
        400,
        "invalid_request_error",
        "context_length_exceeded",
        400,
        "invalid_request_error",
    ),
    (
        typed.UnsupportedSchemaError("not", "#/a"),
        400,
        "invalid_request_error",
        "unsupported_schema",
        400,
        "invalid_request_error",
    ),
    (typed.UsageError("wrong"), 400, "invalid_request_error", None, 400, "invalid_request_error"),
    (typed.TokenizerError("no"), 400, "invalid_request_error", "tokenizer_error", 400, "invalid_request_error"),
    (typed.ChatTemplateError("no"), 400, "invalid_request_error", "chat_template_error", 400, "invalid_request_error"),
    (HttpError("unauthorized", "key"), 401, "authentication_error", "invalid_api_key", 401, "authentication_error"),
    (HttpError("forbidden", "host"), 403, "permission_error", None, 403, "permission_error"),
    (typed.ModelNotFoundError("x"), 404, "not_found_error", "model_not_found", 404, "not_found_error"),
    (HttpError("not_found", "x"), 404, "not_found_error", None, 404, "not_found_error"),
    (HttpError("method", "x"), 405, "not_found_error", "method_not_allowed", 405, "not_found_error"),
    (HttpError("too_large", "x"), 413, "invalid_request_error", "request_too_large", 413, "invalid_request_error"),
    (HttpError("media", "x"), 415, "invalid_request_error", "unsupported_media_type", 415, "invalid_request_error"),
    (typed.QueueFullError("x"), 503, "server_error", "queue_full", 529, "overloaded_error"),
    (HttpError("loading", "x"), 503, "unavailable_error", "loading", 529, "overloaded_error"),
    (HttpError("draining", "x"), 503, "unavailable_error", "shutting_down", 529, "overloaded_error"),
    (typed.OutOfMemoryError("x"), 503, "server_error", "out_of_memory", 529, "overloaded_error"),
    (typed.DeviceError("x"), 503, "server_error", "device_error", 529, "overloaded_error"),
    (typed.KernelError("x"), 503, "server_error", "device_error", 529, "overloaded_error"),
    (typed.DeadlineError("x"), 504, "server_error", "timeout", 504, "timeout_error"),
    (typed.GrammarError("x"), 500, "server_error", "grammar_failed", 500, "api_error"),
    (typed.GGUFError("x"), 500, "server_error", "model_load_failed", 500, "api_error"),
    (typed.UnsupportedModelError("x"), 500, "server_error", "model_load_failed", 500, "api_error"),
    (RuntimeError("x"), 500, "server_error", None, 500, "api_error"),
]
IDS = [f"{type(row[0]).__name__}-{row[1]}-{row[3]}" for row in ROWS]


@pytest.mark.parametrize(("error", "status", "kind", "code", "_status", "_kind"), ROWS, ids=IDS)
def test_openai(error: BaseException, status: int, kind: str, code: str | None, _status: int, _kind: str) -> None:
    reply = error_response(error, CHAT, "req-1")
    assert reply.status_code == status
    body = json.loads(bytes(reply.body))
    assert set(body) == {"error"}
    assert (body["error"]["type"], body["error"]["code"]) == (kind, code)
    assert {"message", "type", "param", "code"} <= set(body["error"])
    assert body["error"]["code"] is None or isinstance(body["error"]["code"], str)


@pytest.mark.parametrize(("error", "_status", "_kind", "_code", "status", "kind"), ROWS, ids=IDS)
def test_anthropic(error: BaseException, _status: int, _kind: str, _code: Any, status: int, kind: str) -> None:
    reply = error_response(error, "/v1/messages", "req-1")
    assert reply.status_code == status
    body = json.loads(bytes(reply.body))
    assert (body["type"], body["request_id"]) == ("error", "req-1")
    assert set(body["error"]) == {"type", "message"}
    assert body["error"]["type"] == kind


@pytest.mark.parametrize("status", [503, 529])
def test_busy_servers_say_when_to_ask_again(status: int) -> None:
    path = "/v1/messages" if status == 529 else CHAT
    reply = error_response(typed.QueueFullError("8 wait"), path)
    assert reply.status_code == status
    assert 2 <= int(reply.headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (typed.DeviceError("lost"), "api_error"),  # their client repeats at once, without a stream
        (typed.OutOfMemoryError("full"), "overloaded_error"),
        (typed.QueueFullError("full"), "overloaded_error"),
        (typed.DeadlineError("late"), "timeout_error"),
        (RuntimeError("bug"), "api_error"),
    ],
)
def test_anthropic_in_the_middle_of_a_stream(error: BaseException, kind: str) -> None:
    assert failure_of(error).anthropic(midway=True)["error"]["type"] == kind


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PromptTooLong(9, 8), "context_length_exceeded"),  # Codex does not ask again
        (typed.DeviceError("lost"), "server_error"),
        (RuntimeError("bug"), "server_error"),
        (BadRequest("bad"), "invalid_prompt"),
    ],
)
def test_a_response_that_failed(error: BaseException, code: str) -> None:
    assert failure_of(error).response()["code"] == code


def test_the_words_by_which_agents_know_a_full_context() -> None:
    failure = failure_of(PromptTooLong(250_000, 8192))
    assert failure.anthropic()["error"]["message"] == "prompt is too long: 250000 tokens > 8192 maximum"
    error = failure.openai()["error"]
    assert error["message"].startswith("This model's maximum context length is 8192 tokens. However, your messages")
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (250_000, 8192)


def test_a_prompt_without_memory_is_too_long_as_well() -> None:
    failure = failure_of(typed.ContextFullError("the prompt has 9 tokens, and the K/V cache is full"))
    assert failure.anthropic()["error"]["message"].startswith("prompt is too long: the prompt has 9 tokens")


def test_a_field_is_named_in_both_forms() -> None:
    failure = failure_of(BadRequest("must be a string", "messages[0].content", "invalid_type"))
    assert failure.openai()["error"]["param"] == "messages[0].content"
    assert failure.anthropic()["error"]["message"] == "messages[0].content: must be a string"


def test_a_bug_tells_the_client_only_the_id(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "zincmetal.serve"):
        failure = failure_of(RuntimeError("the prompt was: secret"), "req-7")
    assert "secret" not in failure.message
    assert "req-7" in failure.message
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


def test_an_error_of_the_server_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "zincmetal.serve"):
        failure_of(typed.DeviceError("lost"), "req-8")
        failure_of(BadRequest("bad"), "req-9")
    assert "req-8" in caplog.text
    assert "req-9" not in caplog.text


def test_each_typed_error_has_a_row() -> None:
    """A new subclass of ZincError is at least the last row; it must not be a bug to clients."""
    found = [error for error in vars(typed).values() if isinstance(error, type) and issubclass(error, typed.ZincError)]
    for error in found:
        assert next(kind for known, kind in TABLE if issubclass(error, known)) in KINDS
    assert len(found) > 10


def test_headers_of_an_error_are_kept() -> None:
    reply = error_response(HttpError("unauthorized", "no", headers={"www-authenticate": "Bearer"}))
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("path", "family"),
    [(CHAT, OPENAI), (COMPLETIONS, OPENAI), ("/v1/messages", ANTHROPIC), ("/v1/messages/count_tokens", ANTHROPIC)],
)
def test_families(path: str, family: str) -> None:
    assert family_of(path) == family


# ---- over HTTP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b"{", "no well-formed JSON"),
        (b'{"messages": NaN}', "no well-formed JSON"),
        (b'{"temperature": Infinity}', "no well-formed JSON"),
        (b'{"temperature": 1e999}', "no well-formed JSON"),
        (b'{"a": 1} x', "no well-formed JSON"),
        (b'{"a": "\xff"}', "no well-formed JSON"),
        (b"[]", "must be a JSON object"),
        (b'"hi"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"seed": 123456789012345678901234567890}', "beyond 64 bits"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "no well-formed JSON"),
        (b'{"a": ' * 70 + b"1" + b"}" * 70, "deeper than 64"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "deeper than 64"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_bodies_that_are_no_requests(served: Served, body: bytes, words: str, path: str) -> None:
    reply = ask(served.app, path, body)
    assert (reply.status, reply.error["code"]) == (400, "invalid_json")
    assert words in reply.error["message"]


def test_depth_is_counted_exactly(served: Served) -> None:
    deep = b'{"messages": [{"role": "user", "content": "hi"}], "x": ' + b"[" * 63 + b"]" * 63 + b"}"
    assert ask(served.app, CHAT, deep).status == 200


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (rb"half \ud83d", "half \ufffd"),
        (rb"half \ude00 too", "half \ufffd too"),
        (rb"whole \ud83d\ude00", "whole \U0001f600"),
        (rb"both \ud83d\ude00\ud83d", "both \U0001f600\ufffd"),
        (rb"swapped \ude00\ud83d", "swapped \ufffd\ufffd"),
        (rb"no escape \\ud83d", r"no escape \ud83d"),
    ],
)
def test_half_an_emoji_does_no_harm(served: Served, text: bytes, seen: str) -> None:
    body = b'{"messages": [{"role": "user", "content": "' + text + b'"}]}'
    assert ask(served.app, CHAT, body).status == 200
    assert seen in served.backend.prompts[-1]


def test_a_byte_order_mark_is_forgiven(served: Served) -> None:
    assert ask(served.app, CHAT, b"\xef\xbb\xbf" + json.dumps({"messages": USER}).encode()).status == 200


def test_an_error_after_the_headers_is_no_second_reply(served: Served) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    async def main() -> None:
        call = Call(Guard(app, served.serving), CHAT, {})
        await call.over()
        assert call.task.exception() is None
        assert call.status == 200

    asyncio.run(main())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("DELETE", COMPLETIONS, 405), ("POST", "/v1/chat", 404)],
)
def test_unknown_routes_and_methods(served: Served, method: str, path: str, status: int) -> None:
    reply = ask(served.app, path, {} if method == "POST" else None, method)
    assert reply.status == status
    assert path in reply.error["message"]


def test_a_slash_at_the_end_is_forgiven(served: Served) -> None:
    assert ask(served.app, CHAT + "/", {"messages": USER}).status == 200


def test_anthropic_clients_get_their_form_of_errors_everywhere(served: Served) -> None:
    reply = ask(served.app, "/v1/models/nope", headers={"anthropic-version": "2023-06-01"})
    assert (reply.status, reply.json["error"]["type"]) == (404, "not_found_error")
    assert reply.json["type"] == "error"


@pytest.mark.parametrize(
    ("path", "near"),
    [("/v1/v1/messages", "/v1/messages"), ("/chat/completions", "/v1/chat/completions"), ("/v1/model", "/v1/models")],
)
def test_a_path_that_is_nearly_right(served: Served, path: str, near: str) -> None:
    message = ask(served.app, path, {}).error["message"]
    assert message == f"there is no route '{path}'; did you mean {near}?"
