"""Gemma 4: the blocks of Gemma 3 with heads of two sizes, and three additions that some of its models have.

- Every norm of a block is as in Gemma 3. Values have a norm too, without a weight. q·k is not scaled. A block ends with
  a factor of its own.
- Blocks with a window have small heads. The others have large heads, whose last dimensions do not rotate, and fewer
  keys; where they have no projection for values, the keys before their norm are the values.
- 26B-A4B: a mixture of experts beside the feed-forward. Its router has a norm of its own.
- E2B and E4B: a second, smaller embedding for each block, which a gate adds to the block's output.
- E2B and E4B: the last blocks read the K/V of earlier ones.
"""

from __future__ import annotations

from ..config import Traits
from ..graph.builder import Graph
from ..graph.ops import Value
from . import llama, qwen3moe
from .family import Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    inputs = block_inputs(g, x) if g.cfg.n_embd_block else None
    for i, layer in enumerate(g.cfg.layers):
        blk = f"blk.{i}"
        h = attention(g, i, g.rms_norm(x, f"{blk}.attn_norm"))
        x = g.add(x, g.rms_norm(h, f"{blk}.post_attention_norm"))
        h = llama.ffn(g, i, g.rms_norm(x, f"{blk}.ffn_norm"), Graph.geglu)
        if layer.mixture:
            h = g.add(g.rms_norm(h, f"{blk}.post_ffw_norm_1"), g.rms_norm(mixture(g, i, x), f"{blk}.post_ffw_norm_2"))
        x = g.add(x, g.rms_norm(h, f"{blk}.post_ffw_norm"))
        if inputs:
            x = g.add(x, g.rms_norm(block_input(g, i, x, inputs), f"{blk}.post_norm"))
        if g.has(f"{blk}.layer_output_scale.weight"):
            x = g.scale(x, f"{blk}.layer_output_scale")
    return x


def attention(g: Graph, i: int, h: Value) -> Value:
    """Compute attention of block i over its own K/V cache, or over that of an earlier block: [T, n_embd]."""
    layer, blk = g.cfg.layers[i], f"blk.{i}"
    q = g.linear(h, f"{blk}.attn_q", layer.n_head * layer.head_dim)
    if layer.kv_layer != i:
        q = g.rope(i, q, "neox", q_norm=True)
    else:
        k = g.linear(h, f"{blk}.attn_k", layer.n_head_kv * layer.head_dim)
        shared = layer.window == 0 and not g.has(f"{blk}.attn_v.weight")
        v = k if shared else g.linear(h, f"{blk}.attn_v", layer.n_head_kv * layer.head_dim)
        q = g.rope_kv(i, q, k, v, "neox", qk_norm=True, v_norm=True)
    return g.linear(g.attention(i, q), f"{blk}.attn_output", g.cfg.n_embd)


def mixture(g: Graph, i: int, x: Value) -> Value:
    """Compute the weighted outputs of the experts of block i: [T, n_embd]. The router sees x by another norm."""
    assert g.cfg.experts
    blk, n_embd = f"blk.{i}", g.cfg.n_embd
    router = g.rms_norm(x, f"{blk}.ffn_gate_inp.scale", scale=n_embd**-0.5)
    route = g.route(i, g.linear(router, f"{blk}.ffn_gate_inp", g.cfg.experts.n), None)
    h = g.rms_norm(x, f"{blk}.pre_ffw_norm_2")
    return g.mix(None, route, qwen3moe.routed_experts(g, i, h, route))


def block_inputs(g: Graph, x: Value) -> Value:
    """Compute the second embeddings: (norm(proj(x / √n_embd)) + row · √n) / √2 for each block, [T, n_layer · n]."""
    cfg = g.cfg
    n, width = cfg.n_embd_block, cfg.n_layer * cfg.n_embd_block
    projected = g.linear(x, "per_layer_model_proj", width)
    # The norm takes 1 / √n_embd away again: only eps feels it.
    eps = cfg.norm_eps * cfg.n_embd
    normed = g.rms_norm(projected, "per_layer_proj_norm", eps=eps, scale=0.5**0.5, groups=cfg.n_layer)
    return g.add(g.table_rows("per_layer_token_embd.weight", width, (n / 2) ** 0.5), normed)


def block_input(g: Graph, i: int, x: Value, inputs: Value) -> Value:
    """Compute proj(gelu(gate(x)) · the second embedding of block i): [T, n_embd]."""
    n = g.cfg.n_embd_block
    gate = g.linear(x, f"blk.{i}.inp_gate", n)
    return g.linear(g.geglu_slice(gate, inputs, i * n), f"blk.{i}.proj", g.cfg.n_embd)


FAMILY = Family(
    build,
    Traits(
        expert_activation="geglu",
        experts_beside=True,
        window_period=6,
        local_rope=True,
        local_heads=True,
        shares_kv=True,
        block_embeddings=True,
        caps_logits=True,
        activations=("gelu_pytorch_tanh", "gelu_tanh"),
        embedding_scale=lambda n_embd: float(n_embd**0.5),
        attention_scale=lambda n_layer, embd_per_head, head_dim: 1.0,
    ),
    (
        ("per_layer|inp_gate|blk.[0-9]+.proj", "block embeddings"),
        *qwen3moe.PATHS,
    ),
)
