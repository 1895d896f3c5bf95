"""Costs of dispatches: bytes and operations of a plan, counted in two ways."""

from __future__ import annotations

import numpy as np
import pytest

from support.paths import DATA
from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.graph.ops import Weight
from zincmetal.measure.costs import Costs
from zincmetal.plan.chunks import ONE_ROW, chunk_shape
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target


@pytest.fixture(scope="module")
def planner():
    with gguf.open(DATA / "qwen35moe-q4k-q5k-q8.gguf") as file:
        core = backend.load("cpu")
        yield Planner(file, Target.of(core, core.Device(threads=1).info), 256)


CHUNK = chunk_shape(32, 0, 1, "argmax")


def costs_of(planner, plan, pos=0):
    return Costs(plan, planner.config, planner.addresses.room.pages * planner.target.page, pos)


@pytest.mark.parametrize("shape", [ONE_ROW, CHUNK], ids=str)
def test_costs_have_the_weights_of_a_plan(planner, shape):
    """All other bytes are activations and states: all are counted, and no weight among them."""
    plan = planner.plan(shape)
    costs = costs_of(planner, plan)
    for d in plan.dispatches:
        others = {(a.operand, m): r.nbytes for a, r in zip(d.launch.args, d.regions, strict=True) for m in a.mode}
        most = sum(n for (operand, _), n in others.items() if not isinstance(operand, Weight))
        beside = costs.of(d).nbytes - sum(plan.weights_of(d).values())
        assert beside <= most, d.launch.kernel
        assert beside > 0 or d.launch.kernel in ("begin_step", "argmax_final"), d.launch.kernel
    assert sum(sum(plan.weights_of(d).values()) for d in plan.dispatches) == sum(plan.weight_bytes().values())


def test_products_count_two_operations_for_a_weight(planner):
    """For every row and weight that it meets: the experts that it uses, and one row for the head."""
    decode, prefill = (
        sum(c.of(d).flops for d in p.dispatches if d.launch.kernel.startswith(("mul_", "moe_m", "moe_few")))
        for p in (planner.plan(), planner.plan(CHUNK))
        for c in [costs_of(planner, p)]
    )
    head = 2 * int(np.prod(planner.addresses.weight("output.weight").shape))
    assert prefill - head == 32 * (decode - head)


def test_attention_costs_grow_with_the_position(planner):
    plan = planner.plan(CHUNK)
    (attention,) = (d for d in plan.dispatches if d.launch.kernel.startswith("attention"))
    cfg = planner.config
    for pos in (0, 100):
        pairs = sum(pos + t + 1 for t in range(32))
        assert (
            costs_of(planner, plan, pos).of(attention).flops
            == 4 * cfg.layers[-1].n_head * cfg.layers[-1].head_dim * pairs
        )
