"""Products of weights with one row, as in decode, by their exact shapes."""

from __future__ import annotations

from dataclasses import dataclass

from ..gguf.quants import QuantType
from ..graph.ops import Op, Operand, Route, State, Value, Weight


@dataclass(frozen=True)
class Product:
    """Product: its operations, and how often they repeat on other bytes."""

    id: str
    kernel: str  # the kernel whose split is measured
    weights: tuple[Weight, ...]

    def turns(self) -> int:
        """Return how many repetitions read every weight once: 1, or more for a mixture."""
        return 1

    def ops(self, copy: int, turn: int) -> list[Op]:
        """Make the operations on copy ``copy`` of the weights."""
        raise NotImplementedError

    def outs(self) -> list[int]:
        """Return the number of floats of each output."""
        return [w.shape[0] for w in self.weights]

    def _copy(self, copy: int) -> list[Weight]:
        return [Weight(f"{w.name}.{copy}", w.type, w.shape) for w in self.weights]


X, RESIDUAL, OUT = "x", "residual", "out"


@dataclass(frozen=True)
class Linear(Product):
    """W x for several matrices, a dispatch each; none waits for another."""

    add: bool = False

    def ops(self, copy: int, turn: int) -> list[Op]:
        """Make a product for each matrix."""
        ops = []
        for i, w in enumerate(self._copy(copy)):
            m, k = w.shape
            kind, extra = ("linear_add", {"residual": Value(RESIDUAL, m)}) if self.add else ("linear", {})
            ops.append(Op(kind, weight=w, x=Value(X, k), **extra, out=State(OUT, i)))
        return ops


@dataclass(frozen=True)
class Stack(Product):
    """W x for several matrices in one dispatch."""

    def ops(self, copy: int, turn: int) -> list[Op]:
        """Make the one product."""
        weights = self._copy(copy)
        outs = [State(OUT, i) for i in range(len(weights))]
        return [Op("linear_stack", x=Value(X, weights[0].shape[1]), matrices=weights, outs=outs)]


N_USED = 8


def _route(turn: int) -> Route:
    unused = Value("unused", 1)
    return Route(Value(f"ids.{turn}", N_USED), Value("expert_weights", N_USED + 1), unused, unused, unused)


@dataclass(frozen=True)
class GateUp(Product):
    """silu(gate x) * (up x) of 8 experts."""

    def turns(self) -> int:
        """Return the turns that take all experts."""
        return self.weights[0].shape[0] // N_USED

    def outs(self) -> list[int]:
        """Return the floats of the output, a row for each expert."""
        return [N_USED * self.weights[0].shape[1]]

    def ops(self, copy: int, turn: int) -> list[Op]:
        """Make the product of the experts of a turn."""
        gate, up = self._copy(copy)
        x = Value(X, gate.shape[-1])
        return [Op("experts_gated", **_route(turn)._asdict(), gate=gate, up=up, x=x, out=State(OUT, 0), glu="swiglu")]


@dataclass(frozen=True)
class DownMix(Product):
    """residual + the weighted sum of the down projections of 8 experts, and of a shared expert if there is one."""

    def turns(self) -> int:
        """Return the turns that take all experts."""
        return self.weights[0].shape[0] // N_USED

    def outs(self) -> list[int]:
        """Return the floats of the output, one row."""
        return [self.weights[0].shape[1]]

    def ops(self, copy: int, turn: int) -> list[Op]:
        """Make the product of the experts of a turn."""
        down, *shared = self._copy(copy)
        _, m, k = down.shape
        operands: dict[str, Operand] = {"weight": down, "x": Value(X, N_USED * k), "residual": Value(RESIDUAL, m)}
        for w in shared:
            operands |= {"shared_weight": w, "shared_x": Value("x_shared", w.shape[1])}
        return [Op("experts_mix", **_route(turn)._asdict(), **operands, out=State(OUT, 0))]


def linear(qtype: QuantType, *ms: int, k: int, add: bool = False) -> Linear:
    """Make the product of matrices with these numbers of rows, a dispatch each."""
    weights = tuple(Weight(f"w{i}", qtype, (m, k)) for i, m in enumerate(ms))
    kernel = f"mul_mv{'_add' * add}_{qtype.name}"
    what = "two dispatches" if len(ms) > 1 else "add" if add else ""
    return Linear(_id(qtype, f"{'+'.join(map(str, ms))}x{k}", what), kernel, weights, add)


def stack(qtype: QuantType, *ms: int, k: int) -> Stack:
    """Make the product of matrices with these numbers of rows, in one dispatch."""
    weights = tuple(Weight(f"w{i}", qtype, (m, k)) for i, m in enumerate(ms))
    return Stack(_id(qtype, f"{'+'.join(map(str, ms))}x{k}", "stacked"), f"mul_mv_stack_{qtype.name}", weights)


def gate_up(qtype: QuantType, n_expert: int, m: int, k: int) -> GateUp:
    """Make gate and up of 8 of ``n_expert`` experts."""
    weights = tuple(Weight(name, qtype, (n_expert, m, k)) for name in ("gate", "up"))
    return GateUp(_id(qtype, f"{N_USED}of{n_expert}x{m}x{k}", "gate/up"), f"moe_mv_gated_{qtype.name}", weights)


def down_mix(qtype: QuantType, n_expert: int, m: int, k: int, shared: QuantType | None = None) -> DownMix:
    """Make down of 8 of ``n_expert`` experts, mixed. ``shared`` is the type of a shared expert of the same width."""
    weights = [Weight("down", qtype, (n_expert, m, k))]
    kernel, what = f"moe_mv_mix_{qtype.name}", "down/mix"
    if shared:
        weights.append(Weight("shared", shared, (m, k)))
        kernel, what = f"moe_mv_mix2_{qtype.name}_{shared.name}", f"down/mix, shared {shared.name}"
    return DownMix(_id(qtype, f"{N_USED}of{n_expert}x{m}x{k}", what), kernel, tuple(weights))


def _id(qtype: QuantType, shape: str, what: str) -> str:
    return f"{qtype.name} {shape} {what}".rstrip()
