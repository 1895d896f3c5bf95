"""Every barrier of a real plan is needed: with any one left out the checker stops the kernels that it kept apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import zincmetal
from conftest import reference_models
from zincmetal import backend
from zincmetal.errors import DeviceError
from zincmetal.plan import Dispatch, Plan, ready

pytestmark = pytest.mark.skipif(not backend.is_built("checked"), reason="this installation has no checked core")
PATH = next(p for p in reference_models("qwen35moe") if "q4k" in p.stem)
N_TOKENS = 3


@pytest.fixture(scope="module")
def model():
    with zincmetal.load(PATH, device="checked", kv="f32", context=64) as m:
        yield m


def run(model: zincmetal.Model, dispatches: list[Dispatch]) -> None:
    """The dispatches on a device of their own, since a failure stays with its device."""
    device = model.core.Device()
    buffers = {}

    def buffer(name: str):
        if name not in buffers:
            mine = model._memory.buffer(name)
            buffers[name] = device.alloc(mine.nbytes)
            buffers[name].write(mine.read())
        return buffers[name]

    step = np.zeros(1, model.core.params_dtype("Step"))
    step["n_tokens"] = min(N_TOKENS, model_rows(dispatches))
    buffer("step").write(step)
    buffer("tokens").write(np.arange(step["n_tokens"][0], dtype=np.int32))
    device.run([ready(d, buffer) for d in dispatches])


def model_rows(dispatches: list[Dispatch]) -> int:
    return N_TOKENS if any("mul_mm" in d.launch.kernel for d in dispatches) else 1


def weakened(plan: Plan, i: int) -> list[Dispatch]:
    """The dispatches up to barrier i, without it."""
    return [*plan.dispatches[:i], replace(plan.dispatches[i], barrier=False)]


@pytest.mark.parametrize("rows", [1, 32])
def test_leaving_out_any_barrier_is_caught(model, rows):
    plan = model.plan(rows)
    run(model, list(plan.dispatches))
    barriers = [i for i, d in enumerate(plan.dispatches) if d.barrier]
    assert len(barriers) > 30
    for i in barriers:
        with pytest.raises(DeviceError, match=plan.dispatches[i].launch.kernel):
            run(model, weakened(plan, i))
