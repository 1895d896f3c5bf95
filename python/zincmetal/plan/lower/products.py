"""Products of a matrix and activations: matrix-vector kernels for one row (mul_mv), tiled kernels for many (mul_mm)."""

from __future__ import annotations

from dataclasses import replace

from ...graph.ops import STEP, Op, Operand, Weight
from ..launch import Arg, Launch
from .shared import Lowering, lowers, or_dummy, tiles


@lowers("linear")
def linear(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to one launch. For a matrix in several windows: a launch for each window and row."""
    weight = op.weight("weight")
    if weight.name not in lowering.windows:
        return [product(lowering, op, rows)]
    return [
        _product_of_window(lowering, op, window, first, row)
        for first, window in lowering.in_windows(weight)
        for row in range(rows)
    ]


def _product_of_window(lowering: Lowering, op: Op, window: Weight, first: int, row: int) -> Launch:
    """Launch the product of a window, whose first row is row ``first`` of the matrix, and one row of activations."""
    m, k = op.weight("weight").shape
    launch = product(lowering, op.replace(weight=window), 1)
    begins = {op["x"]: row * k, op["out"]: row * m + first}
    return replace(launch, args=tuple(a._replace(first=begins.get(a.operand, 0)) for a in launch.args))


@lowers("linear_add", "linear_mix", "linear_swiglu", "linear_geglu")
def linear_with_epilogue(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to a product that adds, scales or gates its result."""
    return [product(lowering, op, rows)]


def product(lowering: Lowering, op: Op, rows: int) -> Launch:
    """Launch a product: x [rows, k], matrices [m, k], result [rows, m]."""
    weight, shapes, epilogue = op.weights[0], lowering.target.shapes, op.kind.removeprefix("linear")
    m, k = matrix(weight)
    matrices = 2 if op.get("gate") else 1  # two share the rows of a threadgroup
    scale = op.value("weights") if epilogue == "_mix" else None
    params = lowering.params(
        "MatMulParams",
        k=k,
        m=m,
        row_bytes=weight.row_bytes,
        residual_stride=m if op.get("residual") else 0,
        scale_stride=scale.width if scale else 0,
    )
    last = scale.width - 1 if scale else 0  # the last weight of a row is the shared expert's
    args = (*(Arg(r, "r", first=last if r is scale else 0) for r in op.reads), Arg(op.out, "w"))
    if rows == 1:  # one row needs no step
        name, per_simdgroup, threads = mul_mv(lowering, f"mul_mv{epilogue}_{weight.type.name}")
        grid = (tiles(m, threads // 32 * per_simdgroup // matrices), 1, 1)
        return Launch(name, params, tuple(a for a in args if a.operand != STEP), grid, threads, op)
    name = f"mul_mm{epilogue}_{weight.type.name}"
    grid = (tiles(rows, shapes["MUL_MM_TOKENS"]), tiles(m, shapes["MUL_MM_ROWS"] // matrices), 1)
    return Launch(name, params, args, grid, shapes["MUL_MM_THREADS"], op)


@lowers("linear_stack")
def linear_stack(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Multiply one row by up to STACK_MATRICES matrices. A pair, gate and up, comes last and has one result."""
    assert rows == 1, "stacks are of matrices that meet one row"
    matrices, pair = op.weights, op.get("glu") is not None
    plain, last = (matrices[:-2], matrices[-2:]) if pair else (matrices, ())
    unused = [None] * (lowering.target.shapes["STACK_MATRICES"] - len(matrices))
    places: list[Weight | None] = [*plain, *unused, *last]
    outs: list[Operand | None] = [*op.all("outs"), *unused, *op.all("glu"), *[None] * pair]
    main = next((w.type.name for w in matrices if w.type.name != "f32"), "f32")
    params = lowering.params(
        "StackParams",
        k=op.value("x").width,
        pair=int(pair),
        m=tuple(matrix(w)[0] if w else 0 for w in places),
        row_bytes=tuple(w.row_bytes if w else 0 for w in places),
        is_f32=tuple(int(w is not None and w.type.name == "f32") for w in places),
    )
    weights = (or_dummy(w, matrices[0]) for w in places)
    args = (Arg(op["x"], "r"), *weights, *(or_dummy(o, op.out, "w") for o in outs))
    name, per_simdgroup, threads = mul_mv(lowering, f"mul_mv_stack_{main}")
    simdgroups = sum(tiles(matrix(w)[0], per_simdgroup) for w in plain)
    simdgroups += sum(tiles(matrix(w)[0], per_simdgroup // 2) for w in last[:1])
    return [Launch(name, params, args, (tiles(simdgroups, threads // 32), 1, 1), threads, op)]


def mul_mv(lowering: Lowering, kernel: str) -> tuple[str, int, int]:
    """Return (name, rows per simdgroup, threads) of a matrix-vector kernel on this backend."""
    shapes = lowering.target.shapes
    return lowering.target.split(kernel, shapes["MUL_MV_ROWS"], 32 * shapes["MUL_MV_SIMDGROUPS"])


def matrix(weight: Weight) -> tuple[int, int]:
    """Return (rows, columns). A vector is a matrix of one row."""
    m, k = weight.shape if len(weight.shape) == 2 else (1, *weight.shape)
    return m, k
