"""General kernels in the place of special ones that a device cannot make.

:class:`~zincmetal.device.programs.Programs` asks here when a plan does not compile: the device is asked for each of the
plan's kernels, and the plan is made again without the refused ones. A plan that compiles at once costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import DeviceError
from ..plan.plan import Plan

if TYPE_CHECKING:
    from .. import _core

_log = logging.getLogger("zincmetal.device")


@dataclass
class KernelFallbacks:
    """The kernels that a device refuses to make, by name: its ``messages``, and the ``replacements`` in use."""

    device: _core.Device
    messages: dict[str, str] = field(default_factory=dict)
    replacements: dict[str, list[str]] = field(default_factory=dict)

    def refused(self, plan: Plan) -> tuple[str, ...]:
        """Ask the device for each kernel of a plan: the names of the refused ones, whose messages are kept.

        Empty where the device makes no kernel at all: then no kernel is the reason.
        """
        threads = {d.launch.kernel: d.launch.threads for d in plan.dispatches}
        refused, narrow = dict[str, str](), dict[str, str]()
        for kernel, wanted in threads.items():
            try:
                most = self.device.limits(kernel)[0]
            except DeviceError as error:
                refused[kernel] = str(error)
            else:
                # The device may yet make the kernel anew for as many: blamed only where nothing else is.
                if wanted > most:
                    narrow[kernel] = f"kernel '{kernel}' takes {most} threads, of {wanted}"
        if len(refused) == len(threads):
            return ()
        found = refused or narrow
        self.messages |= found
        return tuple(found)

    def use(self, replaced: Mapping[str, Sequence[str]]) -> None:
        """Remember the kernels used in the place of others; warn once for each kernel replaced."""
        for kernel, used in replaced.items():
            if kernel not in self.replacements:
                _log.warning("%s; %s in its place, which is slower", self.messages[kernel], ", ".join(used))
            self.replacements[kernel] = list(dict.fromkeys((*self.replacements.get(kernel, ()), *used)))

    def profile(self) -> dict[str, dict[str, object]]:
        """For each kernel that the device cannot make: ``why``, and its replacements ``by``."""
        return {kernel: {"why": self.messages[kernel], "by": used} for kernel, used in self.replacements.items()}
