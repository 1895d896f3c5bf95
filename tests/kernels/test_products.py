"""mul_mv, mul_mm and embed of every tensor type against float64 NumPy on decoded weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import MSL, SEED, Guarded, Lab, assert_close, assert_untouched, every_lane, tiles
from support.kernels.products import (
    EPILOGUES,
    F64,
    SWEPT,
    TOLERANCE,
    MatMul,
    Weights,
    block_of,
    every_type_on,
    for_block,
    mat_mul_params,
    tolerance,
)
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType

F32 = NDArray[np.float32]

FLOATS = [quants.F32, quants.F16, quants.BF16]

float_types = pytest.mark.parametrize("qtype", FLOATS, ids=lambda t: t.name)
UNDER_NORM = [e for e in EPILOGUES if e != "_mix"]  # epilogues of products that take a norm
epilogues = pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda e: e[1:] or "store")

# By block size (32 for float types): rows of W, blocks of a row, gap between rows in blocks.
MV_SHAPES = {
    32: [(1, 1, 0), (2, 2, 1), (67, 5, 0), (64, 16, 0), (5, 18, 2), (3, 64, 0)],
    256: [(1, 1, 0), (67, 2, 1), (64, 3, 0), (5, 8, 2)],
}
# The same, then tokens of the step and rows of the dispatch.
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


def on_shapes(shapes: Mapping[int, Sequence[tuple[int, ...]]]) -> pytest.MarkDecorator:
    """Parametrises a test by every type, with every shape for its block size; types beyond SWEPT meet the second."""
    of = {qtype: for_block(qtype, shapes) for qtype in quants.SUPPORTED}
    cases = [(t, *s) for t, shapes in of.items() for i, s in enumerate(shapes) if t in SWEPT or i == 1]
    return pytest.mark.parametrize("case", cases, ids=lambda c: "-".join([c[0].name, *map(str, c[1:])]))


def run_mul_mv(
    lane: str,
    qtype: QuantType,
    epilogue: str,
    m: int,
    k: int,
    gap: int = 0,
    *,
    alias: bool = False,
    both: bool = False,
    normed: bool = False,
) -> None:
    lab = Lab(lane)
    case = MatMul(lab, qtype, epilogue, m, k, 1, 1, gap, both=both, normed=normed)
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
@every_type_on([67, 64, 1], other=0)
def test_biases_and_a_residual_are_added(lane: str, qtype: QuantType, shape: int) -> None:
    run_mul_mv(lane, qtype, "_add", shape, 512, both=True)
    run_mul_mv(lane, qtype, "_add", shape, 512, alias=True, both=True)


@every_lane
@pytest.mark.parametrize("epilogue", UNDER_NORM, ids=lambda e: e[1:] or "store")
@every_type_on([(67, 512), (1, 256), (5, 2048)])
def test_products_of_a_norm(lane: str, qtype: QuantType, shape: tuple[int, int], epilogue: str) -> None:
    run_mul_mv(lane, qtype, epilogue, *shape, normed=True)


@every_lane
@float_types
@pytest.mark.parametrize("epilogue", UNDER_NORM, ids=lambda e: e[1:] or "store")
@pytest.mark.parametrize("k", [1, 31, 33, 67, 130])
def test_a_norm_of_any_length(lane: str, qtype: QuantType, k: int, epilogue: str) -> None:
    run_mul_mv(lane, qtype, epilogue, 5, k, 3 * qtype.block_bytes, normed=True)


@every_lane
def test_a_norm_comes_before_biases_and_residual(lane: str) -> None:
    for qtype in (quants.Q8_0, quants.Q4_K, quants.BF16):
        run_mul_mv(lane, qtype, "_add", 67, 512, both=True, normed=True)
        run_mul_mv(lane, qtype, "_add", 67, 512, alias=True, both=True, normed=True)


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


# ---- numbers beyond a half ---------------------------------------------------------------------------------


def run_with(lane: str, qtype: QuantType, x: F32) -> tuple[F32, F64, F64]:
    """Multiplies rows of x with random weights; returns the output, the exact one, and the scale of its error."""
    lab = Lab(lane)
    w = Weights(lab, qtype, 67, x.shape[1])
    out = lab.output(len(x), 67)
    bindings = [lab.step(len(x)), w.buffer, lab.input(x), out]
    shapes = lab.core.shapes()
    grid = (tiles(len(x), shapes["MUL_MM_TOKENS"]), tiles(67, shapes["MUL_MM_ROWS"]))
    params = mat_mul_params(x.shape[1], 67, w.row_bytes)
    lab.run(f"mul_mm_{qtype.name}", params, "MatMulParams", bindings, grid, shapes["MUL_MM_THREADS"])
    x64 = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return out.array, x64 @ w.values.T, np.sqrt(x64**2 @ w.values.T**2)


@every_lane
@pytest.mark.parametrize(
    "qtype", [quants.Q4_K, quants.Q5_K, quants.Q6_K, quants.Q8_0, quants.BF16], ids=lambda t: t.name
)
@pytest.mark.parametrize("largest", [65504.0, 65600.0, 1e6, 1e20])
def test_activations_beyond_a_half(lane: str, qtype: QuantType, largest: float) -> None:
    """A row with such a number is as exact as floats. Its neighbours are as they would be without it."""
    x = np.random.default_rng(SEED).standard_normal((33, 512)).astype(np.float32)
    x[5, 77], x[32, 511] = largest, -largest
    out, want, scale = run_with(lane, qtype, x)
    beyond = np.isin(np.arange(33), [5, 32]) & (largest > 65504)
    # One term outweighs the others. Its weight is rounded as the largest of its block, not as itself.
    size = np.where(np.isin(np.arange(33), [5, 32])[:, None], scale.max(axis=1, keepdims=True), scale)
    assert_close(out[~beyond], want[~beyond], tolerance(lane, qtype), size[~beyond])
    if beyond.any():
        assert_close(out[beyond], want[beyond], TOLERANCE, scale[beyond])


@every_lane
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_activations_that_are_no_numbers_stay_visible(lane: str, wrong: float) -> None:
    x = np.random.default_rng(SEED).standard_normal((9, 256)).astype(np.float32)
    x[3, 100] = wrong
    out, want, scale = run_with(lane, quants.Q5_K, x)
    others = np.arange(9) != 3
    assert not np.isfinite(out[3]).any()
    assert_close(out[others], want[others], tolerance(lane, quants.Q5_K), scale[others])


@every_lane
def test_weights_beyond_a_half(lane: str) -> None:
    """Weights are staged larger than they are. Those that leave a half's range are multiplied as floats."""
    lab, k = Lab(lane), 64
    w = lab.normal(5, k)
    w[1, 3], w[2, 4], w[4, 63] = 255.0, 257.0, -3e38
    x = lab.normal(3, k, scale=1e-3)
    bits = w.view(np.uint32) & 0xFFFF0000
    out = lab.output(3, 5)
    shapes, bindings = lab.core.shapes(), [lab.step(3), lab.input((bits >> 16).astype(np.uint16)), lab.input(x), out]
    params = mat_mul_params(k, 5, 2 * k)
    lab.run("mul_mm_bf16", params, "MatMulParams", bindings, (1, 1), shapes["MUL_MM_THREADS"])
    x64, w64 = x.astype(np.float64), bits.view(np.float32).astype(np.float64)
    want, scale = x64 @ w64.T, np.sqrt(x64**2 @ w64.T**2)
    for row in range(5):
        rel = TOLERANCE if row in (2, 4) else tolerance(lane, quants.BF16)
        assert_close(out.array[:, row], want[:, row], rel, scale[:, row])


# ---- embed ------------------------------------------------------------------------------------------------


def run_embed(lab: Lab, qtype: QuantType, n_embd: int, ids: list[int], rows: int, gap: int = 0) -> tuple[Guarded, F64]:
    """Runs embed on a table of seven tokens; returns the output [rows, n_embd], and the decoded table times 1.5."""
    table, shapes = Weights(lab, qtype, 7, n_embd, gap), lab.core.shapes()
    tokens = np.full(rows, 2**30, np.int32)  # ids past the step's tokens must not be looked up
    tokens[: len(ids)] = ids
    out = lab.output(rows, n_embd)
    params = {"n_embd": n_embd, "row_bytes": table.row_bytes, "n_vocab": 7, "first": 0, "n_rows": 7, "scale": 1.5}
    bindings = [lab.step(len(ids)), lab.input(tokens, align=4), table.buffer, out]
    grid = (tiles(n_embd, shapes["EMBED_COLUMNS"]), rows)
    lab.run(f"embed_{qtype.name}", params, "EmbedParams", bindings, grid, shapes["EMBED_THREADS"])
    assert_untouched(out.array[len(ids) :])
    return out, 1.5 * table.values


@every_lane
@every_type_on([1, 2, 5, 33], other=2)
def test_embed(lane: str, qtype: QuantType, shape: int) -> None:
    blocks = shape
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
    """Tokens of the window's rows are looked up; the rows of other tokens stay untouched."""
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
    """The host refuses such ids. If the kernel met one, it would read the table's last row."""
    out, table = run_embed(Lab(MSL), quants.Q8_0, 64, [7, -1], 2)
    assert_close(out.array, table[[6, 6]], 3e-7)


@every_lane
def test_every_type_has_every_kernel(lane: str) -> None:
    families = ["embed"] + [f + e for f in ("mul_mv", "mul_mm") for e in EPILOGUES]
    want = {f"{family}_{qtype.name}" for family in families for qtype in quants.SUPPORTED}
    assert want <= set(Lab(lane).device.kernel_names())
