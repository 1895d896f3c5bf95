"""Qwen3 mixtures: Qwen3 with experts in place of the feed-forward. Other families use its mixture."""

from __future__ import annotations

from ..config import Traits
from ..graph.builder import Graph, Rows
from ..graph.ops import Route, Value
from . import llama
from .family import DENSE, Family

#: What stands between an expert's gate, up and down, by its name in the configuration.
GLUS = {"swiglu": Graph.swiglu, "geglu": Graph.geglu, "swiglu_clamped": Graph.swiglu_clamped}


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    x = g.embed("token_embd.weight")
    for i in range(g.cfg.n_layer):
        h = g.rms_norm(x, f"blk.{i}.attn_norm")
        x = g.add(x, llama.attention(g, i, h, rope="neox", qk_norm=True))
        x = mixture(g, i, x, g.rms_norm(x, f"blk.{i}.ffn_norm"))
    return x


def feed_forward(g: Graph, i: int, x: Value, h: Value) -> Value:
    """Compute x + block i's mixture of h, or its dense feed-forward if it has no experts: [T, n_embd]."""
    return mixture(g, i, x, h) if g.cfg.layers[i].mixture else g.add(x, llama.ffn(g, i, h))


def mixture(g: Graph, i: int, x: Value, h: Value, logits: Value | None = None) -> Value:
    """Compute x + the weighted outputs of h's experts, and of the shared expert if there is one: [T, n_embd].

    The configuration of experts says how they are chosen and what they compute. ``logits`` [T, n_expert] are those of
    the router, by default its product with h.
    """
    experts, blk = g.cfg.experts, f"blk.{i}"
    assert experts
    if logits is None:
        logits = g.linear(h, f"{blk}.ffn_gate_inp", experts.n, None)
    gated = experts.n_ff_shared and experts.shared_gated
    route = g.route(i, logits, g.linear(h, f"{blk}.ffn_gate_inp_shexp", 1) if gated else None)
    if experts.n_ff_shared:
        x = g.add_shared(x, route, shared_expert(g, i, h))
    return g.mix(x, route, routed_experts(g, i, h, route))


def shared_expert(g: Graph, i: int, h: Value) -> Value:
    """Compute the shared expert of block i: [T, n_embd]."""
    assert g.cfg.experts
    blk, n_ff = f"blk.{i}", g.cfg.experts.n_ff_shared
    activation = g.cfg.experts.activation
    if activation in GLUS:
        gate = g.linear(h, f"{blk}.ffn_gate_shexp", n_ff)
        hidden = GLUS[activation](g, gate, g.linear(h, f"{blk}.ffn_up_shexp", n_ff))
    else:
        hidden = g.relu2(g.linear(h, f"{blk}.ffn_up_shexp", n_ff))
    return g.linear(hidden, f"{blk}.ffn_down_shexp", g.cfg.n_embd)


def routed_experts(g: Graph, i: int, h: Value, route: Route) -> Value:
    """Compute each row's chosen experts of block i: [T, n_used · n_embd]. Gate and up may be one fused tensor."""
    assert g.cfg.experts
    blk, n_in, n_ff, activation = f"blk.{i}", h.width, g.cfg.experts.n_ff, g.cfg.experts.activation
    if activation in GLUS:
        fused = f"{blk}.ffn_gate_up_exps"
        if g.has(f"{fused}.weight"):
            gate, up = (g.experts(route, h, fused, n_in, n_ff, Rows(first, 2 * n_ff)) for first in (0, n_ff))
        else:
            gate, up = (g.experts(route, h, f"{blk}.ffn_{name}_exps", n_in, n_ff) for name in ("gate", "up"))
        hidden = GLUS[activation](g, gate, up)
    else:
        hidden = g.relu2(g.experts(route, h, f"{blk}.ffn_up_exps", n_in, n_ff))
    return g.experts(route, hidden, f"{blk}.ffn_down_exps", n_ff, n_in)


PATHS = (
    ("ffn_gate_inp|exp_probs_b", "router"),
    ("ffn_(gate|up|down|gate_up)_exps", "routed experts"),
    ("ffn_(gate|up|down)_shexp", "shared expert"),
    *DENSE,
)
FAMILY = Family(build, Traits(mixture=True), PATHS)
