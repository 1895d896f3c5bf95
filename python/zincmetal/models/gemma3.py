"""Gemma 3: scaled embedding, norms before and after each half of a block, GeGLU, and attention over a window.

Every sixth block sees all positions. The blocks with a window have rotary frequencies of their own.
"""

from __future__ import annotations

from ..config import Traits
from ..graph.builder import Graph
from ..graph.ops import Value
from . import llama
from .family import Family

LAYERS_OF_27B = 62


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        h = llama.attention(g, i, g.rms_norm(x, f"blk.{i}.attn_norm"), "neox", qk_norm=True)
        x = g.add(x, g.rms_norm(h, f"blk.{i}.post_attention_norm"))
        h = llama.ffn(g, i, g.rms_norm(x, f"blk.{i}.ffn_norm"), Graph.geglu)
        x = g.add(x, g.rms_norm(h, f"blk.{i}.post_ffw_norm"))
    return x


def attention_scale(n_layer: int, embd_per_head: float, head_dim: int) -> float:
    """Return the scale of q·k: head_dim^-0.5, but (n_embd / n_head)^-0.5 in the 27B. No file holds it."""
    return float((embd_per_head if n_layer == LAYERS_OF_27B else head_dim) ** -0.5)


FAMILY = Family(
    build,
    Traits(
        window_period=6,
        local_rope=True,
        activations=("gelu_pytorch_tanh", "gelu_tanh"),
        embedding_scale=lambda n_embd: float(n_embd**0.5),
        attention_scale=attention_scale,
    ),
)
