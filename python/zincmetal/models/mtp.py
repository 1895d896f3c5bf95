"""Block that drafts: multi-token prediction (arXiv 2412.19437, section 2.2), in files with ``nextn_predict_layers``.

It is the block after the last layer, with keys and values of its own. The row of position i, whose token is t_i, is

    x_i = W [norm(embed(t_i)) | norm(h_{i-1})],

and the block's output, after a norm and the LM head, gives the logits of the token after t_i. h is the output of the
model after its final norm, or of this block where only drafts are known. h_{-1} is zero. ``KEPT`` has norm(h), at the
places of the positions. So x_i depends on no token after t_i, and pages can be shared as those of other layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from ..config import ModelConfig
from ..errors import UsageError
from ..graph.builder import Graph
from ..graph.ops import Value
from ..graph.storing import storing

Block: TypeAlias = Callable[[Graph, int, Value], Value]

PATH = (r"nextn\.", "block that drafts")  # the use of its own tensors


def can_draft(cfg: ModelConfig, block: Block | None) -> bool:
    """Return True if files of the family may have such a block, and this one says that it has one."""
    return block is not None and cfg.n_draft == 1


def check(cfg: ModelConfig, block: Block | None) -> None:
    """Raise UsageError if there is no block that can draft. It names the key that says so, and the remedies."""
    if can_draft(cfg, block):
        return
    key, others = f"{cfg.arch}.nextn_predict_layers", "choose 'lookup' or a draft model"
    if block is None:
        raise UsageError(f"draft: no {cfg.arch} model has a block that drafts ('mtp') here; {others}")
    if cfg.n_draft:
        raise UsageError(f"draft: {key} is {cfg.n_draft}, and 'mtp' drafts with one block; {others}")
    raise UsageError(
        f"draft: the file has no block that drafts, as {key} says; take a file that has it (its name may have MTP in "
        f"it), or {others}"
    )


def prepare(g: Graph, block: Block, h: Value) -> None:
    """Append what each step of the model does for the block: it keeps h [T, n_embd], and writes keys and values."""
    _keep(g, h)
    n = len(g.ops)
    block(g, g.cfg.n_layer, _pairs(g))
    g.ops[n:] = storing(g.ops[n:])


def draft(g: Graph, block: Block, output_norm: str) -> None:
    """Append a step of the block, from token ids to logits. Its own h is kept for the next step."""
    nextn = f"blk.{g.cfg.n_layer}.nextn"
    own_norm, own_head = f"{nextn}.shared_head_norm", f"{nextn}.shared_head_head.weight"
    x = block(g, g.cfg.n_layer, _pairs(g))
    h = g.rms_norm(x, own_norm if g.has(f"{own_norm}.weight") else output_norm)
    _keep(g, h)
    g.logits(h, own_head if g.has(own_head) else None)


def _keep(g: Graph, h: Value) -> None:
    g.keep_rows(g.rms_norm(h, f"blk.{g.cfg.n_layer}.nextn.hnorm"))


def _pairs(g: Graph) -> Value:
    """Compute the inputs of the block, x above: [T, n_embd]."""
    nextn = f"blk.{g.cfg.n_layer}.nextn"
    own_table = f"{nextn}.embed_tokens.weight"
    token = g.embed(own_table if g.has(own_table) else "token_embd.weight", f"{nextn}.embd")
    return g.linear(g.pair_rows(g.rms_norm(token, f"{nextn}.enorm")), f"{nextn}.eh_proj", g.cfg.n_embd)
