"""Llama: pre-norm transformer blocks, rotary attention with grouped heads, SwiGLU. Other families vary it."""

from __future__ import annotations

from collections.abc import Callable

from ..graph.builder import Graph, Rows
from ..graph.ops import Value
from .family import Family


def build(
    g: Graph, rope: str = "norm", qk_norm: bool = False, qkv_bias: bool | None = None, ffn_norm: str = "ffn_norm"
) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        x = g.add(x, attention(g, i, g.rms_norm(x, f"blk.{i}.attn_norm"), rope, qk_norm, qkv_bias))
        x = g.add(x, ffn(g, i, g.rms_norm(x, f"blk.{i}.{ffn_norm}")))
    return x


def attention(g: Graph, i: int, h: Value, rope: str, qk_norm: bool = False, qkv_bias: bool | None = None) -> Value:
    """Compute grouped-head rotary attention of block i, within its window: [T, n_embd].

    ``qkv_bias``: q, k and v have biases (True), have none (False), or have the biases of the file (None).
    """
    q = g.rope_kv(i, *qkv(g, i, h, qkv_bias), rope, qk_norm)
    return g.linear(g.attention(i, q), f"blk.{i}.attn_output", g.cfg.n_embd, None)


def qkv(g: Graph, i: int, h: Value, bias: bool | None = False) -> tuple[Value, Value, Value]:
    """Compute q, k and v of all heads of block i. Some files have their matrices in one, ``attn_qkv``."""
    layer, blk = g.cfg.layers[i], f"blk.{i}"
    n_q, n_kv = layer.n_head * layer.head_dim, layer.n_head_kv * layer.head_dim

    def linear(name: str, n: int, first: int) -> Value:
        if g.has(f"{blk}.attn_qkv.weight"):
            return g.linear(h, f"{blk}.attn_qkv", n, bias, Rows(first, n_q + 2 * n_kv))
        return g.linear(h, f"{blk}.attn_{name}", n, bias)

    return linear("q", n_q, 0), linear("k", n_kv, n_q), linear("v", n_kv, n_q + n_kv)


def ffn(g: Graph, i: int, h: Value, glu: Callable[[Graph, Value, Value], Value] = Graph.swiglu) -> Value:
    """Compute down(glu(gate(h), up(h))): [T, n_embd]. By default glu is silu(gate) · up."""
    gate = g.linear(h, f"blk.{i}.ffn_gate", g.cfg.layers[i].n_ff, None)
    up = g.linear(h, f"blk.{i}.ffn_up", g.cfg.layers[i].n_ff, None)
    return g.linear(glu(g, gate, up), f"blk.{i}.ffn_down", g.cfg.n_embd, None)


FAMILY = Family(build)
