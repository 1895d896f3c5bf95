"""The Metal backend where there is no Mac: it compiles against Apple's headers, and its parts without Metal work.

Set ``ZINCMETAL_APPLE_SDK`` to a folder with ``Frameworks/``, ``include/`` and ``lib/`` of a macOS SDK, and install the
PyPI package ``ziglang`` (clang with an arm64 macOS target), to compile and link ``csrc/device_metal.mm`` anywhere.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels"
COMPILER = next(filter(None, (shutil.which(name) for name in ("c++", "g++", "clang++"))), None)
MACH_O_64, ARM64 = 0xFEEDFACF, 0x0100000C

Parts = Callable[..., tuple[int, str]]


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


# ---- the parts without Metal -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/metal/parts.cpp, compiled."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("metal") / "parts"
    command = [COMPILER, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", "-I", str(ROOT / "csrc")]
    subprocess.run([*command, str(ROOT / "tests/metal/parts.cpp"), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="session")
def parts(program: Path) -> Parts:
    """Runs a command of tests/metal/parts.cpp; returns the exit status (1 is a DeviceError) and the text."""

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 1), f"{arguments}: exit status {done.returncode} {done.stderr}"
        return done.returncode, done.stdout

    return run


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / (name + (".metal" if name == "main" else ".h"))).write_text(text)
    return folder


def preprocessed(source: Path, *includes: Path) -> list[str]:
    """The tokens that the preprocessor leaves of a kernel file, with an empty metal_stdlib."""
    assert COMPILER is not None
    command = [COMPILER, "-E", "-P", "-x", "c++", "-D__METAL_VERSION__=310", *(f"-I{folder}" for folder in includes)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("file", sorted(p.name for p in KERNELS.glob("*.metal")))
def test_flattened_kernel_is_the_same_program(file: str, parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "metal_stdlib").touch()
    status, text = parts("flatten", str(KERNELS), file)
    assert status == 0, text
    assert not re.search(r'^\s*#\s*include\s*"', text, re.MULTILINE)
    flat = tmp_path / "flat.metal"
    flat.write_text(text)
    tokens = preprocessed(flat, tmp_path)
    assert tokens == preprocessed(KERNELS / file, tmp_path, KERNELS)
    assert "kernel" in tokens


def test_header_is_spliced_once(parts: Parts, tmp_path: Path) -> None:
    write(tmp_path, a='#pragma once\n#include "b.h"\nint a;\n', b="#pragma once\nint b;\n")
    write(tmp_path, main='#include <metal_stdlib>\n#include "a.h"\n  # include "b.h" // again\nint m;\n')
    status, text = parts("flatten", str(tmp_path), "main.metal")
    assert status == 0
    assert "#include <metal_stdlib>" in text
    assert "pragma once" not in text
    (tmp_path / "metal_stdlib").touch()
    (tmp_path / "flat.metal").write_text(text)
    assert preprocessed(tmp_path / "flat.metal", tmp_path) == ["int", "b;", "int", "a;", "int", "m;"]


def test_include_under_a_false_condition_hides_no_later_one(parts: Parts, tmp_path: Path) -> None:
    write(tmp_path, a="#pragma once\nint a;\n", main='#ifdef NEVER\n#include "a.h"\n#endif\n#include "a.h"\n')
    text = parts("flatten", str(tmp_path), "main.metal")[1]
    (tmp_path / "flat.metal").write_text(text)
    assert preprocessed(tmp_path / "flat.metal", tmp_path) == ["int", "a;"]


def test_cyclic_includes_end(parts: Parts, tmp_path: Path) -> None:
    write(tmp_path, a='#pragma once\n#include "b.h"\nint a;\n', b='#pragma once\n#include "a.h"\nint b;\n')
    write(tmp_path, main='#include "a.h"\n')
    (tmp_path / "flat.metal").write_text(parts("flatten", str(tmp_path), "main.metal")[1])
    assert preprocessed(tmp_path / "flat.metal", tmp_path) == ["int", "b;", "int", "a;"]


def test_include_in_a_comment_is_left_alone(parts: Parts, tmp_path: Path) -> None:
    write(tmp_path, main='/* as in\n#include "none.h"\n*/\n// #include "none.h"\nint m;\n')
    status, text = parts("flatten", str(tmp_path), "main.metal")
    assert status == 0, text
    assert text.count('#include "none.h"') == 2


def test_missing_header_is_named_with_its_place(parts: Parts, tmp_path: Path) -> None:
    write(tmp_path, a='int a;\n\n#include "none.h"\n', main='#include "a.h"\n')
    status, text = parts("flatten", str(tmp_path), "main.metal")
    assert status == 1
    assert 'a.h:3: the included file "none.h"' in text
    assert str(tmp_path) in text


def test_compiler_messages_name_the_original_line(parts: Parts, tmp_path: Path) -> None:
    """An error after a splice, and one within it, are reported where a person would look for them."""
    write(tmp_path, a="#pragma once\nint a;\nnonsense_a a2;\n", main='int m;\n#include "a.h"\n\nnonsense_m m2;\n')
    flat = tmp_path / "flat.metal"
    flat.write_text(parts("flatten", str(tmp_path), "main.metal")[1])
    assert COMPILER is not None
    command = [COMPILER, "-fsyntax-only", "-x", "c++", str(flat)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert re.search(r"^a\.h:3:.*nonsense_a", said, re.MULTILINE), said
    assert re.search(r"^main\.metal:4:.*nonsense_m", said, re.MULTILINE), said


GOOD_DISPATCHES = ["", "threads=512", "params=4096", "offset=4 bytes=4092", "buffers=30", "offset=4092 bytes=0"]


@pytest.mark.parametrize("changes", GOOD_DISPATCHES)
def test_good_dispatch_passes(changes: str, parts: Parts) -> None:
    assert parts("dispatch", *changes.split()) == (0, "")


BAD_DISPATCHES = {
    "threads=0": "0 threads per threadgroup is not a multiple of 32",
    "threads=48": "48 threads per threadgroup is not a multiple of 32",
    "threads=544": "on this device the kernel takes 512",
    "grid_y=0": "a grid of 1 x 0 x 1 threadgroups is empty",
    "params=4097": "parameters of 4097 bytes",
    "params=0": "parameters of 0 bytes",
    "params=4": "'p' [[buffer(0)]] is 8 bytes, the parameters given are 4",
    "buffers=31": "31 buffers; at most 30",
    "buffers=0": "'x' [[buffer(1)]] has no buffer bound",
    "unset=1": "buffer 1 is not set",
    "offset=2 bytes=8": "needs an offset that is a multiple of 4, not 2",
    "bytes=4097": "of a buffer of 4096",
    "offset=8": "covers bytes 8 to 8+4096 of a buffer of 4096",
    "offset=4096 bytes=0": "of a buffer of 4096",
    "offset=18446744073709551612 bytes=8": "of a buffer of 4096",
}


@pytest.mark.parametrize("changes", BAD_DISPATCHES)
def test_bad_dispatch_is_named(changes: str, parts: Parts) -> None:
    status, text = parts("dispatch", *changes.split())
    assert status == 1
    assert text.startswith("dispatch 7 (k): ")
    assert BAD_DISPATCHES[changes] in text


def test_dispatch_without_a_kernel(parts: Parts) -> None:
    assert parts("dispatch", "no_kernel=1") == (1, "dispatch 7 has no kernel")


def test_wrap_takes_whole_pages_only(parts: Parts) -> None:
    assert parts("wrap", str(3 * 16384), str(2 * 16384)) == (0, "")
    assert parts("wrap", "16384", str(1 << 20)) == (0, "")
    for address, length, said in [
        (16384 + 4096, 16384, "multiples of the page size, 16384"),
        (16384, 16383, "multiples of the page size, 16384"),
        (0, 16384, "null pointer"),
        (16384, 0, "cannot be empty"),
        (16384, (1 << 20) + 16384, "at most 1048576"),
    ]:
        status, text = parts("wrap", str(address), str(length))
        assert status == 1
        assert said in text


COMMAND_BUFFER_ERRORS = {
    1: "internal error",
    2: "timeout",
    3: "page fault",
    4: "access revoked",
    7: "not permitted",
    8: "out of memory",
    9: "invalid resource",
    10: "memoryless",
    11: "device removed",
    12: "stack overflow",
    99: "unknown error",
}


@pytest.mark.parametrize("code", COMMAND_BUFFER_ERRORS)
def test_command_buffer_error_in_words(code: int, parts: Parts) -> None:
    status, text = parts("failure", "1", str(code), "what Metal said")
    assert status == 0
    assert COMMAND_BUFFER_ERRORS[code] in text
    assert f"(code {code}: what Metal said)" in text
    assert "open the model again" in text
    assert "ZINCMETAL_METAL_DEBUG=1" in text


@pytest.mark.parametrize("name", ["kIOGPUCommandBufferCallbackErrorImpactingInteractivity", "Internal Error"])
def test_a_command_buffer_that_kept_the_display_waiting(name: str, parts: Parts) -> None:
    """As macOS 26 and macOS 15 say it, whatever the code is."""
    text = parts("failure", "1", "1", f"What it was (0000000e:{name})")[1]
    assert f"it kept the display waiting (code 1: What it was (0000000e:{name}))" in text
    assert "let the display sleep" in text


def test_error_of_another_domain_is_not_read_as_metals(parts: Parts) -> None:
    text = parts("failure", "0", "8", "something else")[1]
    assert "unknown error" in text
    assert "out of memory" not in text


def test_failed_encoders_are_named(parts: Parts) -> None:
    """With error options, the encoders that faulted or suffered are told, those that ended or never began are not."""
    text = parts("failure", "1", "3", "said", "rms_norm", "1", "mul_mv_q4_k", "4", "add", "2", "argmax", "3")[1]
    assert "mul_mv_q4_k faulted" in text
    assert "add affected" in text
    assert "rms_norm" not in text
    assert "argmax" not in text
    assert "ZINCMETAL_METAL_DEBUG" not in text


def test_missing_kernel_names_the_closest(parts: Parts) -> None:
    text = parts("missing", "mul_mv_q4k", "rope_kv_norm_f16", "mul_mm_q4_k", "mul_mv_q4_k", "mul_mv_q5_k", "add")[1]
    assert "no kernel 'mul_mv_q4k'; the closest of 5 are mul_mv_q4_k, " in text
    assert "rope" not in text
    assert "holds none" in parts("missing", "add")[1]


def test_missing_kernel_tells_what_did_not_compile(parts: Parts) -> None:
    text = parts("missing", "rms_norm", "add", "norm.metal: norm.metal does not compile: 7: no flaot\n flaot x;\n ^")[1]
    assert "no kernel 'rms_norm': norm.metal does not compile: 7: no flaot (python -m zincmetal.check" in text
    assert "closest" not in text


def encoded(parts: Parts, *arguments: str) -> list[str]:
    status, text = parts("launches", *arguments)
    assert status == 0
    return text.splitlines()


def test_encoder_is_told_only_what_changes(parts: Parts) -> None:
    calls = encoded(parts, "concurrent", "0", "a:0+0,1+16", "a:0+0,1+32", "b:2+0,1+32", "a:2+8,1+32,0+0")
    first = ["encoder", "pipeline a", "buffer 1+0", "buffer 2+16", "dispatch"]
    same_kernel = ["offset 2+32", "dispatch"]
    other_kernel = ["pipeline b", "buffer 1+0", "dispatch"]
    back = ["pipeline a", "offset 1+8", "buffer 3+0", "dispatch"]
    assert calls == first + same_kernel + other_kernel + back


def test_barriers_are_encoded_where_they_act(parts: Parts) -> None:
    """Before their dispatch; not in a serial encoder, which orders by itself, and not as an encoder's first call."""
    assert encoded(parts, "concurrent", "0", "!a:0+0", "!a:0+0", "a:0+0").count("barrier") == 1
    assert encoded(parts, "concurrent", "0", "a:0+0", "!a:0+0")[-2:] == ["barrier", "dispatch"]
    assert "barrier" not in encoded(parts, "serial", "0", "a:0+0", "!a:0+0")


def test_debug_gives_each_dispatch_an_encoder(parts: Parts) -> None:
    """A new encoder has nothing set: kernel and buffers are set again."""
    each = ["encoder", "pipeline a", "buffer 1+0", "dispatch"]
    assert encoded(parts, "concurrent", "1", "a:0+0", "!a:0+0") == each + each


def test_command_buffers_in_flight_are_bounded(parts: Parts) -> None:
    assert parts("bounded") == (0, "before 0 after 9 idle 1")


def test_a_wait_is_for_its_ticket(parts: Parts) -> None:
    """Not for what is in flight after it, whatever ends first; times are of the ticket, and zero once forgotten."""
    assert parts("tickets") == (0, "1 2 3 over 0 times 3 4 again 2\nold 0 new 8 none 0")


def test_first_failure_is_sticky(parts: Parts) -> None:
    assert parts("sticky") == (0, "first first first idle 1")


def test_a_sleeping_machine_is_no_lost_command_buffer(program: Path) -> None:
    """Clocks go on while a process is stopped, as they do while a Mac sleeps, for longer than the patience of 2 s."""
    with subprocess.Popen([program, "asleep"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "waits\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        said, _ = process.communicate("\n")
    assert (process.returncode, said) == (0, "ended at 2")


def test_lost_command_buffer_ends_the_wait(parts: Parts) -> None:
    idle, waited, submitted, left = parts("lost")[1].splitlines()
    assert idle == "idle 1"
    assert "completed nothing" in waited
    assert submitted == waited
    assert left == "idle 0"
