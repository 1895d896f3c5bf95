"""Products of heads with matrices of their own, and the expected output in float64 NumPy."""

from __future__ import annotations

import numpy as np

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, tiles
from support.kernels.products import TOLERANCE, Weights, block_of, of_vectors, tile, tolerance
from support.kernels.rows import padded
from zincmetal.gguf.quants import QuantType


class Heads:
    """One product: a plan of ``rows`` rows, of which ``tokens`` are real; matrices of ``m`` rows and three blocks."""

    def __init__(self, lab: Lab, qtype: QuantType, n_head: int, m: int, tokens: int, rows: int) -> None:
        self.lab, self.qtype, self.tokens, self.rows = lab, qtype, tokens, rows
        k = block_of(qtype)[0] * 3
        self.weights = Weights(lab, qtype, n_head * m, k)
        x = padded(lab, rows, tokens, n_head, k, scale=k**-0.5)
        x64, values = x[:tokens].astype(np.float64), self.weights.values.reshape(n_head, m, k)
        self.x = lab.input(x)
        self.want = np.einsum("hmk,thk->thm", values, x64)
        self.scale = np.sqrt(np.einsum("hmk,thk->thm", values**2, x64**2))
        row_bytes = self.weights.row_bytes
        self.params = {"k": k, "m": m, "row_bytes": row_bytes, "head_bytes": m * row_bytes, "n_head": n_head}

    def run(self, kernel: str) -> Guarded:
        """Runs mul_heads_mv, mul_heads_mm or mul_heads_mm_coop; returns the output."""
        self.tolerance = tolerance(self.lab.lane, self.qtype) if "_mm" in kernel else TOLERANCE
        shapes, n_head, m = self.lab.core.shapes(), self.params["n_head"], self.params["m"]
        per_group, simdgroups = of_vectors(shapes, kernel, shapes["MUL_MV_ROWS"])
        threads = 32 * simdgroups
        grid = (tiles(m, per_group), n_head, self.rows)
        if "_mm" in kernel:
            of_weights, tokens, threads = tile(shapes, kernel)
            grid = (tiles(self.rows, tokens), tiles(m, of_weights), n_head)
        out = self.lab.output(self.rows, n_head, m)
        bindings = [self.lab.step(self.tokens), self.weights.buffer, self.x, out]
        self.lab.run(f"{kernel}_{self.qtype.name}", self.params, "HeadsParams", bindings, grid, threads)
        return out

    def check(self, out: Guarded) -> None:
        assert_close(out.array[: self.tokens], self.want, self.tolerance, self.scale)
        assert_untouched(out.array[self.tokens :])
