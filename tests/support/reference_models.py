"""Finds, loads and compares the models that have exact reference distributions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import zincmetal
from support.paths import DATA, MORE_SHARED, SHARED
from zincmetal.api.model import Model
from zincmetal.device import backend
from zincmetal.device.programs import Program
from zincmetal.plan.planner import Planner
from zincmetal.plan.tuning import DIVIDE_KEYS_ABOVE

Array = NDArray[Any]
F64 = NDArray[np.float64]


#: Reference models with a quant type or an architecture of their own. They are tested for their distributions alone.
SPECIAL: tuple[str, ...] = (
    *("llama-iq4_nl", "llama-iq4_xs", "llama-mxfp4", "llama-tq1_0", "llama-tq2_0"),
    *("llama-iq3_s", "llama-iq3_xxs", "llama-q3_k", "llama-q2_k", "llama-iq2_s", "llama-iq2_xs", "llama-iq2_xxs"),
    *("llama-iq1_m", "llama-iq1_s"),
    *("qwen35-ud-q4_k_m", "qwen35-ud-q2_k_xl", "qwen35moe-ud-q4_k_m", "qwen35moe-ud-q2_k_xl"),
)


def reference_models(*architectures: str) -> list[Path]:
    """Lists the GGUF files of these architectures. Each has its exact distributions in an .npz beside it."""
    found = {p.stem: p for folder in (SHARED, DATA) for p in sorted(folder.glob("*.gguf"))}
    return [p for name, p in sorted(found.items()) if name.split("-")[0] in architectures and name not in SPECIAL]


def special_models() -> list[Path]:
    """Lists the files of SPECIAL that this machine has, as ``reference_models`` does."""
    found = {p.stem: p for folder in (MORE_SHARED, DATA) for p in sorted(folder.glob("*.gguf"))}
    return [found[name] for name in SPECIAL if name in found]


GPUS = [name for name in ("metal", "cuda") if backend.is_built(name)]
# The largest KL of the CPU lanes, in nats. They and the exact figures were computed in float32, and round differently.
NOISE = 1e-10
# Of files of SPECIAL: their figures come from two programs, whose KL to each other is up to 4e-9.
NOISE_OF_SPECIAL = 1e-9


def load(path: Path, lane: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Model:
    monkeypatch.setenv("ZINCMETAL_NATIVE", "0" if lane == "msl" else "1")
    return zincmetal.load(path, device=lane if lane in GPUS else "cpu", **options)


def check_divided_keys(model: Model, ids: list[int], merges: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes a token by the plan of a wide device, which has so many merges of shares, and compares the logits."""
    engine, n_ctx = model.engine, model.config.n_ctx
    planner = Planner(model.file, replace(engine.planner.target, divide_keys_above=DIVIDE_KEYS_ABOVE["metal"]), n_ctx)
    planner.resize(engine.planner.addresses.room)
    plan = planner.plan()
    assert plan.hazards() == []
    assert sum(d.launch.kernel == "attention_merge" for d in plan.dispatches) == merges
    divided = Program(plan, engine.programs.compile(plan), n_ctx)
    with model.session() as session:
        session.prefill(ids)
        session.decode(7)
        want = log_softmax(session.last_logits())
        session.rewind(len(ids))
        monkeypatch.setattr(engine, "program", lambda shape, position: divided)
        session.decode(7)
        assert np.abs(log_softmax(session.last_logits()) - want).max() < 1e-4


def log_softmax(logits: Array) -> F64:
    x: F64 = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def kl(exact_logprobs: Array, logits: Array) -> F64:
    """Computes KL(exact || model) in nats for each row. Fails where a logit is not finite."""
    exact = log_softmax(exact_logprobs)  # the probabilities do not sum to exactly 1 in float32
    assert np.isfinite(logits).all()
    return np.asarray((np.exp(exact) * (exact - log_softmax(logits))).sum(axis=-1))
