"""Every kernel says, in the line before its signature, how it is launched; the constants in it exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zincmetal import _core_cpu as core

ROOT = next(p for p in Path(__file__).parents if (p / "CMakeLists.txt").exists())
#: A source of a group of types has no text of its own: see kernels/quant_types.h.
SOURCES = sorted(p for p in (ROOT / "kernels").glob("*.metal") if not p.name.startswith("types_"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_kernel_says_how_it_is_launched(source: Path) -> None:
    lines = source.read_text().splitlines()
    kernels = [i for i, line in enumerate(lines) if line.startswith("kernel void")]
    assert kernels
    for i in kernels:
        assert re.fullmatch(r"// Grid(: .+\. Threads: .+| and threads: as \w+)\.", lines[i - 2]), lines[i]
        for constant in re.findall(r"\b[A-Z]{2,}_[A-Z_]+\b", lines[i - 2]):
            assert constant in core.shapes()
