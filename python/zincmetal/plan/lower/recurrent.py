"""Recurrent layers: convolution, delta rule and gated norm, in one kernel for one row and in three for many."""

from __future__ import annotations

from ...graph.ops import Op, Value
from ..launch import Arg, Launch
from .shared import Lowering, lowers, reading, tiles, writing


@lowers("ssm")
def ssm(lowering: Lowering, op: Op, rows: int) -> list[Launch]:
    """Lower to one launch for one row if the device has the kernel, else to three launches."""
    sizes, target = lowering.cfg.ssm, lowering.target
    assert sizes
    params = lowering.params(
        "SsmParams",
        n_k_head=sizes.n_k_head,
        n_v_head=sizes.n_v_head,
        d_k=sizes.d_state,
        d_v=sizes.d_state,
        d_conv=sizes.d_conv,
        norm_eps=op.attrs["eps"],
        l2_eps=op.attrs["eps"],
    )
    one_step = target.instance("ssm_step", target.ssm_classes, sizes.d_state)
    if rows == 1 and target.has(one_step):
        reads = reading(op, "step", "qkv", "z", "alpha", "beta", "conv_w", "a", "dt_bias", "norm_w")
        states = (Arg(op["ssm_conv"], "rw"), Arg(op["ssm_state"], "rw"))
        args = (*reads, *states, *writing(op, "out"))
        return [Launch(one_step, params, args, (sizes.n_v_head, 1, 1), target.shapes["SSM_STEP_THREADS"], op)]
    return _in_three(lowering, op, rows, params)


def _in_three(lowering: Lowering, op: Op, rows: int, params: bytes) -> list[Launch]:
    """Convolve all rows, run the delta rule over them, and norm each head."""
    sizes, target, shapes = lowering.cfg.ssm, lowering.target, lowering.target.shapes
    assert sizes
    conv = Value(f"{op.out.name}.conv", sizes.channels)
    raw = Value(f"{op.out.name}.delta", sizes.d_inner)
    delta_rule = target.instance("ssm_delta", target.ssm_classes, sizes.d_state)
    d_class = int(delta_rule.rpartition("_")[2])

    def launch(kernel: str, args: tuple[Arg, ...], x: int, y: int, threads: str) -> Launch:
        return Launch(kernel, params, args, (x, y, 1), shapes[threads], op)

    convolve = (*reading(op, "step", "qkv", "conv_w"), Arg(op["ssm_conv"], "rw"), Arg(conv, "w"))
    heads, token_tiles = 2 * sizes.n_k_head + sizes.n_v_head, tiles(rows, shapes["SSM_CONV_TOKENS"])
    gates = reading(op, "alpha", "beta", "a", "dt_bias")
    delta = (*reading(op, "step"), Arg(conv, "r"), *gates, Arg(op["ssm_state"], "rw"), Arg(raw, "w"))
    column_tiles = tiles(sizes.d_state * d_class, shapes["SSM_DELTA_FLOATS"])
    norm = (*reading(op, "step"), Arg(raw, "r"), *reading(op, "z", "norm_w"), *writing(op, "out"))
    head_tiles = tiles(sizes.n_v_head, shapes["SSM_NORM_THREADS"] // 32)
    return [
        launch("ssm_conv1d", convolve, heads, token_tiles, "SSM_CONV_THREADS"),
        launch(delta_rule, delta, column_tiles, sizes.n_v_head, "SSM_DELTA_THREADS"),
        launch("ssm_norm", norm, head_tiles, rows, "SSM_NORM_THREADS"),
    ]
