"""Times products of 1 to 32 rows: mul_few of every class, beside mul_mv and mul_mm, on weights that no cache holds.

    python bench/few.py --device cuda --types q8_0,q4_k --shapes 248320x2048,2048x4096

A line for each kernel: microseconds, GB/s of weights, and the time as a multiple of mul_mv's for one row. The products
of a recording follow each other behind barriers, each on another copy of the weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from zincmetal.device import backend
from zincmetal.device.buffers import step_record
from zincmetal.device.core import BoundDispatch
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType
from zincmetal.gguf.random_weights import random_weights

SHAPES = "248320x2048,8192x2048,4096x2048,2048x4096,512x2048,2048x512"
ROWS = (1, 2, 4, 8, 16, 32)
VECTORS = 4  # the largest class that takes rows as vectors
DISPATCHES, REPEATS = 48, 5


@dataclass(frozen=True)
class Candidate:
    """Kernel with its launch, for products of up to ``rows`` rows."""

    kernel: str
    rows: int
    gated: bool
    per_group: int  # rows of the result of a threadgroup
    threads: int
    k_split: int = 1


class Bench:
    """Open device, and the weights and activations of one product."""

    def __init__(self, device: str | None, qtype: QuantType, m: int, k: int, gated: bool) -> None:
        self.core, self.device = backend.open_device(device)
        self.names = set(self.device.kernel_names())
        self.shapes = self.core.shapes()
        self.qtype, self.m, self.k, self.gated = qtype, m, k, gated
        rng = np.random.default_rng(3)
        packed = random_weights(qtype, (m, k), rng)
        self.row_bytes, self.nbytes = packed.shape[1], packed.nbytes * (1 + gated)
        cold = max(256 << 20, 4 * int(self.device.info["features"].get("L2 cache", 0)))
        self.weights = [self._buffer(packed) for _ in range((1 + gated) * max(2, -(-cold // self.nbytes)))]
        self.x = self._buffer(rng.standard_normal((ROWS[-1], k), np.float32))
        self.out = self._buffer(np.zeros((ROWS[-1], m), np.float32))

    def _buffer(self, content: Any) -> Any:
        buffer = self.device.alloc(content.nbytes)
        buffer.write(np.ascontiguousarray(content).reshape(-1).view(np.uint8))
        return buffer

    def candidates(self) -> Iterator[Candidate]:
        """Yields the kernels of this build that can multiply the matrix."""
        name, s, half = self.qtype.name, self.shapes, 2 if self.gated else 1
        gate = "_swiglu" * self.gated
        yield Candidate(f"mul_mv{gate}_{name}", 1, self.gated, s["MUL_MV_ROWS"] * 2 // half, 64)
        family = f"mul_few{'_gated' * self.gated}_{name}"
        for n in ROWS[1:]:
            for rows in (None, 1, 2, 4, 8, 16, 32, 64):
                kernel = f"{family}_n{n}" + (f"_r{rows}" if rows else "")
                if kernel not in self.names:
                    continue
                if n <= VECTORS:
                    per, splits = (rows or s["MUL_MV_ROWS"]) * 2 // half, [1]
                    yield from (Candidate(kernel, n, self.gated, per * sg // 2, 32 * sg) for sg in (2, 4, 8))
                    continue
                most = s["FEW_SIMDGROUPS"] * s["FEW_ROWS"] // (rows or s["FEW_ROWS"])
                splits = [split for split in (1, 2, 4, 8) if most % split == 0]
                per = (rows or s["FEW_ROWS"]) // half
                yield from (Candidate(kernel, n, self.gated, per * most // i, 32 * most, i) for i in splits)
            tokens = s["MUL_MM_TOKENS"]
            if n <= tokens:
                yield Candidate(f"mul_mm{gate}_{name}", n, self.gated, s["MUL_MM_ROWS"] // half, s["MUL_MM_THREADS"])

    def dispatches(self, c: Candidate, n_tokens: int) -> list[BoundDispatch]:
        """Makes the dispatches of a recording: one for each copy of the weights, or more."""
        few, mv = "mul_few" in c.kernel, "mul_mv" in c.kernel
        params = np.zeros(1, self.core.params_dtype("MulFewParams" if few else "MatMulParams"))
        params["k"], params["m"], params["row_bytes"] = self.k, self.m, self.row_bytes
        if few:
            params["k_split"], params["rows"] = c.k_split, n_tokens
        self.step = self._buffer(step_record(self.core, n_tokens))
        n, groups = 1 + self.gated, -(-self.m // c.per_group)
        grid = (1, groups, 1) if "mul_mm" in c.kernel else (groups, 1, 1)
        copies = len(self.weights) // n
        made = []
        for i in range(-(-DISPATCHES // copies) * copies):
            w = self.weights[i % copies * n : i % copies * n + n]
            unused = [self.x] * (1 if mv else 2 if few and not self.gated else 0)
            buffers = [*([] if mv else [self.step]), *w, self.x, *unused, self.out]
            bindings = [(b, 0, b.nbytes) for b in buffers]
            made.append(BoundDispatch(c.kernel, params.tobytes(), bindings, grid, c.threads, True))
        return made

    def seconds(self, c: Candidate, n_tokens: int) -> float:
        """Returns the device's seconds of one product."""
        dispatches = self.dispatches(c, n_tokens)
        self.device.run(dispatches)
        return median(self.device.run(dispatches) for _ in range(REPEATS)) / len(dispatches)


def main() -> None:
    """Prints a table for each type and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda or metal; default: the best that there is")
    parser.add_argument("--types", default="q8_0,q4_k,q6_k")
    parser.add_argument("--shapes", default=SHAPES, help="rows x columns of weights")
    parser.add_argument("--gated", action="store_true", help="two matrices with a gate")
    args = parser.parse_args()
    for name in args.types.split(","):
        for shape in args.shapes.split(","):
            m, k = map(int, shape.split("x"))
            qtype = quants.by_name(name)
            if k % max(qtype.block_size, 32):
                continue
            bench, one = Bench(args.device, qtype, m, k, args.gated), 0.0
            print(f"{name} {shape}{' gated' * args.gated}, {bench.nbytes / 1e6:.2f} MB")
            for c in bench.candidates():
                us = bench.seconds(c, c.rows) * 1e6
                one = one or us
                split = f"split {c.k_split}" if c.k_split > 1 else ""
                rate = bench.nbytes / us / 1e3
                print(
                    f"  {c.rows:2} {c.kernel:28} {c.threads:4} {split:8} {us:9.2f} us {rate:8.1f} GB/s {us / one:6.2f}x"
                )


if __name__ == "__main__":
    main()
