"""Plan: the launches of one step with addresses and barriers, ready to be replayed by ``_core.decode_step``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..graph.ops import Op, Operand, State, Value, Weight
from . import show
from .addresses import Region
from .arena import ARENA, lay_out, value_bytes
from .barriers import hazards, longest_chain, place_barriers
from .chunks import StepShape
from .estimate import in_units
from .launch import Arg, Dispatch
from .lower import Lowering

__all__ = ["ARENA", "Dispatch", "Plan", "record"]

EMBEDDING = "embedding"


@dataclass(frozen=True)
class Plan:
    """Dispatches of a step of a shape, and the arena that they need.

    A plan of 512 rows also serves 37 tokens: kernels read the number from ``Step.n_tokens`` and skip the other
    rows. ``paths`` are (pattern, use) of weights: see models/family.py.
    """

    shape: StepShape
    dispatches: tuple[Dispatch, ...]
    arena_bytes: int
    paths: tuple[tuple[str, str], ...] = ()
    slot_bytes: Mapping[State, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Most rows of a step."""
        return self.shape.rows

    @property
    def n_barriers(self) -> int:
        """Number of barriers in one replay."""
        return sum(d.barrier for d in self.dispatches)

    @property
    def longest_chain(self) -> int:
        """Number of dispatches that must run one after the other, on any device."""
        return longest_chain(self.dispatches)

    def weight_bytes(self) -> Counter[str]:
        """Return the bytes of weights that one step reads, by quant type. See :meth:`weight_reads`."""
        total: Counter[str] = Counter()
        for (_, qtype), nbytes in self.weight_reads().items():
            total[qtype] += nbytes
        return total

    def weight_reads(self) -> Counter[tuple[str, str]]:
        """Return the bytes of weights that one step reads, by (use, quant type), such as ("LM head", "q8_0").

        A weight counts for every dispatch that reads it. An embedding counts the rows that it looks up. A mixture
        counts the experts that it uses, as if all rows chose different experts. Real prompts choose fewer.
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
        """Return the weights that a dispatch reads, and the bytes that it reads of each."""
        weights = dict.fromkeys(arg.operand for arg in d.launch.args if isinstance(arg.operand, Weight))
        return {w: _bytes_read(w, d.launch.op, self.rows) for w in weights}

    def recurrent_bytes(self) -> int:
        """Return the bytes of recurrent state that one step reads and writes: a slot for each single row, or one."""
        slots = self.shape.singles if self.shape.only_singles else 1
        return slots * sum(
            arg.accesses * self.slot_bytes[arg.operand]
            for launch in (d.launch for d in self.dispatches)
            for arg in launch.args
            if isinstance(arg.operand, State) and arg.operand in self.slot_bytes
        )

    def replaced(self) -> dict[str, list[str]]:
        """Return the replacements of each missing kernel in this plan, by its name."""
        found: dict[str, dict[str, None]] = {}
        for launch in (d.launch for d in self.dispatches):
            for missing in launch.replaces:
                found.setdefault(missing, {})[launch.kernel] = None
        return {missing: list(used) for missing, used in found.items()}

    def hazards(self) -> list[tuple[int, int]]:
        """Return pairs of dispatches that conflict without a barrier between them. A correct plan has none."""
        return hazards(self.dispatches)

    def dump(self) -> str:
        """Return the plan as text, one dispatch a line: see show.py."""
        return show.dump(self)

    def to_json(self) -> str:
        """Return the plan as a JSON object: its shape, arena_bytes, dispatches."""
        return show.to_json(self)

    def to_dot(self) -> str:
        """Return the plan as a Graphviz digraph of dispatches."""
        return show.to_dot(self)

    def _repr_html_(self) -> str:
        return show.to_html(self)

    def __repr__(self) -> str:
        n, arena = len(self.dispatches), in_units(self.arena_bytes)
        chain = f"{self.n_barriers} barriers, chain {self.longest_chain}"
        return f"<Plan of {self.shape}: {n} dispatches, {chain}, arena {arena}>"


def record(
    ops: Iterable[Op],
    shape: StepShape,
    lowering: Lowering,
    place: Callable[[Operand], Region],
    paths: tuple[tuple[str, str], ...] = (),
    slot_bytes: Mapping[State, int] | None = None,
) -> Plan:
    """Lower the operations for a shape, lay out their values, and place the barriers.

    ``place(operand)`` returns the region of a weight or a state. ``slot_bytes`` are those of each recurrent state.
    """
    lowering = replace(lowering, shape=shape)
    launches = [launch for op in ops for launch in lowering.launches(op)]
    offsets, arena_bytes = lay_out(launches, shape)

    def region(arg: Arg) -> Region:
        operand = arg.operand
        if isinstance(operand, Value):
            at, skipped = offsets[operand.name], 4 * arg.first
            return Region(ARENA, at + skipped, value_bytes(operand, shape) - skipped)
        whole = place(operand)
        if not arg.first:
            return whole
        return replace(whole, offset=whole.offset + 4 * arg.first, nbytes=whole.nbytes - 4 * arg.first)

    regions = [tuple(region(arg) for arg in launch.args) for launch in launches]
    return Plan(shape, tuple(place_barriers(launches, regions)), arena_bytes, paths, slot_bytes or {})


def _bytes_read(weight: Weight, op: Op, rows: int) -> int:
    """Return the bytes of a weight that an operation on ``rows`` rows reads."""
    whole = weight.type.nbytes(weight.shape)
    if op.kind == "embed":
        return rows * weight.row_bytes
    if op.get("ids") is not None and len(weight.shape) == 3:
        n_expert = weight.shape[0]
        return whole // n_expert * min(n_expert, rows * op.value("ids").width)
    return whole
