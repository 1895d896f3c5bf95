"""General kernels in the place of those that a device cannot make.

One rule, wherever a plan is compiled: where that fails, the device is asked for each of its kernels, and those that it
refuses are planned without (``Planner.missing``). What succeeds at once costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from ..errors import DeviceError, KernelError
from ..plan.plan import Plan
from ..plan.planner import Planner
from ..plan.target import RANKING

if TYPE_CHECKING:
    from .. import _core

_log = logging.getLogger(__name__)
Compiled = TypeVar("Compiled")


@dataclass
class KernelFallbacks:
    """What a device refuses to make, in its ``words``, and what does the same ``instead``, both by kernel."""

    device: _core.Device
    words: dict[str, str] = field(default_factory=dict)
    instead: dict[str, list[str]] = field(default_factory=dict)

    def compile(
        self, planner: Planner, plan: Callable[[], Plan], compiled: Callable[[Plan], Compiled]
    ) -> tuple[Plan, Compiled]:
        """``plan()`` of the planner, ``compiled``; of general kernels where the device refuses special ones.

        Raises KernelError where it refuses one that has no other, and what ``compiled`` raises for other reasons.
        """
        known = planner.missing
        while True:
            wanted = plan()
            try:
                result = compiled(wanted)
            except DeviceError as error:
                refused = _refused(self.device, wanted)
                self.words |= refused
                if not refused.keys() <= planner.missing:
                    planner.missing |= refused.keys()
                    continue
                planner.missing = known
                if refused:
                    raise KernelError(str(error), tuple(refused)) from error
                raise
            self.use(wanted.replaced())
            self.use(dict.fromkeys(planner.missing.intersection(RANKING), ("the host's ranking of all logits",)))
            return wanted, result

    def use(self, replaced: Mapping[str, Sequence[str]]) -> None:
        """Remember what is used instead of kernels, and warn of those that are new."""
        for kernel, used in replaced.items():
            if kernel not in self.instead:
                _log.warning("%s; %s in its place, which is slower", self.words[kernel], ", ".join(used))
            self.instead[kernel] = list(dict.fromkeys((*self.instead.get(kernel, ()), *used)))

    def profile(self) -> dict[str, dict[str, object]]:
        """By kernel that is not there: ``why``, and ``by`` what it is replaced."""
        return {kernel: {"why": self.words[kernel], "by": used} for kernel, used in self.instead.items()}


def _refused(device: _core.Device, plan: Plan) -> dict[str, str]:
    """The kernels that the device cannot make, with its words; none where it makes nothing at all."""
    threads = {d.launch.kernel: d.launch.threads for d in plan.dispatches}
    refused, narrow = dict[str, str](), dict[str, str]()
    for kernel, wanted in threads.items():
        try:
            most = device.limits(kernel)[0]
        except DeviceError as error:
            refused[kernel] = str(error)
        else:
            if wanted > most:  # a device may be able to make it anew for as many: no reason while there is a better one
                narrow[kernel] = f"kernel '{kernel}' takes {most} threads, of {wanted}"
    return (refused or narrow) if len(refused) < len(threads) else {}
