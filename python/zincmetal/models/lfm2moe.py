"""LFM2 mixtures: experts, chosen by sigmoid and bias, in place of the feed-forward; the first blocks are dense."""

from __future__ import annotations

from dataclasses import replace

from ..graph.builder import Graph
from ..graph.ops import Value
from . import lfm2, qwen3moe
from .family import Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        x = g.add(x, lfm2.mixer(g, i, g.rms_norm(x, f"blk.{i}.attn_norm")))
        if g.cfg.layers[i].mixture:
            g.require(f"blk.{i}.exp_probs_b.bias")
        x = qwen3moe.feed_forward(g, i, x, g.rms_norm(x, f"blk.{i}.ffn_norm"))
    return x


FAMILY = Family(
    build,
    replace(lfm2.TRAITS, mixture=True, expert_score="sigmoid"),
    (lfm2.CONVOLUTION, *qwen3moe.PATHS),
    output_norm=lfm2.FAMILY.output_norm,
)
