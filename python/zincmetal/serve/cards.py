"""Routes of the models: which there are, what one needs, loads and unloads, downloads, and states as they change.

What a server's ``Models`` can do beside the protocol of ``backend.py`` is asked for by name. A route whose work they
do not know is refused as "not supported":

- ``load(name)`` and ``unload(name)``: coroutines that end when the model is loaded, or gone.
- ``changes()``: yields a ``ModelStatus`` for each model, and then for each change.
- ``plan(name, context, parallel)``: a coroutine that returns the bytes that a model would need.
- ``catalogue()``: a coroutine that returns models that can be had, each with its verdict for this machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from .backend import ModelCard
from .errors import BadRequest, HttpError
from .ops import card_of, json_reply, serving_of
from .residency import ModelStatus
from .serving import Files, Serving
from .sse import EventStream, frame
from .wire import Fields, Json, read_object

WATCH_SECONDS = 1.0  # between two looks whether the server ends
NAME = 512  # characters of a model's name
CONTEXT = 1 << 24  # tokens
PARALLEL = 1 << 10
FREE = ("path", "file", "capabilities")  # facts that are not shown as they are


def record(card: ModelCard) -> Json:
    """Return a model as clients read it. Each reads its context under another name: it is the one that is served."""
    window = card.n_ctx
    stamp = datetime.fromtimestamp(card.created, timezone.utc).isoformat().replace("+00:00", "Z")
    status: Json = {"value": card.state}
    if card.why:
        status["why"] = card.why
    return {
        "id": card.id,
        "object": "model",
        "type": "model",
        "created": card.created,
        "created_at": stamp,
        "owned_by": "zincmetal",
        "display_name": card.id,
        "name": card.id,
        "lifecycle": "active",
        **dict.fromkeys(
            ("max_model_len", "context_length", "context_window", "max_input_tokens", "max_tokens"), window
        ),
        "meta": {
            "n_ctx": window,
            "n_ctx_train": card.n_ctx_train,
            "n_vocab": card.n_vocab,
            "n_params": card.n_params,
            "size": card.nbytes,
            "quantization": card.quantization,
            "arch": card.arch,
        },
        "capabilities": list(card.facts.get("capabilities", ("completion", "tools"))),
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
        "status": status,
        "aliases": list(card.aliases),
        "facts": {name: value for name, value in card.facts.items() if name not in FREE},
    }


async def models(request: Request) -> Response:
    """GET /v1/models, for clients of OpenAI and of Anthropic. The default model is the first."""
    rows = [_for_client(request, card) for card in serving_of(request).models.cards()]
    ends = {"first_id": rows[0]["id"] if rows else None, "last_id": rows[-1]["id"] if rows else None}
    return json_reply({"object": "list", "data": rows, "has_more": False, **ends})


async def model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    return json_reply(_for_client(request, card_of(serving_of(request), _name(request.path_params["id"]))))


def _for_client(request: Request, card: ModelCard) -> Json:
    """Return a model's record. In Anthropic's, "capabilities" is another thing, which may be left out."""
    found = record(card)
    if "anthropic-version" in request.headers:
        del found["capabilities"]
    return found


async def plan(request: Request) -> Response:
    """GET /v1/models/{id}/plan: memory that the model would need, at a context and for so many sequences."""
    serving, query = serving_of(request), request.query_params
    name = _name(request.path_params["id"])
    context = _number(query.get("context"), "context", CONTEXT)
    parallel = _number(query.get("parallel"), "parallel", PARALLEL)
    found = await _skill(serving, "plan")(serving.models.resolve(name), context, parallel)
    return json_reply({"id": serving.models.resolve(name), **found})


async def catalogue(request: Request) -> Response:
    """GET /v1/catalogue: models that can be had, and whether they fit this machine."""
    return json_reply({"object": "list", "data": await _skill(serving_of(request), "catalogue")()})


async def load(request: Request) -> Response:
    """POST /models/load: load a model, and answer when it is loaded."""
    serving = serving_of(request)
    name = await _asked(request)
    known, act = serving.models.resolve(name), _skill(serving, "load")
    await act(known)
    return json_reply({"success": True, "model": known})


async def unload(request: Request) -> Response:
    """POST /models/unload: give a model's memory back."""
    serving = serving_of(request)
    known = serving.models.resolve(await _asked(request))
    await _skill(serving, "unload")(known)
    return json_reply({"success": True, "model": known})


async def pull(request: Request) -> Response:
    """POST /models: begin a download. Its progress is in /models/sse."""
    files = _files(serving_of(request))
    name = await _asked(request)
    await files.pull(name)
    return json_reply({"success": True, "model": name}, 202)


async def remove(request: Request) -> Response:
    """DELETE /models: delete the files of a model. Its name is in the body, or in the query: ?model=."""
    serving = serving_of(request)
    files = _files(serving)
    query = request.query_params.get("model", "")
    known = serving.models.resolve(_name(query) if query else await _asked(request))
    await files.remove(known)
    return json_reply({"success": True, "model": known})


def _files(serving: Serving) -> Files:
    if serving.files is None:
        raise HttpError("forbidden", "clients may not change the files of models; start the server with --allow-pull")
    return serving.files


async def watch(request: Request) -> Response:
    """GET /models/sse: the state of every model, and then each change."""
    serving = serving_of(request)
    if request.method == "HEAD":
        return Response(media_type="text/event-stream")
    return EventStream(_states(serving), every=serving.limits.keep_alive)


async def _states(serving: Serving) -> AsyncGenerator[bytes, None]:
    """Yield the states as they change. An open stream does not hold up the end of the server."""
    changes = getattr(serving.models, "changes", None)
    coming = changes() if changes is not None else _now(serving)
    waiting = asyncio.ensure_future(anext(coming, None))
    try:
        while not serving.draining:
            done, _ = await asyncio.wait({waiting}, timeout=WATCH_SECONDS)
            if done:
                event = waiting.result()
                if event is None:
                    return
                yield frame(_event(event), "model_status")
                waiting = asyncio.ensure_future(anext(coming, None))
    finally:
        waiting.cancel()
        await asyncio.wait({waiting})
        await coming.aclose()


def _event(event: Any) -> Json:
    status: Json = {"value": event.state, "progress": event.progress}
    return {"event": "model_status", "model": event.id, "status": {**status, "why": event.why} if event.why else status}


async def _now(serving: Serving) -> AsyncGenerator[ModelStatus, None]:
    """Yield the states of this moment, and then nothing for good."""
    for card in serving.models.cards():
        yield ModelStatus(card.id, card.state, float(card.state == "loaded"), card.why)
    await asyncio.Event().wait()


def _skill(serving: Serving, name: str) -> Callable[..., Any]:
    """Return a method of the models that they may not have."""
    found: Callable[..., Any] | None = getattr(serving.models, name, None)
    if found is None:
        raise HttpError("unsupported", f"this server cannot {name} models")
    return found


async def _asked(request: Request) -> str:
    """Read the name of a model in a body."""
    body = Fields(await read_object(request, serving_of(request).limits.depth))
    name = body.text("model", "name")
    if not name:
        raise BadRequest("model must be the name of a model", "model", "missing")
    return _name(name)


def _name(name: str) -> str:
    if len(name) > NAME or not name.isprintable():
        raise BadRequest(f"a model's name has at most {NAME} printable characters", "model")
    return name


def _number(text: str | None, name: str, most: int) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise BadRequest(f"{name} must be a number from 1 to {most}", name)
    return int(text)


routes: list[BaseRoute] = [
    Route("/v1/models", models, methods=["GET"]),
    Route("/models", models, methods=["GET"]),
    Route("/models", pull, methods=["POST"]),
    Route("/models", remove, methods=["DELETE"]),
    Route("/models/load", load, methods=["POST"]),
    Route("/models/unload", unload, methods=["POST"]),
    Route("/models/sse", watch, methods=["GET"]),
    Route("/v1/catalogue", catalogue, methods=["GET"]),
    Route("/v1/models/{id:path}/plan", plan, methods=["GET"]),
    Route("/v1/models/{id:path}", model, methods=["GET"]),
]

__all__ = ["record", "routes"]
