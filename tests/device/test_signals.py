"""A process that is stopped and goes on, that is told to end, or that ends with answers that nobody has read."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from support.paths import DATA

PATH = str(DATA / "llama-q4_k_m.gguf")
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

ANSWERS = """
import sys, zincmetal
model = zincmetal.load(sys.argv[1], device="cpu", threads=2, context=512)
streams = [model.submit([i + 5, 6, 7], max_tokens=200) for i in range(3)]
print("begun", flush=True)
print([list(stream.result().tokens) for stream in streams], flush=True)
"""
ENDLESS = """
import sys, zincmetal
model = zincmetal.load(sys.argv[1], device="cpu", threads=2, context=512)
print("begun", flush=True)
while True:
    for stream in [model.submit([i + 5, 6, 7], max_tokens=200) for i in range(3)]:
        stream.result()
"""
UNREAD = """
import sys, zincmetal
model = zincmetal.load(sys.argv[1], device="cpu", threads=2, context=512)
kept = [model.submit([i + 5, 6, 7], max_tokens=400) for i in range(3)]
stream = model.stream_generate([9, 8, 7], max_tokens=400)
next(stream)
with_session = zincmetal.load(sys.argv[1], device="cpu", threads=2, context=64)
session = with_session.session()
session.__enter__().prefill([1, 2, 3])
print("ends", flush=True)
"""


def started(code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, PATH]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@posix
def test_a_process_that_was_stopped_goes_on_with_the_same_tokens() -> None:
    said = []
    for stops in (0, 3):
        with started(ANSWERS) as process:
            assert process.stdout
            assert process.stdout.readline() == "begun\n"
            for _ in range(stops):
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.05)
                process.send_signal(signal.SIGCONT)
            out, errors = process.communicate(timeout=120)
            assert (process.returncode, errors) == (0, "")
            said.append(out)
    assert said[0] == said[1]


@posix
def test_a_process_that_is_told_to_end_ends() -> None:
    with started(ENDLESS) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        process.terminate()
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGTERM


def test_the_interpreter_ends_with_answers_that_nobody_has_read() -> None:
    for _ in range(3):
        with started(UNREAD) as process:
            out, errors = process.communicate(timeout=120)
            assert (process.returncode, out, errors) == (0, "ends\n", "")
