"""Recurrent layers.

Of gated DeltaNet: convolution, delta rule and gated norm, in one kernel for runs of one row and in three for any.
"""

from __future__ import annotations

from ...config import Ssm
from ...graph.ops import Op, Value
from ..launch import Arg, Launch
from .shared import Lowering, lowers, reading, tiles, writing

#: Runs of more than one row that a recurrence works on side by side: as many are common, and idle ones cost little.
LONG_RUNS = 4


@lowers("ssm")
def ssm(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to one launch if all runs are of one row and the device has the kernel, else to three launches."""
    sizes, target = lowering.cfg.recurrence, lowering.target
    assert isinstance(sizes, Ssm)
    repeat = op.attrs["repeat"]
    params = _params(lowering, sizes, repeat, 2 * repeat if _has_one_matrix_of_gates(op) else repeat, op.attrs["eps"])
    one_step = target.instance("ssm_step", target.ssm_classes, sizes.d_state)
    if lowering.shape.only_singles and target.has(one_step):
        inputs, weights = reading(op, "step", "rows", "qkv", "z"), reading(op, "conv_w", "a", "dt_bias", "norm_w")
        states = (Arg(op["ssm_conv"], "rw"), Arg(op["ssm_state"], "rw"))
        args = (*inputs, *_gates(op), *weights, *states, *writing(op, "out"))
        usual, least = target.shapes["SSM_STEP_THREADS"], target.shapes["SSM_STEP_LEAST_THREADS"]
        threads = min(usual, max(4 * usual // rows // 32 * 32, least))  # many rows fill the device with fewer of each
        return [Launch(one_step, params, args, (sizes.n_v_head, rows, 1), threads, op)]
    return _in_three(lowering, op, rows, params)


@lowers("ssm_ungroup")
def ungroup(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to one launch."""
    sizes, shapes = lowering.cfg.recurrence, lowering.target.shapes
    assert isinstance(sizes, Ssm)
    grid = tiles(sizes.channels + sizes.d_inner, shapes["ELEMENTWISE_COLUMNS"]), rows, 1
    args = (*reading(op, "step", "x"), *writing(op, "qkv", "z"))
    return [Launch("ssm_ungroup", _params(lowering, sizes), args, grid, shapes["ELEMENTWISE_THREADS"], op)]


def _params(lowering: Lowering, sizes: Ssm, repeat: int = 1, gate_step: int = 1, eps: float = 0.0) -> bytes:
    return lowering.params(
        "SsmParams",
        n_k_head=sizes.n_k_head,
        n_v_head=sizes.n_v_head,
        repeat=repeat,
        gate_step=gate_step,
        d_k=sizes.d_state,
        d_v=sizes.d_state,
        d_conv=sizes.d_conv,
        norm_eps=eps,
        l2_eps=eps,
    )


def _has_one_matrix_of_gates(op: Op) -> bool:
    return op["alpha"] == op["beta"]


def _gates(op: Op) -> tuple[Arg, Arg]:
    """Bind alpha and beta. In one matrix the alphas follow the betas of the same k head."""
    alpha, beta = reading(op, "alpha", "beta")
    return (alpha._replace(first=op.attrs["repeat"]) if _has_one_matrix_of_gates(op) else alpha), beta


def _in_three(lowering: Lowering, op: Op, rows: int, params: bytes) -> list[Launch]:
    """Convolve all rows, run the delta rule over them, and norm each head."""
    sizes, target, shapes = lowering.cfg.recurrence, lowering.target, lowering.target.shapes
    assert isinstance(sizes, Ssm)
    conv = Value(f"{op.out.name}.conv", sizes.channels)
    raw = Value(f"{op.out.name}.delta", sizes.d_inner)
    delta_rule = target.instance("ssm_delta", target.ssm_classes, sizes.d_state)
    d_class = int(delta_rule.rpartition("_")[2])

    def launch(kernel: str, args: tuple[Arg, ...], grid: tuple[int, int, int], threads: str) -> Launch:
        return Launch(kernel, params, args, grid, shapes[threads], op)

    convolve = (*reading(op, "step", "rows", "qkv", "conv_w", "ssm_conv"), Arg(conv, "w"))
    heads, token_tiles = 2 * sizes.n_k_head + sizes.n_v_head, tiles(rows, shapes["SSM_CONV_TOKENS"])
    gates = (*_gates(op), *reading(op, "a", "dt_bias"))
    states = (Arg(op["ssm_conv"], "rw"), Arg(op["ssm_state"], "rw"))
    delta = (*reading(op, "step", "rows", "qkv"), Arg(conv, "r"), *gates, *states, Arg(raw, "w"))
    runs = min(rows, lowering.shape.singles + LONG_RUNS)
    column_tiles = tiles(sizes.d_state * d_class, shapes["SSM_DELTA_FLOATS"])
    norm = (*reading(op, "step"), Arg(raw, "r"), *reading(op, "z", "norm_w"), *writing(op, "out"))
    head_tiles = tiles(sizes.n_v_head, shapes["SSM_NORM_THREADS"] // 32)
    return [
        launch("ssm_conv1d", convolve, (heads, token_tiles, 1), "SSM_CONV_THREADS"),
        launch(delta_rule, delta, (column_tiles, sizes.n_v_head, runs), "SSM_DELTA_THREADS"),
        launch("ssm_norm", norm, (head_tiles, rows, 1), "SSM_NORM_THREADS"),
    ]


@lowers("short_conv")
def short_conv(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to one launch, whatever the runs are."""
    (n, taps), shapes = op.weight("conv_w").shape, lowering.target.shapes
    threads, tokens = shapes["SHORT_CONV_THREADS"], shapes["SHORT_CONV_TOKENS"]
    params = lowering.params("ShortConvParams", n=n, taps=taps)
    args = (*reading(op, "step", "rows", "bcx", "conv_w"), Arg(op["short_conv"], "rw"), *writing(op, "out"))
    return [Launch("short_conv", params, args, (tiles(n, threads), tiles(rows, tokens), 1), threads, op)]
