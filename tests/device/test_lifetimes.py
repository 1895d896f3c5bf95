"""The core survives Ctrl-C, forks, the interpreter's end and the end of memory. Each test runs a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import SUPPORT
from support.reference_models import reference_models
from zincmetal import watchdog

PATH = str(reference_models("llama")[0])
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, or preloads a library")


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, *arguments]  # Python warns of forks
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


DAEMONS = """
import sys, threading, zincmetal
from zincmetal.errors import UsageError
started = threading.Semaphore(0)
def work(model):
    while True:
        try:
            model.generate([1, 2, 3], 40)
        except UsageError as error:  # the models are closed at the end
            assert "closed" in str(error)
            return
        started.release()
for _ in range(4):
    threading.Thread(target=work, args=(zincmetal.load(sys.argv[1], device="cpu", threads=2),), daemon=True).start()
for _ in range(8):
    started.acquire()
"""


def test_the_interpreter_ends_while_threads_are_in_the_core() -> None:
    for _ in range(3):
        done = run(DAEMONS, PATH)
        assert (done.returncode, done.stderr) == (0, "")


FORKED = """
import os, sys, zincmetal
from zincmetal.errors import DeviceError
model = zincmetal.load(sys.argv[1], device="cpu", threads=2)
with model.session() as session:
    first = session.prefill([5, 6])
    second = session.decode(first, ahead=True)
    child = os.fork()
    if child == 0:
        calls = (
            lambda: session.decode(second),
            lambda: session.step([1, 2]),
            lambda: model.generate([5], 3),
            lambda: model.device.alloc(64),
            lambda: model.device.limits("argmax_final"),
        )
        for call in calls:
            try:
                call()
            except DeviceError as error:
                assert "before a fork" in str(error)
            else:
                os._exit(3)
        with zincmetal.load(sys.argv[1], device="cpu", threads=2) as own:
            own.generate([5], 3)
        del model, session, calls, call
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    session.settle()
    assert session.ids == [5, 6, first, second]
assert model.generate([5, 6], 3).tokens[:2] == [first, second]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_with_a_step_in_flight() -> None:
    """The child gets an error, can load a model of its own, and ends well; the parent goes on."""
    done = run(FORKED, PATH)
    assert (done.returncode, done.stderr) == (0, "")


SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
try:
    failure = interpreters.run_string(interpreters.create(), "import zincmetal._core_cpu")
except Exception as error:
    failure = error
print(failure)
"""


def test_a_sub_interpreter_is_refused() -> None:
    done = run(SUBINTERPRETER)
    assert "ImportError" in done.stdout, done.stderr


# Fails allocation 1, then 2, ... of each call, alone or with all later ones, until a call makes fewer.
WITHOUT_MEMORY = """
import ctypes, sys, zincmetal, zincmetal._core_cpu, zincmetal.engine.engine, zincmetal.text.tokenizer
from zincmetal.errors import OutOfMemoryError, ZincError

memory = ctypes.CDLL(None)
places = [line.split()[0].split("-") for line in open("/proc/self/maps") if "_core_cpu" in line]
memory.memory_of(ctypes.c_ulong(int(places[0][0], 16)), ctypes.c_ulong(int(places[-1][1], 16)))
load = lambda: zincmetal.load(sys.argv[1], device="cpu", threads=int(sys.argv[2]), context=64)
model, errors = load(), 0
prompt = [i % 40 + 5 for i in range(40)]
calls = {
    "load": lambda: load().close(),
    "generate": lambda: (model.reset(), model.generate(prompt, 3)),
    "sample": lambda: (model.reset(), model.generate(prompt, 3, temperature=1.0, seed=1)),
}
for name, call in calls.items():
    for all_after in (0, 1):
        n = 1
        while True:
            if name != "load":
                model.close()
                model = load()
            memory.memory_fail(ctypes.c_long(n), all_after)
            try:
                call()
            except (ZincError, MemoryError) as error:
                errors += isinstance(error, OutOfMemoryError)
            failed = memory.memory_failed()
            memory.memory_fail(ctypes.c_long(0), 0)
            if not failed:
                break
            n += 1 if n < 8 else n // 3
print(errors > 20)
"""


@linux
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_memory_may_end_at_any_allocation(threads: str, tmp_path: Path) -> None:
    library, source = tmp_path / "failing_memory.so", SUPPORT / "failing_memory.cpp"
    subprocess.run(["c++", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    done = run(WITHOUT_MEMORY, PATH, threads, LD_PRELOAD=str(library))
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@pytest.mark.parametrize(("chosen", "value"), [(None, "1 1"), ("0", "0 None")])
def test_the_driver_of_a_mac_is_asked_for_patience_as_soon_as_the_package_is_imported(chosen, value):
    """The variable is set before another library opens Metal. A user's own value stays."""
    environment = {k: v for k, v in os.environ.items() if k not in (watchdog.VARIABLE, "ZINCMETAL_RELAXED")}
    code = f"import zincmetal, os; print(os.environ[{watchdog.VARIABLE!r}], os.environ.get('ZINCMETAL_RELAXED'))"
    environment |= {} if chosen is None else {watchdog.VARIABLE: chosen}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.strip() == value
