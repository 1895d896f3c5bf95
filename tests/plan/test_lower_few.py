"""Which kernel multiplies few rows: mul_few in steps of single rows and for outputs, mul_mm elsewhere."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from zincmetal.check.cases import _config
from zincmetal.device import backend
from zincmetal.gguf import quants
from zincmetal.graph.ops import Op, Value, Weight
from zincmetal.plan.chunks import DECODE_ROWS, StepShape, chunk_shape, decode_shape
from zincmetal.plan.launch import Launch
from zincmetal.plan.lower import Lowering
from zincmetal.plan.lower.experts import few_grid
from zincmetal.plan.lower.products import FEW_CLASSES
from zincmetal.plan.target import Target
from zincmetal.plan.tuning import Split

W, UP = (Weight(name, quants.Q4_K, (71, 512)) for name in ("w", "up"))
X, Y, RESIDUAL, SCALE, BIAS = (
    Value("x", 512),
    Value("y", 71),
    Value("r", 71),
    Value("s", 9),
    Weight("b", quants.F32, (71,)),
)
LINEAR = Op("linear", weight=W, x=X, out=Y)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target.of_kernels(backend.load("cpu"))


def of_any_rows(target: Target, any_rows: int) -> Target:
    return replace(target, shapes=MappingProxyType({**target.shapes, "FEW_ANY_ROWS": any_rows}))


def lower(target: Target, op: Op, shape: StepShape) -> Launch:
    (launch,) = Lowering(target, _config(), "f16", shape).launches(op)
    return launch


def params(target: Target, launch: Launch) -> np.void:
    made: np.void = np.frombuffer(launch.params, target.struct("MulFewParams"))[0]
    return made


def test_there_is_a_class_for_every_step_of_single_rows():
    assert DECODE_ROWS[1:] == FEW_CLASSES


@pytest.mark.parametrize("n", FEW_CLASSES)
def test_single_rows(target: Target, n: int):
    launch = lower(of_any_rows(target, 0), LINEAR, decode_shape(n))
    assert launch.kernel == f"mul_few_q4_k_n{n}"
    assert params(target, launch)["rows"] == n
    # Where a class reads no more rows than there are, 4 are a matrix too.
    n_of_any = {2: 2, 4: 8}.get(n, n)
    assert lower(of_any_rows(target, 1), LINEAR, decode_shape(n)).kernel == f"mul_few_q4_k_n{n_of_any}"


def test_steps_with_longer_runs_keep_to_mul_mm(target: Target):
    assert lower(target, LINEAR, chunk_shape(32, 0, 0, "none")).kernel == "mul_mm_q4_k"
    outputs = Op("linear", weight=W, x=Value("x", 512, outs=True), out=Value("y", 71, outs=True))
    assert lower(target, outputs, chunk_shape(128, 8, 32, "argmax")).kernel == "mul_few_q4_k_n32"
    assert lower(target, outputs, chunk_shape(128, 0, 1, "argmax")).kernel == "mul_mv_q4_k"


@pytest.mark.parametrize("rows", [32, 128, 512])
def test_exact_products_never_meet_mul_mm(target: Target, rows: int):
    """Vectors of floats take any number of rows. Matrices of floats keep to mul_mm, which is exact for them."""
    launch = lower(replace(target, exact=True), LINEAR, chunk_shape(rows, 0, 0, "none"))
    assert launch.kernel == "mul_few_q4_k_n4"
    assert (launch.grid[1], params(target, launch)["rows"]) == (-(-rows // 4), rows)
    floats = LINEAR.replace(weight=Weight("w", quants.F32, (71, 512)))
    assert lower(replace(target, exact=True), floats, chunk_shape(rows, 0, 0, "none")).kernel == "mul_mm_f32"
    single = lower(of_any_rows(replace(target, exact=True), 0), LINEAR, StepShape(5, 5, 0, "none"))
    assert single.kernel == "mul_few_q4_k_n4"


@pytest.mark.parametrize("rows", [32, 512])
def test_prompts_meet_small_matrices_of_floats_by_columns(target: Target, rows: int):
    """Where rows of activations may be any number: other devices would read beyond them."""
    shape = chunk_shape(rows, 0, 0, "none")
    for m, kernel in ((32, "mul_few_f32_n32"), (256, "mul_few_f32_n32"), (257, "mul_mm_f32")):
        op = Op("linear", weight=Weight("w", quants.F32, (m, 512)), x=X, out=Value("y", m))
        assert lower(of_any_rows(target, 0), op, shape).kernel == "mul_mm_f32"
        launch = lower(of_any_rows(target, 1), op, shape)
        assert launch.kernel == kernel
        if m <= 256:
            assert launch.grid[1] == rows // 32


def test_other_numbers_of_rows(target: Target):
    """A class above FEW_VECTORS reads as many rows as it has, except where the device takes any number."""
    kernels = [lower(of_any_rows(target, 0), LINEAR, StepShape(n, n, 0, "none")).kernel for n in (3, 5, 12, 33)]
    assert kernels == ["mul_few_q4_k_n4", "mul_mm_q4_k", "mul_mm_q4_k", "mul_mm_q4_k"]
    kernels = [lower(of_any_rows(target, 1), LINEAR, StepShape(n, n, 0, "none")).kernel for n in (3, 5, 12, 33)]
    assert kernels == ["mul_few_q4_k_n8", "mul_few_q4_k_n8", "mul_few_q4_k_n16", "mul_mm_q4_k"]


def test_missing_kernels_are_replaced(target: Target):
    missing = target.without({"mul_few_q4_k_n8"})
    launch = lower(of_any_rows(missing, 0), LINEAR, decode_shape(8))
    assert (launch.kernel, launch.replaces) == ("mul_mm_q4_k", ("mul_few_q4_k_n8",))
    assert lower(of_any_rows(missing, 1), LINEAR, decode_shape(8)).kernel == "mul_few_q4_k_n16"


def test_epilogues(target: Target):
    """Operands that an epilogue lacks are bound, but not used."""
    shape = decode_shape(8)
    operands = {"weight": W, "x": X, "out": Y}
    for op, kind, unused, residual_stride in (
        (LINEAR, 0, 2, 0),
        (Op("linear_add", residual=RESIDUAL, **operands), 1, 1, 71),
        (Op("linear_add", bias=BIAS, **operands), 1, 1, 0),
        (Op("linear_mix", residual=RESIDUAL, weights=SCALE, **operands), 2, 0, 71),
    ):
        launch = lower(target, op, shape)
        made = params(target, launch)
        assert launch.kernel == "mul_few_q4_k_n8"
        assert (made["kind"], made["residual_stride"]) == (kind, residual_stride)
        assert sum(arg.unused for arg in launch.args) == unused
    assert launch.args[-2].first == SCALE.width - 1
    gated = [lower(target, Op(f"linear_{g}", gate=W, up=UP, x=X, out=Y), shape) for g in ("swiglu", "geglu")]
    assert [launch.kernel for launch in gated] == ["mul_few_gated_q4_k_n8"] * 2
    assert [params(target, launch)["kind"] for launch in gated] == [0, 1]


@pytest.mark.parametrize(("m", "k_split"), [(248320, 1), (8192, 2), (2048, 4), (65, 4)])
def test_simdgroups_share_the_columns_of_few_rows(target: Target, m: int, k_split: int):
    op = Op("linear", weight=Weight("w", quants.Q8_0, (m, 2048)), x=Value("x", 2048), out=Value("y", m))
    assert params(target, lower(of_any_rows(target, 0), op, decode_shape(8)))["k_split"] == k_split
    # On NVIDIA all of a threadgroup do.
    split = params(target, lower(of_any_rows(target, 1), op, decode_shape(8)))["k_split"]
    assert split == target.shapes["FEW_SIMDGROUPS"]


@pytest.mark.parametrize(
    ("n", "m", "kernel", "groups"),
    [(2, 1024, "n2", 1), (4, 1024, "n2", 2), (8, 1024, "n4", 2), (32, 1024, "n4", 8), (32, 128, "n2", 16)],
)
def test_few_rows_of_weights_meet_vectors(target: Target, n: int, m: int, kernel: str, groups: int):
    op = Op("linear", weight=Weight("w", quants.F32, (m, 512)), x=X, out=Value("y", m))
    launch = lower(of_any_rows(target, 1), op, decode_shape(n))
    assert (launch.kernel, launch.grid[1]) == (f"mul_few_f32_{kernel}", groups)


@pytest.mark.parametrize(
    ("name", "n", "threads", "groups"),
    [("q4_k", 1, 256, 5), ("q4_k", 2, 128, 5), ("q8_0", 1, 64, 18), ("q8_0", 2, 64, 18)],
)
def test_types_with_a_tile_get_its_simdgroups(target: Target, name: str, n: int, threads: int, groups: int):
    """Of sixteen rows in all; a split of a sweep has rows by simdgroup again."""
    op = LINEAR.replace(weight=Weight("w", quants.by_name(name), (71, 512)))
    launch = lower(with_tiles(target), op, decode_shape(n))
    assert launch.kernel == (f"mul_mv_{name}" if n == 1 else f"mul_few_{name}_n2")
    assert (launch.threads, launch.grid[0]) == (threads, groups)
    tried = replace(with_tiles(target), splits={launch.kernel: Split(threads=32)})
    assert lower(tried, op, decode_shape(n)).grid[0] == 36


@pytest.mark.parametrize(("k", "groups"), [(64, 18), (512, 36), (1024, 71), (2048, 71)])
def test_few_rows_meet_experts_in_tiles(target: Target, k: int, groups: int):
    """Four simdgroups share a tile of sixteen rows if there are columns for all, else they take more rows."""
    assert few_grid(with_tiles(target).shapes, "q4_k", 9, 1136, k, 1) == (9, groups, 1)
    assert few_grid(with_tiles(target).shapes, "q4_k", 9, 568, k, 2) == (9, groups, 1)


def with_tiles(target: Target) -> Target:
    shapes = {"MUL_MV_SIMDGROUPS": 2, "MUL_MV_TILE_SIMDGROUPS": 8, "MUL_FEW_TILE_SIMDGROUPS": 4, "FEW_ANY_ROWS": 1}
    return replace(target, shapes=MappingProxyType({**target.shapes, **shapes}))


def test_small_matrices_have_tiles_of_their_own(target: Target):
    shapes = MappingProxyType({**target.shapes, "FEW_ROWS": 32, "FEW_SMALL_ROWS": 16, "FEW_SIMDGROUPS": 4})
    target = replace(target, shapes=shapes)
    large, small = (
        Op("linear", weight=Weight("w", quants.Q8_0, (m, 512)), x=X, out=Value("y", m)) for m in (8192, 8000)
    )
    assert lower(target, large, decode_shape(8)).kernel == "mul_few_q8_0_n8"
    launch = lower(target, small, decode_shape(8))
    assert (launch.kernel, launch.threads, launch.grid) == ("mul_few_q8_0_n8_r16", 256, (500, 1, 1))
    assert params(target, launch)["k_split"] == 8
    assert lower(target.without({launch.kernel}), small, decode_shape(8)).kernel == "mul_few_q8_0_n8"
