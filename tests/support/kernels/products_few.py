"""Products of a matrix and 2 to 32 rows (mul_few), with epilogues."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from support.kernel_lab import Lab, assert_close, assert_untouched, tiles
from support.kernels.products import GATES, SCALE_STRIDE, TOLERANCE, MatMul, of_vectors
from zincmetal.gguf.quants import QuantType

CLASSES = (2, 4, 8, 16, 32)
VECTORS = 4  # the largest class that takes rows as vectors
#: The number of an epilogue in kernels/params.h.
KINDS = {"": 0, "_add": 1, "_mix": 2, "_swiglu": 0, "_geglu": 1}


class Few(MatMul):
    """One product of ``tokens`` rows by the kernel of class ``n``. X and Y have ``rows`` rows, by default ``n``.

    ``small``: by the kernel for small matrices.
    """

    def __init__(
        self,
        lab: Lab,
        qtype: QuantType,
        epilogue: str,
        m: int,
        k: int,
        tokens: int,
        n: int,
        gap: int = 0,
        *,
        rows: int | None = None,
        bias: bool = False,
        small: bool = False,
    ) -> None:
        self.rows, self.small = rows or n, small
        super().__init__(lab, qtype, epilogue, m, k, tokens, self.rows, gap, bias=bias)
        self.kernel = f"mul_few{'_gated' * (epilogue in GATES)}_{qtype.name}_n{n}"
        if small:
            self.kernel += f"_r{lab.core.shapes()['FEW_SMALL_ROWS']}"
        self.epilogue, self.m, self.n, self.tokens = epilogue, m, n, tokens
        for name in ("scale_stride", "has_bias", "normed", "eps"):
            del self.params[name]

    def outputs(
        self, lab: Lab, *, k_split: int = 1, alias: bool = False, step_tokens: int | None = None
    ) -> NDArray[np.float32]:
        """Runs the kernel; checks what it must leave alone, and returns the rows of the step's tokens.

        ``step_tokens``: the tokens of the step, if the rows are its outputs.
        """
        out = lab.output(self.rows, self.m)
        if self.residual is not None and alias:
            out = lab.in_out(self.residual)
        bindings = [lab.step(step_tokens or self.tokens), *self.inputs]
        if self.epilogue not in GATES:  # an operand that a kind does not have is never touched
            residual = out if alias else lab.input(self.residual) if self.residual is not None else None
            bindings += [residual or self.inputs[-1], self.factors or self.inputs[-1]]
        places = {"scale_stride": SCALE_STRIDE, "kind": KINDS[self.epilogue], "k_split": k_split, "rows": self.rows}
        grid, threads = self._grid(lab, k_split)
        lab.run(self.kernel, {**self.params, **places}, "MulFewParams", [*bindings, out], grid, threads)
        if alias:
            assert np.isnan(out.array[self.tokens :]).all()
        else:
            assert_untouched(out.array[self.tokens :])
        products: NDArray[np.float32] = out.array[: self.tokens]
        return products

    def check(self, lab: Lab, *, k_split: int = 1, alias: bool = False, step_tokens: int | None = None) -> None:
        """Runs the kernel and compares it with float64."""
        got = self.outputs(lab, k_split=k_split, alias=alias, step_tokens=step_tokens)
        assert_close(got, self.want, TOLERANCE, self.scale)

    def _grid(self, lab: Lab, k_split: int) -> tuple[tuple[int, int], int]:
        shapes, matrices = lab.core.shapes(), 2 if self.epilogue in GATES else 1
        if self.n <= VECTORS:
            per_group, simdgroups = of_vectors(shapes, self.kernel, shapes["MUL_MV_ROWS"])
            return (tiles(self.m, per_group // matrices), tiles(self.rows, self.n)), 32 * simdgroups
        tile, simdgroups = shapes["FEW_ROWS"], shapes["FEW_SIMDGROUPS"]
        if self.small:
            tile, simdgroups = shapes["FEW_SMALL_ROWS"], simdgroups * tile // shapes["FEW_SMALL_ROWS"]
        return (tiles(self.m, tile // matrices * simdgroups // k_split), tiles(self.rows, self.n)), 32 * simdgroups
