"""Fallback from the kernels that a device cannot make to general kernels.

:class:`~zincmetal.device.programs.Programs` asks here when a plan does not compile. Then the device tries each kernel
of the plan, and the plan is made again without the refused kernels. A plan that compiles at once costs nothing.
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
    """Kernels that a device refuses to make, by name: its ``messages``, and the ``replacements`` in use."""

    device: _core.Device
    messages: dict[str, str] = field(default_factory=dict)
    replacements: dict[str, list[str]] = field(default_factory=dict)

    def refused(self, plan: Plan) -> tuple[str, ...]:
        """Ask the device for each kernel of a plan. Return the names of the refused kernels, and keep their messages.

        Empty if the device makes no kernel at all: then no kernel is the reason.
        """
        threads = {d.launch.kernel: d.launch.threads for d in plan.dispatches}
        refused, narrow = dict[str, str](), dict[str, str]()
        for kernel, wanted in threads.items():
            try:
                most = self.device.limits(kernel)[0]
            except DeviceError as error:
                refused[kernel] = str(error)
            else:
                # The device may still make the kernel again for so many threads: it is blamed only if no other kernel
                # is.
                if wanted > most:
                    narrow[kernel] = f"kernel '{kernel}' takes {most} threads, of {wanted}"
        if len(refused) == len(threads):
            return ()
        found = refused or narrow
        self.messages |= found
        return tuple(found)

    def use(self, replaced: Mapping[str, Sequence[str]]) -> None:
        """Keep the replacements of kernels. Warn once for each replaced kernel."""
        for kernel, used in replaced.items():
            if kernel not in self.replacements:
                _log.warning("%s; %s in its place, which is slower", self.messages[kernel], ", ".join(used))
            self.replacements[kernel] = list(dict.fromkeys((*self.replacements.get(kernel, ()), *used)))

    def profile(self) -> dict[str, dict[str, object]]:
        """Return for each kernel that the device cannot make the message (``why``) and its replacements (``by``)."""
        return {kernel: {"why": self.messages[kernel], "by": used} for kernel, used in self.replacements.items()}
