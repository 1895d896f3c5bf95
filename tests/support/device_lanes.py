"""Opens a device of each lane, for tests of the core: the CPU without and with helper threads, GPUs, Metal's double."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

from support import metal_double_lane
from support.metal_double import built
from zincmetal.device import backend
from zincmetal.device.core import Core

if TYPE_CHECKING:
    from zincmetal import _core

LANES = ("cpu inline", "cpu", "metal", *(["cuda"] if backend.is_built("cuda") else []))


@contextlib.contextmanager
def opened(lane: str) -> Iterator[tuple[Core, _core.Device]]:
    """Opens the lane's core and device. "metal" is the double where there is no other; without one the test is skipped.

    On the lane "cpu inline" a step ends before its submission returns.
    """
    name, _, inline = lane.partition(" ")
    is_double = name == "metal" and not backend.is_built(name)
    with metal_double_lane.installed(built()) if is_double else contextlib.nullcontext():
        core = backend.load(name)
        yield core, core.Device(threads=1 if inline else 2, kernel_folder=backend.kernel_folder(core))
        gc.collect()
