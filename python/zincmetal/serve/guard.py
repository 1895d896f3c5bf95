"""Guard in front of the server's routes: pure ASGI, and the first that a request meets.

Each step sees only what the steps before it let through. The order:

1. **id**: ``x-request-id`` of the client if it is clean, else a new one. Every reply carries it, refusals too.
2. **head**: number and bytes of header fields, form and length of the path. A slash at the end is dropped.
3. **Host**: a name of the allow-list, or the address that the client has reached. A web page that lets its own name
   point to this machine (DNS rebinding) ends here.
4. **Origin**: a page of this server, or of the allow-list. Browsers send it; other clients do not. Preflights of CORS
   are answered here, before the key, which browsers leave out.
5. **key**: unless the route is open (``OPEN``). So nobody without a key learns which routes exist.
6. **drain**: a server that ends takes no more work.
7. **form of the body**: JSON, not compressed, not too long by its Content-Length.
8. **body**: read to its end, within bounds of bytes and time. The app gets it whole: no route waits for a client.
9. **app**. What it raises becomes a reply without a traceback; the log names the place, and no text of the request.

``serve/connection.py`` bounds what comes before a request exists: connections, and the time of a head. It also closes
connections of clients that do not read.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import UsageError, quote
from .errors import HttpError, error_response, place_of
from .metrics import Metrics
from .serving import Access, Limits, Serving

log = logging.getLogger("zincmetal.serve")

#: Routes that need no key: is the server alive, is it ready, the files of the page. Nothing of a model or a prompt.
OPEN = frozenset({"/", "/health", "/v1/health", "/livez", "/readyz", "/api/hello", "/favicon.ico"})
OPEN_BELOW = "/page/"
#: Routes that need no key from this machine.
LOCAL = frozenset({"/metrics"})
#: Routes that a draining server still answers, beside the open ones.
LATE = re.compile(r"/metrics|/v1/requests/[^/]+/cancel|/v1/responses/[^/]+/cancel")

FIELDS = 128  # header fields of a request
TARGET = 8192  # bytes of path and query
LINGER_BYTES = 8 << 20  # of a refused body that are read, so that the client sees the reply and not a reset
LINGER_SECONDS = 2.0

SECURITY = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cache-control": b"no-store",
}
EXPOSED = b"x-request-id, request-id, retry-after, server-timing"

_PLAIN = re.compile(r"[!#-&(-~]+")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{0,2000}")
_JSON = re.compile(r"application/(?:[a-z0-9.+-]+\+)?json")


@dataclass(frozen=True)
class Head:
    """Head of a request. ``headers``: values by name in lower case, in their order."""

    method: str
    path: str
    headers: dict[str, list[str]]
    peer: str | None = None  # address of the client, None on a Unix socket
    reached: str | None = None  # address of this side

    @classmethod
    def of(cls, scope: Scope) -> Head:
        """Read the head of an ASGI request."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1").strip())
        peer, reached = scope.get("client"), scope.get("server")
        local = reached[0] if reached and reached[1] is not None else None
        return cls(scope["method"], scope["path"], headers, peer[0] if peer else None, local)

    def one(self, name: str) -> str:
        """Return the value of a header, "" if there is none or more than one."""
        values = self.headers.get(name, ())
        return values[0] if len(values) == 1 else ""

    @property
    def anthropic(self) -> bool:
        """True if the client speaks Anthropic's API."""
        return self.path.startswith("/v1/messages") or "anthropic-version" in self.headers

    @property
    def reads(self) -> bool:
        """True if the method changes nothing."""
        return self.method in ("GET", "HEAD")

    @property
    def bodied(self) -> bool:
        """True if there is a body."""
        return "transfer-encoding" in self.headers or self.one("content-length") not in ("", "0")

    @property
    def open(self) -> bool:
        """True if the route needs no key."""
        return self.reads and (self.path in OPEN or self.path.startswith(OPEN_BELOW))

    @property
    def local(self) -> bool:
        """True if the client is a program on this machine, and not a proxy that speaks for others."""
        forwarded = any(name == "forwarded" or name.startswith("x-forwarded-") for name in self.headers)
        return not forwarded and (self.peer is None or self.peer == "::1" or self.peer.startswith("127."))


class Keys:
    """Keys of a server. Only their digests are kept, and every key is compared, each in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._salt = secrets.token_bytes(32)
        given = list(keys)
        if any(not key or key != key.strip() or not key.isprintable() for key in given):
            raise UsageError("an API key must be one line of printable text without blanks at its ends")
        self._digests = [self._digest(key) for key in given]

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, key: str) -> bool:
        digest, found = self._digest(key), 0
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return bool(found)

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._salt, key.encode("utf-8", "surrogatepass"), "sha256")


def check_size(scope: Scope, limits: Limits) -> None:
    """Refuse a head with too many fields or bytes, and a path that no client means."""
    fields = scope["headers"]
    if len(fields) > FIELDS or sum(len(name) + len(value) + 4 for name, value in fields) > limits.headers:
        raise HttpError("headers", f"the headers are too large: at most {FIELDS} fields and {limits.headers} bytes")
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > TARGET:
        raise HttpError("headers", f"the URL is longer than {TARGET} bytes", code="url_too_long")
    path: str = scope["path"]
    if not path.startswith("/") or not path.isprintable():
        raise HttpError("invalid", "the path of the URL is malformed", code="invalid_url")


def check_host(head: Head, access: Access) -> None:
    """Refuse a request whose Host header is none of this server's names."""
    host = head.one("host").lower()
    match = _HOST.fullmatch(host)
    name, reached = match[1] if match else "", head.reached or ""
    if not name or ("*" not in access.hosts and name not in (*access.hosts, reached, f"[{reached}]")):
        remedy = "start it with --allowed-host NAME to allow one"
        raise HttpError("forbidden", f"{quote(host)} is no name of this server; {remedy}", code="host_refused")


def check_origin(head: Head, access: Access) -> str:
    """Refuse web pages of others. Return the origin that CORS headers must name, "" for none."""
    if "origin" not in head.headers:
        if head.one("sec-fetch-site") in ("cross-site", "same-site") and not _navigates(head):
            raise HttpError("forbidden", "a page of another site may not ask this server", code="origin_refused")
        return ""
    origin = head.one("origin").lower().rstrip("/")
    if origin and "*" in access.origins:
        return "*"
    if origin in (allowed.lower().rstrip("/") for allowed in access.origins):
        return head.one("origin")
    if origin not in ("", "null") and _authority(origin) == _authority(f"http://{head.one('host').lower()}"):
        return ""
    said = f"a page of {quote(origin)} may not ask this server; start it with --cors-origin URL to allow one"
    raise HttpError("forbidden", said, code="origin_refused")


def _navigates(head: Head) -> bool:
    """Return True if a person followed a link to the page."""
    return head.reads and head.one("sec-fetch-mode") == "navigate" and head.one("sec-fetch-dest") == "document"


def _authority(origin: str) -> str:
    """Return host and port of an origin, without the port that its scheme has anyway."""
    return re.sub(r":(?:80|443)$", "", origin.partition("://")[2])


def preflight(head: Head, origin: str) -> dict[bytes, bytes] | None:
    """Return the headers of the reply to a preflight of CORS, None if the request is none."""
    if head.method != "OPTIONS" or not head.one("access-control-request-method") or not origin:
        return None
    asked = head.one("access-control-request-headers")
    headers = {
        b"access-control-allow-methods": b"GET, HEAD, POST, DELETE",
        b"access-control-allow-headers": asked.encode("latin-1") if _NAMES.fullmatch(asked) else b"",
        b"access-control-max-age": b"600",
    }
    if head.one("access-control-request-private-network") == "true":
        headers[b"access-control-allow-private-network"] = b"true"
    return headers


def check_key(head: Head, keys: Keys) -> None:
    """Refuse a request without a valid key, where one is needed. One valid key among several is enough."""
    if not keys or head.open or (head.path in LOCAL and head.local):
        return
    bearers = (value.partition(" ") for value in head.headers.get("authorization", ()))
    given = [key.strip() for scheme, _, key in bearers if scheme.lower() == "bearer"]
    given += head.headers.get("x-api-key", ())
    if not any(_text(key) in keys for key in given):
        said = (
            "the API key is wrong" if given else "an API key is needed: 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
        )
        raise HttpError("unauthorized", said, headers={"www-authenticate": "Bearer"})


def _text(value: str) -> str:
    """Return a header's value as the client typed it: its bytes are UTF-8."""
    return value.encode("latin-1").decode("utf-8", "replace")


def check_draining(head: Head, draining: bool) -> None:
    """Refuse new work while the server ends."""
    if draining and not head.open and not LATE.fullmatch(head.path):
        raise HttpError("draining", "the server is shutting down; ask again in some seconds")


def check_body(head: Head, limits: Limits) -> None:
    """Refuse a body that is compressed, too long by its own words, or in a form that a simple page can send."""
    if any(encoding.lower() not in ("", "identity") for encoding in head.headers.get("content-encoding", ())):
        raise HttpError("media", "a compressed body is not supported; send it as it is", code="unsupported_encoding")
    length, lengths = head.one("content-length"), head.headers.get("content-length", [])
    if lengths and "transfer-encoding" in head.headers:  # a proxy may see the end of the request elsewhere
        raise HttpError(
            "invalid", "a body has a Content-Length or a Transfer-Encoding, not both", code="invalid_length"
        )
    if lengths and not (length.isascii() and length.isdigit() and len(length) < 20):
        raise HttpError("invalid", "Content-Length is not a number", code="invalid_length")
    if length and int(length) > limits.body:
        raise _too_large(limits)
    types = head.headers.get("content-type", [])
    if not head.reads and (head.bodied or types) and not (len(types) == 1 and _is_json(types[0])):
        raise HttpError("media", "the body must be JSON, with the header 'Content-Type: application/json'")


def _is_json(value: str) -> bool:
    kind, _, parameters = value.lower().partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]*)", parameters)
    return bool(_JSON.fullmatch(kind.strip())) and (charset is None or charset[1] in ("utf-8", "utf8"))


def _too_large(limits: Limits) -> HttpError:
    return HttpError("too_large", f"the body is longer than {limits.body} bytes")


@dataclass
class Exchange:
    """One request and its reply, on the way through the guard."""

    scope: Scope
    receive: Receive
    send: Send
    id: str
    head: Head
    extra: dict[bytes, bytes] = field(default_factory=dict)  # headers of CORS
    status: int = 0
    began: float = field(default_factory=time.monotonic)
    read: bool = False  # to the end of the body
    done: bool = False  # the reply is complete

    async def reply(self, message: Message) -> None:
        """Send a part of the reply. Its head gets the headers that every reply has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {b"x-request-id": self.id.encode(), **self.extra}
            if self.head.anthropic:
                own[b"request-id"] = self.id.encode()
            given = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in own]
            names = {name.lower() for name, _ in given}
            safe = [(name, value) for name, value in SECURITY.items() if name not in names]
            message = {**message, "headers": [*given, *own.items(), *safe]}
        elif not message.get("more_body", False):
            self.done = True
        await self.send(message)

    def log(self) -> None:
        """Write a line about the request, without its query and its body."""
        spent = (time.monotonic() - self.began) * 1e3
        method, path = _plain(self.head.method, 16), _plain(self.head.path, 120)
        log.info("%s %s %d %.0f ms %s", method, path, self.status or 499, spent, self.id)

    async def body(self, limits: Limits) -> bytes | None:
        """Read the body. None: the client has left. Raises HttpError for one that is too long or too slow."""
        pieces: list[bytes] = []
        size, end = 0, time.monotonic() + limits.body_seconds
        while True:
            left = min(limits.read_seconds, end - time.monotonic())
            try:
                message = await asyncio.wait_for(self.receive(), max(left, 0.0))
            except (TimeoutError, asyncio.TimeoutError):
                most = f"{limits.body_seconds:g} s, and {limits.read_seconds:g} s for a piece"
                raise HttpError("slow", f"the body came too slowly: at most {most}") from None
            if message["type"] != "http.request":
                return None
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            self.read = not message.get("more_body", False)
            if size > limits.body:
                raise _too_large(limits)
            if self.read:
                return b"".join(pieces)

    async def refuse(self, error: BaseException) -> None:
        """Send a refusal, and read for a moment what the client still sends: a reset would hide the reply from it."""
        reply = error_response(error, "/v1/messages" if self.head.anthropic else self.head.path, self.id)
        waiting = self.head.bodied and not self.read
        headers = [*reply.raw_headers, *([(b"connection", b"close")] if waiting else [])]
        await self.reply({"type": "http.response.start", "status": reply.status_code, "headers": headers})
        await self.send({"type": "http.response.body", "body": reply.body, "more_body": waiting})
        if waiting:
            # A slow client would be slow here too, and one that asked before it sends will not send.
            if reply.status_code != 408 and "expect" not in self.head.headers:
                with suppress(TimeoutError, asyncio.TimeoutError):
                    await asyncio.wait_for(self._linger(), LINGER_SECONDS)
            await self.send({"type": "http.response.body", "body": b""})

    async def _linger(self) -> None:
        size = 0
        while size < LINGER_BYTES:
            message = await self.receive()
            size += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return


def _plain(text: str, most: int) -> str:
    """Show a text as it is if nothing in it can be taken for another part of a line, else quoted."""
    return text if len(text) <= most and _PLAIN.fullmatch(text) else quote(text, most)


class Guard:
    """ASGI app that lets through to another what may pass. See the first lines of this module."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app, self._serving = app, serving
        self._keys = Keys(serving.access.keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take one request, or the start and end of the server."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # no route speaks WebSocket
            return await send({"type": "websocket.close", "code": 1008})
        head = Head.of(scope)
        known = head.one("x-request-id")
        known = known if _ID.fullmatch(known) else f"req_{secrets.token_hex(12)}"
        scope = {**scope, "state": {**scope.get("state", {}), "request_id": known}}
        exchange = Exchange(scope, receive, send, known, head)
        metrics = self._serving.metrics
        metrics.in_flight.inc()
        try:
            await self._pass(exchange)
        finally:
            metrics.in_flight.dec()
            metrics.http(exchange.head.path, exchange.status)
            exchange.log()

    async def _pass(self, exchange: Exchange) -> None:
        try:
            body = await self._checked(exchange)
            if body is not None:
                receive = _whole(body, exchange, self._serving.metrics)
                await self._app(exchange.scope, receive, exchange.reply)
        except Exception as error:
            if exchange.status:  # a reply that has begun can only be cut off
                log.error("request %s failed: %s at\n%s", exchange.id, type(error).__name__, place_of(error))
            else:
                await exchange.refuse(error)

    async def _checked(self, exchange: Exchange) -> bytes | None:
        """Take the steps up to the body and return that. None: there is a reply already, or nobody to reply to."""
        limits, access = self._serving.limits, self._serving.access
        check_size(exchange.scope, limits)
        path = exchange.scope["path"].rstrip("/") or "/"
        exchange.scope.update(path=path, raw_path=(exchange.scope.get("raw_path") or b"").rstrip(b"/") or b"/")
        head = exchange.head = Head.of(exchange.scope)
        check_host(head, access)
        if access.origins:
            exchange.extra[b"vary"] = b"Origin"
        origin = check_origin(head, access)
        if origin:
            exchange.extra[b"access-control-allow-origin"] = origin.encode("latin-1")
            exchange.extra[b"access-control-expose-headers"] = EXPOSED
            exchange.extra[b"cross-origin-resource-policy"] = b"cross-origin"
        answer = preflight(head, origin)
        if answer is not None:
            exchange.extra.update(answer)
            await exchange.reply({"type": "http.response.start", "status": 204, "headers": []})
            await exchange.send({"type": "http.response.body", "body": b""})
            return None
        check_key(head, self._keys)
        check_draining(head, self._serving.draining)
        check_body(head, limits)
        return await exchange.body(limits)


def _whole(body: bytes, exchange: Exchange, metrics: Metrics) -> Receive:
    """Return a ``receive`` that gives the body at once, and then what the client does: it can only leave."""
    given: list[bytes] = [body]

    async def receive() -> Message:
        if given:
            return {"type": "http.request", "body": given.pop(), "more_body": False}
        message = await exchange.receive()
        if message["type"] == "http.disconnect" and not exchange.done:
            metrics.disconnects.inc()
        return message

    return receive


def middleware(serving: Serving) -> list[Middleware]:
    """Return what stands before an application's routes."""
    return [Middleware(Guard, serving=serving)]


__all__ = ["OPEN", "Guard", "Head", "Keys", "middleware"]
