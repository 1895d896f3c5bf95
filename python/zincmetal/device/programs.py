"""Programs: plans that are ready to run on a device, made at their first use and kept.

:class:`Programs` is the one owner of compiled plans and of their arena. It decides when the device refuses a kernel.
The steps of making a program:

1. ``planner.plan`` makes the plan.
2. The arena grows if the plan needs more. Programs that were compiled on the old arena are dropped.
3. The device compiles the plan.
4. If the device refuses a kernel, the planner plans without that kernel, from 1 on.
5. If a kernel for many rows has no replacement, steps of one row replace the whole program.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ..errors import DeviceError, KernelError
from ..graph.ops import HIDDEN, LOGITS
from ..plan.chunks import OUTS, StepShape, decode_shape
from ..plan.plan import ARENA, Plan
from ..plan.planner import Planner
from ..plan.target import RANKING
from .buffers import Buffers, compiled
from .core import Core
from .fallback import KernelFallbacks
from .host_routed import Compiled, Counters, HostRoutedPlan

if TYPE_CHECKING:
    from .. import _core

ONE_BY_ONE = ("steps of one row",)  # the replacement of a kernel for many rows that has no other replacement


@dataclass(frozen=True)
class Program:
    """Plan, and its form ``compiled`` for a device. It serves rows before position ``max_position``.

    ``plan.shape`` is the shape that was asked for, or that of one row if the device cannot make its kernels.
    """

    plan: Plan
    compiled: Compiled
    max_position: int

    @property
    def why_host_routed(self) -> str | None:
        """First tensor, or the kernels, for which the host must route experts. None if the device routes them."""
        return self.compiled.why if isinstance(self.compiled, HostRoutedPlan) else None


class Programs:
    """Programs of one planner over one set of buffers, by shape and maximum position.

    ``counters`` count the work of the programs whose experts the host routes.
    """

    def __init__(
        self, core: Core, device: _core.Device, planner: Planner, buffers: Buffers, fallbacks: KernelFallbacks
    ) -> None:
        self._core, self._device, self._planner = core, device, planner
        self._buffers, self._fallbacks = buffers, fallbacks
        self._made: dict[tuple[StepShape, int], Program] = {}
        self.counters = Counters()
        buffers.alloc(ARENA, 1)

    def get(self, shape: StepShape, position: int) -> Program:
        """Return the program for a step of a shape whose last row stands at ``position``, or before it.

        Its plan has one row if the device cannot make the kernels of the shape. Raises KernelError if a kernel has no
        replacement, DeviceError if the device refuses memory.
        """
        n_ctx, max_position = self._planner.config.n_ctx, self._planner.config.n_ctx
        if shape.decodes:
            # Short sequences have few keys, which a decode plan of its own divides among fewer threadgroups.
            max_position = next((n for n in self._planner.max_positions if position < n), n_ctx)
        key = (shape, max_position)
        program = self._made.get(key)
        if program is None:
            program = self._make(shape, max_position, position)
            self._made[key] = program  # _make() may have emptied the table, by growing a buffer
        return program

    @property
    def made(self) -> Mapping[tuple[StepShape, int], Program]:
        """Programs that exist now, by (shape, maximum position)."""
        return self._made

    @cached_property
    def draws(self) -> bool:
        """True if the device draws tokens, False if the host must. To know it, this makes a program that draws."""
        self.get(decode_shape(1, "draw"), 0)
        return not self._planner.ranked_by_host

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

    def _make(self, shape: StepShape, max_position: int, position: int) -> Program:
        outs = next(most for most in OUTS if shape.outs <= most)  # in few classes, since a larger buffer drops programs
        self._grow(LOGITS.name, self._planner.logits_bytes(outs))
        if shape.output == "hidden":
            self._grow(HIDDEN.name, self._planner.hidden_bytes(shape.rows))
        try:
            return self._planned(shape, max_position)
        except KernelError as error:
            if shape.rows == 1:
                raise
            single = self.get(decode_shape(1, shape.output), position)
            self._fallbacks.use(dict.fromkeys(error.kernels, ONE_BY_ONE))
            return single

    def _planned(self, shape: StepShape, max_position: int) -> Program:
        """Plan and compile. Kernels that the device refuses are replaced, if they have a replacement."""
        missing_before = self._planner.missing
        while True:
            plan = self._planner.plan(shape, max_position)
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
            self._fallbacks.use(dict.fromkeys(unranked, ("draws by the host",)))
            return Program(plan, made, max_position)

    def _grow(self, name: str, nbytes: int) -> None:
        """Replace a buffer that is smaller. Compiled plans use the old one, so they are dropped."""
        if self._buffers.buffer(name).nbytes < nbytes:
            self._made.clear()
            self._buffers.alloc(name, nbytes)
