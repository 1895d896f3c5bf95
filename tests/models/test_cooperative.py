"""Whole models whose prompts meet Metal 4's tensor operations, on the CPU's stand-in, beside simdgroup matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from support.paths import DATA
from support.reference_models import load, log_softmax
from zincmetal.plan.target import Target

FILES = {
    "llama-q4_k_m": {"mul_mm_coop_", "mul_mm_coop_add_", "mul_mm_coop_swiglu_"},
    "qwen35moe-q4k-q5k-q8": {"mul_mm_coop_", "mul_mm_coop_add_", "moe_mm_coop_", "moe_mm_coop_gated_"},
    "families/deepseek2-glm47flash": {"mul_heads_mm_coop_", "moe_mm_coop_gated_"},
}


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_simdgroup_matrices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operands are the same halves. Sums in another order differ by roundings of float32."""
    path = DATA / f"{name}.gguf"
    ids = np.load(path.with_suffix(".npz"))["tokens"][:70]
    with load(path, "msl", monkeypatch, kv="f32", context=128) as model:
        usual = log_softmax(model.logits(ids))
    of = Target.of
    monkeypatch.setattr(Target, "of", classmethod(lambda _, *given: replace(of(*given), cooperative=True)))
    with load(path, "msl", monkeypatch, kv="f32", context=128) as model:
        got = log_softmax(model.logits(ids))
        made = model.engine.programs.made.values()
        kernels = {d.launch.kernel for program in made for d in program.plan.dispatches}
    assert all(any(k.startswith(family) for k in kernels) for family in FILES[name])
    assert np.abs(got - usual).max() < 1e-3
