"""Granite hybrids: Granite with Mamba2 in most blocks, and attention in the others; some have experts."""

from __future__ import annotations

from dataclasses import replace

from ..config.recurrent import read_mamba2
from ..graph.builder import Graph
from ..graph.ops import Value
from . import granite, llama, nemotron_h, qwen3moe
from .family import Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i, layer in enumerate(g.cfg.layers):
        h = g.rms_norm(x, f"blk.{i}.attn_norm")
        x = g.add(x, nemotron_h.mamba2(g, i, h) if layer.mixer == "recurrent" else llama.attention(g, i, h, "norm"))
        x = qwen3moe.feed_forward(g, i, x, g.rms_norm(x, f"blk.{i}.ffn_norm"))
    return x


TRAITS = replace(
    granite.TRAITS,
    hybrid=True,
    recurrence=read_mamba2,
    mixture=True,
    mixture_optional=True,
    expert_width="feed_forward_length",
    shared_gated=False,
)
FAMILY = Family(build, TRAITS, (nemotron_h.SSM, *qwen3moe.PATHS))
