"""Qwen3-Next: Qwen3.5 mixtures whose v heads lie by their k head, with the gates of the delta rule in one matrix."""

from __future__ import annotations

from ..config import Ssm, Traits
from ..graph.builder import Graph
from ..graph.ops import Value
from . import mtp, qwen3moe, qwen35, qwen35moe
from .family import Family


def build(g: Graph) -> Value:
    """Append the operations from token ids to the last block's output [T, n_embd]."""
    return qwen35moe.build(g, delta_net)


def delta_net(g: Graph, i: int, h: Value) -> Value:
    """Compute the gated delta rule of block i: [T, n_embd]. ssm_ba gives the betas and alphas of each k head."""
    blk, ssm = f"blk.{i}", g.cfg.recurrence
    assert isinstance(ssm, Ssm)
    if g.has(f"{blk}.ssm_in.weight"):  # of older files
        qkv, z = g.ssm_ungroup(g.linear(h, f"{blk}.ssm_in", ssm.channels + ssm.d_inner))
    else:
        qkv, z = g.linear(h, f"{blk}.attn_qkv", ssm.channels), g.linear(h, f"{blk}.attn_gate", ssm.d_inner)
    gates = g.linear(h, f"{blk}.ssm_ba", 2 * ssm.n_v_head)
    y = g.ssm(i, qkv, z, gates, gates, repeat=ssm.n_v_head // ssm.n_k_head)
    return g.linear(y, f"{blk}.ssm_out", g.cfg.n_embd)


FAMILY = Family(
    build, Traits(hybrid=True, mixture=True), (mtp.PATH, qwen35.SSM, *qwen3moe.PATHS), block=qwen35moe.block
)
