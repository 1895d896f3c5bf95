"""gpt-oss: experts with biases and a clamped SwiGLU; attention with sinks and biases, every other block in a window."""

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
        h = g.rms_norm(x, f"blk.{i}.attn_norm")
        g.vector(f"blk.{i}.attn_sinks.weight", g.cfg.layers[i].n_head)  # no block lacks them
        x = g.add(x, llama.attention(g, i, h, "neox", qkv_bias=True))
        g.require(*(f"blk.{i}.ffn_{part}.bias" for part in ("gate_inp", "gate_exps", "up_exps", "down_exps")))
        x = qwen3moe.mixture(g, i, x, g.rms_norm(x, f"blk.{i}.post_attention_norm"))
    return x


FAMILY = Family(
    build,
    Traits(
        mixture=True,
        expert_score="logit",
        expert_activation="swiglu_clamped",
        window_period=2,
    ),
    (("attn_sinks", "attention"), *qwen3moe.PATHS),
    name="gpt-oss",
)
