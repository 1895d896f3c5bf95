"""Copies between buffers: their order among steps, what is refused, and memory that the host shares."""

from __future__ import annotations

import gc
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from support import metal_double_lane
from support.device_lanes import LANES, opened
from support.metal_double import built
from support.tiny_steps import Run, TinySteps
from zincmetal.device import backend
from zincmetal.errors import DeviceError, UsageError


@pytest.fixture(params=LANES)
def model(request: pytest.FixtureRequest) -> Iterator[TinySteps]:
    with opened(request.param) as (core, device):
        yield TinySteps(core, device)


def filled(device: Any, content: Any, shared: bool = False) -> Any:
    buffer = device.alloc(content.nbytes, shared=shared)
    buffer.write(content)
    return buffer


@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True), (True, True)])
def test_bytes_are_copied_and_no_others(shared: tuple[bool, bool], model: TinySteps) -> None:
    a, b = np.arange(100, dtype=np.uint32), np.arange(1000, 1100, dtype=np.uint32)
    source, to = filled(model.device, a, shared[0]), filled(model.device, b, shared[1])
    to.copy_from(source, 40, 80, 120)
    want = b.copy()
    want[20:50] = a[10:40]
    assert to.read().view(np.uint32).tolist() == want.tolist()
    assert source.read().view(np.uint32).tolist() == a.tolist()
    to.copy_from(source)
    assert to.read().view(np.uint32).tolist() == a.tolist()
    to.copy_from(source, 0, 0, 0)
    to.copy_from(source, 396)
    assert to.read(0, 8).view(np.uint32).tolist() == [99, 1]


def test_within_one_buffer(model: TinySteps) -> None:
    buffer = filled(model.device, np.arange(8, dtype=np.uint32))
    buffer.copy_from(buffer, 0, 16, 16)
    assert buffer.read().view(np.uint32).tolist() == [0, 1, 2, 3] * 2
    for from_offset, offset, nbytes in ((0, 4, 8), (4, 0, 8), (0, 0, 32)):
        with pytest.raises(UsageError, match="overlap"):
            buffer.copy_from(buffer, from_offset, offset, nbytes)


def test_many_at_once_and_many_after_each_other(model: TinySteps) -> None:
    values = np.arange(40, dtype=np.uint32)
    a, b = filled(model.device, values), filled(model.device, values)
    model.device.copy([(b, 4 * i, a, 4 * (39 - i), 4) for i in range(40)])
    assert b.read().view(np.uint32).tolist() == values[::-1].tolist()
    for i in range(30):  # more than Metal has in flight
        b.copy_from(b, 4 * i, 4 * (i + 1), 4)
    assert b.read().view(np.uint32).tolist() == [39] * 31 + values[::-1][31:].tolist()


def test_a_copy_is_ordered_among_steps(model: TinySteps) -> None:
    """It sees what the step in flight writes, and the next step sees the copy. Nobody waits in between."""
    kept = model.device.alloc(model.buffers["table"].nbytes)
    kept.copy_from(model.buffers["table"])
    constant = filled(model.device, np.tile(np.eye(1, 64, 7, dtype=np.float32), (64, 1)))
    tokens = model.device.alloc(32)
    for _ in range(5):
        model.submit([Run([3, 4])], [0])
        tokens.copy_from(model.buffers["tokens"], 0, 0, 8)
        model.buffers["table"].copy_from(constant)
        model.submit([Run([-1], 2)], [0])
        model.buffers["table"].copy_from(kept)
        assert model.collect() == [model.after(3)]
        assert model.collect() == [7]
        model.submit([Run([-1], 3)], [0])
        assert model.collect() == [model.after(7)]
        assert tokens.read(0, 8).view(np.int32).tolist() == [3, 4]


def test_buffers_live_until_their_copy_has_ended(model: TinySteps) -> None:
    last = model.device.alloc(1 << 16)
    for i in range(12):
        model.submit([Run([3])], [0])
        source = filled(model.device, np.full(1 << 16, i, np.uint8))
        between = model.device.alloc(1 << 16)
        between.copy_from(source)
        last.copy_from(between)
        del source, between
        model.collect()
    assert (last.read() == 11).all()
    last.copy_from(filled(model.device, np.full(1 << 16, 99, np.uint8)))
    del last


def test_buffers_outlive_their_device(model: TinySteps) -> None:
    """What was copied is there, and a buffer waits for nothing that is gone."""
    device = model.core.Device(kernel_folder=backend.kernel_folder(model.core))
    source, to = filled(device, np.arange(16, dtype=np.uint32)), device.alloc(64)
    to.copy_from(source)
    del device
    gc.collect()
    assert to.read().view(np.uint32).tolist() == list(range(16))
    del source, to


def test_what_is_refused(model: TinySteps) -> None:
    a, b = model.device.alloc(64), model.device.alloc(64)
    for arguments, said in (
        ((0, 0, 68), "outside the buffer of 64"),
        ((64, 0, 4), "outside"),
        ((0, 64, 4), "outside"),
        ((68,), "outside"),
        ((2, 0, 4), "multiples of 4"),
        ((0, 2, 4), "multiples of 4"),
        ((0, 0, 6), "multiples of 4"),
        ((0, 0, 2**64 - 4), "outside"),
    ):
        with pytest.raises(UsageError, match=said):
            b.copy_from(a, *arguments)
    other = model.core.Device(kernel_folder=backend.kernel_folder(model.core)).alloc(64)
    for to, source in ((a, other), (other, a)):
        with pytest.raises(UsageError, match=r"another device's|device is closed"):
            to.copy_from(source)
    with pytest.raises(UsageError, match="another device's"):
        model.device.copy([(a, 0, b, 0, 4), (a, 0, other, 0, 4)])
    with pytest.raises(TypeError):
        a.copy_from(None)
    owner = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE, access=mmap.ACCESS_READ), np.uint8)
    with pytest.raises(UsageError, match="read-only"):
        model.device.wrap(owner, 0, mmap.PAGESIZE).copy_from(a)


def test_the_host_sees_shared_memory(model: TinySteps) -> None:
    buffer = model.device.alloc(64, shared=True)
    assert buffer.shared
    np.frombuffer(buffer, np.uint8)[:] = 5
    assert (buffer.read() == 5).all()
    assert model.device.alloc(64).shared == (model.device.info["unified_memory"])


def test_other_bytes_of_a_buffer_can_be_written_while_a_step_is_in_flight(model: TinySteps) -> None:
    model.submit([Run([3])], [0])
    history = model.buffers["history"]
    at = history.nbytes - 4
    history.write(np.array([77], np.int32), at)
    assert model.collect() == [model.after(3)]
    assert history.read(at).view(np.int32).tolist() == [77]
    assert model.history(0, 0) == 3


@pytest.mark.parametrize("behind", ["a step in flight", "a step", "a copy"])
def test_a_copy_that_fails_is_told_once(behind: str) -> None:
    """By the step behind it, or else by what is submitted next. Then the device goes on."""
    with metal_double_lane.installed(built()):
        double, core = metal_double_lane.Double(), backend.load("metal")
        model = TinySteps(core, core.Device(kernel_folder=backend.kernel_folder(core)))
        model.run(1)
        a, b = model.device.alloc(64), filled(model.device, np.arange(16, dtype=np.uint32))
        double.set("gpu=1:victim;slow=50")
        a.copy_from(b)
        if behind == "a step in flight":
            model.submit([Run([3])], [0])
            with pytest.raises(DeviceError, match="another program's GPU error"):
                model.collect()
        else:
            double.report()
            with pytest.raises(DeviceError, match="another program's GPU error"):
                a.copy_from(b) if behind == "a copy" else model.run(3)
        double.set("")
        assert model.steps.in_flight == 0
        assert model.run(3) == model.after(3)
        a.copy_from(b)
        assert a.read().view(np.uint32).tolist() == list(range(16))
        del model, a, b
        gc.collect()


def test_copies_are_released_and_leave_nothing() -> None:
    done = metal_double_lane.run(
        """
from support.tiny_steps import TinySteps
core = backend.load("metal")
model = TinySteps(core, core.Device(kernel_folder=str(metal_double_lane.KERNELS)))
before = double.report()["live"]["DoubleBuffer"]
for _ in range(20):
    model.device.alloc(64).copy_from(model.device.alloc(64))
double.report()
model.run(1)
print(double.report()["live"]["DoubleBuffer"] - before)
del model
gc.collect()
print(double.report()["live"])
""",
        built(),
    )
    assert (done.returncode, done.stdout) == (0, "0\n{}\n"), done.stderr
