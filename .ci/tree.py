"""The tree of sources as the scripts of this folder use it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "python"


def environment(package: Path | None = None, **more: str) -> dict[str, str]:
    """Variables of a Python that imports the package from a folder, and the tests' helpers and the benches.

    Without a folder it is the installed package, or that of the sources if a core was copied beside it.
    """
    if package is None and any((SOURCES / "zincmetal").glob("_host*.so")):
        package = SOURCES
    folders = [str(package or ""), str(ROOT / "tests"), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **more, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def packaged(built: Path) -> Path:
    """Makes a folder with the package of this tree around the modules that lie in another; returns it."""
    made = built / "package" / "zincmetal"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    for path in (ROOT / "python" / "zincmetal").iterdir():
        if path.suffix != ".so":
            (made / path.name).symlink_to(path)
    for module in built.glob("*.so"):
        shutil.copy(module, made)
    return made.parent
