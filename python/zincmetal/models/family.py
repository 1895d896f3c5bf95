"""Model family: the builder of its operations, its traits, and the use of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from ..config import Traits
from ..graph.builder import Graph
from ..graph.ops import Value

Paths: TypeAlias = tuple[tuple[str, str], ...]

#: (pattern, use) of a dense transformer's tensors. The first pattern that is found in a name counts.
DENSE: Paths = (
    ("attn_[qkv]|attn_output|rope_f", "attention"),
    ("ffn_(gate|up|down)", "feed-forward"),
    ("norm", "norms"),
    ("output|token_embd", "LM head"),
)


@dataclass(frozen=True)
class Family:
    """Model family: its ``build(g)``, its traits and the use of its tensors.

    ``build`` appends a step's operations to a graph and returns the last block's output [T, n_embd]. ``block`` appends
    those of one block, which may be one that drafts, and returns its output.
    """

    build: Callable[[Graph], Value]
    traits: Traits = field(default_factory=Traits)
    paths: Paths = DENSE
    output_norm: str = "output_norm"  # tensor of the norm before the logits
    block: Callable[[Graph, int, Value], Value] | None = None  # of files with blocks that draft tokens: see mtp.py
    name: str = ""  # in ``general.architecture``, if that is no module's name
