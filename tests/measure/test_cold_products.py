"""Exact shapes: products are right on every split, and their recordings read every weight from memory."""

from __future__ import annotations

import numpy as np
import pytest

from zincmetal.device import backend
from zincmetal.gguf import quants
from zincmetal.gguf.random_weights import random_weights
from zincmetal.measure.cold import MIN_DISPATCHES, Lab, Loaded
from zincmetal.measure.products import N_USED, RESIDUAL, X, down_mix, gate_up, linear, stack
from zincmetal.plan.plan import ARENA
from zincmetal.plan.tuning import Split

Q8_0, Q4_K, Q5_K = quants.Q8_0, quants.Q4_K, quants.Q5_K

SMALL = [
    linear(Q8_0, 67, k=256),
    linear(Q8_0, 67, k=256, add=True),
    linear(Q8_0, 67, 33, k=256),
    stack(Q8_0, 67, 33, k=256),
    gate_up(Q4_K, 24, 35, 256),
    down_mix(Q5_K, 24, 67, 256),
    down_mix(Q5_K, 24, 67, 256, Q8_0),
]
every_product = pytest.mark.parametrize("product", SMALL, ids=lambda p: p.id)


@pytest.fixture(scope="module")
def lab() -> Lab:
    lab = Lab(*backend.open_device("cpu"))
    lab.cold_bytes = 1 << 20
    return lab


def reference(loaded: Loaded, turn: int):
    """Computes the outputs of one product in float64."""
    rng = np.random.default_rng(7)
    weights = [
        quants.dequantize(w.type, random_weights(w.type, w.shape, rng), w.shape).astype(np.float64)
        for w in loaded.product.weights
    ]
    x, residual, x_shared, mix = (
        np.asarray(loaded.activation(name), np.float64) if loaded.has(name) else None
        for name in (X, RESIDUAL, "x_shared", "expert_weights")
    )
    if weights[0].ndim == 2:
        return np.concatenate([w @ x + (0 if residual is None else residual) for w in weights])
    ids = loaded.activation(f"ids.{turn}")
    if "gated" in loaded.product.kernel:
        gate, up = (np.einsum("emk,k->em", w[ids], x) for w in weights)
        return (gate / (1 + np.exp(-gate)) * up).reshape(-1)
    out = residual + np.einsum("e,emk,ek->m", mix[:N_USED], weights[0][ids], x.reshape(N_USED, -1))
    return out + mix[N_USED] * (weights[1] @ x_shared) if len(weights) > 1 else out


@every_product
def test_products_are_right(lab, product):
    loaded = Loaded(lab, product)
    got = loaded.outputs()
    want = reference(loaded, turn=0)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@every_product
def test_a_recording_goes_round_all_weights(lab, product):
    """Every byte of weights is read equally often, and not again before all other bytes."""
    loaded = Loaded(lab, product)
    recording = loaded.recording()
    places = loaded.copies * product.turns()
    assert recording.n >= MIN_DISPATCHES
    assert recording.n % places == 0
    per_product = len(recording.dispatches) // recording.n
    seen = [
        tuple((r.buffer, r.offset) for r in d.regions if r.buffer == "weights") + ids(d)
        for d in recording.plan.dispatches
    ]
    assert len(set(seen)) == places * per_product
    assert seen[: places * per_product] == seen[-places * per_product :]
    assert recording.nbytes * places == loaded.copies * sum(w.type.nbytes(w.shape) for w in product.weights) + (
        loaded.copies * (product.turns() - 1) * shared_bytes(product)
    )


def ids(d):
    return tuple(a.operand.name for a in d.launch.args if a.operand.name.startswith("ids."))


def shared_bytes(product):
    return sum(w.type.nbytes(w.shape) for w in product.weights if w.name == "shared")


@every_product
def test_turns_have_experts_of_their_own(lab, product):
    loaded = Loaded(lab, product)
    chosen = [loaded.activation(f"ids.{t}") for t in range(product.turns() if product.turns() > 1 else 0)]
    flat = np.concatenate(chosen) if chosen else np.arange(0)
    assert len(set(flat.tolist())) == flat.size
    assert flat.size == (product.weights[0].shape[0] if chosen else 0)


@every_product
def test_barriers_are_those_of_a_plan(lab, product):
    """A product waits for the one before it; the dispatches of two matrices do not wait for each other."""
    dispatches = Loaded(lab, product).recording().plan.dispatches
    per_product = len(product.ops(0, 0))
    assert [d.barrier for d in dispatches[:4]] == [i > 0 and i % per_product == 0 for i in range(4)]
    assert any(r.buffer == ARENA for r in dispatches[0].regions)


@every_product
@pytest.mark.parametrize("threads", [32, 96, 256])
def test_outputs_do_not_depend_on_the_split(lab, product, threads):
    """For every number of rows that this build has."""
    loaded = Loaded(lab, product)
    want = loaded.usual_outputs
    for rows in (None, *lab.row_variants(product.kernel)):
        got = loaded.outputs(Split(rows, threads))
        if lab.may_round_otherwise(product.kernel):
            assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
        else:
            assert np.array_equal(got, want)
