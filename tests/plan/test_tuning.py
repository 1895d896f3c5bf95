"""The tuning table names existing kernels, and launches follow it."""

from __future__ import annotations

import pytest

from support.paths import DATA
from zincmetal import gguf
from zincmetal.check.cases import OF_NORM, cases
from zincmetal.device import backend
from zincmetal.graph.ops import Weight
from zincmetal.plan import tuning
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target
from zincmetal.plan.tuning import SPLITS, Split

FILE = DATA / "qwen35moe-q4k-q5k-q8.gguf"


@pytest.fixture(scope="module")
def device():
    return backend.load("cpu").Device(threads=1)


def decode_launches(device, monkeypatch, splits):
    """Returns the launches of a decode step on a device with these splits."""
    monkeypatch.setattr(tuning, "SPLITS", {"cpu": splits})
    with gguf.open(FILE) as file:
        target = Target.of(backend.load("cpu"), device.info)
        return [d.launch for d in Planner(file, target, 256).plan().dispatches]


@pytest.mark.parametrize("name", backend.DEVICES)
def test_every_row_of_the_table_is_a_kernel(device, name):
    """All lanes have the kernels of one source. The kernel that lowering makes of a row must be one of them."""
    kernels = set(device.kernel_names())
    for kernel, split in SPLITS[name].items():
        assert kernel in kernels
        assert split.rows is None or f"{kernel}_r{split.rows}" in kernels
        assert split.threads is None or (split.threads % 32 == 0 and 32 <= split.threads <= 1024)


@pytest.mark.parametrize("kernel", ["mul_mv_q8_0", "mul_mv_add_q8_0", "mul_mv_stack_q8_0", "moe_mv_gated_q4_k"])
@pytest.mark.parametrize(("rows", "threads"), [(4, 32), (8, 256), (None, 128), (4, None)])
def test_launches_follow_the_table(device, monkeypatch, kernel, rows, threads):
    """Another split changes its kernel's name, grid and threads, grid and threads inversely, and no other launch."""
    usual = decode_launches(device, monkeypatch, {})
    tuned = decode_launches(device, monkeypatch, {kernel: Split(rows, threads)})
    name = f"{kernel}_r{rows}" if rows else kernel
    shapes = backend.load("cpu").shapes()
    usual_rows, usual_threads = shapes["MUL_MV_ROWS"], 32 * shapes["MUL_MV_SIMDGROUPS"]
    if kernel.startswith("moe_mv_gated"):  # chooses the experts
        usual_threads = shapes["MOE_CHOOSE_THREADS"]
    assert kernel in {launch.kernel for launch in usual}
    for before, after in zip(usual, tuned, strict=True):
        if before.kernel != kernel:
            assert after == before
            continue
        assert (after.kernel, after.threads, after.params) == (name, threads or usual_threads, before.params)
        work = before.grid[0] * usual_rows * usual_threads
        each = (rows or usual_rows) * (threads or usual_threads)
        matrices = len({a.operand for a in after.args if isinstance(a.operand, Weight)})
        assert (
            0
            <= after.grid[0] * each - work + usual_rows * usual_threads
            <= each * matrices + usual_rows * usual_threads
        )
        assert after.grid[1:] == before.grid[1:]


def test_a_mix_follows_the_table(device, monkeypatch):
    kernel = "moe_mv_mix2_q5_k_q8_0"
    usual = decode_launches(device, monkeypatch, {})
    tuned = decode_launches(device, monkeypatch, {kernel: Split(4, 288)})
    rows = backend.load("cpu").shapes()["MOE_MIX_ROWS"]
    pairs = [(a, b) for a, b in zip(usual, tuned, strict=True) if a.kernel == kernel]
    assert pairs
    for before, after in pairs:
        assert (after.kernel, after.threads) == (f"{kernel}_r4", 288)
        assert after.grid[0] == -(-before.grid[0] * rows // 4)


def test_check_has_cases_of_tuned_kernels(monkeypatch):
    """Each case runs the usual kernel's operation with the instance that the device launches."""
    core = backend.load("cpu")
    splits = {"mul_mv_q8_0": Split(4, 128), "moe_mv_mix2_q5_k_q8_0": Split(1, 288), "mul_mv_add_q4_k": Split(None, 32)}
    usual = cases(core)
    monkeypatch.setattr(tuning, "SPLITS", {"cuda": splits})
    tuned = cases(core)
    assert tuned.keys() - usual.keys() == {
        "mul_mv_q8_0_r4",
        "mul_mv_q8_0_r4" + OF_NORM,
        "moe_mv_mix2_q5_k_q8_0_r1",
    }
    for name, kernel in (("mul_mv_q8_0_r4", "mul_mv_q8_0"), ("moe_mv_mix2_q5_k_q8_0_r1", "moe_mv_mix2_q5_k_q8_0")):
        assert tuned[name].launch.op == usual[kernel].launch.op
        assert tuned[name].launch.threads == splits[kernel].threads
        assert tuned[name].scene.launches[:-1] == usual[kernel].scene.launches[:-1]
    threads = {backend: cases(core, backend)["mul_mv_add_q4_k"].launch.threads for backend in ("metal", "cuda")}
    assert threads == {"metal": usual["mul_mv_add_q4_k"].launch.threads, "cuda": 32}
