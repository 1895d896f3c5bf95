"""Times of a step's dispatches, by the device's clock."""

from __future__ import annotations

from collections.abc import Sequence

from .. import arguments
from ..device.buffers import bound
from ..device.host_routed import HostRoutedPlan
from ..errors import UsageError, typed_errors
from ..plan.plan import Dispatch
from .engine import shape_of
from .session import Session


@typed_errors
def time_dispatches(
    session: Session, ids: Sequence[int], position: int = 0, copies: int = 1
) -> list[tuple[Dispatch, float]]:
    """Run a step of ``ids`` at ``position``, one dispatch after the other. Return each with its device seconds.

    If ``copies`` is above 1, each dispatch but the first, which begins the step, runs so many times in one command
    buffer, and its mean is returned. The mean leaves out the cost of beginning and ending a command buffer, and finds
    its data in caches. The states before ``position`` are stale memory. Forgets the sequence. Raises UsageError for ids
    that do not fit one step, and if the host routes the experts.
    """
    engine = session.engine
    ids = arguments.token_ids(ids)
    position, copies = arguments.integer("position", position), arguments.integer("copies", copies, 1, 1024)
    engine.check_prompt(ids)
    if len(ids) > engine.max_rows or not 0 <= position <= engine.n_ctx - len(ids):
        limits = f"a step takes up to {engine.max_rows} tokens of a context of {engine.n_ctx}"
        raise UsageError(f"{len(ids)} tokens at {position}: {limits}")
    session.pretend(position)
    try:
        batch = session.built(ids, "argmax")
        program = engine.program(shape_of(batch), position + len(ids) - 1)
        if program.plan.shape.rows < len(ids):
            raise UsageError("this device cannot make kernels of steps of many tokens: time one token")
        if isinstance(program.compiled, HostRoutedPlan):
            raise UsageError(f"{program.compiled.why}: the host routes this model's experts between its dispatches")
        described = engine.describe(batch)
        begin, *others = [bound(d, engine.buffers.buffer) for d in program.plan.dispatches]
        engine.core.describe(engine.steps, *described)
        if copies == 1:
            seconds = engine.device.time_each([begin, *others])
        else:
            seconds = [engine.device.run([begin])]
            seconds += [engine.device.run([d._replace(barrier=True)] * copies) / copies for d in others]
        return list(zip(program.plan.dispatches, seconds, strict=True))
    finally:
        engine.steps.drop()  # the step was described and never submitted
        session.rewind(0)
