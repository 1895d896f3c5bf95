"""Server on several machines: Ray Serve runs replicas of it, and sends a conversation to where its prefix is cached.

    from zincmetal.serve.ray import deploy, models_on_disk
    deploy(models_on_disk("model.gguf"), replicas=4, gpus=1)

Two deployments. *Replicas* are servers, each with models of its own. A *front* on the HTTP side reads a request whole,
names the conversation that it belongs to, and passes it on. Of the replicas that are there, the name ranks all, the
same way in every front: the first that is not full gets the request. So a conversation stays where its prompts are
cached, and a replica that is full or gone costs one computed prompt, and no configuration.

A request whose replica dies before its answer has begun is sent to another one. An answer that has begun is not: its
client would get it twice.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from .app import make_app
from .channel import LoadOptions
from .errors import ANTHROPIC, HttpError, error_response, failure_of, family_of
from .known import known
from .residency import Residency
from .serving import Access, Serving

APP = "zincmetal"
TRIES = 4  # replicas that a request may meet
BEGINNING = 4096  # characters of a conversation that name it
#: Headers and fields by which clients name their sessions, the first that is there counts.
SESSIONS = ("x-claude-code-session-id", "x-session-affinity", "x-session-id", "x-conversation-id")
FIELDS = ("prompt_cache_key", "user")
_log = logging.getLogger("zincmetal.serve")

Make = Callable[[], Serving]


@dataclass(frozen=True)
class Call:
    """Request as it is passed on. ``key`` names its conversation."""

    key: str
    scope: dict[str, Any]
    body: bytes


def key_of(headers: Mapping[str, str], body: bytes) -> str:
    """Name the conversation of a request: by the client's name for it, or else by its beginning.

    Conversations with the same system prompt and tools begin alike. They share a replica until it is full.
    """
    for name in SESSIONS:
        if headers.get(name):
            return f"session {headers[name]}"
    try:
        asked = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(asked, dict):
        return ""
    for name in FIELDS:
        if isinstance(asked.get(name), str) and asked[name]:
            return f"session {asked[name]}"
    said = [asked.get(name) for name in ("model", "system", "instructions", "tools")]
    turns = asked.get("messages") or asked.get("input") or asked.get("prompt")
    first = turns[:2] if isinstance(turns, list) else turns
    return f"text {json.dumps([*said, first])[:BEGINNING]}"


def ranked(key: str, replicas: Mapping[str, Any]) -> list[Any]:
    """Return the replicas by their rank for a key: the same for all who know the same replicas (highest random weight).

    If one goes, only its own keys move.
    """
    weights = {name: blake2b(f"{key}\n{name}".encode("utf-8", "replace"), digest_size=8).digest() for name in replicas}
    return [replicas[name] for name in sorted(weights, key=lambda name: weights[name], reverse=True)]


class AffinityRouter(RequestRouter):
    """Ranks replicas by a request's key. Ray takes the first that is not full."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas, each a rank of its own."""
        call = pending_request.args[0] if pending_request and pending_request.args else None
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        # Ray copies this class to the fronts by value, so that a Call there is of another class.
        return [[replica] for replica in ranked(getattr(call, "key", ""), by_name)]


class Replica:
    """Server without HTTP: it runs the same application for each call."""

    def __init__(self, make: Make) -> None:
        self._app = make_app(make())

    async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
        """Yield the messages of a reply. If the caller goes away, the application learns that its client did."""
        gone, sent = asyncio.Event(), asyncio.Queue[Message | None](maxsize=64)
        bodies = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if bodies:
                return bodies.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app({**call.scope, "type": "http"}, receive, sent.put)
            finally:
                await sent.put(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await task
        finally:
            gone.set()
            task.cancel()
            with suppress(BaseException):
                await task

    async def check_health(self) -> None:
        """Raise if the server is not ready, so that Ray puts another in its place."""
        scope = {"method": "GET", "path": "/readyz", "headers": [(b"host", b"localhost")], "query_string": b""}
        async for message in self.answer(Call("", {**_BARE, **scope}, b"")):
            if message["type"] == "http.response.start" and message["status"] != 200:
                raise RuntimeError(f"the server answers {message['status']} to /readyz")


_BARE: dict[str, Any] = {
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "scheme": "http",
    "raw_path": b"",
    "root_path": "",
    "client": ("127.0.0.1", 0),
    "server": ("localhost", 80),
}
_KEPT = ("method", "path", "query_string", "headers", "http_version", "scheme", "raw_path", "client", "server")


class Front:
    """HTTP side: passes requests on to replicas."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        """Answer a request by the first replica that can."""
        body = await request.body()
        scope = {**_BARE, **{name: request.scope[name] for name in _KEPT if name in request.scope}}
        call = Call(key_of(request.headers, body), scope, body)
        for attempt in range(TRIES):
            messages = aiter(self._replicas.answer.remote(call))
            try:
                return await _reply(messages, request)
            except RayError as error:
                _log.warning("a replica failed before its answer had begun (try %d): %s", attempt + 1, error)
        failure = HttpError("device", "no replica could answer; ask again")
        return error_response(failure, request.url.path, request.headers.get("x-request-id", ""))


async def _reply(messages: AsyncIterator[Message], request: Request) -> Response:
    """Return the reply that the messages make. Raises RayError if the replica dies before it has begun."""
    start = await anext(messages)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
    if not headers.get("content-type", "").startswith("text/event-stream"):
        headers.pop("content-length", None)
        return Response(b"".join([m.get("body", b"") async for m in messages]), start["status"], headers)
    first = await anext(messages)  # headers may have come without a word of the answer
    return StreamingResponse(_stream(first, messages, request.url.path), start["status"], headers)


async def _stream(first: Message, messages: AsyncIterator[Message], path: str) -> AsyncIterator[bytes]:
    try:
        yield first.get("body", b"")
        async for message in messages:
            if message.get("body"):
                yield message["body"]
    except RayError as error:
        _log.warning("a replica failed in the middle of an answer: %s", error)
        yield _in_band(HttpError("device", "the server that wrote this answer is gone; ask again"), path)


def _in_band(error: HttpError, path: str) -> bytes:
    """Return the last event of a stream that failed, in the form of the path's API."""
    failure = failure_of(error)
    if family_of(path) == ANTHROPIC:
        return b"event: error\ndata: %b\n\n" % json.dumps(failure.anthropic("")).encode()
    return b"data: %b\n\n" % json.dumps(failure.openai()).encode()


def models_on_disk(*models: str, access: Access = Access(), **load: Any) -> Make:  # noqa: B008  # it is frozen
    """Return what makes a server of files or names of models, which each replica's machine has.

    ``access`` says who may ask, by which names of the machines. ``load``: fields of ``LoadOptions``.
    """

    def make() -> Serving:
        return Serving(Residency(known(models, (), LoadOptions("", **load))), access=access)

    return make


def application(
    make: Make,
    *,
    replicas: int | tuple[int, int] = 1,
    parallel: int = 8,
    gpus: float = 0,
    cpus: float = 1,
    fronts: int = 1,
) -> Any:
    """Return the Ray Serve application.

    ``replicas``: how many, or (least, most) for autoscaling. ``parallel`` requests run at once in one, then others get
    more. ``gpus`` and ``cpus`` are those of one replica. ``make`` builds the state of a server in its process.
    """
    scale: dict[str, Any] = {"num_replicas": replicas}
    if isinstance(replicas, tuple):
        least, most = replicas
        bounds = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": max(1, parallel // 2)}
        scale = {"autoscaling_config": bounds}
    deployment: Any = serve.deployment  # whose types say less than it takes
    replica = deployment(
        Replica,
        name="replica",
        max_ongoing_requests=parallel,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class=AffinityRouter),  # type: ignore[arg-type]
        **scale,
    )
    front = deployment(
        Front, name="front", num_replicas=fronts, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(replica.bind(make))


def deploy(make: Make, *, host: str = "127.0.0.1", port: int = 9462, **options: Any) -> Any:
    """Deploy on the cluster that Ray is connected to. Options as :func:`application`. Returns the handle."""
    serve.start(http_options={"host": host, "port": port})
    return serve.run(application(make, **options), name=APP)
