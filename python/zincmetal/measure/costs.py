"""Computes the bytes and operations of a plan's dispatch, the two numbers of its roofline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ..config import Mamba2, ModelConfig, Ssm
from ..graph.ops import KV_CACHES, LOGITS, Op, State, Value, Weight
from ..plan.plan import Dispatch, Plan


@dataclass(frozen=True)
class Cost:
    """Bytes read and written, each once, and floating-point operations."""

    nbytes: int
    flops: int


class Costs:
    """Costs of a plan's dispatches in a step of all its rows, which are one run from ``pos`` on.

    ``pool`` is the number of positions in the pools of K/V.
    """

    def __init__(self, plan: Plan, cfg: ModelConfig, pool: int, pos: int) -> None:
        self._plan, self._cfg, self._pool, self._pos = plan, cfg, pool, pos

    def of(self, d: Dispatch) -> Cost:
        """Return the cost of one dispatch.

        Weights count as in :meth:`Plan.weight_reads`. Activations, logits and routing's index arrays count whole, of
        recurrent states one slot. A K/V cache counts the positions that the rows see or write.
        """
        weights = self._plan.weights_of(d)
        return Cost(sum(weights.values()) + sum(self._moved(d)), self._flops(d, weights))

    def _moved(self, d: Dispatch) -> Iterator[int]:
        """Count the bytes of operands that are no weights, once for reading and once for writing."""
        seen = {(a.operand, a.mode): r for a, r in zip(d.launch.args, d.regions, strict=True)}
        for (operand, mode), region in seen.items():
            if isinstance(operand, Value):
                yield len(mode) * region.nbytes
            elif isinstance(operand, State):
                yield len(mode) * self._state_bytes(operand, mode, region.nbytes, d.launch.op)

    def _state_bytes(self, state: State, mode: str, nbytes: int, op: Op) -> int:
        if state in self._plan.slot_bytes:
            return self._plan.slot_bytes[state]
        if state.kind not in KV_CACHES or state.layer is None:
            return nbytes if state == LOGITS else 0
        used = self._plan.rows if mode != "r" else min(self._cfg.layers[state.layer].window or self._pool, self._length)
        return nbytes // self._pool * min(used, self._pool)

    @property
    def _length(self) -> int:
        return self._pos + self._plan.rows

    def _flops(self, d: Dispatch, weights: dict[Weight, int]) -> int:
        op, kernel, rows = d.launch.op, d.launch.kernel, self._plan.rows
        if kernel.startswith(("mul_", "moe_mv", "moe_few", "moe_mm")):
            x = op.get("x")
            rows = self._plan.shape.outs if isinstance(x, Value) and x.outs else rows
            return sum(2 * rows * _used(op, w) for w in weights if w != op.get("norm"))  # a norm's are few
        if kernel.startswith("attention") and "merge" not in kernel:
            layer = self._cfg.layers[op.layer]
            n_value = layer.latent.n_latent if layer.latent else layer.head_dim
            return 2 * layer.n_head * (layer.head_dim + n_value) * self._pairs(layer.window)
        if kernel.startswith(("ssm_step", "ssm_delta")) and isinstance(self._cfg.recurrence, Ssm):
            # decay, two products, one outer product
            return 7 * rows * self._cfg.recurrence.d_inner * self._cfg.recurrence.d_state
        if kernel.startswith(("mamba2_step", "mamba2_scan")) and isinstance(self._cfg.recurrence, Mamba2):
            # decay, one outer product, one product
            return 5 * rows * self._cfg.recurrence.d_inner * self._cfg.recurrence.d_state
        return 0

    def _pairs(self, window: int) -> int:
        """Count the (row, key) pairs that attention sees."""
        return sum(min(self._pos + t + 1, window or self._length) for t in range(self._plan.rows))


def _used(op: Op, w: Weight) -> int:
    """Count the weights of a matrix, of the matrices of all heads, or of a row's experts."""
    if len(w.shape) < 3 or op.kind == "linear_heads":
        return prod(w.shape)
    return prod(w.shape[1:]) * op.value("ids").width


def shape_of(plan: Plan, d: Dispatch) -> str:
    """Format a product's shape: "8192+4096x2048", "8of256x512x2048"; "" for other dispatches."""
    matrices = [w for w in plan.weights_of(d) if len(w.shape) > 1]
    if not d.launch.kernel.startswith(("mul_", "moe_m")) or not matrices:
        return ""
    experts = [w for w in matrices if len(w.shape) == 3]
    if experts and d.launch.op.kind == "linear_heads":
        return "x".join(map(str, experts[0].shape))
    if experts:
        n_expert, m, k = experts[0].shape
        return f"{d.launch.op.value('ids').width}of{n_expert}x{m}x{k}"
    return "+".join(str(w.shape[0]) for w in matrices) + f"x{matrices[0].shape[1]}"
