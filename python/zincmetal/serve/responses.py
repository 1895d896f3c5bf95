"""/v1/responses, of OpenAI's Responses API: answers, the count of a prompt's tokens, and responses that are stored."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..api.result import Logprob
from .errors import BadRequest, Unsupported, failure_of
from .figures import server_timing
from .plain import unless_gone
from .prepare import tokens_of
from .responses_input import kind_of
from .responses_items import new_id
from .responses_read import ResponsesRequest, read
from .responses_write import ResponseWriter
from .serving import Serving
from .sse import begun, frame
from .store import ResponseStore
from .tokens import chat_logprobs
from .turn import Ended, Turn, opened
from .wire import Json, read_object, request_id

MOST_ITEMS = 100  # of a list


async def create(request: Request) -> Response:
    """Answer a conversation."""
    serving, asked = await _asked(request)
    model = serving.models.resolve(asked.ask.model)
    asked = replace(asked, ask=replace(asked.ask, model=model), about={**asked.about, "model": model})
    reply = _Reply(serving, asked, request_id(request))
    if asked.stream:
        return await begun(reply.frames(), reply.in_band, serving.limits, beat=reply.alive)
    body = await unless_gone(request, reply.whole())
    return _json(body, reply.headers)


async def input_tokens(request: Request) -> Response:
    """Count the tokens of a prompt. No model needs to be loaded, and no generation is waited for."""
    serving, asked = await _asked(request)
    ids = await tokens_of(asked.ask, await serving.models.text_of(asked.ask.model))
    return _json({"object": "response.input_tokens", "input_tokens": len(ids)})


async def retrieve(request: Request) -> Response:
    """Return a stored response, or one that is being written."""
    if request.query_params.get("stream") == "true":
        raise Unsupported("stream", "stream: a stored response can only be read as a whole")
    return _json(_store(request).response(request.path_params["id"]))


async def delete(request: Request) -> Response:
    """Forget a stored response."""
    known = request.path_params["id"]
    _store(request).delete(known)
    return _json({"id": known, "object": "response", "deleted": True})


async def input_items(request: Request) -> Response:
    """List the items that came with the request of a stored response, the last one first."""
    items, query = _store(request).inputs(request.path_params["id"]), request.query_params
    if query.get("order", "desc") == "desc":
        items.reverse()
    after = query.get("after")
    if after is not None:
        at = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if at is None:
            raise BadRequest(f"after: there is no item {after!r:.80}", "after")
        items = items[at + 1 :]
    limit = query.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= MOST_ITEMS:
        raise BadRequest(f"limit must be an integer from 1 to {MOST_ITEMS}", "limit")
    page = items[: int(limit)]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return _json({"object": "list", "data": page, **ends, "has_more": len(page) < len(items)})


async def cancel(request: Request) -> Response:
    """End a response that is being written, within one step. One that has ended stays as it is."""
    known, store = request.path_params["id"], _store(request)
    response = store.response(known)
    if known in store.running:
        for turn in request.app.state.serving.turns.get(known, ()):
            turn.cancel()
        response["status"] = "cancelled"
    return _json(response)


async def _asked(request: Request) -> tuple[Serving, ResponsesRequest]:
    serving: Serving = request.app.state.serving
    body = await read_object(request, serving.limits.depth)
    return serving, read(body, request.headers, serving.responses.conversation, serving.responses.item)


def _store(request: Request) -> ResponseStore:
    serving: Serving = request.app.state.serving
    return serving.responses


def _json(body: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), headers=headers, media_type="application/json")


class _Reply:
    """Reply to one request."""

    def __init__(self, serving: Serving, asked: ResponsesRequest, request_id: str) -> None:
        self._serving, self._asked, self._request_id = serving, asked, request_id
        self._writer = ResponseWriter(asked.about, asked.tools, asked.summary)
        self.headers: dict[str, str] = {}

    def alive(self) -> bytes:
        """Return the frames of a sign of life."""
        return _frames(self._writer.alive())

    def in_band(self, error: BaseException) -> bytes:
        """Return the frames of an error after the headers."""
        told = failure_of(error, self._request_id).response()
        return _frames(self._writer.failed(told["code"], told["message"]))

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Yield the reply as a stream. The first item says that the request was accepted."""
        async with aclosing(self._events()) as events:
            async for event in events:
                yield frame(event, event["type"])

    async def whole(self) -> Json:
        """Return the reply as one object: the response of the last event, which the writer has."""
        async with aclosing(self._events()) as events:
            async for _ in events:
                pass
        return self._writer.response

    async def _events(self) -> AsyncGenerator[Json, None]:
        writer, store = self._writer, self._serving.responses
        async with opened(self._serving, [self._asked.ask], self._request_id, writer.id) as (turn,):
            writer.response |= _sampling(turn)
            if turn.ask.logprobs is not None:
                writer.logprob = _logprob(turn)
            store.running[writer.id] = writer.response
            try:
                for wire in writer.begin():
                    yield wire
                async with aclosing(turn.events()) as events:
                    async for event in events:
                        if isinstance(event, Ended):
                            self.headers["server-timing"] = server_timing([event.result])
                        for wire in writer.write(event):
                            yield wire
            finally:
                del store.running[writer.id]
            self._keep()

    def _keep(self) -> None:
        """Store the response, which is complete, with the items that it answers."""
        asked = self._asked
        if asked.store:
            before = asked.items[: len(asked.items) - len(asked.inputs)]
            items = [*before, *map(_identified, asked.inputs)]
            self._serving.responses.put(self._writer.response, items, len(asked.inputs))


def _sampling(turn: Turn) -> Json:
    """Return the options of sampling that count, as a response shows them."""
    params = turn.ready.asked.params
    return {name: getattr(params, name) for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty")}


def _logprob(turn: Turn) -> Any:
    tokenizer = turn.backend.text.id_tokenizer

    def written(logprob: Logprob) -> Json:
        entry: Json = chat_logprobs((logprob,), tokenizer)["content"][0]
        return entry

    return written


def _identified(item: Json) -> Json:
    """Return an item of an input with its type and an id, as lists of items show it."""
    kind = kind_of(item)
    return {**item, "type": kind, "id": item.get("id") or new_id("msg" if kind == "message" else "item")}


def _frames(events: Any) -> bytes:
    return b"".join(frame(event, event["type"]) for event in events)


routes = [
    Route("/v1/responses", create, methods=["POST"]),
    Route("/v1/responses/input_tokens", input_tokens, methods=["POST"]),
    Route("/v1/responses/{id}", retrieve, methods=["GET"]),
    Route("/v1/responses/{id}", delete, methods=["DELETE"]),
    Route("/v1/responses/{id}/input_items", input_items, methods=["GET"]),
    Route("/v1/responses/{id}/cancel", cancel, methods=["POST"]),
]
