"""GLM-4.5 mixtures: experts chosen by sigmoid and bias, and a shared expert; the first blocks are dense.

Heads of the largest have a norm for queries and keys.
"""

from __future__ import annotations

from ..config import Traits
from ..graph.builder import Graph
from ..graph.ops import Value
from . import llama, mtp, qwen3moe
from .family import Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        x = block(g, i, x)
    return x


def block(g: Graph, i: int, x: Value) -> Value:
    """Append the operations of block i: [T, n_embd]."""
    h = g.rms_norm(x, f"blk.{i}.attn_norm")
    x = g.add(x, llama.attention(g, i, h, "neox", qk_norm=g.has(f"blk.{i}.attn_q_norm.weight")))
    if g.cfg.layers[i].mixture:
        g.require(f"blk.{i}.exp_probs_b.bias")
    return qwen3moe.feed_forward(g, i, x, g.rms_norm(x, f"blk.{i}.post_attention_norm"))


FAMILY = Family(
    build,
    Traits(mixture=True, expert_score="sigmoid", normalised=False, shared_gated=False),
    (mtp.PATH, *qwen3moe.PATHS),
    block=block,
)
