"""Qwen3: Llama with an RMSNorm on every query and key head, and rotary halves instead of pairs."""

from __future__ import annotations

from ..graph.builder import Graph
from ..graph.ops import Value
from . import llama
from .family import Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    return llama.build(g, rope="neox", qk_norm=True)


FAMILY = Family(build)
