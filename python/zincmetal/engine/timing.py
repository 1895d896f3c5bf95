"""Times of a step's dispatches, by the device's clock."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import arguments
from ..device.buffers import bound, step_record
from ..device.host_routed import HostRoutedPlan
from ..errors import UsageError, typed_errors
from ..plan.chunks import PREFILL_ROWS, chunk_rows
from ..plan.plan import Dispatch
from .engine import Engine
from .turn import Turn


@typed_errors
def time_dispatches(
    engine: Engine, ids: Sequence[int], position: int = 0, copies: int = 1
) -> list[tuple[Dispatch, float]]:
    """Run a greedy step of ``ids`` at ``position``, one dispatch after the other. Return each with its device seconds.

    If ``copies`` is above 1, each dispatch runs so many times in one command buffer, and its mean is returned.
    The mean leaves out the cost of beginning and ending a command buffer, and finds its data in caches. The states
    before ``position`` are stale memory. Forgets the sequence. Raises UsageError for ids that do
    not fit one step, and if the host routes the experts.
    """
    ids = arguments.token_ids(ids)
    position, copies = arguments.integer("position", position), arguments.integer("copies", copies, 1, 1024)
    engine.check_prompt(ids)
    n_ctx = engine.config.n_ctx
    if len(ids) > PREFILL_ROWS[-1] or not 0 <= position <= n_ctx - len(ids):
        limits = f"a step takes up to {PREFILL_ROWS[-1]} tokens of a context of {n_ctx}"
        raise UsageError(f"{len(ids)} tokens at {position}: {limits}")
    with Turn(engine):
        engine.rewind(0)
        program = engine.program(chunk_rows(len(ids))[0], "argmax", position)
        plan = program.plan
        if plan.rows < len(ids):
            raise UsageError("this device cannot make kernels of steps of many tokens: time one token")
        if isinstance(program.compiled, HostRoutedPlan):
            raise UsageError(f"{program.compiled.why}: the host routes this model's experts between its dispatches")
        _write_step(engine, ids, position)
        dispatches = [bound(d, engine.buffers.buffer) for d in plan.dispatches]
        if copies == 1:
            return list(zip(plan.dispatches, engine.device.time_each(dispatches), strict=True))
        seconds = []
        for dispatch in dispatches:
            _write_step(engine, ids, position)  # the last dispatch of a step changes it
            seconds.append(engine.device.run([dispatch._replace(barrier=True)] * copies) / copies)
        return list(zip(plan.dispatches, seconds, strict=True))


def _write_step(engine: Engine, ids: list[int], position: int) -> None:
    """Write the step buffer and the tokens as the core does for a step."""
    engine.buffers.buffer("step").write(step_record(engine.core, len(ids), position))
    engine.buffers.buffer("tokens").write(np.array(ids, np.int32))
