"""Qwen3.5 mixtures: Qwen3.5 with routed experts and a shared one in place of the feed-forward."""

from __future__ import annotations

from collections.abc import Callable

from ..config import Traits
from ..graph.builder import Graph
from ..graph.ops import Value
from . import mtp, qwen3moe, qwen35
from .family import Family


def build(g: Graph, recurrent: Callable[[Graph, int, Value], Value] = qwen35.delta_net) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        x = block(g, i, x, recurrent)
    return x


def block(g: Graph, i: int, x: Value, recurrent: Callable[[Graph, int, Value], Value] = qwen35.delta_net) -> Value:
    """Append the operations of block i: [T, n_embd]."""
    x = g.add(x, qwen35.mixer(g, i, g.rms_norm(x, f"blk.{i}.attn_norm"), recurrent))
    return qwen3moe.mixture(g, i, x, g.rms_norm(x, f"blk.{i}.post_attention_norm"))


FAMILY = Family(build, Traits(hybrid=True, mixture=True), (mtp.PATH, qwen35.SSM, *qwen3moe.PATHS), block=block)
