"""Compiles C++ and Objective-C++ against the headers of a macOS SDK."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT


def apple_compile(target: str, arguments: list[str], frameworks: Path | None = None) -> str:
    """Runs clang for arm64 macOS with every warning an error; returns its output.

    ``frameworks`` is searched before the SDK's own. The test is skipped where no SDK is named.
    """
    sdk = os.environ.get("ZINCMETAL_APPLE_SDK")
    if not sdk or importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs ZINCMETAL_APPLE_SDK=<folder of a macOS SDK> and the package ziglang")
    root = Path(sdk)
    command = [sys.executable, "-m", "ziglang", "c++", "-target", f"aarch64-macos.{target}", "-std=c++20"]
    command += ["-fobjc-arc", "-include", "cmath", "-idirafter", str(root / "include")]
    command += ["-iframework", str(frameworks)] if frameworks else []
    command += ["-iframework", str(root / "Frameworks"), "-F", str(root / "Frameworks"), "-L", str(root / "lib")]
    command += ["-I", str(ROOT / "csrc"), "-Wall", "-Wextra", "-Werror", "-Wunguarded-availability", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
