"""Files of families with Mamba2 layers that contradict themselves: each error is typed, and names the key or tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.model_files import write
from support.paths import DATA
from zincmetal import gguf
from zincmetal.device import backend
from zincmetal.errors import GGUFError, UnsupportedModelError
from zincmetal.gguf.quants import F32, by_name
from zincmetal.graph.ops import Weight
from zincmetal.plan.planner import Planner
from zincmetal.plan.target import Target

TARGET = Target.of_kernels(backend.load("cpu"))
FILES = {name: DATA / "families" / f"{name}.gguf" for name in ("nemotron_h_moe", "granitehybrid")}
ABSENT = object()


def contents(name: str) -> tuple[dict[str, Any], dict[str, Weight]]:
    """Returns the keys and the tensors of a good file."""
    with gguf.open(FILES[name]) as file:
        keys = {key: file.metadata[key] for key in file.metadata if not key.startswith("tokenizer.")}
        return keys, {t.name: Weight(t.name, t.type, t.shape) for t in file.tensors.values()}


def plan(path: Path, keys: dict[str, Any], tensors: dict[str, Weight]) -> Planner:
    write(path, {key: value for key, value in keys.items() if value is not ABSENT}, tensors)
    with gguf.open(path) as file:
        return Planner(file, TARGET, 128)


NO_SIZE = (ABSENT, 0, -1, 2**31, 1.5, "8")
#: By key: values whose error has its name, or the name that stands beside the value.
WRONG: dict[str, tuple[Any, ...]] = {
    "ssm.time_step_rank": (*NO_SIZE, (7, "ssm.group_count"), (6, "ssm.inner_size"), (32, "ssm.inner_size")),
    "ssm.group_count": (*NO_SIZE, 3, (4, "blk.0.ssm_in.weight")),
    "ssm.inner_size": (*NO_SIZE, 255, 320, (512, "blk.0.ssm_in.weight")),
    "ssm.state_size": (*NO_SIZE, 48, 512, (64, "blk.0.ssm_in.weight")),
    "ssm.conv_kernel": (*NO_SIZE, 1, 9, (3, "blk.0.ssm_conv1d.weight")),
    "attention.head_count_kv": (0, [0] * 5, [0, 0, 0, 2], [0, 0, 0, 3, 0], ([2, 0, 0, 2, 0], "blk.0.attn_q")),
    "feed_forward_length": (ABSENT, [0, 64], [0, -1, 0, 0, 64], ([0, 64, 64, 0, 64], "blk.2.exp_probs_b")),
    "attention.layer_norm_epsilon": (ABSENT, 0.0, -1e-5, "tiny"),
    "expert_feed_forward_length": (ABSENT, 0, [64, 64], [0, 64, 0, 0, 32], (32, "ffn_up_exps")),
    "moe_latent_size": (64,),
    "attention.sliding_window": (16,),
}
CASES = [(key, case) for key, cases in WRONG.items() for case in cases]


@pytest.mark.parametrize(("key", "case"), CASES, ids=lambda x: "absent" if x is ABSENT else str(x))
def test_a_wrong_value_is_refused_in_its_name(key: str, case: Any, tmp_path: Path) -> None:
    value, named = case if isinstance(case, tuple) else (case, key)
    keys, tensors = contents("nemotron_h_moe")
    with pytest.raises((GGUFError, UnsupportedModelError), match=named):
        plan(tmp_path / "bad.gguf", keys | {f"nemotron_h_moe.{key}": value}, tensors)


@pytest.mark.parametrize("name", ["in", "conv1d", "out", "norm", "conv1d.bias", "dt.bias", "a", "d"])
@pytest.mark.parametrize("family", FILES)
def test_a_tensor_that_is_missing_or_has_another_shape_is_named(family: str, name: str, tmp_path: Path) -> None:
    keys, tensors = contents(family)
    of_weight = name in ("in", "conv1d", "out", "norm")
    tensor = f"blk.0.ssm_{name}" + (".weight" if of_weight else "")
    w = tensors[tensor]
    bad = [replace(w, shape=(w.shape[0] + 32, *w.shape[1:]))]
    if name in ("a", "d", "norm", "dt.bias"):
        bad += [replace(w, type=by_name("q8_0"), shape=(*w.shape[:-1], 32))]
    for changed in (None, *bad):
        rest = {other: tensor for other, tensor in tensors.items() if other != tensor.name}
        variant = rest if changed is None else {**tensors, tensor: changed}
        if changed is None:
            variant = {other: kept for other, kept in tensors.items() if other != tensor}
        with pytest.raises((GGUFError, UnsupportedModelError), match=rf"tensor {tensor}\b"):
            plan(tmp_path / "bad.gguf", keys, variant)


@pytest.mark.parametrize("name", ["blk.1.ffn_latent_down.weight", "blk.0.ssm_x.weight", "blk.3.attn_q_norm.weight"])
def test_a_tensor_that_nothing_reads_is_refused(name: str, tmp_path: Path) -> None:
    keys, tensors = contents("nemotron_h_moe")
    with pytest.raises(UnsupportedModelError, match=f"no use for .*{name}"):
        plan(tmp_path / "bad.gguf", keys, {**tensors, name: Weight(name, F32, (128,))})


def test_a_granite_hybrid_without_experts_is_dense(tmp_path: Path) -> None:
    """The small models of the family: a feed-forward stands in the place of experts."""
    keys, tensors = contents("granitehybrid")
    none = {name: ABSENT for name in keys if ".expert_" in name}
    dense = {name: w for name, w in tensors.items() if not name.endswith(("_exps.weight", "_shexp.weight"))}
    dense = {name: w for name, w in dense.items() if not name.endswith("ffn_gate_inp.weight")}
    for i in range(3):
        shapes = {"gate": (64, 128), "up": (64, 128), "down": (128, 64)}
        weights = (Weight(f"blk.{i}.ffn_{part}.weight", by_name("q8_0"), shape) for part, shape in shapes.items())
        dense |= {w.name: w for w in weights}
    cfg = plan(tmp_path / "dense.gguf", {**keys, **none}, dense).config
    assert [layer.n_ff for layer in cfg.layers] == [64] * 3
    assert [layer.mixer for layer in cfg.layers] == ["recurrent", "attention", "recurrent"]
    assert cfg.experts is None


def test_nemotron_without_experts_has_parts_of_three_kinds(tmp_path: Path) -> None:
    keys, tensors = contents("nemotron_h_moe")
    kept = {key: value for key, value in keys.items() if ".expert_" not in key}
    keys = {key.replace("nemotron_h_moe.", "nemotron_h."): value for key, value in kept.items()}
    keys["general.architecture"] = "nemotron_h"
    dense = {name: w for name, w in tensors.items() if ".ffn_" not in name and "exp_probs" not in name}
    for i in (1, 4):
        for part, shape in {"up": (64, 128), "down": (128, 64)}.items():
            dense[f"blk.{i}.ffn_{part}.weight"] = Weight(f"blk.{i}.ffn_{part}.weight", by_name("q8_0"), shape)
    cfg = plan(tmp_path / "dense.gguf", keys, dense).config
    assert [layer.mixer for layer in cfg.layers] == ["recurrent", "", "recurrent", "attention", ""]
    assert [layer.n_ff for layer in cfg.layers] == [0, 64, 0, 0, 64]
    assert cfg.layers[3].rope is None
