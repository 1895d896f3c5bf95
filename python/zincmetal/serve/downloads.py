"""Downloads and deletions of models for clients, if the server was started with ``--allow-pull``.

A download runs on a thread that nobody waits for: at the end of the server it stops where it is, and a later one goes
on from there. Its progress is an event of the models, in the state "downloading". When the header has arrived, a
process of its own judges it, as before every load: a model that does not run here is not downloaded to its end.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..errors import UsageError, ZincError, no_thread, quote
from ..hub import pull as hub
from .aside import aside
from .channel import LoadOptions
from .fit import fit
from .known import named
from .remote import RemoteModel
from .residency import ModelStatus, Residency

MOST = 2  # downloads at once
STEP = 0.01  # of a download, between two events

_log = logging.getLogger("zincmetal.serve")


class Downloads:
    """Files of a server's models. All methods are for one asyncio loop."""

    def __init__(self, models: Residency, options: LoadOptions, fetch: Callable[..., Path] = hub.pull) -> None:
        self._models, self._options, self._fetch = models, options, fetch
        self._coming: dict[str, asyncio.Future[None]] = {}

    async def pull(self, name: str) -> None:
        """Begin to download a model by its name. Another download of the same name is that one.

        Raises UsageError, ModelNotFoundError, and DeviceError if the system starts no thread.
        """
        if name in self._coming:
            return
        if len(self._coming) >= MOST:
            raise UsageError(f"{MOST} models are being downloaded; ask again when one of them is here")
        hub.choose(name)  # what is no name is refused at once
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        try:
            threading.Thread(target=self._run, args=(name, loop, done), name="download", daemon=True).start()
        except RuntimeError as error:
            raise no_thread(error) from error
        self._coming[name] = done
        self._models.tell(ModelStatus(name, "downloading"))

    async def wait(self, name: str) -> None:
        """Wait for the end of a download, if there is one of this name."""
        if name in self._coming:
            await asyncio.wait({self._coming[name]})

    def _run(self, name: str, loop: asyncio.AbstractEventLoop, done: asyncio.Future[None]) -> None:
        """Download on this thread."""
        told = 0.0

        def progress(n: int, total: int) -> None:
            nonlocal told
            share = n / max(1, total)
            if share - told >= STEP:
                told = share
                loop.call_soon_threadsafe(self._models.tell, ModelStatus(name, "downloading", share))

        def judge(header: Path) -> None:
            asyncio.run_coroutine_threadsafe(judged(header, self._options), loop).result()

        error: Exception | None = None
        try:
            self._fetch(name, progress, judge)
        except (ZincError, OSError) as failed:
            error = failed
        except Exception as failed:
            _log.exception("the download of %s failed", quote(name))
            error = failed
        try:
            loop.call_soon_threadsafe(partial(self._end, name, done, error))
        except RuntimeError:  # the server has ended
            return

    def _end(self, name: str, done: asyncio.Future[None], error: Exception | None) -> None:
        """Note the end of a download: the model can be asked for from now on."""
        self._coming.pop(name, None)
        if error is None:
            try:
                self._models.add(named(name, self._options))
            except ZincError as failed:
                error = failed
        if error is not None:
            _log.warning("the download of %s failed: %s", quote(name), error)
            self._models.tell(ModelStatus(name, "failed", 0.0, str(error)))
        if not done.done():
            done.set_result(None)

    async def remove(self, name: str) -> None:
        """Delete the files of a model that was downloaded here. Raises UsageError for another, or one in use."""
        path = Path(self._models.path_of(name)).resolve()
        files = await aside(hub.removable, name)
        if path not in [file.resolve() for file in files]:
            raise UsageError(f"{quote(name)} was not downloaded by zincmetal: remove it where it is")
        await self._models.unload(name)
        await aside(hub.remove, files)
        self._models.forget(name)


async def judged(header: Path, options: LoadOptions) -> None:
    """Let a process of its own judge a file without its data.

    Raises GGUFError, UnsupportedModelError, or OutOfMemoryError if it fits with no context.
    """
    process = RemoteModel("download", None, lambda error: None)
    try:
        planned = await process.open(replace(options, path=str(header)))
        fit(planned.estimate, options, planned.budget, alone=True)
    finally:
        await process.close()


__all__ = ["Downloads"]
