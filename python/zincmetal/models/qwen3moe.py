"""Qwen3 mixtures: Qwen3 with experts in place of the feed-forward. Other families use its mixture."""

from __future__ import annotations

from ..config import Traits
from ..graph.builder import Graph
from ..graph.ops import Value
from . import llama
from .family import DENSE, Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        h = g.rms_norm(x, f"blk.{i}.attn_norm")
        x = g.add(x, llama.attention(g, i, h, rope="neox", qk_norm=True))
        x = mixture(g, i, x, g.rms_norm(x, f"blk.{i}.ffn_norm"))
    return x


def mixture(g: Graph, i: int, x: Value, h: Value) -> Value:
    """Compute x + the weighted outputs of h's experts, and of the shared expert if there is one: [T, n_embd]."""
    assert g.cfg.experts
    n_embd, n_ff, n_shared = g.cfg.n_embd, g.cfg.experts.n_ff, g.cfg.experts.n_ff_shared
    blk = f"blk.{i}"
    router = g.linear(h, f"{blk}.ffn_gate_inp", g.cfg.experts.n)
    route = g.route(i, router, g.linear(h, f"{blk}.ffn_gate_inp_shexp", 1) if n_shared else None)
    if n_shared:
        gate = g.linear(h, f"{blk}.ffn_gate_shexp", n_shared)
        up = g.linear(h, f"{blk}.ffn_up_shexp", n_shared)
        x = g.add_shared(x, route, g.linear(g.swiglu(gate, up), f"{blk}.ffn_down_shexp", n_embd))
    gate = g.experts(route, h, f"{blk}.ffn_gate_exps", n_embd, n_ff)
    up = g.experts(route, h, f"{blk}.ffn_up_exps", n_embd, n_ff)
    return g.mix(x, route, g.experts(route, g.swiglu(gate, up), f"{blk}.ffn_down_exps", n_ff, n_embd))


PATHS = (
    ("ffn_gate_inp", "router"),
    ("ffn_(gate|up|down)_exps", "routed experts"),
    ("ffn_(gate|up|down)_shexp", "shared expert"),
    *DENSE,
)
FAMILY = Family(build, Traits(mixture=True), PATHS)
