"""Qwen3-Next in the layout of older files: one matrix has q, k, v and z of each k head side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from support.model_files import read, write_with_weights
from support.paths import DATA
from support.reference_models import GPUS, kl, load
from zincmetal import gguf
from zincmetal.config import Ssm
from zincmetal.graph.ops import Weight
from zincmetal.models import configure

FILE = DATA / "families" / "qwen3next.gguf"


def by_k_head(sizes: Ssm, qkv: NDArray[Any], z: NDArray[Any]) -> NDArray[Any]:
    """Sorts the rows of attn_qkv and attn_gate as ssm_in has them."""
    n_qk = sizes.n_k_head * sizes.d_state
    parts = (qkv[:n_qk], qkv[n_qk : 2 * n_qk], qkv[2 * n_qk :], z)
    heads = np.concatenate([part.reshape(sizes.n_k_head, -1, qkv.shape[1]) for part in parts], axis=1)
    return np.asarray(heads.reshape(-1, qkv.shape[1]))


def write_older(path: Path) -> None:
    """Writes the model of FILE as an older file."""
    keys, tensors, rows = read(FILE)
    with gguf.open(FILE) as file:
        sizes = configure(file).recurrence
    assert isinstance(sizes, Ssm)
    for i in range(3):
        qkv, z, both = (f"blk.{i}.{name}.weight" for name in ("attn_qkv", "attn_gate", "ssm_in"))
        rows[both] = by_k_head(sizes, rows.pop(qkv), rows.pop(z))
        tensors[both] = Weight(both, tensors[qkv].type, (len(rows[both]), tensors[qkv].shape[1]))
        del tensors[qkv], tensors[z]
    write_with_weights(path, keys, tensors, rows)


@pytest.mark.parametrize("lane", ["native", *GPUS])
def test_an_older_file_is_the_same_model(lane: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_older(tmp_path / "older.gguf")
    exact = np.load(FILE.with_suffix(".npz"))
    with load(tmp_path / "older.gguf", lane, monkeypatch, kv="f32", context=128, exact=True) as model:
        assert any(name == "blk.0.ssm_in.weight" for name in model.file.tensors)
        logits = model.logits(exact["tokens"])
    got = kl(exact["logprobs"], logits[exact["prefix_lengths"] - 1])
    assert (got <= (1e-5 if lane in GPUS else 1e-9)).all(), f"KL {got}"
