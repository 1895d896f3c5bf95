"""Lowering's shared code: its context, the registry of functions, bindings and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from ...config import Layer, ModelConfig
from ...errors import UnsupportedModelError
from ...graph.ops import LOGITS, Op, Operand, Value, Weight
from ..chunks import ONE_ROW, StepShape
from ..launch import Arg, Launch
from ..target import Target


@dataclass(frozen=True)
class Lowering:
    """Lowers operations for plans of one target, model and shape of steps. K/V caches hold ``kv_type``.

    Steps end before position ``max_position`` (default: the context). ``windows`` has the
    rows of a tensor, by its name, if they lie in several buffers.
    """

    target: Target
    cfg: ModelConfig
    kv_type: str
    shape: StepShape = ONE_ROW
    max_position: int | None = None
    windows: Mapping[str, Sequence[Weight]] = field(default_factory=dict)

    def layer(self, op: Op) -> Layer:
        """Return the sizes of the layer that an operation belongs to."""
        return self.cfg.layers[op.layer]

    def rotation(self, op: Op) -> dict[str, float]:
        """Return what kernels need of a layer's rotary embedding: the dimensions that turn, and factors of results."""
        layer, temperature = self.layer(op), self.cfg.temperature
        return {
            "n_rot": layer.n_rot,
            "magnitude": layer.rope.magnitude if layer.rope else 1.0,
            "temperature": temperature.scale if temperature else 0.0,
            "temperature_length": temperature.length if temperature else 1,
        }

    def launches(self, op: Op) -> list[Launch]:
        """Lower an operation to its launches in a step of the shape. An operation on outputs has a row for each.

        Other kernels replace missing kernels: a more general kernel, or the kernels of the operation's ``parts``.
        """
        rows = self.shape.outs if of_outputs(op) else self.shape.rows
        if not self.target.missing:
            return _LOWERS[op.kind](self, op, rows)
        whole = replace(self, target=self.target.without(()))
        usual = [launch.kernel for launch in whole.launches(op)]
        lost = tuple(kernel for kernel in dict.fromkeys(usual) if not self.target.has(kernel))
        there = self._with_parts(op, rows)
        return [launch if launch.kernel in usual else replace(launch, replaces=lost) for launch in there]

    def _with_parts(self, op: Op, rows: int) -> list[Launch]:
        launches = _LOWERS[op.kind](self, op, rows)
        if all(self.target.has(launch.kernel) for launch in launches) or not _separable(op, rows):
            return launches
        return [launch for part in op.parts for launch in self._with_parts(part, rows)]

    def params(self, struct: str, **fields: Any) -> bytes:
        """Return the bytes of a parameter struct. Raises UnsupportedModelError if a number does not fit 32 bits."""
        dtype = self.target.struct(struct)
        if set(fields) != set(dtype.names or ()):
            raise TypeError(f"{struct} has fields {dtype.names}, not {tuple(fields)}")
        if large := [f"{name} {n}" for name, n in fields.items() if isinstance(n, int) and n >= 2**32]:
            problem = f"{', '.join(large)}: kernels take numbers below 2^32"
            raise UnsupportedModelError(f"the model has a tensor too large for {struct}: {problem}")
        return np.array(tuple(fields[name] for name in dtype.names or ()), dtype).tobytes()

    def in_windows(self, weight: Weight) -> Iterator[tuple[int, Weight]]:
        """Yield each piece of a matrix as it lies in buffers, with the number of its first row."""
        n, first = weight.shape[0], 0
        for window in self.windows.get(weight.name, (weight,)):
            rows = min(window.shape[0], n - first)
            if rows > 0:
                yield first, replace(window, shape=(rows, *window.shape[1:]))
            first += window.shape[0]


# ---- the registry ---------------------------------------------------------------------------------------------------

Lower: TypeAlias = Callable[[Lowering, Op, int], list[Launch]]
_LOWERS: dict[str, Lower] = {}


def lowers(*kinds: str) -> Callable[[Lower], Lower]:
    """Register the function that lowers operations of these kinds: ``lower(lowering, op, rows)`` returns launches."""

    def register(lower: Lower) -> Lower:
        _LOWERS.update(dict.fromkeys(kinds, lower))
        return lower

    return register


def of_outputs(op: Op) -> bool:
    """Return True if the operation works on the outputs of a step."""
    return any(v == LOGITS or (isinstance(v, Value) and v.outs) for v in (*op.reads, *op.writes))


def _separable(op: Op, rows: int) -> bool:
    """Return True if the operation can run as its ``parts``.

    With many rows only the product itself can add a bias, or apply the weights of a shared expert.
    """
    shared = op.kind == "linear_mix" or (op.kind == "linear_add" and op.get("bias") is not None)
    return bool(op.parts) and (rows == 1 or not shared)


# ---- bindings -------------------------------------------------------------------------------------------------------


def reading(op: Op, *names: str) -> tuple[Arg, ...]:
    """Bind the operands of these names for reading."""
    return tuple([Arg(op[name], "r") for name in names])


def writing(op: Op, *names: str) -> tuple[Arg, ...]:
    """Bind the operands of these names for writing."""
    return tuple([Arg(op[name], "w") for name in names])


def all_args(op: Op) -> tuple[Arg, ...]:
    """Bind all operands that the operation reads, then all that it writes."""
    return (*[Arg(r, "r") for r in op.reads], *[Arg(w, "w") for w in op.writes])


def or_dummy(operand: Operand | None, dummy: Operand, mode: str = "r") -> Arg:
    """Bind an operand. If it was left out, bind ``dummy``, which the kernel does not touch."""
    return Arg(operand, mode) if operand else Arg(dummy, mode, unused=True)


def norm_of(op: Op) -> dict[str, Any]:
    """Return the fields of parameters that say whether a product is of the norm of x. One has ``norm`` as an operand.

    Its binding follows that of x.
    """
    return {"normed": int(op.get("norm") is not None), "eps": op.attrs.get("eps", 0.0)}


def tiles(n: int, tile: int) -> int:
    """Return the number of tiles that cover ``n``."""
    return -(-n // tile)
