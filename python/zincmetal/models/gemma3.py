"""Gemma 3: scaled embedding, norms before and after each half of a block, GeGLU, and attention over a window.

Every few layers attention sees all positions; those layers have rotary frequencies of their own.
"""

from __future__ import annotations

from ..graph.builder import Graph
from ..graph.ops import Value
from . import llama


def build(g: Graph) -> Value:
    """Operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        h = llama.attention(g, i, g.rms_norm(x, f"blk.{i}.attn_norm"), "neox", qk_norm=True)
        x = g.add(x, g.rms_norm(h, f"blk.{i}.post_attention_norm"))
        h = llama.ffn(g, i, g.rms_norm(x, f"blk.{i}.ffn_norm"), Graph.geglu)
        x = g.add(x, g.rms_norm(h, f"blk.{i}.post_ffw_norm"))
    return x
