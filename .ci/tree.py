"""The tree of sources as the scripts of this folder use it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(package: Path = ROOT / "python", **more: str) -> dict[str, str]:
    """Variables of a Python that imports the package from a folder, and the tests' helpers and the benches."""
    folders = [str(package), str(ROOT / "tests"), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **more, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
