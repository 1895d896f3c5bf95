"""Real server on a free port of this machine, in a thread, for clients that speak HTTP."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import TracebackType

from zincmetal.serve.app import make_app
from zincmetal.serve.serving import Serving


class RunningServer:
    """Server of a ``Serving``. A context manager: it ends with the block."""

    def __init__(self, serving: Serving) -> None:
        import uvicorn

        self.serving = serving
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = uvicorn.Config(make_app(serving), log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([listening])))
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
