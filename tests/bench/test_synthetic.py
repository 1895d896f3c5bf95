"""The model files of bench/synthetic.py: their structure, and their bytes, which are reproducible."""

from __future__ import annotations

import secrets
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

import synthetic
import zincmetal
from synthetic import TINY, Sizes
from zincmetal import gguf
from zincmetal.gguf import quants
from zincmetal.text.tokenizer import Tokenizer

SEED = secrets.randbits(32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    nbytes = synthetic.write(path, replace(TINY, mixed_layers=1), SEED)
    assert path.stat().st_size == nbytes
    with gguf.open(path) as file:
        yield file


def test_the_tensors_are_those_listed(tiny):
    listed = {w.name: (w.type, w.shape) for w in synthetic.tensors(replace(TINY, mixed_layers=1))}
    assert {t.name: (t.type, t.shape) for t in tiny.tensors.values()} == listed
    assert {qtype.name for qtype, _ in listed.values()} == {"f32", "q8_0", "q4_k", "q5_k", "q6_k"}


def test_weights_are_finite_and_of_the_right_size(tiny):
    """The weights of a matrix [m, k] have mean 0 and variance 1/k: products keep the size of activations."""
    for t in tiny.tensors.values():
        weights = quants.dequantize(t.type, tiny.data(t.name), t.shape).astype(np.float64)
        assert np.isfinite(weights).all(), (t.name, SEED)
        if len(t.shape) > 1:
            size = weights.std() * np.sqrt(t.shape[-1]) / (4 if t.name == "output.weight" else 1)
            assert 0.85 < size < 1.2, (t.name, SEED)
            assert abs(weights.mean()) < 0.2 * weights.std(), (t.name, SEED)
        elif t.name.endswith("norm.weight"):
            assert 0.8 <= weights.min() <= weights.max() <= 1.2, (t.name, SEED)


def test_the_same_seed_gives_the_same_bytes(tiny, tmp_path):
    again, other = tmp_path / "again.gguf", tmp_path / "other.gguf"
    synthetic.write(again, replace(TINY, mixed_layers=1), SEED)
    synthetic.write(other, replace(TINY, mixed_layers=1), SEED + 1)
    assert again.read_bytes() == tiny.path.read_bytes()
    with gguf.open(other) as file:
        same = [name for name in tiny.tensors if np.array_equal(file.data(name), tiny.data(name))]
    assert same == []


def test_a_tensor_does_not_depend_on_the_number_of_layers(tiny, tmp_path):
    synthetic.write(tmp_path / "deep.gguf", replace(TINY, n_layer=6), SEED)
    with gguf.open(tmp_path / "deep.gguf") as deep:
        for name in ("blk.2.ffn_up_exps.weight", "output.weight"):
            assert np.array_equal(deep.data(name), tiny.data(name))


def test_chunks_are_the_tensor(monkeypatch):
    """The chunks of a tensor have all its bytes, and none is larger than asked for."""
    w = quants.Q4_K
    weight = synthetic.Weight("blk.0.ffn_up_exps.weight", w, (3, 70, 256))
    monkeypatch.setattr(synthetic, "CHUNK", 5000)
    pieces = list(synthetic.chunks(weight, SEED))
    assert len(pieces) > 2
    assert max(p.nbytes for p in pieces) <= 5000
    assert sum(p.nbytes for p in pieces) == w.nbytes(weight.shape)


def test_writing_takes_a_chunk_of_memory_not_a_tensor(tmp_path):
    sizes = replace(TINY, n_layer=1, n_expert=512)
    largest = max(w.type.nbytes(w.shape) for w in synthetic.tensors(sizes))
    synthetic.write(tmp_path / "first.gguf", TINY, SEED)  # imports on first use must not count below
    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "CHUNK", 1 << 20)
        synthetic.write(tmp_path / "wide.gguf", sizes, SEED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20 < largest


def test_the_tokenizer_works(tiny):
    tokenizer = Tokenizer.from_metadata(tiny.metadata)
    text = "the painter <|im_start|> sings: é 漢"
    ids = tokenizer.encode(text, parse_special=True)
    assert tokenizer.decode(ids) == text
    assert TINY.n_text + 1 in ids
    assert tokenizer.eog_ids == {TINY.n_text, TINY.n_text + 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Writes all 40 layers at full size, without the weights."""
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    synthetic.write(path, Sizes(), empty=True)
    with gguf.open(path) as file:
        yield file


def test_the_full_size_file(whole):
    size = whole.parts[0].size
    assert 22.0e9 < size < 22.8e9
    assert whole.path.stat().st_blocks * 512 < 1e8, "the hole takes space on this disk"
    assert len(whole.metadata["tokenizer.ggml.tokens"]) == 248320
    n_recurrent = sum(name.endswith("ssm_a") for name in whole.tensors)
    n_full = sum(name.endswith("attn_q.weight") for name in whole.tensors)
    assert (n_recurrent, n_full) == (30, 10)


def test_a_file_may_have_a_block_that_drafts(tmp_path):
    """It drafts, and the tensors of the layers are those of the file without it."""
    for name, sizes in (("plain.gguf", TINY), ("drafts.gguf", replace(TINY, n_draft=1))):
        synthetic.write(tmp_path / name, sizes, SEED)
    with gguf.open(tmp_path / "plain.gguf") as plain, gguf.open(tmp_path / "drafts.gguf") as drafts:
        assert all(np.array_equal(plain.data(name), drafts.data(name)) for name in plain.tensors)
    with zincmetal.load(tmp_path / "drafts.gguf", device="cpu", context=64, threads=1) as model:
        assert model.generate("hello", 4, draft="mtp").tokens == model.generate("hello", 4).tokens
        assert model.config.drafts
