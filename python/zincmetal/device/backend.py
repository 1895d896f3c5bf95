"""Which compiled core runs: one extension module per device, picked by argument, environment, or what was built."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from .. import settings
from ..errors import DeviceError, UsageError

if TYPE_CHECKING:
    from .. import _core

# In the order of preference when nothing is asked for.
DEVICES = ("metal", "cuda", "cpu")
_MODULES = {name: f"zincmetal._core_{name}" for name in (*DEVICES, "checked")}
_log = logging.getLogger("zincmetal")
#: Another folder of kernels than the one beside the compiled core, for tests.
KERNEL_FOLDER: Path | None = None


def is_built(name: str) -> bool:
    """Whether this installation has the core of that name: a device, or "checked", which the tests use."""
    return importlib.util.find_spec(_MODULES[name]) is not None


def built() -> list[str]:
    """The devices that this installation was built for, best first."""
    return [name for name in DEVICES if is_built(name)]


def choose(device: str | None = None) -> str:
    """The device to use: the argument, else ``ZINCMETAL_DEVICE``, else the best that was built.

    Raises UsageError for a name that is none, DeviceError for one that was not built.
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


def load(device: str | None = None) -> ModuleType:
    """The extension module for a device (see :func:`choose`); ``_core.pyi`` describes it."""
    return importlib.import_module(_MODULES[choose(device)])


def kernel_folder(core: ModuleType) -> str:
    """Where the kernels of a core lie, beside it: in an editable install that is not where this file is."""
    return str(KERNEL_FOLDER or Path(str(core.__file__)).with_name("kernels"))


def open_device(device: str | None = None, threads: int = 0) -> tuple[ModuleType, _core.Device]:
    """Load a core and open its device, and log in a line (logger "zincmetal", level INFO) what it is.

    ``threads`` is for the CPU (0: the cores there are). ``ZINCMETAL_NATIVE=0`` turns the native CPU kernels
    off, so that every kernel runs from its Metal source.
    """
    core = load(device)
    opened = core.Device(threads=threads, native=settings.native(), kernel_folder=kernel_folder(core))
    info = opened.info
    features = ", ".join(f"{name} {value}" for name, value in info["features"].items())
    _log.info("%s: %s, %.1f GB, %s", info["backend"], info["name"], info["working_set_bytes"] / 1e9, features)
    return core, opened
