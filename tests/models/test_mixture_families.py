"""Mixtures of other families: token by token, behind the prefix cache, and the dispatches of a row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.paths import DATA
from support.reference_models import GPUS, load, log_softmax

NAMES = ("glm4moe", "minimax-m2", "gpt-oss", "deepseek2-glm47flash")
FILES = [DATA / "families" / f"{name}.gguf" for name in NAMES]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


@every_file
@pytest.mark.parametrize("lane", ["msl", "native", *GPUS])
def test_token_by_token_equals_prefill(path: Path, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = np.load(path.with_suffix(".npz"))
    ids = exact["tokens"][: 20 if lane == "msl" else 64].tolist()
    with load(path, lane, monkeypatch, kv="f32", context=128, exact=lane != "native") as model:
        whole = log_softmax(model.logits(ids))
        with model.session() as session:
            for n, token in enumerate(ids):
                session.step([token])
                assert np.abs(log_softmax(session.last_logits()) - whole[n]).max() < 1e-4, n


@every_file
def test_a_prompt_that_was_met_before_goes_on_from_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy text equals the exact one, or is as good, also behind pages of the prefix cache."""
    exact = np.load(path.with_suffix(".npz"))
    prompt, answer = exact["tokens"].tolist(), exact["greedy_from_16"][:16].tolist()
    with load(path, "native", monkeypatch, kv="f32", context=256) as model:
        first = model.generate(prompt[:16], max_tokens=16, stop=[]).tokens
        assert first == answer
        long = model.generate(prompt, max_tokens=8)
        again = model.generate(prompt, max_tokens=8)
        assert again.tokens == long.tokens
        assert again.cache.reused >= 64


#: Dispatches of one row in the last layer: what each operation needs, and no more.
LAYERS = {
    "glm4moe": "linear_stack rope_kv attention linear_add linear_stack route_experts_gated experts_mix",
    "minimax-m2": "linear_stack rms_norm rms_norm rope_kv attention linear_add linear route_experts_gated experts_mix",
    "deepseek2-glm47flash": "linear_stack linear rope_latent linear_heads attention_latent "
    "linear_heads linear_add linear_stack route_experts_gated experts_mix",
    "gpt-oss": "linear_stack rope_kv attention linear_add linear_add route_experts_gated experts_mix",
}


@every_file
def test_a_row_costs_few_dispatches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(path, "native", monkeypatch, context=128) as model:
        kinds = [d.launch.op.kind for d in model.plan(1).dispatches]
        wanted = LAYERS[path.stem].split()
        end = len(kinds) - kinds[::-1].index("experts_mix")
        assert kinds[end - len(wanted) : end] == wanted
