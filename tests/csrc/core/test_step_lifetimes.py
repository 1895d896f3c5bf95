"""Steps in flight under Ctrl-C, a second thread, a fork and the end of memory. Most run a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import zincmetal
from support import metal_double_lane
from support.device_lanes import opened
from support.metal_double import built
from support.paths import TESTS
from support.tiny_steps import Run, TinySteps
from zincmetal.errors import UsageError

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space through /proc")

PRELUDE = """
import os, signal, sys
import numpy as np
from support.tiny_steps import Run, TinySteps
from zincmetal.device import backend
from zincmetal.errors import DeviceError


def heard(*_):
    raise KeyboardInterrupt


def cpu(threads):
    core = backend.load("cpu")
    return TinySteps(core, core.Device(threads=threads))


def product(model, k):
    \"\"\"A product of 64 x k weights with 512 rows.\"\"\"
    m, rows = 64, 512
    every = np.zeros(1, model.core.params_dtype("Step"))
    every["n_tokens"] = rows
    for name, nbytes in (("all", every.nbytes), ("w", k * m * 4), ("many", k * rows * 4), ("products", m * rows * 4)):
        model.buffers[name] = model.device.alloc(nbytes)
    model.buffers["all"].write(every)
    grid, fields = (rows // model.shapes["MUL_MM_TOKENS"], 1, 1), {"k": k, "m": m, "row_bytes": 4 * k}
    return model.launch("mul_mm_f32", "MatMulParams", fields, "all w many products", grid, "MUL_MM_THREADS")
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(Path(zincmetal.__file__).parents[1]), str(TESTS)])
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + code, *arguments]  # of forks
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


INTERRUPTED = """
threads, then = int(sys.argv[1]), sys.argv[2]
model = cpu(threads)
plan = model.compiled([model.begin(), *[product(model, 4096)] * 500, *model.body()])
signal.signal(signal.SIGALRM, heard)
signal.setitimer(signal.ITIMER_REAL, 0.1)
try:
    model.submit([Run([3])], [0], plan)
    model.collect()
except KeyboardInterrupt:
    print("heard", model.steps.in_flight)
if then == "collect":
    print(model.collect() == [model.after(3)])
else:
    model.steps.drop()
    choices = np.frombuffer(model.buffers["results"], model.core.params_dtype("Choice"))
    print(model.steps.in_flight, choices["id"].max() < 1)
print(model.run(5) == model.after(5), model.steps.counters["steps"])
"""


@pytest.mark.parametrize(
    ("threads", "then", "said"),
    [
        ("1", "drop", "heard 0\n0 True\nTrue 1\n"),  # its submission was interrupted, and dropped
        ("2", "drop", "heard 1\n0 True\nTrue 1\n"),  # the rest of it is skipped
        ("2", "collect", "heard 1\nTrue\nTrue 2\n"),  # it went on
    ],
)
def test_a_step_hears_signals(threads: str, then: str, said: str) -> None:
    done = run(INTERRUPTED, threads, then)
    assert done.stdout == said, done.stderr


INTERRUPTED_METAL = """
import os, signal
from support.tiny_steps import Run, TinySteps
core = backend.load("metal")
model = TinySteps(core, core.Device(kernel_folder=str(metal_double_lane.KERNELS)))
double.set("slow=400")
model.submit([Run([3])], [0])
model.submit([Run([-1], 1)], [0])
def heard(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, heard)
signal.setitimer(signal.ITIMER_REAL, 0.1)
try:
    model.collect()
except KeyboardInterrupt:
    print("heard", model.steps.in_flight)
print(model.collect() == [model.after(3)], model.collect() == [model.after(3, 2)])
"""


def test_steps_on_metal_hear_signals() -> None:
    done = metal_double_lane.run(INTERRUPTED_METAL, built())
    assert done.stdout == "heard 2\nTrue True\n", done.stderr


FORKED = """
model = cpu(2)
model.submit([Run([3])], [0])
model.submit([Run([-1], 1)], [0])
child = os.fork()
if child == 0:
    other = model.buffers["x"]
    calls = (
        model.collect, model.steps.drop, lambda: model.submit([Run([1])]), lambda: model.device.alloc(64),
        lambda: model.core.describe(model.steps, *model.described([Run([1])])),
        lambda: model.core.submit_described(model.steps, model.plan), lambda: other.copy_from(model.buffers["table"]),
        lambda: model.compiled([model.begin()]),
    )
    for call in calls:
        try:
            call()
        except DeviceError as error:
            assert "before a fork" in str(error)
        else:
            os._exit(3)
    del model, calls, call, other
    sys.exit(0 if cpu(2).run(5) >= 0 else 4)
assert os.waitpid(child, 0)[1] == 0
print(model.collect() == [model.after(3)], model.collect() == [model.after(3, 2)])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_with_steps_in_flight() -> None:
    """The child gets an error, can open a device of its own, and ends well; the parent goes on."""
    done = run(FORKED)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\n", "")


FAILING = """
import resource
model = cpu(int(sys.argv[1]))
plan = model.compiled([model.begin(), product(model, 1 << 16), *model.body()])
model.run(1)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
for attempt in range(2):
    try:
        for _ in range(100):  # whoever works at it first may still have memory
            model.submit([Run([3])], [0], plan)
            model.submit([Run([-1], 1)], [0], plan)
            model.collect()
            model.collect()
    except DeviceError as error:
        print(error)
    if attempt == 0 and model.steps.in_flight:  # a submission failed, not a wait
        model.steps.drop()
    print(model.steps.in_flight)
"""


@linux
@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_failure_in_flight(threads: str) -> None:
    """It is told at once and at every later call."""
    done = run(FAILING, threads)
    assert done.returncode == 0, done.stderr
    error, state, again, still = done.stdout.splitlines()
    assert "kernel mul_mm_f32: no memory for its tiles" in error
    assert again == error
    assert state == still == "0"


@pytest.mark.parametrize("call", ["submit", "collect", "drop", "describe"])
def test_a_second_thread_is_refused(call: str) -> None:
    """It may close the model and read its numbers, while another thread is in a call."""
    with opened("metal") as (core, device):
        double = metal_double_lane.Double()
        model = TinySteps(core, device)
        double.set("slow=500")
        model.submit([Run([3])], [0])
        collected: list[list[int]] = []
        other = threading.Thread(target=lambda: collected.append(model.collect()))
        other.start()
        calls = {
            "submit": lambda: model.submit([Run([4])], [0]),
            "collect": model.collect,
            "drop": model.steps.drop,
            "describe": lambda: core.describe(model.steps, *model.described([Run([4])])),
        }
        time.sleep(0.1)  # now it is in its call
        with pytest.raises(UsageError, match="another thread is running a step"):
            calls[call]()
        assert model.steps.in_flight == 1
        model.steps.close()
        other.join()
        double.set("")
        assert collected == [[model.after(3)]]
