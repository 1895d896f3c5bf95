"""The folders of the checkout that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"
DATA = TESTS / "data"
KERNELS = ROOT / "kernels"
#: More reference models than DATA holds, in folders beside the checkout; tests must pass without them. The second has
#: quant types and architectures beyond the first.
SHARED = ROOT.parent / "shared" / "fixtures"
MORE_SHARED = ROOT.parent / "shared" / "fixtures2"
