"""Muse Glimmer: a normed embedding, gated attention, norms before and after each half of a block, and a logit cap.

Every fourth block sees all positions and knows none: only the heads of the blocks with a window turn.
"""

from __future__ import annotations

from ..config import Traits
from ..graph.builder import Graph
from ..graph.ops import Value
from . import llama
from .family import DENSE, Family

POST_EPS = 1e-8  # of the norms after each half of a block


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.rms_norm(g.embed("token_embd.weight"), None)
    for i in range(g.cfg.n_layer):
        h = attention(g, i, g.rms_norm(x, f"blk.{i}.attn_norm"))
        x = g.add(x, g.rms_norm(h, f"blk.{i}.post_attention_norm", eps=POST_EPS))
        h = llama.ffn(g, i, g.rms_norm(x, f"blk.{i}.ffn_norm"))
        x = g.add(x, g.rms_norm(h, f"blk.{i}.post_ffw_norm", eps=POST_EPS))
    return x


def attention(g: Graph, i: int, h: Value) -> Value:
    """Compute attention times the sigmoid of a gate for each number of a head: [T, n_embd]."""
    layer, blk = g.cfg.layers[i], f"blk.{i}"
    gate = g.linear(h, f"{blk}.attn_gate", layer.n_head * layer.head_dim)
    q = g.rope_kv(i, *llama.qkv(g, i, h), "norm", qk_norm=True)
    return g.linear(g.attention(i, q, gate), f"{blk}.attn_output", g.cfg.n_embd)


TRAITS = Traits(
    window_period=4,
    rotates=lambda i, window: window > 0,
    caps_logits=True,
    logit_scale=lambda scale: scale,
)
FAMILY = Family(build, TRAITS, (("attn_gate", "attention"), *DENSE), name="muse-glimmer")
