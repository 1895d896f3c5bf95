"""Routes that operate a server: is it alive, what does it have, its tokenizer, its cache, and cancelling a request.

None of them loads a model, or keeps one loaded.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from importlib import metadata
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ..api.text import ModelText
from ..errors import ChatTemplateError, TokenizerError, ZincError, abbreviate
from ..text.chat.marks import unmarked
from .aside import aside
from .ask import Json
from .backend import Backend, ModelCard
from .chat_request import chat_request
from .errors import BadRequest, HttpError
from .prepare import shown_of, tokens_of
from .serving import Serving
from .wire import Fields, read_object

_KEPT = (
    "what was computed of a prompt is found again by its tokens, in any slot, and with --cache-dir after a restart too"
)
#: What llama.cpp's server does with a slot, and what does it here.
SLOT_ACTIONS = {
    "save": _KEPT,
    "restore": _KEPT,
    "erase": "slots keep nothing between requests; POST /v1/cache/clear forgets all cached prompts of a model",
}
FIGURES_SECONDS = 2.0  # for a model's process to say what it has


def serving_of(request: Request) -> Serving:
    """Return the state that all routes share."""
    serving: Serving = request.app.state.serving
    return serving


def json_reply(value: Any, status: int = 200) -> Response:
    """Make a reply of plain data."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


# ---- is it alive ---------------------------------------------------------------------------------------------------


def unready(serving: Serving) -> str:
    """Return why the server takes no requests now, "" if it does. The default model decides."""
    if serving.draining:
        return "shutting down"
    cards = serving.models.cards()
    state = cards[0].state if cards else "failed"
    return {"loading": "Loading model", "failed": "the model has failed"}.get(state, "")


async def health(request: Request) -> Response:
    """GET /health and /readyz: 200 if requests are taken, in the form of llama.cpp's server. It names no model."""
    why = unready(serving_of(request))
    if not why:
        return json_reply({"status": "ok"})
    return json_reply({"error": {"code": 503, "message": why, "type": "unavailable_error"}}, 503)


async def alive(request: Request) -> Response:
    """GET /livez: the process runs its loop. Also what clients ask for before they begin."""
    return json_reply({"status": "ok"})


async def metrics(request: Request) -> Response:
    """GET /metrics, for Prometheus."""
    serving = serving_of(request)
    serving.metrics.sampled(serving.models.cards(), await all_figures(serving))
    text, kind = serving.metrics.text(request.headers.get("accept", ""))
    return Response(text, headers={"content-type": kind})


# ---- what it has ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def loaded(serving: Serving, card: ModelCard) -> AsyncIterator[Backend | None]:
    """Give a model if it is loaded. It is not kept loaded by that, if ``models`` can say so: ``peek(id)``."""
    peek: Callable[[str], Backend | None] | None = getattr(serving.models, "peek", None)
    if peek is not None:
        yield peek(card.id)
    elif card.state != "loaded":
        yield None
    else:
        async with serving.models.lease(card.id) as backend:
            yield backend


async def all_figures(serving: Serving) -> dict[str, dict[str, Any]]:
    """Return what the engines of the loaded models have, by the models' ids. One that does not answer is left out."""
    found: dict[str, dict[str, Any]] = {}
    for card in serving.models.cards():
        with suppress(ZincError, OSError, TimeoutError, asyncio.TimeoutError):
            async with loaded(serving, card) as backend:
                if backend is not None:
                    found[card.id] = await asyncio.wait_for(backend.figures(), FIGURES_SECONDS)
    return found


def card_of(serving: Serving, name: str) -> ModelCard:
    """Return the card of a model by any of its names. Raises ModelNotFoundError."""
    known = serving.models.resolve(name)
    return next(card for card in serving.models.cards() if card.id == known)


async def props(request: Request) -> Response:
    """GET /props: facts of a model, as clients of llama.cpp's server read them."""
    serving = serving_of(request)
    card = card_of(serving, request.query_params.get("model", ""))
    text = await aside(_text_facts, await serving.models.text_of(card.id))
    params = text.pop("sampling", {})
    return json_reply(
        {
            "default_generation_settings": {"n_ctx": card.n_ctx, "params": params},
            "n_ctx": card.n_ctx,
            "total_slots": card.sequences,
            "model_alias": card.id,
            "model_path": os.path.basename(str(card.facts.get("file", card.id))),
            "modalities": {"vision": False, "audio": False},
            **text,
            "build_info": build(),
            "is_sleeping": card.state in ("sleeping", "unloaded"),
        }
    )


def _text_facts(text: ModelText) -> Json:
    """Return the text side of a model. A file may have no tokenizer, or no template."""
    facts: Json = {"chat_template": "", "bos_token": "", "eos_token": ""}
    with suppress(TokenizerError, ChatTemplateError):
        facts["bos_token"], facts["eos_token"] = text.tokenizer.bos_text, text.tokenizer.eos_text
        facts["sampling"] = dict(text.chat_sampling)
        facts["chat_template"] = text.chat_template.source
        facts["chat_template_caps"] = _capabilities(text)
    return facts


def _capabilities(text: ModelText) -> Json:
    return text.capabilities.data()


def build() -> str:
    """Return name and version of the program."""
    try:
        return f"zincmetal {metadata.version('zincmetal')}"
    except metadata.PackageNotFoundError:  # run from its source
        return "zincmetal"


async def slots(request: Request) -> Response:
    """GET /slots: the sequences of a model, those that run first. It shows no text of a prompt."""
    serving = serving_of(request)
    card = card_of(serving, request.query_params.get("model", ""))
    figures = (await all_figures(serving)).get(card.id, {})
    running = figures.get("running", [])
    rows = [_slot(i, card, job) for i, job in enumerate(running)]
    rows += [_slot(i, card, None) for i in range(len(running), card.sequences)]
    if request.query_params.get("fail_on_no_slot") and len(running) >= card.sequences:
        raise HttpError("queue", "no slot is free")
    return json_reply(rows)


async def change_slot(request: Request) -> Response:
    """POST /slots/{id}: refused, with what does the same here."""
    action = request.query_params.get("action", "")
    if action not in SLOT_ACTIONS:
        raise BadRequest(f"action must be one of {', '.join(SLOT_ACTIONS)}, not {abbreviate(action)}", "action")
    raise HttpError("unsupported", f"a slot cannot be changed: {SLOT_ACTIONS[action]}", param="action")


def _slot(number: int, card: ModelCard, job: Mapping[str, int] | None) -> Json:
    if job is None:
        return {"id": number, "state": "idle", "is_processing": False, "n_ctx": card.n_ctx}
    state = "prefill" if not job["made"] else "decode"
    tokens = {"n_prompt": job["prompt"], "n_cached": job["reused"], "n_past": job["position"], "n_decoded": job["made"]}
    return {"id": number, "id_task": job["id"], "state": state, "is_processing": True, "n_ctx": card.n_ctx, **tokens}


async def cache_stats(request: Request) -> Response:
    """GET /v1/cache/stats: pools and queues of the loaded models, and what prompts took from the cache."""
    serving = serving_of(request)
    m = serving.metrics
    found = await all_figures(serving)
    return json_reply(
        {
            "models": {name: {k: v for k, v in one.items() if k != "running"} for name, one in found.items()},
            "prompt_tokens": int(m.total(m.prompt_tokens)),
            "cached_tokens": int(m.total(m.cached_tokens)),
        }
    )


async def cache_clear(request: Request) -> Response:
    """POST /v1/cache/clear: forget the cached prompts of a model, or of all that are loaded."""
    serving = serving_of(request)
    name = Fields(await optional_object(request)).text("model")
    cards = [card_of(serving, name)] if name else serving.models.cards()
    cleared = []
    for card in cards:
        async with loaded(serving, card) as backend:
            if backend is not None:
                await backend.clear_cache()
                cleared.append(card.id)
    return json_reply({"cleared": cleared})


async def optional_object(request: Request) -> Json:
    """Read a body that may be left out."""
    body = await request.body()
    return await read_object(request, serving_of(request).limits.depth) if body.strip() else {}


async def cancel(request: Request) -> Response:
    """POST /v1/requests/{id}/cancel: end a request, by the id of it or of its reply, within one step."""
    turns = serving_of(request).turns.get(request.path_params["id"], ())
    for turn in turns:
        turn.cancel()
    return json_reply({"id": request.path_params["id"], "cancelled": bool(turns)})


# ---- text ----------------------------------------------------------------------------------------------------------


async def tokenize(request: Request) -> Response:
    """POST /tokenize, in llama.cpp's form (``content``) or vLLM's (``prompt`` or ``messages``)."""
    serving = serving_of(request)
    body = await read_object(request, serving.limits.depth)
    fields = Fields(body)
    text = await serving.models.text_of(fields.text("model"))
    if fields.given("content") is not None:
        return json_reply(await _tokenize_content(fields, text))
    if fields.items("messages") is not None:
        ids = await tokens_of(chat_request(request, body, serving.limits).ask, text)
    elif fields.given("prompt") is not None:
        ids = await _ids(text, fields.text("prompt"), fields.flag("add_special_tokens", default=True))
    else:
        raise BadRequest("content, prompt or messages is needed", "content", "missing_required_parameter")
    reply: Json = {"count": len(ids), "max_model_len": card_of(serving, fields.text("model")).n_ctx, "tokens": ids}
    if fields.flag("return_token_strs"):
        reply["token_strs"] = [text.tokenizer.decode([i]) for i in ids]
    return json_reply(reply)


async def _tokenize_content(body: Fields, text: ModelText) -> Json:
    parse = body.flag("parse_special", default=True)
    ids = await _ids(text, body.text("content"), body.flag("add_special"), parse)
    if not body.flag("with_pieces"):
        return {"tokens": ids}
    return {"tokens": [{"id": i, "piece": _piece(text.tokenizer.token_bytes(i))} for i in ids]}


async def _ids(text: ModelText, content: str, add: bool, parse: bool = True) -> list[int]:
    """Return the ids of a text. ``add``: with the tokens that the file wants around a prompt."""
    if add:
        return await aside(text.tokenizer.prompt, content, parse)
    return await aside(text.tokenizer.encode, content, False, parse, add_eos=False)


def _piece(piece: bytes) -> str | list[int]:
    """Return a token's text, or its bytes if it is a part of a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


async def detokenize(request: Request) -> Response:
    """POST /detokenize: the text of token ids."""
    serving = serving_of(request)
    body = Fields(await read_object(request, serving.limits.depth))
    ids = body.items("tokens")
    if ids is None or not all(type(i) is int for i in ids):
        raise BadRequest("tokens must be a list of token ids", "tokens", "invalid_type")
    tokenizer = (await serving.models.text_of(body.text("model"))).tokenizer
    for i, token in enumerate(ids):
        if not 0 <= token < tokenizer.vocab_size:
            at, size = f"tokens[{i}]", tokenizer.vocab_size
            raise BadRequest(f"{at}: token id {abbreviate(token)} is outside the vocabulary of {size}", at)
    text = await aside(tokenizer.decode, ids)
    return json_reply({"content": text, "prompt": text})


async def apply_template(request: Request) -> Response:
    """POST /apply-template: the prompt that a chat would have. It takes the fields of a chat."""
    serving = serving_of(request)
    ask = chat_request(request, await read_object(request, serving.limits.depth), serving.limits).ask
    prompt = await shown_of(ask, await serving.models.text_of(ask.model))
    return json_reply({"prompt": unmarked(prompt.shown)})


def _get(path: str, handler: Callable[[Request], Awaitable[Response]]) -> Route:
    return Route(path, handler, methods=["GET"])  # and HEAD


def _post(path: str, handler: Callable[[Request], Awaitable[Response]]) -> Route:
    return Route(path, handler, methods=["POST"])


routes: list[BaseRoute] = [
    *(_get(path, health) for path in ("/health", "/v1/health", "/readyz")),
    *(_get(path, alive) for path in ("/livez", "/api/hello", "/")),  # a page at "/" comes before
    _get("/metrics", metrics),
    _get("/props", props),
    _get("/slots", slots),
    _post("/slots/{id}", change_slot),
    _get("/v1/cache/stats", cache_stats),
    _post("/v1/cache/clear", cache_clear),
    _post("/v1/requests/{id}/cancel", cancel),
    _post("/tokenize", tokenize),
    _post("/detokenize", detokenize),
    _post("/apply-template", apply_template),
]

__all__ = ["all_figures", "card_of", "json_reply", "loaded", "optional_object", "routes", "serving_of"]
