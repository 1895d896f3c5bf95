"""Files of families with a key or a tensor that cannot be: typed errors that name it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.model_files import with_keys
from support.paths import DATA
from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.errors import GGUFError, UnsupportedModelError
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target

FAMILIES = DATA / "families"
TARGET = Target.of_kernels(backend.load("cpu"))

LATENT = [
    *(("kv_lora_rank", value) for value in (None, 0, 64.0)),
    *(("key_length_mla", value) for value in (None, 0, "64")),
    *(("value_length_mla", value) for value in (None, 0)),
    *(("q_lora_rank", value) for value in (-1, 1.5)),
    ("key_length", 64),
    ("value_length", 96),
    ("head_count_kv", 4),
]
KEYS: list[tuple[str, str, Any]] = [
    *(("mistral3", "mistral3.attention.temperature_scale", value) for value in (-0.1, math.nan, "1")),
    ("mistral3", "mistral3.rope.scaling.yarn_log_multiplier", -1.0),
    *(("granite", "granite.residual_scale", value) for value in (-0.2, math.nan, "1", True)),
    *(("granite", "granite.logit_scale", value) for value in (-8.0, math.inf)),
    ("granite", "granite.rope.scaling.finetuned", 2),
    ("muse-glimmer", "muse-glimmer.final_logit_softcapping", -20.0),
    ("muse-glimmer", "muse-glimmer.attention.sliding_window_pattern", [True]),
    *(("lfm2", "lfm2.shortconv.l_cache", value) for value in (None, 0, 1, 9, 3.0)),
    ("lfm2", "lfm2.attention.head_count_kv", [0, 0, 0, 0, 0]),
    ("lfm2moe", "lfm2moe.leading_dense_block_count", 4),
    ("lfm2moe", "lfm2moe.expert_gating_func", 9),
    ("phi3-longrope", "phi3.rope.scaling.factor", 4.0),
    *(("deepseek2-glm47flash", f"deepseek2.attention.{key}", value) for key, value in LATENT),
    *(("deepseek2-glm47flash", "deepseek2.rope.dimension_count", value) for value in (None, 31, 64)),
    ("deepseek2-glm47flash", "deepseek2.attention.causal", False),
    ("phi3-longrope", "phi3.rope.scaling.attn_factor", 0.0),
    *(("glm4moe", "glm4moe.expert_gating_func", value) for value in (4, -1, "sigmoid")),
    ("glm4moe", "glm4moe.expert_weights_norm", 2),
    ("glm4moe", "glm4moe.expert_group_count", 4),
    ("glm4moe", "glm4moe.expert_group_used_count", 2),
    ("glm4moe", "glm4moe.expert_shared_count", -1),
    ("glm4moe", "glm4moe.leading_dense_block_count", 3),
]


LATENT_TENSORS = [
    *((part, None) for part in ("q_a", "q_a_norm", "q_b", "kv_a_mqa", "kv_a_norm", "k_b", "v_b")),
    ("k_b", (4, 64, 64)),
    ("k_b", (256, 32)),
    ("v_b", (4, 64, 64)),
    ("kv_a_mqa", (64, 128)),
    ("q_b", (384, 96)),
]


def altered(name: str, keys: dict[str, Any], tensors: dict[str, tuple[int, ...] | None]) -> gguf.File:
    """Opens a reference file with other keys and shapes; None takes one away."""
    file = with_keys(gguf.open(FAMILIES / f"{name}.gguf"), keys)
    for tensor, shape in tensors.items():
        info = file.tensors.pop(tensor)
        if shape:
            file.tensors[tensor] = replace(info, shape=shape, nbytes=info.type.nbytes(shape))
    return file


@pytest.mark.parametrize(("name", "key", "value"), KEYS, ids=lambda x: str(x))
def test_a_wrong_value_is_refused_in_its_name(name: str, key: str, value: Any) -> None:
    keys = {key: value}
    if key == "phi3.rope.scaling.factor":
        keys["phi3.rope.scaling.type"] = "longrope"
    with altered(name, keys, {}) as file, pytest.raises((GGUFError, UnsupportedModelError), match=key):
        Planner(file, TARGET)


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("phi3-longrope", "rope_factors_long.weight", None),
        ("phi3-longrope", "rope_factors_short.weight", None),
        ("phi3-longrope", "rope_factors_long.weight", (8,)),
        ("phi3-longrope", "blk.1.attn_qkv.weight", (352, 128)),
        ("phi3-longrope", "blk.1.ffn_up.weight", (256, 128)),
        ("llama-llama3rope", "rope_freqs.weight", (15,)),
        ("lfm2", "token_embd_norm.weight", None),
        ("lfm2", "blk.0.shortconv.conv.weight", (128, 4)),
        ("lfm2", "blk.0.shortconv.in_proj.weight", (256, 128)),
        ("lfm2", "blk.2.attn_q_norm.weight", None),
        ("lfm2moe", "blk.1.exp_probs_b.bias", (5,)),
        ("lfm2moe", "blk.1.ffn_gate_exps.weight", (6, 32, 128)),
        ("muse-glimmer", "blk.3.attn_gate.weight", None),
        ("muse-glimmer", "blk.3.attn_gate.weight", (8, 128)),
        ("seed_oss", "blk.0.attn_k.bias", None),
        ("smollm3", "blk.3.attn_q.weight", (96, 128)),
        ("glm4moe", "blk.1.exp_probs_b.bias", (5,)),
        ("glm4moe", "blk.1.ffn_up_shexp.weight", (32, 128)),
        ("glm4moe", "blk.2.attn_v.bias", (32,)),
        ("minimax-m2", "blk.0.attn_q_norm.weight", (32,)),
        ("minimax-m2", "blk.1.attn_k_norm.weight", None),
        ("gpt-oss", "blk.0.attn_sinks.weight", (8,)),
        ("gpt-oss", "blk.3.attn_sinks.weight", None),
        ("gpt-oss", "blk.1.ffn_gate_exps.bias", (4, 64)),
        ("gpt-oss", "blk.1.ffn_down_exps.bias", (128,)),
        *(("gpt-oss", f"blk.2.ffn_{part}.bias", None) for part in ("gate_inp", "gate_exps", "up_exps", "down_exps")),
        ("glm4moe", "blk.1.exp_probs_b.bias", None),
        ("lfm2moe", "blk.1.exp_probs_b.bias", None),
        ("minimax-m2", "blk.1.exp_probs_b.bias", None),
        ("nemotron_h_moe", "blk.4.exp_probs_b.bias", None),
        ("gpt-oss", "blk.2.attn_k.bias", None),
        *(("deepseek2-glm47flash", f"blk.1.attn_{part}.weight", shape) for part, shape in LATENT_TENSORS),
    ],
)
def test_a_wrong_tensor_is_refused_in_its_name(name: str, tensor: str, shape: tuple[int, ...] | None) -> None:
    with altered(name, {}, {tensor: shape}) as file, pytest.raises((GGUFError, UnsupportedModelError), match=tensor):
        Planner(file, TARGET)


def test_a_selection_bias_may_be_absent_where_not_all_models_have_one() -> None:
    """DeepSeek-V2 has none, V3 has one: the same family."""
    keys, gone = {"deepseek2.expert_gating_func": 2}, {f"blk.{i}.exp_probs_b.bias": None for i in (1, 2)}
    with altered("deepseek2-glm47flash", keys, gone) as file:
        planner = Planner(file, TARGET)
        assert planner.config.experts
        assert planner.config.experts.router.score == "sigmoid"
        assert planner.plan().dispatches


@pytest.mark.parametrize("size", [100, 544])
def test_latent_vectors_that_no_kernel_takes(size: int) -> None:
    prefix = "deepseek2.attention"
    keys = {f"{prefix}.kv_lora_rank": size, f"{prefix}.value_length": size, f"{prefix}.key_length": size + 32}
    wanted = rf"{prefix}.kv_lora_rank is {size}; multiples of 32 up to 512 are supported with latent attention"
    with altered("deepseek2-glm47flash", keys, {}) as file, pytest.raises(UnsupportedModelError, match=wanted):
        Planner(file, TARGET)


def test_groups_that_are_ranked_by_their_best_expert() -> None:
    """DeepSeek-V2's choice is another one than that of its successors."""
    groups = {"expert_group_count": 3, "expert_group_used_count": 2, "expert_gating_func": 1}
    keys = {f"deepseek2.{name}": n for name, n in groups.items()}
    with (
        altered("deepseek2-glm47flash", keys, {}) as file,
        pytest.raises(UnsupportedModelError, match=r"deepseek2.expert_group_count is 3 with softmax"),
    ):
        Planner(file, TARGET)


def test_latent_attention_of_old_converters_is_named() -> None:
    keys = {"deepseek2.attention.key_length_mla": None}
    with (
        altered("deepseek2-glm47flash", keys, {}) as file,
        pytest.raises(UnsupportedModelError, match=r"in one tensor attn_kv_b. Convert it again"),
    ):
        Planner(file, TARGET)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_divisors_of_frequencies_are_positive(wrong: float, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes((FAMILIES / "llama-llama3rope.gguf").read_bytes())
    with gguf.open(path) as file:
        offset = file.tensors["rope_freqs.weight"].offset
    with path.open("r+b") as raw:
        raw.seek(offset + 4)
        raw.write(np.float32(wrong).tobytes())
    with gguf.open(path) as file, pytest.raises(GGUFError, match=r"rope_freqs.weight has values that are not positive"):
        Planner(file, TARGET)


def test_divisors_are_counted_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def data(file: gguf.File, name: str) -> None:
        raise AssertionError(f"{name} is read, which may be a hole of any size")

    with gguf.open(FAMILIES / "llama-llama3rope.gguf") as file:
        tensor = file.tensors["rope_freqs.weight"]
        many = replace(tensor, shape=(1 << 33,), nbytes=tensor.type.nbytes((1 << 33,)))
        table = {**file.tensors, tensor.name: many}
        with_hole = gguf.File(file.path, file.parts, file.metadata, table)
        monkeypatch.setattr(gguf.File, "data", data)
        with pytest.raises(GGUFError, match=r"rope_freqs.weight has 8589934592 values, not 16"):
            Planner(with_hole, TARGET)
