"""Metadata and tensors that contradict each other: each case is a typed error that names the key or the tensor."""

from __future__ import annotations

import math
import re
import secrets
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import synthetic
import zincmetal
from support.model_files import write
from support.paths import DATA
from zincmetal import config, gguf, models
from zincmetal.device import backend
from zincmetal.errors import GGUFError, UnsupportedModelError, UsageError, ZincError
from zincmetal.gguf import quants
from zincmetal.graph.builder import Graph
from zincmetal.graph.ops import Weight
from zincmetal.plan.target import Target

SEED = secrets.randbits(32)
MEMORY = 4 << 20  # most bytes that reading the metadata of a small file may take
ARCH = synthetic.ARCH
TENSORS = {w.name: w for w in synthetic.tensors(synthetic.TINY)}
ABSENT = object()
TARGET = Target.of_kernels(backend.load("cpu"))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Any]:
    """Returns the keys of a good file, without the tokenizer's."""
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    synthetic.write(path, synthetic.TINY, empty=True)
    with gguf.open(path) as file:
        return {key: file.metadata[key] for key in file.metadata if not key.startswith("tokenizer.")}


def examine(path: Path) -> None:
    """Does the part of loading that needs no device: the configuration, the limits of kernels, tensors of the graph."""
    with gguf.open(path) as file:
        build = models.get(file.require("general.architecture", str)).build
        cfg = models.configure(file)
        TARGET.check(cfg, path)
        weights = {t.name: Weight(t.name, t.type, t.shape) for t in file.tensors.values()}
        for name, (_, n_rot) in cfg.rope_tables.items():
            weights[name] = Weight(name, quants.F32, (n_rot // 2,))
        g = Graph(cfg, weights.get)
        g.logits(g.rms_norm(build(g), "output_norm"))


def examine_with(
    path: Path, good: Mapping[str, Any], changes: Mapping[str, Any], tensors: Mapping[str, Weight] = TENSORS
) -> None:
    keys = good | {f"{ARCH}.{name}": value for name, value in changes.items()}
    write(path, {name: value for name, value in keys.items() if value is not ABSENT}, tensors)
    examine(path)


def test_the_variations_start_from_a_good_file(tmp_path, good):
    examine_with(tmp_path / "good.gguf", good, {})
    listed = {"attention.recurrent_layers": [True, True, True, False], "full_attention_interval": ABSENT}
    examine_with(tmp_path / "listed.gguf", good, listed)
    default = {"full_attention_interval": ABSENT, "attention.value_length": ABSENT}
    examine_with(tmp_path / "default.gguf", good, default)
    tied = {name: w for name, w in TENSORS.items() if name != "output.weight"}
    examine_with(tmp_path / "tied.gguf", good, {}, tied)


# By key: values whose error names the key. A pair adds text that the message must hold.
NO_SIZE = (0, -1, 2**31, 2**63, 1.0, True, "8", [8])
WRONG: dict[str, tuple[Any, ...]] = {
    "block_count": (ABSENT, *NO_SIZE, (5, "blk.4."), 2**31 - 1),
    "context_length": (ABSENT, *NO_SIZE),
    "embedding_length": (ABSENT, *NO_SIZE, (257, "token_embd.weight"), (2**31 - 1, "token_embd.weight")),
    "nextn_predict_layers": (-1, 4, 5, 2**31 - 1, 1.0, "1", True),
    "attention.head_count": (ABSENT, *NO_SIZE, (8, "attn_q"), (2**31 - 1, "attn_q")),
    "attention.head_count_kv": (*NO_SIZE, 3, 8, (2, "attn_k"), 2**31 - 1),
    "attention.key_length": (*NO_SIZE, 63, 7, 1, 257, 264, 2**31 - 1),
    "attention.value_length": (*NO_SIZE, 32, 128),
    "attention.layer_norm_rms_epsilon": (ABSENT, 0, 0.0, -1e-6, math.nan, math.inf, "tiny", True, [1]),
    "rope.dimension_count": (*NO_SIZE, 31, 66, 2**31 - 2),
    "rope.freq_base": (0.0, 1.0, -1.0, math.nan, math.inf, "1e7", True),
    "rope.scaling.type": ("longrope", "", 1, [1]),
    "expert_count": (ABSENT, *NO_SIZE, (7, "ffn_gate_inp"), 1025, 2**31 - 1),
    "expert_used_count": (ABSENT, *NO_SIZE, 9, 33, 2**31 - 1),
    "expert_feed_forward_length": (*NO_SIZE, (255, "ffn_gate_exps"), (2**31 - 1, "ffn_gate_exps")),
    "expert_shared_feed_forward_length": (-1, 2**31, 1.0, True, "8", (255, "ffn_gate_shexp")),
    "expert_shared_count": (-1, 1.0, "1", [1]),
    "expert_gating_func": (4, -1, "softmax", [1]),
    "expert_weights_norm": (2, "yes", [True]),
    "expert_group_count": (-1, 3, 8, 16, 2**31 - 1, 1.0, "2"),
    "expert_group_used_count": (-1, 2, 2**31 - 1, 1.0, "1"),
    "leading_dense_block_count": (-1, 4, 2**31 - 1, 1.0, (1, "feed_forward_length|ffn_gate")),
    "rope.scaling.attn_factor": (0.0, -2.0, math.nan, [1]),
    "rope.scaling.yarn_beta_fast": (0.0, math.nan, "32"),
    "rope.scaling.yarn_beta_slow": (0.0, (33.0, "yarn_beta_fast"), math.inf, True),
    "rope.scaling.yarn_log_multiplier": (-0.1, math.nan, "1"),
    "attention.temperature_scale": (-0.1, math.inf, "0.1", [1]),
    "attention.temperature_length": (-1, 2**31, 1.5, "16"),
    "expert_weights_scale": (math.nan, math.inf, -1.0, "1", True),
    "attention.recurrent_layers": (
        [True, True, True],
        [True, True, True, False, True],
        [True] * 1000,
        [1, 1, 1, 0],
        True,
        "1110",
        3,
        ([True, True, False, False], "blk.2.attn_q"),
        ([True] * 4, "blk.3.attn_qkv"),
    ),
    "full_attention_interval": (*NO_SIZE, (3, "blk.2.attn_q"), (1, "blk.0.attn_q"), (2**31 - 1, "blk.3.attn_qkv")),
    "ssm.conv_kernel": (ABSENT, *NO_SIZE, 1, 9, 2**31 - 1, (3, "ssm_conv1d")),
    "ssm.state_size": (ABSENT, *NO_SIZE, 48, 63, 512, 2**31 - 1),
    "ssm.group_count": (ABSENT, *NO_SIZE, 3, 8, 2**31 - 1, (4, "attn_qkv")),
    "ssm.time_step_rank": (ABSENT, *NO_SIZE, 5, 2, 8, 2**31 - 1),
    "ssm.inner_size": (ABSENT, *NO_SIZE, 255, 512, 2**31 - 1),
}
# By key: values that are legal alone and contradict another key. The error may name that key instead.
PARTNERS = {
    "ssm.state_size": "ssm.inner_size",
    "ssm.time_step_rank": "ssm.(group_count|inner_size)",
    "expert_count": "expert_(used_)?count",
    "attention.head_count": "attention.head_count_kv",
    "attention.key_length": "attention.(key|value)_length",
}


def spelled(value: Any) -> str:
    return "absent" if value is ABSENT else repr(value).replace(" ", "")


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}={spelled(case)}") for name, cases in WRONG.items() for case in cases],
)
def test_a_wrong_value_is_refused_in_its_name(name, case, tmp_path, good):
    value, named = case if isinstance(case, tuple) else (case, None)
    pattern = named or f"{ARCH}.({name}|{PARTNERS.get(name, name)})"
    tracemalloc.start()
    try:
        with pytest.raises((GGUFError, UnsupportedModelError), match=pattern):
            examine_with(tmp_path / "bad.gguf", good, {name: value})
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["general.architecture", f"{ARCH}.rope.scaling.type", f"{ARCH}.block_count"])
@pytest.mark.parametrize("letter", ["\0", "é"])
def test_a_long_string_is_not_repeated_in_the_error(name, letter, tmp_path, good):
    text = letter * (3 << 20)
    path = tmp_path / "long.gguf"
    write(path, good | {name: text}, TENSORS)
    tracemalloc.start()
    try:
        with pytest.raises((GGUFError, UnsupportedModelError)) as caught:
            examine(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY + path.stat().st_size
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000 + len(str(path))


def test_sizes_that_agree_with_each_other_and_not_with_the_tensors(tmp_path, good):
    for changes, tensor in [
        ({"ssm.state_size": 32, "ssm.time_step_rank": 8}, "attn_qkv"),
        ({"ssm.state_size": 32, "ssm.inner_size": 128}, "attn_qkv"),
        ({"ssm.time_step_rank": 8, "ssm.inner_size": 512}, "attn_qkv"),
        ({"attention.head_count": 8, "attention.key_length": 32, "attention.value_length": 32}, "attn_k"),
        ({"expert_count": 4, "expert_used_count": 4}, "ffn_gate_inp"),
    ]:
        with pytest.raises(UnsupportedModelError, match=tensor):
            examine_with(tmp_path / "bad.gguf", good, changes)


# The tensors of one layer of each kind, and those outside layers.
NAMES = [name for name in TENSORS if ".1." not in name and ".2." not in name]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "output.weight"])  # tied models have no such tensor
def test_a_missing_tensor_is_named(name, tmp_path, good):
    rest = {other: w for other, w in TENSORS.items() if other != name}
    with pytest.raises((GGUFError, UnsupportedModelError), match=rf"tensor {name}\b.* missing"):
        examine_with(tmp_path / "bad.gguf", good, {}, rest)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_another_shape_or_type_is_named(name, tmp_path, good):
    w = TENSORS[name]
    vector = len(w.shape) == 1
    shapes = {w.shape[1:], (*w.shape[:-1], 2 * w.shape[-1]), (w.shape[0] + 1, *w.shape[1:]), (1, *w.shape)} - {()}
    if not vector and w.shape[0] % w.type.block_size == 0 and w.shape[::-1] != w.shape:
        shapes.add(w.shape[::-1])
    if name == "token_embd.weight":  # its rows define the vocabulary, so the error names the output
        shapes.discard((w.shape[0] + 1, *w.shape[1:]))
    if name.endswith("ffn_gate_inp_shexp.weight"):  # a matrix of one row may be written as a vector
        vector = False
        shapes.discard((1, *w.shape))
    for shape in shapes:
        bad = {**TENSORS, name: replace(w, shape=shape)}
        with pytest.raises((GGUFError, UnsupportedModelError), match=rf"tensor {name}\b"):
            examine_with(tmp_path / "bad.gguf", good, {}, bad)
    types = [t for t in (quants.by_name("q8_k"), quants.by_name("i8")) if w.shape[-1] % t.block_size == 0]
    types += [quants.F16] if vector else []
    for qtype in types:
        bad = {**TENSORS, name: replace(w, type=qtype)}
        with pytest.raises(UnsupportedModelError, match=rf"tensor {name}\b.* {qtype.name}"):
            examine_with(tmp_path / "bad.gguf", good, {}, bad)


@pytest.mark.parametrize(
    ("changes", "extra", "unused"),
    [
        ({"block_count": 3}, [], "blk.3."),
        ({"block_count": 3, "nextn_predict_layers": 1}, [], "blk.3."),
        ({}, ["blk.4.nextn.eh_proj.weight"], "blk.4."),
        ({}, ["blk.0.attn_q.bias", "blk.3.attn_q.bias"], "2 tensors"),
        ({"expert_shared_feed_forward_length": 0}, [], "shexp"),
        ({}, ["blk.1.attn_k.weight"], "blk.1.attn_k.weight"),
        ({}, ["mm.0.weight"], "mm.0.weight"),
    ],
)
def test_tensors_that_nothing_reads_are_refused(changes, extra, unused, tmp_path, good):
    keys = good | {f"{ARCH}.{name}": value for name, value in changes.items()}
    write(tmp_path / "bad.gguf", keys, TENSORS | {name: Weight(name, quants.F32, (32,)) for name in extra})
    with pytest.raises(UnsupportedModelError, match=f"no use for .*{re.escape(unused)}"):
        zincmetal.load(tmp_path / "bad.gguf", device="cpu")


def test_blocks_that_draft_tokens_are_left_alone(tmp_path, good):
    keys = good | {f"{ARCH}.block_count": 5, f"{ARCH}.nextn_predict_layers": 1}
    draft = {name: Weight(name, quants.F32, (32,)) for name in ("blk.4.nextn.eh_proj.weight", "blk.4.attn_q.weight")}
    write(tmp_path / "draft.gguf", keys, TENSORS | draft)
    zincmetal.load(tmp_path / "draft.gguf", device="cpu").close()


# ---- Gemma 3: layers with a window ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma3() -> tuple[dict[str, Any], dict[str, Weight]]:
    """Returns keys and tensors of a good file of seven layers: a window of 16, and one layer without it."""
    with gguf.open(DATA / "gemma3-q4_0.gguf") as file:
        keys = {key: file.metadata[key] for key in file.metadata if not key.startswith("tokenizer.")}
        return keys, {t.name: Weight(t.name, t.type, t.shape) for t in file.tensors.values()}


def gemma3_config(path: Path, gemma3: tuple[dict[str, Any], dict[str, Weight]], **changes: Any) -> config.ModelConfig:
    keys, tensors = gemma3
    keys = keys | {f"gemma3.{name}": value for name, value in changes.items()}
    write(path, {name: value for name, value in keys.items() if value is not ABSENT}, tensors)
    examine(path)
    with gguf.open(path) as file:
        return models.configure(file)


WINDOWS: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({}, (16, 16, 16, 16, 16, 0, 16)),
    ({"attention.sliding_window_pattern": 2}, (16, 0, 16, 0, 16, 0, 16)),
    ({"attention.sliding_window_pattern": 1}, (0,) * 7),
    ({"attention.sliding_window_pattern": [False, True] * 3 + [False]}, (0, 16, 0, 16, 0, 16, 0)),
    ({"attention.sliding_window": ABSENT}, (0,) * 7),
    ({"attention.sliding_window": 0}, (0,) * 7),
]


@pytest.mark.parametrize(("changes", "windows"), WINDOWS)
def test_gemma3_windows_by_layer(changes, windows, tmp_path, gemma3):
    layers = gemma3_config(tmp_path / "g.gguf", gemma3, **changes).layers
    assert tuple(layer.window for layer in layers) == windows


def test_gemma3_constants(tmp_path, gemma3):
    cfg = gemma3_config(tmp_path / "g.gguf", gemma3)
    of_window, of_all = cfg.layers[0].rope, cfg.layers[5].rope
    assert (of_all.base, of_all.factor, of_window) == (1e6, 8.0, config.Rope(1e4, divisors=""))
    assert list(cfg.rope_tables.values()) == [(of_all, 32), (of_window, 32)]
    assert cfg.attention_scale == 32**-0.5
    named = {"rope.freq_base_swa": 5000.0, "attention.scale": 0.25}
    cfg = gemma3_config(tmp_path / "g.gguf", gemma3, **named)
    assert (cfg.attention_scale, cfg.layers[0].rope) == (0.25, config.Rope(5000.0, divisors=""))


def test_gemma3_27b_scales_by_the_width_of_its_embedding(tmp_path, gemma3):
    keys, tensors = gemma3
    deep = {f"blk.{i}.{name[6:]}": w for i in range(62) for name, w in tensors.items() if name.startswith("blk.0.")}
    tensors = tensors | {name: replace(w, name=name) for name, w in deep.items()}
    keys = keys | {"gemma3.attention.head_count": 4}
    tensors |= {n: replace(w, shape=(128, 64)) for n, w in tensors.items() if n.endswith("attn_q.weight")}
    tensors |= {n: replace(w, shape=(64, 128)) for n, w in tensors.items() if n.endswith("attn_output.weight")}
    cfg = gemma3_config(tmp_path / "g.gguf", (keys, tensors), block_count=62)
    assert cfg.attention_scale == (64 // 4) ** -0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("attention.sliding_window", value) for value in (-1, 2**31, 1.5, True, "16", [16])),
        *(("attention.sliding_window_pattern", value) for value in (0, -1, 2**31, True, "6", [True] * 6, [6] * 7)),
        *(("rope.freq_base_swa", value) for value in (0.0, 1.0, -1.0, math.nan, math.inf, "1e4")),
        *(("attention.scale", value) for value in (0.0, -1.0, math.inf, "1")),
        *(("final_logit_softcapping", value) for value in (30.0, math.nan, "30")),
        ("attn_logit_softcapping", 50.0),
        ("rope.scaling.type", "yarn"),
    ],
)
def test_a_wrong_gemma3_value_is_refused_in_its_name(name, value, tmp_path, gemma3):
    with pytest.raises((GGUFError, UnsupportedModelError), match=f"gemma3.{name}"):
        gemma3_config(tmp_path / "bad.gguf", gemma3, **{name: value})


def test_flipped_bytes_are_understood_or_refused(tmp_path, good):
    """With any bytes of the header flipped the graph is built or a ZincError says why not, in little memory.

    If a string's length is flipped, the string may be the rest of the file, and is read.
    """
    whole, path = tmp_path / "whole.gguf", tmp_path / "flipped.gguf"
    write(whole, good, TENSORS)
    with gguf.open(whole) as file:
        end, size = min(t.offset for t in file.tensors.values()), file.parts[0].size
    raw = np.fromfile(whole, np.uint8, end)
    keys = bytes(raw).index(b"token_embd.weight")  # this test is about metadata, a small part of the header
    rng = np.random.default_rng(SEED)
    understood = refused = peak = 0
    tracemalloc.start()
    try:
        for trial in range(400):
            flipped = raw.copy()
            at = rng.integers(4, keys if trial % 4 else end, rng.integers(1, 4))
            flipped[at] ^= rng.choice(np.array([1, 2, 4, 8, 16, 32, 64, 128, 255], np.uint8), len(at))
            path.write_bytes(flipped.tobytes())
            with path.open("r+b") as handle:
                handle.truncate(size)
            try:
                examine(path)
                understood += 1
            except ZincError:
                refused += 1
            except Exception as e:
                raise AssertionError(f"seed {SEED}, trial {trial}: bytes {at.tolist()}") from e
            peak = max(peak, tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert peak < MEMORY + size, f"seed {SEED}"
    assert understood > 0, f"seed {SEED}"
    assert refused > 0, f"seed {SEED}"


@pytest.mark.parametrize("context", [0, -5, 2**31, "8", 1.5])
def test_a_context_that_is_no_number_of_tokens(tmp_path, context):
    path = tmp_path / "tiny.gguf"
    synthetic.write(path, synthetic.TINY, empty=True)
    with gguf.open(path) as file, pytest.raises(UsageError, match="context must be a positive number"):
        models.configure(file, context)
