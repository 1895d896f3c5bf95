"""Model files with exact reference distributions."""

from __future__ import annotations

from pathlib import Path

from support.paths import DATA, SHARED


def reference_models(*architectures: str) -> list[Path]:
    """The GGUF files with exact reference distributions, of these architectures; each has an .npz beside it."""
    found = {p.stem: p for folder in (SHARED, DATA) for p in sorted(folder.glob("*.gguf"))}
    return [p for name, p in sorted(found.items()) if name.split("-")[0] in architectures]
