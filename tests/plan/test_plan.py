"""Plans: barriers, the arena and counters are as recorded, and the record is true."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import zincmetal
from support.reference_models import reference_models
from zincmetal.plan.addresses import Region
from zincmetal.plan.barriers import place_barriers
from zincmetal.plan.estimate import in_units
from zincmetal.plan.plan import Plan

PATH = reference_models("qwen3")[0]


@pytest.fixture(scope="module")
def model():
    with zincmetal.load(PATH, device="cpu", kv="f32", context=128) as m:
        yield m


@pytest.fixture(params=[1, 32, 512])
def plan(model, request) -> Plan:
    return model.plan(request.param)


def test_no_hazard_is_left(plan):
    assert plan.hazards() == []


def test_removing_any_barrier_is_caught(plan):
    barriers = [i for i, d in enumerate(plan.dispatches) if d.barrier]
    assert barriers
    for i in barriers:
        weakened = list(plan.dispatches)
        weakened[i] = replace(weakened[i], barrier=False)
        assert replace(plan, dispatches=tuple(weakened)).hazards(), f"barrier {i} guards nothing"


def test_live_values_do_not_share_bytes(plan):
    """The last writer of every value that a dispatch reads from the arena is the value's producer."""
    owner: dict[Region, str] = {}
    for d in plan.dispatches:
        pairs = list(zip(d.launch.args, d.regions, strict=True))
        for arg, region in pairs:
            if region.buffer == "arena" and "r" in arg.mode:
                assert owner.get(region) == arg.operand.name
        for arg, region in pairs:
            if region.buffer == "arena" and "w" in arg.mode:
                owner = {r: n for r, n in owner.items() if not r.overlaps(region)}
                owner[region] = arg.operand.name


def test_every_region_fits_its_buffer(model, plan):
    for d in plan.dispatches:
        for region in d.regions:
            assert region.offset + region.nbytes <= model.engine.buffers.buffer(region.buffer).nbytes


def test_serial_order_equals_concurrent_order(model):
    """The plan's barriers suffice: more barriers change no bit of the result."""
    plan = model.plan(32)
    everywhere = replace(plan, dispatches=tuple(replace(d, barrier=True) for d in plan.dispatches))
    ids = np.arange(30, dtype=np.int32)
    results = []
    for p in (plan, everywhere):
        compiled = model.engine.programs.compile(p)
        model.reset()
        model.engine.core.prefill_step(model.engine.steps, compiled, ids)
        results.append(model.engine.last_logits().copy())
        model.engine.steps.rewind(0)
    assert (results[0] == results[1]).all()


def test_one_command_buffer_per_token(model):
    model.reset()
    before = model.engine.steps.counters
    n = len(model.generate([1, 2, 3], max_tokens=9).tokens)
    after = model.engine.steps.counters
    # Two for the prompt, whose last token is a step of its own; the last token is chosen but not run.
    assert after["command_buffers"] - before["command_buffers"] == n + 1
    assert after["tokens"] - before["tokens"] == 3 + n - 1
    prompt, token = model.plan(32), model.plan(1)
    dispatches = len(prompt.dispatches) + n * len(token.dispatches)
    assert after["dispatches"] - before["dispatches"] == dispatches
    assert after["barriers"] - before["barriers"] == prompt.n_barriers + n * token.n_barriers


def test_weight_bytes_of_decode_are_the_files(model):
    """A decode step reads every matrix once, and one row of the embedding."""
    read = sum(model.plan(1).weight_bytes().values())
    embd = model.file.tensors["token_embd.weight"]
    all_bytes = sum(t.nbytes for t in model.file.tensors.values())
    row = embd.nbytes // embd.shape[0]
    rope = model.config.n_layer * 4 * model.config.n_rot // 2
    assert read == all_bytes - embd.nbytes + row + rope


def test_exports(plan):
    assert plan.dump().count("\n") == len(plan.dispatches)
    exported = json.loads(plan.to_json())
    assert len(exported["dispatches"]) == len(plan.dispatches)
    dot = plan.to_dot()
    assert dot.count("[label=") == len(plan.dispatches)
    assert " -> " in dot


def test_a_plan_in_a_line(plan):
    shown = repr(plan)
    assert f"{len(plan.dispatches)} dispatches, {plan.n_barriers} barriers" in shown
    assert len(shown) < 100


def test_a_table_for_notebooks_counts_every_dispatch_and_byte(plan):
    shown = plan._repr_html_()
    rows = re.findall(r"<tr><td>(\w+)</td><td>(\d+)</td><td>", shown)
    assert sum(int(n) for _, n in rows) == len(plan.dispatches)
    assert {"rms_norm", "rope_kv", "attention"} <= {name for name, _ in rows}
    assert f"<th>{in_units(sum(plan.weight_bytes().values()))}</th></tr></table>" in shown


def test_a_place_without_an_operand_is_a_dash_in_the_dump(model):
    lines = model.plan(1).dump().splitlines()[1:]
    for line, d in zip(lines, model.plan(1).dispatches, strict=True):
        assert line.split().count("-") == sum(arg.unused for arg in d.launch.args)
    assert any(" - " in line for line in lines if "mul_mv_stack" in line)
    assert " - " not in next(line for line in lines if "mul_mv_swiglu" in line)


def test_placing_barriers_by_hand():
    """a writes x, b reads x, c reads y: one barrier, before b. Then d overwrites y: another barrier."""

    class L:
        def __init__(self, *modes):
            self.args = tuple(type("A", (), {"mode": m}) for m in modes)

    x, y, z = (Region("arena", at, 16) for at in (0, 16, 32))
    placed = place_barriers([L("w"), L("r", "w"), L("r"), L("w")], [(x,), (x, z), (y,), (y,)])
    assert [d.barrier for d in placed] == [False, True, False, True]
