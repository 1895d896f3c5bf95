"""End of a plan that draws a token for each output: a pass over the logits, the choice, and passes for flat logits."""

from __future__ import annotations

from ...graph.ops import Op, Value
from ..launch import Arg, Launch
from .shared import Lowering, lowers, reading, tiles, writing

_SOURCES = ("step", "logits", "draws", "pages", "history", "biases", "masks")


@lowers("draw")
def draw(lowering: Lowering, op: Op, outs: int) -> list[Launch]:
    """Draw the token of each output, and find its log-probability. No launch if the host draws.

    ``draw_choose`` decides with the largest logits and the sums that ``draw_scan`` finds. Where it cannot, ``draw_try``
    tries tokens one after another, and ``draw_finish`` does the rest. Their threadgroups return at once otherwise.
    """
    if lowering.target.ranked_by_host:
        return []
    n, shapes, struct = lowering.cfg.n_vocab, lowering.target.shapes, lowering.target.struct
    n_part, n_tries, threads = tiles(n, shapes["DRAW_COLUMNS"]), shapes["DRAW_TRIES"], shapes["DRAW_THREADS"]

    def records(name: str, kind: str, count: int) -> Value:
        return Value(name, count * struct(kind).itemsize // 4, outs=True)

    def params(tried: int = 0) -> bytes:
        return lowering.params("DrawParams", n=n, n_part=n_part, tried=tried)

    parts = records("draw.parts", "DrawPart", n_part)
    states = records("draw.states", "DrawState", n_tries + 1)
    tries = records("draw.tries", "DrawTry", n_tries * n_part)
    source, result = reading(op, *_SOURCES), writing(op, "chosen", "results")
    each, all_parts = (outs, 1, 1), (n_part, outs, 1)
    choose = (*source, Arg(parts, "r"), Arg(states, "w"), *result, *writing(op, "logprobs"))
    go_on, finish = (Arg(states, "rw"), Arg(tries, "rw")), (Arg(states, "r"), Arg(tries, "r"))
    return [
        Launch("draw_scan", params(), (*source, Arg(parts, "w")), all_parts, threads, op),
        Launch("draw_choose", params(), choose, each, threads, op),
        *(Launch("draw_try", params(i), (*source, *go_on, *result), all_parts, threads, op) for i in range(n_tries)),
        Launch("draw_finish", params(), (*source, *finish, *result), each, threads, op),
    ]
