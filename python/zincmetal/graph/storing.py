"""A pass over operations of which only the effects on states are wanted."""

from __future__ import annotations

from collections.abc import Sequence

from .ops import Op, Operand, Value


def storing(ops: Sequence[Op]) -> list[Op]:
    """Return the operations that states depend on, in order.

    Of a rope_kv whose rotated queries nobody reads, the part that stores keys and values is left.
    """
    kept: list[Op] = []
    wanted: set[Operand] = set()
    for op in reversed(ops):
        if all(isinstance(written, Value) and written not in wanted for written in op.writes):
            continue
        if op.kind == "rope_kv" and op.out not in wanted:
            op = Op("store_kv", **op.but("q", "q_norm", "out"))
        wanted.update(op.reads)
        kept.append(op)
    return kept[::-1]
