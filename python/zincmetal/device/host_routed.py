"""Plans whose experts the host routes, one by one.

They serve types that no batched expert kernel takes, and devices that cannot make the batched kernels. They are correct
and slow: the host must read the chosen experts. So every product of experts is a separate command buffer, and so are
the dispatches before it. :class:`HostRoutedPlan` counts the command buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..graph.ops import Weight
from ..plan.addresses import Region
from ..plan.plan import Dispatch, Plan
from .buffers import BufferOf, bound, compiled
from .core import BoundDispatch, Core

if TYPE_CHECKING:
    from .. import _core


@dataclass
class Counters:
    """Cost of routing by the host so far."""

    steps: int = 0
    command_buffers: int = 0
    dispatches: int = 0


class HostRoutedPlan:
    """Plan compiled in sections, with the products of experts between them.

    ``why`` names the first tensor, or the kernels, that made this necessary.
    """

    def __init__(self, core: Core, device: _core.Device, plan: Plan, buffers: BufferOf, counters: Counters) -> None:
        self._core, self._device, self._buffers = core, device, buffers
        for kernel in dict.fromkeys(d.launch.kernel for d in plan.dispatches):
            device.limits(kernel)  # a kernel that cannot be made shows now, and not in the middle of a step
        *self._sections, last = _sections(plan.dispatches)
        self._last = compiled(replace(plan, dispatches=tuple(last)), core, device, buffers)
        self.counters = counters
        self.why = next(_why(d) for d in plan.dispatches if d.launch.routed)

    def step(
        self,
        steps: _core.Steps,
        rows: NDArray[np.void],
        outs: NDArray[np.uint32],
        page_writes: NDArray[np.void],
        draws: NDArray[np.void] | None,
        n_single: int,
    ) -> tuple[int, NDArray[np.void]]:
        """Run a step and wait; return its number, and a ``Choice`` for each output. Arguments as ``decode_step``.

        Nothing may be in flight. The first section runs ``begin_step``.
        """
        self._core.describe(steps, rows, outs, page_writes, draws, n_single)
        try:
            for section in self._sections:
                self.run_section(section, len(rows))
            number = self._core.submit_described(steps, self._last)
        except BaseException:
            steps.drop()
            raise
        self.counters.steps += 1
        self.counters.command_buffers += 1
        self.counters.dispatches += self._last.n_dispatches
        return number, self._core.collect_step(steps)

    def run_section(self, section: list[Dispatch], n_tokens: int) -> None:
        """Run a section, or one expert product cut up by expert, in one command buffer, and wait."""
        if section[0].launch.routed:
            launches = list(self._expert_products(section[0], n_tokens))
        else:
            launches = [bound(d, self._buffers) for d in section]
        self._device.run(launches)
        self.counters.command_buffers += 1
        self.counters.dispatches += len(launches)

    def _expert_products(self, d: Dispatch, n_tokens: int) -> Iterator[BoundDispatch]:
        """Yield a matrix-vector product for every expert of every row: x · W[e], plus the bias of e if there is one."""
        ids_at, weight_at, x_at, norm_at, *bias_at, out_at = d.regions
        sizes = d.launch.routed
        assert sizes
        count = n_tokens * sizes.n_used
        ids = self._buffers(ids_at.buffer).read(ids_at.offset, 4 * count).view(np.int32)
        for slot, expert in enumerate(ids.tolist()):
            regions = (
                _piece(weight_at, expert, sizes.expert_bytes),
                _piece(x_at, slot // sizes.x_div, 4 * sizes.k),
                norm_at,
                *(_piece(at, expert, 4 * sizes.m) for at in bias_at),
                _piece(out_at, slot, 4 * sizes.m),
            )
            yield bound(replace(d, regions=regions, barrier=False), self._buffers)


Compiled: TypeAlias = "_core.Plan | HostRoutedPlan"


def _sections(dispatches: Sequence[Dispatch]) -> list[list[Dispatch]]:
    """Cut dispatches into runs, with every product of experts alone."""
    sections: list[list[Dispatch]] = [[]]
    for d in dispatches:
        if d.launch.routed:
            sections += [[d], []]
        else:
            sections[-1].append(d)
    return [section for section in sections if section]


def _piece(region: Region, i: int, nbytes: int) -> Region:
    """Return the ``i``-th piece of ``nbytes`` of a region."""
    return Region(region.buffer, region.offset + i * nbytes, nbytes)


def _why(d: Dispatch) -> str:
    if d.launch.replaces:
        return f"kernel {', '.join(d.launch.replaces)} is lacking"
    weight = next(arg.operand for arg in d.launch.args if isinstance(arg.operand, Weight))
    return f"tensor {weight.name} is {weight.type.name}, a type with no batched expert kernel"
