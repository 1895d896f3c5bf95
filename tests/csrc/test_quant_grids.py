"""kernels/quant_grids.h is what .ci/quant_grids.py makes, and the script sees a header that is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = next(p for p in Path(__file__).parents if (p / "CMakeLists.txt").exists())
SCRIPT, HEADER, GRIDS = ".ci/quant_grids.py", "kernels/quant_grids.h", "python/zincmetal/gguf/grids.py"


def check(root: Path) -> int:
    """Runs the script of a tree; returns its exit status."""
    command = [sys.executable, str(root / SCRIPT), "--check"]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_header_is_current() -> None:
    assert check(ROOT) == 0


def test_header_of_other_figures_is_found(tmp_path: Path) -> None:
    for file in (SCRIPT, HEADER, GRIDS):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    text = (tmp_path / HEADER).read_text()
    (tmp_path / HEADER).write_text(text.replace("0x0f", "0x0e", 1))
    assert check(tmp_path) == 1
    (tmp_path / HEADER).write_text(text)
    assert check(tmp_path) == 0
