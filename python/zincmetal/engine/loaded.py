"""Model file on a device, shared by an engine and its forks."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from .. import arguments, gguf
from ..device import backend
from ..device.buffers import Progress, map_weights
from ..device.fallback import KernelFallbacks
from ..plan.choices import KV_TYPES
from ..plan.planner import Planner
from ..plan.target import Target

if TYPE_CHECKING:
    from .engine import Engine

MAX_THREADS = 1024


class Loaded:
    """File, the device that runs it, its weights as device buffers, and its planner. Engines share one.

    ``engines`` are its users. The last engine to release it gives the weights and the file back. Raises UsageError
    for a wrong argument, UnsupportedModelError, OutOfMemoryError, DeviceError.
    """

    def __init__(
        self,
        file: gguf.File,
        *,
        context: int | None = None,
        device: str | None = None,
        kv: str | None = "f16",
        threads: int | None = 0,
        progress: Progress | None = None,
    ) -> None:
        self.kv = arguments.choice("kv", kv, KV_TYPES, "f16")
        threads = arguments.integer("threads", threads, 0, MAX_THREADS, 0, "0 = all cores")
        context = None if context is None else arguments.integer("context", context, 1)
        device = None if device is None else arguments.text("device", device)
        arguments.callback("progress", progress)
        self.file = file
        self.core, self.device = backend.open_device(device, threads)
        self.planner = Planner(file, Target.of(self.core, self.device.info), context, self.kv)
        self.planner.check_memory()
        self.fallbacks = KernelFallbacks(self.device)
        self.weights = map_weights(self.device, file, self.planner.addresses, progress)
        self.engines: weakref.WeakSet[Engine] = weakref.WeakSet()  # one that was dropped unclosed does not count

    def release(self, engine: Engine) -> None:
        """Note that an engine does not use the model any more."""
        self.engines.discard(engine)
        if not self.engines:
            self.weights.clear()
            self.file.close()
