"""Vectors of texts and scores of documents, against exact figures and a float64 reference of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zincmetal
from support.paths import DATA
from support.reference_models import GPUS, load, reference_models
from support.text_model import TURNS
from support.tiny_dense import Meaning, Tiny
from support.vocab_builder import LETTERS, byte_level
from zincmetal.api import vectors
from zincmetal.engine.vectors import vectors as hidden_vectors
from zincmetal.errors import ContextFullError, GGUFError, UnsupportedModelError, UsageError
from zincmetal.gguf.quants import dequantize

LANES = ["msl", "native", *GPUS]
every_lane = pytest.mark.parametrize("lane", LANES)
QWEN3 = DATA / "qwen3-embedding.gguf"
MEAN, FIRST, LAST, RANK = 1, 2, 3, 4


def close(got: Any, exact: Any, rel: float = 1e-5) -> None:
    assert got.dtype == np.float32
    assert got.shape == exact.shape
    assert (np.abs(got - exact).max(axis=-1) <= rel * np.abs(exact).max(axis=-1)).all()


@every_lane
def test_vectors_of_qwen3_embedding(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All texts in one step, and each alone."""
    exact = np.load(QWEN3.with_suffix(".npz"))
    texts = [exact["tokens"][:n].tolist() for n in exact["prefix_lengths"]]
    with load(QWEN3, lane, monkeypatch, kv="f32", context=128, exact=lane != "native") as model:
        assert model.config.pooling
        close(model.embed(texts), exact["embeddings"])
        close(model.embed(texts, normalize=False), exact["embeddings_raw"])
        close(model.embed(texts[3], normalize=False), exact["embeddings_raw"][3:4])
        short = exact["embeddings_raw"][:, :32]
        close(model.embed(texts, dimensions=32), short / np.linalg.norm(short, axis=1, keepdims=True))
        before = model.figures()["pages"]["free"]
        model.embed(texts)
        assert model.figures()["pages"]["free"] == before


WINDOW = Meaning((5, 5, 5, 5, 5, 0), both_ways=True, rope_base=1e6, rope_base_local=1e4, embedding_scale=24**0.5)


def gemma(**keys: Any) -> Tiny:
    given = {"pooling_type": MEAN, "attention.sliding_window": 5, "rope.freq_base": 1e6, **keys}
    return Tiny("gemma-embedding", n_layer=6, n_ff=(28,) * 6, keys=given)


@every_lane
def test_tokens_of_gemma_embedding_see_both_ways(lane: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = gemma()
    tiny.matrix("dense_2", 44, 24)
    tiny.matrix("dense_3", 24, 44)
    rng = np.random.default_rng()
    texts = [rng.integers(0, 40, n).tolist() for n in (1, 33, 2, 70, 7)]
    with load(tiny.save(tmp_path / "m.gguf"), lane, monkeypatch, kv="f32") as model:
        got = model.embed(texts, normalize=False)
    w2, w3 = (tiny.tensors[f"dense_{i}.weight"].values.astype(np.float64) for i in (2, 3))
    close(got, np.stack([tiny.hidden(ids, WINDOW).mean(axis=0) @ w2.T @ w3.T for ids in texts]), 2e-5)


def test_a_text_is_seen_as_a_whole(tmp_path: Path) -> None:
    """More rows than a step usually has on a CPU. A longer text than the context is refused."""
    tiny = gemma(context_length=1024)
    ids = np.random.default_rng().integers(0, 40, 700).tolist()
    with zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu", kv="f32") as model:
        close(model.embed([[7, 8], ids, ids[:9]], normalize=False)[1], tiny.hidden(ids, WINDOW).mean(axis=0), 2e-5)
        with pytest.raises(ContextFullError, match=r"1025 tokens and the context 1024"):
            model.embed([[1] * 1025])
        for use in (lambda: model.generate([1]), lambda: model.logits([1])):
            with pytest.raises(UsageError, match=r"does not generate.*use embed"):
                use()


@pytest.mark.parametrize(
    ("kind", "pool"), [(MEAN, lambda h: h.mean(0)), (FIRST, lambda h: h[0]), (LAST, lambda h: h[-1])]
)
def test_poolings_over_several_steps(kind: int, pool: Any, tmp_path: Path) -> None:
    """A text of more rows than a step has, and more texts than a step has seats."""
    tiny = Tiny("qwen3", keys={"pooling_type": kind, "context_length": 1200})
    rng = np.random.default_rng()
    texts = [rng.integers(0, 40, n).tolist() for n in (3, 1100, *[1] * 40)]
    with zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu", kv="f32", context=1200) as model:
        got = model.embed(texts, normalize=False)
    close(got, np.stack([pool(tiny.hidden(ids)) for ids in texts]), 3e-5)


def test_pools_that_are_too_small_for_all_texts(tmp_path: Path) -> None:
    """Texts take turns where pages are few, beside a generation that has some."""
    tiny = Tiny("qwen3", keys={"pooling_type": LAST, "context_length": 640})
    texts = [np.random.default_rng(i).integers(0, 40, 90).tolist() for i in range(9)]
    with (
        zincmetal.load(
            tiny.save(tmp_path / "m.gguf"), device="cpu", kv="f32", context=640, pool_tokens=640, max_sequences=1
        ) as model,
        model.submit([1, 2, 3], max_tokens=200) as running,
    ):
        close(model.embed(texts, normalize=False), np.stack([tiny.hidden(ids)[-1] for ids in texts]), 3e-5)
        assert len(running.result().tokens) == 200


def test_what_makes_no_vectors(tmp_path: Path) -> None:
    with zincmetal.load(Tiny("qwen3").save(tmp_path / "m.gguf"), device="cpu") as model:
        with pytest.raises(UsageError, match=r"makes no vectors: its file has no pooling_type; load an embedding"):
            model.embed([1])
        with pytest.raises(UsageError, match=r"is no reranker"):
            model.rerank("a", ["b"])
    with zincmetal.load(QWEN3, device="cpu") as model:
        for wrong, words in (([[]], "no tokens"), ([[600]], "600"), ("a", "tokeni")):
            with pytest.raises(zincmetal.ZincError, match=words):
                model.embed(wrong)
        with pytest.raises(UsageError, match="dimensions"):
            model.embed([1], dimensions=129)
        assert model.embed([]).shape == (0, 128)


@pytest.mark.parametrize(
    ("keys", "tensors", "error", "words"),
    [
        ({"pooling_type": 5}, {}, UnsupportedModelError, "pooling_type is 5"),
        ({"pooling_type": -1}, {}, GGUFError, "pooling_type"),
        ({"attention.causal": 2}, {}, GGUFError, "attention.causal"),
        ({"pooling_type": RANK, "classifier.output_labels": ["a"]}, {"cls.output": (2, 24)}, GGUFError, "1 labels"),
        ({"pooling_type": RANK}, {"cls.output": (2, 20)}, UnsupportedModelError, "cls.output.weight has shape"),
        ({"pooling_type": RANK}, {"cls": (24, 24)}, UnsupportedModelError, "cls.weight"),
        ({}, {"dense_2": (24, 24)}, UnsupportedModelError, "dense_2.weight"),
        ({"pooling_type": MEAN}, {"dense_2": (44, 24), "dense_3": (24, 40)}, UnsupportedModelError, "dense_3.weight"),
    ],
)  # fmt: skip
def test_files_that_are_wrong_are_refused_by_name(
    keys: Any, tensors: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    tiny = Tiny("qwen3", keys=keys)
    for name, shape in tensors.items():
        tiny.matrix(name, *shape)
    with pytest.raises(error, match=words):
        zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu")


# ---- rerankers --------------------------------------------------------------------------------------------------

PROMPT = "<|im_start|>q {query} d {document}<|im_end|>"
DOCUMENTS = ["it is {query}", "<|im_end|>", "", "no"]


def reranker(**keys: Any) -> Tiny:
    words = byte_level([("y", "e"), ("ye", "s"), ("n", "o")], TURNS, **keys.pop("vocabulary", {}))
    return Tiny("qwen3", n_vocab=len(words["tokenizer.ggml.tokens"]), keys={"context_length": 600, **words, **keys})


def scores_of(tiny: Tiny, path: Path, rows: Any, prompts: list[list[int]], **options: Any) -> None:
    """Fails unless the probabilities of the first of ``rows`` are those of float64."""
    logits = np.stack([tiny.hidden(ids)[-1] for ids in prompts]) @ rows.astype(np.float64).T
    want = np.exp(logits[:, 0]) / np.exp(logits).sum(axis=1)
    with zincmetal.load(tiny.save(path), device="cpu", kv="f32", context=600) as model:
        got = model.rerank("who?", DOCUMENTS, **options)
    assert got.dtype == np.float32
    assert np.abs(got - want).max() < 1e-5


def test_a_reranker_with_a_classifier(tmp_path: Path) -> None:
    labels = {"pooling_type": RANK, "classifier.output_labels": ["yes", "no"]}
    tiny = reranker(**labels, **{"tokenizer.chat_template.rerank": PROMPT})
    tiny.matrix("cls.output", 2, 24, scale=3.0)
    ids = list(tiny.keys["tokenizer.ggml.tokens"])
    assert [ids.index(text) for text in ("yes", "no", "<|im_start|>")] == [257, 258, 259]
    prompts = [tokens(ids, document) for document in DOCUMENTS]
    scores_of(tiny, tmp_path / "m.gguf", tiny.tensors["cls.output.weight"].values, prompts)


def tokens(ids: list[str], document: str) -> list[int]:
    """The ids of PROMPT: of special tokens only those of the template."""
    text = f"q who? d {document}".encode().replace(b"no", b"\0")
    inner = [ids.index("no") if byte == 0 else byte_id(ids, byte) for byte in text]
    return [ids.index("<|im_start|>"), *inner, ids.index("<|im_end|>")]


def byte_id(ids: list[str], byte: int) -> int:
    return ids.index(LETTERS[byte])


def test_a_reranker_without_a_classifier_says_yes_or_no(tmp_path: Path) -> None:
    tiny = reranker(**{"general.name": "A Reranker", "tokenizer.chat_template.rerank": PROMPT})
    ids = list(tiny.keys["tokenizer.ggml.tokens"])
    rows = tiny.tensors["output.weight"].values[[ids.index("yes"), ids.index("no")]]
    scores_of(tiny, tmp_path / "m.gguf", rows, [tokens(ids, document) for document in DOCUMENTS])


def test_a_reranker_of_pairs(tmp_path: Path) -> None:
    """A file without a prompt and with one row: query, end, document, end. The score is the logit."""
    tiny = reranker(pooling_type=RANK, vocabulary={"eos_token_id": 260, "add_eos_token": True})
    tiny.matrix("cls.output", 1, 24)
    ids = list(tiny.keys["tokenizer.ggml.tokens"])
    prompts = [[byte_id(ids, ord("a")), 260, *map(byte_id, [ids] * 2, b"xy"), 260], [byte_id(ids, ord("a")), 260, 260]]
    row = tiny.tensors["cls.output.weight"].values.astype(np.float64)
    with zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu", kv="f32") as model:
        got = model.rerank("a", ["xy", ""])
        close(got[:, None], np.stack([row @ tiny.hidden(p)[-1] for p in prompts]))
        with pytest.raises(UsageError, match="use rerank"):
            model.embed("a")
        with pytest.raises(UsageError, match="instruction"):
            model.rerank("a", ["xy"], instruction="find it")


def test_the_prompt_of_qwen3_takes_an_instruction(tmp_path: Path) -> None:
    tiny = reranker(**{"general.basename": "Qwen3-Reranker"})
    with zincmetal.load(tiny.save(tmp_path / "m.gguf"), device="cpu", context=600) as model:
        (usual,) = vectors.rerank_ids(model, "a", ["b {query}"], None)
        (other,) = vectors.rerank_ids(model, "a", ["b {query}"], "Find <|im_end|>")
        shown = model.detokenize(usual)
        assert shown == vectors.QWEN3.format(query="a", document="b {query}")
        assert model.detokenize(other) == shown.replace(vectors.INSTRUCTION, "Find <|im_end|>")
        assert [ids.count(model.tokenizer.encode("<|im_end|>", parse_special=True)[0]) for ids in (usual, other)] == [
            2,
            2,
        ]


HIDDEN_MODELS = [*reference_models("gemma3", "qwen35", "qwen35moe"), DATA / "families/lfm2.gguf"]


@pytest.mark.parametrize("path", HIDDEN_MODELS, ids=lambda p: p.stem)
def test_hidden_rows_are_what_the_lm_head_sees(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hybrids and mixtures too, several texts in a step, and with a short text between long ones."""
    ids = np.load(path.with_suffix(".npz"))["tokens"].tolist()
    texts = [ids[:40], ids[:1], ids[5:60]]
    with load(path, "native", monkeypatch, kv="f32", context=128) as model:
        rows = hidden_vectors(model.running, texts, "last")
        tensor = model.file.tensors.get("output.weight") or model.file.tensors["token_embd.weight"]
        head = dequantize(tensor.type, model.file.data(tensor.name), tensor.shape)
        want = np.stack([model.logits(text)[-1] for text in texts])
    assert np.abs(rows @ head.T - want).max() < 1e-3 * np.abs(want).max()
