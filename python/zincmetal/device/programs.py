"""Programs: plans that are ready to run on a device, made at their first use and kept.

:class:`Programs` is the one owner of compiled plans and of their arena. It decides when the device refuses a kernel.
The steps of making a program:

1. ``planner.plan`` makes the plan.
2. The arena grows if the plan needs more. Programs that were compiled on the old arena are dropped.
3. The device compiles the plan.
4. If the device refuses a kernel, the planner plans without that kernel, from 1 on.
5. If a kernel for many rows has no replacement, steps of one token replace the whole program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DeviceError, KernelError
from ..plan.plan import ARENA, Plan
from ..plan.planner import Planner
from ..plan.target import RANKING
from .buffers import Buffers, compiled
from .core import Core
from .fallback import KernelFallbacks
from .host_routed import Compiled, Counters, HostRoutedPlan

if TYPE_CHECKING:
    from .. import _core

ONE_BY_ONE = ("steps of one token",)  # the replacement of a kernel for many rows that has no other replacement


@dataclass(frozen=True)
class Program:
    """Plan, and its form ``compiled`` for a device. It serves sequences of up to ``max_position`` tokens."""

    plan: Plan
    compiled: Compiled
    max_position: int

    @property
    def why_host_routed(self) -> str | None:
        """First tensor, or the kernels, for which the host must route experts. None if the device routes them."""
        return self.compiled.why if isinstance(self.compiled, HostRoutedPlan) else None


class Programs:
    """Programs of one planner over one set of buffers, by rows, output and maximum position.

    ``counters`` count the work of the programs whose experts the host routes.
    """

    def __init__(
        self, core: Core, device: _core.Device, planner: Planner, buffers: Buffers, fallbacks: KernelFallbacks
    ) -> None:
        self._core, self._device, self._planner = core, device, planner
        self._buffers, self._fallbacks = buffers, fallbacks
        self._made: dict[tuple[int, str, int], Program] = {}
        self.counters = Counters()
        buffers.alloc(ARENA, 1)

    def get(self, rows: int, output: str, position: int) -> Program:
        """Return the program for a step of up to ``rows`` tokens, the first of them at ``position``.

        Its plan has one row if the device cannot make kernels for many. Raises KernelError if a kernel has no
        replacement, DeviceError if the device refuses memory.
        """
        n_ctx = self._planner.config.n_ctx
        # A short sequence has few keys, which a decode plan of its own divides among fewer threadgroups.
        max_position = next((n for n in self._planner.max_positions if position < n), n_ctx) if rows == 1 else n_ctx
        key = (rows, output, max_position)
        program = self._made.get(key)
        if program is None:
            program = self._make(rows, output, max_position, position)
            self._made[key] = program  # _make() may have emptied the table, by growing a buffer
        return program

    @property
    def made(self) -> Mapping[tuple[int, str, int], Program]:
        """Programs that exist now, by (rows, output, maximum position)."""
        return self._made

    @property
    def ranked_by_host(self) -> bool:
        """True if programs with the output "candidates" leave the ranking of logits to the host."""
        return self._planner.ranked_by_host

    def compile(self, plan: Plan) -> Compiled:
        """Compile a plan for the device, over these buffers. Raises DeviceError."""
        self._grow(ARENA, plan.arena_bytes)
        if any(d.launch.routed for d in plan.dispatches):
            return HostRoutedPlan(self._core, self._device, plan, self._buffers.buffer, self.counters)
        return compiled(plan, self._core, self._device, self._buffers.buffer)

    def plan_by(self, planner: Planner) -> None:
        """Make programs by another planner of the same file and context from now on."""
        self._planner = planner
        self.clear()

    def clear(self) -> None:
        """Drop every program. Each is made again at its next use."""
        self._made.clear()

    def _make(self, rows: int, output: str, max_position: int, position: int) -> Program:
        if output == "all":
            self._grow("logits", 4 * rows * self._planner.config.n_vocab)
        try:
            return self._planned(rows, output, max_position)
        except KernelError as error:
            if rows == 1:
                raise
            single = self.get(1, output, position)
            self._fallbacks.use(dict.fromkeys(error.kernels, ONE_BY_ONE))
            return single

    def _planned(self, rows: int, output: str, max_position: int) -> Program:
        """Plan and compile. Kernels that the device refuses are replaced, if they have a replacement."""
        missing_before = self._planner.missing
        while True:
            plan = self._planner.plan(rows, output, max_position)
            try:
                made = self.compile(plan)
            except DeviceError as error:
                refused = self._fallbacks.refused(plan)
                if not self._planner.missing.issuperset(refused):
                    self._planner.missing |= {*refused}
                    continue
                self._planner.missing = missing_before
                if refused:
                    raise KernelError(str(error), refused) from error
                raise
            self._fallbacks.use(plan.replaced())
            unranked = self._planner.missing.intersection(RANKING)
            self._fallbacks.use(dict.fromkeys(unranked, ("the host's ranking of all logits",)))
            return Program(plan, made, max_position)

    def _grow(self, name: str, nbytes: int) -> None:
        """Replace a buffer that is smaller. Compiled plans use the old one, so they are dropped."""
        if self._buffers.buffer(name).nbytes < nbytes:
            self._made.clear()
            self._buffers.alloc(name, nbytes)
