"""Chat page: static files of the package, under a policy that lets nothing in from elsewhere."""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
# A model's text could hold scripts, styles, frames and addresses of pictures: none of them may run or be fetched.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "font-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@cache
def files() -> dict[str, Path]:
    """Return the files of the page by their names in addresses. No other file is ever served."""
    found = (path for path in FOLDER.rglob("*") if path.suffix in TYPES)
    return {path.relative_to(FOLDER).as_posix(): path for path in found}


@cache
def _loaded(name: str) -> tuple[bytes, str]:
    """Return the contents of a file, and its entity tag."""
    data = files()[name].read_bytes()
    return data, f'"{blake2b(data, digest_size=12).hexdigest()}"'


def _reply(request: Request, name: str) -> Response:
    data, tag = _loaded(name)
    headers = {**HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=TYPES[Path(name).suffix], headers=headers)


async def index(request: Request) -> Response:
    """Answer with the page."""
    return _reply(request, "index.html")


async def file(request: Request) -> Response:
    """Answer with one of the page's files."""
    name = request.path_params["name"]
    if name not in files():
        raise HTTPException(404)
    return _reply(request, name)


routes = [Route("/", index), Route("/page/{name:path}", file)]
