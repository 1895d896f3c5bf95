"""The rule of includes holds in csrc/ and kernels/, and .ci/include_rule.py finds each kind of breach."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = next(p for p in Path(__file__).parents if (p / "CMakeLists.txt").exists())


def check(root: Path) -> tuple[int, str]:
    """Runs the script; returns its exit status and output."""
    command = [sys.executable, str(ROOT / ".ci" / "include_rule.py"), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


def test_includes_keep_to_their_rooms() -> None:
    assert check(ROOT) == (0, "Includes keep to their rooms.\n")


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("csrc/core/plan.h", '#include "cpu/pool.h"', "csrc/core/ may include csrc/core, kernels only"),
        ("csrc/core/device.h", "#include <Metal/Metal.h>", "only csrc/metal may include it"),
        ("csrc/core/steps.h", "#include <pybind11/pybind11.h>", "only csrc/core/bind.cpp, csrc/core/interrupt.h may"),
        ("csrc/host/host.cpp", '#include "msl/run/runtime.h"', "csrc/host/ may include csrc/core, csrc/host only"),
        ("csrc/cuda/graph.h", '#include "cpu/pool.h"', "csrc/cuda/ may include"),
        ("csrc/cpu/pool.h", '#  include "metal/objc.h"', "csrc/cpu/ may include"),
        ("csrc/cpu/native/tile.h", "#include <cuda_runtime.h>", "only csrc/cuda, csrc/msl/stdlib may include it"),
        ("csrc/msl/run/fibre.h", '#include "core/device.h"', "csrc/msl/run/ may include csrc/msl/run only"),
        ("csrc/metal/portable/limits.h", "#import <Foundation/Foundation.h>", "only csrc/metal may include it"),
        ("csrc/metal/portable/limits.h", '#include "metal/objc.h"', "csrc/metal/portable/ may include"),
        ("kernels/norm.metal", '#include "core/device.h"', "kernels/ may include kernels only"),
        ("kernels/norm.metal", "#include <cmath>", "kernels/ may include Metal's headers only"),
        ("csrc/core/plan.h", '#include "no_such.h"', "there is no such file"),
        ("csrc/vulkan/device.cpp", "", "is in no room"),
    ],
)
def test_a_breach_is_found(file: str, line: str, reason: str, tmp_path: Path) -> None:
    for top in ("csrc", "kernels"):
        shutil.copytree(ROOT / top, tmp_path / top)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{line}\n" + (path.read_text() if path.exists() else ""))
    status, said = check(tmp_path)
    assert status == 1
    assert said.count("\n") == 1
    assert said.startswith(f"{file}: ")
    assert reason in said
