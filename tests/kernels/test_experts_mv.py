"""Decode of a mixture of experts: moe_topk and moe_mv of every type against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from support.kernel_lab import MSL, Lab, assert_close, assert_untouched, every_lane
from support.kernels.experts import TYPES, every_type
from support.kernels.experts_mv import F64, id_input, run_mix, run_moe_mv, shared_types
from zincmetal.check.inputs import random_weights
from zincmetal.gguf import quants
from zincmetal.gguf.quants import QuantType

#: Rows and columns of an expert's matrix, number of experts, chosen ids.
SHAPES = [
    (67, 512, 5, [4, 0, 3]),
    (1, 256, 2, [1]),
    (6, 768, 9, [8, 7, 6, 5, 0, 1, 2, 3]),
    (5, 512, 3, [2, 2, 0, 2]),
    (3, 256, 2, [1, 0, 1, 0, 1, 0, 1]),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}x{len(s[3])}of{s[2]}")


@every_lane
@every_type
@every_shape
@pytest.mark.parametrize("swiglu", [False, True], ids=["store", "swiglu"])
def test_moe_mv(lane: str, qtype: QuantType, shape: tuple[int, int, int, list[int]], swiglu: bool) -> None:
    run_moe_mv(Lab(lane), qtype, *shape, swiglu=swiglu)


@every_lane
def test_wild_ids_find_the_last_expert(lane: str) -> None:
    ids = [3, -1, 2**31 - 1, -(2**31), 2]
    run_moe_mv(Lab(lane), quants.Q4_K, 5, 256, 3, ids, swiglu=False)
    run_moe_mv(Lab(lane), quants.Q5_0, 5, 256, 3, ids, swiglu=True)
    run_mix(Lab(lane), quants.Q5_K, 5, 256, 3, ids)
    run_mix(Lab(lane), quants.Q6_K, 5, 256, 3, ids, shared=(quants.Q8_0, 64))


@every_lane
@pytest.mark.parametrize("k", [1, 31, 67])
def test_float_rows_of_any_length(lane: str, k: int) -> None:
    run_moe_mv(Lab(lane), quants.F16, 5, k, 3, [1, 2], swiglu=False)
    run_moe_mv(Lab(lane), quants.F16, 5, k, 3, [1, 2], swiglu=True)
    run_mix(Lab(lane), quants.F16, 5, k, 3, [1, 2])
    run_mix(Lab(lane), quants.F16, 5, k, 3, [1, 2], shared=(quants.F16, k + 1))


# ---- mix --------------------------------------------------------------------------------------------------


@every_lane
@every_type
@every_shape
def test_moe_mv_mix(lane: str, qtype: QuantType, shape: tuple[int, int, int, list[int]]) -> None:
    run_mix(Lab(lane), qtype, *shape)


@every_lane
@every_shape
@pytest.mark.parametrize(
    "types", [(q, s) for q in TYPES for s in shared_types(q)], ids=lambda t: f"{t[0].name}-{t[1].name}"
)
def test_moe_mv_mix2(lane: str, types: tuple[QuantType, QuantType], shape: tuple[int, int, int, list[int]]) -> None:
    run_mix(Lab(lane), types[0], *shape, shared=(types[1], 512))


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
    fields = np.zeros(1, lab.core.params_dtype("MoeParams"))
    for name, value in params.items():
        fields[name] = value
    w = (tensor, 0, 2 * expert_bytes + packed.size)
    bindings = [id_input(lab, [2]).binding, w, lab.input(x).binding, out.binding]
    lab.device.run([("moe_mv_q8_0", fields.tobytes(), bindings, (1, 1, 1), 64, False)])
    want = x.astype(np.float64) @ quants.dequantize(quants.Q8_0, packed, (4, 64)).astype(np.float64).T
    assert_close(out.array[0], want, 1e-6, np.abs(want).max())


# ---- routing ----------------------------------------------------------------------------------------------


def run_topk(
    lab: Lab, logits: NDArray[np.float32], n_used: int, n_tokens: int, shared: NDArray[np.float32] | None, scale: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Runs moe_topk; returns the ids and weights of the step's rows. Fails if another row was written."""
    rows, n_expert = logits.shape
    ids, weights = lab.output(rows, n_used, dtype=np.int32, align=4), lab.output(rows, n_used + 1, align=4)
    params = {"n_expert": n_expert, "n_used": n_used, "has_shared": int(shared is not None), "scale": scale}
    logit_input = lab.input(logits, align=4)
    bindings = [lab.step(n_tokens), logit_input, logit_input if shared is None else lab.input(shared), ids, weights]
    lab.run(f"moe_topk_{256 if n_expert <= 256 else 1024}", params, "TopKParams", bindings, (rows,), 32)
    assert_untouched(ids.array[n_tokens:])
    assert_untouched(weights.array[n_tokens:])
    return ids.array[:n_tokens], weights.array[:n_tokens]


def softmax(x: F64) -> F64:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


TOP_K_SHAPES = [(8, 2), (8, 8), (1, 1), (33, 5), (60, 4), (128, 8), (256, 8), (257, 32), (1000, 10), (1024, 32)]


@every_lane
@pytest.mark.parametrize("has_shared", [False, True], ids=["routed", "shared"])
@pytest.mark.parametrize(("n_expert", "n_used"), TOP_K_SHAPES)
def test_topk(lane: str, n_expert: int, n_used: int, has_shared: bool) -> None:
    lab = Lab(lane)
    logits, shared = lab.normal(7, n_expert, scale=3.0), lab.normal(7, scale=3.0)
    logits[5:] = shared[5:] = np.nan  # rows past the step's tokens must not be read
    ids, weights = run_topk(lab, logits, n_used, 5, shared if has_shared else None, 2.5)
    probabilities = softmax(logits[:5].astype(np.float64))
    order = np.argsort(-logits[:5], axis=1, kind="stable")[:, :n_used]
    assert np.array_equal(ids, order)
    chosen = np.take_along_axis(probabilities, order, axis=1)
    assert_close(weights[:, :n_used], 2.5 * chosen / chosen.sum(axis=1, keepdims=True), 1e-6)
    want = 1 / (1 + np.exp(-shared[:5].astype(np.float64))) if has_shared else np.zeros(5)
    assert_close(weights[:, n_used], want, 1e-6, 1.0)


@every_lane
def test_topk_prefers_the_lowest_id(lane: str) -> None:
    lab = Lab(lane)
    logits = lab.rng.integers(-2, 2, (6, 200)).astype(np.float32)
    logits[0], logits[1] = 0.0, np.where(np.arange(200) % 2, 0.0, -0.0)
    logits[2] = np.nextafter(
        np.float32(1.5), lab.rng.choice(np.array([0, 2], np.float32), 200)
    )  # floats two steps apart
    logits[3] = np.where(lab.rng.random(200) < 0.5, np.float32(-1.5), np.nextafter(np.float32(-1.5), np.float32(0)))
    ids, weights = run_topk(lab, logits, 32, 6, None, 1.0)
    assert np.array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :32])
    assert_close(weights[:2, :32], np.full((2, 32), 1 / 32), 1e-6)


@every_lane
def test_topk_takes_nan_last_and_gives_it_nothing(lane: str) -> None:
    lab = Lab(lane)
    logits = lab.normal(3, 40)
    logits[0, :35], logits[1, ::2], logits[2, 3:] = np.nan, -np.nan, -np.inf
    ids, weights = run_topk(lab, logits, 8, 3, None, 1.0)
    numbers = np.argsort(-logits[0, 35:], kind="stable") + 35
    assert np.array_equal(ids[0], [*numbers, 0, 1, 2])
    assert np.array_equal(ids[1], 1 + 2 * np.argsort(-logits[1, 1::2], kind="stable")[:8])
    assert np.array_equal(ids[2], [*np.argsort(-logits[2, :3], kind="stable"), 3, 4, 5, 6, 7])
    assert_close(weights[0, :5], softmax(logits[0, numbers].astype(np.float64)), 1e-6)
    assert (weights[0, 5:8] == 0).all()
    assert (weights[2, 3:8] == 0).all()
    assert np.isfinite(weights).all()


@every_lane
def test_topk_of_logits_whose_exponential_overflows(lane: str) -> None:
    lab = Lab(lane)
    logits = lab.normal(2, 64) + np.array([[3e38], [-500.0]], np.float32)
    ids, weights = run_topk(lab, logits, 6, 2, np.array([-300.0, 300.0], np.float32), 1.0)
    chosen = np.take_along_axis(logits, ids, axis=1).astype(np.float64)
    assert_close(weights[:, :6], softmax(chosen), 1e-6)
    assert weights[0, 6] < 1e-30
    assert weights[1, 6] == 1.0


@every_lane
def test_every_expert_type_has_every_kernel(lane: str) -> None:
    want = {f"{family}_{t.name}" for family in ("moe_mv", "moe_mv_swiglu", "moe_mv_mix") for t in TYPES}
    want |= {f"moe_mv_mix2_{t.name}_{s.name}" for t in TYPES for s in shared_types(t)} | {
        "moe_topk_256",
        "moe_topk_1024",
    }
    assert want <= set(Lab(lane).device.kernel_names())
