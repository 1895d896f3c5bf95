"""Planner of a model: its configuration, addresses and plans, and the memory that they need."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from .. import config, gguf, models
from ..errors import UnsupportedModelError
from ..graph.builder import Graph
from ..graph.fuse import fuse
from ..graph.ops import KV_CACHES, LOGITS, PAGES, RECURRENT, Op, Operand, State
from .addresses import AddressMap, Region, state_sizes
from .chunks import LOGITS_ROWS, PREFILL_ROWS, plan_rows
from .estimate import MemoryEstimate, device_budget
from .lower import Lowering
from .plan import Plan, record
from .target import Target

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,9})\.")  # no more digits than a block's number can have
# Decode plans are made per maximum position: a plan for short sequences splits attention over fewer threadgroups. The
# position above which a device begins to split (tuning.DIVIDE_KEYS_ABOVE) and the context are maxima too.
MAX_POSITIONS = (1024, 4096)


class Planner:
    """Makes the plans of a file for a target, and estimates the memory that they need. Allocates none itself.

    Raises GGUFError and UnsupportedModelError for a file that cannot be run. Raises DeviceError for a tensor that is
    larger than the device's largest buffer.
    """

    def __init__(self, file: gguf.File, target: Target, context: int | None = None, kv: str = "f16") -> None:
        self.file = file
        self._family = models.get(file.require("general.architecture", str))
        self.config = config.from_file(file, self._family.traits, context)
        target.check(self.config, file.path)
        states = state_sizes(self.config, target, kv, max(PREFILL_ROWS))
        self.addresses = AddressMap(file, self.config, states, target)
        self.kv = kv
        self._lowering = Lowering(target, self.config, kv, windows=self.addresses.windows)
        divide_above = target.divide_keys_above
        limits = sorted({divide_above, *MAX_POSITIONS}) if divide_above is not None else ()
        self.max_positions = (*(n for n in limits if n < self.config.n_ctx), self.config.n_ctx)  # one plan for each
        self._plans: dict[tuple[int, str, int], Plan] = {}
        self._fused: dict[tuple[int, str], list[Op]] = {}
        self._refuse_unused(self.plan(1))

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

    @property
    def ranked_by_host(self) -> bool:
        """True if plans with the output "candidates" leave the candidates to the host."""
        return self.target.ranked_by_host

    def plan(self, rows: int, output: str = "argmax", max_position: int | None = None) -> Plan:
        """Make the plan for steps of up to ``rows`` rows before position ``max_position`` (default: the context).

        ``output`` is one of choices.OUTPUTS. Plans are kept.
        """
        max_position = max_position or self.config.n_ctx
        key = (rows, output, max_position)
        if key not in self._plans:
            logits = Region(LOGITS.name, 0, 4 * self.config.n_vocab * (rows if output == "all" else 1))

            def place(operand: Operand) -> Region:
                region = self.addresses.place(operand)
                return logits if region.buffer == logits.buffer else region

            lowering = replace(self._lowering, max_position=max_position)
            self._plans[key] = record(self._ops(rows, output), rows, lowering, place, self._family.paths)
        return self._plans[key]

    def check_memory(self, sequences: int = 1) -> None:
        """Raise OutOfMemoryError, with the numbers, if so many sequences do not fit the device's memory."""
        needed = (1, plan_rows(self.config.n_ctx)[-1])  # other plans take time, and only show which context would fit
        if not self.memory(needed).fits(sequences):
            self.memory().check(sequences)

    def memory(self, rows: Iterable[int] = (1, *PREFILL_ROWS)) -> MemoryEstimate:
        """Estimate the memory of one sequence, with plans of these numbers of rows."""
        cfg = self.config
        kinds = Counter[str]()
        for state, nbytes in self.addresses.states.items():
            kinds[state.kind] += nbytes
        n_pages = -(-cfg.n_ctx // self.target.page)
        kv = sum(kinds[kind] for kind in (*KV_CACHES, PAGES.kind))
        recurrent = sum(kinds[kind] for kind in RECURRENT)
        logits = kinds[LOGITS.kind]
        weights = Counter[str]()
        for t in self.file.tensors.values():
            weights[t.type.name] += t.nbytes
        return MemoryEstimate(
            n_ctx=cfg.n_ctx,
            n_ctx_train=cfg.n_ctx_train,
            budget=device_budget(self.target.free_bytes),
            weights=weights,
            page=self.target.page,
            kv_page=kv // n_pages,
            recurrent=recurrent,
            arena={n: self._arena_bytes(n) for n in rows},
            logits=logits * LOGITS_ROWS,
            other=sum(self.addresses.sizes.values()) - kv - recurrent - logits,
        )

    def _arena_bytes(self, rows: int) -> int:
        """Return the bytes of the arena that plans of ``rows`` rows need, for any output.

        The output comes last, when no other value lives. With a large vocabulary and a small model its scratch memory
        can be the largest. So the candidates are planned alone, which takes less time than a second whole plan.
        """
        ranking = Graph(self.config, self.addresses.weight)
        ranking.candidates()
        candidates = record(ranking.ops, rows, self._lowering, self.addresses.place)
        return max(self.plan(rows).arena_bytes, candidates.arena_bytes)

    def kv_read(self) -> int:
        """Return the bytes of K/V that the context's last token reads: in each layer all positions, or its window."""
        n, states = self.config.n_ctx, self.addresses.states
        n_rows = -(-n // self.target.page) * self.target.page
        return sum(
            states[State(kind, layer)] // n_rows * min(n, window or n)
            for layer, window in enumerate(self.config.windows)
            for kind in KV_CACHES
            if not self.config.recurrent[layer]
        )

    def _ops(self, rows: int, output: str) -> list[Op]:
        """Return the fused operations of a step. They are kept, since plans of all maximum positions share them."""
        if (rows, output) not in self._fused:
            self._fused[rows, output] = fuse(self._graph(rows, output), rows, self.target.fusible)
        return self._fused[rows, output]

    def _graph(self, rows: int, output: str) -> list[Op]:
        g = Graph(self.config, self.addresses.weight)
        x = self._family.build(g)
        if rows > 1 and output != "all":
            x = g.last_row(x)
        g.logits(g.rms_norm(x, "output_norm"))
        if output == "argmax":
            g.argmax()
        elif output == "candidates":
            g.candidates()
        return g.ops

    def _refuse_unused(self, plan: Plan) -> None:
        """Raise UnsupportedModelError if no dispatch reads a tensor: the plan would leave something out."""
        operands = (arg.operand for d in plan.dispatches for arg in d.launch.args)
        used = {self.addresses.tensor_of(operand) for operand in operands if self.addresses.of_file(operand)}
        unused = sorted(name for name in self.file.tensors.keys() - used if not self._may_be_unused(name))
        if unused:
            shown = ", ".join(map(gguf.plain, unused[:3]))
            raise UnsupportedModelError(
                f"{self.config.arch} as zincmetal computes it has no use for {len(unused)} tensors of this file "
                f"({shown}{', ...' if len(unused) > 3 else ''}); its result would be wrong"
            )

    def _may_be_unused(self, name: str) -> bool:
        """Return True for tensors that plans do not read: the source of rope_freqs, and blocks that draft tokens."""
        block, n_layer = _BLOCK.match(name), self.config.n_layer
        drafts = block is not None and n_layer <= int(block[1]) < n_layer + self.config.n_draft
        return drafts or name == "rope_freqs.weight"
