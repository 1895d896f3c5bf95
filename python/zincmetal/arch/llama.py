"""Llama: pre-norm transformer blocks, rotary attention with grouped heads, SwiGLU. Also what others vary."""

from __future__ import annotations

from ..graph import Graph, Value


def build(g: Graph, rope: str = "norm", qk_norm: bool = False) -> Value:
    """Operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        x = g.add(x, attention(g, i, g.rms_norm(x, f"blk.{i}.attn_norm"), rope, qk_norm))
        x = g.add(x, ffn(g, i, g.rms_norm(x, f"blk.{i}.ffn_norm")))
    return x


def attention(g: Graph, i: int, h: Value, rope: str, qk_norm: bool) -> Value:
    """Grouped-head rotary attention of block i."""
    cfg = g.cfg
    q = g.linear(h, f"blk.{i}.attn_q", cfg.n_head * cfg.head_dim)
    k = g.linear(h, f"blk.{i}.attn_k", cfg.n_head_kv * cfg.head_dim)
    v = g.linear(h, f"blk.{i}.attn_v", cfg.n_head_kv * cfg.head_dim)
    q = g.rope_kv(i, q, k, v, rope, qk_norm)
    return g.linear(g.attention(i, q), f"blk.{i}.attn_output", cfg.n_embd)


def ffn(g: Graph, i: int, h: Value) -> Value:
    """down(silu(gate(h)) · up(h))."""
    gate = g.linear(h, f"blk.{i}.ffn_gate", g.cfg.n_ff)
    up = g.linear(h, f"blk.{i}.ffn_up", g.cfg.n_ff)
    return g.linear(g.swiglu(gate, up), f"blk.{i}.ffn_down", g.cfg.n_embd)
