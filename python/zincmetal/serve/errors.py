"""Errors as clients see them: one table from typed errors to the replies of every API.

A *failure* is an error in words for a client. Its message is the typed error's own: it names what is wrong and the
remedy. Of an error without a type the client only learns the id of its request; the log has the rest.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.responses import Response

from ..errors import (
    ChatTemplateError,
    ContextFullError,
    DeadlineError,
    DeviceError,
    GrammarError,
    ModelNotFoundError,
    OutOfMemoryError,
    QueueFullError,
    TokenizerError,
    UnsupportedSchemaError,
    UsageError,
    ZincError,
)

_log = logging.getLogger("zincmetal.serve")

OPENAI, ANTHROPIC = "openai", "anthropic"  # families of APIs: each has its own form of errors


@dataclass(frozen=True)
class Kind:
    """Kind of failure: its HTTP status and its names.

    ``openai`` and ``anthropic`` are types of errors in these APIs, ``code`` is OpenAI's code. ``overloaded`` is the
    status for Anthropic's clients where theirs differs. ``midway`` is Anthropic's type for an error in a stream that
    has begun: their clients wait before they repeat after an "overloaded_error", and ask at once after an "api_error".
    ``retry``: seconds after which it is worth asking again.
    """

    status: int
    openai: str
    anthropic: str
    code: str | None = None
    overloaded: int | None = None
    midway: str = ""
    retry: int | None = None


def _busy(code: str, openai: str = "server_error", retry: int = 2, midway: str = "overloaded_error") -> Kind:
    return Kind(503, openai, "overloaded_error", code, overloaded=529, midway=midway, retry=retry)


#: All kinds of failures, by the names that ``HttpError`` takes.
KINDS: Mapping[str, Kind] = {
    "invalid": Kind(400, "invalid_request_error", "invalid_request_error"),
    "context": Kind(400, "invalid_request_error", "invalid_request_error", "context_length_exceeded"),
    "schema": Kind(400, "invalid_request_error", "invalid_request_error", "unsupported_schema"),
    "tokenizer": Kind(400, "invalid_request_error", "invalid_request_error", "tokenizer_error"),
    "template": Kind(400, "invalid_request_error", "invalid_request_error", "chat_template_error"),
    "unauthorized": Kind(401, "authentication_error", "authentication_error", "invalid_api_key"),
    "forbidden": Kind(403, "permission_error", "permission_error"),
    "not_found": Kind(404, "not_found_error", "not_found_error"),
    "model": Kind(404, "not_found_error", "not_found_error", "model_not_found"),
    "method": Kind(405, "not_found_error", "not_found_error", "method_not_allowed"),
    "slow": Kind(408, "invalid_request_error", "invalid_request_error", "request_timeout"),
    "conflict": Kind(409, "invalid_request_error", "conflict_error"),
    "too_large": Kind(413, "invalid_request_error", "invalid_request_error", "request_too_large"),
    "media": Kind(415, "invalid_request_error", "invalid_request_error", "unsupported_media_type"),
    "headers": Kind(431, "invalid_request_error", "invalid_request_error", "headers_too_large"),
    "gone": Kind(499, "invalid_request_error", "invalid_request_error", "client_closed_request"),
    "internal": Kind(500, "server_error", "api_error"),
    "grammar": Kind(500, "server_error", "api_error", "grammar_failed"),
    "model_failed": Kind(500, "server_error", "api_error", "model_load_failed"),
    "unsupported": Kind(501, "not_supported_error", "api_error"),
    "queue": _busy("queue_full"),
    "loading": _busy("loading", "unavailable_error", retry=5),
    "draining": _busy("shutting_down", "unavailable_error", retry=10),
    "memory": _busy("out_of_memory", retry=10),
    "device": _busy("device_error", midway="api_error"),
    "timeout": Kind(504, "server_error", "timeout_error", "timeout"),
}


class HttpError(ZincError):
    """Refusal of a request. ``kind`` is a name in KINDS; ``param`` the path of the field that is wrong."""

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.param, self.code = kind, param, code
        self.headers, self.extra = dict(headers or {}), dict(extra or {})


class BadRequest(HttpError):
    """Refusal of a field, whose path is ``param``: "messages[0].role"."""

    def __init__(self, message: str, param: str | None = None, code: str | None = "invalid_value") -> None:
        super().__init__("invalid", message, param=param, code=code)


class Unsupported(BadRequest):
    """Refusal of a field that would change the answer and that this server does not have."""

    def __init__(self, param: str, message: str = "", code: str = "unsupported_parameter") -> None:
        super().__init__(message or f"{param} is not supported by this server; leave it out", param, code)


class PromptTooLong(ContextFullError):
    """Raised for a prompt that leaves no room for an answer in the context."""

    def __init__(self, n_prompt: int, n_ctx: int, why: str = "") -> None:
        super().__init__(
            f"This model's maximum context length is {n_ctx} tokens. However, your messages resulted in {n_prompt} "
            f"tokens.{why and ' ' + why}"
        )
        self.n_prompt, self.n_ctx = n_prompt, n_ctx


#: Kinds by the type of the error. The first match counts.
TABLE: list[tuple[type[BaseException], str]] = [
    (ContextFullError, "context"),
    (QueueFullError, "queue"),
    (DeadlineError, "timeout"),
    (ModelNotFoundError, "model"),
    (ChatTemplateError, "template"),
    (TokenizerError, "tokenizer"),
    (UnsupportedSchemaError, "schema"),
    (UsageError, "invalid"),
    (OutOfMemoryError, "memory"),
    (DeviceError, "device"),
    (GrammarError, "grammar"),
    (ZincError, "model_failed"),
]


@dataclass(frozen=True)
class Failure:
    """Error in words for a client."""

    kind: Kind
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    anthropic_message: str = ""

    def openai(self) -> dict[str, Any]:
        """Return the body of OpenAI's form. It is also the data of an error inside a stream."""
        error = {"message": self.message, "type": self.kind.openai, "param": self.param, "code": self.code}
        return {"error": {**error, **self.extra}}

    def anthropic(self, request_id: str = "", midway: bool = False) -> dict[str, Any]:
        """Return the body of Anthropic's form. It is also the data of an "error" event: then it is ``midway``."""
        unnamed = self.param is not None and not self.message.startswith(self.param)
        message = self.anthropic_message or (f"{self.param}: {self.message}" if unnamed else self.message)
        kind = (self.kind.midway if midway else "") or self.kind.anthropic
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id or None}

    def response(self) -> dict[str, Any]:
        """Return the ``error`` of a response that failed, of OpenAI's Responses API."""
        known = self.code if self.code in ("context_length_exceeded", "rate_limit_exceeded") else None
        return {
            "code": known or ("server_error" if self.kind.status >= 500 else "invalid_prompt"),
            "message": self.message,
        }

    def status(self, family: str = OPENAI) -> int:
        """Return the HTTP status for the clients of an API family."""
        return self.kind.overloaded if family == ANTHROPIC and self.kind.overloaded else self.kind.status


def failure_of(error: BaseException, request_id: str = "") -> Failure:
    """Put an error into words. One without a type is logged, and the client learns the request's id alone."""
    if isinstance(error, HttpError):
        kind = KINDS[error.kind]
        return Failure(kind, str(error), error.param, error.code or kind.code, error.headers, error.extra)
    name = next((name for known, name in TABLE if isinstance(error, known)), None)
    if name is None:
        _log.error("request %s failed: %s at\n%s", request_id, type(error).__name__, place_of(error))
        return Failure(KINDS["internal"], f"internal error; the server's log has it under request {request_id}")
    kind = KINDS[name]
    if isinstance(error, PromptTooLong):
        numbers = {"n_prompt_tokens": error.n_prompt, "n_ctx": error.n_ctx}
        words = f"prompt is too long: {error.n_prompt} tokens > {error.n_ctx} maximum"
        return Failure(kind, str(error), "messages", kind.code, extra=numbers, anthropic_message=words)
    if isinstance(error, ContextFullError):  # by these words Anthropic's clients know that they must shorten it
        return Failure(kind, str(error), code=kind.code, anthropic_message=f"prompt is too long: {error}")
    if kind.status >= 500:
        _log.warning("request %s: %s: %s", request_id, type(error).__name__, error)
    after = getattr(error, "retry_after", None)  # whoever raised it may know better
    headers = {} if after is None else {"retry-after": str(after)}
    return Failure(kind, str(error), code=kind.code, headers=headers)


def place_of(error: BaseException) -> str:
    """Return the lines of code that an error came through. Its message is left out: that may quote a prompt."""
    return "".join(traceback.format_tb(error.__traceback__))


def family_of(path: str) -> str:
    """Return the family of APIs that a path belongs to."""
    return ANTHROPIC if path.startswith("/v1/messages") else OPENAI


def error_response(error: BaseException, path: str = "", request_id: str = "") -> Response:
    """Make the reply for an error, in the form of the path's API."""
    failure, family = failure_of(error, request_id), family_of(path)
    body = failure.anthropic(request_id) if family == ANTHROPIC else failure.openai()
    headers = dict(failure.headers)
    if failure.kind.retry is not None:
        headers.setdefault("retry-after", str(failure.kind.retry))
    status = failure.status(family)
    return Response(msgspec.json.encode(body), status, headers, "application/json")
