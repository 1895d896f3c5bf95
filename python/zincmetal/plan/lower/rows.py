"""Row by row: embedding, norms, elementwise operations, and rotary embedding into the K/V caches."""

from __future__ import annotations

from ...graph.ops import KV_CACHES, Op
from ..addresses import kept_type
from ..launch import Arg, Launch
from .shared import Lowering, all_args, lowers, or_dummy, reading, tiles, writing


@lowers("embed")
def embed(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Look up the rows of the step's tokens: one launch for each window of the table."""
    table, shapes = op.weight("table"), lowering.target.shapes
    n_vocab, n_embd = table.shape
    grid = (tiles(n_embd, shapes["EMBED_COLUMNS"]), rows, 1)
    launches = []
    for first, window in lowering.in_windows(table):
        params = lowering.params(
            "EmbedParams",
            n_embd=n_embd,
            row_bytes=window.row_bytes,
            n_vocab=n_vocab,
            first=first,
            n_rows=window.shape[0],
            scale=op.attrs["scale"],
        )
        kernel, windowed = f"embed_{window.type.name}", op.replace(table=window)
        launches.append(Launch(kernel, params, all_args(windowed), grid, shapes["EMBED_THREADS"], windowed))
    return launches


@lowers("rms_norm", "rms_norm_add", "rms_norm_add_norm")
def rms_norm(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to a threadgroup for each vector. The kernels have the names of the operations."""
    groups = int(op.attrs["groups"])
    params = lowering.params(
        "NormParams",
        n=op.value("x").width // groups,
        groups=groups,
        weighted=int(op.get("weight") is not None),
        scaled=int(op.get("factor") is not None),
        eps=op.attrs["eps"],
        next_eps=op.attrs.get("next_eps", 0.0),
        scale=op.attrs["scale"],
    )
    args = [*reading(op, "step", "x"), or_dummy(op.get("weight"), op["x"])]
    if op.kind != "rms_norm":
        following = reading(op, "next_weight") if op.kind == "rms_norm_add_norm" else ()
        args += [*reading(op, "residual"), *following, or_dummy(op.get("factor"), op["x"])]
    args += [Arg(written, "w") for written in op.writes]
    return [Launch(op.kind, params, tuple(args), (rows * groups, 1, 1), lowering.target.shapes["NORM_THREADS"], op)]


@lowers("swiglu", "geglu", "swiglu_clamped", "relu2", "add", "scale", "take_rows")
def elementwise(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to a kernel with the name of the operation. ``rows`` are the rows of its result."""
    assert rows == 1 or op.get("bias") is None, "products add the biases of several rows: graph/fuse.py fuses them"
    n, shapes = op.value("out").width, lowering.target.shapes
    params = lowering.params("ElementwiseParams", n=n)
    grid = (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), rows, 1)
    return [Launch(op.kind, params, all_args(op), grid, shapes["ELEMENTWISE_THREADS"], op)]


@lowers("geglu_slice")
def geglu_slice(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to a kernel that reads one slice of each row of ``up``."""
    n, shapes, up = op.value("out").width, lowering.target.shapes, op.value("up")
    params = lowering.params("SliceParams", n=n, stride=up.width)
    args = (*reading(op, "step", "gate"), Arg(up, "r", first=op.attrs["first"]), *writing(op, "out"))
    grid = (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), rows, 1)
    return [Launch(op.kind, params, args, grid, shapes["ELEMENTWISE_THREADS"], op)]


@lowers("rope_kv", "rope", "store_kv")
def rope_kv(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Norm and rotate q and k, and write k and v to the caches. ``rope`` has only q, ``store_kv`` only k and v."""
    layer, has_q, writes_kv = lowering.layer(op), op.kind != "store_kv", op.kind != "rope"
    n_head, n_head_kv = layer.n_head * has_q, layer.n_head_kv * writes_kv
    params = lowering.params(
        "RopeKvParams",
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=layer.head_dim,
        q_stride=op.value("q").width // layer.n_head if has_q else 0,
        v_norm=int(writes_kv and op.attrs["v_norm"]),
        eps=lowering.cfg.norm_eps,
        **lowering.rotation(op),
    )
    normed = op.get("q_norm") or op.get("k_norm")
    name = f"rope_kv_{op.attrs['rope']}_{lowering.kv_type}" + ("_qknorm" if normed else "")
    inputs = (or_dummy(op.get(operand), op["q" if has_q else "k"]) for operand in ("q", "k", "v"))
    norms = (or_dummy(op.get(norm), op["freqs"]) for norm in ("q_norm", "k_norm"))
    outputs = (or_dummy(op.get(written), op.out, "w") for written in ("out", *KV_CACHES))
    reads = (*reading(op, "step", "rows"), or_dummy(op.get("pages"), op["rows"]), *inputs)
    args = (*reads, *reading(op, "freqs"), *norms, *outputs)
    return [Launch(name, params, args, (n_head + 2 * n_head_kv, rows, 1), 32, op)]


@lowers("keep_rows", "pair_rows")
def kept_rows(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to the kernel for the type that rows are kept in."""
    n, shapes = op.value("x").width, lowering.target.shapes
    params, grid = lowering.params("ElementwiseParams", n=n), (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), rows, 1)
    kernel = f"{op.kind}_{kept_type(lowering.kv_type).name}"
    return [Launch(kernel, params, all_args(op), grid, shapes["ELEMENTWISE_THREADS"], op)]
