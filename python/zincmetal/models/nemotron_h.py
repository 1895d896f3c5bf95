"""Nemotron-H: a block is Mamba2, attention that knows no positions, or a feed-forward of squared ReLU without gate."""

from __future__ import annotations

from ..config import Mamba2, Traits
from ..config.recurrent import read_mamba2
from ..graph.builder import Graph
from ..graph.ops import Value
from . import llama, qwen3moe
from .family import DENSE, Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i, layer in enumerate(g.cfg.layers):
        h = g.rms_norm(x, f"blk.{i}.attn_norm")
        if layer.mixture:
            g.require(f"blk.{i}.exp_probs_b.bias")
        x = qwen3moe.mixture(g, i, x, h) if layer.mixture else g.add(x, part(g, i, h))
    return x


def part(g: Graph, i: int, h: Value) -> Value:
    """Compute what block i without experts adds: [T, n_embd]."""
    layer, blk = g.cfg.layers[i], f"blk.{i}"
    if layer.mixer == "recurrent":
        return mamba2(g, i, h)
    if layer.mixer == "attention":
        return llama.attention(g, i, h, "norm")
    up = g.linear(h, f"{blk}.ffn_up", layer.n_ff, None)
    return g.linear(g.relu2(up), f"{blk}.ffn_down", g.cfg.n_embd, None)


def mamba2(g: Graph, i: int, h: Value) -> Value:
    """Compute the Mamba2 layer of block i: [T, n_embd]."""
    assert isinstance(g.cfg.recurrence, Mamba2)
    inputs = g.linear(h, f"blk.{i}.ssm_in", g.cfg.recurrence.d_in)
    return g.linear(g.mamba2(i, inputs), f"blk.{i}.ssm_out", g.cfg.n_embd)


SSM = ("ssm_", "SSM")
TRAITS = Traits(
    hybrid=True,
    one_part=True,
    recurrence=read_mamba2,
    rotates=lambda i, window: False,
    eps_of_layer_norm=True,
)
FAMILY = Family(build, TRAITS, (SSM, *DENSE))
