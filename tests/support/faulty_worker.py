"""The worker of the checks, on a device with a fault: python tests/support/faulty_worker.py FAULT KERNEL.

The fault is added where Python calls the compiled core. The reference device, the CPU, has no fault. If the environment
variable CHECK_DOUBLE is set, it names the folder of a Metal double, which is then used as the Metal core.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from zincmetal.check import worker
from zincmetal.check.cases import cases
from zincmetal.check.inputs import GUARD
from zincmetal.device import backend
from zincmetal.errors import DeviceError

FAULT, KERNEL = sys.argv[1], sys.argv[2]
BROKEN_SOURCE = "norm.metal"


class FaultyDevice:
    """A device whose kernel KERNEL, or every one where that is "*", has the fault."""

    def __init__(self, core: Any, **options: Any) -> None:
        self._device = core.Device(**options)
        self._cases = cases(core)
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    @property
    def info(self) -> dict[str, Any]:
        info: dict[str, Any] = self._device.info
        if FAULT == "source":
            info["features"][BROKEN_SOURCE] = f"{BROKEN_SOURCE} does not compile: 7: unknown type name 'flaot'"
        return info

    def kernel_names(self) -> list[str]:
        names: list[str] = self._device.kernel_names()
        if FAULT == "source":
            names = [name for name in names if not name.startswith("rms_norm")]
        if FAULT == "no kernel":
            names.remove(KERNEL)
        return [*names, KERNEL] if FAULT == "no case" else names

    def limits(self, kernel: str) -> tuple[int, int, int]:
        if kernel == KERNEL and FAULT == "pipeline":
            raise DeviceError(f"kernel '{kernel}' does not build: too many registers")
        threads, width, nbytes = (1024, 32, 0) if FAULT == "no case" else self._device.limits(kernel)
        return (32 if kernel == KERNEL and FAULT == "few threads" else threads), width, nbytes

    def run(self, dispatches: list[Any]) -> float:
        if self._failed:
            raise DeviceError("the device failed before")
        seconds: float = self._device.run(dispatches)
        name, _, bindings, *_ = dispatches[-1]
        if name == KERNEL or KERNEL == "*":
            self._spoil(name, bindings)
        return seconds

    def _spoil(self, name: str, bindings: list[Any]) -> None:
        modes = [arg.mode for arg in self._cases[name].launch.args]
        last_out = max(i for i, mode in enumerate(modes) if "w" in mode)
        out, at, nbytes = bindings[last_out]
        source, *_ = bindings[next(i for i, mode in enumerate(modes) if mode == "r")]
        if FAULT == "wrong":  # one number: the sign and exponent of a float32 or a half, or a quant
            flip(out, at + nbytes // 2 // 4 * 4 + 3)
        elif FAULT == "writes outside":
            flip(out, at + nbytes)
        elif FAULT == "writes an input":
            flip(source, GUARD)
        elif FAULT == "prints":
            print("Invalid device load at offset 4096", file=sys.stderr, flush=True)
        elif FAULT == "dies":
            os.kill(os.getpid(), signal.SIGABRT)
        elif FAULT == "fails":
            self._failed = True
            raise DeviceError("the GPU did not finish a command buffer: timeout")


def flip(buffer: Any, at: int) -> None:
    """Flips one bit of the byte at an offset."""
    buffer.write(buffer.read(at, 1) ^ np.uint8(0x40), at)


class FaultyCore:
    """A core that opens faulty devices, except for the reference."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def Device(self, **options: Any) -> Any:
        reference = "native" in options
        return self._core.Device(**options) if reference else FaultyDevice(self._core, **options)


def main() -> None:
    if where := os.environ.get("CHECK_DOUBLE"):
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from support import metal_double_lane

        metal_double_lane.install(Path(where))
    load = backend.load
    backend.load = lambda name=None: FaultyCore(load(name))  # type: ignore[assignment, return-value]
    backend.KERNEL_FOLDER = Path(__file__).parents[2] / "kernels"
    worker.main()


if __name__ == "__main__":
    main()
