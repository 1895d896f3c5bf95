"""Finds, loads and compares the models that have exact reference distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import zincmetal
from support.paths import DATA, SHARED
from zincmetal.api.model import Model
from zincmetal.device import backend

Array = NDArray[Any]
F64 = NDArray[np.float64]


def reference_models(*architectures: str) -> list[Path]:
    """Lists the GGUF files of these architectures. Each has its exact distributions in an .npz beside it."""
    found = {p.stem: p for folder in (SHARED, DATA) for p in sorted(folder.glob("*.gguf"))}
    return [p for name, p in sorted(found.items()) if name.split("-")[0] in architectures]


GPUS = [name for name in ("metal", "cuda") if backend.is_built(name)]
# The largest KL of the CPU lanes, in nats. They and the exact figures were computed in float32, and round differently.
NOISE = 1e-10


def load(path: Path, lane: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Model:
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0" if lane == "msl" else "1")
    return zincmetal.load(path, device=lane if lane in GPUS else "cpu", **options)


def log_softmax(logits: Array) -> F64:
    x: F64 = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def kl(exact_logprobs: Array, logits: Array) -> F64:
    """Computes KL(exact || model) in nats for each row. Fails where a logit is not finite."""
    exact = log_softmax(exact_logprobs)  # the probabilities do not sum to exactly 1 in float32
    assert np.isfinite(logits).all()
    return np.asarray((np.exp(exact) * (exact - log_softmax(logits))).sum(axis=-1))
