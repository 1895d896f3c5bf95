"""Finds the built Metal double for a test."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import metal_double_lane as lane
from zincmetal.device import backend


def built(checked: bool = False) -> Path:
    """Returns the double's folder. Skips the test where it was not built; in CI, fails."""
    if where := lane.folder(checked):
        return where
    message = "the Metal double is not built: make test-metal-double"
    if os.environ.get("CI") and sys.platform == "linux":
        pytest.fail(message)
    pytest.skip(message)


@contextmanager
def playing(kernels: Path) -> Iterator[lane.Double]:
    """Installs the double with a folder of kernels. Afterwards it plays the usual Mac, and nothing of it is alive."""
    with lane.installed(built(), kernels):
        double = lane.Double()
        yield double
        double.set("")
        gc.collect()
        assert double.report()["live"] == {}


def kernels_of_metal_3() -> set[str]:
    """Names the kernels that every Mac has: those without Metal 4's tensor operations."""
    return {name for name in backend.load("cpu").Device().kernel_names() if "_mm_coop" not in name}
