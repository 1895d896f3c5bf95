"""mul_mv, mul_mm and embed, of every tensor type, against float64 NumPy on the weights that quants.py decodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import MSL, Guarded, Lab, assert_close, assert_untouched, every_lane, tiles
from support.quant_random import random_blocks
from zincmetal import quants
from zincmetal.quants import QuantType

F64 = NDArray[np.float64]

FLOATS = [quants.F32, quants.F16, quants.BF16]

every_type = pytest.mark.parametrize("qtype", quants.SUPPORTED, ids=lambda t: t.name)
float_types = pytest.mark.parametrize("qtype", FLOATS, ids=lambda t: t.name)
EPILOGUES = ["", "_add", "_mix", "_swiglu", "_geglu"]
epilogues = pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda e: e[1:] or "store")

# Rows of W, K in blocks of 32 (float types too) or of 256, and the gap between rows in blocks.
MV_SHAPES = {
    32: [(1, 1, 0), (2, 2, 1), (67, 5, 0), (64, 16, 0), (5, 18, 2), (3, 64, 0)],
    256: [(1, 1, 0), (67, 2, 1), (64, 3, 0), (5, 8, 2)],
}
# The same, and the tokens of the step and the rows that the dispatch is for.
MM_SHAPES = {
    32: [
        (67, 1, 0, 33, 33),
        (1, 2, 1, 1, 4),
        (2, 16, 0, 31, 32),
        (64, 3, 0, 32, 40),
        (130, 2, 1, 2, 2),
        (5, 18, 0, 70, 96),
    ],
    256: [(67, 1, 0, 33, 40), (1, 2, 1, 7, 7), (64, 1, 0, 32, 32), (5, 3, 2, 70, 70)],
}
WEIGHT_ALIGN = 8  # what GGUF promises of a tensor
TOLERANCE = 3e-6  # of the norm: both lanes err as float32 sums do


class Weights:
    """Random rows of a type on a device, and the same decoded."""

    def __init__(self, lab: Lab, qtype: QuantType, m: int, k: int, gap: int = 0) -> None:
        packed = random_blocks(qtype, m, k, lab.rng)
        self.values: F64 = quants.dequantize(qtype, packed, (m, k)).astype(np.float64)
        self.row_bytes = packed.shape[1] + gap
        rows = np.full((m, self.row_bytes), 0xFF, np.uint8)
        rows[:, : packed.shape[1]] = packed
        # Nothing may be read after the last row, not even its gap.
        self.buffer = lab.input(rows.reshape(-1)[: m * self.row_bytes - gap], align=WEIGHT_ALIGN)


def block_of(qtype: QuantType) -> tuple[int, int]:
    """Weights and bytes of a block, 32 weights for float types."""
    size = max(qtype.block_size, 32)
    return size, qtype.row_bytes(size)


def on_shapes(shapes: Mapping[int, Sequence[tuple[int, ...]]]) -> pytest.MarkDecorator:
    """Every type with every shape for its block size."""
    cases = [(qtype, *shape) for qtype in quants.SUPPORTED for shape in shapes[block_of(qtype)[0]]]
    return pytest.mark.parametrize("case", cases, ids=lambda c: "-".join([c[0].name, *map(str, c[1:])]))


def silu(x: F64) -> F64:
    return np.asarray(x / (1 + np.exp(-x)))


def gelu(x: F64) -> F64:
    """GELU by its tanh formula."""
    return np.asarray(x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


#: What is done with the first of two products, by epilogue.
GATES = {"_swiglu": silu, "_geglu": gelu}
SCALE_STRIDE = 3  # of the factors of mix, in these tests


def mat_mul_params(k: int, m: int, row_bytes: int, *, bias: bool = False) -> dict[str, int]:
    residual_stride = 0 if bias else m
    return {
        "k": k,
        "m": m,
        "row_bytes": row_bytes,
        "residual_stride": residual_stride,
        "scale_stride": SCALE_STRIDE,
    }


def gated(epilogue: str, products: Sequence[F64], scales: Sequence[F64]) -> tuple[F64, F64]:
    """A gate applied to two products, and its error bound from theirs."""
    gate, up = products
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
    ):
        weights = [Weights(lab, qtype, m, k, gap) for _ in range(2 if epilogue in GATES else 1)]
        x = np.full((rows, k), np.nan, np.float32)  # past the step's tokens: never to be read
        x[:tokens] = lab.normal(tokens, k, scale=k**-0.5)
        self.params = mat_mul_params(k, m, weights[0].row_bytes, bias=bias)
        self.inputs: list[Guarded] = [w.buffer for w in weights] + [lab.input(x)]
        x64 = x[:tokens].astype(np.float64)
        products = [x64 @ w.values.T for w in weights]
        # Of each product, the root of the sum of the squares of its terms.
        scales = [np.sqrt(x64**2 @ w.values.T**2) for w in weights]
        self.residual: NDArray[np.float32] | None = None
        self.want, self.scale = products[0], scales[0]
        self.factors: Guarded | None = None
        if epilogue in GATES:
            self.want, self.scale = gated(epilogue, products, scales)
        if epilogue == "_mix":
            # The factor of a token is the first of its SCALE_STRIDE numbers: the others may be anything.
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

    def run(self, lab: Lab, kernel: str, shape: tuple[int, int], *, alias: bool = False) -> None:
        """Runs the kernel for ``shape`` outputs and checks them. With alias, the residual is in the output."""
        out = lab.output(*shape)
        bindings = [*self.inputs]
        if self.residual is not None and alias:
            out = lab.in_out(self.residual)
            bindings.append(out)
        elif self.residual is not None:
            bindings.append(lab.input(self.residual))
        if self.factors is not None:
            bindings.append(self.factors)
        bindings.append(out)
        step, grid, threads = self.launch(lab, kernel, shape)
        lab.run(kernel, self.params, "MatMulParams", step + bindings, grid, threads)
        tokens = len(self.want)
        assert_close(out.array[:tokens], self.want, TOLERANCE, self.scale)
        if alias:
            assert np.isnan(out.array[tokens:]).all()
        else:
            assert_untouched(out.array[tokens:])

    def launch(self, lab: Lab, kernel: str, shape: tuple[int, int]) -> tuple[list[Guarded], tuple[int, int], int]:
        """The step buffer, where the kernel takes one, the grid and the threads."""
        shapes, (rows, m) = lab.core.shapes(), shape
        matrices = 2 if any(gate in kernel for gate in GATES) else 1
        if kernel.startswith("mul_mv"):
            per_group = shapes["MUL_MV_SIMDGROUPS"] * shapes["MUL_MV_ROWS"] // matrices
            return [], (tiles(m, per_group), 1), 32 * shapes["MUL_MV_SIMDGROUPS"]
        grid = (tiles(rows, shapes["MUL_MM_TOKENS"]), tiles(m, shapes["MUL_MM_ROWS"] // matrices))
        return [lab.step(len(self.want))], grid, shapes["MUL_MM_THREADS"]


def run_mul_mv(
    lane: str, qtype: QuantType, epilogue: str, m: int, k: int, gap: int = 0, *, alias: bool = False
) -> None:
    lab = Lab(lane)
    case = MatMul(lab, qtype, epilogue, m, k, 1, 1, gap)
    case.run(lab, f"mul_mv{epilogue}_{qtype.name}", (1, m), alias=alias)


def run_mul_mm(
    lane: str,
    qtype: QuantType,
    epilogue: str,
    m: int,
    k: int,
    tokens: int,
    rows: int,
    gap: int = 0,
    *,
    alias: bool = False,
    bias: bool = False,
) -> None:
    lab = Lab(lane)
    case = MatMul(lab, qtype, epilogue, m, k, tokens, rows, gap, bias=bias)
    case.run(lab, f"mul_mm{epilogue}_{qtype.name}", (rows, m), alias=alias)


@every_lane
@epilogues
@on_shapes(MV_SHAPES)
def test_mul_mv(lane: str, epilogue: str, case: tuple[QuantType, int, int, int]) -> None:
    qtype, m, blocks, gap = case
    size, nbytes = block_of(qtype)
    run_mul_mv(lane, qtype, epilogue, m, blocks * size, gap * nbytes)


@every_lane
@epilogues
@on_shapes(MM_SHAPES)
def test_mul_mm(lane: str, epilogue: str, case: tuple[QuantType, int, int, int, int, int]) -> None:
    qtype, m, blocks, gap, tokens, rows = case
    size, nbytes = block_of(qtype)
    run_mul_mm(lane, qtype, epilogue, m, blocks * size, tokens, rows, gap * nbytes)


@every_lane
@float_types
@epilogues
@pytest.mark.parametrize("k", [1, 31, 33, 67, 130])
def test_float_rows_of_any_length(lane: str, qtype: QuantType, epilogue: str, k: int) -> None:
    gap = 3 * qtype.block_bytes
    run_mul_mv(lane, qtype, epilogue, 5, k, gap)
    run_mul_mm(lane, qtype, epilogue, 5, k, 3, 4, gap)


@every_lane
def test_long_rows(lane: str) -> None:
    run_mul_mv(lane, quants.Q4_0, "", 67, 2048)
    run_mul_mv(lane, quants.Q6_K, "_swiglu", 5, 8192)
    run_mul_mm(lane, quants.Q4_1, "_add", 40, 2048, 7, 7)
    run_mul_mm(lane, quants.Q4_K, "", 2, 2048, 5, 5)


@every_lane
def test_the_residual_may_be_the_output(lane: str) -> None:
    run_mul_mv(lane, quants.Q4_K, "_add", 67, 512, alias=True)
    run_mul_mv(lane, quants.Q5_K, "_mix", 67, 512, alias=True)
    run_mul_mm(lane, quants.Q8_0, "_add", 67, 64, 33, 40, alias=True)
    run_mul_mm(lane, quants.Q4_K, "_mix", 67, 256, 33, 40, alias=True)


@every_lane
def test_a_residual_without_a_stride_is_a_bias(lane: str) -> None:
    run_mul_mm(lane, quants.Q8_0, "_add", 67, 64, 33, 40, bias=True)
    run_mul_mm(lane, quants.F32, "_mix", 5, 33, 3, 4, bias=True)


@every_lane
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 16, 17, 24, 31, 32, 33, 48, 49, 64, 97, 193])
def test_tiles_with_few_tokens(lane: str, tokens: int) -> None:
    run_mul_mm(lane, quants.Q4_K, "", 67, 512, tokens, tokens)


@every_lane
def test_a_step_without_tokens_writes_nothing(lane: str) -> None:
    lab = Lab(lane)
    w = Weights(lab, quants.Q4_0, 5, 64)
    out = lab.output(33, 5)
    params = mat_mul_params(64, 5, w.row_bytes)
    bindings = [lab.step(0), w.buffer, lab.input(lab.normal(33, 64)), out]
    lab.run("mul_mm_q4_0", params, "MatMulParams", bindings, (2, 1), lab.core.shapes()["MUL_MM_THREADS"])
    assert_untouched(out.array)


# ---- embed ------------------------------------------------------------------------------------------------


def run_embed(lab: Lab, qtype: QuantType, n_embd: int, ids: list[int], rows: int, gap: int = 0) -> tuple[Guarded, F64]:
    """The output [rows, n_embd] of a table of seven tokens, and the table decoded and scaled by 1.5."""
    table, shapes = Weights(lab, qtype, 7, n_embd, gap), lab.core.shapes()
    tokens = np.full(rows, 2**30, np.int32)  # past the step's: never to be looked up
    tokens[: len(ids)] = ids
    out = lab.output(rows, n_embd)
    params = {"n_embd": n_embd, "row_bytes": table.row_bytes, "n_vocab": 7, "first": 0, "n_rows": 7, "scale": 1.5}
    bindings = [lab.step(len(ids)), lab.input(tokens, align=4), table.buffer, out]
    grid = (tiles(n_embd, shapes["EMBED_COLUMNS"]), rows)
    lab.run(f"embed_{qtype.name}", params, "EmbedParams", bindings, grid, shapes["EMBED_THREADS"])
    assert_untouched(out.array[len(ids) :])
    return out, 1.5 * table.values


@every_lane
@every_type
@pytest.mark.parametrize("blocks", [1, 2, 5, 33])
def test_embed(lane: str, qtype: QuantType, blocks: int) -> None:
    size, nbytes = block_of(qtype)
    ids = [6, 0, 3, 3]
    out, table = run_embed(Lab(lane), qtype, blocks * size, ids, 5, nbytes)
    assert_close(out.array[: len(ids)], table[ids], 3e-7, np.abs(table).max(axis=1)[ids][:, None])


@every_lane
@float_types
@pytest.mark.parametrize("n_embd", [1, 40, 47, 48, 67])
def test_embed_of_float_rows_of_any_length(lane: str, qtype: QuantType, n_embd: int) -> None:
    out, table = run_embed(Lab(lane), qtype, n_embd, [5, 6], 3)
    assert_close(out.array[:2], table[[5, 6]], 1e-7)


@every_lane
def test_embed_from_a_window_of_the_table(lane: str) -> None:
    """Tokens of the window's rows are looked up, and what others have written stays."""
    lab, n_embd, first, ids = Lab(lane), 64, 3, [2, 3, 4, 5, -1, 0]
    window, shapes = Weights(lab, quants.Q8_0, 2, n_embd), lab.core.shapes()
    out = lab.output(6, n_embd)
    sizes = {"n_embd": n_embd, "row_bytes": window.row_bytes, "n_vocab": 7, "first": first, "n_rows": 2, "scale": 1.0}
    bindings = [lab.step(6), lab.input(np.array(ids, np.int32), align=4), window.buffer, out]
    lab.run(
        "embed_q8_0",
        sizes,
        "EmbedParams",
        bindings,
        (tiles(n_embd, shapes["EMBED_COLUMNS"]), 6),
        shapes["EMBED_THREADS"],
    )
    assert_close(out.array[1:3], window.values, 3e-7)
    assert_untouched(out.array[[0, 3, 4, 5]])


def test_a_wild_token_id_reads_no_other_memory() -> None:
    """The host refuses such ids; were one to get through, it finds the table's last row and nothing else."""
    out, table = run_embed(Lab(MSL), quants.Q8_0, 64, [7, -1], 2)
    assert_close(out.array, table[[6, 6]], 3e-7)


@every_lane
def test_every_type_has_every_kernel(lane: str) -> None:
    families = ["embed"] + [f + e for f in ("mul_mv", "mul_mm") for e in EPILOGUES]
    want = {f"{family}_{qtype.name}" for family in families for qtype in quants.SUPPORTED}
    assert want <= set(Lab(lane).device.kernel_names())
