"""Plans: barriers, the arena and counters are as recorded, and the record is true."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.paths import DATA
from support.steps_lab import StepsLab
from zincmetal.plan.addresses import Region
from zincmetal.plan.barriers import conflict, hazards, longest_chain, place_barriers
from zincmetal.plan.chunks import ONE_ROW, chunk_shape, decode_shape
from zincmetal.plan.estimate import in_units
from zincmetal.plan.plan import Plan

PATH = DATA / "qwen3-q8_0.gguf"


SHAPES = [
    ONE_ROW,
    decode_shape(8),
    chunk_shape(32, 0, 1, "argmax"),
    chunk_shape(64, 9, 9, "argmax"),
    chunk_shape(33, 0, 33, "all"),
    chunk_shape(512, 0, 0, "none"),
]
MANY = chunk_shape(32, 0, 1, "argmax")


@pytest.fixture(scope="module")
def lab():
    lab = StepsLab(PATH, kv="f32", context=128)
    yield lab
    lab.close()


@pytest.fixture(params=SHAPES, ids=str)
def plan(lab, request) -> Plan:
    return lab.programs.get(request.param, 0).plan


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


def test_every_region_fits_its_buffer(lab, plan):
    for d in plan.dispatches:
        for region in d.regions:
            assert region.offset + region.nbytes <= lab.buffers.buffer(region.buffer).nbytes


def test_serial_order_equals_concurrent_order(lab):
    """The plan's barriers suffice: more barriers change no bit of the result."""
    plan = lab.planner.plan(MANY)
    everywhere = replace(plan, dispatches=tuple(replace(d, barrier=True) for d in plan.dispatches))
    results = []
    for p in (plan, everywhere):
        compiled = lab.programs.compile(p)
        lab.lengths[0] = 0
        rows, writes, n_single = lab.describe([(0, range(30))])
        lab.core.decode_step(lab.steps, compiled, rows, np.uint32([29]), writes, None, n_single)
        lab.core.collect_step(lab.steps)
        results.append(lab.logits())
    assert (results[0] == results[1]).all()


def test_one_command_buffer_per_token(lab):
    lab.lengths[0] = 0
    before, n = lab.steps.counters, 9
    lab.generate(0, [1, 2, 3], n)
    after = lab.steps.counters
    # Two for the prompt, whose last token is a step of its own; the last token is chosen but not run.
    assert after["command_buffers"] - before["command_buffers"] == n + 1
    assert after["tokens"] - before["tokens"] == 3 + n - 1
    prompt, token = lab.planner.plan(chunk_shape(2, 0, 0, "none")), lab.planner.plan(ONE_ROW)
    assert after["dispatches"] - before["dispatches"] == len(prompt.dispatches) + n * len(token.dispatches)
    assert after["barriers"] - before["barriers"] == prompt.n_barriers + n * token.n_barriers


def test_weight_bytes_of_decode_are_the_files(lab):
    """A decode step reads every matrix once, and one row of the embedding."""
    read = sum(lab.planner.plan().weight_bytes().values())
    embd = lab.file.tensors["token_embd.weight"]
    all_bytes = sum(t.nbytes for t in lab.file.tensors.values())
    row = embd.nbytes // embd.shape[0]
    rope = lab.planner.config.n_layer * 4 * lab.planner.config.layers[-1].n_rot // 2
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
    assert {"embed", "rope_kv", "attention"} <= {name for name, _ in rows}
    assert f"<th>{in_units(sum(plan.weight_bytes().values()))}</th></tr></table>" in shown


def test_a_place_without_an_operand_is_a_dash_in_the_dump(lab):
    lines = lab.planner.plan().dump().splitlines()[1:]
    for line, d in zip(lines, lab.planner.plan().dispatches, strict=True):
        assert line.split().count("-") == sum(arg.unused for arg in d.launch.args)
    assert any(" - " in line for line in lines if "mul_mv_stack" in line)
    assert " - " not in next(line for line in lines if "mul_mv_swiglu" in line)


def launch(op: object, *modes: str) -> Any:
    """A launch of ``op`` with arguments of these modes."""
    return SimpleNamespace(op=op, args=[SimpleNamespace(mode=mode) for mode in modes])


def placed(launches: list[Any], regions: list[tuple[Region, ...]]) -> list[bool]:
    found = place_barriers(launches, regions)
    assert hazards(found) == []
    return [d.barrier for d in found]


X, Y, Z = (Region("arena", at, 16) for at in (0, 16, 32))


def test_placing_barriers_by_hand():
    """a writes x, b reads x, c reads y: one barrier, before b. Then d overwrites y: another barrier."""
    launches = [launch(op, *modes) for op, modes in zip("abcd", (["w"], ["r", "w"], ["r"], ["w"]), strict=True)]
    assert placed(launches, [(X,), (X, Z), (Y,), (Y,)]) == [False, True, False, True]


def test_the_longest_chain_by_hand():
    """a and b write x and y side by side; c reads both; d reads z, as e does, which then overwrites it."""
    launches = [launch(op, *modes) for op, modes in zip("abcde", ("w", "w", "rr", "r", "rw"), strict=True)]
    both = Region("arena", 0, 32)
    dispatches = place_barriers(launches, [(X,), (Y,), (both, Z), (Z,), (Z, Z)])
    assert longest_chain(dispatches[:1]) == 1
    assert longest_chain(dispatches[:4]) == 2
    assert longest_chain(dispatches) == 3
    assert longest_chain([]) == 0


def test_the_longest_chain_of_a_plan_follows_its_conflicts(lab):
    dispatches = lab.planner.plan().dispatches
    chains: list[int] = []
    for i, d in enumerate(dispatches):
        chains.append(1 + max((chains[j] for j in range(i) if conflict(dispatches[j], d)), default=0))
    assert lab.planner.plan().longest_chain == max(chains)
    assert f"longest chain {max(chains)}" in lab.planner.plan().dump()
