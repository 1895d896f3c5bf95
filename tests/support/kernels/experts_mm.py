"""Prefill of mixtures of experts: launches, and the expected outputs in float64 NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, tiles
from support.kernels.experts import Biases, finished, kernel, matrices
from support.kernels.products import WEIGHT_ALIGN, block_of, silu, tile, tolerance
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType
from zincmetal.gguf.random_weights import random_weights

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


@dataclass(frozen=True)
class Route:
    """The experts of a step: ids [rows, n_used], of which the first n_tokens rows are tokens."""

    ids: I32
    n_tokens: int
    n_expert: int

    @property
    def n_used(self) -> int:
        return int(self.ids.shape[1])

    @property
    def experts(self) -> NDArray[np.int64]:
        """Returns the expert of every token's slots. An id outside [0, n_expert) means the last expert."""
        ids = self.ids[: self.n_tokens].reshape(-1).astype(np.int64)
        return np.where((ids < 0) | (ids >= self.n_expert), self.n_expert - 1, ids)

    def max_tiles(self, tile: int) -> int:
        return min(self.ids.size, tiles(self.ids.size, tile) + self.n_expert)

    def sorted(self, tile: int) -> tuple[I32, I32]:
        """Returns the slots sorted by expert, and tiles [n, 4] of at most ``tile`` slots of one expert."""
        experts = self.experts
        slots = np.argsort(experts, kind="stable")
        cut: list[tuple[int, int, int, int]] = []
        for expert, n in zip(*np.unique(experts, return_counts=True), strict=True):
            first = int(np.searchsorted(experts[slots], expert))
            cut += [(expert, first + i, first + min(i + tile, n), 0) for i in range(0, n, tile)]
        return slots.astype(np.int32), np.array(cut, np.int32).reshape(-1, 4)


def random_route(lab: Lab, rows: int, n_tokens: int, n_expert: int, n_used: int) -> Route:
    """Makes distinct experts for every row, and ids out of range in rows past the step's tokens."""
    ids = np.argsort(lab.rng.random((rows, n_expert)), axis=1)[:, :n_used].astype(np.int32)
    ids[n_tokens:] = 2**30
    return Route(ids, n_tokens, n_expert)


class Experts:
    """Random matrices [n_expert, m, k] of a type on a device, with gaps between experts, and the decoded values."""

    def __init__(self, lab: Lab, qtype: QuantType, n_expert: int, m: int, k: int) -> None:
        packed = random_weights(qtype, (n_expert * m, k), lab.rng)
        values = quants.dequantize(qtype, packed, (n_expert * m, k))
        self.values: F64 = values.astype(np.float64).reshape(n_expert, m, k)
        self.row_bytes = packed.shape[1]
        gap = block_of(qtype)[1]
        self.expert_bytes = m * self.row_bytes + gap
        raw = np.full((n_expert, self.expert_bytes), 0xFF, np.uint8)
        raw[:, : self.expert_bytes - gap] = packed.reshape(n_expert, -1)
        self.buffer = lab.input(raw.reshape(-1)[: raw.size - gap], align=WEIGHT_ALIGN)

    def params(self, x_div: int) -> dict[str, int]:
        """MoeMmParams, without biases. Slot s reads row s / ``x_div`` of X."""
        n_expert, m, k = self.values.shape
        sizes = {"row_bytes": self.row_bytes, "expert_bytes": self.expert_bytes}
        return {"k": k, "m": m, **sizes, "n_expert": n_expert, "x_div": x_div, "kind": 0, "has_bias": 0}


def layer_of_experts(x: F32, ids: I32, weights: F32, gate: Experts, up: Experts, down: Experts) -> F64:
    """x plus the weighted sum of each row's experts, in float64. ``ids``: [tokens, n_used]."""
    want = x.astype(np.float64)
    for t, chosen in enumerate(ids):
        for j, e in enumerate(chosen):
            x64 = x[t].astype(np.float64)
            h = silu(gate.values[e] @ x64) * (up.values[e] @ x64)
            want[t] += weights[t, j].astype(np.float64) * (down.values[e] @ h)
    return want


class MoeMm:
    """Products of the rows of X with the matrices of their experts.

    ``shared_x``: X has one row for each row of the step, not for each slot.
    """

    def __init__(
        self,
        lab: Lab,
        qtype: QuantType,
        form: str,
        route: Route,
        m: int,
        k: int,
        *,
        shared_x: bool,
        bias: bool = False,
        family: str = "moe_mm",
    ) -> None:
        self.name, self.route, self.m = kernel(family, form) + qtype.name, route, m
        self.tolerance = tolerance(lab.lane, qtype)
        self.matrices = matrices(form)
        experts = [Experts(lab, qtype, route.n_expert, m, k) for _ in range(self.matrices)]
        x_div = route.n_used if shared_x else 1
        n_slots = len(route.experts)
        x = np.full((route.ids.size // x_div, k), np.nan, np.float32)  # rows past the step's tokens must not be read
        x[: n_slots // x_div] = lab.normal(n_slots // x_div, k, scale=k**-0.5)
        x64 = x[np.arange(n_slots) // x_div].astype(np.float64)
        products = [np.einsum("smk,sk->sm", e.values[route.experts], x64) for e in experts]
        scales = [np.sqrt(np.einsum("smk,sk->sm", e.values[route.experts] ** 2, x64**2)) for e in experts]
        self.want: F64
        self.scale: F64
        self.x = x
        self.inputs = [*(e.buffer for e in experts), lab.input(x)]
        self.biases = Biases(lab, form, route.n_expert, m, bias, self.inputs[-1])
        chosen = [b[route.experts] for b in self.biases.values]
        biased = [p + b for p, b in zip(products, chosen, strict=True)]
        self.want, self.scale = finished(form, biased, [s + np.abs(b) for s, b in zip(scales, chosen, strict=True)])
        self.params = {**experts[0].params(x_div), **self.biases.params(form)}

    @property
    def operands(self) -> list[Guarded]:
        """The bindings between the sorted slots and the output."""
        return [*self.inputs, *(self.biases.buffers if self.biases.given else self.inputs[-1:] * self.matrices)]

    def run(self, lab: Lab) -> Guarded:
        """Runs the kernel on slots and tiles as moe_sort writes them; returns the output [slots, m]."""
        shapes, route = lab.core.shapes(), self.route
        slots, cut = route.sorted(shapes["MOE_MM_TOKENS"])
        list_of_slots = np.full(route.ids.size, -1, np.int32)
        list_of_slots[: len(slots)] = slots
        list_of_tiles = np.full((route.max_tiles(shapes["MOE_MM_TOKENS"]), 4), -1, np.int32)
        list_of_tiles[: len(cut)] = cut
        sort = [
            lab.input(list_of_slots, align=4),
            lab.input(list_of_tiles),
            lab.input(np.array([len(cut)], np.int32), align=4),
        ]
        out = lab.output(route.ids.size, self.m)
        of_weights, _, threads = tile(shapes, self.name)
        grid = (len(list_of_tiles), tiles(self.m, of_weights // self.matrices))
        lab.run(self.name, self.params, "MoeMmParams", [*sort, *self.operands, out], grid, threads)
        return out

    def check(self, lab: Lab) -> None:
        out = self.run(lab)
        assert_close(out.array[: len(self.want)], self.want, self.tolerance, self.scale)
        assert_untouched(out.array[len(self.want) :])


def run_moe_mix(
    lab: Lab,
    rows: int,
    n_tokens: int,
    n: int,
    n_used: int,
    *,
    alias: bool = False,
    few: bool = False,
    alone: bool = False,
) -> Guarded:
    """Runs moe_mix and checks it; returns its output. ``alone``: there is no residual, and its place is not read."""
    y, residual, weights = (np.full((rows, *s), np.nan, np.float32) for s in ((n_used, n), (n,), (n_used + 1,)))
    y[:n_tokens], residual[:n_tokens] = lab.normal(n_tokens, n_used, n), lab.normal(n_tokens, n)
    # The last weight of a row is the shared expert's, which the kernel must not read.
    weights[:n_tokens, :n_used] = lab.normal(n_tokens, n_used)
    shapes, out = lab.core.shapes(), lab.in_out(residual) if alias else lab.output(rows, n)
    given = lab.input(np.full(1, np.nan, np.float32) if alone else residual)
    bindings = [lab.step(n_tokens), lab.input(weights), lab.input(y), out if alias else given, out]
    grid = (tiles(n, shapes["ELEMENTWISE_THREADS" if few else "ELEMENTWISE_COLUMNS"]), rows)
    lab.run(
        "moe_mix_few" if few else "moe_mix",
        {"n": n, "n_used": n_used, "alone": int(alone)},
        "MoeMixParams",
        bindings,
        grid,
        shapes["ELEMENTWISE_THREADS"],
    )
    w64, y64 = weights[:n_tokens, :n_used].astype(np.float64), y[:n_tokens].astype(np.float64)
    residual[:n_tokens] *= not alone
    want = residual[:n_tokens] + np.einsum("tj,tjn->tn", w64, y64)
    scale = np.sqrt(residual[:n_tokens].astype(np.float64) ** 2 + np.einsum("tj,tjn->tn", w64**2, y64**2))
    assert_close(out.array[:n_tokens], want, 3e-7, scale)
    if not alias:
        assert_untouched(out.array[n_tokens:])
    return out
