"""Every barrier of a real plan is needed: if one is left out, the checker stops the kernels that it kept apart.

With all barriers the checker stops none: test_metal_double.py shows that on the same model.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from support.paths import DATA
from support.steps_lab import StepsLab
from zincmetal.device import backend
from zincmetal.device.buffers import bound
from zincmetal.errors import DeviceError
from zincmetal.plan.chunks import ONE_ROW, StepShape, chunk_shape, decode_shape
from zincmetal.plan.plan import Dispatch, Plan

pytestmark = pytest.mark.skipif(not backend.is_built("checked"), reason="this installation has no checked core")
PATH = DATA / "qwen35moe-q4k-q5k-q8.gguf"
RUNS = {
    ONE_ROW: [(0, [5])],
    decode_shape(4): [(0, [5]), (1, [6]), (2, [7])],
    chunk_shape(3, 0, 1, "argmax"): [(0, range(3))],
    chunk_shape(5, 2, 3, "argmax"): [(0, [5]), (1, [6]), (2, range(3))],
}


@pytest.fixture(scope="module")
def lab():
    lab = StepsLab(PATH, "checked", kv="f32", context=64)
    yield lab
    lab.close()


class Replay:
    """Runs a plan segment by segment, on memory of its own and the model's weights."""

    def __init__(self, lab: StepsLab, shape: StepShape) -> None:
        self.lab, self.plan = lab, lab.programs.get(shape, 0).plan
        lab.lengths.clear()
        rows, writes, n_single = lab.describe(RUNS[shape])
        outs = np.array([row for row in range(len(rows)) if rows["end"][row] == row + 1], np.uint32)
        lab.core.describe(lab.steps, rows, outs, writes, None, n_single)
        names = {r.buffer for d in self.plan.dispatches for r in d.regions if not r.buffer.startswith("weights.")}
        self.memory = {name: lab.buffers.buffer(name).read() for name in names}
        lab.steps.drop()

    def run(self, dispatches: list[Dispatch], checked: bool) -> None:
        """Runs dispatches on a new device, since a failed one stays failed. Keeps their output if not ``checked``."""
        device = self.lab.core.Device(threads=1, native=not checked)
        buffers = {name: device.alloc(content.nbytes) for name, content in self.memory.items()}
        for name, content in self.memory.items():
            buffers[name].write(content)
        device.run([bound(d, lambda name: buffers.get(name) or self.lab.buffers.buffer(name)) for d in dispatches])
        if not checked:
            self.memory = {name: buffer.read() for name, buffer in buffers.items()}


def segments(plan: Plan) -> list[list[Dispatch]]:
    """Splits the dispatches at the barriers."""
    found: list[list[Dispatch]] = [[]]
    for d in plan.dispatches:
        if d.barrier:
            found.append([])
        found[-1].append(d)
    return found


@pytest.mark.parametrize("shape", RUNS, ids=str)
def test_leaving_out_any_barrier_is_caught(lab, shape):
    replay = Replay(lab, shape)
    parts = segments(replay.plan)
    assert len(parts) > 20
    for before, after in pairwise(parts):
        if before[-1].launch.op is after[0].launch.op and "attention_prefill" in after[0].launch.kernel:
            continue  # the kernel for single rows and the one for longer runs write other rows of one buffer
        without = [*before, replace(after[0], barrier=False), *after[1:]]
        with pytest.raises(DeviceError, match="|".join(d.launch.kernel for d in without)):
            replay.run(without, checked=True)
        replay.run(before, checked=False)
