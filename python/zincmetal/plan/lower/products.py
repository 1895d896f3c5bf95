"""Products of a matrix and activations: kernels for one row (mul_mv), for up to 32 (mul_few), for many (mul_mm)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from ...graph.ops import STEP, Op, Operand, Value, Weight
from ..launch import Arg, Launch
from ..target import Target
from .shared import Lowering, all_args, lowers, norm_of, of_outputs, or_dummy, reading, tiles

#: Classes of numbers of rows that mul_few is compiled for, largest last.
FEW_CLASSES = (2, 4, 8, 16, 32)
FEW_VECTORS = 4  # the largest class that takes rows as vectors: any number of them
#: Rows of weights that do not fill a device: rows of activations are divided too, as vectors. Floats need no decoding.
FEW_SMALL, FEW_SMALL_FLOATS = 64, 1024
FEW_PAIRS = 4096  # results of float weights up to which rows go in pairs
FEW_EXACT = 4  # the class for any number of rows, if products are to be exact
FEW_PROMPT = 256  # rows of float weights up to which prompts meet mul_few too: simdgroups divide the columns
TILED = ("q4_k", "q5_k", "q6_k", "mxfp4")  # types that mul_mv takes by tiles on NVIDIA: kernels/mul_mv_shares.h
MIXED_BY_TILES = ("mxfp4",)  # those of them whose experts are mixed so
HEADS_FEW = 8  # rows up to which heads with matrices of their own are vectors
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
    weight, epilogue = op.weights[0], op.kind.removeprefix("linear")
    m, k = matrix(weight)
    matrices = 2 if op.get("gate") else 1  # two share the rows of a threadgroup
    scale = op.value("weights") if epilogue == "_mix" else None
    adds_both = op.get("residual") is not None and op.get("bias") is not None
    params = lowering.params(
        "MatMulParams",
        k=k,
        m=m,
        row_bytes=weight.row_bytes,
        residual_stride=m if op.get("residual") else 0,
        scale_stride=scale.width if scale else 0,
        has_bias=int(adds_both),
        **norm_of(op),
    )
    if rows == 1:
        name, per_simdgroup, threads = mul_mv(lowering, f"mul_mv{epilogue}_{weight.type.name}")
        grid = (tiles(m, threads // 32 * per_simdgroup // matrices), 1, 1)
        return Launch(name, params, _args_of_one_row(op), grid, threads, op)
    if few := _few_class(lowering, op, rows):
        return _few(lowering, op, rows, few)
    last = scale.width - 1 if scale else 0  # the last weight of a row is the shared expert's
    args = (*(Arg(r, "r", first=last if r is scale else 0) for r in op.reads), Arg(op.out, "w"))
    tile = tile_of(lowering.target, "mul_mm", epilogue, weight)
    grid = (tiles(rows, tile.tokens), tiles(m, tile.rows // matrices), 1)
    return Launch(tile.kernel, params, args, grid, tile.threads, op)


class Tile(NamedTuple):
    """Kernel of tiles of ``rows`` of weights by ``tokens``, each by ``threads`` threads."""

    kernel: str
    rows: int
    tokens: int
    threads: int


def tile_of(target: Target, family: str, epilogue: str, weight: Weight) -> Tile:
    """Return the kernel of tiles for a weight's type. ``family``: mul_mm, mul_heads_mm or moe_mm."""
    name, sizes = weight.type.name, "MOE_MM" if family == "moe_mm" else "MUL_MM"
    tokens = target.shapes[f"{sizes}_TOKENS"]
    cooperative = f"{family}_coop{epilogue}_{name}"
    if target.cooperative and name != "f32" and target.has(cooperative):
        tokens = tokens if family == "moe_mm" else target.shapes["COOP_TOKENS"]  # as moe_sort cuts them
        return Tile(cooperative, target.shapes["COOP_ROWS"], tokens, target.shapes["COOP_THREADS"])
    kernel = f"{family}{epilogue}_{name}"
    return Tile(kernel, target.shapes[f"{sizes}_ROWS"], tokens, target.shapes[f"{sizes}_THREADS"])


def _args_of_one_row(op: Op) -> tuple[Arg, ...]:
    """Bind as mul_mv does: no step, a norm of x unless it mixes, a residual and a bias if it adds."""
    x, weights = op["x"], op.get("weights")
    args = [Arg(op[name], "r") for name in ("weight", "gate", "up") if op.get(name)]
    args.append(Arg(x, "r"))
    if isinstance(weights, Value):
        args += [*reading(op, "residual"), Arg(weights, "r", first=weights.width - 1)]
    else:
        args.append(or_dummy(op.get("norm"), x))
    if op.kind == "linear_add":
        added = [operand for operand in (op.get("residual"), op.get("bias")) if operand]
        args += [or_dummy(operand, x) for operand in (*added, None)[:2]]
    return (*args, Arg(op.out, "w"))


def _few_class(lowering: Lowering, op: Op, rows: int) -> int | None:
    """Return the class of mul_few for a product of these rows; None if mul_mm must do it.

    Steps with longer runs keep to mul_mm: a token of a prompt then meets the same kernels in all of them.
    """
    if not (lowering.shape.decodes or of_outputs(op)) or rows > FEW_CLASSES[-1]:
        return _few_of_prompt(lowering, op)
    weight, any_rows = op.weights[0], lowering.target.shapes["FEW_ANY_ROWS"]
    floats = weight.type.block_size == 1
    vectors = [n for n in FEW_CLASSES if n <= FEW_VECTORS]
    matrices = [n for n in FEW_CLASSES if n > FEW_VECTORS]
    if matrix(weight)[0] <= (FEW_SMALL_FLOATS if floats else FEW_SMALL) and (floats or not any_rows):
        # Measured on an H200: two rows at a time take half the time of four, while there are few.
        pairs = any_rows and rows * matrix(weight)[0] <= FEW_PAIRS
        fitting = vectors[:1] if pairs else [n for n in vectors if rows <= n] or vectors[-1:]
    elif any_rows:
        # Measured on an H200: vectors take 2 rows in the time of one, and 4 rows take longer than 8 as a matrix.
        first, second = (vectors, matrices) if rows <= 2 else (matrices, vectors)
        fitting = [n for n in (*first, *second) if rows <= n]
    else:  # classes that take rows as matrices read as many rows as the class has
        fitting = [*(n for n in vectors if rows <= n), *(n for n in matrices if rows == n)]
    if lowering.target.exact:
        fitting.append(FEW_EXACT)
    return next((n for n in fitting if lowering.target.has(_few_kernel(op, n))), None)


def _few_of_prompt(lowering: Lowering, op: Op) -> int | None:
    """Return the class for a prompt: of exact products, and of small matrices of floats, such as those of routers.

    Vectors take any number of rows, and sum floats. Matrices of floats are exact in mul_mm too, but its tiles of a
    small one would leave most of a device idle.
    """
    weight, target = op.weights[0], lowering.target
    if weight.type.name == "f32":
        n = FEW_CLASSES[-1] if target.shapes["FEW_ANY_ROWS"] and matrix(weight)[0] <= FEW_PROMPT else None
    else:
        n = FEW_EXACT if target.exact else None
    return n if n and target.has(_few_kernel(op, n)) else None


def _few_kernel(op: Op, n: int) -> str:
    return f"mul_few{'_gated' * bool(op.get('gate'))}_{op.weights[0].type.name}_n{n}"


def _few(lowering: Lowering, op: Op, rows: int, n: int) -> Launch:
    """Launch a product by the kernel of class ``n``. Operands that the epilogue lacks are bound to the output."""
    weight, shapes, epilogue = op.weights[0], lowering.target.shapes, op.kind.removeprefix("linear")
    m, k = matrix(weight)
    matrices, k_split = 2 if op.get("gate") else 1, 1
    if n <= FEW_VECTORS:
        name, per_simdgroup, threads = of_vectors(lowering, _few_kernel(op, n), shapes["MUL_MV_ROWS"])
        grid = (tiles(m, threads // 32 * per_simdgroup // matrices), tiles(rows, n), 1)
    else:
        name, per_tile, simdgroups = _few_tile(lowering, _few_kernel(op, n), m * matrices)
        of_tokens, full = tiles(rows, n), shapes["FEW_THREADGROUPS"] * simdgroups
        always = shapes["FEW_ANY_ROWS"]  # measured on an H200, for matrices of any size
        while k_split < simdgroups and (always or tiles(m * matrices, per_tile) * of_tokens * k_split < full):
            k_split *= 2
        threads, grid = 32 * simdgroups, (tiles(m * matrices, per_tile * simdgroups // k_split), of_tokens, 1)
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
    if small and tiles(m, usual) < shapes["FEW_THREADGROUPS"] and lowering.target.has(f"{kernel}_r{small}"):
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
    vectors, tile = f"mul_heads_mv_{weight.type.name}", tile_of(target, "mul_heads_mm", "", weight)
    few = (lowering.shape.decodes and rows <= HEADS_FEW) or target.exact
    if target.has(vectors) if few else not target.has(tile.kernel):
        name, per_simdgroup, threads = mul_mv(lowering, vectors)
        grid = (tiles(m, threads // 32 * per_simdgroup), n_head, rows)
    else:
        name, threads = tile.kernel, tile.threads
        grid = (tiles(rows, tile.tokens), tiles(m, tile.rows), n_head)
    return [Launch(name, params, all_args(op), grid, threads, op)]


@lowers("linear_stack")
def linear_stack(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Multiply a row, or a few, by up to STACK_MATRICES matrices. A pair, gate and up, comes last with one result."""
    biases, pair = op.all("biases"), op.get("glu") is not None
    n_plain, n_last = len(op.all("matrices")), 2 * pair
    matrices = op.weights[: n_plain + n_last]
    plain, last = matrices[:n_plain], matrices[n_plain:]
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
        has_bias=int(bool(biases)),
        **norm_of(op),
    )
    weights = (or_dummy(w, matrices[0]) for w in places)
    added = (or_dummy(b, op["x"]) for b in (*biases, *[None] * (len(places) - len(biases))))
    args = (*weights, *added, *(or_dummy(o, op.out, "w") for o in outs))
    few = min(rows, lowering.target.shapes["FEW_STACK_TOKENS"])  # a class: 2, 4 or 8 rows of activations
    if rows == 1:
        name, per_simdgroup, threads = mul_mv(lowering, f"mul_mv_stack_{main}")
        args = (*reading(op, "x"), or_dummy(op.get("norm"), op["x"]), *args)
    else:
        usual = lowering.target.shapes["FEW_STACK_ROWS"]
        name, per_simdgroup, threads = of_vectors(lowering, f"mul_few_stack_{main}_n{few}", usual)
        args = (*reading(op, "step", "x"), *args)
    simdgroups = [tiles(matrix(w)[0], per_simdgroup) for w in plain]
    simdgroups += [tiles(matrix(w)[0], per_simdgroup // 2) for w in last[:1]]
    # A threadgroup has rows of one matrix. With a few rows of activations each simdgroup has its own, but in tiles.
    apart = rows == 1 or threads == 32 * tile_simdgroups(lowering.target.shapes, name)
    groups = sum(tiles(n, threads // 32) for n in simdgroups) if apart else tiles(sum(simdgroups), threads // 32)
    return [Launch(name, params, args, (groups, tiles(rows, few), 1), threads, op)]


def mul_mv(lowering: Lowering, kernel: str, least: int = 0) -> tuple[str, int, int]:
    """Return (name, rows per simdgroup, threads, usually at ``least`` so many) of a matrix-vector kernel."""
    return of_vectors(lowering, kernel, lowering.target.shapes["MUL_MV_ROWS"], least)


def of_vectors(lowering: Lowering, kernel: str, rows: int, least: int = 0) -> tuple[str, int, int]:
    """Return (name, rows per simdgroup, threads) of a kernel of vectors. ``rows``: the usual, if it has no tile."""
    shapes = lowering.target.shapes
    tiled = tile_simdgroups(shapes, kernel)
    name, rows, threads = lowering.target.split(kernel, rows, max(32 * (tiled or shapes["MUL_MV_SIMDGROUPS"]), least))
    if name == kernel and threads == 32 * tiled:
        rows = shapes["TILE_ROWS"] // tiled
    return name, rows, threads


def tile_simdgroups(shapes: Mapping[str, int], kernel: str) -> int:
    """Return the simdgroups of a threadgroup that multiplies vectors by a tile of TILE_ROWS rows; 0 if none does.

    An expert is one of many, and two vectors take more registers: fewer simdgroups take a tile of these.
    """
    few = shapes["MUL_FEW_TILE_SIMDGROUPS"]
    if not few or not kernel.removesuffix("_n2").endswith(TILED):
        return 0
    return few if kernel.startswith("moe_") or kernel.endswith("_n2") else shapes["MUL_MV_TILE_SIMDGROUPS"]


def matrix(weight: Weight) -> tuple[int, int]:
    """Return (rows, columns). A vector is a matrix of one row."""
    m, k = weight.shape if len(weight.shape) == 2 else (1, *weight.shape)
    return m, k
