"""POST /v1/embeddings of OpenAI, and /v1/rerank as Jina, Cohere and llama.cpp's server have it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import DeadlineError, abbreviate
from . import options
from .backend import Vectors
from .completions import MOST_PROMPTS
from .errors import BadRequest
from .ops import json_reply
from .serving import Serving
from .wire import Fields, Json, log_once, read_object, request_id

MOST_DOCUMENTS = 2048
T = TypeVar("T")


async def embeddings(request: Request) -> Response:
    """Return the vectors of texts."""
    serving: Serving = request.app.state.serving
    fields = Fields(await read_object(request, serving.limits.depth))
    texts = read_inputs(fields)
    form = fields.choice("encoding_format", of=("float", "base64"), default="float")
    dimensions = fields.integer("dimensions", low=1)
    # llama.cpp's own field: the norm that vectors are scaled by, -1 for none.
    normalize = _norm(fields) == 2
    seconds, keep = _common(fields)
    log_once("embeddings", fields.unknown())
    async with serving.models.lease(fields.text("model"), keep) as backend:
        found = await _within(seconds, backend.embed(texts, normalize, dimensions))
        model = backend.card.id
    serving.metrics.texts(model, "embedding", len(texts), found.tokens)
    rows = [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(_values(found, form))]
    return json_reply({"object": "list", "data": rows, "model": model, "usage": _usage(found.tokens)})


def _norm(fields: Fields) -> int:
    found = fields.integer("embd_normalize")
    if found not in (None, 2, -1):
        raise BadRequest(f"embd_normalize must be 2 or -1, not {abbreviate(found)}", "embd_normalize")
    return 2 if found is None else found


def read_inputs(fields: Fields) -> list[str | list[int]]:
    """Read the texts: a string, token ids, or a list of these."""
    value = fields.given("input", "content")
    if value is None:
        raise BadRequest("input is missing", "input", "missing_required_parameter")
    if isinstance(value, list) and not value:
        raise BadRequest("input is an empty list", "input")
    several = isinstance(value, list) and any(type(item) is not int for item in value)
    if not several:
        return [_input(value, "input")]
    if len(value) > MOST_PROMPTS:
        raise BadRequest(f"input has more than {MOST_PROMPTS} texts", "input")
    return [_input(item, f"input[{i}]") for i, item in enumerate(value)]


def _input(value: Any, path: str) -> str | list[int]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value or any(type(item) is not int for item in value):
        raise BadRequest(f"{path} must be a text or token ids, not {abbreviate(value)}", path, "invalid_type")
    return value


def _values(found: Vectors, form: str) -> list[Any]:
    """Return each vector as the client wants it: numbers, or float32 in base64."""
    rows = np.frombuffer(found.data, "<f4").reshape(-1, found.dim)
    if form == "base64":
        return [base64.b64encode(row.tobytes()).decode() for row in rows]
    return list(rows.tolist())


async def rerank(request: Request) -> Response:
    """Return how relevant documents are to a query, the most relevant first."""
    serving: Serving = request.app.state.serving
    fields = Fields(await read_object(request, serving.limits.depth))
    query = fields.text("query")
    if not query:
        raise BadRequest("query is missing", "query", "missing_required_parameter")
    bare = fields.items("texts")  # the form of Text Embeddings Inference: its reply is a list
    documents = read_documents(fields, "documents" if bare is None else "texts")
    top = fields.integer("top_n", low=1) or len(documents)
    shown = fields.flag("return_documents", "return_text")
    instruction = fields.text("instruction") or None
    seconds, keep = _common(fields)
    log_once("rerank", fields.unknown())
    async with serving.models.lease(fields.text("model"), keep) as backend:
        found = await _within(seconds, backend.rerank(query, documents, instruction))
        model = backend.card.id
    serving.metrics.texts(model, "document", len(documents), found.tokens)
    scores = np.frombuffer(found.data, "<f4").tolist()
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:top]
    if bare is not None:
        return json_reply([{"index": i, "score": scores[i]} | ({"text": documents[i]} if shown else {}) for i in best])
    results = [
        {"index": i, "relevance_score": scores[i]} | ({"document": {"text": documents[i]}} if shown else {})
        for i in best
    ]
    reply = {"id": request_id(request), "object": "list", "model": model, "usage": _usage(found.tokens)}
    return json_reply({**reply, "results": results})


def read_documents(fields: Fields, name: str) -> list[str]:
    """Read the documents: texts, or objects with a text."""
    items = fields.items(name)
    if not items:
        raise BadRequest(f"{name} is missing or empty", name, "missing_required_parameter")
    if len(items) > MOST_DOCUMENTS:
        raise BadRequest(f"{name} has more than {MOST_DOCUMENTS} texts", name)
    return [_document(item, f"{name}[{i}]") for i, item in enumerate(items)]


def _document(item: Any, path: str) -> str:
    text = item.get("text") if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise BadRequest(f"{path} must be a text, not {abbreviate(item)}", path, "invalid_type")
    return text


def _common(fields: Fields) -> tuple[float | None, float | None]:
    """Read the seconds to the end of the request, and how long the model stays loaded after it."""
    fields.skip("user", "input_type", "task", "truncation", "truncate", "prompt_cache_key")
    return options.deadline(fields), options.keep_alive(fields)


async def _within(seconds: float | None, work: Awaitable[T]) -> T:
    try:
        return await asyncio.wait_for(work, seconds)
    except (TimeoutError, asyncio.TimeoutError):
        words = f"the request had not ended after {seconds:g} seconds; give it more time, or fewer texts"
        raise DeadlineError(words) from None


def _usage(tokens: int) -> Json:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def _paths(*paths: str) -> Sequence[Route]:
    return [Route(path, rerank, methods=["POST"]) for path in paths]


routes = [
    Route("/v1/embeddings", embeddings, methods=["POST"]),
    *_paths("/v1/rerank", "/rerank", "/v1/reranking", "/reranking"),
]
