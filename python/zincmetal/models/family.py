"""A model family: how its operations are built, what its files do not say, and what its tensors are read for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from ..config import Traits
from ..graph.builder import Graph
from ..graph.ops import Value

Paths: TypeAlias = tuple[tuple[str, str], ...]

#: The first pattern that a tensor's name holds says what its bytes are read for: in a dense transformer.
DENSE: Paths = (
    ("attn_[qkv]|attn_output|rope_freqs", "attention"),
    ("ffn_(gate|up|down)", "feed-forward"),
    ("norm", "norms"),
    ("output|token_embd", "LM head"),
)


@dataclass(frozen=True)
class Family:
    """A family's ``build(g)``, which appends a step's operations and returns the last block's output [T, n_embd]."""

    build: Callable[[Graph], Value]
    traits: Traits = field(default_factory=Traits)
    paths: Paths = DENSE
