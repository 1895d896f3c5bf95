"""Arena: one buffer for all values of a step. Values whose lifetimes do not overlap share bytes."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.ops import Value
from .chunks import StepShape
from .launch import Launch

ARENA = "arena"
ALIGN = 256  # bytes


def lay_out(launches: Sequence[Launch], shape: StepShape) -> tuple[dict[str, int], int]:
    """Return the offsets of all values by name, and the size of the arena, in bytes.

    A value lives from the launch that writes it to the last launch that reads it. The largest values are placed first,
    and each takes the lowest gap that is free for its lifetime.
    """
    lives: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for i, launch in enumerate(launches):
        for arg in launch.args:
            if isinstance(arg.operand, Value):
                lives.setdefault(arg.operand.name, [i, i])[1] = i
                sizes[arg.operand.name] = value_bytes(arg.operand, shape)
    offsets: dict[str, int] = {}
    laid: list[set[tuple[int, int]]] = [set() for _ in launches]  # by launch: (start, stop) of each living value
    for name in sorted(sizes, key=lambda name: (-sizes[name], lives[name][0])):
        first, last = lives[name]
        at = 0
        for start, stop in sorted(set[tuple[int, int]]().union(*laid[first : last + 1])):
            if at + sizes[name] <= start:
                break
            at = max(at, -(-stop // ALIGN) * ALIGN)
        offsets[name] = at
        for places in laid[first : last + 1]:
            places.add((at, at + sizes[name]))
    return offsets, max((stop for places in laid for _, stop in places), default=0)


def value_bytes(value: Value, shape: StepShape) -> int:
    """Bytes of a value in a step of this shape."""
    return 4 * value.width * (shape.outs if value.outs else shape.rows)
