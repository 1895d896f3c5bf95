"""The Metal backend compiles and links against Apple's headers on any machine.

Set ``ZINCMETAL_APPLE_SDK`` to a folder with ``Frameworks/``, ``include/`` and ``lib/`` of a macOS SDK, and install the
PyPI package ``ziglang`` (clang with an arm64 macOS target), to compile and link ``csrc/metal/device.mm`` anywhere. What
macOS 15 brought is declared by sdk_15/ if the SDK is older. (Without an SDK, the double compiles the same lines: its
headers have residency sets and math modes.)
"""

from __future__ import annotations

import os
import re
import shutil
import struct
from pathlib import Path

import pytest

from support.apple_sdk import apple_compile
from support.paths import ROOT, TESTS

MACH_O_64, ARM64 = 0xFEEDFACF, 0x0100000C

# ---- the shim against Apple's headers ----------------------------------------------------------------------------


#: Declarations that macOS 15 added to older headers: file, the line before them, and the lines.
ADDED = [
    (
        "MTLCommandQueue.h",
        "@protocol MTLCommandQueue <NSObject>",
        """- (void)addResidencySet:(id<MTLResidencySet>)residencySet API_AVAILABLE(macos(15.0));
        - (void)removeResidencySet:(id<MTLResidencySet>)residencySet API_AVAILABLE(macos(15.0));""",
    ),
    (
        "MTLDevice.h",
        "@protocol MTLDevice <NSObject>",
        """- (nullable id<MTLResidencySet>)newResidencySetWithDescriptor:(MTLResidencySetDescriptor*)desc
                                                error:(__autoreleasing NSError**)error API_AVAILABLE(macos(15.0));""",
    ),
    (
        "MTLLibrary.h",
        "@interface MTLCompileOptions : NSObject <NSCopying>",
        """@property(readwrite, nonatomic) MTLMathMode mathMode API_AVAILABLE(macos(15.0));
        @property(readwrite, nonatomic) MTLMathFloatingPointFunctions mathFloatingPointFunctions
            API_AVAILABLE(macos(15.0));""",
    ),
    ("MTLResource.h", "@protocol MTLResource <NSObject>", ""),
]
MATH_MODES = """typedef NS_ENUM(NSInteger, MTLMathMode) {
    MTLMathModeSafe = 0, MTLMathModeRelaxed = 1, MTLMathModeFast = 2
} API_AVAILABLE(macos(15.0));
typedef NS_ENUM(NSInteger, MTLMathFloatingPointFunctions) {
    MTLMathFloatingPointFunctionsFast = 0, MTLMathFloatingPointFunctionsPrecise = 1
} API_AVAILABLE(macos(15.0));
"""


@pytest.fixture(scope="session")
def macos_15(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Makes a folder with macOS 15's Metal.framework from the SDK's and sdk_15. Returns None if the SDK has it."""
    sdk = os.environ.get("ZINCMETAL_APPLE_SDK")
    if not sdk:
        pytest.skip("needs ZINCMETAL_APPLE_SDK=<folder of a macOS SDK>")
    headers = Path(sdk) / "Frameworks/Metal.framework/Headers"
    if (headers / "MTLResidencySet.h").exists():
        return None
    folder = tmp_path_factory.mktemp("macos15")
    copy = folder / "Metal.framework" / "Headers"
    shutil.copytree(headers, copy, symlinks=False)
    for header in (TESTS / "csrc/metal/sdk_15").iterdir():
        shutil.copy(header, copy)
    for file, line, lines in ADDED:
        # Apple's headers have blanks that ours do not have.
        pattern = r"\s*".join(re.escape(word) for word in line.split())
        found = re.search(pattern, text := (copy / file).read_text())
        first = re.search(r"^NS_ASSUME_NONNULL_BEGIN", text, re.M)
        assert found
        assert first
        declared = "#import <Metal/MTLResidencySet.h>\n" + (MATH_MODES if file == "MTLLibrary.h" else "")
        added = line.replace("MTLResource <NSObject>", "MTLResource <MTLAllocation>") + "\n" + lines
        rest = text[first.start() : found.start()] + added + text[found.end() :]
        (copy / file).write_text(text[: first.start()] + declared + rest)
    return folder


@pytest.mark.parametrize("target", ["11.0", "13.0", "14.0", "15.0"])
def test_shim_compiles_without_a_warning(target: str, tmp_path: Path) -> None:
    """For each macOS from 11 on: a call of an API newer than the target must stand under @available."""
    said = apple_compile(target, ["-c", "csrc/metal/device.mm", "-o", str(tmp_path / "device_metal.o")])
    assert "warning" not in said


@pytest.mark.parametrize("target", ["11.0", "13.0", "14.0", "15.0"])
def test_shim_compiles_with_what_macos_15_brought(target: str, macos_15: Path | None, tmp_path: Path) -> None:
    """Residency sets and math modes are used under @available and with their types."""
    source = '#include "csrc/metal/device.mm"\n#if !ZINC_SDK_15\n#error "not compiled"\n#endif\n'
    (tmp_path / "all.mm").write_text(source)
    flags = ["-I", str(ROOT), "-c", str(tmp_path / "all.mm"), "-o", str(tmp_path / "all.o")]
    assert "warning" not in apple_compile(target, flags, macos_15)


def test_an_unguarded_math_mode_is_an_error(macos_15: Path | None, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    library = tmp_path / "csrc/metal/library.h"
    text, guard = library.read_text(), "if (@available(macOS 15.0, *)) {"
    assert guard in text
    library.write_text(text.replace(guard, "{"))
    flags = [
        "-iquote",
        str(tmp_path / "csrc"),
        "-c",
        str(tmp_path / "csrc/metal/device.mm"),
        "-o",
        str(tmp_path / "x.o"),
    ]
    with pytest.raises(AssertionError, match="only available on macOS 15"):
        apple_compile("14.0", flags, macos_15)


def test_unguarded_api_is_an_error(tmp_path: Path) -> None:
    """Without its guard a query of macOS 14 is refused for macOS 13: the test above can fail."""
    source = (ROOT / "csrc/metal/device.mm").read_text()
    guard = "if (@available(macOS 14.0, *)) list"
    assert guard in source
    broken = tmp_path / "device_metal.mm"
    broken.write_text(source.replace(guard, "list"))
    with pytest.raises(AssertionError, match="only available on macOS 14"):
        apple_compile("13.0", ["-c", str(broken), "-o", str(tmp_path / "broken.o")])


def test_shim_links_into_an_arm64_program(tmp_path: Path) -> None:
    main = tmp_path / "main.cpp"
    main.write_text('#include "core/device.h"\nint main() { return zinc::open_device({})->info().name.empty(); }\n')
    program = tmp_path / "program"
    sources = ["csrc/metal/device.mm", str(main), "-o", str(program)]
    apple_compile(
        "15.0", [*sources, "-framework", "Metal", "-framework", "Foundation", "-framework", "CoreGraphics", "-lobjc"]
    )
    magic, cpu = struct.unpack("<II", program.read_bytes()[:8])
    assert (magic, cpu) == (MACH_O_64, ARM64)
