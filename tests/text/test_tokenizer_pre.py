"""Pre-tokenizers: where each cuts text, and which one serves a file that names none or a wrong model."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from support.paths import DATA
from support.vocab_builder import BYTE, CONTROL, LETTERS, NORMAL, byte_level, letters, sentencepiece, texts_of
from zincmetal.errors import TokenizerError
from zincmetal.text.pre_tokenizers import PRE_TOKENIZERS, REFUSED, SPACED
from zincmetal.text.tokenizer import Tokenizer

# Made with another engine of regular expressions (PyPI's `regex`) from the patterns of the original tokenizers, or of
# llama.cpp if those are not published. "\b" of tiny_aya has Oniguruma's meaning.
CUTS = json.loads((DATA / "tokenizer/cuts.json").read_text("utf-8"))


def test_every_pre_tokenizer_with_patterns_has_reference_cuts() -> None:
    covered = {name for row in CUTS for name in row["names"]}
    assert covered == PRE_TOKENIZERS.keys()
    assert len(PRE_TOKENIZERS) + len(SPACED) + len(REFUSED) == 91


@pytest.mark.parametrize(("name", "cuts"), [(name, row["cuts"]) for row in CUTS for name in row["names"]])
def test_text_is_cut_as_by_the_reference(name: str, cuts: list[list[str]]) -> None:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name].patterns]
    cutter = pre_tokenizers.Sequence(splits)
    for pieces in cuts:
        text = "".join(pieces)
        assert [text[i:j] for _, (i, j) in cutter.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(
    ("name", "whole", "bos"),
    [
        ("smaug-bpe", False, False),
        ("falcon3", True, True),
        ("pixtral", True, True),
        ("lfm2", True, True),
        ("glm4", True, False),
        ("minicpm5", True, False),
        ("gpt-4o", True, False),
        ("deepseek-v3", False, False),
        ("chameleon", False, True),
    ],
)
def test_flags_that_belong_to_a_name(name: str, whole: bool, bos: bool) -> None:
    # "abc" is a token that merges never reach.
    meta = byte_level([("b", "c"), ("a", "b"), ("ab", "c")], {"<|bos|>": CONTROL}, pre=name, bos_token_id=259)
    tokenizer = Tokenizer.from_metadata(meta)
    assert texts_of(tokenizer, tokenizer.encode("abc", add_bos=False)) == (["abc"] if whole else ["a", "bc"])
    assert tokenizer.add_bos is bos


def test_a_name_that_cannot_be_run_is_refused_with_the_reason() -> None:
    with pytest.raises(TokenizerError, match=r"'whitespace'.*drops the spaces"):
        Tokenizer.from_metadata(byte_level(pre="whitespace"))


MARKED_SPACES = {
    "tokens": ["<pad>", "<bos>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abé\n", "ab", "▁ab", "\n\n", "<|turn>"],
    "token_type": [CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 8, CONTROL],
    "merges": ["a b", "▁ ab", "\n \n"],
    "bos_token_id": 1,
}


@pytest.mark.parametrize("keys", [{"model": "gemma4"}, {"model": "gpt2", "pre": "gemma4"}])
def test_merges_over_plain_text_with_marked_spaces(keys: dict[str, str]) -> None:
    tokenizer = Tokenizer.from_metadata({f"tokenizer.ggml.{k}": v for k, v in (MARKED_SPACES | keys).items()})
    ids = tokenizer.encode("ab ab\n\né🦙", parse_special=True)
    assert [tokenizer.token_bytes(i) for i in ids] == [
        *[b"<bos>", b"ab", b" ab", b"\n\n", "é".encode()],
        *[bytes([b]) for b in "🦙".encode()],
    ]
    assert tokenizer.decode(ids[1:]) == "ab ab\n\né🦙"


def test_gemma_4_needs_its_begin_token_whatever_the_file_says(caplog: pytest.LogCaptureFixture) -> None:
    """As llama.cpp #21500: early files deny it, and the model writes nonsense without it."""
    keys = MARKED_SPACES | {"model": "gemma4", "add_bos_token": False}
    tokenizer = Tokenizer.from_metadata({f"tokenizer.ggml.{k}": v for k, v in keys.items()})
    assert (
        tokenizer.prompt("ab") == tokenizer.prompt("<bos>ab", parse_special=True) == [1, *tokenizer.encode("ab", False)]
    )
    assert "add_bos_token is false" in warnings_of(caplog)


# --- what is not said


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)


MERGES = [("t", "h"), ("1", "2"), ("12", "3"), ("'", "s")]


@pytest.mark.parametrize(
    ("name", "tokens", "more"),
    [
        ("llama-bpe", ["<|begin_of_text|>", "<|eot_id|>"], {}),
        ("llama-bpe", ["<|start_header_id|>", "<|end_header_id|>"], {}),
        ("qwen2", ["<|im_start|>"], {"general.architecture": "qwen3moe"}),
        ("qwen35", ["<|im_start|>"], {"general.architecture": "qwen35"}),
        ("smollm", ["<|im_start|>"], {"general.architecture": "llama", "general.name": "SmolLM2 135M Instruct"}),
        ("gpt-2", ["<|endoftext|>"], {"general.architecture": "gpt2"}),
        ("command-r", ["<|START_OF_TURN_TOKEN|>"], {}),
        ("deepseek-coder", ["<｜begin▁of▁sentence｜>"], {}),
        ("glm4", ["[gMASK]", "<sop>"], {}),
        ("gpt-4o", ["<|return|>", "<|call|>"], {}),
        ("tekken", [], {"general.basename": "Mistral-Nemo-Instruct"}),
    ],
)
@pytest.mark.parametrize("missing", [None, ""])
def test_a_missing_name_is_guessed_with_a_warning(
    name: str, tokens: list[str], more: dict[str, str], missing: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    special = dict.fromkeys(tokens, CONTROL)
    with_name = Tokenizer.from_metadata(byte_level(MERGES, special, pre=name) | more)
    assert "tokenizer.ggml.pre" not in warnings_of(caplog)
    without = Tokenizer.from_metadata(byte_level(MERGES, special, pre=missing) | more)
    assert f"tokenizer.ggml.pre is missing: '{name}'" in warnings_of(caplog)
    text = "It's 1234 thé (x)\n\n 'S"
    assert without.encode(text) == with_name.encode(text)
    assert without.add_bos is with_name.add_bos


@pytest.mark.parametrize(
    ("name", "made"),
    [("gpt-2", [("Ġ", "1")]), ("llama-bpe", [("1", "2"), ("12", "3")]), ("gpt-2", [("1", "2"), ("12", "12")])],
)
def test_digits_in_tokens_tell_how_they_were_cut(name: str, made: list[tuple[str, str]]) -> None:
    guessed = Tokenizer.from_metadata(byte_level(made, pre=None))
    text = "a 1 12 123 12121212"
    assert guessed.encode(text) == Tokenizer.from_metadata(byte_level(made, pre=name)).encode(text)


def test_a_large_vocabulary_without_two_digits_cuts_them_apart() -> None:
    words = [(a, b) for a in LETTERS[97:123] for b in LETTERS[97:123]] * 2
    many: list[Any] = list(dict.fromkeys(words)) + [("Ġ", a + b) for a, b in dict.fromkeys(words)]
    for more, name in (([(";", "Ċ")], "qwen2"), ([], "smollm")):
        guessed = Tokenizer.from_metadata(byte_level([*many, *more], pre=None))
        named = Tokenizer.from_metadata(byte_level([*many, *more], pre=name))
        for text in ("x;\ny", "12 ab", "(ab", "é"):
            assert guessed.encode(text) == named.encode(text)


def test_a_byte_level_vocabulary_that_says_llama(caplog: pytest.LogCaptureFixture) -> None:
    meta = byte_level([("Ġ", "a"), ("a", "b")], pre="gpt-2")
    wrong = Tokenizer.from_metadata(meta | {"tokenizer.ggml.model": "llama"})
    assert "taken as 'gpt2'" in warnings_of(caplog)
    right = Tokenizer.from_metadata(meta)
    for text in ("a ab é", "\n a", "🦙"):
        assert wrong.encode(text) == right.encode(text)
        assert wrong.decode(wrong.encode(text)) == text
    assert letters(" a") in meta["tokenizer.ggml.tokens"]


def test_pieces_with_scores_that_say_gpt2(caplog: pytest.LogCaptureFixture) -> None:
    meta = sentencepiece({"▁": -1.0, "a": -2.0, "b": -3.0, "ab": -1.5, "▁ab": -1.2})
    wrong = Tokenizer.from_metadata(meta | {"tokenizer.ggml.model": "gpt2"})
    assert "taken as 'llama'" in warnings_of(caplog)
    ranked = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.scores": None, "tokenizer.ggml.merges": ["▁ ab", "a b"]}
    by_merges = Tokenizer.from_metadata({k: v for k, v in (meta | ranked).items() if v is not None})
    right = Tokenizer.from_metadata(meta)
    for text in ("ab ab", "é b", "a\n"):
        assert wrong.encode(text) == by_merges.encode(text) == right.encode(text)
        assert wrong.decode(wrong.encode(text, add_bos=False)) == text
