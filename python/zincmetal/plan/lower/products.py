"""Products of a matrix and activations: kernels for one row (mul_mv), for up to 32 (mul_few), for many (mul_mm)."""

from __future__ import annotations

from dataclasses import replace

from ...graph.ops import STEP, Op, Operand, Weight
from ..launch import Arg, Launch
from .shared import Lowering, all_args, lowers, of_outputs, or_dummy, reading, tiles

#: Classes of numbers of rows that mul_few is compiled for, largest last.
FEW_CLASSES = (2, 4, 8, 16, 32)
FEW_VECTORS = 4  # the largest class that takes rows as vectors: any number of them
#: Rows of weights that do not fill a device: rows of activations are divided too, as vectors. Floats need no decoding.
FEW_SMALL, FEW_SMALL_FLOATS = 64, 1024
FEW_MIDDLE = 4096  # rows of weights up to which 4 rows of activations are quicker as vectors
HEADS_FEW = 8  # rows up to which heads with matrices of their own are vectors
FEW_GROUPS = 256  # threadgroups that fill a device: below, simdgroups share rows of weights
FEW_KINDS = {"": 0, "_add": 1, "_mix": 2, "_swiglu": 0, "_geglu": 1}  # FEW_* of kernels/params.h


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
    if few := _few_class(lowering, op, rows):
        return _few(lowering, op, rows, few)
    name = f"mul_mm{epilogue}_{weight.type.name}"
    grid = (tiles(rows, shapes["MUL_MM_TOKENS"]), tiles(m, shapes["MUL_MM_ROWS"] // matrices), 1)
    return Launch(name, params, args, grid, shapes["MUL_MM_THREADS"], op)


def _few_class(lowering: Lowering, op: Op, rows: int) -> int | None:
    """Return the class of mul_few for a product of these rows; None if mul_mm must do it.

    Steps with longer runs keep to mul_mm: a token of a prompt then meets the same kernels in all of them.
    """
    if not (lowering.shape.decodes or of_outputs(op)):
        return None
    vectors, matrices = (n for n in FEW_CLASSES if n <= FEW_VECTORS), (n for n in FEW_CLASSES if n > FEW_VECTORS)
    if rows > FEW_CLASSES[-1]:
        return None
    weight = op.weights[0]
    if matrix(weight)[0] <= (FEW_SMALL_FLOATS if weight.type.block_size == 1 else FEW_SMALL):
        fitting = [n for n in vectors if rows <= n] or [FEW_VECTORS]
    elif lowering.target.shapes["FEW_ANY_ROWS"]:
        # Measured on an H200: vectors take 2 rows in the time of one, and 4 rows of a small matrix.
        first, second = (
            (vectors, matrices) if rows <= 2 or matrix(op.weights[0])[0] <= FEW_MIDDLE else (matrices, vectors)
        )
        fitting = [n for n in (*first, *second) if rows <= n]
    else:  # classes that take rows as matrices read as many rows as the class has
        fitting = [*(n for n in vectors if rows <= n), *(n for n in matrices if rows == n)]
    return next((n for n in fitting if lowering.target.has(_few_kernel(op, n))), None)


def _few_kernel(op: Op, n: int) -> str:
    return f"mul_few{'_gated' * bool(op.get('gate'))}_{op.weights[0].type.name}_n{n}"


def _few(lowering: Lowering, op: Op, rows: int, n: int) -> Launch:
    """Launch a product by the kernel of class ``n``. Operands that the epilogue lacks are bound to the output."""
    weight, epilogue = op.weights[0], op.kind.removeprefix("linear")
    m, k = matrix(weight)
    matrices, k_split = 2 if op.get("gate") else 1, 1
    if n <= FEW_VECTORS:
        name, per_simdgroup, threads = mul_mv(lowering, _few_kernel(op, n))
        grid = (tiles(m, threads // 32 * per_simdgroup // matrices), tiles(rows, n), 1)
    else:
        name, per_tile, simdgroups = _few_tile(lowering, _few_kernel(op, n), m * matrices)
        while k_split < simdgroups and tiles(m * matrices, per_tile) * k_split < FEW_GROUPS * simdgroups:
            k_split *= 2
        threads, grid = 32 * simdgroups, (tiles(m * matrices, per_tile * simdgroups // k_split), 1, 1)
    scale = op.value("weights") if epilogue == "_mix" else None
    params = lowering.params(
        "MulFewParams",
        k=k,
        m=m,
        row_bytes=weight.row_bytes,
        residual_stride=m if op.get("residual") else 0,
        scale_stride=scale.width if scale else 0,
        kind=FEW_KINDS[epilogue],
        k_split=k_split,
        rows=rows,
    )
    args = [Arg(STEP, "r"), *(Arg(w, "r") for w in op.weights[:matrices]), Arg(op["x"], "r")]
    if matrices == 1:
        last = scale.width - 1 if scale else 0  # the last weight of a row is the shared expert's
        added = or_dummy(op.get("residual") or op.get("bias"), op["x"])
        args += [added, or_dummy(scale, op["x"])._replace(first=last)]
    return Launch(name, params, (*args, Arg(op.out, "w")), grid, threads, op)


def _few_tile(lowering: Lowering, kernel: str, m: int) -> tuple[str, int, int]:
    """Return (name, rows of a tile, simdgroups) of a kernel that takes rows as matrices, for ``m`` rows of weights."""
    shapes = lowering.target.shapes
    usual, small = shapes["FEW_ROWS"], shapes["FEW_SMALL_ROWS"]
    if small and tiles(m, usual) < FEW_GROUPS and lowering.target.has(f"{kernel}_r{small}"):
        return f"{kernel}_r{small}", small, shapes["FEW_SIMDGROUPS"] * usual // small
    return kernel, usual, shapes["FEW_SIMDGROUPS"]


@lowers("linear_heads")
def linear_heads(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Multiply each head of a row by a matrix of its own: as vectors for a few single rows, else in tiles of rows."""
    weight, target = op.weight("weight"), lowering.target
    n_head, m, k = weight.shape
    params = lowering.params(
        "HeadsParams", k=k, m=m, row_bytes=weight.row_bytes, head_bytes=m * weight.row_bytes, n_head=n_head
    )
    vectors, matrices = f"mul_heads_mv_{weight.type.name}", f"mul_heads_mm_{weight.type.name}"
    few = lowering.shape.decodes and rows <= HEADS_FEW
    if target.has(vectors) if few else not target.has(matrices):
        name, per_simdgroup, threads = mul_mv(lowering, vectors)
        grid = (tiles(m, threads // 32 * per_simdgroup), n_head, rows)
    else:
        name, threads = matrices, target.shapes["MUL_MM_THREADS"]
        grid = (tiles(rows, target.shapes["MUL_MM_TOKENS"]), tiles(m, target.shapes["MUL_MM_ROWS"]), n_head)
    return [Launch(name, params, all_args(op), grid, threads, op)]


@lowers("linear_stack")
def linear_stack(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Multiply a row, or a few, by up to STACK_MATRICES matrices. A pair, gate and up, comes last with one result."""
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
    few = min(rows, lowering.target.shapes["FEW_STACK_TOKENS"])  # a class: 2, 4 or 8 rows of activations
    if rows == 1:
        name, per_simdgroup, threads = mul_mv(lowering, f"mul_mv_stack_{main}")
    else:
        name, usual = f"mul_few_stack_{main}_n{few}", 32 * lowering.target.shapes["MUL_MV_SIMDGROUPS"]
        name, per_simdgroup, threads = lowering.target.split(name, lowering.target.shapes["FEW_STACK_ROWS"], usual)
        args = (*reading(op, "step"), *args)
    simdgroups = sum(tiles(matrix(w)[0], per_simdgroup) for w in plain)
    simdgroups += sum(tiles(matrix(w)[0], per_simdgroup // 2) for w in last[:1])
    return [Launch(name, params, args, (tiles(simdgroups, threads // 32), tiles(rows, few), 1), threads, op)]


def mul_mv(lowering: Lowering, kernel: str) -> tuple[str, int, int]:
    """Return (name, rows per simdgroup, threads) of a matrix-vector kernel on this backend."""
    shapes = lowering.target.shapes
    return lowering.target.split(kernel, shapes["MUL_MV_ROWS"], 32 * shapes["MUL_MV_SIMDGROUPS"])


def matrix(weight: Weight) -> tuple[int, int]:
    """Return (rows, columns). A vector is a matrix of one row."""
    m, k = weight.shape if len(weight.shape) == 2 else (1, *weight.shape)
    return m, k
