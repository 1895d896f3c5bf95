"""Families with Mamba2 layers and dense feed-forwards: the same as a mixture of one expert, which exact files check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.model_files import read, write_with_weights
from support.paths import DATA
from support.reference_models import GPUS, load, log_softmax


def write_pair(folder: Path, family: str) -> tuple[Path, Path]:
    """Writes a model with one expert and no shared one, and the model with this expert as its feed-forward."""
    keys, tensors, rows = read(DATA / "families" / f"{family}.gguf")
    keys |= {f"{family}.expert_count": 1, f"{family}.expert_used_count": 1, f"{family}.expert_weights_scale": 1.0}
    keys = {key: value for key, value in keys.items() if ".expert_shared" not in key}
    tensors = {name: w for name, w in tensors.items() if "_shexp" not in name}
    for name, w in tensors.items():
        if "_exps." in name or "ffn_gate_inp" in name or "exp_probs" in name:
            tensors[name] = replace(w, shape=(1, *w.shape[1:]))
            rows[name] = rows[name][: len(rows[name]) // w.shape[0]] if len(w.shape) > 1 else rows[name][:, :4]
    write_with_weights(folder / "mixture.gguf", keys, tensors, rows)

    arch = family.removesuffix("_moe")
    keys = {key.replace(f"{family}.", f"{arch}."): v for key, v in keys.items() if ".expert_" not in key}
    keys["general.architecture"] = arch
    tensors = {name: w for name, w in tensors.items() if "ffn_gate_inp" not in name and "exp_probs" not in name}
    for name in [name for name in tensors if "_exps." in name]:
        plain = name.replace("_exps", "")
        tensors[plain] = replace(tensors.pop(name), name=plain)
        tensors[plain] = replace(tensors[plain], shape=tensors[plain].shape[1:])
        rows[plain] = rows.pop(name)
    write_with_weights(folder / "dense.gguf", keys, tensors, rows)
    return folder / "mixture.gguf", folder / "dense.gguf"


@pytest.mark.parametrize("family", ["nemotron_h_moe", "granitehybrid"])
@pytest.mark.parametrize("lane", ["native", *GPUS])
def test_dense_blocks_are_as_good_as_one_expert(
    family: str, lane: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.load(DATA / "families" / f"{family}.npz")["tokens"][:48]
    found = []
    for path in write_pair(tmp_path, family):
        with load(path, lane, monkeypatch, kv="f32", context=128) as model:
            found.append(log_softmax(model.logits(ids)))
    assert np.abs(found[0] - found[1]).max() < 1e-4
    assert np.ptp(found[0]) > 1
