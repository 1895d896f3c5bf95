"""A hub on the loopback device that has files, and that fails in the way that a test asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


class Handler(BaseHTTPRequestHandler):
    """One request. A fault that waits answers in place of the usual answer."""

    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        hub = self.server
        hub.requests.append((self.path, dict(self.headers)))
        listing = self.path.startswith("/api/models/")
        faults = hub.listing_faults if listing else hub.faults
        with suppress(BrokenPipeError, ConnectionResetError):
            if faults:
                faults.popleft()(self)
            elif listing:
                self.send_listing()
            else:
                self.send_file()

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def offset(self) -> int:
        """The first byte that the request asks for."""
        asked = self.headers.get("Range", "bytes=0-")
        return int(asked.removeprefix("bytes=").removesuffix("-"))

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def send_listing(self) -> None:
        repo = self.path.removeprefix("/api/models/").partition("/revision/")[0]
        if repo != self.server.repo:
            self.send(404)
            return
        self.send(200, json.dumps(self.server.listing()).encode())

    def content(self) -> bytes | None:
        name = self.path.removeprefix(f"/{self.server.repo}/resolve/{COMMIT}/")
        return self.server.files.get(name)

    def send_file(self) -> None:
        content = self.content()
        if content is None:
            self.send(404)
        elif self.offset == 0:
            self.send(200, content)
        elif self.offset >= len(content):
            self.send(416)
        else:
            end = f"bytes {self.offset}-{len(content) - 1}/{len(content)}"
            self.send(206, content[self.offset :], Content_Range=end)


Fault = Callable[[Handler], None]


class FakeHub(ThreadingHTTPServer):
    """The server. ``faults`` answer the next requests for files, ``listing_faults`` those for the list of files."""

    daemon_threads = True

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo, self.files = repo, files
        self.sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.faults: deque[Fault] = deque()
        self.listing_faults: deque[Fault] = deque()
        self.released = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def ranges(self) -> list[str]:
        """The ranges that were asked for, of files."""
        return [headers.get("Range", "") for path, headers in self.requests if not path.startswith("/api/")]

    def listing(self) -> dict[str, Any]:
        siblings = [
            {"rfilename": name, "size": len(content), "lfs": {"sha256": self.sums[name], "size": len(content)}}
            for name, content in self.files.items()
        ]
        return {"id": self.repo, "sha": COMMIT, "siblings": [{"rfilename": "README.md", "size": 3}, *siblings]}


@contextmanager
def fake_hub(repo: str, files: dict[str, bytes]) -> Iterator[FakeHub]:
    """Runs the server while the block runs."""
    with FakeHub(repo, files) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.released.set()
            hub.shutdown()
            thread.join()


# ---- faults -----------------------------------------------------------------------------------------------------


def status(code: int, **headers: str) -> Fault:
    """Answers with a status."""
    return lambda handler: handler.send(code, b"no", **headers)


def cut(after: int) -> Fault:
    """Sends some bytes of what was asked for, and closes the connection."""

    def answer(handler: Handler) -> None:
        content = handler.content() or b""
        first = handler.offset
        handler.send_response(206 if first else 200)
        handler.send_header("Content-Length", str(len(content) - first))
        if first:
            handler.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        handler.wfile.write(content[first : first + after])
        handler.close_connection = True

    return answer


def hang(handler: Handler) -> None:
    """Says nothing until the test ends."""
    handler.server.released.wait()
    handler.close_connection = True


def hang_up(handler: Handler) -> None:
    """Closes the connection without an answer."""
    handler.close_connection = True


def redirect(handler: Handler) -> None:
    """Redirects to the same place, and does so again."""
    handler.server.faults.append(redirect)
    handler.send(302, Location=f"{handler.server.address}{handler.path}")


def ignore_range(handler: Handler) -> None:
    """Sends the whole file, whatever was asked for."""
    handler.send(200, handler.content() or b"")


def other_bytes(handler: Handler) -> None:
    """Sends bytes of the right number, and wrong ones."""
    handler.send(200, bytes(len(handler.content() or b"")))


def longer(handler: Handler) -> None:
    """Sends more than the hub told, without saying how much it will be."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write((handler.content() or b"") * 2)
    handler.close_connection = True


def other_length(handler: Handler) -> None:
    """Says another length than the list of files."""
    handler.send(200, b"short")


def other_range(handler: Handler) -> None:
    """Sends another range than was asked for."""
    handler.send(206, b"xyz", Content_Range="bytes 0-2/3")


def says(body: bytes) -> Fault:
    """Answers with any text."""
    return lambda handler: handler.send(200, body)
