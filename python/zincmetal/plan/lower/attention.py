"""Attention over the K/V caches, by one kernel or divided over the keys."""

from __future__ import annotations

from ...graph.ops import Op, Value
from ..launch import Arg, Launch
from .shared import Lowering, lowers, or_dummy, reading, tiles, writing

# Simdgroups of a divided attention, at most. 2,048 are enough for the 132 cores of an H100.
SPLIT_SIMDGROUPS = 2048
# Simdgroups of a threadgroup of a divided attention, at most: the registers of more may not fit.
SPLIT_GROUP = 8


@lowers("attention")
def attention(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to one kernel for one or many rows, or to two kernels that divide one row's keys and merge."""
    cfg, target, shapes = lowering.cfg, lowering.target, lowering.target.shapes
    split, decode, prefill = (
        target.instance(f"attention_{family}_{lowering.kv_type}", target.head_classes, cfg.head_dim)
        for family in ("split", "decode", "prefill")
    )
    divided = rows == 1 and target.has(split) and target.has("attention_merge")
    n_split = _n_split(lowering, op.attrs["window"]) if divided else 1
    params = lowering.params(
        "AttentionParams",
        n_head=cfg.n_head,
        n_head_kv=cfg.n_head_kv,
        head_dim=cfg.head_dim,
        window=op.attrs["window"],
        gate_stride=op.value("gate").width // cfg.n_head if op.get("gate") else 0,
        n_split=n_split,
        scale=op.attrs["scale"],
    )
    if n_split > 1:
        return _divided(lowering, op, split, params, n_split)
    # Both kernels take any number of rows.
    wanted, other = (decode, prefill) if rows == 1 else (prefill, decode)
    kernel = wanted if target.has(wanted) or not target.has(other) else other
    grid, threads = (cfg.n_head, rows, 1), shapes["ATTENTION_DECODE_THREADS"]
    if kernel == prefill:
        queries = shapes["ATTENTION_PREFILL_QUERIES" + ("_256" if kernel.endswith("_256") else "")]
        grid, threads = (cfg.n_head, tiles(rows, queries), 1), shapes["ATTENTION_PREFILL_THREADS"]
    args = (*_caches_and_query(op), _gate(op), *writing(op, "out"))
    return [Launch(kernel, params, args, grid, threads, op)]


def _divided(lowering: Lowering, op: Op, kernel: str, params: bytes, n_split: int) -> list[Launch]:
    """Lower to attention over each share of the keys, and the merge of the shares."""
    cfg = lowering.cfg
    parts = Value(f"{op.out.name}.parts", cfg.n_head * n_split * (cfg.head_dim + 4))
    split = (*_caches_and_query(op), Arg(parts, "w"))
    merge = (*reading(op, "step"), Arg(parts, "r"), _gate(op), *writing(op, "out"))
    # One simdgroup to each query head of a group.
    grid, threads = (cfg.n_head_kv, n_split, 1), 32 * min(cfg.n_head // cfg.n_head_kv, SPLIT_GROUP)
    merge_threads = lowering.target.shapes["ATTENTION_DECODE_THREADS"]
    return [
        Launch(kernel, params, split, grid, threads, op),
        Launch("attention_merge", params, merge, (cfg.n_head, 1, 1), merge_threads, op),
    ]


def _caches_and_query(op: Op) -> tuple[Arg, ...]:
    return reading(op, "step", "pages", "q", "k_cache", "v_cache")


def _gate(op: Op) -> Arg:
    return or_dummy(op.get("gate"), op["q"])


def _n_split(lowering: Lowering, window: int) -> int:
    """Return the number of shares that the keys are divided into: 1 if a row cannot see many keys."""
    end, target = lowering.max_position or lowering.cfg.n_ctx, lowering.target
    n_keys = min(window or end, end)
    if target.divide_keys_above is None or n_keys <= target.divide_keys_above:
        return 1
    parts = tiles(n_keys, target.shapes["ATTENTION_SPLIT_KEYS"])
    return min(parts, tiles(SPLIT_SIMDGROUPS, lowering.cfg.n_head))
