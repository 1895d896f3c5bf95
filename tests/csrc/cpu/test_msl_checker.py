"""The checked build and the CPU device's validation: every planted fault gives its error, and the process goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from support.msl_probes import FOLDER
from zincmetal.device import backend
from zincmetal.errors import DeviceError

pytestmark = pytest.mark.skipif(not backend.is_built("checked"), reason="needs a build with ZINCMETAL_CHECKED=ON")
THREADS = 64
#: A pattern of the message of each fault in tests/csrc/msl/probes/probe_faults.metal. None: there is no fault.
MESSAGES: dict[str, str | None] = {
    "NO_FAULT": None,
    "NO_BARRIER": r"thread 32 reads 4 bytes at byte 0 of threadgroup array `shared` .* thread 0 wrote, with no barrier",
    "NO_SIMDGROUP_BARRIER": r"thread 1 reads .* `shared` .*, which thread 0 wrote, with no barrier between",
    "BARRIER_WITHOUT_MEMORY": r"thread \d+ reads .* `shared` .*, which thread \d+ wrote, with no barrier between",
    "BARRIER_FOR_OTHER_MEMORY": r"thread \d+ reads .* `shared` .*, which thread \d+ wrote, with no barrier between",
    "SIMD_SUM_IS_NO_BARRIER": r"thread \d+ reads .* `shared` .*, which thread \d+ wrote, with no barrier between",
    "SIMDGROUP_BARRIER": None,
    "SIMDGROUP_BARRIER_ACROSS_SIMDGROUPS": r"thread \d+ reads .* `shared` .*, which thread \d+ wrote, with no barrier",
    "WRITE_AFTER_READ": r"thread \d+ writes .* of .* `shared` .*, which thread \d+ read, with no barrier",
    "WRITE_TWICE": r"thread 1 writes .* `shared` .*, which thread 0 wrote, with no barrier between",
    "READ_UNWRITTEN": r"thread 0 reads .* at byte 0 of threadgroup array `shared` .*, which no thread has written",
    "ATOMIC_UNWRITTEN": r"thread \d+ (reads|changes) .* of threadgroup array `shared` .*, which no thread has written",
    "ATOMIC_STORED": None,
    "ARRAY_PAST_END": r"thread 63 reads 4 bytes at byte 256 of threadgroup array `shared` \(256 bytes\): out of bounds",
    "ARRAY_BEFORE_START": r"thread 0 reads 4 bytes at byte -4 of threadgroup array `shared` .*: out of bounds",
    "TOO_MUCH_THREADGROUP_MEMORY": r"asks for 33024 bytes of threadgroup memory with `shared`; there are 32768 in all",
    "BARRIER_NOT_REACHED": r"thread 0 waits at the threadgroup_barrier of probe_faults.metal:\d+, "
    r"which thread 40 does not reach: it has returned",
    "BARRIER_IN_TWO_PLACES": r"thread 40 is at the threadgroup_barrier of \S+:\d+ while others wait at that of \S+:\d+",
    "SIMD_SUM_NOT_REACHED": r"thread 0 waits at the simd_sum of \S+, which thread 16 of its simdgroup does not reach",
    "SIMD_SUM_AND_MAX": r"thread 16 is at the simd_max of \S+ while other lanes .* wait at the simd_sum of",
    "BARRIER_AND_SIMD_SUM": r"thread 0 waits at the simd_sum of \S+, which thread 7 of its simdgroup does not reach: "
    r"it waits at the threadgroup_barrier of",
    "OWN_ARRAY_PAST_END": r"thread 11 indexes 'float ?\[8\]' with 8, at probe_faults.metal:\d+: out of bounds",
    "OWN_ARRAY_BEFORE_START": r"thread 11 indexes 'float ?\[8\]' with -1, at probe_faults.metal:\d+: out of bounds",
    "FIELD_PAST_END": r"thread 11 indexes '(const )?float ?\[8\]' with 8, at probe_faults.metal:\d+: out of bounds",
    "VECTOR_PAST_END": r"thread 11 takes component 4 of a vector of 4: out of bounds",
    "READ_PAST_END": r"thread 63 reads 4 bytes at byte 256 of binding 1 \(256 bytes\): out of bounds",
    "READ_BEFORE_START": r"thread 0 reads 4 bytes at byte -4 of binding 1 \(256 bytes\): out of bounds",
    "WRITE_PAST_END": r"thread 63 writes 4 bytes at byte 256 of binding 2 \(256 bytes\): out of bounds",
    "WRITE_BEFORE_START": r"thread 0 writes 4 bytes at byte -4 of binding 2 \(256 bytes\): out of bounds",
    "READ_FAR_AWAY": r"thread 0 reads 4 bytes at 0x[0-9a-f]+, far from every binding: out of bounds",
    "WRITE_TO_INPUT": r"thread 0 writes 4 bytes at byte 0 of binding 1 \(256 bytes\), which its signature only reads",
    "WRITE_TO_PARAMS": r"thread 3 writes 4 bytes .*: out of bounds",
    "MISALIGNED": r"thread 0 touches 16 bytes at byte 4 of binding 1 .*, which is not aligned to 16 bytes",
    "DEVICE_NO_BARRIER": r"thread 33 reads .* at byte 0 of binding 2 .*, which thread 0 wrote|"
    r"thread \d+ writes .* of binding 2 .*, which thread \d+ read, with no barrier between",
    "DEVICE_BARRIER_FOR_OTHER_MEMORY": r"reads .* of binding 2 .*, which thread \d+ wrote, with no barrier between",
    "DEVICE_BARRIER": None,
    "TWO_THREADGROUPS_WRITE": r"threadgroup \(1, 0, 0\), thread 5 writes .* at byte 20 of binding 2 .*, "
    r"which threadgroup \(0, 0, 0\) of the same dispatch wrote",
    "THREADGROUP_READS_ANOTHER": r"threadgroup \(1, 0, 0\), thread 0 reads .*, "
    r"which threadgroup \(0, 0, 0\) of the same dispatch wrote",
    "THREADGROUP_WRITES_WHAT_ANOTHER_READ": r"threadgroup \(1, 0, 0\), thread 0 writes .*, "
    r"which threadgroup \(0, 0, 0\) of the same dispatch read",
    "ATOMIC_AND_PLAIN": r"thread \d+ (writes|changes) .*, which thread \d+ wrote, with no barrier between",
}


def open_checked() -> Any:
    """Opens a fresh device, since a failed one stays failed."""
    return backend.load("checked").Device(threads=1, native=False)


class Bench:
    """A device with an input that holds its indices and an output: 64 floats each, inside larger buffers."""

    def __init__(self) -> None:
        self.device = open_checked()
        self.buffers = [self.device.alloc(1024), self.device.alloc(1024)]
        self.input, self.output = (np.frombuffer(b, np.float32)[64:128] for b in self.buffers)
        self.input[:] = np.arange(THREADS)
        self.bindings = [(b, 256, 256) for b in self.buffers]
        self.params = np.array([THREADS, 0], np.uint32).tobytes()

    def run(self, kernel: str, grid: int = 1, **changes: Any) -> None:
        """Runs a kernel with the bench's arguments, or with changes of them."""
        what = {"params": self.params, "bindings": self.bindings, "threads": THREADS, **changes}
        self.device.run([(kernel, what["params"], what["bindings"], (grid, 1, 1), what["threads"], False)])


def works() -> None:
    """Fails unless a fresh device computes."""
    bench = Bench()
    bench.run("probe_increment")
    assert np.array_equal(bench.output, bench.input + 1)


def test_every_fault_has_a_message() -> None:
    named = re.findall(r"^FAULT\((\w+)\)", (FOLDER / "probe_faults.metal").read_text(), re.M)
    assert sorted(named) == sorted(MESSAGES)


@pytest.mark.parametrize("fault", MESSAGES)
def test_fault(fault: str) -> None:
    bench, message = Bench(), MESSAGES[fault]
    kernel = f"probe_fault_{fault}"
    grid = 2 if "THREADGROUP" in fault and "MEMORY" not in fault else 1
    if message is None:
        bench.run(kernel, grid)
        return
    with pytest.raises(DeviceError, match=message) as caught:
        bench.run(kernel, grid)
    assert str(caught.value).startswith(f"kernel {kernel}, threadgroup (")
    with pytest.raises(DeviceError, match=re.escape(str(caught.value))):  # sticky
        bench.run("probe_increment")
    works()


def test_missing_barrier_between_dispatches() -> None:
    """If one dispatch writes memory that another touches, a barrier must lie between them, whatever the bindings."""

    def chain(barrier: bool, *pairs: tuple[int, int]) -> Callable[[], Any]:
        bench = Bench()
        third = bench.device.alloc(1024)
        buffers = [*bench.bindings, (third, 256, 256)]
        dispatches = [
            ("probe_increment", bench.params, [buffers[i], buffers[o]], (1, 1, 1), THREADS, barrier) for i, o in pairs
        ]
        return lambda: bench.device.run(dispatches)

    between = "with no barrier between dispatch 0 and this one, 1"
    with pytest.raises(DeviceError, match=f"reads .* which kernel probe_increment .* wrote, {between}"):
        chain(False, (0, 1), (1, 2))()
    with pytest.raises(DeviceError, match=f"writes .* which kernel probe_increment .* read, {between}"):
        chain(False, (1, 2), (0, 1))()
    with pytest.raises(DeviceError, match=f"writes .* which kernel probe_increment .* wrote, {between}"):
        chain(False, (0, 2), (1, 2))()
    chain(True, (0, 1), (1, 2), (0, 1), (1, 2))()
    chain(False, (0, 1), (0, 2))()
    works()


def test_arguments_that_do_not_fit() -> None:
    """Validation names the kernel and the binding; the device is not harmed."""
    bench = Bench()
    first, second = bench.bindings
    cases: dict[str, dict[str, Any]] = {
        r"dispatch 0 \(probe_increment\): its parameters have 8 bytes, not 4": {"params": b"1234"},
        r"\(probe_increment\): parameters of 0 bytes": {"params": b""},
        r"\(probe_increment\): it has 2 buffers, not 1": {"bindings": [first]},
        r"\(probe_increment\): it has 2 buffers, not 3": {"bindings": [first, second, second]},
        r"buffer 2 covers bytes 256 to 256\+772 of a buffer of 1024": {"bindings": [first, (second[0], 256, 772)]},
        r"buffer 1 covers bytes 2048 to": {"bindings": [(first[0], 2048, 4), second]},
        r"buffer 2 has 3 bytes, less than one element of 4": {"bindings": [first, (second[0], 0, 3)]},
        r"buffer 2 at offset 258 is not aligned to 4 bytes": {"bindings": [first, (second[0], 258, 256)]},
        r"48 threads per threadgroup is not a multiple of 32": {"threads": 48},
        r"\): 0 threads per threadgroup is not": {"threads": 0},
        r"1056 threads per threadgroup; on this device the kernel takes 1024": {"threads": 1056},
        r"a grid of 0 x 1 x 1": {"grid": 0},
    }
    for message, changes in cases.items():
        with pytest.raises(DeviceError, match=message):
            bench.run("probe_increment", **changes)
    with pytest.raises(DeviceError, match="no kernel named probe_missing"):
        bench.run("probe_missing")
    bench.run("probe_increment")
    assert np.array_equal(bench.output, bench.input + 1)
