"""Attention over the K/V caches, by one kernel or divided over the keys."""

from __future__ import annotations

from ...graph.ops import Op, Value
from ..launch import Arg, Launch
from .shared import Lowering, lowers, or_dummy, reading, tiles, writing

# Simdgroups of a divided attention, at most, over all rows. 2,048 are enough for the 132 cores of an H100.
SPLIT_SIMDGROUPS = 2048
# Simdgroups of a threadgroup of a divided attention, at most: the registers of more may not fit.
SPLIT_GROUP = 8
# The largest head that attention_merge takes.
MERGED_HEAD = 256


@lowers("attention")
def attention(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to decode for single rows and to prefill for longer runs, or to two kernels that divide the rows' keys.

    Where a step may have both kinds of runs, two launches write different rows of the result.
    """
    shape, target = lowering.shape, lowering.target
    split, merge, decode, prefill = _kernels(lowering, op)
    if shape.decodes:
        n_split = _n_split(lowering, op, rows)
        if n_split > 1 and target.has(split) and target.has(merge):
            return _divided(lowering, op, (split, merge), rows, n_split)
    elif shape.singles and target.has(decode) and target.has(prefill):
        others = _whole(lowering, op, prefill, rows, singles=True)
        return [_whole(lowering, op, decode, shape.singles, singles=True), others]
    # Both kernels take any number of rows and runs.
    wanted, other = (decode, prefill) if shape.decodes else (prefill, decode)
    return [_whole(lowering, op, wanted if target.has(wanted) or not target.has(other) else other, rows)]


def _kernels(lowering: Lowering, op: Op) -> list[str]:
    """Return the kernels for the layer's heads and caches: split, merge, decode, prefill.

    Prefill of caches of halves and less multiplies halves, unless products are to be exact.
    """
    kv, target, head_dim = lowering.kv_type, lowering.target, lowering.layer(op).head_dim
    prefill = "prefill_exact" if target.exact and kv != "f32" else "prefill"
    families = (f"attention_{family}_{kv}" for family in ("split", "decode", prefill))
    split, *whole = (target.instance(family, target.head_classes, head_dim) for family in families)
    return [split, merging(head_dim), *whole]


def merging(head_dim: int) -> str:
    """Return the kernel that merges the results of shares, of heads of this size."""
    return "attention_merge" if head_dim <= MERGED_HEAD else "attention_merge_512"


def _whole(lowering: Lowering, op: Op, kernel: str, rows: int, *, singles: bool = False) -> Launch:
    """Lower to one launch. ``singles``: decode takes only the single rows of a step, prefill only the others."""
    n_head, shapes = lowering.layer(op).n_head, lowering.target.shapes
    grid, threads = (n_head, rows, 1), shapes["ATTENTION_DECODE_THREADS"]
    if kernel.startswith("attention_prefill"):
        wide = kernel.rpartition("_")[2]  # the class of a wide head has tiles of its own
        queries = shapes.get(f"ATTENTION_PREFILL_QUERIES_{wide}", shapes["ATTENTION_PREFILL_QUERIES"])
        grid, threads = (n_head, tiles(rows, queries), 1), shapes["ATTENTION_PREFILL_THREADS"]
    args = (*_caches_and_query(op), *gate_and_sinks(op), *writing(op, "out"))
    return Launch(kernel, _params(lowering, op, singles=singles), args, grid, threads, op)


def _divided(lowering: Lowering, op: Op, kernels: tuple[str, str], rows: int, n_split: int) -> list[Launch]:
    """Lower to attention over each share of the keys, and the merge of the shares."""
    of_shares, of_merge = kernels
    layer = lowering.layer(op)
    shares = Value(f"{op.out.name}.parts", layer.n_head * n_split * (layer.head_dim + 4))
    split = (*_caches_and_query(op), Arg(shares, "w"))
    merge = (*reading(op, "step", "rows"), Arg(shares, "r"), *gate_and_sinks(op), *writing(op, "out"))
    # One simdgroup to each query head of a group.
    grid, threads = (layer.n_head_kv, n_split, rows), 32 * min(layer.n_head // layer.n_head_kv, SPLIT_GROUP)
    merge_threads, params = lowering.target.shapes["ATTENTION_DECODE_THREADS"], _params(lowering, op, n_split)
    return [
        Launch(of_shares, params, split, grid, threads, op),
        Launch(of_merge, params, merge, (layer.n_head, rows, 1), merge_threads, op),
    ]


def _params(lowering: Lowering, op: Op, n_split: int = 1, *, singles: bool = False) -> bytes:
    layer = lowering.layer(op)
    return lowering.params(
        "AttentionParams",
        n_head=layer.n_head,
        n_head_kv=layer.n_head_kv,
        head_dim=layer.head_dim,
        window=op.attrs["window"],
        gate_stride=op.value("gate").width // layer.n_head if op.get("gate") else 0,
        n_split=n_split,
        singles=int(singles),
        both_ways=int(not lowering.cfg.causal),
        has_sinks=int(op.get("sinks") is not None),
        scale=op.attrs["scale"],
    )


def _caches_and_query(op: Op) -> tuple[Arg, ...]:
    return reading(op, "step", "rows", "pages", "q", "k_cache", "v_cache")


def gate_and_sinks(op: Op) -> tuple[Arg, ...]:
    """Bind the gate and the sinks of attention, or operands that the kernel does not touch."""
    return or_dummy(op.get("gate"), op["q"]), or_dummy(op.get("sinks"), op["q"])


def _n_split(lowering: Lowering, op: Op, rows: int) -> int:
    """Return the number of shares that the keys of a row are divided into: 1 if a row cannot see many keys."""
    end, target = lowering.max_position or lowering.cfg.n_ctx, lowering.target
    n_keys = min(op.attrs["window"] or end, end)
    if target.divide_keys_above is None or n_keys <= target.divide_keys_above:
        return 1
    shares = tiles(n_keys, target.shapes["ATTENTION_SPLIT_KEYS"])
    return min(shares, tiles(SPLIT_SIMDGROUPS, lowering.layer(op).n_head * rows))
