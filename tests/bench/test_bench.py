"""The base of the benches: the timed products, the costs of dispatches, the verdict on a sanitizer's run."""

from __future__ import annotations

import argparse
import subprocess
import sys

import numpy as np
import products
import pytest
import splits
from costs import Costs
from products import N_USED, Lab, Loaded, down_mix, gate_up, linear, stack

import sanitize
import zincmetal
from support.paths import DATA, TESTS
from zincmetal import gguf
from zincmetal.check.inputs import random_weights
from zincmetal.device import backend
from zincmetal.errors import UsageError
from zincmetal.gguf import quants
from zincmetal.graph.ops import Weight
from zincmetal.plan.chunks import ONE_ROW, chunk_shape
from zincmetal.plan.plan import ARENA
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target
from zincmetal.plan.tuning import Split

Q8_0, Q4_K, Q5_K = quants.Q8_0, quants.Q4_K, quants.Q5_K

SMALL = [
    linear(Q8_0, 67, k=256),
    linear(Q8_0, 67, k=256, add=True),
    linear(Q8_0, 67, 33, k=256),
    stack(Q8_0, 67, 33, k=256),
    gate_up(Q4_K, 24, 35, 256),
    down_mix(Q5_K, 24, 67, 256),
    down_mix(Q5_K, 24, 67, 256, Q8_0),
]
every_product = pytest.mark.parametrize("product", SMALL, ids=lambda p: p.id)


@pytest.fixture(scope="module")
def lab() -> Lab:
    lab = Lab()
    lab.cold_bytes = 1 << 20
    return lab


def reference(loaded: Loaded, turn: int):
    """Computes the outputs of one product in float64."""
    rng = np.random.default_rng(7)
    weights = [
        quants.dequantize(w.type, random_weights(w.type, w.shape, rng), w.shape).astype(np.float64)
        for w in loaded.product.weights
    ]
    x, residual, x_shared, mix = (
        np.asarray(loaded.activation(name), np.float64) if loaded.has(name) else None
        for name in (products.X, products.RESIDUAL, "x_shared", "expert_weights")
    )
    if weights[0].ndim == 2:
        return np.concatenate([w @ x + (0 if residual is None else residual) for w in weights])
    ids = loaded.activation(f"ids.{turn}")
    if "gated" in loaded.product.kernel:
        gate, up = (np.einsum("emk,k->em", w[ids], x) for w in weights)
        return (gate / (1 + np.exp(-gate)) * up).reshape(-1)
    out = residual + np.einsum("e,emk,ek->m", mix[:N_USED], weights[0][ids], x.reshape(N_USED, -1))
    return out + mix[N_USED] * (weights[1] @ x_shared) if len(weights) > 1 else out


@every_product
def test_products_are_right(lab, product):
    loaded = Loaded(lab, product)
    got = loaded.outputs()
    want = reference(loaded, turn=0)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@every_product
def test_a_recording_goes_round_all_weights(lab, product):
    """Every byte of weights is read equally often, and not again before all other bytes."""
    loaded = Loaded(lab, product)
    recording = loaded.recording()
    places = loaded.copies * product.turns()
    assert recording.n >= products.MIN_DISPATCHES
    assert recording.n % places == 0
    per_product = len(recording.dispatches) // recording.n
    seen = [
        tuple((r.buffer, r.offset) for r in d.regions if r.buffer == "weights") + ids(d)
        for d in recording.plan.dispatches
    ]
    assert len(set(seen)) == places * per_product
    assert seen[: places * per_product] == seen[-places * per_product :]
    assert recording.nbytes * places == loaded.copies * sum(w.type.nbytes(w.shape) for w in product.weights) + (
        loaded.copies * (product.turns() - 1) * shared_bytes(product)
    )


def ids(d):
    return tuple(a.operand.name for a in d.launch.args if a.operand.name.startswith("ids."))


def shared_bytes(product):
    return sum(w.type.nbytes(w.shape) for w in product.weights if w.name == "shared")


@every_product
def test_turns_have_experts_of_their_own(lab, product):
    loaded = Loaded(lab, product)
    chosen = [loaded.activation(f"ids.{t}") for t in range(product.turns() if product.turns() > 1 else 0)]
    flat = np.concatenate(chosen) if chosen else np.arange(0)
    assert len(set(flat.tolist())) == flat.size
    assert flat.size == (product.weights[0].shape[0] if chosen else 0)


@every_product
def test_barriers_are_those_of_a_plan(lab, product):
    """A product waits for the one before it; the dispatches of two matrices do not wait for each other."""
    dispatches = Loaded(lab, product).recording().plan.dispatches
    per_product = len(product.ops(0, 0))
    assert [d.barrier for d in dispatches[:4]] == [i > 0 and i % per_product == 0 for i in range(4)]
    assert any(r.buffer == ARENA for r in dispatches[0].regions)


@every_product
@pytest.mark.parametrize("threads", [32, 96, 256])
def test_outputs_do_not_depend_on_the_split(lab, product, threads):
    """For every number of rows that this build has."""
    loaded = Loaded(lab, product)
    want = loaded.usual_outputs
    for rows in (None, *lab.row_variants(product.kernel)):
        got = loaded.outputs(Split(rows, threads))
        if lab.may_round_otherwise(product.kernel):
            assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
        else:
            assert np.array_equal(got, want)


# ---- costs --------------------------------------------------------------------------------------------------------


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


# ---- splits in a whole model --------------------------------------------------------------------------------------


@pytest.fixture
def model():
    with zincmetal.load(DATA / "qwen35moe-q4k-q5k-q8.gguf", context=64, device="cpu", threads=1) as model:
        yield model


def test_a_split_changes_the_plans_of_the_model(model):
    """The model launches the kernel as asked. All other launches and the tokens are as before."""

    def threads():
        return [(d.launch.kernel, d.launch.threads) for d in model.plan(1).dispatches]

    kernel, split = splits.parse("mul_mv_add_q8_0:threads=96")
    usual, tokens = threads(), model.generate([5, 6, 7], 6).tokens
    splits.tuned(model, {kernel: split})
    assert threads() == [(k, 96 if k == kernel else n) for k, n in usual] != usual
    assert model.generate([5, 6, 7], 6).tokens == tokens
    model.engine.programs.plan_by(model.engine.planner)
    assert threads() == usual


def test_a_split_that_changes_nothing_is_refused(model):
    with pytest.raises(UsageError, match="mul_mv_q4_0"):
        splits.tuned(model, dict([splits.parse("mul_mv_q4_0:threads=32")]))
    for text in ("mul_mv_q8_0", "mul_mv_q8_0:lanes=4", "mul_mv_q8_0:rows=two"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            splits.parse(text)


def test_sides_take_turns_and_a_winner_beats_the_noise(model, monkeypatch):
    """With made-up times: the tried split takes half the time of the usual plans, which differ by a tenth."""
    ran, by = [], []
    monkeypatch.setattr(model.engine.programs, "plan_by", by.append)

    def decode(of, ids, n):
        ran.append(by[-1] is model.engine.planner)
        return (n * (1.0 + 0.1 * (len(ran) % 2)) * (1 if ran[-1] else 0.5), 0.0)

    monkeypatch.setattr(splits, "decode", decode)
    args = argparse.Namespace(prompt=3, tokens=2, rounds=3)
    rows = splits.measure(model, {"narrow": dict([splits.parse("mul_mv_add_q8_0:threads=32")])}, args)
    assert [row["wins"] for row in rows] == [False, False, True]
    assert rows[2]["ratio"] == pytest.approx(2, rel=0.1)
    rounds = [ran[i : i + 3] for i in range(0, len(ran), 3)]
    assert [r.index(False) for r in rounds] == [2, 1, 0, 2]
    assert all(sum(r) == 2 for r in rounds)


# ---- compute-sanitizer --------------------------------------------------------------------------------------------

SUMMARIES = {
    "========= COMPUTE-SANITIZER\nhello\n========= ERROR SUMMARY: 0 errors\n": 0,
    "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 1 error\n": 1,
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n": 0,
    "========= Error: Race reported\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n": 1,
    "========= COMPUTE-SANITIZER\nTraceback (most recent call last):\n": None,
    "": None,
}


@pytest.mark.parametrize(("log", "reports"), SUMMARIES.items())
def test_summaries_are_read(log, reports):
    assert sanitize.reports_in(log) == reports


def test_only_silence_is_good_and_only_of_a_right_workload():
    def good(workload, reports, status):
        return sanitize.Outcome("memcheck", workload, reports, status, 1.0, frozenset()).good

    assert good("model", 0, 0)
    assert not good("model", 1, 0)
    assert not good("model", None, 0)
    assert not good("model", 0, 1)
    assert not good("model", 0, None)
    assert good("planted", 1, 1)
    assert not good("planted", 0, 0)
    assert not good("planted", None, None)


def test_kernels_that_did_not_run_are_named():
    built = ["mul_mv_q4_k", "mul_mv_q4_k_r4", "rms_norm", "probe_fault_NO_FAULT"]
    assert sanitize.kernels_missing(["rms_norm"], built) == ["mul_mv_q4_k"]
    assert sanitize.kernels_missing(["mul_mv_q4_k", "rms_norm"], built) == []


def test_every_kernel_runs():
    """Every built kernel runs, on the Metal source or natively. A sanitizer's run must have seen all of them."""
    built = backend.load("cpu").Device(threads=1).kernel_names()
    assert sanitize.kernels_missing(sanitize.run_kernels("cpu"), built) == []


def test_what_is_planted_is_there():
    """Each tool has a planted fault, which is a probe kernel."""
    source = (TESTS / "csrc/msl/probes/probe_faults.metal").read_text()
    for kernel, _ in sanitize.PLANTED.values():
        name = kernel.removeprefix("probe_fault_")
        assert f"FAULT({name})" in source or f'KERNEL("{kernel}"' in source
    assert set(sanitize.PLANTED) == {"memcheck", "racecheck", "synccheck", "initcheck"}


FAKE = """#!/bin/sh
# A tool that runs its command (after --tool NAME --print-limit N) and then prints REPORTS.
shift 4
"$@"
status=$?
echo "========= ERROR SUMMARY: $REPORTS errors"
exit $status
"""


def run_sanitize(tmp_path, monkeypatch, *options, reports=0):
    """Runs bench/sanitize.py on the CPU with a stand-in tool; returns its exit status and output."""
    tool = tmp_path / "tool"
    tool.write_text(FAKE)
    tool.chmod(0o755)
    monkeypatch.setenv("REPORTS", str(reports))
    command = [sys.executable, sanitize.__file__, "--sanitizer", str(tool), "--device", "cpu", "--workloads", "model"]
    done = subprocess.run([*command, "--out", str(tmp_path), *options], capture_output=True, text=True)
    return done.returncode, done.stdout


def test_a_silent_tool_on_a_model(tmp_path, monkeypatch):
    status, told = run_sanitize(tmp_path, monkeypatch, "--tools", "memcheck", "racecheck")
    assert (status, told.count("0 reports"), told.count(" ok")) == (0, 2, 2)
    log = (tmp_path / "memcheck-model.log").read_text()
    assert "tokens [" in log
    assert "moe_mv_gated_q4_k" in log
    assert "ssm_delta_64" in log  # of the prefill


def test_a_tool_that_reports_or_takes_too_long_fails(tmp_path, monkeypatch):
    assert run_sanitize(tmp_path, monkeypatch, "--tools", "memcheck", reports=2)[0] == 1
    status, told = run_sanitize(tmp_path, monkeypatch, "--tools", "memcheck", "--limit", "0.01")
    assert status == 1
    assert "out of time" in told


def test_without_a_tool_nothing_is_claimed(tmp_path, monkeypatch):
    status, told = run_sanitize(tmp_path, monkeypatch, "--sanitizer", "")
    assert status == 1
    assert "not installed" in told
