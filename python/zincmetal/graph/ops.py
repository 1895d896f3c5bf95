"""The operations of a step and their operands: weights, values and states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from ..gguf.quants import QuantType


@dataclass(frozen=True)
class Weight:
    """A tensor of the file, or one that the engine computes from its metadata (``rope_freqs``)."""

    name: str
    type: QuantType
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True)
class Value:
    """Activations float32 [T, width], or [1, width] where ``last`` says that only the last row is wanted."""

    name: str
    width: int
    last: bool = False


@dataclass(frozen=True)
class State:
    """What outlives a step: device memory that the engine owns under this name."""

    name: str


Operand: TypeAlias = Weight | Value | State


@dataclass(frozen=True)
class Op:
    """One operation: ``kind``, what it reads and writes, and its numbers.

    ``parts`` are the operations that a fused one stands for, in order: they do the same.
    """

    kind: str
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Op, ...] = field(default=(), compare=False, repr=False)

    @property
    def out(self) -> Operand:
        """The first (often only) result."""
        return self.writes[0]


class Route(NamedTuple):
    """Where a mixture sends each row: the result of :meth:`Graph.route`."""

    ids: Value
    weights: Value
    slots: Value
    tiles: Value
    n_tiles: Value


STEP = State("step")
TOKENS = State("tokens")
PAGES = State("pages")
LOGITS = State("logits")
CANDIDATES = State("candidates")

# What a layer keeps from step to step, as in "k_cache.0": one that attends, and a recurrent one.
KV_CACHES = ("k_cache", "v_cache")
RECURRENT = ("ssm_conv", "ssm_state")
