"""Llama: pre-norm transformer blocks, rotary attention with grouped heads, SwiGLU. Other families vary it."""

from __future__ import annotations

from collections.abc import Callable

from ..graph.builder import Graph
from ..graph.ops import Value
from .family import Family


def build(g: Graph, rope: str = "norm", qk_norm: bool = False, qkv_bias: bool | None = None) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        x = g.add(x, attention(g, i, g.rms_norm(x, f"blk.{i}.attn_norm"), rope, qk_norm, qkv_bias))
        x = g.add(x, ffn(g, i, g.rms_norm(x, f"blk.{i}.ffn_norm")))
    return x


def attention(g: Graph, i: int, h: Value, rope: str, qk_norm: bool = False, qkv_bias: bool | None = None) -> Value:
    """Compute grouped-head rotary attention of block i, within its window: [T, n_embd].

    ``qkv_bias``: q, k and v have biases (True), have none (False), or have the biases of the file (None).
    """
    cfg, blk = g.cfg, f"blk.{i}"
    q = g.linear(h, f"{blk}.attn_q", cfg.n_head * cfg.head_dim, qkv_bias)
    k = g.linear(h, f"{blk}.attn_k", cfg.n_head_kv * cfg.head_dim, qkv_bias)
    v = g.linear(h, f"{blk}.attn_v", cfg.n_head_kv * cfg.head_dim, qkv_bias)
    freqs = "rope_freqs_local" if cfg.rope_local and cfg.windows[i] else "rope_freqs"
    q = g.rope_kv(i, q, k, v, rope, qk_norm, freqs)
    return g.linear(g.attention(i, q, cfg.windows[i]), f"{blk}.attn_output", cfg.n_embd, None)


def ffn(g: Graph, i: int, h: Value, glu: Callable[[Graph, Value, Value], Value] = Graph.swiglu) -> Value:
    """Compute down(glu(gate(h), up(h))): [T, n_embd]. By default glu is silu(gate) · up."""
    gate = g.linear(h, f"blk.{i}.ffn_gate", g.cfg.n_ff[i], None)
    up = g.linear(h, f"blk.{i}.ffn_up", g.cfg.n_ff[i], None)
    return g.linear(glu(g, gate, up), f"blk.{i}.ffn_down", g.cfg.n_embd, None)


FAMILY = Family(build)
