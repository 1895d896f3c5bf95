"""Every barrier of a real plan is needed: if one is left out, the checker stops the kernels that it kept apart.

With all barriers the checker stops none: test_metal_double.py shows that on the same model.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import zincmetal
from support.reference_models import reference_models
from zincmetal.device import backend
from zincmetal.device.buffers import bound, step_record
from zincmetal.errors import DeviceError
from zincmetal.plan.plan import Dispatch, Plan

pytestmark = pytest.mark.skipif(not backend.is_built("checked"), reason="this installation has no checked core")
PATH = next(p for p in reference_models("qwen35moe") if "q4k" in p.stem)
N_TOKENS = 3


@pytest.fixture(scope="module")
def model():
    with zincmetal.load(PATH, device="checked", kv="f32", context=64) as m:
        yield m


class Replay:
    """Runs a plan segment by segment, on memory of its own and the model's weights."""

    def __init__(self, model: zincmetal.Model, plan: Plan) -> None:
        self.core, self.plan, self.model = model.engine.core, plan, model
        names = {r.buffer for d in plan.dispatches for r in d.regions if not r.buffer.startswith("weights.")}
        self.memory = {name: model.engine.buffers.buffer(name).read() for name in names}
        n_tokens = min(N_TOKENS, plan.rows)
        self.memory["step"] = step_record(model.engine.core, n_tokens).view(np.uint8)
        self.memory["tokens"][: 4 * n_tokens] = np.arange(n_tokens, dtype=np.int32).view(np.uint8)

    def run(self, dispatches: list[Dispatch], checked: bool) -> None:
        """Runs dispatches on a new device, since a failed one stays failed. Keeps their output if not ``checked``."""
        device = self.core.Device(threads=1, native=not checked)
        buffers = {name: device.alloc(content.nbytes) for name, content in self.memory.items()}
        for name, content in self.memory.items():
            buffers[name].write(content)
        device.run(
            [bound(d, lambda name: buffers.get(name) or self.model.engine.buffers.buffer(name)) for d in dispatches]
        )
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


@pytest.mark.parametrize("rows", [1, 32])
def test_leaving_out_any_barrier_is_caught(model, rows):
    plan = model.plan(rows)
    replay, parts = Replay(model, plan), segments(plan)
    assert len(parts) > 30
    for before, after in pairwise(parts):
        without = [*before, replace(after[0], barrier=False), *after[1:]]
        with pytest.raises(DeviceError, match="|".join(d.launch.kernel for d in without)):
            replay.run(without, checked=True)
        replay.run(before, checked=False)
