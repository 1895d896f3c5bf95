"""How the keys of a mixture are read: scores, groups, the shared expert, blocks without experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from support.model_files import with_keys
from support.paths import DATA
from zincmetal import gguf, models
from zincmetal.config import ModelConfig, Router
from zincmetal.errors import GGUFError


@pytest.fixture(scope="module")
def glm() -> Iterator[gguf.File]:
    """Opens a file of 3 blocks, the first of them dense, and 6 experts."""
    with gguf.open(DATA / "families" / "glm4moe.gguf") as file:
        yield file


def configured(file: gguf.File, **keys: Any) -> ModelConfig:
    return models.configure(with_keys(file, {f"glm4moe.{name}": value for name, value in keys.items()}))


def router(file: gguf.File, **keys: Any) -> Router:
    experts = configured(file, **keys).experts
    assert experts
    return experts.router


def test_the_file_says_how_experts_are_chosen(glm):
    assert router(glm) == Router("sigmoid", normalised=True)
    groups = {"expert_group_count": 3, "expert_group_used_count": 2}
    want = Router("softmax", normalised=False, n_group=3, n_group_used=2, scale=2.5)
    keys = {"expert_gating_func": 1, "expert_weights_norm": False, "expert_weights_scale": 2.5}
    assert router(glm, **keys, **groups) == want
    assert router(glm, expert_gating_func=3).score == "logit"


@pytest.mark.parametrize("value", [0, None])
def test_without_a_key_the_family_does(glm, value):
    assert router(glm, expert_gating_func=value).score == "sigmoid"
    assert router(glm, expert_weights_scale=value).scale == 1.0
    assert router(glm, expert_group_count=value, expert_group_used_count=value).n_group == 1
    assert not router(glm, expert_weights_norm=None).normalised
    with gguf.open(DATA / "qwen3moe-q4_k_m.gguf") as file:
        experts = models.configure(file).experts
    assert experts
    assert experts.router == Router()


def test_all_groups_are_no_groups(glm):
    assert router(glm, expert_group_count=3, expert_group_used_count=3) == router(glm)
    assert router(glm, expert_group_count=3, expert_group_used_count=0) == router(glm)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"expert_group_count": 4, "expert_group_used_count": 2}, "4 groups cannot divide 6 experts"),
        ({"expert_group_count": 6, "expert_group_used_count": 6}, "6 groups cannot divide 6 experts"),
        ({"expert_group_count": 3, "expert_group_used_count": 4}, "4 of 3 groups"),
        ({"expert_group_count": 3, "expert_group_used_count": 1, "expert_used_count": 3}, "1 groups have 2 experts"),
        ({"leading_dense_block_count": 3}, "3 leaves no block of 3 with experts"),
    ],
)
def test_keys_that_do_not_fit_each_other(keys, named, glm):
    with pytest.raises(GGUFError, match=named):
        configured(glm, **keys)


def test_the_first_blocks_have_no_experts(glm):
    layers = configured(glm).layers
    assert [(layer.mixture, layer.n_ff) for layer in layers] == [(False, 256), (True, 0), (True, 0)]
    widths = np.array([100, 200, 300], np.uint32)
    layers = configured(glm, leading_dense_block_count=2, feed_forward_length=widths).layers
    assert [(layer.mixture, layer.n_ff) for layer in layers] == [(False, 100), (False, 200), (True, 0)]


def test_the_width_of_the_shared_expert(glm):
    def width(**keys: Any) -> int:
        experts = configured(glm, **keys).experts
        assert experts
        assert not experts.shared_gated
        return experts.n_ff_shared

    assert width() == 64  # of one expert
    assert width(expert_shared_count=2) == 128
    assert width(expert_shared_feed_forward_length=96) == 96
    assert width(expert_shared_count=None) == 64  # of its tensor


def test_llama_cpps_saver_does_not_know_what_families_always_do():
    with gguf.open(DATA / "qwen3moe-q4_k_m.gguf") as file:
        saved = {"wkv.head_size": 0, "expert_weights_norm": False, "expert_gating_func": 0}
        experts = models.configure(with_keys(file, {f"qwen3moe.{k}": v for k, v in saved.items()})).experts
    assert experts
    assert experts.router == Router()
