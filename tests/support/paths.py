"""Where things lie in the checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"
DATA = TESTS / "data"
KERNELS = ROOT / "kernels"
#: The full set of reference models, where the checkout has it beside itself; DATA holds what must always pass.
SHARED = ROOT.parent / "shared" / "fixtures"
