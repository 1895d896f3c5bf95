"""Experts that the host routes, since no batched kernel takes their type: correct, counted and reported."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import zincmetal
from support.paths import DATA
from support.reference_models import NOISE, kl
from support.steps_lab import StepsLab
from zincmetal.device import backend
from zincmetal.gguf.quants import SUPPORTED
from zincmetal.plan.chunks import ONE_ROW

# Gate and up are q4_k in both; down is q4_k, q5_k or q6_k.
PATHS = [DATA / "qwen35moe-q4k-q5k-q8.gguf", DATA / "qwen3moe-q4_k_m.gguf"]


@pytest.fixture(params=[{"q4_k"}, {"q4_k", "q5_k", "q6_k"}], ids=["gate-up", "all"])
def unbatched(request, monkeypatch):
    """These types as if no batched kernel took them."""
    core = backend.load("cpu")
    batched = tuple(name for name in core.expert_types() if name not in request.param)
    monkeypatch.setattr(core, "expert_types", lambda: batched)


def test_the_types_without_a_batched_kernel_are_those_named():
    core = backend.load("cpu")
    names = set(core.Device(threads=1).kernel_names())
    types = {t.name for t in SUPPORTED}
    assert {t for t in types if f"moe_mm_{t}" in names} == set(core.expert_types())
    assert {t for t in types if f"moe_mv_{t}" in names} == set(core.expert_types())


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_distributions_are_as_exact(path, unbatched, caplog):
    exact = np.load(path.with_suffix(".npz"))
    ids = exact["tokens"][:33].tolist()
    with caplog.at_level(logging.WARNING, "zincmetal"), zincmetal.load(path, device="cpu", kv="f32") as model:
        logits = model.logits(ids)
        with model.session() as session:
            assert session.prefill(ids[:-1]) == logits[-2].argmax()
            assert session.decode(ids[-1]) == logits[-1].argmax()
            assert np.abs(session.last_logits() - logits[-1]).max() < 1e-3
        profile = model.profile()
    lengths = exact["prefix_lengths"]
    shown = lengths <= len(ids)
    assert kl(exact["logprobs"][shown], logits[lengths[shown] - 1]).max() <= NOISE
    assert "a type with no batched expert kernel" in profile["host_routed_why"]
    assert profile["host_routed_why"] in caplog.text
    counted = profile["host_routed"]
    assert profile["shared_command_steps"] == 0
    assert counted["steps"] == 4  # the prompt's last token is a step of its own
    # Every product of experts, and what lies before it, is a command buffer.
    assert counted["command_buffers"] > 3 * 2 * model.config.n_layer


def test_experts_with_biases_and_an_activation(monkeypatch):
    """The products that the host starts add the biases; what follows them is a dispatch of its own."""
    core = backend.load("cpu")
    batched = tuple(name for name in core.expert_types() if name != "mxfp4")
    monkeypatch.setattr(core, "expert_types", lambda: batched)
    path = DATA / "families" / "gpt-oss.gguf"
    exact = np.load(path.with_suffix(".npz"))
    with zincmetal.load(path, device="cpu", kv="f32", context=64) as model:
        logits = model.logits(exact["tokens"][:33].tolist())
        assert model.profile()["host_routed"]["steps"] > 0
    lengths = exact["prefix_lengths"]
    shown = lengths <= 33
    assert kl(exact["logprobs"][shown], logits[lengths[shown] - 1]).max() <= NOISE


def test_generation_is_the_same(unbatched, monkeypatch):
    path = PATHS[0]
    ids = np.load(path.with_suffix(".npz"))["tokens"][:9].tolist()
    with zincmetal.load(path, device="cpu", kv="f32", threads=2) as model:
        assert model.profile()["host_routed_why"]
        routed = model.generate(ids, max_tokens=12).tokens
        sampled = model.generate(ids, max_tokens=6, temperature=1.0, top_k=5, seed=1).tokens
    monkeypatch.undo()
    with zincmetal.load(path, device="cpu", kv="f32", threads=2) as model:
        assert model.profile()["host_routed_why"] is None
        assert model.generate(ids, max_tokens=12).tokens == routed
        assert model.generate(ids, max_tokens=6, temperature=1.0, top_k=5, seed=1).tokens == sampled


def test_an_interrupt_between_two_parts_leaves_nothing_in_flight(unbatched, monkeypatch):
    """The step was described, and its number may have been counted. The next step is as if it had never been."""
    ids = np.load(PATHS[-1].with_suffix(".npz"))["tokens"][:9].tolist()
    lab = StepsLab(PATHS[-1], kv="f32", context=64)
    want = lab.generate(0, ids, 6)
    compiled = lab.programs.get(ONE_ROW, 0).compiled
    run, left = compiled.run_section, [3]

    def interrupted(part, n_tokens):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        run(part, n_tokens)

    monkeypatch.setattr(compiled, "run_section", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.step([(0, [5])])
    assert lab.steps.in_flight == 0
    monkeypatch.undo()
    assert lab.generate(1, ids, 6) == want
    lab.close()


def test_counters_outlive_a_larger_arena(unbatched):
    with zincmetal.load(PATHS[0], device="cpu", kv="f32") as model:
        model.generate([1, 2, 3], max_tokens=3)
        before = model.profile()["host_routed"]["steps"]
        model.generate(list(range(100)), max_tokens=1)
        assert model.profile()["host_routed"]["steps"] > before > 0
