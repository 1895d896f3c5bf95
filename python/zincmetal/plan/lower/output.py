"""End of a plan: the largest logit, or the candidates for sampling, each in two launches."""

from __future__ import annotations

from ...graph.ops import Op, Value
from ..launch import Arg, Launch
from .shared import Lowering, lowers, reading, tiles, writing


@lowers("argmax")
def argmax(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Find the largest logit of each section of the logits, then of all. Its id becomes the next step's token."""
    n, shapes = lowering.cfg.n_vocab, lowering.target.shapes
    threads = shapes["ARGMAX_THREADS"]
    n_part = min(tiles(n, shapes["ARGMAX_COLUMNS"]), threads)
    params = lowering.params("ArgmaxParams", n=n, n_part=n_part)
    best, ids = Value("argmax.value", n_part, last=True), Value("argmax.id", n_part, last=True)
    first = (*reading(op, "logits"), Arg(best, "w"), Arg(ids, "w"))
    second = (Arg(op["step"], "rw"), *writing(op, "tokens"), Arg(best, "r"), Arg(ids, "r"))
    return [
        Launch("argmax_partial", params, first, (n_part, 1, 1), threads, op),
        Launch("argmax_final", params, second, (1, 1, 1), threads, op),
    ]


@lowers("candidates")
def candidates(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Find the candidates of each section of the logits, then of all. No launch if the host finds them."""
    if lowering.target.ranked_by_host:
        return []
    n, shapes = lowering.cfg.n_vocab, lowering.target.shapes
    n_part = tiles(n, shapes["CANDIDATES_COLUMNS"])
    params = lowering.params("CandidatesParams", n=n, n_part=n_part)
    parts = Value("candidates.parts", n_part * lowering.target.struct("Candidates").itemsize // 4, last=True)
    first, second = (*reading(op, "logits"), Arg(parts, "w")), (Arg(parts, "r"), *writing(op, "candidates"))
    return [
        Launch("candidates_partial", params, first, (n_part, 1, 1), shapes["CANDIDATES_THREADS"], op),
        Launch("candidates_final", params, second, (1, 1, 1), shapes["CANDIDATES_FINAL_THREADS"], op),
    ]
