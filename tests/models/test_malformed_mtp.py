"""Files whose block that drafts cannot be: errors that name the key or the tensor. Without drafts they are run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from support.model_files import with_keys
from support.paths import DATA
from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.errors import GGUFError, UnsupportedModelError, UsageError
from zincmetal.graph.ops import Weight
from zincmetal.hub.catalogue import ENTRIES
from zincmetal.hub.shape import stand_in
from zincmetal.plan.choices import DRAFT
from zincmetal.plan.chunks import chunk_shape, decode_shape, verify_shape
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target

TARGET = Target.of_kernels(backend.load("cpu"))
KEY, BLOCK = "qwen35.nextn_predict_layers", "blk.4"
PARTS = ("nextn.eh_proj", "nextn.enorm", "nextn.hnorm", "attn_k", "attn_q_norm", "attn_output", "ffn_down", "attn_norm")
ONE_MORE = {"nextn.embed_tokens": "token_embd", "nextn.shared_head_head": "output"}


def opened(keys: dict[str, Any] | None = None) -> gguf.File:
    return with_keys(gguf.open(DATA / "families" / "qwen35-mtp.gguf"), keys or {})


@pytest.mark.parametrize("value", [-1, 5, 999, "1", 1.5, True])
@pytest.mark.parametrize("drafts", [False, True])
def test_a_wrong_number_of_blocks_is_refused(value: Any, drafts: bool) -> None:
    with opened({KEY: value}) as file, pytest.raises((GGUFError, UnsupportedModelError), match=KEY):
        Planner(file, TARGET, drafts=drafts)


@pytest.mark.parametrize(
    ("value", "words"), [(None, "no block that drafts, as"), (0, "no block"), (2, "with one block")]
)
def test_a_file_without_one_block_is_refused_by_its_key(value: Any, words: str) -> None:
    with opened({KEY: value}) as file, pytest.raises(UsageError, match=KEY) as refused:
        Planner(file, TARGET, drafts=True)
    assert words in str(refused.value)
    assert "choose 'lookup' or a draft model" in str(refused.value)


def test_a_family_without_such_blocks_is_refused() -> None:
    with gguf.open(DATA / "llama-q4_k_m.gguf") as file, pytest.raises(UsageError, match="no llama model has a block"):
        Planner(file, TARGET, drafts=True)


def test_heads_of_the_block_count_where_it_drafts() -> None:
    """It attends, whatever the others do."""
    for heads, fits in (([0, 0, 0, 2, 2], True), ([0, 0, 0, 2, 0], False)):
        keys = {"qwen35.attention.head_count_kv": np.array(heads), "qwen35.attention.recurrent_layers": None}
        with opened(keys) as file:
            Planner(file, TARGET)
            if fits:
                assert Planner(file, TARGET, drafts=True).config.layers[-1].n_head_kv == 2
                continue
            with pytest.raises(GGUFError, match=r"attention\.head_count_kv.*block 4"):
                Planner(file, TARGET, drafts=True)


def test_the_block_attends_where_the_others_say_nothing() -> None:
    """By the interval alone it would be recurrent."""
    with opened({"qwen35.attention.recurrent_layers": None}) as file:
        mixers = [layer.mixer for layer in Planner(file, TARGET, drafts=True).config.layers]
    assert mixers == ["recurrent"] * 3 + ["attention"] * 2


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_wrong_tensor_is_refused_by_its_name(part: str, change: str) -> None:
    name = f"{BLOCK}.{part}.weight"
    with opened() as file:
        info = file.tensors.pop(name)
        if change == "shape":
            shape = (*info.shape[:-1], 2 * info.shape[-1])
            file.tensors[name] = replace(info, shape=shape, nbytes=info.type.nbytes(shape))
        Planner(file, TARGET)
        with pytest.raises(UnsupportedModelError, match=name):
            Planner(file, TARGET, drafts=True)


def test_a_tensor_that_the_block_does_not_read_is_refused() -> None:
    with opened() as file:
        name = f"{BLOCK}.ffn_extra.weight"
        file.tensors[name] = replace(file.tensors[f"{BLOCK}.ffn_up.weight"], name=name)
        Planner(file, TARGET)
        with pytest.raises(UnsupportedModelError, match=f"no use for .*{name}"):
            Planner(file, TARGET, drafts=True)


def weights(planner: Planner) -> set[str]:
    plan = planner.plan(decode_shape(1, DRAFT))
    return {arg.operand.name for d in plan.dispatches for arg in d.launch.args if isinstance(arg.operand, Weight)}


def test_the_block_has_tables_of_its_own_or_those_of_the_model() -> None:
    with opened() as file:
        assert {"token_embd.weight", "output.weight", f"{BLOCK}.nextn.shared_head_norm.weight"} <= weights(
            Planner(file, TARGET, drafts=True)
        )
        for own, of_model in ONE_MORE.items():
            name = f"{BLOCK}.{own}.weight"
            file.tensors[name] = replace(file.tensors[f"{of_model}.weight"], name=name)
        del file.tensors[f"{BLOCK}.nextn.shared_head_norm.weight"]
        read = weights(Planner(file, TARGET, drafts=True))
    assert {f"{BLOCK}.{own}.weight" for own in ONE_MORE} <= read
    assert "output_norm.weight" in read
    assert not read & {"token_embd.weight", "output.weight"}


@pytest.mark.parametrize("name", ["qwen3.6-35b-a3b", "qwen3.8-27b", "qwen3-coder-next", "glm-4.5-air"])
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_plans_of_full_size_run_the_block(name: str, kv: str) -> None:
    """Each step of the model stores the block's keys and values, and no step misses a barrier."""
    entry = next(entry for entry in ENTRIES if entry.name == name)
    file = stand_in(replace(entry.shape, n_draft=1), "Q4_K_M")
    planner = Planner(file, TARGET, 4096, kv, drafts=True)
    last = planner.config.n_layer
    for shape in (decode_shape(1), decode_shape(8, "draw"), verify_shape(8), chunk_shape(512, 0, 0, "none")):
        plan = planner.plan(shape)
        assert plan.hazards() == []
        stored = [d.launch.op for d in plan.dispatches if d.launch.op.kind == "store_kv"]
        assert [op.layer for op in stored] == [last]
    for rows in (1, 4):
        plan = planner.plan(decode_shape(rows, DRAFT))
        assert plan.hazards() == []
        assert {d.launch.op.layer for d in plan.dispatches if "layer" in d.launch.op.attrs} == {last}
