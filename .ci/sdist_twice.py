"""Builds the source distribution twice, from two copies of the tree with other paths, times and owners' rights.

Prints its SHA-256. The exit status is 1 if the two differ by a byte.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"


def built(folder: Path, seconds: int) -> bytes:
    """Builds from a copy of the files that git knows, all of them changed at this time."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, listed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
        os.utime(folder / name, (seconds, seconds), follow_symlinks=False)
    shutil.copy(ROOT / ".gitignore", folder)
    env = {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
    command = [sys.executable, "-c", BUILD, str(folder / "made")]
    (folder / "made").mkdir()
    subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    return next((folder / "made").glob("*.tar.gz")).read_bytes()


def main() -> int:
    """Builds both, and compares."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory(prefix="another-") as other:
        first, second = built(Path(one), 1_600_000_000), built(Path(other), 1_700_000_000)
    print(f"{sha256(first).hexdigest()}  {len(first):,} bytes")
    if first != second:
        print(f"{sha256(second).hexdigest()}  {len(second):,} bytes: the second build differs")
    return int(first != second)


if __name__ == "__main__":
    sys.exit(main())
