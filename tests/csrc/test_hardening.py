"""The compiled modules are hardened: addresses of functions are read-only, the stack has canaries and no code."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import zincmetal

MODULES = sorted(Path(zincmetal.__file__).parent.glob("_*.so"))


def told(option: str, path: Path) -> str:
    """What readelf tells of a module."""
    return subprocess.check_output(["readelf", "--wide", option, str(path)], text=True)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
@pytest.mark.parametrize("path", [p for p in MODULES if "darwin" not in p.name], ids=lambda p: p.name.split(".")[0])
def test_modules_are_hardened(path: Path) -> None:
    segments, dynamic, symbols = (told(option, path) for option in ("--segments", "--dynamic", "--dyn-syms"))
    stack = next(line for line in segments.splitlines() if "GNU_STACK" in line)
    assert " RWE" not in stack
    assert "GNU_RELRO" in segments
    assert "BIND_NOW" in dynamic or " NOW" in dynamic
    assert "__stack_chk_fail" in symbols
    assert "RPATH" not in dynamic
