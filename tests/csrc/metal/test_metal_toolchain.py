"""cmake/MetalCompiler.cmake finds the Metal compiler of every Xcode, or says loudly that there is none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT

CMAKE = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
IDENTIFIER = "com.apple.dt.toolchain.Metal.32023.619"
COMPONENT = f"""Asset Path: /System/Library/AssetsV2/com_apple_MobileAsset_MetalToolchain
Build Version: 17A324
Status: installed
Toolchain Identifier: {IDENTIFIER}
Toolchain Search Path: /private/var/run/com.apple.security.cryptexd/mnt/MetalToolchain
"""
# An xcrun that finds the compiler only if called as WORKS says: "ARGUMENTS" or "TOOLCHAINS=.. ARGUMENTS". The compiler
# knows Metal 4 if TENSORS is WORKS.
XCRUN = """#!/bin/sh
case "${TOOLCHAINS:+TOOLCHAINS=$TOOLCHAINS }$*" in
  "$WORKS metal -std=metal3.1 -c "*) exit 0;;
  "$TENSORS metal -std=metal4.0 -c "*) exit 0;;
esac
echo "error: cannot execute tool 'metal' due to missing Metal Toolchain" >&2
exit 72
"""


def configure(folder: Path, works: str, component: str | None = COMPONENT, tensors: str = "nowhere") -> str:
    """Runs CMake with a compiler that ``works`` in one way; returns its output and the compiler found."""
    if CMAKE is None:
        pytest.skip("needs cmake")
    tools = folder / "tools"
    tools.mkdir()
    xcodebuild = "#!/bin/sh\nexit 70\n" if component is None else f"#!/bin/sh\ncat <<'END'\n{component}END\n"
    for name, text in {"xcrun": XCRUN, "xcodebuild": xcodebuild}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    script = folder / "probe.cmake"
    options = "set(METAL_OPTIONS -std=metal3.1)\nset(METAL4_OPTIONS -std=metal4.0)\n"
    found = 'message("found [${METAL_XCRUN}]")\nmessage("metal 4 [${METAL4_OPTIONS}]")'
    script.write_text(f"{options}include({ROOT}/cmake/MetalCompiler.cmake)\n{found}\n")
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "WORKS": works, "TENSORS": tensors}
    environment.pop("TOOLCHAINS", None)
    command = [CMAKE, "-P", str(script)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def found(said: str) -> list[str]:
    match = re.search(r"^found \[(.*)\]$", said, re.M)
    assert match
    return [word for word in match[1].split(";") if word]


@pytest.mark.parametrize(
    ("works", "end"),
    [
        ("-sdk macosx", ["xcrun", "-sdk", "macosx"]),
        ("-sdk macosx --toolchain Metal", ["--toolchain", "Metal"]),
        (f"-sdk macosx --toolchain {IDENTIFIER}", ["--toolchain", IDENTIFIER]),
        (f"TOOLCHAINS={IDENTIFIER} -sdk macosx", [f"TOOLCHAINS={IDENTIFIER}", "xcrun", "-sdk", "macosx"]),
    ],
)
def test_the_compiler_is_found(works: str, end: list[str], tmp_path: Path) -> None:
    said = configure(tmp_path, works)
    command = found(said)
    assert command[-len(end) :] == end
    assert "Warning" not in said


@pytest.mark.parametrize("knows", [True, False])
def test_a_compiler_without_metal_4_makes_no_tensor_operations(knows: bool, tmp_path: Path) -> None:
    said = configure(tmp_path, "-sdk macosx", tensors="-sdk macosx" if knows else "nowhere")
    assert f"metal 4 [{'-std=metal4.0' * knows}]" in said
    assert ("No tensor operations of Metal 4" in said) is not knows


@pytest.mark.parametrize("component", [COMPONENT, None, "Status: uninstalled\n"])
def test_a_missing_compiler_is_said_loudly(component: str | None, tmp_path: Path) -> None:
    said = configure(tmp_path, "nowhere", component)
    assert found(said) == []
    assert "CMake Warning" in said
    words = " ".join(said.split())
    assert "No Metal compiler: this build has no zincmetal.metallib" in words
    assert "xcodebuild -downloadComponent MetalToolchain" in words
    assert "missing Metal Toolchain" in words
