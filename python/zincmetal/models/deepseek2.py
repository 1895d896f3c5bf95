"""DeepSeek-V2 and its relatives (V2-Lite, V3, GLM-4.7-Flash, Kimi K2): latent attention, then a mixture of experts."""

from __future__ import annotations

from ..config import Traits
from ..graph.builder import Graph
from ..graph.ops import Value
from . import qwen3moe
from .family import Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        x = g.add(x, attention(g, i, g.rms_norm(x, f"blk.{i}.attn_norm")))
        x = qwen3moe.feed_forward(g, i, x, g.rms_norm(x, f"blk.{i}.ffn_norm"))
    return x


def attention(g: Graph, i: int, h: Value) -> Value:
    """Compute latent attention of block i: [T, n_embd] (arXiv 2405.04434, equations 37-47).

    Keys and values of a head are products of the cached latent vector. So its query meets the matrix of the keys
    (attn_k_b) before the scores, and its result the matrix of the values (attn_v_b) after the sum.
    """
    layer, latent, blk = g.cfg.layers[i], g.cfg.layers[i].latent, f"blk.{i}"
    assert latent
    n_q = layer.n_head * (latent.n_still + layer.n_rot)
    if latent.n_q:
        compressed = g.rms_norm(g.linear(h, f"{blk}.attn_q_a", latent.n_q), f"{blk}.attn_q_a_norm")
        q = g.linear(compressed, f"{blk}.attn_q_b", n_q)
    else:
        q = g.linear(h, f"{blk}.attn_q", n_q)
    q, q_rot = g.rope_latent(i, q, g.linear(h, f"{blk}.attn_kv_a_mqa", layer.head_dim))
    q = g.linear_heads(q, f"{blk}.attn_k_b", layer.n_head, latent.n_latent)
    values = g.linear_heads(g.attention_latent(i, q, q_rot), f"{blk}.attn_v_b", layer.n_head, latent.n_value)
    return g.linear(values, f"{blk}.attn_output", g.cfg.n_embd)


#: Files of early converters do not say how experts are chosen: by softmax, and the weights keep their sum.
FAMILY = Family(
    build,
    Traits(mixture=True, latent=True, normalised=False, shared_gated=False),
    (("attn_(kv_a|[qkv]_[ab])", "attention"), *qwen3moe.PATHS),
)
