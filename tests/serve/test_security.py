"""Guard in front of the routes: who may ask, and what a request may look like."""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import logging
from pathlib import Path
from typing import Any

import pytest

from support.asgi import JSON, Reply, asked
from support.scripted import Reply as Answer
from support.scripted import ScriptedModels, scripted
from zincmetal.errors import UsageError
from zincmetal.serve import guard
from zincmetal.serve.app import make_app
from zincmetal.serve.serving import Limits, Serving

KEY = "sk-correct-horse"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
LIMITS = Limits(body=4096, headers=4096, body_seconds=0.3, read_seconds=0.1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ScriptedModels:
    folder: Path = tmp_path_factory.mktemp("models")
    return ScriptedModels([scripted(folder, lambda prompt, asked: Answer("hello"), "tiny")])


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LINGER_SECONDS", 0.05)


@pytest.fixture
def serving(models: ScriptedModels) -> Serving:
    return Serving(models, LIMITS)


def app_of(serving: Serving, **access: Any) -> Any:
    serving.access = dataclasses.replace(serving.access, **access)
    return make_app(serving)


# ---- Host: a name that an attacker makes point here --------------------------------------------------------------

GOOD_HOSTS = ["localhost", "localhost:8080", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080", "[::1]"]
BAD_HOSTS = [
    "evil.example",
    "evil.example:8080",
    "localhost.evil.example",
    "evil-localhost",
    "127.0.0.1.evil.example",
    "127.0.0.2",
    "0.0.0.0:8080",
    "localhost@evil.example",
    "evil.example@localhost",
    "localhost:8080:8080",
    "localhost:",
    "localhost:99999999",
    "localhost#evil",
    "localhost/..",
    "localhost localhost",
    "[::2]:8080",
    "[::1",
    "",
    "*",
]


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_names_of_this_machine_are_hosts(serving: Serving, host: str) -> None:
    assert asked(app_of(serving), "GET", "/v1/models", [("host", host)]).status == 200


@pytest.mark.parametrize("host", BAD_HOSTS)
@pytest.mark.parametrize("path", ["/v1/models", "/health"])
def test_another_name_is_refused(serving: Serving, host: str, path: str) -> None:
    reply = asked(app_of(serving), "GET", path, [("host", host)])
    assert (reply.status, reply.code) == (403, "host_refused")


@pytest.mark.parametrize("headers", [[], [("host", "localhost"), ("host", "localhost")]])
def test_exactly_one_host(serving: Serving, headers: list[tuple[str, str]]) -> None:
    assert asked(app_of(serving), "GET", "/v1/models", headers, bare=True).status == 403


def test_hosts_can_be_allowed(serving: Serving) -> None:
    app = app_of(serving, hosts=("my-mac.local",))
    assert asked(app, "GET", "/v1/models", [("host", "My-Mac.local:8080")]).status == 200
    assert asked(app, "GET", "/v1/models", [("host", "localhost")]).status == 403
    assert asked(app, "GET", "/v1/models", [("host", "127.0.0.1")]).status == 200  # the address that was reached
    assert asked(app_of(serving, hosts=("*",)), "GET", "/v1/models", [("host", "any.example")]).status == 200


def test_forwarded_hosts_mean_nothing(serving: Serving) -> None:
    headers = [("host", "evil.example"), ("x-forwarded-host", "localhost")]
    assert asked(app_of(serving), "GET", "/v1/models", headers).status == 403


# ---- Origin: pages of others, in a browser on this machine -------------------------------------------------------

BAD_ORIGINS = [
    "https://evil.example",
    "http://localhost:3000",
    "http://127.0.0.1:8080",
    "http://localhost:8080.evil.example",
    "http://localhost:80800",
    "null",
    "",
    "localhost:8080",
    "file://",
    "app://localhost",
    "https://good.example.evil.example",
    "http://good.example",
]


@pytest.mark.parametrize("origin", BAD_ORIGINS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_pages_of_others_are_refused(serving: Serving, origin: str, method: str) -> None:
    app = app_of(serving, origins=("https://good.example",))
    headers = [("origin", origin), ("access-control-request-method", "POST")]
    reply = asked(app, method, "/v1/chat/completions", headers, CHAT if method == "POST" else b"")
    assert (reply.status, reply.code) == (403, "origin_refused")
    assert "access-control-allow-origin" not in reply.headers
    assert not serving.turns


@pytest.mark.parametrize("origin", ["http://localhost:8080", "HTTP://LOCALHOST:8080", "https://localhost:8080"])
def test_the_servers_own_page_may_ask(serving: Serving, origin: str) -> None:
    reply = asked(app_of(serving), "POST", "/v1/chat/completions", [("origin", origin)], CHAT)
    assert reply.status == 200
    assert "access-control-allow-origin" not in reply.headers


def test_ports_that_schemes_have_anyway(serving: Serving) -> None:
    for host, origin in (("localhost", "http://localhost:80"), ("localhost:443", "https://localhost")):
        assert asked(app_of(serving), "GET", "/v1/models", [("host", host), ("origin", origin)]).status == 200


def test_an_allowed_origin_is_named(serving: Serving) -> None:
    app = app_of(serving, origins=("https://good.example/", "app://obsidian.md"))
    for origin in ("https://good.example", "app://obsidian.md"):
        reply = asked(app, "POST", "/v1/chat/completions", [("origin", origin)], CHAT)
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == origin
        assert reply.headers["vary"] == "Origin"
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in reply.headers


def test_a_star_allows_all_without_credentials(serving: Serving) -> None:
    reply = asked(app_of(serving, origins=("*",)), "GET", "/v1/models", [("origin", "https://any.example")])
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, "*")
    assert "access-control-allow-credentials" not in reply.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize(("mode", "dest", "status"), [("no-cors", "image", 403), ("navigate", "iframe", 403)])
def test_pages_of_others_cannot_embed(serving: Serving, site: str, mode: str, dest: str, status: int) -> None:
    headers = [("sec-fetch-site", site), ("sec-fetch-mode", mode), ("sec-fetch-dest", dest)]
    assert asked(app_of(serving), "GET", "/v1/models", headers).status == status


def test_a_link_may_be_followed(serving: Serving) -> None:
    headers = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")]
    assert asked(app_of(serving), "GET", "/", headers).status == 200
    assert asked(app_of(serving), "POST", "/v1/chat/completions", headers, CHAT).status == 403
    assert asked(app_of(serving), "GET", "/v1/models", [("sec-fetch-site", "none")]).status == 200
    assert asked(app_of(serving), "GET", "/v1/models", [("sec-fetch-site", "same-origin")]).status == 200


def preflight(app: Any, origin: str, *more: tuple[str, str]) -> Reply:
    return asked(app, "OPTIONS", "/v1/messages", [("origin", origin), ("access-control-request-method", "POST"), *more])


def test_preflights_need_no_key(serving: Serving) -> None:
    app = app_of(serving, origins=("https://good.example",), keys=(KEY,))
    reply = preflight(app, "https://good.example", ("access-control-request-headers", "x-api-key, content-type"))
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == "https://good.example"
    assert reply.headers["access-control-allow-headers"] == "x-api-key, content-type"
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "access-control-allow-private-network" not in reply.headers
    private = preflight(app, "https://good.example", ("access-control-request-private-network", "true"))
    assert private.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("asked_for", ["a\u00e9", "x" * 3000, "a<b>"])
def test_preflights_name_no_strange_headers(serving: Serving, asked_for: str) -> None:
    app = app_of(serving, origins=("https://good.example",))
    reply = preflight(app, "https://good.example", ("access-control-request-headers", asked_for))
    assert (reply.status, reply.headers["access-control-allow-headers"]) == (204, "")


def test_options_without_an_origin_is_no_preflight(serving: Serving) -> None:
    assert (
        asked(app_of(serving), "OPTIONS", "/v1/chat/completions", [("access-control-request-method", "POST")]).status
        == 405
    )


# ---- keys --------------------------------------------------------------------------------------------------------

BAD_KEYS: list[list[tuple[str, str]]] = [
    [],
    [("authorization", f"Bearer {KEY}x")],
    [("authorization", f"Bearer {KEY[:-1]}")],
    [("authorization", f"Bearer {KEY.upper()}")],
    [("authorization", f"Basic {KEY}")],
    [("authorization", KEY)],
    [("authorization", f"Bearer{KEY}")],
    [("authorization", "Bearer")],
    [("authorization", "Bearer ")],
    [("authorization", f"Bearer {KEY},{KEY}")],
    [("authorization", "Bearer \u00fc\u00fc")],
    [("x-api-key", "")],
    [("x-api-key", KEY + "\u00e9")],
    [("x-api-key", "\udcff\udcfe")],
    [("api-key", KEY)],
    [("cookie", f"key={KEY}")],
]
GOOD_KEYS: list[list[tuple[str, str]]] = [
    [("authorization", f"Bearer {KEY}")],
    [("authorization", f"bearer   {KEY} ")],
    [("x-api-key", KEY)],
    [("x-api-key", "other-\u00e9")],
    [("authorization", "Bearer wrong"), ("x-api-key", KEY)],
]


@pytest.mark.parametrize("headers", BAD_KEYS, ids=str)
def test_wrong_keys(serving: Serving, headers: list[tuple[str, str]]) -> None:
    app = app_of(serving, keys=(KEY, "other-\u00e9"))
    openai = asked(app, "POST", "/v1/chat/completions", headers, CHAT)
    assert (openai.status, openai.code) == (401, "invalid_api_key")
    assert openai.json()["error"]["type"] == "authentication_error"
    assert openai.headers["www-authenticate"] == "Bearer"
    anthropic = asked(app, "POST", "/v1/messages", headers, CHAT)
    assert anthropic.status == 401
    assert anthropic.json()["type"] == "error"
    assert anthropic.json()["error"]["type"] == "authentication_error"
    assert anthropic.json()["request_id"] == anthropic.headers["request-id"]
    assert KEY not in openai.body.decode() + anthropic.body.decode()


@pytest.mark.parametrize("headers", GOOD_KEYS, ids=str)
def test_right_keys(serving: Serving, headers: list[tuple[str, str]]) -> None:
    assert asked(app_of(serving, keys=(KEY, "other-\u00e9")), "GET", "/v1/models", headers).status == 200


def test_a_key_in_the_url_is_none(serving: Serving) -> None:
    assert asked(app_of(serving, keys=(KEY,)), "GET", f"/v1/models?key={KEY}&api_key={KEY}").status == 401


def test_anthropics_clients_get_their_form_on_every_route(serving: Serving) -> None:
    reply = asked(app_of(serving, keys=(KEY,)), "GET", "/v1/models", [("anthropic-version", "2023-06-01")])
    assert (reply.status, reply.json()["type"]) == (401, "error")


def test_the_routes_without_a_key_are_exactly_these(serving: Serving) -> None:
    app = app_of(serving, keys=(KEY,))
    paths = {route.path.replace("{id:path}", "tiny").replace("{id}", "x") for route in app.routes}
    paths |= {"/v1", "/docs", "/openapi.json", "/unknown", "/page", "/favicon.ico", "/v1/health/x"}
    open_ = {p for p in paths for m in ("GET", "HEAD", "POST", "DELETE") if asked(app, m, p, [JSON]).status != 401}
    expected = {"/", "/health", "/v1/health", "/livez", "/readyz", "/api/hello", "/favicon.ico", "/metrics"}
    assert {p for p in open_ if not p.startswith("/page/")} == expected


@pytest.mark.parametrize(
    ("peer", "headers", "status"),
    [
        ("127.0.0.1", [], 200),
        ("::1", [], 200),
        (None, [], 200),
        ("192.168.1.7", [], 401),
        ("127.0.0.1", [("x-forwarded-for", "8.8.8.8")], 401),
        ("127.0.0.1", [("forwarded", "for=8.8.8.8")], 401),
        ("192.168.1.7", [("x-api-key", KEY)], 200),
        ("192.168.1.7", [("x-forwarded-for", "127.0.0.1")], 401),
    ],
)
def test_metrics_need_a_key_from_elsewhere(
    serving: Serving, peer: str | None, headers: list[tuple[str, str]], status: int
) -> None:
    assert asked(app_of(serving, keys=(KEY,)), "GET", "/metrics", headers, peer=peer).status == status


def test_open_routes_are_read_only(serving: Serving) -> None:
    for method in ("POST", "DELETE", "PUT", "PATCH"):
        assert asked(app_of(serving, keys=(KEY,)), method, "/health", [JSON]).status == 401


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    keys = guard.Keys(["one", "two", "three"])
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for given in ("one", "three", "x" * 10_000, ""):
        compared.clear()
        assert (given in keys) == (given in ("one", "three"))
        assert len(compared) == 3  # also after a match
        assert {len(part) for pair in compared for part in pair} == {32}  # of equal length, whatever was given


def test_keys_are_kept_as_digests() -> None:
    keys = guard.Keys([KEY])
    assert KEY not in repr(vars(keys))
    assert vars(keys)["_digests"] != vars(guard.Keys([KEY]))["_digests"]  # a salt of each server


@pytest.mark.parametrize("key", ["", " ", "a ", "a\nb", "\x00", "\u202e"])
def test_keys_that_are_mistakes(key: str) -> None:
    with pytest.raises(UsageError, match="API key"):
        guard.Keys([key])


# ---- bodies ------------------------------------------------------------------------------------------------------

BODY = b'{"messages": [{"role": "user", "content": "hi"}]}'
TYPES = [
    "text/plain",
    "text/plain; application/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=application/json",
    "application/jsonp",
    "application/json-seq",
    "text/json",
    "application/json; charset=utf-16",
    'application/json; charset="latin-1"',
    "application/json, text/plain",
    "",
]


@pytest.mark.parametrize("kind", TYPES)
def test_bodies_must_be_json(serving: Serving, kind: str) -> None:
    reply = asked(app_of(serving), "POST", "/v1/chat/completions", [("content-type", kind)], BODY)
    assert (reply.status, reply.code) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "Application/JSON; charset=UTF-8",
        "application/vnd.api+json",
        'application/json;charset="utf-8"',
    ],
)
def test_json_by_any_of_its_names(serving: Serving, kind: str) -> None:
    assert asked(app_of(serving), "POST", "/v1/chat/completions", [("content-type", kind)], BODY).status == 200


def test_a_body_without_a_type_is_refused(serving: Serving) -> None:
    assert asked(app_of(serving), "POST", "/v1/chat/completions", [], BODY).status == 415
    assert asked(app_of(serving), "POST", "/v1/chat/completions", [], [BODY]).status == 415
    two = [JSON, ("content-type", "text/plain")]
    assert asked(app_of(serving), "POST", "/v1/chat/completions", two, BODY).status == 415


def test_no_body_needs_no_type(serving: Serving) -> None:
    assert asked(app_of(serving), "POST", "/v1/requests/x/cancel").status == 200
    assert asked(app_of(serving), "POST", "/v1/requests/x/cancel", [("content-type", "text/plain")]).status == 415


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "identity, gzip", "x"])
def test_compressed_bodies(serving: Serving, encoding: str) -> None:
    headers = [JSON, ("content-encoding", encoding)]
    reply = asked(app_of(serving), "POST", "/v1/chat/completions", headers, BODY)
    assert (reply.status, reply.code) == (415, "unsupported_encoding")
    assert (
        asked(app_of(serving), "POST", "/v1/chat/completions", [JSON, ("content-encoding", "identity")], BODY).status
        == 200
    )


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/tokenize"])
def test_a_body_that_says_it_is_too_long(serving: Serving, path: str) -> None:
    reply = asked(
        app_of(serving), "POST", path, [JSON, ("content-length", "4097")], [b"x" * 100], stalls=True, bare=False
    )
    assert reply.status == 413
    assert reply.headers["connection"] == "close"
    assert reply.complete


def test_a_body_that_is_too_long(serving: Serving) -> None:
    pieces = [b"x" * 1000] * 100
    reply = asked(app_of(serving), "POST", "/v1/chat/completions", [JSON], pieces)
    assert (reply.status, reply.code) == (413, "request_too_large")
    anthropic = asked(app_of(serving), "POST", "/v1/messages", [JSON], pieces)
    assert (anthropic.status, anthropic.json()["error"]["type"]) == (413, "invalid_request_error")


def test_a_body_of_exactly_the_limit(serving: Serving) -> None:
    body = BODY.ljust(LIMITS.body)
    assert asked(app_of(serving), "POST", "/v1/chat/completions", [JSON], body).status == 200
    assert asked(app_of(serving), "POST", "/v1/chat/completions", [JSON], body + b" ").status == 413


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "\u0663", "9" * 30, "1, 1", "+5"])
def test_lengths_that_are_no_numbers(serving: Serving, length: str) -> None:
    reply = asked(app_of(serving), "POST", "/v1/chat/completions", [JSON, ("content-length", length)], BODY)
    assert (reply.status, reply.code) == (400, "invalid_length")


def test_two_lengths(serving: Serving) -> None:
    headers = [JSON, ("content-length", "10"), ("content-length", "50")]
    assert asked(app_of(serving), "POST", "/v1/chat/completions", headers, BODY).status == 400


def test_a_refused_client_may_finish_its_body(serving: Serving) -> None:
    """Reads what a client with a wrong key still sends: a reset would hide the reply from it."""
    reply = asked(app_of(serving, keys=(KEY,)), "POST", "/v1/chat/completions", [JSON], [b"x" * 1000] * 50)
    assert (reply.status, reply.taken, reply.complete) == (401, 50, True)


def test_a_refused_client_may_not_send_for_good(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LINGER_BYTES", 10_000)
    app = app_of(serving, keys=(KEY,))
    reply = asked(app, "POST", "/v1/chat/completions", [JSON], [b"x" * 1000] * 50)
    assert (reply.status, reply.taken) == (401, 10)
    assert asked(app, "POST", "/v1/chat/completions", [JSON], [b"x"], stalls=True).complete


@pytest.mark.parametrize("limits", [Limits(read_seconds=0.05), Limits(body_seconds=0.05)])
def test_a_body_that_does_not_come(models: ScriptedModels, limits: Limits) -> None:
    reply = asked(app_of(Serving(models, limits)), "POST", "/v1/chat/completions", [JSON], [b'{"mess'], stalls=True)
    assert (reply.status, reply.code, reply.headers["connection"]) == (408, "request_timeout", "close")


def test_a_client_that_leaves_within_its_body(serving: Serving) -> None:
    async def leave() -> Reply:
        gone = asyncio.Event()
        gone.set()
        from support.asgi import ask

        return await ask(app_of(serving), "POST", "/v1/chat/completions", [JSON], [b"{"], stalls=True, leaves=gone)

    assert asyncio.run(leave()).status == 0


# ---- heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [[("x", "y" * 5000)], [("y" * 5000, "x")], [(f"x-{i}", "") for i in range(200)]])
def test_heads_that_are_too_large(serving: Serving, headers: list[tuple[str, str]]) -> None:
    assert asked(app_of(serving), "GET", "/health", headers).status == 431


@pytest.mark.parametrize("path", ["/" + "x" * 9000, "/health?" + "x" * 9000])
def test_urls_that_are_too_long(serving: Serving, path: str) -> None:
    reply = asked(app_of(serving), "GET", path)
    assert (reply.status, reply.code) == (431, "url_too_long")


@pytest.mark.parametrize(
    "path", ["/v1/models/%00", "/%0d%0aSet-Cookie:x", "/v1/%1b[31m", "http://evil/", "*", "/%e2%80%ae"]
)
def test_urls_that_nobody_means(serving: Serving, path: str) -> None:
    reply = asked(app_of(serving), "GET", path)
    assert (reply.status, reply.code) == (400, "invalid_url")


@pytest.mark.parametrize(
    "path", ["/nope", "/v1/nope", "/v1", "/v1/chat", "/..", "/../etc/passwd", "/%2e%2e/etc/passwd", "//", "/V1/models"]
)
def test_unknown_routes(serving: Serving, path: str) -> None:
    reply = asked(app_of(serving), "GET", path)
    if path == "//":
        assert reply.status == 200  # slashes at the end are dropped
    else:
        assert (reply.status, reply.json()["error"]["type"]) == (404, "not_found_error")


def test_unknown_routes_of_anthropics(serving: Serving) -> None:
    reply = asked(app_of(serving), "GET", "/v1/messages/nope")
    assert (reply.status, reply.json()["error"]["type"]) == (404, "not_found_error")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/chat/completions"),
        ("HEAD", "/v1/chat/completions"),
        ("PUT", "/v1/chat/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/health"),
        ("TRACE", "/health"),
        ("CONNECT", "/health"),
        ("PATCH", "/tokenize"),
        ("get", "/health"),
        ("BREW", "/health"),
    ],
)
def test_unknown_methods(serving: Serving, method: str, path: str) -> None:
    reply = asked(app_of(serving), method, path)
    assert (reply.status, reply.json()["error"]["type"]) == (405, "not_found_error")
    assert reply.headers["allow"]


IDS = [
    ("abc-123", True),
    ("req_0.1:2", True),
    ("x" * 64, True),
    ("x" * 65, False),
    ("", False),
    ("a b", False),
    ("a\r\nset-cookie: b=c", False),
    ("<script>", False),
    ("\u00e9", False),
    ("../../x", False),
]


@pytest.mark.parametrize(("known", "kept"), IDS)
def test_request_ids(serving: Serving, known: str, kept: bool) -> None:
    reply = asked(app_of(serving), "GET", "/health", [("x-request-id", known)])
    assert reply.status == 200
    assert (reply.headers["x-request-id"] == known) == kept
    assert reply.headers["x-request-id"]


def test_request_ids_differ_and_come_with_refusals(serving: Serving) -> None:
    app = app_of(serving, keys=(KEY,))
    replies = [asked(app, "GET", path) for path in ("/health", "/v1/models", "/nope") * 2]
    assert len({reply.headers["x-request-id"] for reply in replies}) == 6
    two = asked(app, "GET", "/health", [("x-request-id", "a"), ("x-request-id", "b")])
    assert two.headers["x-request-id"] not in ("a", "b")


def test_a_slash_at_the_end(serving: Serving) -> None:
    for path in ("/v1/models/", "/health/", "/health///"):
        assert asked(app_of(serving), "GET", path).status == 200
    assert asked(app_of(serving), "POST", "/v1/chat/completions/?beta=true", [], CHAT).status == 200


def test_a_slash_opens_no_route(serving: Serving) -> None:
    for path in ("/v1/models/", "/health/../v1/models", "/page/../v1/models", "/metrics/x"):
        assert asked(app_of(serving, keys=(KEY,)), "GET", path, peer="10.0.0.1").status in (401, 404)
    assert asked(app_of(serving, keys=(KEY,)), "GET", "/page/../v1/models").status == 404


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api/hello",
        "/health",
        "/livez",
        "/readyz",
        "/v1/models",
        "/v1/models/tiny",
        "/metrics",
        "/props",
        "/slots",
        "/models/sse",
        "/v1/cache/stats",
    ],
)
def test_head_is_answered_wherever_get_is(serving: Serving, path: str) -> None:
    assert asked(app_of(serving), "HEAD", path).status == 200


@pytest.mark.parametrize("path", ["/health", "/nope", "/v1/chat/completions", "/v1/models"])
def test_security_headers(serving: Serving, path: str) -> None:
    headers = asked(app_of(serving), "GET", path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"
    assert "server" not in headers


# ---- draining ----------------------------------------------------------------------------------------------------


def test_the_page_has_the_bounds_and_the_open_routes() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs/operate.md").read_text("utf-8").split())
    limits = Limits()
    for words in (
        f"more than {limits.connections} at a time",
        f"takes more than {limits.header_seconds:g} seconds",
        f"{guard.FIELDS} fields or {limits.headers:,} bytes",
        f"a URL of more than {guard.TARGET:,} bytes",
        f"more than {limits.body_seconds:g} seconds for all of it, or {limits.read_seconds:g} for a piece",
        f"unread for {limits.write_seconds:g} seconds",
        ", ".join(f"`{path}`" for path in sorted(guard.OPEN)) + f", and what is below `{guard.OPEN_BELOW}`",
    ):
        assert words in page


def test_a_server_that_ends_takes_no_work(serving: Serving) -> None:
    serving.draining = True
    app = app_of(serving)
    openai = asked(app, "POST", "/v1/chat/completions", [], CHAT)
    assert openai.status == 503
    anthropic = asked(app, "POST", "/v1/messages", [], CHAT)
    assert (anthropic.status, anthropic.json()["error"]["type"]) == (529, "overloaded_error")
    for reply in (openai, anthropic):
        assert 0 < int(reply.headers["retry-after"]) <= 120  # openai-python does not retry after more
    assert asked(app, "POST", "/tokenize", [], {"content": "hi"}).status == 503
    assert asked(app, "GET", "/models/sse").status == 503
    for path, status in (("/livez", 200), ("/health", 503), ("/readyz", 503), ("/metrics", 200)):
        assert asked(app, "GET", path).status == status
    assert asked(app, "POST", "/v1/requests/x/cancel").status == 200


# ---- faults and logs ---------------------------------------------------------------------------------------------


SECRET = "-".join(["SECRET", "PROMPT"])  # not in a line of code, which the log shows


def broken(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> Any:
    def fail() -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(serving.models, "cards", fail)
    return app_of(serving)


def test_a_fault_shows_nothing_but_its_id(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        reply = asked(broken(serving, monkeypatch), "GET", "/v1/models")
    assert (reply.status, reply.json()["error"]["type"]) == (500, "server_error")
    shown = reply.body.decode()
    assert reply.headers["x-request-id"] in shown
    for word in (SECRET, "Traceback", "RuntimeError", ".py"):
        assert word not in shown
    assert "RuntimeError" in caplog.text  # whoever runs the server learns the place
    assert "cards" in caplog.text
    assert SECRET not in caplog.text


def test_a_fault_of_anthropics_route(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    reply = asked(broken(serving, monkeypatch), "GET", "/v1/models", [("anthropic-version", "2023-06-01")])
    assert (reply.status, reply.json()["error"]["type"]) == (500, "api_error")


WORDS = "zebra-umbrella-9471"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": WORDS}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": WORDS}], "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": WORDS, "content": WORDS}], "temperature": WORDS}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": WORDS}], "user": WORDS, "metadata": {"a": WORDS}},
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi", "tool_calls": WORDS}]}),
        ("/tokenize", {"content": WORDS}),
        ("/apply-template", {"messages": [{"role": "user", "content": WORDS}]}),
        ("/v1/chat/completions", WORDS),
    ],
)
def test_logs_have_no_prompt_and_no_key(
    serving: Serving, caplog: pytest.LogCaptureFixture, path: str, body: Any
) -> None:
    app = app_of(serving, keys=(KEY,))
    with caplog.at_level(logging.DEBUG):
        asked(app, "POST", f"{path}?q={WORDS}&key={KEY}", [("authorization", f"Bearer {KEY}")], body)
        asked(app, "POST", path, [("x-api-key", f"{KEY}x"), ("cookie", WORDS)], body)
    assert path in caplog.text
    assert WORDS not in caplog.text
    assert KEY not in caplog.text


def test_a_line_of_the_log_is_one_line(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "zincmetal"):
        asked(app_of(serving), "GET", "/a%0aFAKE line%1b[31m")
        asked(app_of(serving), "GET\n", "/a")
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("zincmetal")]
    assert lines
    assert all("\x1b" not in line for line in lines)
    assert all("\n" not in line.split(" at\n")[0] for line in lines)
