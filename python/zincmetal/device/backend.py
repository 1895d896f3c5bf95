"""Finds, chooses and loads the compiled cores: one extension module for each backend."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, cast

from .. import settings
from ..errors import DeviceError, UsageError
from .core import Core

if TYPE_CHECKING:
    from .. import _core

DEVICES = ("metal", "cuda", "cpu")  # the best first
_MODULES = {name: f"zincmetal._core_{name}" for name in (*DEVICES, "checked")}
_log = logging.getLogger("zincmetal.device")
#: A folder of kernels in place of the one beside the compiled core, for tests.
KERNEL_FOLDER: Path | None = None


def is_built(name: str) -> bool:
    """Return True if this installation has the core of a device, or "checked", the core that the tests use."""
    return importlib.util.find_spec(_MODULES[name]) is not None


def built() -> list[str]:
    """List the devices that this installation was built for, the best first."""
    return [name for name in DEVICES if is_built(name)]


def choose(device: str | None = None) -> str:
    """Choose a device: the argument, else ``ZINCMETAL_DEVICE``, else the best that was built.

    Raises UsageError for an unknown name, DeviceError for a device that was not built.
    """
    name = device or settings.device() or ""
    asked = "" if device or not name else f"{settings.DEVICE.name}={name}: "
    if name and name not in _MODULES:
        raise UsageError(f"{asked}no device is called {name!r}; choose among {', '.join(DEVICES)}")
    if name and not is_built(name):
        raise DeviceError(f"{asked}this installation was not built for {name}; it has: {', '.join(built()) or 'none'}")
    if name:
        return name
    if not built():
        raise DeviceError("no compiled core is installed; build it with `pip install .`")
    return built()[0]


def load(device: str | None = None) -> Core:
    """Import the core of a device. Raises as :func:`choose`."""
    return cast(Core, importlib.import_module(_MODULES[choose(device)]))


def kernel_folder(core: Core) -> str:
    """Return the folder of a core's kernels. It lies beside the core, which an editable install keeps elsewhere."""
    return str(KERNEL_FOLDER or Path(str(core.__file__)).with_name("kernels"))


def open_device(device: str | None = None, threads: int = 0) -> tuple[Core, _core.Device]:
    """Load a core and open its device. Raises as :func:`choose`, and DeviceError if the device does not open.

    ``threads`` is for the CPU (0 = all cores). With ``ZINCMETAL_NATIVE=0`` the CPU runs every kernel from its Metal
    source. The logger "zincmetal.device" names the device at level INFO.
    """
    core = load(device)
    opened = core.Device(threads=threads, native=settings.native(), kernel_folder=kernel_folder(core))
    info = opened.info
    features = ", ".join(f"{name} {value}" for name, value in info["features"].items())
    _log.info("%s: %s, %.1f GB, %s", info["backend"], info["name"], info["working_set_bytes"] / 1e9, features)
    return core, opened
