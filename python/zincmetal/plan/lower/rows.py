"""Row by row: embedding, norms, elementwise operations, and rotary embedding into the K/V caches."""

from __future__ import annotations

from ...graph.ops import Op
from ..launch import Launch
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
        kernel, part = f"embed_{window.type.name}", op.replace(table=window)
        launches.append(Launch(kernel, params, all_args(part), grid, shapes["EMBED_THREADS"], part))
    return launches


@lowers("rms_norm", "rms_norm_add", "rms_norm_add_norm")
def rms_norm(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to a threadgroup for each row. The kernels have the names of the operations."""
    params = lowering.params("NormParams", n=op.value("x").width, eps=op.attrs["eps"])
    return [Launch(op.kind, params, all_args(op), (rows, 1, 1), lowering.target.shapes["NORM_THREADS"], op)]


@lowers("swiglu", "geglu", "add", "take_last_row")
def elementwise(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to a kernel with the name of the operation."""
    n, shapes = op.value("out").width, lowering.target.shapes
    params = lowering.params("ElementwiseParams", n=n)
    grid = (tiles(n, shapes["ELEMENTWISE_COLUMNS"]), rows, 1)
    return [Launch(op.kind, params, all_args(op), grid, shapes["ELEMENTWISE_THREADS"], op)]


@lowers("rope_kv")
def rope_kv(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Norm and rotate q and k, and write k and v to the caches."""
    cfg = lowering.cfg
    params = lowering.params(
        "RopeKvParams",
        n_head=cfg.n_head,
        n_head_kv=cfg.n_head_kv,
        head_dim=cfg.head_dim,
        q_stride=op.value("q").width // cfg.n_head,
        n_rot=cfg.n_rot,
        eps=cfg.norm_eps,
        magnitude=cfg.rope.magnitude,
    )
    name = f"rope_kv_{op.attrs['rope']}_{lowering.kv_type}" + ("_qknorm" if op.get("q_norm") else "")
    norms = (or_dummy(op.get(norm), op["freqs"]) for norm in ("q_norm", "k_norm"))
    reads = reading(op, "step", "pages", "q", "k", "v", "freqs")
    args = (*reads, *norms, *writing(op, "out", "k_cache", "v_cache"))
    return [Launch(name, params, args, (cfg.n_head + 2 * cfg.n_head_kv, rows, 1), 32, op)]
