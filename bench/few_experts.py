"""Measures a layer of experts of Qwen3.6-35B-A3B on steps of 1 to 32 rows: 8 of 256 experts, random routes.

    python bench/few_experts.py [--device cuda] [--rows 1,2,4,8,16,32] [--down q5_k] [--swiglu q4_k] [--check]

Each line has the median microseconds of routing, of gate and up, of down, of the mix, and of all four one after the
other; then GB/s of the weights of the chosen experts. A recording has many turns. Each turn has another route, and so
reads other experts: few of their bytes are in a cache. One row is routed and multiplied as decode does.
``--check`` compares some outputs with float64 NumPy.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zincmetal.device import backend
from zincmetal.device.buffers import step_record
from zincmetal.device.core import BoundDispatch
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType
from zincmetal.gguf.random_weights import random_weights
from zincmetal.plan.lower.experts import few_grid, mix_group
from zincmetal.plan.lower.products import tile_simdgroups

N_EXPERT, N_USED, N_EMBD, WIDTH = 256, 8, 2048, 512
TURNS, REPEATS = 24, 7
DIFFERENT = 8  # experts whose weights differ; all lie at other addresses


@dataclass
class Tensor:
    """Weights [N_EXPERT, m, k] of a type on a device."""

    device: Any
    type: QuantType
    m: int
    k: int
    seed: int
    buffer: Any = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.some = random_weights(self.type, (DIFFERENT * self.m, self.k), rng)
        self.buffer = self.device.alloc(N_EXPERT * self.expert_bytes)
        for i in range(0, N_EXPERT, DIFFERENT):
            self.buffer.write(self.some, i * self.expert_bytes)

    @property
    def row_bytes(self) -> int:
        return self.type.row_bytes(self.k)

    @property
    def expert_bytes(self) -> int:
        return self.m * self.row_bytes

    def params(self) -> dict[str, int]:
        nbytes = {"row_bytes": self.row_bytes, "expert_bytes": self.expert_bytes}
        return {"k": self.k, "m": self.m, **nbytes, "n_expert": N_EXPERT}

    def values(self, expert: int) -> NDArray[np.float64]:
        first = expert % DIFFERENT * self.m
        packed = self.some[first : first + self.m]
        return quants.dequantize(self.type, packed, (self.m, self.k)).astype(np.float64)


class Bench:
    """Open device with the weights of a layer."""

    def __init__(self, lane: str, swiglu: QuantType, down: QuantType) -> None:
        self.core = backend.load(lane)
        self.device = self.core.Device(kernel_folder=backend.kernel_folder(self.core))
        self.shapes, self.rng = self.core.shapes(), np.random.default_rng(5)
        self.gate, self.up = (Tensor(self.device, swiglu, WIDTH, N_EMBD, seed) for seed in (1, 2))
        self.down = Tensor(self.device, down, N_EMBD, WIDTH, 3)

    def put(self, content: NDArray[Any]) -> Any:
        buffer = self.device.alloc(content.nbytes)
        buffer.write(np.ascontiguousarray(content))
        return buffer

    def zeros(self, *shape: int) -> Any:
        return self.put(np.zeros(shape, np.float32))

    def dispatch(
        self, kernel: str, struct: str, params: dict[str, Any], buffers: list[Any], grid: tuple[int, ...], threads: int
    ) -> BoundDispatch:
        fields = np.zeros(1, self.core.params_dtype(struct))
        for name, value in params.items():
            if isinstance(value, dict):
                for inner, number in value.items():
                    fields[name][inner] = number
            else:
                fields[name] = value
        x, y, z = (*grid, 1, 1)[:3]
        bindings = [(b, 0, b.nbytes) for b in buffers]
        return BoundDispatch(kernel, fields.tobytes(), bindings, (x, y, z), threads, True)

    def seconds(self, dispatches: list[BoundDispatch]) -> float:
        self.device.run(dispatches)
        return median(self.device.run(dispatches) for _ in range(REPEATS)) / TURNS


class Turn:
    """Layer on one random route."""

    def __init__(self, bench: Bench, rows: int) -> None:
        self.bench, self.rows, slots = bench, rows, rows * N_USED
        self.logits = bench.rng.standard_normal((rows, N_EXPERT)).astype(np.float32)
        self.x = (bench.rng.standard_normal((rows, N_EMBD)) * N_EMBD**-0.5).astype(np.float32)
        self.step, self.router = bench.put(step_record(bench.core, rows)), bench.put(self.logits)
        self.sorted = [bench.zeros(slots), bench.zeros(slots * 4), bench.zeros(1)]
        self.given, self.hidden = bench.put(self.x), bench.zeros(slots * WIDTH)
        self.each, self.out = bench.zeros(slots * N_EMBD), bench.zeros(rows * N_EMBD)
        self.chosen = np.argsort(-self.logits, axis=1, kind="stable")[:, :N_USED]
        shares = np.exp(np.take_along_axis(self.logits, self.chosen, axis=1))
        shares = np.hstack([shares / shares.sum(axis=1, keepdims=True), np.zeros((rows, 1))])
        # As the choice writes them: no kernel does where another one than the first product chooses.
        self.ids, self.weights = bench.put(self.chosen.astype(np.int32)), bench.put(shares.astype(np.float32))

    def launches(self) -> dict[str, BoundDispatch]:
        return self._one_row() if self.rows == 1 else self._few_rows()

    def _routing(self) -> tuple[dict[str, Any], list[Any]]:
        params = {"n_expert": N_EXPERT, "n_used": N_USED, "n_group": 1, "scale": 1.0}  # the others: 0
        return params, [self.step, *[self.router] * 4, self.ids, self.weights]

    def _one_row(self) -> dict[str, BoundDispatch]:
        b, (choice, _) = self.bench, self._routing()
        swiglu, mix = f"moe_mv_gated_{b.up.type.name}", f"moe_mv_mix_{b.down.type.name}"
        if b.shapes["FOLDED_CHOICE"]:
            simdgroups = b.shapes["MOE_CHOOSE_THREADS"] // 32
        else:  # another kernel chooses, and its choice stands in ids
            choice, simdgroups = {}, tile_simdgroups(b.shapes, swiglu) or b.shapes["MUL_MV_SIMDGROUPS"]
        tiled = simdgroups == tile_simdgroups(b.shapes, swiglu)
        per_group = (b.shapes["TILE_ROWS"] if tiled else simdgroups * b.shapes["MUL_MV_ROWS"]) // 2
        router = [*[self.router] * 4, self.weights]
        gated = [self.ids, b.gate.buffer, b.up.buffer, *[self.given] * 4, self.hidden, *router]
        mixed = [self.ids, self.weights, b.down.buffer, self.hidden, *[self.given] * 2, self.out]
        up, down = ({**t.params(), "n_used": N_USED} for t in (b.up, b.down))
        (rows, threads), both = mix_group(b.shapes, mix), {"experts": up, "choice": choice}
        return {
            "gate+up": b.dispatch(
                swiglu, "MoeMvParams", both, gated, (-(-WIDTH // per_group), N_USED), 32 * simdgroups
            ),
            "down": b.dispatch(mix, "MoeParams", down, mixed, (N_EMBD // rows,), threads),
        }

    def _few_rows(self) -> dict[str, BoundDispatch]:
        b, (params, args) = self.bench, self._routing()
        gated = [*self.sorted, b.gate.buffer, b.up.buffer, *[self.given] * 3, self.hidden]
        products = [*self.sorted, b.down.buffer, *[self.hidden] * 2, self.each]
        up, down = {**b.up.params(), "x_div": N_USED}, {**b.down.params(), "x_div": 1}
        mixed = [self.step, self.weights, self.each, self.given, self.out]
        columns = -(-N_EMBD // b.shapes["ELEMENTWISE_THREADS"])
        few, threads = b.shapes["MOE_FEW_THREADS"], b.shapes["ELEMENTWISE_THREADS"]
        swiglu, plain = f"moe_few_gated_{b.up.type.name}", f"moe_few_{b.down.type.name}"
        route_threads, sizes = b.shapes["MOE_ROUTE_THREADS"], {"n": N_EMBD, "n_used": N_USED}
        return {
            "route": b.dispatch("moe_route", "TopKParams", params, [*args, *self.sorted], (1,), route_threads),
            "gate+up": b.dispatch(swiglu, "MoeMmParams", up, gated, self._grid(b.up, 2), few),
            "down": b.dispatch(plain, "MoeMmParams", down, products, self._grid(b.down, 1), few),
            "mix": b.dispatch("moe_mix_few", "MoeMixParams", sizes, mixed, (columns, self.rows), threads),
        }

    def _grid(self, weights: Tensor, matrices: int) -> tuple[int, int, int]:
        experts = min(self.rows * N_USED, N_EXPERT)
        return few_grid(self.bench.shapes, weights.type.name, experts, weights.m, weights.k, matrices)

    def error(self) -> float:
        """Compares the output of the last row with float64 NumPy: the error relative to the norm."""
        b, row = self.bench, self.rows - 1
        got = self.out.read().view(np.float32).reshape(self.rows, N_EMBD)[row].astype(np.float64)
        want, x = self.x[row].astype(np.float64), self.x[row].astype(np.float64)
        logits = self.logits[row, self.chosen[row]].astype(np.float64)
        share = np.exp(logits - logits.max())
        for weight, expert in zip(share / share.sum(), self.chosen[row], strict=True):
            gate, up = b.gate.values(expert) @ x, b.up.values(expert) @ x
            want += weight * (b.down.values(expert) @ (gate / (1 + np.exp(-gate)) * up))
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(bench: Bench, rows: int, check: bool) -> dict[str, Any]:
    """Measures a layer on steps of ``rows`` rows."""
    turns = [Turn(bench, rows) for _ in range(TURNS)]
    launches = [turn.launches() for turn in turns]
    whole = [d for each in launches for d in each.values()]
    bench.device.run(whole)  # the products need the routes
    result: dict[str, Any] = {"rows": rows}
    for name in launches[0]:
        result[name] = bench.seconds([each[name] for each in launches])
    result["all"] = bench.seconds(whole)
    distinct = sum(len(np.unique(turn.chosen)) for turn in turns) / TURNS
    result["experts"] = round(distinct, 1)
    gated, down = bench.gate.expert_bytes + bench.up.expert_bytes, bench.down.expert_bytes
    result["GB/s gate+up"] = round(distinct * gated / result["gate+up"] / 1e9)
    result["GB/s down"] = round(distinct * down / result["down"] / 1e9)
    result["GB/s all"] = round(distinct * (gated + down) / result["all"] / 1e9)
    for name, value in result.items():
        if isinstance(value, float) and name != "experts":
            result[name] = f"{value * 1e6:.1f} us"
    if check:
        result["error"] = f"{max(turn.error() for turn in turns[:3]):.1e}"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, metal or cpu")
    parser.add_argument("--rows", default="1,2,4,8,16,32")
    parser.add_argument("--swiglu", default="q4_k", help="the quant type of gate and up")
    parser.add_argument("--down", default="q4_k", help="the quant type of down")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    bench = Bench(options.device, quants.by_name(options.swiglu), quants.by_name(options.down))
    for rows in map(int, options.rows.split(",")):
        found = measure(bench, rows, options.check)
        print("  ".join(f"{name} {value}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
