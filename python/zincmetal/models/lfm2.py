"""LFM2: short convolutions, every few blocks attention in their place, and a dense feed-forward."""

from __future__ import annotations

from ..config import Traits
from ..config.recurrent import read_short_conv
from ..graph.builder import Graph
from ..graph.ops import Value
from . import llama
from .family import DENSE, Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        x = g.add(x, mixer(g, i, g.rms_norm(x, f"blk.{i}.attn_norm")))
        x = g.add(x, llama.ffn(g, i, g.rms_norm(x, f"blk.{i}.ffn_norm")))
    return x


def mixer(g: Graph, i: int, h: Value) -> Value:
    """Compute the half of block i that mixes positions: a convolution or attention, [T, n_embd]."""
    if g.cfg.layers[i].mixer == "attention":
        return llama.attention(g, i, h, "neox", qk_norm=True)
    bcx = g.linear(h, f"blk.{i}.shortconv.in_proj", 3 * g.cfg.n_embd)
    return g.linear(g.short_conv(i, bcx), f"blk.{i}.shortconv.out_proj", g.cfg.n_embd)


TRAITS = Traits(hybrid=True, recurrence=read_short_conv)
CONVOLUTION = ("shortconv", "short convolution")
FAMILY = Family(build, TRAITS, (CONVOLUTION, *DENSE), output_norm="token_embd_norm")
