"""Phi-3 and Phi-4: Llama with rotary halves, q, k and v in one matrix, and gate and up in one matrix."""

from __future__ import annotations

from ..graph.builder import Graph, Rows
from ..graph.ops import Value
from . import llama
from .family import Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        x = g.add(x, llama.attention(g, i, g.rms_norm(x, f"blk.{i}.attn_norm"), "neox"))
        x = g.add(x, ffn(g, i, g.rms_norm(x, f"blk.{i}.ffn_norm")))
    return x


def ffn(g: Graph, i: int, h: Value) -> Value:
    """Compute down(silu(gate(h)) · up(h)): [T, n_embd]. ``ffn_up`` has the rows of gate, then those of up."""
    blk, n_ff = f"blk.{i}", g.cfg.layers[i].n_ff
    gate, up = (g.linear(h, f"{blk}.ffn_up", n_ff, part=Rows(first, 2 * n_ff)) for first in (0, n_ff))
    return g.linear(g.swiglu(gate, up), f"{blk}.ffn_down", g.cfg.n_embd)


FAMILY = Family(build)
