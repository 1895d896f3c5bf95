"""Sizes of latent attention, and the scale of its scores under YaRN."""

from __future__ import annotations

import math

import pytest

from support.model_files import with_keys
from support.paths import DATA
from zincmetal import gguf, models
from zincmetal.config import ModelConfig
from zincmetal.device import backend
from zincmetal.errors import GGUFError
from zincmetal.gguf.quants import by_name
from zincmetal.graph.ops import State
from zincmetal.plan.addresses import Room, state_sizes
from zincmetal.plan.choices import KV_TYPES
from zincmetal.plan.target import Target

FILE = DATA / "families" / "deepseek2-glm47flash.gguf"
YARN = {"type": "yarn", "factor": 40.0, "original_context_length": 64, "yarn_log_multiplier": 0.0707}


def configured(**scaling: object) -> ModelConfig:
    keys = {f"deepseek2.rope.scaling.{name}": value for name, value in scaling.items()}
    with with_keys(gguf.open(FILE), keys) as file:
        return models.configure(file)


def test_yarn_scales_scores_and_not_what_rotates() -> None:
    """DeepSeek's mscale² with mscale_all_dim = 0.707: cos and sin keep their size."""
    cfg, plain = configured(**YARN), configured()
    mscale = 0.1 * 0.707 * math.log(40) + 1
    assert cfg.attention_scale == pytest.approx(plain.attention_scale * mscale**2, rel=1e-6)
    rope = cfg.layers[0].rope
    assert rope is not None
    assert rope.magnitude == 1.0


def test_yarn_needs_its_multiplier() -> None:
    with pytest.raises(GGUFError, match=r"deepseek2.rope.scaling.yarn_log_multiplier' is missing"):
        configured(**{**YARN, "yarn_log_multiplier": None})


@pytest.mark.parametrize("kv", KV_TYPES)
def test_a_layer_has_one_cache_for_all_heads(kv: str) -> None:
    cfg, target = configured(), Target.of_kernels(backend.load("cpu"))
    sizes = state_sizes(cfg, target, kv, Room(3, 0, 1))
    width, n_rot = cfg.layers[0].head_dim, cfg.layers[0].n_rot
    assert cfg.layers[0].latent is not None
    assert width == cfg.layers[0].latent.n_latent + n_rot
    caches = {state: nbytes for state, nbytes in sizes.items() if state.layer is not None}
    assert caches == {State("k_cache", i): 3 * target.page * by_name(kv).row_bytes(width) for i in range(cfg.n_layer)}
