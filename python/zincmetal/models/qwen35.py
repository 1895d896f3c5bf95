"""Qwen3.5: gated-DeltaNet layers, every few layers gated attention in their place, and a dense feed-forward."""

from __future__ import annotations

from collections.abc import Callable

from ..config import Ssm, Traits
from ..graph.builder import Graph
from ..graph.ops import Value
from . import llama, mtp
from .family import DENSE, Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        x = block(g, i, x)
    return x


def block(g: Graph, i: int, x: Value) -> Value:
    """Append the operations of block i: [T, n_embd]."""
    x = g.add(x, mixer(g, i, g.rms_norm(x, f"blk.{i}.attn_norm")))
    return g.add(x, llama.ffn(g, i, g.rms_norm(x, f"blk.{i}.post_attention_norm")))


def delta_net(g: Graph, i: int, h: Value) -> Value:
    """Compute the gated delta rule over the convolved q, k and v: [T, n_embd]. z gates it (arXiv 2412.06464)."""
    assert isinstance(g.cfg.recurrence, Ssm)
    blk, ssm = f"blk.{i}", g.cfg.recurrence
    qkv = g.linear(h, f"{blk}.attn_qkv", ssm.channels)
    z = g.linear(h, f"{blk}.attn_gate", ssm.d_inner)
    alpha = g.linear(h, f"{blk}.ssm_alpha", ssm.n_v_head)
    beta = g.linear(h, f"{blk}.ssm_beta", ssm.n_v_head)
    return g.linear(g.ssm(i, qkv, z, alpha, beta), f"{blk}.ssm_out", g.cfg.n_embd)


def gated_attention(g: Graph, i: int, h: Value) -> Value:
    """Compute attention with a gate for each head, [T, n_embd]: attn_q gives [q | gate] for each head."""
    layer, blk = g.cfg.layers[i], f"blk.{i}"
    q_gate = g.linear(h, f"{blk}.attn_q", layer.n_head * 2 * layer.head_dim)
    k = g.linear(h, f"{blk}.attn_k", layer.n_head_kv * layer.head_dim)
    v = g.linear(h, f"{blk}.attn_v", layer.n_head_kv * layer.head_dim)
    q = g.rope_kv(i, q_gate, k, v, "neox", qk_norm=True)
    return g.linear(g.attention(i, q, gate=q_gate), f"{blk}.attn_output", g.cfg.n_embd)


def mixer(g: Graph, i: int, h: Value, recurrent: Callable[[Graph, int, Value], Value] = delta_net) -> Value:
    """Compute the half of block i that mixes positions: the delta rule or attention, [T, n_embd]."""
    return recurrent(g, i, h) if g.cfg.layers[i].mixer == "recurrent" else gated_attention(g, i, h)


SSM = ("ssm_|attn_qkv|attn_gate", "SSM")
FAMILY = Family(build, Traits(hybrid=True), (mtp.PATH, SSM, *DENSE), block=block)
