"""The parts of the Metal backend that need no Metal, driven one by one through tests/csrc/metal/parts.cpp."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.paths import ROOT
from zincmetal.device import backend

KERNELS = ROOT / "kernels"
COMPILER = next(filter(None, (shutil.which(name) for name in ("c++", "g++", "clang++"))), None)

Parts = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiles tests/csrc/metal/parts.cpp."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("metal") / "parts"
    command = [COMPILER, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", "-I", str(ROOT / "csrc")]
    subprocess.run([*command, str(ROOT / "tests/csrc/metal/parts.cpp"), "-o", str(program)], check=True)
    return program


@pytest.fixture(scope="session")
def parts(program: Path) -> Parts:
    """Runs a command of tests/csrc/metal/parts.cpp; returns the exit status (1 is a DeviceError) and the text."""

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
    """Preprocesses a kernel file with an empty metal_stdlib; returns its tokens."""
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
    """An error after an included file, and one inside it, are reported at their place in the source."""
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
    assert ("prompt again" if code == 8 else "open the model again") in text
    assert text.splitlines()[1:] == [{8: "passes out of memory", 2: "lasts took too long"}.get(code, "lasts")]
    assert "ZINCMETAL_METAL_DEBUG=1" in text


DRIVER_ERRORS = {
    "Discarded (victim of GPU error/recovery) (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)": (
        "another program's GPU error took it down",
        "passes",
    ),
    "Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)": (
        "it kept the display waiting",
        "passes took too long",
    ),
    "Ignored (for causing prior/excessive GPU errors) (00000004:kIOGPU...SubmissionsIgnored)": (
        "access revoked: this process caused too many timeouts or hangs",
        "lasts",
    ),
    "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)": ("timeout", "lasts took too long"),
    "Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)": ("timeout", "lasts took too long"),
    "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)": (
        "out of memory",
        "passes out of memory",
    ),
    "Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault)": ("page fault", "lasts"),
    "Something new (0000002a:kIOGPUCommandBufferCallbackErrorNew)": ("internal error", "lasts"),
    "no number of the driver's (00000005)": ("internal error", "lasts"),
}


@pytest.mark.parametrize("said", DRIVER_ERRORS)
def test_the_drivers_text_tells_what_a_code_does_not(said: str, parts: Parts) -> None:
    """The text tells whose fault it is, and whether the device can go on, whatever the code."""
    what, kind = DRIVER_ERRORS[said]
    text, after = parts("failure", "1", "1", said)[1].splitlines()
    assert what in text
    assert after == kind
    assert ("prompt again" in text) == kind.startswith("passes")


@pytest.mark.parametrize("name", ["kIOGPUCommandBufferCallbackErrorImpactingInteractivity", "Internal Error"])
def test_a_command_buffer_that_kept_the_display_waiting(name: str, parts: Parts) -> None:
    """The text is macOS 26's or macOS 15's, whatever the code."""
    text = parts("failure", "1", "1", f"What it was (0000000e:{name})")[1]
    assert f"it kept the display waiting (code 1: What it was (0000000e:{name}))" in text
    assert "let the display sleep" in text


def test_error_of_another_domain_is_not_read_as_metals(parts: Parts) -> None:
    text = parts("failure", "0", "8", "something else")[1]
    assert "unknown error" in text
    assert "out of memory" not in text


def test_failed_encoders_are_named(parts: Parts) -> None:
    """With error options the message names the encoders that faulted or were affected, and no others."""
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


def encoded(parts: Parts, each: str, *dispatches: str, first: int = 0) -> list[str]:
    status, text = parts("launches", each, str(first), *dispatches)
    assert status == 0
    return text.splitlines()


def test_encoder_is_told_only_what_changes(parts: Parts) -> None:
    calls = encoded(parts, "0", "a:0+0,1+16", "a:0+0,1+32", "b:2+0,1+32", "a:2+8,1+32,0+0")
    first = ["encoder", "pipeline a", "buffer 1+0", "buffer 2+16", "dispatch"]
    same_kernel = ["offset 2+32", "dispatch"]
    other_kernel = ["pipeline b", "buffer 1+0", "dispatch"]
    back = ["pipeline a", "offset 1+8", "buffer 3+0", "dispatch"]
    assert calls == first + same_kernel + other_kernel + back


def test_a_command_buffer_may_begin_anywhere(parts: Parts) -> None:
    """After a cut an encoder sets all of its first dispatch, and later each buffer that the old encoder had set."""
    calls = encoded(parts, "0", "a:0+0,1+0,2+0", "!a:0+0", "!a:0+0,1+0,2+4", first=1)
    first = ["encoder", "pipeline a", "buffer 1+0", "dispatch"]
    assert calls == [*first, "barrier", "buffer 2+0", "buffer 3+4", "dispatch"]


def test_barriers_are_encoded_where_they_act(parts: Parts) -> None:
    """A barrier stands just before its dispatch, and not as an encoder's first call."""
    assert encoded(parts, "0", "!a:0+0", "!a:0+0", "a:0+0").count("barrier") == 1
    assert encoded(parts, "0", "a:0+0", "!a:0+0")[-2:] == ["barrier", "dispatch"]


def test_debug_gives_each_dispatch_an_encoder(parts: Parts) -> None:
    """In a new encoder nothing is set, so kernel and buffers are set again."""
    each = ["encoder", "pipeline a", "buffer 1+0", "dispatch"]
    assert encoded(parts, "1", "a:0+0", "!a:0+0") == each + each


def test_command_buffers_in_flight_are_bounded(parts: Parts) -> None:
    assert parts("bounded") == (0, "before 0 after 9 idle 1")


def test_a_wait_is_for_its_ticket(parts: Parts) -> None:
    """A wait ends with its ticket, not with later work. Times are the ticket's, and zero once it is forgotten."""
    assert parts("tickets") == (0, "1 2 3 over 0 times 3 4 again 2\nold 0 new 8 none 0")


def test_idle_is_what_was_in_flight_whatever_is_committed_meanwhile(parts: Parts) -> None:
    """Otherwise a recording that is dropped while another thread computes would never free its buffers."""
    assert parts("idle") == (0, "idle 1")


def test_a_submission_of_several_command_buffers(parts: Parts) -> None:
    """Two command buffers are in flight at a time. The time runs from the first to the last."""
    assert parts("several") == (0, "begun 3 then 4 of ticket 2 from 2 to 8")


def test_a_failure_that_lasts_is_kept(parts: Parts) -> None:
    assert parts("sticky") == (0, "lasting lasting lasting idle 1")


def test_a_failure_that_passes_is_of_what_was_in_flight(parts: Parts) -> None:
    """The next submission waits for the failed one and works. A failed ticket keeps its error."""
    said = parts("passing")[1]
    assert said.startswith("in flight 0 then 4, nothing, memory: no memory, memory: no memory, nothing, check nothing")
    assert said.endswith(", passing, memory: no memory")


def test_a_submission_that_failed_is_not_continued(parts: Parts) -> None:
    assert parts("passing_within") == (0, "passing nothing")


def test_a_failure_that_nobody_waits_for_is_told_once(parts: Parts) -> None:
    assert parts("unawaited") == (0, "passing 4 memory: no memory 8")


def test_a_wait_asks_whether_to_go_on(parts: Parts) -> None:
    """An interrupt is passed on when all committed work has ended; later waits work."""
    assert parts("polled") == (0, "an interrupt after 3, ended 2, full: an interrupt after all 1, goes on 10")


def test_a_wait_that_throws_is_over_when_all_has_ended(parts: Parts) -> None:
    """This holds for a failure and for an interrupt."""
    assert parts("throwing") == (0, "told 0 passing told 0 an interrupt")


def test_no_patience_before_the_first_completion(parts: Parts) -> None:
    said = parts("first")[1]
    assert said.startswith("nothing, then: the GPU completed nothing for ZINCMETAL_METAL_TIMEOUT seconds")


def test_a_sleeping_machine_is_no_lost_command_buffer(program: Path) -> None:
    """The process is stopped for longer than the timeout of 2 s, while clocks go on, as in a sleeping Mac."""
    with subprocess.Popen([program, "asleep"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "waits\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        process.stdin.write("\n")
        process.stdin.close()
        said = process.stdout.read()  # not communicate(), which skips text that readline() has read ahead
    assert (process.returncode, said) == (0, "ended at 2")


def test_lost_command_buffer_ends_the_wait(parts: Parts) -> None:
    idle, waited, submitted, left = parts("lost")[1].splitlines()
    assert idle == "idle 1"
    assert "completed nothing" in waited
    assert submitted == waited
    assert left == "idle 0"


# ---- where recordings are cut ------------------------------------------------------------------------------------


def pieces(parts: Parts, *arguments: str) -> list[tuple[int, int]]:
    """Runs a recording several times; returns for each round the command buffers, and the longest in milliseconds."""
    status, text = parts("pieces", *arguments)
    assert status == 0
    return [(int(n), int(longest)) for n, longest in (line.split() for line in text.splitlines())]


def test_no_command_buffer_is_longer_than_a_tenth_of_a_second(parts: Parts) -> None:
    """600 ms, guessed right from the start, become as few command buffers as the limit allows."""
    rounds = pieces(parts, "0.002x300", "rounds", *"11111")
    assert all(longest <= 100 for _, longest in rounds)
    assert 7 <= rounds[-1][0] <= 10


def test_what_is_short_becomes_one_command_buffer(parts: Parts) -> None:
    """The guess is for a slow GPU. Once measured, 15 ms are one command buffer."""
    rounds = pieces(parts, "0.00005x300", "rounds", *"1111111111")
    assert rounds[0][0] > 1
    assert rounds[-1] == (1, 15)


def test_a_guess_that_is_wrong_costs_two_command_buffers(parts: Parts) -> None:
    """Work takes twenty times the guess: the rest of the submission is cut finer, and the next submissions fit."""
    rounds = pieces(parts, "0.1x100", "rounds", *"111")
    assert rounds[0][0] > 50
    assert rounds[1:] == [(100, 100)] * 2


def test_weights_that_had_to_be_read_first_are_no_measure_for_long(parts: Parts) -> None:
    """A step of 30 ms took 30 s the first time."""
    rounds = pieces(parts, "0.0001x300", "rounds", "1000", *"1111111")
    assert rounds[1][0] > 100
    assert rounds[-1] == (1, 30)


def test_what_takes_longer_again_is_cut_finer_at_once(parts: Parts) -> None:
    """For example after chunks of few tokens: one command buffer takes up to twice the limit."""
    rounds = pieces(parts, "0.002x300", "rounds", "1", "1", "1", "1", "0.25", "1", "1")
    assert rounds[-2][1] < 200
    assert rounds[-1][1] <= 100


def test_what_the_driver_stopped_is_cut_finer(parts: Parts) -> None:
    before, _, after = pieces(parts, "0.0002x300", "rounds", "1", "stop", "1")[-3:]
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_a_decode_step_is_not_cut_by_a_guess(parts: Parts) -> None:
    """8 billion weights of 4.5 bits and 32 layers of attention over 32,768 positions take less than 100 ms."""
    weights = float(parts("guess", "1024", "64", str(8 << 19), "16384", "16384")[1]) * 8e9 / (8 << 20)
    attention = float(parts("guess", "32", "256", str(64 << 20), str(64 << 20), "16384")[1]) * 32
    assert weights + attention < 0.1


def test_a_chunk_of_a_large_model_is_cut_before_it_was_ever_run(parts: Parts) -> None:
    """512 tokens through 27 billion weights take tens of seconds on an M1."""
    product = float(parts("guess", "2048", "128", str(5120 * 5120 // 2), str(512 * 5120 * 4), str(512 * 5120 * 4))[1])
    assert 5 < product * 27e9 / 5120**2 < 60


# ---- what is read and kept on the host ---------------------------------------------------------------------------


def test_names_are_read_without_a_compiler(parts: Parts, tmp_path: Path) -> None:
    source = """#define TYPES(T) /* each */ T("a", Of<A>, 1) \\
    T("b", Of<B>, 2)
    #define ROW(type, Q, n) KERNEL("mul_" type "_r" #n, mul<Q, Shape##n>) KERNEL_UNROLLED(4, "add_" type, add<Q>)
    // KERNEL("in_a_comment", f<1>)
    TYPES(ROW)
    #ifdef __METAL_VERSION__
    KERNEL("plain", f<int, (1 > 0)>)
    #elif defined(NEVER)
    KERNEL("elif", f<2>)
    #else
    KERNEL("else", f<3>)
    #endif
    #if defined(NEVER) || defined(NO)
    KERNEL("never", f<4>)
    #endif
    """
    (tmp_path / "main.metal").write_text(source)
    status, text = parts("names", str(tmp_path), "main.metal")
    assert (status, text.split()) == (0, ["mul_a_r1", "add_a", "mul_b_r2", "add_b", "plain"])


@pytest.mark.parametrize("file", sorted(p.name for p in KERNELS.glob("*.metal")))
def test_names_are_those_of_the_preprocessor(file: str, parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "metal_stdlib").touch()
    rows = re.findall(r"host_name\(([^)]*)\)", " ".join(preprocessed(KERNELS / file, tmp_path, KERNELS)))
    expected = ["".join(re.findall(r'"([^"]*)"', row)) for row in rows]
    assert parts("names", str(KERNELS), file)[1].split() == expected
    assert expected


def test_the_host_reads_no_cache_line_that_the_gpu_writes_to() -> None:
    """While the host reads a step's results, the next step stores its own. Buffers begin at a cache line."""
    core = backend.load("cpu")
    assert core.params_dtype("Choice").itemsize * core.shapes()["MAX_OUT"] % 128 == 0


def test_a_heart_beats_while_it_is_touched(parts: Parts) -> None:
    """Untouched, it rests and ends its thread. A touch starts it again. A stop rests too."""
    said = "before 0 beats 1 rests 1 thread 0 again 1 in use 1 stopped 0 rests 2 none 0"
    assert parts("heartbeat") == (0, said)


def test_a_cache_file_is_written_whole_or_not_at_all(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINCMETAL_CACHE", str(tmp_path / "cache"))
    name = parts("cache", "key", "first")[1]
    assert parts("cache", "key", "second")[1] == f"{name} first"
    assert parts("cache", "key", "-")[1] == f"{name} second refused"
    assert parts("cache", "key", "third")[1] == f"{name} second"
    assert parts("cache", "another", "x")[1] != name
    assert {p.suffix for p in (tmp_path / "cache").iterdir()} == {".pipelines"}


def test_only_the_newest_cache_files_are_kept(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZINCMETAL_CACHE", str(tmp_path))
    names = [parts("cache", str(n), "x")[1] for n in range(8)]
    for age, name in enumerate(names):
        os.utime(tmp_path / name, (1e9 + age, 1e9 + age))
    assert {p.name for p in tmp_path.iterdir()} == set(names)
    last = parts("cache", "8", "x")[1]
    assert {p.name for p in tmp_path.iterdir()} == {*names[1:], last}


def test_the_cache_is_macos_and_can_be_turned_off(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ZINCMETAL_CACHE", "0")
    assert parts("cache", "key", "x") == (0, "off")
    monkeypatch.delenv("ZINCMETAL_CACHE")
    name = parts("cache", "key", "x")[1]
    assert (tmp_path / "Library" / "Caches" / "zincmetal" / name).read_text() == "x"
