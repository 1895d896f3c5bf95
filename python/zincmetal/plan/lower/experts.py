"""Mixtures of experts: the choice of experts, their products, and the weighted sum."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UnsupportedModelError
from ...graph.ops import STEP, Op, Weight
from ..launch import Arg, Launch, Routed
from .products import MIXED_BY_TILES, TILED, mul_mv, tile_of
from .shared import Lowering, lowers, norm_of, or_dummy, reading, tiles, writing

MAX_EXPERT_BYTES = 2**32 - 1  # kernels step from one expert to the next by a 32-bit number
SCORES = {"logit": 0, "softmax": 1, "sigmoid": 2}  # SCORE_* of kernels/params.h
NO_SHARED, SHARED_GATED, SHARED_WHOLE = range(3)  # SHARED_*
KINDS = {"experts": 0, "experts_relu2": 1, "swiglu": 0, "geglu": 1, "swiglu_clamped": 2}  # EXPERT_*


@lowers("route")
def route(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Choose the experts of each row. For several rows also sort the slots by expert and cut them into tiles."""
    n_expert, n_used, shapes = op.value("router").width, op.value("ids").width, lowering.target.shapes
    args = (*reading(op, "step"), *_router(op), *writing(op, "ids", "weights"))
    if _takes_few(lowering, "moe_route", rows):
        args = (*args, *writing(op, "slots", "tiles", "n_tiles"))
        return [Launch("moe_route", _top_k(lowering, op), args, (1, 1, 1), shapes["MOE_ROUTE_THREADS"], op)]
    launches = [Launch("moe_topk", _top_k(lowering, op), args, (rows, 1, 1), 32, op)]
    if rows > 1:
        sizes = {"n_expert": n_expert, "n_used": n_used, "max_tiles": _max_tiles(lowering, rows, n_used, n_expert)}
        args = (*reading(op, "step", "ids"), *writing(op, "slots", "tiles", "n_tiles"))
        params = lowering.params("MoeSortParams", **sizes)
        launches.append(Launch("moe_sort", params, args, (1, 1, 1), shapes["MOE_SORT_THREADS"], op))
    return launches


def _router(op: Op) -> tuple[Arg, ...]:
    """Bind what the choice of experts reads."""
    optional = (or_dummy(op.get(name), op["router"]) for name in ("shared", "router_bias", "router_scales"))
    return (*reading(op, "router"), *optional)


def _top_k(lowering: Lowering, op: Op) -> bytes:
    """Return the parameters of the choice."""
    attrs, biased = op.attrs, op.get("router_bias") is not None
    score = attrs["score"]
    # A softmax over all experts, divided by its sum over the chosen, is a softmax over the chosen.
    if score == "softmax" and attrs["normalised"] and not biased and attrs["n_group"] == 1:
        score = "logit"
    whole = SHARED_WHOLE if attrs["whole_shared"] else NO_SHARED
    return lowering.params(
        "TopKParams",
        n_expert=op.value("router").width,
        n_used=op.value("ids").width,
        shared=whole if op.get("shared") is None else SHARED_GATED,
        score=SCORES[score],
        normalised=int(attrs["normalised"]),
        has_bias=int(biased),
        has_scales=int(op.get("router_scales") is not None),
        n_group=attrs["n_group"],
        n_group_used=attrs["n_group_used"],
        scale=attrs["scale"],
    )


def _takes_few(lowering: Lowering, kernel: str, rows: int) -> bool:
    """Return True if this kernel, which serves a step of few single rows, is there and the step is one.

    Steps with longer runs keep to moe_mm: a token of a prompt then meets the same kernels in all of them.
    """
    few = lowering.shape.decodes and 1 < rows <= lowering.target.shapes["MOE_FEW_ROWS"]
    return few and lowering.target.has(kernel)


def _max_tiles(lowering: Lowering, rows: int, n_used: int, n_expert: int) -> int:
    """Return the largest number of tiles, each of one expert, that a step of ``rows`` rows can need."""
    slots = rows * n_used
    return min(slots, tiles(slots, lowering.target.shapes["MOE_MM_TOKENS"]) + n_expert)


@lowers("experts", "experts_gated", "experts_relu2")
def products(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to products of each row with each of its experts."""
    target, weight, n_used = lowering.target, _matrices(op)[0], op.value("ids").width
    n_expert, m, k = weight.shape
    x_div = n_used if op.value("x").width == k else 1  # slots that share a row of x
    batched = _kernel(op, "mv" if rows == 1 else "mm")
    # The second product of one row is experts_mix: no other kernel takes one row of x per slot.
    no_kernel = rows == 1 and (x_div != n_used or not target.has(batched))
    if op.kind == "experts" and (weight.type.name not in target.expert_types or no_kernel):
        return [_one_by_one(lowering, op, weight, Routed(n_used, m, k, _expert_bytes(weight), x_div))]
    if rows == 1:
        return [_products_of_one(lowering, op, batched)]
    params = lowering.params("MoeMmParams", **_sizes(weight), x_div=x_div, **_form(op))
    args = (*reading(op, "slots", "tiles", "n_tiles"), *_operands(op))
    few = batched.replace("moe_mm", "moe_few")
    matrices = len(_matrices(op))
    is_few, max_tiles = _takes_few(lowering, few, rows), _max_tiles(lowering, rows, n_used, n_expert)
    if is_few or (target.exact and target.has(few)):  # moe_few multiplies floats, and takes any number of slots
        experts = min(rows * n_used, n_expert) if is_few else max_tiles
        grid = few_grid(target.shapes, weight.type.name, experts, m, k, matrices)
        return [Launch(few, params, args, grid, target.shapes["MOE_FEW_THREADS"], op)]
    tile = tile_of(target, "moe_mm", "_gated" * _is_gated(op), weight)
    return [Launch(tile.kernel, params, args, (max_tiles, tiles(m, tile.rows // matrices), 1), tile.threads, op)]


@lowers("route_experts", "route_experts_gated", "route_experts_relu2")
def choice_and_products(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to products of one row with the experts that their kernel chooses."""
    assert rows == 1, "the experts of several rows are sorted before their products"
    return [_products_of_one(lowering, op, _kernel(op, "mv"))]


def _products_of_one(lowering: Lowering, op: Op, kernel: str) -> Launch:
    """Return the launch of one row's products. Its kernel also chooses the experts if the operation does."""
    weight, n_used, chooses = _matrices(op)[0], op.value("ids").width, op.get("router") is not None
    least = lowering.target.shapes["MOE_CHOOSE_THREADS"] if chooses else 0
    name, per_simdgroup, threads = mul_mv(lowering, kernel, least)
    form = {**_form(op), **norm_of(op)}
    params = lowering.params("MoeParams", **_sizes(weight), n_used=n_used, **form, alone=0)
    if chooses:
        choice, ids, router = _top_k(lowering, op), "w", (*_router(op), *writing(op, "weights"))
    else:
        # The kernel could write ids and weights: those that stand there are kept from others by barriers.
        choice, ids = bytes(lowering.target.struct("TopKParams").itemsize), "rw"
        router = (*_unused(op, 4), Arg(op["ids"], ids))
    args = (Arg(op["ids"], ids), *_operands(op, or_dummy(op.get("norm"), op["x"])), *router)
    grid = (tiles(weight.shape[1], threads // 32 * per_simdgroup // len(_matrices(op))), n_used, 1)
    return Launch(name, params + choice, args, grid, threads, op)


def _unused(op: Op, n: int) -> tuple[Arg, ...]:
    """Bind x in ``n`` places that the kernel does not touch."""
    return (or_dummy(None, op["x"]),) * n


def _kernel(op: Op, family: str) -> str:
    """Return the kernel of products with experts: of one matrix or of gate and up, by the type of the weights."""
    return f"moe_{family}{'_gated' * _is_gated(op)}_{_matrices(op)[0].type.name}"


def _is_gated(op: Op) -> bool:
    return op.kind.endswith("_gated")


def _matrices(op: Op) -> tuple[Weight, ...]:
    """Return the experts' matrices: one tensor, or gate and up."""
    names = ("gate", "up") if _is_gated(op) else ("weight",)
    return tuple(op.weight(name) for name in names)


def _operands(op: Op, *norm: Arg) -> tuple[Arg, ...]:
    """Bind the matrices of experts, and what their products read and write. The weight of a norm follows x."""
    return (*(Arg(w, "r") for w in _matrices(op)), *reading(op, "x"), *norm, *_biases(op)[1], *writing(op, "out"))


def _form(op: Op) -> dict[str, int]:
    """Return what the kernel does with its products, as fields of its parameters."""
    kind = op.attrs["glu"] if _is_gated(op) else op.kind.removeprefix("route_")
    return {"kind": KINDS[kind], "has_bias": _biases(op)[0]}


def _biases(op: Op) -> tuple[int, list[Arg]]:
    """Return 1 if the experts have biases, else 0, and a binding for each matrix's."""
    names = ("gate_bias", "up_bias") if _is_gated(op) else ("bias",)
    return int(op.get(names[0]) is not None), [or_dummy(op.get(name), op["x"]) for name in names]


def few_grid(
    shapes: Mapping[str, int], type_name: str, experts: int, m: int, k: int, matrices: int
) -> tuple[int, int, int]:
    """Return the grid of moe_few for at most ``experts`` experts.

    A share is the rows that the simdgroups of a threadgroup take at a time. They divide the columns first, then rows. A
    threadgroup takes several shares if they are more than run side by side. But it takes few, since an expert of many
    slots needs more time.
    """
    if shapes["MUL_FEW_TILE_SIMDGROUPS"] and type_name in TILED:
        return _tile_grid(shapes, experts, m, k, matrices)
    simdgroups = shapes["MOE_FEW_THREADS"] // 32
    splits = _splits(simdgroups, max(k // shapes["MOE_FEW_SHARE_COLUMNS"], 1))
    shares = tiles(m, shapes["MOE_FEW_SHARE_ROWS"] // matrices * (simdgroups // splits))
    turns = min(tiles(experts * shares, shapes["MOE_FEW_THREADGROUPS"]), shapes["MOE_FEW_TURNS"])
    return experts, tiles(shares, turns), 1


def _tile_grid(shapes: Mapping[str, int], experts: int, m: int, k: int, matrices: int) -> tuple[int, int, int]:
    """Return the grid of moe_few for a type that it multiplies by tiles. Simdgroups divide the columns, then rows."""
    simdgroups = shapes["MUL_FEW_TILE_SIMDGROUPS"]
    splits = _splits(simdgroups, tiles(k, shapes["MOE_FEW_SHARE_COLUMNS"]))
    return experts, tiles(m, shapes["TILE_ROWS"] // matrices * (simdgroups // splits)), 1


def _splits(simdgroups: int, most: int) -> int:
    """Return into how many parts, at most ``most``, the simdgroups of a threadgroup divide the columns."""
    while simdgroups > most:
        simdgroups //= 2
    return simdgroups


def _one_by_one(lowering: Lowering, op: Op, weight: Weight, sizes: Routed) -> Launch:
    """Return a launch for one row and one expert, which the host repeats for all of them."""
    form = {"residual_stride": 0, "scale_stride": 0, "has_bias": 0, **norm_of(op)}
    params = lowering.params("MatMulParams", k=sizes.k, m=sizes.m, row_bytes=weight.row_bytes, **form)
    biases = (*reading(op, "bias"), or_dummy(None, op["bias"])) if op.get("bias") else ()
    x = (*reading(op, "x"), or_dummy(op.get("norm"), op["x"]))
    args = (*reading(op, "ids"), Arg(weight, "r"), *x, *biases, *writing(op, "out"))
    name, per_simdgroup, threads = mul_mv(lowering, f"mul_mv{'_add' if biases else ''}_{weight.type.name}")
    return Launch(name, params, args, (tiles(sizes.m, threads // 32 * per_simdgroup), 1, 1), threads, op, sizes)


@lowers("experts_mix")
def products_and_mix(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to the weighted sum of one row's products with its experts, and with the shared expert, if any."""
    assert rows == 1, "many rows mix after their products"
    target, weight, n_used = lowering.target, op.weight("weight"), op.value("ids").width
    has_bias, biases = _biases(op)
    args = (*reading(op, "ids", "weights", "weight", "x"), or_dummy(op.get("residual"), op["x"]))
    if op.get("shared_weight"):
        shared = op.weight("shared_weight")
        args = (*args, *reading(op, "shared_weight", "shared_x"))
        sizes = {"has_bias": has_bias, "k_shared": shared.shape[1], "row_bytes_shared": shared.row_bytes}
        params = lowering.params("MoeSharedParams", **_sizes(weight), n_used=n_used, **sizes)
        name = f"moe_mv_mix2_{weight.type.name}_{shared.type.name}"
    else:
        params = lowering.params(
            "MoeParams", **_sizes(weight), n_used=n_used, kind=0, has_bias=has_bias, alone=_alone(op), **norm_of(op)
        )
        name = f"moe_mv_mix_{weight.type.name}"
    per_group, usual = mix_group(target.shapes, name)
    split, rows_of_split, threads = target.split(name, target.shapes["MOE_MIX_ROWS"], usual)
    if (split, threads) != (name, usual):
        per_group = rows_of_split
    args = (*args, *biases, *writing(op, "out"))
    return [Launch(split, params, args, (tiles(weight.shape[1], per_group), 1, 1), threads, op)]


def mix_group(shapes: Mapping[str, int], kernel: str) -> tuple[int, int]:
    """Return (rows of weights, threads) of a threadgroup of a kernel that mixes experts, as they usually are."""
    if kernel.startswith("moe_mv_mix2"):
        return shapes["MOE_MIX_ROWS"], shapes["MOE_MIX2_THREADS"]
    if shapes["MUL_FEW_TILE_SIMDGROUPS"] and kernel.endswith(MIXED_BY_TILES):
        return shapes["TILE_ROWS"], 32 * shapes["MUL_MV_TILE_SIMDGROUPS"]
    return shapes["MOE_MIX_ROWS"], shapes["MOE_MIX_THREADS"]


def _sizes(weight: Weight) -> dict[str, int]:
    n_expert, m, k = weight.shape
    nbytes = {"row_bytes": weight.row_bytes, "expert_bytes": _expert_bytes(weight)}
    return {"k": k, "m": m, **nbytes, "n_expert": n_expert}


def _expert_bytes(weight: Weight) -> int:
    """Bytes from one expert to the next. Raises UnsupportedModelError if a kernel cannot step so far."""
    nbytes = weight.matrix_bytes
    if nbytes > MAX_EXPERT_BYTES:
        problem = f"experts of {nbytes} bytes; kernels take up to {MAX_EXPERT_BYTES}"
        raise UnsupportedModelError(f"tensor {weight.name} has {problem}")
    return nbytes


def _alone(op: Op) -> int:
    """Return 1 if a sum has no residual, else 0."""
    return int(op.get("residual") is None)


@lowers("mix")
def mix(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to the weighted sum over a row's experts, plus the residual."""
    args = (*reading(op, "step", "weights", "y"), or_dummy(op.get("residual"), op["y"]), *writing(op, "out"))
    return [_mix(lowering, op, args, op.value("weights").width - 1, rows)]


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
    params = lowering.params("MoeMixParams", n=n, n_used=n_used, alone=_alone(op))
    few = _takes_few(lowering, "moe_mix_few", rows)
    columns = shapes["ELEMENTWISE_THREADS" if few else "ELEMENTWISE_COLUMNS"]
    grid = (tiles(n, columns), rows, 1)
    return Launch("moe_mix_few" if few else "moe_mix", params, args, grid, shapes["ELEMENTWISE_THREADS"], op)
