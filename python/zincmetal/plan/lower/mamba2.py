"""Mamba2 layers: convolution and recurrence, in one kernel for runs of one row and in two for any, then the norm."""

from __future__ import annotations

from ...config import Mamba2
from ...graph.ops import Op, Value
from ..launch import Arg, Launch
from .recurrent import LONG_RUNS
from .shared import Lowering, lowers, reading, tiles, writing


@lowers("mamba2")
def mamba2(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to two launches if all runs are of one row and the device has the kernel, else to three."""
    sizes, target, shapes = lowering.cfg.recurrence, lowering.target, lowering.target.shapes
    assert isinstance(sizes, Mamba2)
    params = lowering.params(
        "Mamba2Params",
        n_head=sizes.n_head,
        n_group=sizes.n_group,
        d_head=sizes.d_head,
        d_state=sizes.d_state,
        d_conv=sizes.d_conv,
        norm_eps=op.attrs["eps"],
    )

    def launch(kernel: str, args: tuple[Arg, ...], grid: tuple[int, int, int], threads: str) -> Launch:
        return Launch(kernel, params, args, grid, shapes[threads], op)

    states = (Arg(op["ssm_conv"], "rw"), Arg(op["ssm_state"], "rw"))
    inputs, weights = reading(op, "step", "rows", "inputs"), reading(op, "a", "d", "dt_bias")
    taps, o = reading(op, "conv_w", "conv_b"), Value(f"{op.out.name}.o", sizes.d_inner)
    normed = (*reading(op, "step"), Arg(o, "r"), *reading(op, "inputs", "norm_w"), *writing(op, "out"))
    norm = launch("mamba2_norm", normed, (sizes.n_group, rows, 1), "MAMBA2_NORM_THREADS")
    one_step = target.instance("mamba2_step", target.ssm_classes, sizes.d_state)
    if lowering.shape.only_singles and target.has(one_step):
        args = (*inputs, *taps, *weights, *states, Arg(o, "w"))
        return [launch(one_step, args, (sizes.n_head, rows, 1), "MAMBA2_STEP_THREADS"), norm]

    scan = target.instance("mamba2_scan", target.ssm_classes, sizes.d_state)
    xbc, d_class = Value(f"{op.out.name}.conv", sizes.channels), int(scan.rpartition("_")[2])
    channel_tiles, token_tiles = tiles(sizes.channels, shapes["MAMBA2_CONV_THREADS"]), shapes["SSM_CONV_TOKENS"]
    convolve = (*inputs, *taps, *reading(op, "ssm_conv"), Arg(xbc, "w"))
    runs = min(rows, lowering.shape.singles + LONG_RUNS)
    column_tiles = tiles(sizes.d_head * d_class, shapes["SSM_DELTA_FLOATS"])
    scanned = (*inputs, Arg(xbc, "r"), *weights, *states, Arg(o, "w"))
    return [
        launch("mamba2_conv1d", convolve, (channel_tiles, tiles(rows, token_tiles), 1), "MAMBA2_CONV_THREADS"),
        launch(scan, scanned, (column_tiles, sizes.n_head, runs), "SSM_DELTA_THREADS"),
        norm,
    ]
