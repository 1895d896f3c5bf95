"""The folders of the checkout that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"
DATA = TESTS / "data"
KERNELS = ROOT / "kernels"
#: More reference models than DATA holds, in a folder beside the checkout; tests must pass without it.
SHARED = ROOT.parent / "shared" / "fixtures"
