"""Operands of operations: weights, values, states, and a mixture's route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ..gguf.quants import QuantType


@dataclass(frozen=True)
class Weight:
    """Tensor of the file, or one that is computed from the metadata (``rope_freqs``)."""

    name: str
    type: QuantType
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True)
class Value:
    """Activations, float32 [T, width]. ``last``: only the last row of the step is kept, [1, width]."""

    name: str
    width: int
    last: bool = False


@dataclass(frozen=True)
class State:
    """Memory that outlives a step. States of a layer have its number: ``State("k_cache", 0)``."""

    kind: str
    layer: int | None = None

    @property
    def name(self) -> str:
        """Name of its buffer: "logits", "k_cache.0"."""
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


Operand: TypeAlias = Weight | Value | State

STEP = State("step")  # the number of tokens of a step and its first position: struct Step of kernels/params.h
TOKENS = State("tokens")  # i32 [T], the ids of the step
PAGES = State("pages")  # u32 [n_pages], the place of each page of the K/V caches
LOGITS = State("logits")  # float32 [n_vocab], or [T, n_vocab] if all rows are wanted
CANDIDATES = State("candidates")  # the largest logits and sums over all of them: struct Candidates

# The states of a layer that attends, and of a recurrent layer.
KV_CACHES = ("k_cache", "v_cache")  # [positions, n_head_kv, head_dim] each, in whole pages
RECURRENT = ("ssm_conv", "ssm_state")  # [d_conv, channels] and [d_inner, d_state]


class Route(NamedTuple):
    """Experts of each row of a mixture, as :meth:`Graph.route` gives them. Integers are i32.

    A slot is one expert of one row: number ``row * n_used + j``. Only steps of many rows write the last three.
    """

    ids: Value  # [T, n_used], the ids of each row's experts
    weights: Value  # float32 [T, n_used + 1], their weights, then the shared expert's
    slots: Value  # [T * n_used], all slots, sorted by expert
    tiles: Value  # [n_tiles, 4]: expert, first and end of a run of ``slots`` that this expert takes, 0
    n_tiles: Value  # [1]
