"""Lowering: every kind of operation has its kernels, as the table of operations says, and limits are the target's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from support.paths import DATA
from zincmetal import config, gguf, models
from zincmetal.check.cases import cases
from zincmetal.device import backend
from zincmetal.errors import GGUFError, UnsupportedModelError
from zincmetal.graph.ops import SIGNATURES, Op, Value, Weight
from zincmetal.plan.choices import OUTPUTS
from zincmetal.plan.chunks import StepShape, decode_shape
from zincmetal.plan.launch import Launch
from zincmetal.plan.lower import Lowering
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import RANKING, Target

FILE = DATA / "qwen35moe-q4k-q5k-q8.gguf"


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.of_kernels(backend.load("cpu"))


@pytest.fixture(scope="module")
def cfg() -> config.ModelConfig:
    with gguf.open(FILE) as file:
        return models.configure(file)


def launches_of_all_kinds() -> list[Launch]:
    """The launches of every kernel's case, and the ones that replace the kernel."""
    found = cases(backend.load("cpu"))
    return [launch for name, case in found.items() for launch in (*case.scene.launches, *case.scene.without(name))]


def test_kernels_are_those_of_the_table():
    found = launches_of_all_kinds()
    assert {launch.op.kind for launch in found} == SIGNATURES.keys()
    for launch in found:
        assert launch.kernel.startswith(SIGNATURES[launch.op.kind].kernels), launch.op.kind
    launched = {kind: {launch.kernel for launch in found if launch.op.kind == kind} for kind in SIGNATURES}
    launched["experts"].add("mul_mv_")  # for types that no kernel of experts takes
    for kind, kernel in (
        ("linear_add", "mul_few_"),
        ("linear_mix", "mul_few_"),
        ("linear_geglu", "mul_few_gated_"),
        ("linear_stack", "mul_few_stack_"),
    ):
        launched[kind].add(kernel)  # whose case is a product of another kind
    for kind, signature in SIGNATURES.items():
        assert all(any(k.startswith(name) for k in launched[kind]) for name in signature.kernels), kind


def test_a_family_of_kernels_has_one_name():
    """On the host's side, on the CPU's native side, and among the tests."""
    root = Path(__file__).parents[2]
    families = {p.stem for p in (root / "python/zincmetal/plan/lower").glob("*.py")} - {"__init__", "shared"}
    assert len(families) == 10
    for family in families:
        assert list((root / "csrc/cpu/native").glob(f"{family}*.cpp")), family
        assert list((root / "tests/kernels").glob(f"test_{family}*.py")), family


def test_a_place_without_an_operand_is_marked(target: Target, cfg: config.ModelConfig):
    x, out = Value("x", 64), [Value(f"y{i}", 8) for i in range(2)]
    weights = [Weight(f"w{i}", gguf.quants.F32, (8, 64)) for i in range(2)]
    op = Op("linear_stack", x=x, matrices=weights, outs=out)
    (launch,) = Lowering(target, cfg, "f16").launches(op)
    used = [arg.operand for arg in launch.args if not arg.unused]
    assert used == [x, *weights, *out]
    assert len(launch.args) - len(used) == 1 + 2 + 4 + 2  # of norm, matrices, biases and results


@pytest.mark.parametrize(
    ("part", "sizes", "error"),
    [
        ("layers", {"head_dim": 516}, "attention.key_length is 516; multiples of 4 up to 512 are supported"),
        ("layers", {"head_dim": 62}, "attention.key_length is 62; multiples of 4"),
        ("experts", {"n": 1025}, "expert_count is 1025; at most 1024 are supported"),
        ("recurrence", {"d_state": 48}, "ssm.state_size is 48; multiples of 32 up to 256 are supported"),
        ("recurrence", {"d_conv": 9}, "ssm.conv_kernel is 9; 2 to 8 are supported"),
    ],
)
def test_sizes_that_no_kernel_takes(target: Target, cfg: config.ModelConfig, part, sizes, error):
    found = getattr(cfg, part)
    changed = tuple(replace(layer, **sizes) for layer in found) if part == "layers" else replace(found, **sizes)
    bad = replace(cfg, **{part: changed})
    with pytest.raises(UnsupportedModelError, match=f"^qwen35moe.{error}"):
        target.check(bad, "m.gguf")
    target.check(cfg, "m.gguf")


def test_a_token_of_too_many_experts(target: Target, cfg: config.ModelConfig):
    bad = replace(cfg, experts=replace(cfg.experts, n=64, n_used=33))
    with pytest.raises(GGUFError, match=r"m.gguf: key qwen35moe.expert_used_count: 33 of 64 experts; at most 32"):
        target.check(bad, "m.gguf")


def test_without_ranking_the_host_does_it(target: Target):
    assert not target.ranked_by_host
    for kernel in RANKING:
        assert target.without({kernel}).ranked_by_host
    with gguf.open(FILE) as file:
        planner = Planner(file, target, 64)
        ends = {output: planner.plan(decode_shape(1, output)).dispatches[-1].launch.op.kind for output in OUTPUTS}
        planner.missing = frozenset(RANKING)
        assert planner.plan(decode_shape(1, "draw")).dispatches[-1].launch.op.kind == "linear"
    assert ends == {"none": "experts_mix", "argmax": "argmax", "draw": "draw", "all": "linear", "hidden": "rms_norm"}


@pytest.mark.parametrize(("rows", "threads"), [(1, 512), (4, 512), (5, 384), (8, 256), (16, 128), (32, 128)])
def test_many_states_get_fewer_threads_each(rows: int, threads: int):
    """Where they fill a device, as on NVIDIA; always whole simdgroups."""
    target = Target.of_kernels(backend.load("cpu"))
    target = replace(target, shapes=MappingProxyType({**target.shapes, "SSM_STEP_LEAST_THREADS": 128}))
    with gguf.open(DATA / "qwen35moe-q4k-q5k-q8.gguf") as file:
        plan = Planner(file, target, 64).plan(StepShape(rows, rows, 0, "none"))
    steps = [d.launch for d in plan.dispatches if d.launch.kernel.startswith("ssm_step")]
    assert {launch.threads for launch in steps} == {threads}
