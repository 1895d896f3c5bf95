"""End of a plan: the scale and cap of the logits, and the largest logit of each output."""

from __future__ import annotations

from ...graph.ops import Op, Value
from ..launch import Arg, Launch
from .shared import Lowering, lowers, reading, tiles, writing


@lowers("cap_logits")
def cap_logits(lowering: Lowering, op: Op, outs: int) -> list[Launch]:
    """Lower to one kernel, which works in place."""
    n, shapes = lowering.cfg.n_vocab, lowering.target.shapes
    params = lowering.params("LogitParams", n=n, scale=op.attrs["scale"], cap=op.attrs["cap"])
    args = (*reading(op, "step"), Arg(op["logits"], "rw"))
    grid = (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), outs, 1)
    return [Launch(op.kind, params, args, grid, shapes["ELEMENTWISE_THREADS"], op)]


@lowers("argmax")
def argmax(lowering: Lowering, op: Op, outs: int) -> list[Launch]:
    """Find the largest logit of each section of an output's logits, then of all. Its id is what the output chooses."""
    n, shapes = lowering.cfg.n_vocab, lowering.target.shapes
    threads = shapes["ARGMAX_THREADS"]
    n_part = min(tiles(n, shapes["ARGMAX_COLUMNS"]), threads)
    params = lowering.params("ArgmaxParams", n=n, n_part=n_part)
    best, ids = Value("argmax.value", n_part, outs=True), Value("argmax.id", n_part, outs=True)
    first = (*reading(op, "step", "logits"), Arg(best, "w"), Arg(ids, "w"))
    second = (*reading(op, "step"), Arg(best, "r"), Arg(ids, "r"), *writing(op, "chosen", "results"))
    return [
        Launch("argmax_partial", params, first, (n_part, outs, 1), threads, op),
        Launch("argmax_final", params, second, (outs, 1, 1), threads, op),
    ]
