"""Puts the Metal double in the place of zincmetal._core_metal.

The double is tests/csrc/metal/double, built by cmake/MetalDouble.cmake. As a pytest plugin
(``-p support.metal_double_lane``) this module does so for the whole run, so that every test with a lane "metal" runs on
the double. Tests of the double itself use the context manager :func:`installed`, or a process of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zincmetal
from support.paths import KERNELS, ROOT, TESTS
from zincmetal.device import backend

_MODULE = "zincmetal._core_metal"


def folder(checked: bool = False) -> Path | None:
    """Returns the folder of the newest double for this Python, or None. ``checked``: it checks every access."""
    name = "metal_double_checked" if checked else "metal_double"
    pattern = f"build/*/{name}/_core_metal{sysconfig.get_config_var('EXT_SUFFIX')}"
    found = sorted(ROOT.glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def install(where: Path, kernel_folder: Path = KERNELS) -> None:
    """Makes the double the Metal core of this process."""
    zincmetal.__path__.insert(0, str(where))
    backend.KERNEL_FOLDER = kernel_folder
    os.environ.setdefault("ZINCMETAL_CACHE", "0")  # a test of the cache sets a folder of its own


@contextlib.contextmanager
def installed(where: Path, kernel_folder: Path = KERNELS) -> Iterator[None]:
    """Makes the double the Metal core until the context ends."""
    before, kept = backend.KERNEL_FOLDER, sys.modules.pop(f"{_MODULE}.kept", None)
    install(where, kernel_folder)
    if kept is not None:
        sys.modules[_MODULE] = kept
    try:
        yield
    finally:
        zincmetal.__path__.remove(str(where))
        backend.KERNEL_FOLDER = before
        if _MODULE in sys.modules:
            sys.modules[f"{_MODULE}.kept"] = sys.modules.pop(_MODULE)


class Double:
    """The two functions that the loaded double exports (tests/csrc/metal/double/conditions.h)."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(backend.load("metal").__file__))
        self._library.metal_double_report.restype = ctypes.c_char_p

    def report(self) -> dict[str, Any]:
        """Waits for the queues; returns the counts of encoded work, and of live objects by class."""
        result: dict[str, Any] = json.loads(self._library.metal_double_report())
        return result

    def set(self, conditions: str) -> None:
        """Sets the conditions that the double plays: failures, an old GPU, an old macOS."""
        self._library.metal_double_set(conditions.encode())


_PRELUDE = """
import gc, json, sys
from pathlib import Path
import numpy as np
from support import metal_double_lane
metal_double_lane.install(Path(sys.argv[1]))
import zincmetal
from zincmetal import errors
from zincmetal.device import backend
double = metal_double_lane.Double()
"""


def run(script: str, where: Path, conditions: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python script on the double in a process of its own, since a broken rule ends the process."""
    package = str(Path(zincmetal.__file__).parents[1])
    paths = {"PYTHONPATH": os.pathsep.join([package, str(TESTS)]), "METAL_DOUBLE": conditions}
    patience = {"ZINCMETAL_METAL_TIMEOUT": "1000"}  # a busy machine must not fail a test
    return subprocess.run(
        [sys.executable, "-c", _PRELUDE + script, str(where)],
        capture_output=True,
        text=True,
        check=False,
        timeout=2000,
        env={**os.environ, **patience, **paths, **environment},
    )


def pytest_configure() -> None:
    """Installs the double for the whole run, when this module is a plugin."""
    where = folder()
    if where is None:
        raise SystemExit("the Metal double is not built: make test-metal-kernels")
    install(where)
