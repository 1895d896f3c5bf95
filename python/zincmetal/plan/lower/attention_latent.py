"""Latent attention: queries divided and rows of the cache written, then all heads over the same rows."""

from __future__ import annotations

from ...config import Latent, Layer
from ...graph.ops import Op, Value
from ..launch import Arg, Launch
from .attention import gate_and_sinks, merging
from .shared import Lowering, lowers, reading, tiles, writing

# A share of a row's keys, at least, and threadgroups of a divided attention, at most: shares cost memory traffic.
SHARE_KEYS, SPLIT_THREADGROUPS = 128, 128


@lowers("rope_latent")
def rope_latent(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Divide and rotate the heads of q, and write the rows of the cache."""
    layer, latent = _sizes(lowering, op)
    params = lowering.params(
        "RopeLatentParams",
        n_head=layer.n_head,
        n_still=latent.n_still,
        latent=latent.n_latent,
        eps=lowering.cfg.norm_eps,
        **lowering.rotation(op),
    )
    args = (
        *reading(op, "step", "rows", "pages", "q", "kv", "norm", "freqs"),
        *writing(op, "still", "rot", "k_cache"),
    )
    return [Launch(f"rope_latent_{lowering.kv_type}", params, args, (layer.n_head + 1, rows, 1), 32, op)]


@lowers("attention_latent")
def attention_latent(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to one kernel, or to two that divide the keys of single rows.

    The heads of a row fill one tile of queries or a few, which do not fill a device.
    """
    layer, latent = _sizes(lowering, op)
    target, queries = lowering.target, lowering.target.shapes["ATTENTION_LATENT_QUERIES"]
    whole, split = (_kernel(lowering, family, latent) for family in ("attention_latent", "attention_latent_split"))
    if lowering.shape.decodes:
        n_tiles = rows * tiles(layer.n_head, queries)
        n_split = _n_split(lowering, n_tiles)
        if n_split > 1 and target.has(split) and target.has(merging(latent.n_latent)):
            return _divided(lowering, op, split, (n_tiles, n_split, 1), rows)
    args = (*_queries_and_cache(op), *writing(op, "out"))
    grid, threads = (tiles(rows * layer.n_head, queries), 1, 1), target.shapes["ATTENTION_LATENT_THREADS"]
    return [Launch(whole, _params(lowering, op), args, grid, threads, op)]


def _divided(lowering: Lowering, op: Op, kernel: str, grid: tuple[int, int, int], rows: int) -> list[Launch]:
    """Lower to attention over each share of the keys, and the merge of the shares."""
    layer, latent = _sizes(lowering, op)
    shapes, n_split = lowering.target.shapes, grid[1]
    shares = Value(f"{op.out.name}.parts", layer.n_head * n_split * (latent.n_latent + 4))
    params = _params(lowering, op, n_split)
    split = (*_queries_and_cache(op), Arg(shares, "w"))
    merge = (*reading(op, "step", "rows"), Arg(shares, "r"), *gate_and_sinks(op), *writing(op, "out"))
    others = dict.fromkeys(lowering.target.struct("AttentionParams").names or (), 0)  # windows, gates and so on
    sizes = {"n_head": layer.n_head, "n_head_kv": 1, "head_dim": latent.n_latent, "n_split": n_split}
    merged = lowering.params("AttentionParams", **{**others, **sizes})
    threads, merge_threads = shapes["ATTENTION_LATENT_THREADS"], shapes["ATTENTION_DECODE_THREADS"]
    return [
        Launch(kernel, params, split, grid, threads, op),
        Launch(merging(latent.n_latent), merged, merge, (layer.n_head, rows, 1), merge_threads, op),
    ]


def _sizes(lowering: Lowering, op: Op) -> tuple[Layer, Latent]:
    layer = lowering.layer(op)
    assert layer.latent
    return layer, layer.latent


def _kernel(lowering: Lowering, family: str, latent: Latent) -> str:
    target = lowering.target
    return target.instance(f"{family}_{lowering.kv_type}", target.latent_classes, latent.n_latent)


def _params(lowering: Lowering, op: Op, n_split: int = 1) -> bytes:
    layer, latent = _sizes(lowering, op)
    sizes = {"n_head": layer.n_head, "latent": latent.n_latent, "n_rot": layer.n_rot}
    return lowering.params("LatentParams", **sizes, n_split=n_split, scale=op.attrs["scale"])


def _queries_and_cache(op: Op) -> tuple[Arg, ...]:
    return reading(op, "step", "rows", "pages", "q", "q_rot", "k_cache")


def _n_split(lowering: Lowering, n_tiles: int) -> int:
    """Return the number of shares that the keys of a row are divided into: 1 on devices that never divide them."""
    if lowering.target.divide_keys_above is None:
        return 1
    n_keys = lowering.max_position or lowering.cfg.n_ctx
    return min(tiles(n_keys, SHARE_KEYS), tiles(SPLIT_THREADGROUPS, n_tiles))
