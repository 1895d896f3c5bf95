"""ASGI application of the server: the routes of all modules, behind the guard."""

from __future__ import annotations

from functools import cache

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import did_you_mean, quote
from . import cards, chat, completions, embeddings, guard, messages, ops, page, responses
from .errors import HttpError, error_response
from .serving import Serving
from .wire import request_id

LONGEST = 100  # characters of a path for which a near one is looked for

#: Modules of this room with ``routes: list[Route]``. Their handlers find the state in ``request.app.state.serving``.
MODULES = (cards, chat, completions, embeddings, messages, responses, page, ops)


def make_app(serving: Serving) -> Starlette:
    """Build the application. Requests pass the guard first; it also gives them their ids."""
    app = Starlette(
        routes=[route for module in MODULES for route in module.routes],
        middleware=guard.middleware(serving),  # it turns what routes raise into replies, too
        exception_handlers={HTTPException: _on_http_exception},
    )
    app.state.serving = serving
    return app


@cache
def _paths() -> tuple[str, ...]:
    routes = (route for module in MODULES for route in module.routes)
    return tuple(dict.fromkeys(r.path for r in routes if isinstance(r, Route) and "{" not in r.path))


def _reply(request: Request, error: BaseException) -> Response:
    path = "/v1/messages" if "anthropic-version" in request.headers else request.url.path
    return error_response(error, path, request_id(request))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer for an unknown path or method."""
    assert isinstance(error, HTTPException)
    kinds = {404: "not_found", 405: "method", 413: "too_large"}
    words = f"{request.method} {request.url.path}: {error.detail}"
    if error.status_code == 404:
        words = f"there is no route {quote(request.url.path)}{did_you_mean(request.url.path[:LONGEST], _paths())}"
    return _reply(request, HttpError(kinds.get(error.status_code, "invalid"), words, headers=error.headers))


__all__ = ["make_app"]
