"""Begin of a step: what the host has described becomes what kernels read. And the end of one that verifies drafts."""

from __future__ import annotations

from ...graph.ops import Op
from ..launch import Arg, Launch
from .shared import Lowering, lowers, reading, writing


@lowers("begin")
def begin(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to one threadgroup. It counts the step, and so it reads the number of the step before."""
    target = lowering.target
    params = lowering.params(
        "BeginParams", max_rows=target.max_rows, max_page_writes=target.max_page_writes(lowering.cfg.n_ctx)
    )
    reads = reading(op, "next_step", "next_rows", "next_outs", "next_pages", "next_draws", "chosen", "accepted")
    writes = writing(op, "rows", "tokens", "out_rows")
    args = (*reads, Arg(op["step"], "rw"), *writes, Arg(op["pages"], "rw"), *writing(op, "draws", "history"))
    return [Launch("begin_step", params, args, (1, 1, 1), target.shapes["BEGIN_THREADS"], op)]


@lowers("accept")
def accept(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to one threadgroup, with a thread for each output. Of the results it writes one field."""
    reads = reading(op, "step", "rows", "tokens", "out_rows", "chosen")
    args = (*reads, *writing(op, "accepted"), Arg(op["results"], "rw"))
    params = lowering.params("AcceptParams", outs=lowering.shape.outs)
    threads = lowering.target.shapes["ACCEPT_THREADS"]
    return [Launch("accept_drafts", params, args, (1, 1, 1), threads, op)]
