"""Planner of a model: its configuration, addresses and plans, and the memory that they need."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

from .. import config, gguf, models
from ..config.rope import DIVISORS, LONG_DIVISORS, SHORT_DIVISORS
from ..errors import UnsupportedModelError
from ..graph.builder import Graph
from ..graph.fuse import fuse
from ..graph.ops import HIDDEN, LOGITS, PAGED, RECURRENT, Op, Operand, State, caches_of
from ..models import mtp
from .addresses import AddressMap, Region, Room, pages_of
from .choices import DRAFT
from .chunks import (
    CHUNK_ROWS,
    DECODE_ROWS,
    LOGITS_ROWS,
    MAX_SINGLES,
    ONE_ROW,
    PROMPT_ROWS,
    SEATS,
    StepShape,
    chunk_shape,
    decode_shape,
    rows_for,
)
from .estimate import MemoryEstimate, device_budget
from .lower import Lowering
from .plan import Plan, record
from .target import Target

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,9})\.")  # no more digits than a block's number can have
_OWN_KV = re.compile(r"attn_(k|v|k_norm)\.weight\Z")
# Decode plans are made per maximum position: a plan for short sequences splits attention over fewer threadgroups. The
# position above which a device begins to split (tuning.DIVIDE_KEYS_ABOVE) and the context are maxima too.
MAX_POSITIONS = (1024, 4096)
FIRST_TOKENS, FIRST_SLOTS = 4096, 4  # that the pools have room for at first
LONGER_STEPS = 8  # steps may have more rows than a prompt needs if their arena is at most this share of what is left
MAX_POOL_BYTES = 2**32 - 1  # of a state: kernels count in 32 bits


class Planner:
    """Makes the plans of a file for a target, and estimates the memory that they need. Allocates none itself.

    ``drafts``: the file's block that drafts is run too. Raises GGUFError and UnsupportedModelError for a file that
    cannot be run, DeviceError for a tensor that is larger than the device's largest buffer, UsageError for a file
    without a block that drafts.
    """

    def __init__(
        self, file: gguf.File, target: Target, context: int | None = None, kv: str = "f16", drafts: bool = False
    ) -> None:
        self.file = file
        self._family = models.get(file.require("general.architecture", str))
        self.config = config.from_file(file, self._family.traits, context, drafts)
        if drafts:
            mtp.check(self.config, self._family.block)
        target.check(self.config, file.path)
        if not self.config.causal:
            target = replace(target, least_rows=self.prompt_rows)
        first = Room(self._first_pages(target), FIRST_SLOTS if self.config.recurrent else 0, SEATS)
        self.addresses = AddressMap(file, self.config, target, kv, first)
        self.kv = kv
        self._lowering = Lowering(target, self.config, kv, windows=self.addresses.windows)
        divide_above = target.divide_keys_above
        limits = sorted({divide_above, *MAX_POSITIONS}) if divide_above is not None else ()
        self.max_positions = (*(n for n in limits if n < self.config.n_ctx), self.config.n_ctx)  # one plan for each
        self._plans: dict[tuple[Room, StepShape, int], Plan] = {}
        self._fused: dict[StepShape, list[Op]] = {}
        self._arenas: dict[int, int] = {}
        self._refuse_unused()

    @property
    def prompt_rows(self) -> int:
        """Rows of the largest plan that a prompt of the context needs. If tokens see later ones, it is not divided."""
        n = self.config.n_ctx
        return rows_for(n) if self.config.causal else next((r for r in CHUNK_ROWS if n <= r), CHUNK_ROWS[-1])

    @property
    def target(self) -> Target:
        """Device and kernels that plans are for."""
        return self._lowering.target

    @property
    def missing(self) -> frozenset[str]:
        """Kernels that this device cannot build. Plans use replacements for them."""
        return self.target.missing

    @missing.setter
    def missing(self, kernels: frozenset[str]) -> None:
        self._lowering = replace(self._lowering, target=self.target.without(kernels))
        self._plans.clear()
        self._arenas.clear()

    @property
    def can_draft(self) -> bool:
        """True if the file has a block that drafts, which plans can run."""
        return mtp.can_draft(self.config, self._family.block)

    @property
    def ranked_by_host(self) -> bool:
        """True if the device cannot draw tokens, so that the host must."""
        return self.target.ranked_by_host

    def plan(self, shape: StepShape = ONE_ROW, max_position: int | None = None) -> Plan:
        """Make the plan for steps of a shape before position ``max_position`` (default: the context). They are kept."""
        max_position = max_position or self.config.n_ctx
        key = (self.addresses.room, shape, max_position)
        if key not in self._plans:
            grown = {LOGITS: self.logits_bytes(shape.outs), HIDDEN: self.hidden_bytes(shape.rows)}

            def place(operand: Operand) -> Region:
                if isinstance(operand, State) and operand in grown:
                    return Region(operand.name, 0, grown[operand])
                return self.addresses.place(operand)

            lowering = replace(self._lowering, max_position=max_position)
            paths, slots = self._family.paths, self.addresses.slot_bytes
            self._plans[key] = record(self._ops(shape), shape, lowering, place, paths, slots)
        return self._plans[key]

    def logits_bytes(self, outs: int) -> int:
        """Return the bytes of the logits of ``outs`` outputs."""
        return self.addresses.states[LOGITS] * outs

    def hidden_bytes(self, rows: int) -> int:
        """Return the bytes of ``rows`` rows after the final norm."""
        return self.addresses.states[HIDDEN] * rows

    # ---- memory ------------------------------------------------------------------------------------------------

    def check_memory(self) -> None:
        """Raise OutOfMemoryError, with the numbers, if one sequence of the context does not fit the device's memory."""
        if not self._needed.fits():
            self.memory().check()

    def memory(self, rows: Iterable[int] = PROMPT_ROWS) -> MemoryEstimate:
        """Estimate the memory of one sequence of the context, with plans of these numbers of rows."""
        cfg, states, n_pages = self.config, self.addresses.states, pages_of(self.config, self.target)
        pools = {state: n for state, n in states.items() if state.kind in (*PAGED, *RECURRENT)}
        # Entries of a page of the context: in all tables, and in all descriptions of steps.
        entries = 4 * self.addresses.room.seats
        entries += self.target.shapes["STEP_RING"] * self.target.struct("PageWrite").itemsize
        weights = Counter[str]()
        for t in self.file.tensors.values():
            weights[t.type.name] += t.nbytes
        page_bytes, slot_bytes = self.page_bytes, self.slot_bytes
        others = sum(self.addresses.sizes().values()) - sum(pools.values()) - states[LOGITS]
        return MemoryEstimate(
            n_ctx=cfg.n_ctx,
            n_ctx_train=cfg.n_ctx_train,
            budget=device_budget(self.target.free_bytes),
            weights=weights,
            page=self.target.page,
            kv_page=page_bytes,
            table_page=entries,
            slot=slot_bytes,
            arena={n: self._arena_bytes(n) for n in rows},
            logits=self.logits_bytes(LOGITS_ROWS),
            other=others - entries * n_pages,
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in the pools of all layers, and of its tokens' ids."""
        return sum(n for state, n in self.addresses.states.items() if state.kind in PAGED) // self.addresses.room.pages

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot in the pools of all recurrent layers: 0 if there are none."""
        return sum(self.addresses.slot_bytes.values())

    @cached_property
    def max_rows(self) -> int:
        """Most rows of a step: as many as a prompt of the context needs, more if the memory has room for the arena."""
        memory, most = self._needed, self.prompt_rows
        for rows in CHUNK_ROWS:
            longer = rows > most and rows <= self.target.max_rows
            if longer and self.arena_bound(rows) * LONGER_STEPS <= memory.budget - memory.total:
                most = rows
        return most

    def arena_bound(self, rows: int) -> int:
        """Return about the bytes of the arena of ``rows`` rows, without a plan: values have a size for each row."""
        planned = self.prompt_rows
        return self._arena_bytes(planned) * max(rows, planned) // planned

    def first_room(self) -> Room:
        """Return the sizes of the pools to begin with. They grow when sequences need more."""
        most = self.most_room()
        pages = min(self._first_pages(self.target), most.pages)
        return Room(pages, min(FIRST_SLOTS, most.slots), SEATS)

    def most_room(self, max_sequences: int = 1) -> Room:
        """Return the sizes of the pools that the device's memory allows, for up to so many sequences at a time.

        Pages take what the budget leaves. On hybrids the slots beyond the first take at most half of what one sequence
        of the whole context leaves.
        """
        memory, page, slot = self._needed, self.page_bytes, self.slot_bytes
        larger = max(0, self.arena_bound(self.max_rows) - memory.arena_of(memory.n_ctx))
        free = max(0, memory.budget - memory.total - larger)
        most_bytes = min(MAX_POOL_BYTES, self.target.max_buffer_bytes)
        slots = 0
        if slot:
            slots = min(1 + free // 2 // slot, most_bytes // max(self.addresses.slot_bytes.values()))
            free -= (slots - 1) * slot
        least = pages_of(self.config, self.target)
        pools = [n for state, n in self.addresses.states.items() if state.kind in PAGED]
        most = most_bytes // (max(pools) // self.addresses.room.pages)
        return Room(max(least, min(least + free // page, most)), slots, max(SEATS, max_sequences))

    def resize(self, room: Room) -> None:
        """Make plans for pools of other sizes from now on."""
        self.addresses.room = room
        self.clear()

    def clear(self) -> None:
        """Forget the plans. Each is made again when it is wanted."""
        self._plans.clear()

    @property
    def _needed(self) -> MemoryEstimate:
        """Memory of one sequence. Other plans would take time, and only show which context would fit."""
        return self.memory((1, self.prompt_rows))

    def _first_pages(self, target: Target) -> int:
        return -(-min(self.config.n_ctx, FIRST_TOKENS) // target.page) + 1

    def _arena_bytes(self, rows: int) -> int:
        """Return the bytes of the arena that plans of ``rows`` rows need, for any output.

        The output comes last, when no other value lives. With a large vocabulary and a small model its scratch memory
        can be the largest. So it is planned alone, which takes less time than a second whole plan.
        """
        if rows in self._arenas:
            return self._arenas[rows]
        shapes = [decode_shape(rows)] if rows in DECODE_ROWS else []
        shapes += [chunk_shape(rows, 1, MAX_SINGLES, "argmax")] if rows in CHUNK_ROWS else []
        found = [self.plan(shape).arena_bytes for shape in shapes]
        if self.config.pooling and rows in CHUNK_ROWS:
            found.append(self.plan(chunk_shape(rows, 0, 0, "hidden")).arena_bytes)
        draw = Graph(self.config, self.addresses.weight)
        draw.draw()
        for shape in shapes:
            ends = record(draw.ops, replace(shape, output="draw"), self._lowering, self.addresses.place)
            found.append(ends.arena_bytes)
        self._arenas[rows] = max(found)
        return self._arenas[rows]

    def kv_read(self) -> int:
        """Return the bytes of K/V that the context's last token reads: in each layer all positions, or its window."""
        n, states = self.config.n_ctx, self.addresses.states
        n_rows = self.addresses.room.pages * self.target.page
        return sum(
            states[State(kind, layer.kv_layer)] // n_rows * min(n, layer.window or n)
            for layer in self.config.layers[: self.config.n_layer]
            for kind in caches_of(layer)
        )

    # ---- operations --------------------------------------------------------------------------------------------

    def _ops(self, shape: StepShape) -> list[Op]:
        """Return the fused operations of a step. They are kept, since plans of all maximum positions share them."""
        if shape not in self._fused:
            self._fused[shape] = fuse(self._graph(shape), shape.rows, self.target.fusible)
        return self._fused[shape]

    def _graph(self, shape: StepShape) -> list[Op]:
        g, family = Graph(self.config, self.addresses.weight), self._family
        g.begin()
        if shape.output == DRAFT:
            assert self.config.drafts, "this planner runs no block that drafts"
            assert family.block
            mtp.draft(g, family.block, family.output_norm)
        else:
            self._model(g, shape)
        if shape.output in ("argmax", DRAFT):
            g.argmax()
        elif shape.output == "draw":
            g.draw()
        if shape.verifies:
            g.accept()
        return g.ops

    def _model(self, g: Graph, shape: StepShape) -> None:
        """Append the operations from token ids to the logits of a step's outputs, or to its hidden rows."""
        family, drafts = self._family, self.config.drafts
        x = family.build(g)
        if shape.output == "hidden" or drafts:
            x = g.rms_norm(x, family.output_norm)
        if shape.output == "hidden":
            g.hidden(x)
            return
        if drafts and family.block:
            mtp.prepare(g, family.block, x)
        if shape.outs == 0:
            return
        if not shape.outputs_in_order:
            x = g.out_rows(x)
        g.logits(x if drafts else g.rms_norm(x, family.output_norm))

    def _refuse_unused(self) -> None:
        """Raise UnsupportedModelError if no dispatch reads a tensor: the plans would leave something out."""
        others = ["hidden"] * (self.config.pooling is not None) + [DRAFT] * self.config.drafts
        plans = [self.plan(), *(self.plan(decode_shape(1, output)) for output in others)]
        operands = (arg.operand for plan in plans for d in plan.dispatches for arg in d.launch.args)
        used = {self.addresses.tensor_of(operand) for operand in operands if self.addresses.of_file(operand)}
        unused = sorted(name for name in self.file.tensors.keys() - used if not self._may_be_unused(name))
        if unused:
            shown = ", ".join(map(gguf.plain, unused[:3]))
            raise UnsupportedModelError(
                f"{self.config.arch} as zincmetal computes it has no use for {len(unused)} tensors of this file "
                f"({shown}{', ...' if len(unused) > 3 else ''}); its result would be wrong"
            )

    def _may_be_unused(self, name: str) -> bool:
        """Return True for tensors that plans do not read.

        These are divisors of rotary frequencies, blocks that draft tokens, K/V of blocks that read another block's, and
        scales for activations in NVFP4: here activations stay floats.
        """
        block, layers = _BLOCK.match(name), self.config.layers
        if block is None:
            return name in (DIVISORS, SHORT_DIVISORS, LONG_DIVISORS)
        i = int(block[1])
        if i >= len(layers):
            return i < self.config.n_layer + self.config.n_draft
        return name.endswith(".input_scale") or (layers[i].kv_layer != i and _OWN_KV.search(name) is not None)
