"""Mixtures of experts: the choice of experts, their products, and the weighted sum."""

from __future__ import annotations

from ...errors import UnsupportedModelError
from ...graph.ops import STEP, Op, Weight
from ..launch import Arg, Launch, Routed
from .products import mul_mv
from .shared import Lowering, all_args, lowers, or_dummy, reading, tiles, writing

MAX_EXPERT_BYTES = 2**32 - 1  # kernels step from one expert to the next by a 32-bit number


@lowers("route")
def route(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Choose the experts of each row. For many rows also sort the slots by expert and cut them into tiles."""
    n_expert, n_used, shapes = op.value("router").width, op.value("ids").width, lowering.target.shapes
    has_shared = int(op.get("shared") is not None)
    sizes = {"n_expert": n_expert, "n_used": n_used}
    params = lowering.params("TopKParams", **sizes, has_shared=has_shared, scale=op.attrs["scale"])
    args = (*reading(op, "step", "router"), or_dummy(op.get("shared"), op["router"]), *writing(op, "ids", "weights"))
    top_k = lowering.target.instance("moe_topk", lowering.target.expert_classes, n_expert)
    launches = [Launch(top_k, params, args, (rows, 1, 1), 32, op)]
    if rows > 1:
        params = lowering.params("MoeSortParams", **sizes, max_tiles=_max_tiles(lowering, rows, n_used, n_expert))
        args = (*reading(op, "step", "ids"), *writing(op, "slots", "tiles", "n_tiles"))
        launches.append(Launch("moe_sort", params, args, (1, 1, 1), shapes["MOE_SORT_THREADS"], op))
    return launches


def _max_tiles(lowering: Lowering, rows: int, n_used: int, n_expert: int) -> int:
    """Return the largest number of tiles, each of one expert, that a step of ``rows`` rows can need."""
    slots = rows * n_used
    return min(slots, tiles(slots, lowering.target.shapes["MOE_MM_TOKENS"]) + n_expert)


@lowers("experts", "experts_swiglu")
def products(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to products of each row with each of its experts."""
    target, weight, n_used = lowering.target, op.weights[0], op.value("ids").width
    n_expert, m, k = weight.shape
    x_div = n_used if op.value("x").width == k else 1  # slots that share a row of x
    matrices = len(op.weights)
    batched = f"moe_{'mv' if rows == 1 else 'mm'}{op.kind.removeprefix('experts')}_{weight.type.name}"
    # The second product of one row is experts_mix: no other kernel takes one row of x per slot.
    no_kernel = rows == 1 and (x_div != n_used or not target.has(batched))
    if weight.type.name not in target.expert_types or (matrices == 1 and no_kernel):
        return [_one_by_one(lowering, op, weight, Routed(n_used, m, k, _expert_bytes(weight), x_div))]
    operands = (*(Arg(w, "r") for w in op.weights), *reading(op, "x"), *writing(op, "out"))
    if rows == 1:
        params = lowering.params("MoeParams", **_sizes(weight), n_used=n_used)
        name, per_simdgroup, threads = mul_mv(lowering, batched)
        grid = (tiles(m, threads // 32 * per_simdgroup // matrices), n_used, 1)
        return [Launch(name, params, (*reading(op, "ids"), *operands), grid, threads, op)]
    params = lowering.params("MoeMmParams", **_sizes(weight), x_div=x_div)
    max_tiles = _max_tiles(lowering, rows, n_used, n_expert)
    grid = (max_tiles, tiles(m, target.shapes["MUL_MM_ROWS"] // matrices), 1)
    args = (*reading(op, "slots", "tiles", "n_tiles"), *operands)
    return [Launch(batched, params, args, grid, target.shapes["MUL_MM_THREADS"], op)]


def _one_by_one(lowering: Lowering, op: Op, weight: Weight, sizes: Routed) -> Launch:
    """Return a launch for one row and one expert, which the host repeats for all of them."""
    no_epilogue = {"residual_stride": 0, "scale_stride": 0}
    params = lowering.params("MatMulParams", k=sizes.k, m=sizes.m, row_bytes=weight.row_bytes, **no_epilogue)
    args = (*reading(op, "ids"), Arg(weight, "r"), *reading(op, "x"), *writing(op, "out"))
    name, per_simdgroup, threads = mul_mv(lowering, f"mul_mv_{weight.type.name}")
    return Launch(name, params, args, (tiles(sizes.m, threads // 32 * per_simdgroup), 1, 1), threads, op, sizes)


@lowers("experts_mix")
def products_and_mix(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to the weighted sum of one row's products with its experts, and with the shared expert, if any."""
    assert rows == 1, "many rows mix after their products"
    target, weight, n_used = lowering.target, op.weight("weight"), op.value("ids").width
    args = (*reading(op, "ids", "weights", "weight", "x", "residual"), *writing(op, "out"))
    rows_of_group = target.shapes["MOE_MIX_ROWS"]
    if op.get("shared_weight"):
        shared = op.weight("shared_weight")
        args = (*args[:-1], *reading(op, "shared_weight", "shared_x"), *writing(op, "out"))
        sizes = {"k_shared": shared.shape[1], "row_bytes_shared": shared.row_bytes}
        params = lowering.params("MoeSharedParams", **_sizes(weight), n_used=n_used, **sizes)
        name, usual = f"moe_mv_mix2_{weight.type.name}_{shared.type.name}", target.shapes["MOE_MIX2_THREADS"]
    else:
        params = lowering.params("MoeParams", **_sizes(weight), n_used=n_used)
        name, usual = f"moe_mv_mix_{weight.type.name}", target.shapes["MOE_MIX_THREADS"]
    name, per_group, threads = target.split(name, rows_of_group, usual)
    return [Launch(name, params, args, (tiles(weight.shape[1], per_group), 1, 1), threads, op)]


def _sizes(weight: Weight) -> dict[str, int]:
    n_expert, m, k = weight.shape
    nbytes = {"row_bytes": weight.row_bytes, "expert_bytes": _expert_bytes(weight)}
    return {"k": k, "m": m, **nbytes, "n_expert": n_expert}


def _expert_bytes(weight: Weight) -> int:
    """Bytes from one expert to the next. Raises UnsupportedModelError if a kernel cannot step so far."""
    nbytes = weight.shape[1] * weight.row_bytes
    if nbytes > MAX_EXPERT_BYTES:
        problem = f"experts of {nbytes} bytes; kernels take up to {MAX_EXPERT_BYTES}"
        raise UnsupportedModelError(f"tensor {weight.name} has {problem}")
    return nbytes


@lowers("mix")
def mix(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to the weighted sum over a row's experts, plus the residual."""
    return [_mix(lowering, op, all_args(op), op.value("weights").width - 1, rows)]


@lowers("add_shared")
def add_shared(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower one row's shared expert to a mix of one expert, with the last of the weights."""
    assert rows == 1, "each row has a weight of its own, and moe_mix takes one stride"
    weights = op.value("weights")
    weight = Arg(weights, "r", first=weights.width - 1)
    args = (Arg(STEP, "r"), weight, *reading(op, "y", "residual"), *writing(op, "out"))
    return [_mix(lowering, op, args, 1, 1)]


def _mix(lowering: Lowering, op: Op, args: tuple[Arg, ...], n_used: int, rows: int) -> Launch:
    n, shapes = op.value("out").width, lowering.target.shapes
    params = lowering.params("MoeMixParams", n=n, n_used=n_used)
    grid = (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), rows, 1)
    return Launch("moe_mix", params, args, grid, shapes["ELEMENTWISE_THREADS"], op)
