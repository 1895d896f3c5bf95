"""The CPU device: its thread pool, its buffers and its info."""

from __future__ import annotations

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.paths import TESTS
from zincmetal.device import backend
from zincmetal.errors import DeviceError, UsageError

cpu = pytest.mark.skipif("cpu" not in backend.built(), reason="this installation has no CPU core")
pytestmark = cpu


def open_cpu(threads: int, native: bool = True) -> tuple[Any, Any]:
    core: Any = backend.load("cpu")
    return core, core.Device(threads=threads, native=native)


def floats(device: Any, content: Any) -> tuple[Any, Any]:
    """Makes a buffer of these float32 values; returns it and a view of it."""
    content = np.asarray(content, np.float32)
    buffer = device.alloc(content.nbytes)
    view = np.frombuffer(buffer, np.float32)
    view[:] = content.ravel()
    return buffer, view


class Chain:
    """A chain of ``add`` dispatches over rows of n floats: each needs the result of the one before."""

    def __init__(self, core: Any, device: Any, rows: int, n: int) -> None:
        self.device, self.rows, self.n = device, rows, n
        self.nbytes = rows * n * 4
        shapes = core.shapes()
        self.grid, self.threads = (-(-n // shapes["ELEMENTWISE_COLUMNS"]), rows, 1), shapes["ELEMENTWISE_THREADS"]
        self.params = np.zeros(1, core.params_dtype("ElementwiseParams"))
        self.params["n"] = n
        self.step = device.alloc(np.dtype(core.params_dtype("Step")).itemsize)
        np.frombuffer(self.step, core.params_dtype("Step"))["n_tokens"] = rows

    def add(self, a: Any, b: Any, out: Any, barrier: bool = True) -> Any:
        step = (self.step, 0, len(memoryview(self.step)))
        bindings = [step, *((buffer, 0, self.nbytes) for buffer in (a, b, out))]
        return ("add", self.params.tobytes(), bindings, self.grid, self.threads, barrier)


# More threads than cores must work too, if slowly: they yield to each other.
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("native", [True, False])
def test_dependent_dispatches(threads: int, native: bool) -> None:
    """Doubling 16 times is exact, and wrong if a dispatch begins before the one before it has ended."""
    core, device = open_cpu(threads, native)
    chain = Chain(core, device, rows=7, n=1500)
    start = np.random.default_rng().integers(1, 200, chain.rows * chain.n).astype(np.float32)
    (a, at), (b, _) = floats(device, start), floats(device, np.zeros_like(start))
    for _ in range(20):
        at[:] = start
        device.run([chain.add(a, a, b) if i % 2 == 0 else chain.add(b, b, a) for i in range(16)])
        assert np.array_equal(at, start * 65536)


def test_independent_dispatches() -> None:
    """Dispatches with no barrier between them run in any order, and all run."""
    core, device = open_cpu(3, native=False)
    chain = Chain(core, device, rows=1, n=700)
    one, _ = floats(device, np.ones(700))
    outputs = [floats(device, np.full(700, np.nan)) for _ in range(40)]
    device.run([chain.add(one, one, out, barrier=False) for out, _ in outputs])
    for _, view in outputs:
        assert (view == 2).all()


def test_many_devices() -> None:
    """Pools start and stop without leaving threads behind."""
    before = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None
    for threads in (1, 4, 2, 8) * 5:
        core, device = open_cpu(threads, native=False)
        chain = Chain(core, device, rows=2, n=64)
        (a, view), (b, _) = floats(device, np.ones(128)), floats(device, np.ones(128))
        device.run([chain.add(a, b, a)])
        assert (view == 2).all()
        del device, chain
    if before is not None:
        assert len(os.listdir("/proc/self/task")) <= before


def test_exit_with_a_live_device() -> None:
    """A process whose pool waits for work ends at once, with status 0."""
    code = (
        "from zincmetal.device import backend; core = backend.load('cpu'); kept = core.Device(threads=4); print('end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.parametrize(
    "isa", ["plain", "avx2" if platform.machine() in ("aarch64", "arm64") else "neon", "nonsense", ""]
)
def test_isa_cap(isa: str) -> None:
    """ZINCMETAL_ISA caps the instruction set; one of another processor, or an unknown value, changes nothing."""
    code = "from zincmetal.device import backend; print(backend.load('cpu').Device(threads=1).info['features']['isa'])"
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    environment = {**os.environ, "ZINCMETAL_ISA": isa}
    capped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert capped.stdout.strip() == ("plain" if isa == "plain" else plain.stdout.strip())


def test_info() -> None:
    _, device = open_cpu(3)
    info = device.info
    assert info["backend"] == "cpu"
    assert info["unified_memory"]
    assert info["max_threadgroup_bytes"] == 32768
    assert info["page_bytes"] == mmap.PAGESIZE
    assert 2**26 < info["working_set_bytes"] < 2**48
    assert "3 threads" in info["name"]


def test_buffers() -> None:
    core, device = open_cpu(2)
    assert not np.frombuffer(device.alloc(5000), np.uint8).any()
    chain = Chain(core, device, rows=1, n=100)
    (a, _), (out, view) = floats(device, np.arange(100)), floats(device, np.zeros(100))
    between = device.alloc(4096)
    device.run([chain.add(a, a, between), chain.add(between, a, out)])
    assert np.array_equal(view, np.arange(100) * 3)


def test_wrapped_memory_is_not_copied() -> None:
    core, device = open_cpu(2)
    owner = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    values = np.frombuffer(owner, np.float32)
    values[:] = 1
    wrapped = device.wrap(owner, mmap.PAGESIZE, mmap.PAGESIZE)
    chain = Chain(core, device, rows=1, n=mmap.PAGESIZE // 4)
    device.run([chain.add(wrapped, wrapped, wrapped)])
    assert (values[: mmap.PAGESIZE // 4] == 1).all()
    assert (values[mmap.PAGESIZE // 4 :] == 2).all()
    with pytest.raises(DeviceError, match="whole pages"):
        device.wrap(owner, 64, mmap.PAGESIZE)


def test_allocation_that_cannot_be() -> None:
    _, device = open_cpu(1)
    with pytest.raises((DeviceError, MemoryError)):
        device.alloc(2**62)
    assert not np.frombuffer(device.alloc(64), np.uint8).any()


NO_MEMORY_LEFT = """
import resource
import numpy as np
from zincmetal.device import backend
from zincmetal.errors import OutOfMemoryError

core = backend.load("cpu")
device = core.Device(threads=1)
k, m, tokens, shapes = 1 << 16, 64, 512, core.shapes()
step = np.zeros(1, core.params_dtype("Step"))
step["n_tokens"] = tokens
buffers = [device.alloc(n) for n in (step.nbytes, k * m * 4, k * tokens * 4, m * tokens * 4)]
np.frombuffer(buffers[0], np.uint8)[:] = step.view(np.uint8)
params = np.array((k, m, 4 * k, m, 1, 0, 0, 0.0), core.params_dtype("MatMulParams")).tobytes()
bindings = [(b, 0, b.nbytes) for b in buffers]
launch = ("mul_mm_f32", params, bindings, (tokens // shapes["MUL_MM_TOKENS"], 1, 1), shapes["MUL_MM_THREADS"], False)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
taken = []
try:  # what the allocator has left over from imports
    while True:
        taken.append(bytearray(1 << 16))
except MemoryError:
    pass
try:
    for _ in range(100):
        device.run([launch])
except OutOfMemoryError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space through /proc")
def test_a_native_kernel_without_memory_for_its_tiles() -> None:
    done = subprocess.run([sys.executable, "-c", NO_MEMORY_LEFT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "kernel mul_mm_f32: no memory for its tiles" in done.stdout


BORROWED = """
import gc, mmap, tempfile
import numpy as np
from support.tiny_steps import Run, TinySteps
from zincmetal.device import backend

core, device = backend.open_device("cpu", 1)
model = TinySteps(core, device)
file = tempfile.NamedTemporaryFile()
file.write(model.buffers["table"].read().tobytes())
file.flush()
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
table = device.wrap(np.frombuffer(mapped, np.uint8), 0, len(mapped))
assert memoryview(table).readonly
model.buffers["table"] = table
plan = model.compiled([model.begin(), *model.body()])
del model.buffers["table"], table
gc.collect()
try:
    mapped.close()
except BufferError:
    print("pinned")
model.submit([Run([3])], [0], plan)
print(model.collect() == [model.after(3)])
"""


def test_a_plan_keeps_mapped_memory_alive() -> None:
    """Python may drop the wrapped buffer and its owner; the plan keeps the memory mapped, read-only."""
    paths = os.pathsep.join([str(Path(zincmetal.__file__).parents[1]), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", BORROWED], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "pinned\nTrue\n", "")


TWO_THREADS = """
import threading
import numpy as np
from zincmetal.device import backend

core, device = backend.open_device("cpu", 2)
params = np.array((4096,), core.params_dtype("ElementwiseParams")).tobytes()
wrong = []


def work(value):
    step = device.alloc(core.params_dtype("Step").itemsize)
    a, b, out = (device.alloc(64 * 4096 * 4) for _ in range(3))
    np.frombuffer(step, np.uint32)[0] = 64
    a_, b_, out_ = (np.frombuffer(x, np.float32) for x in (a, b, out))
    a_[:], b_[:] = value, 1
    launch = ("add", params, [(x, 0, x.nbytes) for x in (step, a, b, out)], (4, 64, 1), 256, False)
    for _ in range(100):
        out_[:] = -1
        device.run([launch])
        wrong.append(1) if (out_ != value + 1).any() else None


threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
[t.start() for t in threads]
[t.join() for t in threads]
print(len(wrong), "wrong")
"""


def test_one_device_serves_several_threads() -> None:
    done = subprocess.run([sys.executable, "-c", TWO_THREADS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 wrong\n", "")


def test_nothing_where_an_object_should_be() -> None:
    core = open_cpu(1)[0]
    with pytest.raises(TypeError):
        core.Steps(None, *[None] * 7, 1, 1)
    with pytest.raises(TypeError):
        core.Plan(None, [], 1)
    for threads in (-1, 2000):
        with pytest.raises(DeviceError, match="threads"):
            core.Device(threads=threads)


def test_buffers_copy_in_and_out_within_their_bounds():
    _, device = open_cpu(1)
    buffer = device.alloc(16)
    data = np.arange(4, dtype=np.float32)
    buffer.write(data)
    buffer.write(b"\x00\x00\x80\x3f", 12)
    assert buffer.shared
    assert buffer.read(4).view(np.float32).tolist() == [1, 2, 1]
    assert buffer.read(4, 4).view(np.float32).tolist() == [1]
    for wrong in (lambda: buffer.read(8, 9), lambda: buffer.read(17), lambda: buffer.write(data, 1)):
        with pytest.raises(UsageError, match="outside the buffer of 16 bytes"):
            wrong()


def test_kernels_lie_beside_the_core(monkeypatch):
    """In an editable install the core does not lie beside the Python sources."""
    core = ModuleType("_core_metal")
    core.__file__ = "/site-packages/zincmetal/_core_metal.so"
    monkeypatch.setattr(backend, "KERNEL_FOLDER", None)
    assert backend.kernel_folder(core) == "/site-packages/zincmetal/kernels"
