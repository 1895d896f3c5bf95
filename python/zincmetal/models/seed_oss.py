"""Seed-OSS: Llama with biases on q, k and v, rotary halves, and another name for the feed-forward's norm."""

from __future__ import annotations

from ..graph.builder import Graph
from ..graph.ops import Value
from . import llama
from .family import Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    return llama.build(g, rope="neox", qkv_bias=True, ffn_norm="post_attention_norm")


FAMILY = Family(build)
