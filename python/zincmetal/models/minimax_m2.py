"""MiniMax-M2: Qwen3 mixtures with experts chosen by sigmoid and bias, and one norm over all heads of a row."""

from __future__ import annotations

from ..config import Traits
from ..graph.builder import Graph
from ..graph.ops import Value
from . import llama, qwen3moe
from .family import Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        x = g.add(x, attention(g, i, g.rms_norm(x, f"blk.{i}.attn_norm")))
        g.require(f"blk.{i}.exp_probs_b.bias")
        x = qwen3moe.mixture(g, i, x, g.rms_norm(x, f"blk.{i}.ffn_norm"))
    return x


def attention(g: Graph, i: int, h: Value) -> Value:
    """Compute grouped-head rotary attention of block i: [T, n_embd]. q and k are normed over the whole row."""
    blk = f"blk.{i}"
    q, k, v = llama.qkv(g, i, h)
    q, k = g.rms_norm(q, f"{blk}.attn_q_norm"), g.rms_norm(k, f"{blk}.attn_k_norm")
    q = g.rope_kv(i, q, k, v, "neox")
    return g.linear(g.attention(i, q), f"{blk}.attn_output", g.cfg.n_embd)


FAMILY = Family(build, Traits(mixture=True, expert_score="sigmoid"), qwen3moe.PATHS, name="minimax-m2")
