"""Load a model: its file, its engine, and what runs it."""

from __future__ import annotations

import os

from .. import arguments, gguf
from ..device.buffers import Progress
from ..engine.engine import Engine
from ..engine.loaded import Loaded
from ..engine.running import Running
from ..engine.scheduler import QUEUE_LIMIT
from ..errors import typed_errors
from ..hub.lookup import resolve
from .model import Model


@typed_errors
def load(
    path: str | os.PathLike[str],
    *,
    context: int | None = None,
    device: str | None = None,
    kv: str | None = "f16",
    threads: int | None = 0,
    max_sequences: int | None = None,
    queue_limit: int | None = None,
    pool_tokens: int | None = None,
    pool_states: int | None = None,
    cache: bool | None = True,
    cache_dir: str | os.PathLike[str] | None = None,
    exact: bool | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a GGUF file.

    ``path`` is a file, or the name of a model on this machine, as `zincmetal models` lists them.
    ``context`` is the most tokens that a sequence may have (default: 4096, or the context of training if less).
    ``device`` is "metal", "cuda" or "cpu" (default: the best that was built). ``kv`` is the type of the K/V cache:
    "f16", "f32" or "q8_0". ``threads`` is for the CPU (0 = all cores). ``max_sequences`` run at once, others wait
    (default: 32), at most ``queue_limit`` of them (default: 256). ``pool_tokens`` is the most tokens that all sequences
    and the cache have K/V for, ``pool_states`` the most recurrent states of a hybrid (default: what the device's memory
    allows). ``cache`` keeps what was computed of earlier prompts, as long as there is memory; ``cache_dir`` is a folder
    where it is kept across restarts.
    ``exact`` multiplies prompts in floats as well, slowly: GPUs round their operands to halves (default: False, or
    what ``ZINCMETAL_EXACT`` says). ``progress(done, total)`` counts the bytes of weights on the device.
    Raises GGUFError, ModelNotFoundError, UnsupportedModelError, OutOfMemoryError, DeviceError, UsageError.
    """
    queue_limit = arguments.integer("queue_limit", queue_limit, 1, default=QUEUE_LIMIT)
    file = gguf.open(resolve(path))
    try:
        loaded = Loaded(
            file,
            context=context,
            device=device,
            kv=kv,
            threads=threads,
            max_sequences=max_sequences,
            pool_tokens=pool_tokens,
            pool_states=pool_states,
            exact=exact,
            progress=progress,
        )
        folder = None if cache_dir is None else arguments.path(cache_dir)
        return Model(Running(Engine(loaded), arguments.flag("cache", cache, True), folder, queue_limit))
    except BaseException:
        file.close()
        raise
