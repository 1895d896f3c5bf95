"""Decode of a mixture of experts: moe_mv of every type against float64 NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from support.kernel_lab import MSL, Lab, assert_close, every_lane
from support.kernels.experts import TYPES, every_form
from support.kernels.experts_mv import Choice, Chosen, id_input, run_mix, run_moe_mv, shared_types
from support.kernels.products import every_type_on
from support.kernels.route import Router
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType
from zincmetal.gguf.random_weights import random_weights

#: Rows and columns of an expert's matrix, number of experts, chosen ids.
SHAPES = [
    (67, 512, 5, [4, 0, 3]),
    (1, 256, 2, [1]),
    (6, 768, 9, [8, 7, 6, 5, 0, 1, 2, 3]),
    (5, 512, 3, [2, 2, 0, 2]),
    (3, 256, 2, [1, 0, 1, 0, 1, 0, 1]),
]


@every_lane
@every_type_on(SHAPES, types=TYPES)
@pytest.mark.parametrize("form", ["", "_swiglu"], ids=["store", "swiglu"])
def test_moe_mv(lane: str, qtype: QuantType, shape: tuple[int, int, int, list[int]], form: str) -> None:
    run_moe_mv(Lab(lane), qtype, *shape, form=form)


@every_lane
@every_form
def test_biases_and_activations(lane: str, form: str, bias: bool) -> None:
    run_moe_mv(Lab(lane), quants.Q8_0, 67, 96, 5, [4, 0, -1, 3, 0], form=form, bias=bias)
    run_moe_mv(Lab(lane), quants.F16, 6, 33, 3, [1, 2], form=form, bias=bias)


@every_lane
@every_type_on(SHAPES, types=TYPES, other=2)
@pytest.mark.parametrize("form", ["", "_swiglu"], ids=["store", "swiglu"])
def test_experts_of_a_norm(lane: str, qtype: QuantType, shape: tuple[int, int, int, list[int]], form: str) -> None:
    run_moe_mv(Lab(lane), qtype, *shape, form=form, normed=True)


@every_lane
@every_form
def test_a_norm_comes_before_biases_and_activations(lane: str, form: str, bias: bool) -> None:
    run_moe_mv(Lab(lane), quants.Q8_0, 67, 96, 5, [4, 0, -1, 3, 0], form=form, bias=bias, normed=True)
    run_moe_mv(Lab(lane), quants.F16, 6, 33, 3, [1, 2], form=form, bias=bias, normed=True)


@every_lane
def test_wild_ids_find_the_last_expert(lane: str) -> None:
    ids = [3, -1, 2**31 - 1, -(2**31), 2]
    run_moe_mv(Lab(lane), quants.Q4_K, 5, 256, 3, ids)
    run_moe_mv(Lab(lane), quants.Q5_0, 5, 256, 3, ids, form="_swiglu")
    run_mix(Lab(lane), quants.Q5_K, 5, 256, 3, ids)
    run_mix(Lab(lane), quants.Q6_K, 5, 256, 3, ids, shared=(quants.Q8_0, 64))


@every_lane
@pytest.mark.parametrize("k", [1, 31, 67])
def test_float_rows_of_any_length(lane: str, k: int) -> None:
    run_moe_mv(Lab(lane), quants.F16, 5, k, 3, [1, 2])
    run_moe_mv(Lab(lane), quants.F16, 5, k, 3, [1, 2], form="_swiglu")
    run_mix(Lab(lane), quants.F16, 5, k, 3, [1, 2])
    run_mix(Lab(lane), quants.F16, 5, k, 3, [1, 2], shared=(quants.F16, k + 1))


# ---- moe_mv that chooses ------------------------------------------------------------------------------------

#: Experts, and the way to choose among them: one block of them, several, and a few more than a block.
CHOICES = {
    "one": (1, Router(1, scale=2.0)),
    "all": (8, Router(8)),
    "block": (256, Router(8)),
    "over": (257, Router(9, "softmax", normalised=False)),
    "many": (600, Router(32, "sigmoid")),
    "groups": (64, Router(6, "sigmoid", n_group=8, n_group_used=3)),
    "groups-many": (320, Router(6, "softmax", n_group=5, n_group_used=2)),
}


@every_lane
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("way", CHOICES)
def test_experts_that_the_kernel_chooses(lane: str, way: str, bias: bool) -> None:
    lab = Lab(lane)
    n, router = CHOICES[way]
    shared: dict[str, Any] = {"one": {"shared": lab.normal(1)}, "all": {"shared": True}}.get(way, {})
    biased = {"bias": lab.normal(n, scale=0.3), "scales": lab.normal(n)} if bias else {}
    choice = Choice(replace(router, **shared, **biased), lab.normal(1, n, scale=2.0))
    form = lab.rng.choice(["", "_relu2", "_swiglu"])
    run_moe_mv(lab, quants.Q8_0, 5, 64, n, choice, form=form, bias=bias)


@every_lane
@every_type_on(SHAPES[:1], types=TYPES)
@pytest.mark.parametrize("form", ["", "_swiglu"], ids=["store", "swiglu"])
def test_every_type_chooses(lane: str, qtype: QuantType, shape: tuple[int, int, int, list[int]], form: str) -> None:
    lab, (m, k, n, ids) = Lab(lane), shape
    run_moe_mv(lab, qtype, m, k, n, Choice(Router(len(ids)), lab.normal(1, n)), form=form)


@every_lane
def test_equal_logits_and_what_is_no_number(lane: str) -> None:
    """The lowest id comes first, also among blocks; NaN comes last; -inf and NaN have no weight."""
    lab = Lab(lane)
    ties = lab.rng.integers(-2, 1, (1, 700)).astype(np.float32)
    few = np.full((1, 300), np.nan, np.float32)
    few[0, [7, 290, 299]] = -np.inf, 0.5, 0.5
    for logits in (ties, few, np.full((1, 40), np.nan, np.float32), np.copysign(np.float32(np.inf), ties)):
        for router in (Router(9), Router(9, "sigmoid", bias=np.zeros(logits.size, np.float32))):
            run_moe_mv(lab, quants.F16, 3, 32, logits.size, Choice(router, logits), form="_swiglu")
    want = np.argsort(-ties[0], kind="stable")[:9].tolist()
    assert Chosen(lab, Choice(Router(9), ties), lab.input(ties)).ids == want


# ---- mix --------------------------------------------------------------------------------------------------


@every_lane
@every_type_on(SHAPES, types=TYPES)
def test_moe_mv_mix(lane: str, qtype: QuantType, shape: tuple[int, int, int, list[int]]) -> None:
    run_mix(Lab(lane), qtype, *shape)


@every_lane
@every_type_on(SHAPES, types=TYPES)
def test_moe_mv_mix2(lane: str, qtype: QuantType, shape: tuple[int, int, int, list[int]]) -> None:
    for shared in shared_types(qtype):
        run_mix(Lab(lane), qtype, *shape, shared=(shared, 512))


@every_lane
def test_a_mix_of_products_with_biases(lane: str) -> None:
    run_mix(Lab(lane), quants.Q5_K, 67, 512, 4, [3, 1, -1, 3], bias=True)
    run_mix(Lab(lane), quants.Q4_K, 66, 512, 4, [3, 1], shared=(quants.Q8_0, 256), bias=True, alias=True)


@every_lane
def test_a_mix_may_stand_alone(lane: str) -> None:
    run_mix(Lab(lane), quants.Q5_K, 67, 512, 4, [3, 1], alone=True)
    run_mix(Lab(lane), quants.Q4_0, 66, 512, 4, [3, 1, 0], alone=True, bias=True)


@every_lane
def test_the_residual_may_be_the_output(lane: str) -> None:
    run_mix(Lab(lane), quants.Q5_K, 67, 512, 4, [3, 1], alias=True)
    run_mix(Lab(lane), quants.Q4_K, 67, 512, 4, [3, 1], shared=(quants.Q8_0, 256), alias=True)


@pytest.mark.parametrize("lane", [MSL, "native"])  # on the CPU untouched memory costs nothing
def test_an_expert_beyond_4_gib(lane: str) -> None:
    lab = Lab(lane)
    packed = random_weights(quants.Q8_0, (4, 64), lab.rng)
    expert_bytes, x, out = 2**31, lab.normal(64), lab.output(1, 4)
    tensor = lab.device.alloc(2 * expert_bytes + packed.size)
    np.frombuffer(tensor, np.uint8)[2 * expert_bytes :] = packed.reshape(-1)
    params = {"k": 64, "m": 4, "row_bytes": packed.shape[1], "expert_bytes": expert_bytes, "n_expert": 3, "n_used": 1}
    # no bias, the product as it is, and no choice: the other fields are 0
    fields = np.zeros(1, lab.core.params_dtype("MoeMvParams"))
    for name, value in params.items():
        fields["experts"][name] = value
    w = (tensor, 0, 2 * expert_bytes + packed.size)
    x_binding = lab.input(x).binding
    bindings = [id_input(lab, [2]).binding, w, x_binding, x_binding, x_binding, out.binding, *[x_binding] * 5]
    lab.device.run([("moe_mv_q8_0", fields.tobytes(), bindings, (1, 1, 1), 64, False)])
    want = x.astype(np.float64) @ quants.dequantize(quants.Q8_0, packed, (4, 64)).astype(np.float64).T
    assert_close(out.array[0], want, 1e-6, np.abs(want).max())


@every_lane
def test_every_expert_type_has_every_kernel(lane: str) -> None:
    want = {f"{family}_{t.name}" for family in ("moe_mv", "moe_mv_gated", "moe_mv_mix") for t in TYPES}
    want |= {f"moe_mv_mix2_{t.name}_{s.name}" for t in TYPES for s in shared_types(t)}
    assert want <= set(Lab(lane).device.kernel_names())
