"""Stacks of products of one row or a few: launches, and the expected outputs in float64 NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_close, tiles
from support.kernels.input_norm import InputNorm
from support.kernels.products import TOLERANCE, Weights, gated, of_vectors
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType
from zincmetal.plan.lower.products import tile_simdgroups

F64 = NDArray[np.float64]


def product(w: Weights, x: F64) -> tuple[F64, F64]:
    """Computes W x for each row of x, and the root of the sum of the squares of each sum's terms."""
    return x @ w.values.T, np.sqrt(x**2 @ w.values.T**2)


class Stack:
    """A stack on random activations, and its expected outputs.

    ``biased``: every matrix has a bias. ``normed``: they meet the norm of x. ``few``: the class of mul_few_stack; 0:
    mul_mv_stack. ``tokens`` rows of x.
    """

    def __init__(
        self,
        lab: Lab,
        qtype: QuantType,
        k: int,
        m: tuple[int, ...],
        is_f32: tuple[int, ...],
        pair: bool,
        *,
        biased: bool = False,
        normed: bool = False,
        few: int = 0,
        tokens: int = 1,
    ) -> None:
        self.lab, self.few, self.tokens = lab, few, tokens
        self.kernel = f"mul_few_stack_{qtype.name}_n{few}" if few else f"mul_mv_stack_{qtype.name}"
        self.x = lab.normal(tokens, k, scale=k**-0.5)
        self.norm = InputNorm(lab, self.x, normed)
        types = [quants.F32 if f else qtype for f in is_f32]
        weights = [Weights(lab, t, n, k, t.row_bytes(k)) if n else None for t, n in zip(types, m, strict=True)]
        self.params = {
            "k": k,
            "pair": int(pair),
            "m": m,
            "row_bytes": [w.row_bytes if w else 0 for w in weights],
            "is_f32": is_f32,
            "has_bias": int(biased),
            **self.norm.params,
        }
        something = next(w for w in weights if w)
        self.weights = [(w or something).buffer for w in weights]
        self.want = [product(w, self.norm.values) if w else None for w in weights]
        self.biases = [lab.normal(n) for n in m if biased]
        if biased:
            self.want = [w and (w[0] + b, np.hypot(w[1], b)) for w, b in zip(self.want, self.biases, strict=True)]
        shapes = lab.core.shapes()
        of_group, each = of_vectors(shapes, self.kernel, shapes["FEW_STACK_ROWS"] if few else shapes["MUL_MV_ROWS"])
        rows = of_group // each
        simdgroups = [tiles(n, rows) for n in m]
        if pair:
            gate, up = self.want[2:]
            assert gate
            assert up
            self.want[2:] = [gated("_swiglu", *zip(gate, up, strict=True)), None]
            simdgroups[2:] = [tiles(m[2], rows // 2)]
        apart = not few or bool(tile_simdgroups(shapes, self.kernel))  # a threadgroup has rows of one matrix
        groups = sum(tiles(n, each) for n in simdgroups) if apart else tiles(sum(simdgroups), each)
        self.grid = (groups, tiles(tokens, few or 1))
        self.threads = 32 * each

    def run(self) -> list[Guarded]:
        """Runs the kernel; returns the outputs. A slot without a matrix is bound to another's output."""
        outs = [self.lab.output(*w[0].shape) if w else None for w in self.want]
        something = next(o for o in outs if o)
        x = self.lab.input(self.x)
        biases = [self.lab.input(b) if b.size else x for b in self.biases] or [x] * len(outs)
        first = [self.lab.step(self.tokens), x] if self.few else [x, self.norm.buffer]
        bindings = [*first, *self.weights, *biases, *(o or something for o in outs)]
        self.lab.run(self.kernel, self.params, "StackParams", bindings, self.grid, self.threads)
        return [o for o in outs if o]

    def check(self) -> None:
        """Runs the kernel and compares each output."""
        for out, want in zip(self.run(), [w for w in self.want if w], strict=True):
            assert_close(out.array, want[0], TOLERANCE, want[1])
