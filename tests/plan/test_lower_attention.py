"""Attention by the shape of a step: decode, prefill, both side by side, or keys divided among threadgroups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from support.paths import DATA
from zincmetal import config, gguf, models
from zincmetal.device import backend
from zincmetal.graph.ops import Op, State, Value
from zincmetal.plan.addresses import Region
from zincmetal.plan.barriers import hazards, place_barriers
from zincmetal.plan.chunks import ONE_ROW, StepShape, decode_shape
from zincmetal.plan.launch import Launch
from zincmetal.plan.lower import Lowering
from zincmetal.plan.lower.attention import SPLIT_SIMDGROUPS
from zincmetal.plan.target import Target

ATTENDS = 3  # the layer of the file that attends
RUNS, MIXED = StepShape(128, 0, 0, "none"), StepShape(128, 32, 32, "argmax")


@pytest.fixture(scope="module")
def cfg() -> config.ModelConfig:
    with gguf.open(DATA / "qwen35moe-q4k-q5k-q8.gguf") as file:
        return models.configure(file)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.of_kernels(backend.load("cpu"))


def sizes(cfg: config.ModelConfig) -> config.Layer:
    return cfg.layers[ATTENDS]


def lowered(
    target: Target, cfg: config.ModelConfig, shape: StepShape, window: int = 0, kv: str = "f16"
) -> list[Launch]:
    width = sizes(cfg).n_head * sizes(cfg).head_dim
    caches = {kind: State(kind, ATTENDS) for kind in ("k_cache", "v_cache")}
    numbers = {"scale": 0.1, "window": window, "layer": ATTENDS}
    op = Op("attention", q=Value("q", width), out=Value("out", width), **numbers, **caches)
    return Lowering(target, cfg, kv, shape).launches(op)


def kernels(launches: list[Launch]) -> list[str]:
    return [launch.kernel.split("_f16")[0] for launch in launches]


def singles(target: Target, launch: Launch) -> int:
    """Returns the parameter ``singles`` of a launch."""
    return int(np.frombuffer(launch.params, target.struct("AttentionParams"))[0]["singles"])


def test_one_launch_where_runs_are_of_one_kind(target: Target, cfg: config.ModelConfig):
    for shape, kernel in ((decode_shape(8), "attention_decode"), (RUNS, "attention_prefill")):
        (launch,) = lowered(target, cfg, shape)
        assert kernels([launch]) == [kernel]
        assert singles(target, launch) == 0


@pytest.mark.parametrize(("kv", "kernel"), [("f32", "attention_prefill_f32_"), ("f16", "attention_prefill_exact_f16_")])
def test_exact_prefill_multiplies_floats(target: Target, cfg: config.ModelConfig, kv: str, kernel: str):
    (launch,) = lowered(replace(target, exact=True), cfg, RUNS, kv=kv)
    assert launch.kernel.startswith(kernel)


def test_single_rows_beside_runs_take_two_launches(target: Target, cfg: config.ModelConfig):
    """They write other rows of one buffer. A barrier stands between them: plans know buffers, and not rows."""
    launches = lowered(target, cfg, MIXED)
    assert kernels(launches) == ["attention_decode", "attention_prefill"]
    assert [singles(target, launch) for launch in launches] == [1, 1]
    assert launches[0].grid[:2] == (sizes(cfg).n_head, MIXED.singles)
    regions = [tuple(Region(arg.operand.name, 0, 64) for arg in launch.args) for launch in launches]
    dispatches = place_barriers(launches, regions)
    assert [d.barrier for d in dispatches] == [False, True]
    assert not hazards(dispatches)


@pytest.mark.parametrize("shape", [decode_shape(8), RUNS, MIXED], ids=str)
@pytest.mark.parametrize("lost", ["attention_decode", "attention_prefill"])
def test_either_kernel_takes_all_rows_without_the_other(target: Target, cfg: config.ModelConfig, shape, lost):
    every_class = {f"{lost}_f16_{n}" for n in target.head_classes}
    (launch,) = lowered(target.without(every_class), cfg, shape)
    other = {"attention_decode": "attention_prefill", "attention_prefill": "attention_decode"}[lost]
    assert kernels([launch]) == [other]
    assert singles(target, launch) == 0


def test_more_rows_are_divided_into_fewer_shares(target: Target, cfg: config.ModelConfig):
    """All rows together have about as many simdgroups as one."""
    divided = replace(target, divide_keys_above=64)
    far = replace(cfg, n_ctx=65536)
    shares = []
    for rows in (1, 2, 8, 32):
        split, merge = lowered(divided, far, decode_shape(rows))
        assert kernels([split, merge]) == ["attention_split", "attention_merge"]
        heads = sizes(cfg).n_head
        assert (split.grid[0], split.grid[2], merge.grid[:2]) == (sizes(cfg).n_head_kv, rows, (heads, rows))
        shares.append(split.grid[1])
        assert heads * rows * (shares[-1] - 1) < SPLIT_SIMDGROUPS
    assert shares == sorted(shares, reverse=True)
    assert kernels(lowered(divided, far, RUNS)) == ["attention_prefill"]
    assert kernels(lowered(divided, far, ONE_ROW, window=64)) == ["attention_decode"]
