"""SentencePiece's merges against the plain definition: ties, unused and user-defined pieces, bytes, cost."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest

from support.merges import assert_merges, random_pieces
from support.paths import DATA
from support.vocab_builder import NORMAL, UNUSED, USER_DEFINED, byte_level, id_of, sentencepiece, texts_of
from zincmetal.text.tokenizer import Tokenizer

# Random vocabularies: pieces of equal score, unused and user-defined pieces, with and without bytes and a prefix.
# The ids are those of the sentencepiece package.
CASES = json.loads((DATA / "tokenizer/sentencepiece.json").read_text("utf-8"))


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_ids_are_those_of_sentencepiece(case: dict[str, Any]) -> None:
    tokens, scores, types = zip(*case["pieces"], strict=True)
    keys = {"model": "llama", "tokens": list(tokens), "scores": np.array(scores, np.float32), "token_type": list(types)}
    keys |= {"add_space_prefix": case["prefix"], "unknown_token_id": 0, "add_bos_token": False}
    tokenizer = Tokenizer.from_metadata({f"tokenizer.ggml.{k}": v for k, v in keys.items()})
    for text, ids in case["texts"]:
        assert tokenizer.encode(text) == ids, text


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_equal_scores_merge_from_the_left(levels: int) -> None:
    rng = random.Random(levels)
    for _ in range(20):
        score = {piece: -float(rng.randrange(levels)) for piece in random_pieces(rng, 40)}
        assert_merges(rng, score, longest=40)


def test_a_user_defined_piece_behind_the_prefix_and_one_that_was_added_later() -> None:
    meta = sentencepiece({"▁": -1.0, "a": -2.0, "▁a": -0.5}, {"<own>": USER_DEFINED, "<added>": USER_DEFINED})
    scores = meta["tokenizer.ggml.scores"].tolist()
    scores[id_of(meta, "<added>")] = -1000.0  # converters' score of tokens that SentencePiece does not know
    tokenizer = Tokenizer.from_metadata(meta | {"tokenizer.ggml.scores": scores})

    def pieces(text: str) -> list[str]:
        return texts_of(tokenizer, tokenizer.encode(text, add_bos=False))

    assert pieces("a<own>a") == [" a", "<own>", "a"]  # SentencePiece puts one prefix before it all
    assert pieces("<own>a") == [" ", "<own>", "a"]
    assert pieces("a<added>a") == [" a", "<added>", " a"]  # Hugging Face puts one before each part
    assert pieces("<added>a") == ["<added>", " a"]


def test_characters_without_a_piece_or_bytes_are_one_unknown_token() -> None:
    meta = byte_level(model="llama", pre=None, merges=None, tokens=["<unk>", "▁", "a"], token_type=[2, NORMAL, NORMAL])
    keys = {"tokenizer.ggml.scores": [0.0, -1.0, -2.0], "tokenizer.ggml.add_space_prefix": False}
    tokenizer = Tokenizer.from_metadata(meta | keys)
    assert tokenizer.encode("axyza b") == [2, 0, 2, 1, 0]


def test_an_unused_piece_comes_apart_into_what_made_it() -> None:
    pieces = {"a": -1.0, "b": -2.0, "ab": -0.5, "abb": -0.25}
    meta = sentencepiece(pieces, {"abba": UNUSED}, add_space_prefix=False)
    tokenizer = Tokenizer.from_metadata(meta)
    assert texts_of(tokenizer, tokenizer.encode("abba", add_bos=False)) == ["abb", "a"]


def test_without_scores_pieces_merge_in_the_order_of_ids_or_merges(caplog: pytest.LogCaptureFixture) -> None:
    pieces = {"a": -1.0, "b": -2.0, "c": -3.0, "bc": -4.0, "ab": -5.0}
    by_id = Tokenizer.from_metadata(sentencepiece(pieces, scores=None, add_space_prefix=False))
    assert texts_of(by_id, by_id.encode("abc", add_bos=False)) == ["a", "bc"]
    by_merge = Tokenizer.from_metadata(
        sentencepiece(pieces, scores=None, merges=["a b", "b c"], add_space_prefix=False)
    )
    assert texts_of(by_merge, by_merge.encode("abc", add_bos=False)) == ["ab", "c"]
    assert [r.getMessage() for r in caplog.records if "scores is missing" in r.getMessage()] != []


def test_without_types_bytes_and_the_unknown_token_are_found_by_name() -> None:
    meta = sentencepiece({"▁": -1.0, "a": -2.0, "▁a": -0.5})
    untyped = Tokenizer.from_metadata({k: v for k, v in meta.items() if k != "tokenizer.ggml.token_type"})
    typed = Tokenizer.from_metadata(meta)
    for text in ("a é\n", "<0x0A>", "</s>a<unk>"):
        for parse_special in (False, True):
            ids = untyped.encode(text, parse_special=parse_special)
            assert ids == typed.encode(text, parse_special=parse_special)
            assert untyped.decode(ids) == typed.decode(ids)
    assert untyped.eog_ids == {2}
    old = {"tokenizer.ggml.token_type", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"}
    oldest = Tokenizer.from_metadata({k: v for k, v in meta.items() if k not in old})
    assert (oldest.bos_id, oldest.eos_id, oldest.eog_ids, oldest.encode("a")[0]) == (1, 2, {2}, 1)


def runs(letters: int, longest: int) -> dict[str, Any]:
    """Makes all runs of some letters, by score: a run of n letters can be merged in n - 1 ways."""
    pieces = [chr(0x4E00 + i) * n for i in range(letters) for n in range(1, longest + 1)]
    return sentencepiece({piece: -float(i) for i, piece in enumerate(pieces)}, add_space_prefix=False)


def test_memory_is_in_proportion_to_the_pieces() -> None:
    meta = runs(2, 300)
    size = sum(len(token.encode()) for token in meta["tokenizer.ggml.tokens"])
    tracemalloc.start()
    tokenizer = Tokenizer.from_metadata(meta)
    ids = tokenizer.encode("\u4e00" * 2000, add_bos=False)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tokenizer.decode(ids) == "\u4e00" * 2000
    assert used < 10 * size + (1 << 20)  # a table of the 90,000 merges would take several times as much


def test_a_piece_may_be_of_any_length() -> None:
    long = {"a" * 2**n: -float(n) for n in range(15)}
    tokenizer = Tokenizer.from_metadata(sentencepiece(long, add_space_prefix=False))
    for n in (1, 1000, 2**14, 2**14 + 3):
        assert tokenizer.decode(tokenizer.encode("a" * n)[1:]) == "a" * n
