"""The Metal backend where there is no Mac: it compiles against Apple's headers, and its parts without Metal work.

Set ``ZINCMETAL_APPLE_SDK`` to a folder with ``Frameworks/``, ``include/`` and ``lib/`` of a macOS SDK, and install the
PyPI package ``ziglang`` (clang with an arm64 macOS target), to compile and link ``csrc/device_metal.mm`` anywhere.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MACH_O_64, ARM64 = 0xFEEDFACF, 0x0100000C


# ---- the shim against Apple's headers ----------------------------------------------------------------------------


def apple_compile(target: str, arguments: list[str]) -> str:
    """Runs clang for arm64 macOS with every warning an error; returns what it said."""
    sdk = os.environ.get("ZINCMETAL_APPLE_SDK")
    if not sdk or importlib.util.find_spec("ziglang") is None:
        pytest.skip("needs ZINCMETAL_APPLE_SDK=<folder of a macOS SDK> and the package ziglang")
    root = Path(sdk)
    command = [sys.executable, "-m", "ziglang", "c++", "-target", f"aarch64-macos.{target}", "-std=c++20"]
    command += ["-fobjc-arc", "-include", "cmath", "-idirafter", str(root / "include")]
    command += ["-iframework", str(root / "Frameworks"), "-F", str(root / "Frameworks"), "-L", str(root / "lib")]
    command += ["-I", str(ROOT / "csrc"), "-Wall", "-Wextra", "-Werror", "-Wunguarded-availability", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("target", ["11.0", "13.0", "15.0"])
def test_shim_compiles_without_a_warning(target: str, tmp_path: Path) -> None:
    """For each macOS, from the oldest on Apple Silicon: an API newer than the target must stand under @available."""
    said = apple_compile(target, ["-c", "csrc/device_metal.mm", "-o", str(tmp_path / "device_metal.o")])
    assert "warning" not in said


def test_unguarded_api_is_an_error(tmp_path: Path) -> None:
    """The test above can fail: without its guard, a query of macOS 14 is refused for macOS 13."""
    source = (ROOT / "csrc/device_metal.mm").read_text()
    guard = "if (@available(macOS 14.0, *)) list"
    assert guard in source
    broken = tmp_path / "device_metal.mm"
    broken.write_text(source.replace(guard, "list"))
    with pytest.raises(AssertionError, match="only available on macOS 14"):
        apple_compile("13.0", ["-c", str(broken), "-o", str(tmp_path / "broken.o")])


def test_shim_links_into_an_arm64_program(tmp_path: Path) -> None:
    main = tmp_path / "main.cpp"
    main.write_text('#include "device.h"\nint main() { return zinc::open_device({})->info().name.empty(); }\n')
    program = tmp_path / "program"
    sources = ["csrc/device_metal.mm", str(main), "-o", str(program)]
    apple_compile(
        "15.0", [*sources, "-framework", "Metal", "-framework", "Foundation", "-framework", "CoreGraphics", "-lobjc"]
    )
    magic, cpu = struct.unpack("<II", program.read_bytes()[:8])
    assert (magic, cpu) == (MACH_O_64, ARM64)
