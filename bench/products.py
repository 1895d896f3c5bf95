"""Products of weights with one row, as in decode, on weights that no cache holds.

A recording launches a product many times, each behind a barrier. Each launch reads another copy of the weights, or
other experts of one tensor. So every byte comes from memory. The launches are a plan's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from zincmetal.check.inputs import random_weights
from zincmetal.device import backend
from zincmetal.device.buffers import bound, step_record
from zincmetal.device.core import BoundDispatch
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType
from zincmetal.graph.ops import STEP, Op, Operand, Route, State, Value, Weight
from zincmetal.plan.addresses import Region
from zincmetal.plan.chunks import ONE_ROW
from zincmetal.plan.lower import Lowering
from zincmetal.plan.plan import ARENA, Plan, record
from zincmetal.plan.target import Target
from zincmetal.plan.tuning import SPLITS, Split

MIN_DISPATCHES = 64  # dispatches of a recording: they share the cost of its start
REPEATS = 7


@dataclass(frozen=True)
class Product:
    """Product: its operations, and how often they repeat on other bytes."""

    id: str
    kernel: str  # the kernel whose split is measured
    weights: tuple[Weight, ...]

    def turns(self) -> int:
        """Returns how many repetitions read every weight once: 1, or more for a mixture."""
        return 1

    def ops(self, copy: int, turn: int) -> list[Op]:
        """Makes the operations on copy ``copy`` of the weights."""
        raise NotImplementedError

    def outs(self) -> list[int]:
        """Returns the number of floats of each output."""
        return [w.shape[0] for w in self.weights]

    def _copy(self, copy: int) -> list[Weight]:
        return [Weight(f"{w.name}.{copy}", w.type, w.shape) for w in self.weights]


X, RESIDUAL, OUT = "x", "residual", "out"


@dataclass(frozen=True)
class Linear(Product):
    """W x for several matrices, a dispatch each; none waits for another."""

    add: bool = False

    def ops(self, copy: int, turn: int) -> list[Op]:
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
        return self.weights[0].shape[0] // N_USED

    def outs(self) -> list[int]:
        return [N_USED * self.weights[0].shape[1]]

    def ops(self, copy: int, turn: int) -> list[Op]:
        gate, up = self._copy(copy)
        x = Value(X, gate.shape[-1])
        return [Op("experts_gated", **_route(turn)._asdict(), gate=gate, up=up, x=x, out=State(OUT, 0), glu="swiglu")]


@dataclass(frozen=True)
class DownMix(Product):
    """residual + the weighted sum of the down projections of 8 experts, and of a shared expert if there is one."""

    def turns(self) -> int:
        return self.weights[0].shape[0] // N_USED

    def outs(self) -> list[int]:
        return [self.weights[0].shape[1]]

    def ops(self, copy: int, turn: int) -> list[Op]:
        down, *shared = self._copy(copy)
        _, m, k = down.shape
        operands: dict[str, Operand] = {"weight": down, "x": Value(X, N_USED * k), "residual": Value(RESIDUAL, m)}
        for w in shared:
            operands |= {"shared_weight": w, "shared_x": Value("x_shared", w.shape[1])}
        return [Op("experts_mix", **_route(turn)._asdict(), **operands, out=State(OUT, 0))]


def linear(qtype: QuantType, *ms: int, k: int, add: bool = False) -> Linear:
    """Makes the product of matrices with these numbers of rows, a dispatch each."""
    weights = tuple(Weight(f"w{i}", qtype, (m, k)) for i, m in enumerate(ms))
    kernel = f"mul_mv{'_add' * add}_{qtype.name}"
    what = "two dispatches" if len(ms) > 1 else "add" if add else ""
    return Linear(_id(qtype, f"{'+'.join(map(str, ms))}x{k}", what), kernel, weights, add)


def stack(qtype: QuantType, *ms: int, k: int) -> Stack:
    """Makes the product of matrices with these numbers of rows, in one dispatch."""
    weights = tuple(Weight(f"w{i}", qtype, (m, k)) for i, m in enumerate(ms))
    return Stack(_id(qtype, f"{'+'.join(map(str, ms))}x{k}", "stacked"), f"mul_mv_stack_{qtype.name}", weights)


def gate_up(qtype: QuantType, n_expert: int, m: int, k: int) -> GateUp:
    """Makes gate and up of 8 of ``n_expert`` experts."""
    weights = tuple(Weight(name, qtype, (n_expert, m, k)) for name in ("gate", "up"))
    return GateUp(_id(qtype, f"{N_USED}of{n_expert}x{m}x{k}", "gate/up"), f"moe_mv_gated_{qtype.name}", weights)


def down_mix(qtype: QuantType, n_expert: int, m: int, k: int, shared: QuantType | None = None) -> DownMix:
    """Makes down of 8 of ``n_expert`` experts, mixed. ``shared`` is the type of a shared expert of the same width."""
    weights = [Weight("down", qtype, (n_expert, m, k))]
    kernel, what = f"moe_mv_mix_{qtype.name}", "down/mix"
    if shared:
        weights.append(Weight("shared", shared, (m, k)))
        kernel, what = f"moe_mv_mix2_{qtype.name}_{shared.name}", f"down/mix, shared {shared.name}"
    return DownMix(_id(qtype, f"{N_USED}of{n_expert}x{m}x{k}", what), kernel, tuple(weights))


def _id(qtype: QuantType, shape: str, what: str) -> str:
    return f"{qtype.name} {shape} {what}".rstrip()


# ---- on a device --------------------------------------------------------------------------------------------------


class Lab:
    """Open device that runs products."""

    def __init__(self) -> None:
        self.core, self.device = backend.open_device()
        info = self.device.info
        self.name, self.backend = info["name"], info["backend"]
        l2 = int(info["features"].get("L2 cache", 0))
        self.cold_bytes = 4 * l2 or 256 << 20
        self.kernels = set(self.device.kernel_names())

    def skip_unless_built(self, kernel: str, split: Split) -> None:
        """Skips a test if the split has no instance, or the instance takes too few threads."""
        usual = self.core.shapes()["MOE_MIX_ROWS" if "_mix" in kernel else "MUL_MV_ROWS"]
        name = kernel if split.rows == usual else f"{kernel}_r{split.rows}"
        if name not in self.kernels:
            pytest.skip(f"{name} is not built: see ZINCMETAL_SWEEP")
        most = self.device.limits(name)[0]
        if (split.threads or 0) > most:
            pytest.skip(f"{name} takes {most} threads")

    def row_variants(self, kernel: str) -> list[int]:
        """Lists the numbers of rows of this build's instances, without the usual one."""
        return [rows for rows in range(1, 33) if f"{kernel}_r{rows}" in self.kernels]

    def may_round_otherwise(self, kernel: str) -> bool:
        """Returns True if instances of a kernel may add in another order: mixes with other threads, native kernels."""
        native = self.device.info["features"].get("native kernels", "0 of")
        return "_mix" in kernel or not native.startswith("0 of")


class Loaded:
    """Product with random weights on a device, in so many copies that no cache holds them all."""

    def __init__(self, lab: Lab, product: Product) -> None:
        self.lab, self.product = lab, product
        self._rng = np.random.default_rng(7)
        self._sizes = [w.type.nbytes(w.shape) for w in product.weights]
        self.copies = max(1 if product.turns() > 1 else 2, -(-lab.cold_bytes // sum(self._sizes)))
        self._buffer = lab.device.alloc(self.copies * sum(self._sizes))
        step = step_record(lab.core, 1)
        self._step = lab.device.alloc(step.nbytes)
        self._step.write(step)
        self._out = lab.device.alloc(4 * sum(product.outs()))
        once = np.concatenate([random_weights(w.type, w.shape, self._rng).reshape(-1) for w in product.weights])
        for copy in range(self.copies):
            self._buffer.write(once, copy * once.nbytes)
        self._values: dict[str, NDArray[Any]] = {}

    def plan(self, split: Split | None = None, n: int | None = None) -> Plan:
        """Records the product ``n`` times, by default whole rounds of MIN_DISPATCHES or more.

        Without ``split`` the launches are a model's.
        """
        tuned = {self.product.kernel: split} if split else SPLITS.get(self.lab.backend, {})
        target = replace(Target.of_kernels(self.lab.core), splits=tuned)
        lowering = Lowering(target, None, "f16")  # type: ignore[arg-type]  # no product asks for the configuration
        places = [(c, t) for t in range(self.product.turns()) for c in range(self.copies)]
        n = n or -(-MIN_DISPATCHES // len(places)) * len(places)
        ops = [op for i in range(n) for op in self.product.ops(*places[i % len(places)])]
        return record(ops, ONE_ROW, lowering, self._place)

    def _place(self, operand: Operand) -> Region:
        if operand == STEP:
            return Region("step", 0, self._step.nbytes)
        if isinstance(operand, State) and operand.layer is not None:
            outs, i = self.product.outs(), operand.layer
            return Region(OUT, 4 * sum(outs[:i]), 4 * outs[i])
        name, _, copy = operand.name.rpartition(".")
        i = [w.name for w in self.product.weights].index(name)
        return Region("weights", int(copy) * sum(self._sizes) + sum(self._sizes[:i]), self._sizes[i])

    def ready(self, made: Plan) -> list[BoundDispatch]:
        """Makes the dispatches of a plan ready, with their activations."""
        arena = self.lab.device.alloc(made.arena_bytes)
        image = np.zeros(made.arena_bytes, np.uint8)
        for d in made.dispatches:
            for arg, region in zip(d.launch.args, d.regions, strict=True):
                if region.buffer == ARENA:
                    data = self.activation(arg.operand.name, region.nbytes // 4).view(np.uint8)
                    image[region.offset : region.offset + region.nbytes] = data
        arena.write(image)
        buffers = {ARENA: arena, "weights": self._buffer, "step": self._step, "out": self._out}
        return [bound(d, buffers.__getitem__) for d in made.dispatches]

    def activation(self, name: str, n: int = 0) -> NDArray[Any]:
        """Returns the activation of a name, one for all plans: ``n`` floats, or the ids of a turn."""
        if name not in self._values:
            if name.startswith("ids."):
                order = np.random.default_rng(11).permutation(self.product.weights[0].shape[0])
                turn = int(name.removeprefix("ids."))
                self._values[name] = order[turn * N_USED :][:N_USED].astype(np.int32)
            else:
                self._values[name] = self._rng.standard_normal(n, np.float32)
        return self._values[name]

    def has(self, name: str) -> bool:
        """Returns True if a plan has asked for this activation."""
        return name in self._values

    def outputs(self, split: Split | None = None) -> NDArray[np.float32]:
        """Runs the product once; returns all outputs, one after the other."""
        self._out.write(np.full(self._out.nbytes, 0xFF, np.uint8))
        self.lab.device.run(self.ready(self.plan(split, n=1)))
        return self._out.read().view(np.float32)

    @cached_property
    def usual_outputs(self) -> NDArray[np.float32]:
        """Outputs of the product as this device launches it."""
        return self.outputs()

    def recording(self, split: Split | None = None) -> Recording:
        """Makes the product ready to run many times."""
        made = self.plan(split)
        dispatches = self.ready(made)
        return Recording(self, made, dispatches, len(dispatches) // len(self.product.ops(0, 0)))


@dataclass(frozen=True)
class Recording:
    """Dispatches of ``n`` times a product."""

    of: Loaded
    plan: Plan
    dispatches: list[Any]
    n: int

    @property
    def nbytes(self) -> int:
        """Returns the bytes of weights that one product reads."""
        return sum(self.plan.weight_bytes().values()) // self.n

    def run(self) -> float:
        """Runs the dispatches; returns the device's seconds."""
        seconds: float = self.of.lab.device.run(self.dispatches)
        return seconds


def summary(recording: Recording, seconds: Sequence[float], copy: float, outputs: str) -> dict[str, Any]:
    """Makes a row of the table: microseconds of a product, GB/s of weights, and their share of a copy's."""
    launch, product = recording.plan.dispatches[0].launch, recording.of.product
    each = median(seconds) / recording.n
    rate = recording.nbytes / each
    return {
        "product": product.id,
        "kernel": launch.kernel,
        "threads": launch.threads,
        "us": round(each * 1e6, 2),
        "spread": round((max(seconds) - min(seconds)) / median(seconds), 3),
        "MB": round(recording.nbytes / 1e6, 2),
        "GB/s": round(rate / 1e9, 1),
        "share of copy": round(rate / copy, 3),
        "dispatches": len(recording.dispatches),
        "outputs": outputs,
    }


def shapes_types() -> Iterator[Product]:
    """Makes products of every quantised type on one shape: a matrix, and both products of a mixture."""
    for qtype in (t for t in quants.SUPPORTED if t.block_size > 1):
        yield linear(qtype, 4096, k=4096)
        yield gate_up(qtype, 64, 768, 2048)
        yield down_mix(qtype, 64, 2048, 768)


def shapes_35b() -> Iterator[Product]:
    """Yields the products of a token of Qwen3.6-35B-A3B, in the types of UD-Q4_K_XL: projections, head, experts."""
    q8_0 = quants.by_name("q8_0")
    yield linear(q8_0, 248320, k=2048)
    yield linear(q8_0, 8192, k=2048)
    yield linear(q8_0, 4096, k=2048)
    yield linear(q8_0, 2048, k=4096)
    yield linear(q8_0, 2048, k=4096, add=True)
    yield linear(q8_0, 8192, 4096, k=2048)
    yield stack(q8_0, 8192, 4096, k=2048)
    for name in ("q4_k", "q5_k", "q6_k"):
        qtype = quants.by_name(name)
        yield gate_up(qtype, 256, 512, 2048)
        yield down_mix(qtype, 256, 2048, 512)
        yield down_mix(qtype, 256, 2048, 512, q8_0)


def shapes_8b() -> Iterator[Product]:
    """Yields the products of Qwen3-8B as Q4_K_M, without gate and up."""
    q4_k, q6_k = quants.by_name("q4_k"), quants.by_name("q6_k")
    yield stack(q4_k, 4096, 1024, 1024, k=4096)
    yield linear(q4_k, 4096, k=4096, add=True)
    yield linear(q4_k, 4096, k=12288, add=True)
    yield linear(q6_k, 4096, k=12288, add=True)
    yield linear(q6_k, 151936, k=4096)


def shapes_smollm2() -> Iterator[Product]:
    """Yields the products of SmolLM2-135M: feed-forward, attention, tied output."""
    q4_1 = quants.by_name("q4_1")
    yield linear(q4_1, 1536, k=576)
    yield linear(q4_1, 576, k=576)
    yield linear(q4_1, 576, k=1536)
    yield linear(quants.by_name("q8_0"), 49152, k=576)
