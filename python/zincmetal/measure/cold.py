"""Runs products on weights that no cache holds.

A recording launches a product many times, each behind a barrier. Each launch reads another copy of the weights, or
other experts of one tensor. So every byte comes from memory. The launches are a plan's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..device.buffers import bound, step_record
from ..device.core import BoundDispatch, Core
from ..errors import UsageError
from ..gguf.random_weights import random_weights
from ..graph.ops import STEP, Operand, State
from ..plan.addresses import Region
from ..plan.chunks import ONE_ROW
from ..plan.lower import Lowering
from ..plan.plan import ARENA, Plan, record
from ..plan.target import Target
from ..plan.tuning import SPLITS, Split
from .products import N_USED, OUT, Product

if TYPE_CHECKING:
    from .. import _core

MIN_DISPATCHES = 64  # dispatches of a recording: they share the cost of its start
ROUNDING = 1e-5  # relative error of outputs that are added in another order


class Lab:
    """Open device that runs products."""

    def __init__(self, core: Core, device: _core.Device) -> None:
        self.core, self.device = core, device
        info = self.device.info
        self.name, self.backend = info["name"], info["backend"]
        l2 = int(info["features"].get("L2 cache", 0))
        self.cold_bytes = 4 * l2 or 256 << 20
        self.kernels = set(self.device.kernel_names())

    def refuse_unbuilt(self, kernel: str, split: Split) -> None:
        """Raise UsageError if the split has no instance of the kernel, or the instance takes too few threads."""
        usual = self.core.shapes()["MOE_MIX_ROWS" if "_mix" in kernel else "MUL_MV_ROWS"]
        name = kernel if split.rows in (None, usual) else f"{kernel}_r{split.rows}"
        if name not in self.kernels:
            raise UsageError(f"this build has no {name}: build with ZINCMETAL_SWEEP=ON")
        most = self.device.limits(name)[0]
        if (split.threads or 0) > most:
            raise UsageError(f"{name} takes {most} threads at most, not {split.threads}")

    def row_variants(self, kernel: str) -> list[int]:
        """List the numbers of rows of this build's instances, without the usual one."""
        return [rows for rows in range(1, 33) if f"{kernel}_r{rows}" in self.kernels]

    def may_round_otherwise(self, kernel: str) -> bool:
        """Return True if instances of a kernel may add in another order: mixes with other threads, native kernels."""
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
        """Record the product ``n`` times, by default whole rounds of MIN_DISPATCHES or more.

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
        """Make the dispatches of a plan ready, with their activations."""
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
        """Return the activation of a name, one for all plans: ``n`` floats, or the ids of a turn."""
        if name not in self._values:
            if name.startswith("ids."):
                order = np.random.default_rng(11).permutation(self.product.weights[0].shape[0])
                turn = int(name.removeprefix("ids."))
                self._values[name] = order[turn * N_USED :][:N_USED].astype(np.int32)
            else:
                self._values[name] = self._rng.standard_normal(n, np.float32)
        return self._values[name]

    def has(self, name: str) -> bool:
        """Return True if a plan has asked for this activation."""
        return name in self._values

    def outputs(self, split: Split | None = None) -> NDArray[np.float32]:
        """Run the product once; returns all outputs, one after the other."""
        self._out.write(np.full(self._out.nbytes, 0xFF, np.uint8))
        self.lab.device.run(self.ready(self.plan(split, n=1)))
        return self._out.read().view(np.float32)

    @cached_property
    def usual_outputs(self) -> NDArray[np.float32]:
        """Outputs of the product as this device launches it."""
        return self.outputs()

    def recording(self, split: Split | None = None) -> Recording:
        """Make the product ready to run many times."""
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
        """Return the bytes of weights that one product reads."""
        return sum(self.plan.weight_bytes().values()) // self.n

    def run(self) -> float:
        """Run the dispatches; returns the device's seconds."""
        seconds: float = self.of.lab.device.run(self.dispatches)
        return seconds


def agreement(want: NDArray[np.float32], got: NDArray[np.float32], may_round: bool) -> tuple[str, bool]:
    """Compare outputs: "identical", or their relative error, which is allowed up to ROUNDING with ``may_round``."""
    if not (np.isfinite(want).all() and np.isfinite(got).all()):
        return "not finite", False
    if np.array_equal(want.view(np.uint32), got.view(np.uint32)):
        return "identical", True
    error = float(np.linalg.norm(got.astype(np.float64) - want) / (np.linalg.norm(want.astype(np.float64)) or 1.0))
    return f"{error:.0e}", may_round and error < ROUNDING
