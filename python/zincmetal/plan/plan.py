"""A plan: the launches of one step with addresses and barriers, ready to be replayed by ``_core.decode_step``.

Values share one arena by lifetime; a barrier stands before a launch that reads or overwrites bytes which an
earlier launch since the last barrier wrote, or overwrites bytes which one read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from ..graph.ops import RECURRENT, Op, Operand, State, Value, Weight
from .addresses import Region
from .launch import Arg, Dispatch, Launch
from .lower import Lowering

if TYPE_CHECKING:
    from .. import _core
    from ..device.core import BoundDispatch, Core

__all__ = ["ARENA", "Dispatch", "Plan", "lay_out", "place_barriers", "ready", "record"]

ARENA = "arena"
_ALIGN = 256
EMBEDDING = "embedding"


@dataclass(frozen=True)
class Plan:
    """The dispatches of a step of up to ``rows`` rows, and the arena that they need.

    A step has ``Step.n_tokens`` tokens, which the kernels read: a plan of 512 rows serves 37 tokens, and kernels leave
    the other rows alone. ``paths`` name the use of a weight by a pattern of its name: see models/family.py.
    """

    rows: int
    dispatches: tuple[Dispatch, ...]
    arena_bytes: int
    paths: tuple[tuple[str, str], ...] = ()

    @property
    def n_barriers(self) -> int:
        """Barriers of one replay."""
        return sum(d.barrier for d in self.dispatches)

    def weight_bytes(self) -> Counter[str]:
        """Bytes of weights that one step reads, by quant type; see :meth:`weight_reads`."""
        total: Counter[str] = Counter()
        for (_, qtype), nbytes in self.weight_reads().items():
            total[qtype] += nbytes
        return total

    def weight_reads(self) -> Counter[tuple[str, str]]:
        """Bytes of weights that one step reads, by (path, quant type): ("LM head", "q8_0"), ….

        Each weight counts once for every dispatch that reads it. An embedding counts the rows that it looks up, a
        mixture the experts that it uses: all different, where several rows choose them, and never more than there
        are. Real prompts choose fewer.
        """
        total: Counter[tuple[str, str]] = Counter()
        for d in self.dispatches:
            for w, nbytes in self.weights_of(d).items():
                total[self._path(w, d.launch.op), w.type.name] += nbytes
        return total

    def _path(self, weight: Weight, op: Op) -> str:
        if op.kind == "embed":
            return EMBEDDING
        return next((path for pattern, path in self.paths if re.search(pattern, weight.name)), "other")

    def weights_of(self, d: Dispatch) -> dict[Weight, int]:
        """The weights that one dispatch reads, with the bytes of them that it reads."""
        weights = dict.fromkeys(arg.operand for arg in d.launch.args if isinstance(arg.operand, Weight))
        return {w: _bytes_read(w, d.launch.op, self.rows) for w in weights}

    def recurrent_bytes(self) -> int:
        """Bytes of recurrent state that one step reads and writes."""
        return sum(
            arg.accesses * region.nbytes
            for d in self.dispatches
            for arg, region in zip(d.launch.args, d.regions, strict=True)
            if isinstance(arg.operand, State) and arg.operand.kind in RECURRENT
        )

    def replaced(self) -> dict[str, list[str]]:
        """By missing kernel, the kernels that do its work in this plan."""
        found: dict[str, dict[str, None]] = {}
        for launch in (d.launch for d in self.dispatches):
            for missing in launch.replaces:
                found.setdefault(missing, {})[launch.kernel] = None
        return {missing: list(used) for missing, used in found.items()}

    def dump(self) -> str:
        """The plan as text, one dispatch a line: barrier, kernel, grid, and its operands with their regions.

        What is there because the device lacks a kernel says so.
        """
        lines = [
            f"plan for {self.rows} rows: {len(self.dispatches)} dispatches, {self.n_barriers} barriers, "
            f"arena {self.arena_bytes} bytes"
        ]
        for i, d in enumerate(self.dispatches):
            args = " ".join(
                f"{arg.mode}:{arg.operand.name}@{r.buffer}+{r.offset}:{r.nbytes}"
                for arg, r in zip(d.launch.args, d.regions, strict=True)
            )
            mark = "|" if d.barrier else " "
            note = f" instead of {', '.join(d.launch.replaces)}" if d.launch.replaces else ""
            grid = f"{d.launch.grid!s:14s} x{d.launch.threads:<4d}"
            lines.append(f"{i:4d} {mark} {d.launch.kernel:28s} {grid} {args}{note}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as a JSON object: rows, arena_bytes, dispatches (kernel and what it is there instead of, grid,
        threads, barrier, args)."""
        dispatches = [
            {
                "kernel": d.launch.kernel,
                "instead_of": d.launch.replaces,
                "grid": d.launch.grid,
                "threads": d.launch.threads,
                "barrier": d.barrier,
                "args": [
                    {
                        "name": a.operand.name,
                        "mode": a.mode,
                        "buffer": r.buffer,
                        "offset": r.offset,
                        "nbytes": r.nbytes,
                    }
                    for a, r in zip(d.launch.args, d.regions, strict=True)
                ],
            }
            for d in self.dispatches
        ]
        return json.dumps({"rows": self.rows, "arena_bytes": self.arena_bytes, "dispatches": dispatches})

    def to_dot(self) -> str:
        """The plan as a Graphviz digraph: an arrow from each dispatch to those that need its bytes."""
        lines = ["digraph plan {", "  node [shape=box, fontname=monospace];"]
        for i, d in enumerate(self.dispatches):
            lines.append(f'  d{i} [label="{i} {d.launch.kernel}\\n{d.launch.op.out.name}"];')
            lines += [f"  d{j} -> d{i};" for j in self._producers(i)]
        return "\n".join([*lines, "}"])

    def _producers(self, i: int) -> list[int]:
        """The latest earlier dispatches that wrote what dispatch ``i`` reads."""
        found = set()
        for region in self.dispatches[i].touching("r"):
            for j in range(i - 1, -1, -1):
                if any(region.overlaps(w) for w in self.dispatches[j].touching("w")):
                    found.add(j)
                    break
        return sorted(found)

    def hazards(self) -> list[tuple[int, int]]:
        """Pairs of dispatches that conflict with no barrier between: a right plan has none."""
        found, since = [], 0
        for i, d in enumerate(self.dispatches):
            since = i if d.barrier else since
            found += [(j, i) for j in range(since, i) if _conflict(self.dispatches[j], d)]
        return found

    def compile(self, core: Core, device: _core.Device, buffers: Callable[[str], _core.Buffer]) -> _core.Plan:
        """The plan on a device; ``buffers`` maps the names in regions to device memory."""
        launches = [ready(d, buffers) for d in self.dispatches]
        has_argmax = any(d.launch.op.kind == "argmax" for d in self.dispatches)
        return core.Plan(device, launches, self.rows, has_argmax)


def ready(d: Dispatch, buffers: Callable[[str], _core.Buffer]) -> BoundDispatch:
    """A dispatch as a compiled core takes it."""
    bindings = [(buffers(r.buffer), r.offset, r.nbytes) for r in d.regions]
    bound = d.launch.kernel, d.launch.params, bindings, d.launch.grid, d.launch.threads, d.barrier
    return cast("BoundDispatch", bound)


def record(
    ops: Iterable[Op],
    rows: int,
    lowering: Lowering,
    place: Callable[[Operand], Region],
    paths: tuple[tuple[str, str], ...] = (),
) -> Plan:
    """Lower the operations for ``rows`` rows, lay out their values, and place the barriers.

    ``place(operand)`` gives the region of a weight or a state.
    """
    launches = [launch for op in ops for launch in lowering.launches(op, rows)]
    offsets, arena_bytes = lay_out(launches, rows)

    def region(arg: Arg) -> Region:
        operand = arg.operand
        if isinstance(operand, Value):
            at, skipped = offsets[operand.name], 4 * arg.first
            return Region(ARENA, at + skipped, _value_bytes(operand, rows) - skipped)
        whole = place(operand)
        if not arg.first:
            return whole
        return replace(whole, offset=whole.offset + 4 * arg.first, nbytes=whole.nbytes - 4 * arg.first)

    regions = [tuple(region(arg) for arg in launch.args) for launch in launches]
    return Plan(rows, tuple(place_barriers(launches, regions)), arena_bytes, paths)


def lay_out(launches: Sequence[Launch], rows: int) -> tuple[dict[str, int], int]:
    """Offsets of all values in the arena, and its size: a value takes the lowest gap free for its lifetime."""
    lives: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for i, launch in enumerate(launches):
        for arg in launch.args:
            if isinstance(arg.operand, Value):
                lives.setdefault(arg.operand.name, [i, i])[1] = i
                sizes[arg.operand.name] = _value_bytes(arg.operand, rows)
    offsets: dict[str, int] = {}
    laid: list[set[tuple[int, int]]] = [set() for _ in launches]  # by launch: the places, from and to, of what lives
    for name in sorted(sizes, key=lambda name: (-sizes[name], lives[name][0])):
        first, last = lives[name]
        at = 0
        for start, stop in sorted(set[tuple[int, int]]().union(*laid[first : last + 1])):
            if at + sizes[name] <= start:
                break
            at = max(at, -(-stop // _ALIGN) * _ALIGN)
        offsets[name] = at
        for places in laid[first : last + 1]:
            places.add((at, at + sizes[name]))
    return offsets, max((stop for places in laid for _, stop in places), default=0)


def place_barriers(launches: Sequence[Launch], regions: Sequence[tuple[Region, ...]]) -> list[Dispatch]:
    """Each launch with a barrier before it where it conflicts with a launch since the last barrier."""
    out: list[Dispatch] = []
    since = 0
    for launch, at in zip(launches, regions, strict=True):
        d = Dispatch(launch, at, barrier=False)
        if any(_conflict(earlier, d) for earlier in out[since:]):
            d = Dispatch(launch, at, barrier=True)
            since = len(out)
        out.append(d)
    return out


def _conflict(earlier: Dispatch, later: Dispatch) -> bool:
    """Read after write, write after read, or write after write, on a shared byte."""
    return (
        _any_overlap(earlier.touching("w"), later.touching("r"))
        or _any_overlap(earlier.touching("r"), later.touching("w"))
        or _any_overlap(earlier.touching("w"), later.touching("w"))
    )


def _any_overlap(a: Sequence[Region], b: Sequence[Region]) -> bool:
    return any(x.overlaps(y) for x in a for y in b)


def _value_bytes(value: Value, rows: int) -> int:
    return 4 * value.width * (1 if value.last else rows)


def _bytes_read(weight: Weight, op: Op, rows: int) -> int:
    """Bytes of a weight that an operation on ``rows`` rows reads."""
    whole = weight.type.nbytes(weight.shape)
    if op.kind == "embed":
        return rows * weight.row_bytes
    if op.kind.startswith("experts") and len(weight.shape) == 3:
        n_expert = weight.shape[0]
        return whole // n_expert * min(n_expert, rows * op.value("ids").width)
    return whole
