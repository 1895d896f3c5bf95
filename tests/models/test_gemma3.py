"""The real gemma-3-270m against Hugging Face's float32 figures (tests/data/make_gemma3_reference.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.paths import DATA
from support.reference_models import GPUS, load
from zincmetal import gguf
from zincmetal.api.model import Model
from zincmetal.errors import ChatTemplateError
from zincmetal.text.chat.template import ChatTemplate
from zincmetal.text.tokenizer import Tokenizer

N_PROMPTS, LONG = 4, 3  # the last prompt is longer than the sliding window


@pytest.fixture(scope="module")
def reference():
    return np.load(DATA / "gemma3_reference.npz")


@pytest.fixture(scope="module")
def tokenizer(gemma3: Path) -> Tokenizer:
    """Builds the tokenizer once: a vocabulary of 262,144 takes seconds."""
    with gguf.open(gemma3) as file:
        return Tokenizer.from_metadata(file.metadata)


def logits_at(model: Model, ids: list[int], rows: list[int]) -> np.ndarray:
    """Logits after some positions, [len(rows), vocab]: chunks of prefill end there."""
    out, at = np.empty((len(rows), model.config.n_vocab), np.float32), 0
    with model.session() as session:
        for i, row in enumerate(rows):
            session.prefill(ids[at : row + 1])
            out[i], at = session.last_logits(), row + 1
    return out


def assert_equal(logits: np.ndarray, reference, i: int, rows: slice) -> None:
    """Logits of up to 35: float32 in another order of summation."""
    assert np.isfinite(logits).all()
    assert np.abs(logits[:, reference["columns"]] - reference[f"logits_{i}"][rows]).max() < 1e-3
    peak = logits.max(axis=-1, keepdims=True).astype(np.float64)
    log_sum_exp = peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=-1))
    assert np.abs(log_sum_exp - reference[f"log_sum_exp_{i}"][rows]).max() < 1e-3
    assert np.abs(logits[-1][reference[f"top_ids_{i}"]] - reference[f"top_logits_{i}"]).max() < 1e-3


@pytest.mark.parametrize("i", range(N_PROMPTS))
@pytest.mark.parametrize("lane", ["native", *GPUS])
def test_gemma3_logits_equal_hugging_face(gemma3: Path, reference, lane, i, monkeypatch):
    ids, rows = reference[f"ids_{i}"].tolist(), reference[f"rows_{i}"].tolist()
    with load(gemma3, lane, monkeypatch, kv="f32", context=1024) as model:
        assert [layer.window for layer in model.config.layers[:6]] == [512, 512, 512, 512, 512, 0]
        assert (len(ids) > 512) == (i == LONG)
        assert_equal(logits_at(model, ids, rows), reference, i, slice(None))


def test_gemma3_logits_on_the_msl_lane(gemma3: Path, reference, monkeypatch):
    with load(gemma3, "msl", monkeypatch, kv="f32", context=64) as model:
        assert_equal(logits_at(model, reference["ids_0"].tolist(), [5]), reference, 0, slice(-1, None))


@pytest.mark.parametrize("i", range(N_PROMPTS))
@pytest.mark.parametrize("lane", ["native", *GPUS])
def test_gemma3_writes_what_hugging_face_writes(gemma3: Path, tokenizer, reference, lane, i, monkeypatch):
    with load(gemma3, lane, monkeypatch, context=1024) as model:
        model.text.tokenizer = tokenizer
        greedy = reference[f"greedy_{i}"].tolist()
        result = model.generate(str(reference["prompts"][i]), max_tokens=len(greedy))
    assert result.prompt_tokens == len(reference[f"ids_{i}"])
    assert result.tokens == greedy
    # The secret word stands 600 tokens back, where only the layers without a window see it.
    assert result.text.startswith("marmalade") == (i == LONG)


def test_gemma3_has_no_chat_template(gemma3: Path, tokenizer):
    with gguf.open(gemma3) as file, pytest.raises(ChatTemplateError, match="no chat template"):
        ChatTemplate.from_metadata(file.metadata, tokenizer)
