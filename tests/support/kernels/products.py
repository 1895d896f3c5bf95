"""Products of a matrix and rows, with epilogues, and the expected outputs in float64 NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import Guarded, Lab, assert_close, assert_untouched, tiles
from support.kernels.input_norm import InputNorm
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType
from zincmetal.gguf.random_weights import random_weights
from zincmetal.plan.lower.products import tile_simdgroups

F64 = NDArray[np.float64]
T = TypeVar("T")


every_type = pytest.mark.parametrize("qtype", quants.SUPPORTED, ids=lambda t: t.name)

#: Types that meet every shape of a sweep: no two have one layout. The kernels of other types are the same text with
#: another block, and meet one shape.
SWEPT = [
    *(quants.F32, quants.F16, quants.BF16, quants.Q4_0, quants.Q4_1, quants.Q5_0, quants.Q5_1, quants.Q8_0),
    *(quants.Q4_K, quants.Q5_K, quants.Q6_K),
]


def every_type_on(
    shapes: Sequence[Any], other: int = 0, types: Sequence[QuantType] = quants.SUPPORTED
) -> pytest.MarkDecorator:
    """Parametrises a test by ``qtype`` and ``shape``: types beyond SWEPT meet the shape at ``other`` alone."""
    cases = [
        pytest.param(t, s, id=f"{t.name}-{i}") for t in types for i, s in enumerate(shapes) if t in SWEPT or i == other
    ]
    return pytest.mark.parametrize(("qtype", "shape"), cases)


def for_block(qtype: QuantType, values: Mapping[int, T]) -> T:
    """Returns the value for the type's size of blocks, or for the next smaller size."""
    return values[max(size for size in values if size <= block_of(qtype)[0])]


EPILOGUES = ["", "_add", "_mix", "_swiglu", "_geglu"]
WEIGHT_ALIGN = 8  # bytes: the alignment of a tensor that GGUF guarantees
TOLERANCE = 3e-6  # relative to the norm: all lanes round as float32 sums do
#: The same for products of halves. A half rounds by at most 2^-11 of a number. Scale, offset and weight are rounded,
#: and the activation. Errors of one sign are few: their root mean square is below this.
HALF_TOLERANCE = 2**-10


def of_vectors(shapes: Mapping[str, int], kernel: str, rows: int) -> tuple[int, int]:
    """Returns (rows of a threadgroup, simdgroups) of a kernel of vectors. ``rows``: per simdgroup, without a tile."""
    tiled = tile_simdgroups(shapes, kernel)
    return (shapes["TILE_ROWS"], tiled) if tiled else (rows * shapes["MUL_MV_SIMDGROUPS"], shapes["MUL_MV_SIMDGROUPS"])


def tolerance(lane: str, qtype: QuantType) -> float:
    """Returns the tolerance of products of many rows: all but those of floats are of halves, except on native lanes."""
    return TOLERANCE if lane == "native" or qtype is quants.F32 else HALF_TOLERANCE


def tile(shapes: Mapping[str, int], kernel: str) -> tuple[int, int, int]:
    """Returns (rows, tokens, threads) of a tile of mul_mm, mul_heads_mm or moe_mm, by the name of the kernel."""
    usual = "MOE_MM" if kernel.startswith("moe_mm") else "MUL_MM"
    sizes = "COOP" if "_mm_coop" in kernel else usual
    tokens = shapes[f"{usual if usual == 'MOE_MM' else sizes}_TOKENS"]
    return shapes[f"{sizes}_ROWS"], tokens, shapes[f"{sizes}_THREADS"]


class Weights:
    """Random rows of a type on a device, and the decoded values."""

    def __init__(self, lab: Lab, qtype: QuantType, m: int, k: int, gap: int = 0) -> None:
        packed = random_weights(qtype, (m, k), lab.rng)
        self.values: F64 = quants.dequantize(qtype, packed, (m, k)).astype(np.float64)
        self.row_bytes = packed.shape[1] + gap
        rows = np.full((m, self.row_bytes), 0xFF, np.uint8)
        rows[:, : packed.shape[1]] = packed
        # The last row has no gap: nothing after it may be read.
        self.buffer = lab.input(rows.reshape(-1)[: m * self.row_bytes - gap], align=WEIGHT_ALIGN)


def block_of(qtype: QuantType) -> tuple[int, int]:
    """Returns the weights and bytes of a block; for float types, of 32 weights."""
    size = max(qtype.block_size, 32)
    return size, qtype.row_bytes(size)


def silu(x: F64) -> F64:
    return np.asarray(x / (1 + np.exp(-x)))


def gelu(x: F64) -> F64:
    """Computes GELU by its tanh formula."""
    return np.asarray(x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def silu_clamped(x: F64) -> F64:
    """Computes gpt-oss's activation of a gate."""
    x = np.minimum(x, 7)
    return np.asarray(x / (1 + np.exp(-1.702 * x)))


#: The activation of the first of two products, by epilogue.
GATES = {"_swiglu": silu, "_geglu": gelu}
SCALE_STRIDE = 3  # elements between the factors of two rows, in tests of the epilogue mix


def mat_mul_params(k: int, m: int, row_bytes: int, *, bias: bool = False) -> dict[str, float]:
    residual_stride = 0 if bias else m
    return {
        "k": k,
        "m": m,
        "row_bytes": row_bytes,
        "residual_stride": residual_stride,
        "scale_stride": SCALE_STRIDE,
        "has_bias": 0,
        "normed": 0,
        "eps": 0,
    }


def gated(epilogue: str, products: Sequence[F64], scales: Sequence[F64]) -> tuple[F64, F64]:
    """Applies a gate to two products; returns the result and its error bound, computed from theirs."""
    gate, up = products
    if epilogue == "_clamped":
        return silu_clamped(gate) * (np.clip(up, -7, 7) + 1), scales[0] * (np.abs(up) + 1) + np.abs(gate) * scales[1]
    scale = scales[0] * (np.abs(up) + scales[1]) + (np.abs(gate) + scales[0]) * scales[1]
    return GATES[epilogue](gate) * up, scale


class MatMul:
    """One product with its epilogue: buffers in the order of the bindings, the expected output and its error bound."""

    def __init__(
        self,
        lab: Lab,
        qtype: QuantType,
        epilogue: str,
        m: int,
        k: int,
        tokens: int,
        rows: int,
        gap: int,
        *,
        bias: bool = False,
        both: bool = False,
        normed: bool = False,
    ):
        weights = [Weights(lab, qtype, m, k, gap) for _ in range(2 if epilogue in GATES else 1)]
        self.qtype = qtype
        x = np.full((rows, k), np.nan, np.float32)  # rows past the step's tokens must not be read
        x[:tokens] = lab.normal(tokens, k, scale=k**-0.5)
        self.params: dict[str, float] = mat_mul_params(k, m, weights[0].row_bytes, bias=bias)
        self.inputs: list[Guarded] = [w.buffer for w in weights] + [lab.input(x)]
        norm = InputNorm(lab, x[:tokens], normed)
        self.params |= norm.params
        self.norm, x64 = norm.buffer, norm.values
        products = [x64 @ w.values.T for w in weights]
        # The root of the sum of the squares of each product's terms.
        scales = [np.sqrt(x64**2 @ w.values.T**2) for w in weights]
        self.residual: NDArray[np.float32] | None = None
        self.want, self.scale = products[0], scales[0]
        self.factors: Guarded | None = None
        if epilogue in GATES:
            self.want, self.scale = gated(epilogue, products, scales)
        if epilogue == "_mix":
            # A token's factor is the first of its SCALE_STRIDE numbers. The others must not be read.
            factors = np.full((rows, SCALE_STRIDE), np.nan, np.float32)
            factors[:tokens, 0] = lab.normal(tokens)
            self.factors = lab.input(factors.reshape(-1)[: (rows - 1) * SCALE_STRIDE + 1], align=4)
            self.want = self.want * factors[:tokens, :1]
            self.scale = self.scale * np.abs(factors[:tokens, :1])
        if epilogue in ("_add", "_mix"):
            self.residual = np.full((1 if bias else rows, m), np.nan, np.float32)
            self.residual[:tokens] = lab.normal(min(tokens, len(self.residual)), m)
            self.want = self.want + self.residual[:tokens]
            self.scale = np.hypot(self.scale, self.residual[:tokens])
        self.bias = lab.input(lab.normal(m)) if both else lab.input(np.full(m, np.nan, np.float32))
        if both:
            self.params["has_bias"] = 1
            self.want = self.want + self.bias.array
            self.scale = np.hypot(self.scale, self.bias.array)

    def run(self, lab: Lab, kernel: str, shape: tuple[int, int], *, alias: bool = False) -> None:
        """Runs the kernel for outputs of ``shape`` and checks them. ``alias``: the output is the residual's buffer."""
        out = lab.output(*shape)
        bindings = [*self.inputs]
        if kernel.startswith("mul_mv") and self.factors is None:
            bindings.append(self.norm)
        if self.residual is not None and alias:
            out = lab.in_out(self.residual)
            bindings.append(out)
        elif self.residual is not None:
            bindings.append(lab.input(self.residual))
        if kernel.startswith("mul_mv_add"):
            bindings.append(self.bias)
        if self.factors is not None:
            bindings.append(self.factors)
        bindings.append(out)
        step, grid, threads = self.launch(lab, kernel, shape)
        lab.run(kernel, self.params, "MatMulParams", step + bindings, grid, threads)
        tokens = len(self.want)
        of_many = kernel.startswith("mul_mm")
        assert_close(
            out.array[:tokens], self.want, tolerance(lab.lane, self.qtype) if of_many else TOLERANCE, self.scale
        )
        if alias:
            assert np.isnan(out.array[tokens:]).all()
        else:
            assert_untouched(out.array[tokens:])

    def launch(self, lab: Lab, kernel: str, shape: tuple[int, int]) -> tuple[list[Guarded], tuple[int, int], int]:
        """Returns the step buffer (if the kernel takes one), the grid and the threads."""
        shapes, (rows, m) = lab.core.shapes(), shape
        matrices = 2 if any(gate in kernel for gate in GATES) else 1
        if kernel.startswith("mul_mv"):
            per_group, simdgroups = of_vectors(shapes, kernel, shapes["MUL_MV_ROWS"])
            return [], (tiles(m, per_group // matrices), 1), 32 * simdgroups
        of_weights, tokens, threads = tile(shapes, kernel)
        return [lab.step(len(self.want))], (tiles(rows, tokens), tiles(m, of_weights // matrices)), threads
