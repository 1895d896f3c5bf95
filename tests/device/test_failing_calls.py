"""Calls of the system fail in turn: threads, maps, files. Errors are typed, nothing leaks, and the next use works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import zincmetal
from support.paths import DATA, SUPPORT
from zincmetal.errors import DeviceError

PATH = DATA / "llama-q4_k_m.gguf"

# Fails call 1, then 2, ... of each kind, until a use makes fewer.
USES = """
import ctypes, json, logging, os, shutil, sys, tempfile, time, zincmetal
from collections import Counter
from zincmetal.errors import ZincError

path, kinds = sys.argv[1], sys.argv[2:]
system, folder, ids = ctypes.CDLL(None), tempfile.mkdtemp(), [i % 40 + 5 for i in range(70)]
logging.getLogger("zincmetal").setLevel(logging.ERROR)

def use():
    for _ in range(2):
        with zincmetal.load(path, device="cpu", threads=2, context=128, cache_dir=folder) as model:
            first = model.generate(ids, 3).tokens
            assert model.submit(ids, max_tokens=3).result().tokens == first
    return first

def held():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

wanted, seen = use(), {}
before = min(held() for _ in range(100) if not time.sleep(0.01))  # when the last thread has gone
for kind in kinds:
    seen[kind] = Counter()
    for n in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        system.calls_fail(kind.encode(), ctypes.c_long(n))
        outcome = "no error"
        try:
            assert use() == wanted
        except ZincError as error:
            outcome = type(error).__name__
        failed = system.calls_failed()
        system.calls_fail(b"", ctypes.c_long(0))
        if not failed:
            break
        seen[kind][outcome] += 1
        assert use() == wanted, (kind, n)
        for _ in range(500):  # the system takes a moment to forget a thread that was joined
            if held() == before:
                break
            time.sleep(0.01)
        assert held() == before, (kind, n, held(), before)
shutil.rmtree(folder, ignore_errors=True)
print(json.dumps(seen))
"""
#: Errors that a user may see of each kind. A cache folder that cannot be written to is a warning.
OUTCOMES = {
    "thread": {"DeviceError", "no error"},
    "map": {"GGUFError"},
    "duplicate": {"GGUFError"},
    "open": {"GGUFError", "no error"},
    "write": {"no error"},
    "rename": {"no error"},
    "mkdir": {"no error"},
}


@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_any_call_of_the_system_may_fail(tmp_path: Path) -> None:
    library = tmp_path / "failing_calls.so"
    source = SUPPORT / "failing_calls.cpp"
    subprocess.run(["c++", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    command = [sys.executable, "-c", USES, str(PATH), *OUTCOMES]
    env = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert {kind: set(found) for kind, found in json.loads(done.stdout).items()} == OUTCOMES


def test_a_model_goes_on_after_a_thread_could_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request that failed is not left in the queue: nothing runs that nobody asked for."""
    start, refused = threading.Thread.start, []

    def refuse(thread: threading.Thread) -> Any:
        if thread.name == "zincmetal-steps" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        return start(thread)

    with zincmetal.load(PATH, device="cpu", threads=1, context=64) as model:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(DeviceError, match="can't start new thread: end other programs"):
            model.generate([1, 2, 3], max_tokens=2)
        assert model.figures()["waiting"] == 0
        assert len(model.generate([1, 2, 3], max_tokens=2).tokens) == 2
        assert refused
        assert model.figures()["steps"] == 3  # of that request alone
