"""Model file on a device, shared by an engine and its forks."""

from __future__ import annotations

from dataclasses import replace

from .. import arguments, gguf, settings
from ..device import backend
from ..device.buffers import Progress, map_weights
from ..device.fallback import KernelFallbacks
from ..errors import UsageError
from ..plan.addresses import Room
from ..plan.choices import KV_TYPES
from ..plan.planner import Planner
from ..plan.target import Target

MAX_THREADS = 1024
MIN_STATES = 2  # slots: of a sequence, and of a step before it can write to it in place
MAX_SEQUENCES, USUAL_SEQUENCES = 4096, 32  # that run at once


class Loaded:
    """File, the device that runs it, its weights as device buffers, and its planner.

    Raises UsageError for a wrong argument, UnsupportedModelError, OutOfMemoryError, DeviceError.
    """

    def __init__(
        self,
        file: gguf.File,
        *,
        context: int | None = None,
        device: str | None = None,
        kv: str | None = "f16",
        threads: int | None = 0,
        max_sequences: int | None = None,
        pool_tokens: int | None = None,
        pool_states: int | None = None,
        exact: bool | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.kv = arguments.choice("kv", kv, KV_TYPES, "f16")
        threads = arguments.integer("threads", threads, 0, MAX_THREADS, 0, "0 = all cores")
        self.max_sequences = arguments.integer("max_sequences", max_sequences, 1, MAX_SEQUENCES, USUAL_SEQUENCES)
        self.pool_tokens = None if pool_tokens is None else arguments.integer("pool_tokens", pool_tokens, 1)
        self.pool_states = None if pool_states is None else arguments.integer("pool_states", pool_states, MIN_STATES)
        exact = arguments.flag("exact", exact, settings.exact())
        context = None if context is None else arguments.integer("context", context, 1)
        device = None if device is None else arguments.text("device", device)
        arguments.callback("progress", progress)
        self.file = file
        self.core, self.device = backend.open_device(device, threads)
        target = replace(Target.of(self.core, self.device.info), exact=exact)
        self.planner = Planner(file, target, context, self.kv)
        self.planner.check_memory()
        self._check_pools()
        self.fallbacks = KernelFallbacks(self.device)
        self.weights = map_weights(self.device, file, self.planner.addresses, progress)

    def with_block(self) -> Planner:
        """Make a planner that runs the file's block that drafts, too. Raises as ``Planner`` and its check of memory."""
        planner = Planner(self.file, self.planner.target, self.planner.config.n_ctx, self.kv, drafts=True)
        planner.check_memory()
        return planner

    def most_room(self) -> Room:
        """Return the sizes that the pools may grow to: by the device's memory, or less where the caller said so."""
        most, page = self.planner.most_room(self.max_sequences), self.planner.target.page
        pages = most.pages if self.pool_tokens is None else min(most.pages, -(-self.pool_tokens // page))
        slots = most.slots if self.pool_states is None else min(most.slots, self.pool_states)
        return replace(most, pages=pages, slots=slots)

    def _check_pools(self) -> None:
        """Raise UsageError for a pool that could not hold one sequence of the context."""
        n_ctx = self.planner.config.n_ctx
        if self.pool_tokens is not None and self.pool_tokens < n_ctx:
            raise UsageError(
                f"pool_tokens is {self.pool_tokens}, and one sequence may have {n_ctx} tokens: let the pool hold as "
                "many, or load the model with a smaller context"
            )

    def free(self) -> None:
        """Give the weights and the file back."""
        self.weights.clear()
        self.file.close()
