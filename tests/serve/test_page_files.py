"""Files of the chat page: what is served, under which policy, and that vendored libraries are what they were."""

from __future__ import annotations

import json
import re
from hashlib import sha256

import httpx
import pytest
from starlette.applications import Starlette

from zincmetal.serve import page

VENDOR = page.FOLDER / "vendor"
SMALL = 400 << 10  # bytes of everything that is loaded without formulas


@pytest.fixture
def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(Starlette(routes=page.routes)), base_url="http://localhost")


def get(client: httpx.AsyncClient, path: str, **headers: str) -> httpx.Response:
    import asyncio

    return asyncio.run(client.get(path, headers=headers))


def test_vendored_files_are_those_of_the_list() -> None:
    table = json.loads((VENDOR / "vendor.json").read_text())
    listed = {name: facts["sha256"] for library in table.values() for name, facts in library["files"].items()}
    found = {p.relative_to(VENDOR).as_posix(): sha256(p.read_bytes()).hexdigest() for p in VENDOR.rglob("*.*")}
    found.pop("vendor.json")
    assert found == listed
    assert all(any(name.endswith("LICENSE") for name in library["files"]) for library in table.values())


def test_what_is_loaded_without_formulas_is_small() -> None:
    sizes = [
        p.stat().st_size for name, p in page.files().items() if "katex" not in name and "fonts/" not in name.lower()
    ]
    assert sum(sizes) < SMALL


def test_every_file_has_the_policy_and_a_tag(client: httpx.AsyncClient) -> None:
    for name in ["/", *(f"/page/{name}" for name in page.files())]:
        reply = get(client, name)
        assert reply.status_code == 200, name
        assert reply.headers["content-security-policy"] == page.POLICY
        assert reply.headers["x-content-type-options"] == "nosniff"
        again = get(client, name, **{"if-none-match": reply.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/nothing.js",
        "/page/../page.py",
        "/page/%2e%2e/page.py",
        "/page/vendor/vendor.json",
        "/page//etc/passwd",
    ],
)
def test_no_other_file_is_served(client: httpx.AsyncClient, path: str) -> None:
    assert get(client, path).status_code == 404


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    html = (page.FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", html)
    own = [p for name, p in page.files().items() if not name.startswith("vendor/")]
    for path in own:
        text = path.read_text()
        assert not re.search(r"https?://(?!www\.w3\.org)", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
