"""Server: starts sockets, models and HTTP, and ends them in order.

The end has three stages. The first signal *drains*: new requests are refused, running ones go on. After ``drain``
seconds, or at the second signal, the models are closed, and requests that still run end with an error that clients see.
Then HTTP ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from .. import settings
from ..device import backend as devices
from ..device.lock import lock_device
from ..errors import UsageError
from . import listen
from .app import make_app
from .backend import ModelCard
from .channel import LoadOptions
from .connection import uvicorn_options
from .downloads import Downloads
from .fit import Fit
from .known import known
from .listed import Listed
from .metrics import Metrics
from .residency import ModelStatus, Residency
from .serving import Access, Limits, Serving

LAST_WORDS = 5  # seconds for the last bytes of replies

_log = logging.getLogger("zincmetal.serve")


@dataclass(frozen=True)
class Options:
    """Options of a server. ``models``, ``listed`` and ``folders``: see ``known``.

    ``load`` has the options of every model; its path is filled in, and its ``cache_dir`` "" keeps prompts in memory
    only. ``port`` 0 takes any that is free. ``lazy`` loads no model before the first request. ``any_model``: an unknown
    name stands for the default model. ``allow_pull``: clients may download models and delete them. ``llama_metrics``,
    ``vllm_metrics``: metrics also have their names.
    """

    models: tuple[str, ...] = ()
    listed: tuple[Listed, ...] = ()
    folders: tuple[str, ...] = ()
    load: LoadOptions = field(default_factory=lambda: LoadOptions(""))
    ttl: float | None = None
    lazy: bool = False
    any_model: bool = False
    host: str = "127.0.0.1"
    port: int = listen.PORT
    unix_socket: str | None = None
    api_key_file: str | None = None
    no_auth: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    certificate: str | None = None
    private_key: str | None = None
    allow_pull: bool = False
    llama_metrics: bool = False
    vllm_metrics: bool = False
    lock: bool = True
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Ready:
    """Server that runs: where it is, and what its default model got. ``fit`` is None if nothing is loaded yet."""

    url: str
    models: Sequence[ModelCard]
    fit: Fit | None
    with_key: bool
    pid: int = field(default_factory=os.getpid)


class Server:
    """Server that :meth:`run` runs until :meth:`stop` is called, or a signal comes."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.serving: Serving | None = None  # once it has begun
        self._stops = [asyncio.Event(), asyncio.Event()]  # to drain, and to end at once

    def stop(self) -> None:
        """Drain and end; called again: end at once."""
        next((event for event in self._stops if not event.is_set()), self._stops[-1]).set()

    async def run(
        self,
        on_ready: Callable[[Ready], None] = lambda ready: None,
        on_status: Callable[[ModelStatus], None] = lambda status: None,
    ) -> None:
        """Serve until the end. ``on_ready`` is called when requests are answered, ``on_status`` while models load.

        Raises UsageError, DeviceError, or what made the load of the first model fail.
        """
        options = self._options
        keys = listen.keys_of(options.api_key_file)
        allowed = listen.access(options.host, keys, options.no_auth or bool(options.unix_socket), *_names(options))
        named = known(options.models, options.folders, options.load, options.ttl, options.listed)
        models = Residency(named, any_name=options.any_model)
        with ExitStack() as stack:
            if options.lock:
                stack.enter_context(lock_device(devices.choose(options.load.device)))
            listening = stack.enter_context(_listening(options))
            stack.enter_context(self._signals())
            await self._serve(models, allowed, listening, on_ready, on_status)

    async def _serve(
        self,
        models: Residency,
        allowed: Access,
        listening: socket.socket,
        on_ready: Callable[[Ready], None],
        on_status: Callable[[ModelStatus], None],
    ) -> None:
        options = self._options
        metrics = Metrics(options.llama_metrics, options.vllm_metrics)
        files = Downloads(models, options.load) if options.allow_pull else None
        serving = self.serving = Serving(models, options.limits, allowed, metrics=metrics, files=files)
        config = _config(serving, options)
        try:
            config.load()
        except OSError as error:  # ssl's errors too
            raise UsageError(f"the certificate {options.certificate} is not used: {error.strerror or error}") from error
        http = _Http(config)
        told = asyncio.ensure_future(_tell(models, metrics, on_status))
        read = asyncio.ensure_future(models.read_files(first_is_loaded=not options.lazy))
        served = asyncio.ensure_future(http.serve([listening]))
        try:
            fit = None
            if not options.lazy:
                fit = await self._unless_stopped(_first(models), served)
            if not self._stops[0].is_set():
                url = listen.url_of(listening, bool(options.certificate), options.host)
                on_ready(Ready(url, models.cards(), fit, bool(allowed.keys)))
                await self._unless_stopped(asyncio.sleep(float("inf")), served)
            await self._drained(serving, models)
        finally:
            serving.draining = True
            await models.close()
            told.cancel()
            read.cancel()
            http.should_exit = True
            http.force_exit = self._stops[1].is_set()
            await asyncio.gather(told, read, served, return_exceptions=True)

    async def _unless_stopped(self, work: Any, served: asyncio.Future[None]) -> Any:
        """Wait for work; None if the server is to end first. Raises what ended HTTP."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._stops[0].wait())
        try:
            await asyncio.wait({task, stop, served}, return_when=asyncio.FIRST_COMPLETED)
            if served.done():
                served.result()
                raise UsageError("the HTTP server has ended")
            return task.result() if task.done() else None
        finally:
            stop.cancel()
            task.cancel()
            await asyncio.gather(stop, task, return_exceptions=True)

    async def _drained(self, serving: Serving, models: Residency) -> None:
        """Let running requests end, for a while."""
        serving.draining = True
        if models.busy:
            _log.warning("requests that run: %d; they have %g s to end", models.busy, serving.limits.drain)
        idle, now = asyncio.ensure_future(models.when_idle()), asyncio.ensure_future(self._stops[1].wait())
        await asyncio.wait({idle, now}, timeout=serving.limits.drain, return_when=asyncio.FIRST_COMPLETED)
        for task in (idle, now):
            task.cancel()
        await asyncio.gather(idle, now, return_exceptions=True)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Take the signals that end a server. Elsewhere than on the main thread there are none."""
        loop, taken = asyncio.get_running_loop(), list[signal.Signals]()
        try:
            with suppress(RuntimeError, ValueError):
                for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    if signal.getsignal(each) != signal.SIG_IGN:  # as nohup sets it
                        loop.add_signal_handler(each, self.stop)
                        taken.append(each)
            yield
        finally:
            for each in taken:
                loop.remove_signal_handler(each)


class _Http(uvicorn.Server):
    """Uvicorn without its own signals: the end of a server is ours."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take no signals."""
        yield


def _config(serving: Serving, options: Options) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(serving),
        loop="asyncio",
        lifespan="off",
        backlog=listen.BACKLOG,
        timeout_graceful_shutdown=LAST_WORDS,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.private_key,
        **uvicorn_options(options.limits),
    )


def _names(options: Options) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return options.hosts, options.origins


@contextmanager
def _listening(options: Options) -> Iterator[socket.socket]:
    path = options.unix_socket
    opened = listen.unix(path) if path else listen.tcp(options.host, options.port)
    with opened:
        yield opened
    if path:
        with suppress(OSError):
            os.unlink(path)


async def _first(models: Residency) -> Fit | None:
    """Load the default model. Raises what made it fail."""
    await models.load("")
    return models.fit_of("")


async def _tell(models: Residency, metrics: Metrics, on_status: Callable[[ModelStatus], None]) -> None:
    """Count the loads of models, whoever asked for them, and tell of all changes."""
    before: dict[str, str] = {}
    async for status in models.changes():
        if status.state in ("loaded", "failed") and before.get(status.id) != status.state:
            metrics.loads.labels(status.id, status.state).inc()
        before[status.id] = status.state
        on_status(status)


def cache_folder() -> str:
    """Return the folder where servers keep prompts by default, of this user alone."""
    folder: Path = settings.prompts_folder()
    return str(folder)


def serve(
    options: Options,
    on_ready: Callable[[Ready], None] = lambda ready: None,
    on_status: Callable[[ModelStatus], None] = lambda status: None,
) -> None:
    """Run a server until a signal ends it. Raises as :meth:`Server.run`."""

    async def run() -> None:
        await Server(options).run(on_ready, on_status)

    asyncio.run(run())


__all__ = ["Limits", "LoadOptions", "Options", "Ready", "Server", "cache_folder", "serve"]
