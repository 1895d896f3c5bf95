"""Llama: pre-norm transformer blocks, rotary attention with grouped heads, SwiGLU. Also what others vary."""

from __future__ import annotations

from collections.abc import Callable

from ..graph import Graph, Value


def build(g: Graph, rope: str = "norm", qk_norm: bool = False, qkv_bias: bool = False) -> Value:
    """Operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        x = g.add(x, attention(g, i, g.rms_norm(x, f"blk.{i}.attn_norm"), rope, qk_norm, qkv_bias))
        x = g.add(x, ffn(g, i, g.rms_norm(x, f"blk.{i}.ffn_norm")))
    return x


def attention(
    g: Graph, i: int, h: Value, rope: str, qk_norm: bool, qkv_bias: bool = False, freqs: str = "rope_freqs"
) -> Value:
    """Grouped-head rotary attention of block i, over the positions that the configuration lets it see."""
    cfg = g.cfg
    q = g.linear(h, f"blk.{i}.attn_q", cfg.n_head * cfg.head_dim, qkv_bias)
    k = g.linear(h, f"blk.{i}.attn_k", cfg.n_head_kv * cfg.head_dim, qkv_bias)
    v = g.linear(h, f"blk.{i}.attn_v", cfg.n_head_kv * cfg.head_dim, qkv_bias)
    q = g.rope_kv(i, q, k, v, rope, qk_norm, freqs)
    return g.linear(g.attention(i, q, cfg.windows[i]), f"blk.{i}.attn_output", cfg.n_embd)


def ffn(g: Graph, i: int, h: Value, glu: Callable[[Graph, Value, Value], Value] = Graph.swiglu) -> Value:
    """down(glu(gate(h), up(h))), where glu is silu(gate) · up unless told."""
    gate = g.linear(h, f"blk.{i}.ffn_gate", g.cfg.n_ff)
    up = g.linear(h, f"blk.{i}.ffn_up", g.cfg.n_ff)
    return g.linear(glu(g, gate, up), f"blk.{i}.ffn_down", g.cfg.n_embd)
