"""Tokenizers against slow oracles and reference ids, and on hostile metadata and text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.merges import assert_merges, random_pieces
from support.paths import DATA
from support.vocab_builder import (
    CONTROL,
    LETTERS,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    byte_level,
    letters,
    sentencepiece,
    texts_of,
)
from zincmetal import gguf
from zincmetal.errors import TokenizerError, UsageError
from zincmetal.text.tokenizer import PRE_TOKENIZERS, Tokenizer


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


# --- reference ids


def test_smollm2_ids_are_those_of_llama_cpp(smollm2: Path) -> None:
    with gguf.open(smollm2) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    cases = json.loads((DATA / "tokenizer/smollm2.json").read_text())
    assert len(cases) == 15
    for case in cases:
        ids = tokenizer.encode(case["text"], parse_special=case["parse_special"])
        assert ids == case["ids"], case["text"]
        assert tokenizer.decode(ids) == case["text"]
    assert (tokenizer.vocab_size, tokenizer.bos_text, tokenizer.eos_text) == (49152, "<|im_start|>", "<|im_end|>")
    assert tokenizer.add_bos is False
    assert {tokenizer.token_bytes(i) for i in tokenizer.eog_ids} == {b"<|endoftext|>", b"<|im_end|>", b"<reponame>"}


def test_gemma3_ids_are_those_of_sentencepiece(gemma3: Path) -> None:
    with gguf.open(gemma3) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    cases = json.loads((DATA / "tokenizer/gemma3.json").read_text())
    assert len(cases) == 29
    for case in cases:
        ids = tokenizer.encode(case["text"], add_bos=False, parse_special=case["parse_special"])
        assert ids == case["ids"], case["text"]
        assert tokenizer.decode(ids) == case["text"].replace("▁", " ")
    assert (tokenizer.vocab_size, tokenizer.bos_text, tokenizer.eos_text) == (262144, "<bos>", "<eos>")
    assert tokenizer.encode("x")[0] == tokenizer.bos_id
    # In Gemma's vocabulary "</s>" is an HTML tag.
    assert {tokenizer.token_bytes(i) for i in tokenizer.eog_ids} == {b"<eos>", b"<end_of_turn>"}


# --- where text is cut


def cuts(pre: str, text: str) -> list[str]:
    """Returns the pieces of a pre-tokenizer: with every substring a token, each piece becomes one token."""
    spelled = letters(text)
    substrings = {spelled[i:j] for i in range(len(spelled)) for j in range(i + 2, len(spelled) + 1)}
    merges = [(s[:k], s[k:]) for s in sorted(substrings, key=len) for k in range(1, len(s))]
    tokenizer = Tokenizer.from_metadata(byte_level(merges, pre=pre))
    return texts_of(tokenizer, tokenizer.encode(text, add_bos=False))


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Hello", "'s", " ", " world", "123", "!!", "\n", " x"]),
        ("gpt-2", ["DON", "'", "T", " we", "'ve"]),
        ("gpt-2", [" ½²", " 12345", "\u3000", "日本"]),
        ("phi-2", ["a", " 12", "\t", "b"]),
        ("smollm", ["a", " ", "1", "2", "b", "½"]),
        ("starcoder", ["a", " ", "1", "2", "..."]),
        ("refact", ["(", "3", ")"]),
        ("llama-bpe", ["I", "'LL", " x", "123", "45", "\r\n\n", " ", " y"]),
        ("llama3", ["(foo", ".\n", "bar", " ", " ...\n\n", "\t", "\tz"]),
        ("llama-v3", ["x", "\u0301y", "1"]),
        ("qwen2", ["I", "'ll", "1", "2", " ", "3"]),
        ("qwen2", ["x", "\u0301y"]),
        ("qwen35", ["x\u0301y", " \u0301z", "4", "5", "-?\n"]),
        ("deepseek-r1-qwen", ["e", "\u0301", "1", "2"]),
        ("default", ["ab", ",", "cd", " ", "123", "4", "=>", " x", "`"]),
        ("falcon", ["ab", ",", "cd", " ", "123", "4", "`", "x"]),
        ("tekken", ["hello", "World", " HTTP", "2", "nd", "/Über", "ÀB", "//\n"]),
    ],
)
def test_text_is_cut_where_the_model_was_trained_to(pre: str, pieces: list[str]) -> None:
    assert cuts(pre, "".join(pieces)) == pieces


def test_every_pre_tokenizer_undoes_its_encoding(rng: random.Random) -> None:
    alphabet = ["'s", "'LL", " ", "  ", "\n", "\r\n", "\t", "a", "Zß", "9", "½", "日", "🦙", ".", "<|", "\u3000", "_"]
    for pre in PRE_TOKENIZERS:
        tokenizer = Tokenizer.from_metadata(byte_level(pre=pre))
        text = "".join(rng.choice(alphabet) for _ in range(300))
        ids = tokenizer.encode(text)
        assert ids == [LETTERS.index(c) for c in letters(text)]  # nothing merges, so each id is a byte
        assert tokenizer.decode(ids) == text


def test_qwen_composes_characters_first() -> None:
    for pre, expected in (("qwen2", "é"), ("qwen35", "é"), ("deepseek-r1-qwen", "e\u0301"), ("gpt-2", "e\u0301")):
        tokenizer = Tokenizer.from_metadata(byte_level(pre=pre))
        assert tokenizer.decode(tokenizer.encode("e\u0301")) == expected


def test_whole_words_come_before_merges_where_the_model_says_so() -> None:
    # "abc" is a token, but merges make "bc" first and never reach it.
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    for pre, expected in (("llama-bpe", ["abc"]), ("qwen2", ["a", "bc"])):
        tokenizer = Tokenizer.from_metadata(byte_level(merges, pre=pre))
        assert texts_of(tokenizer, tokenizer.encode("abc")) == expected


# --- merging, against oracles


def merge_by_rank(text: str, rank: dict[tuple[str, str], int]) -> list[str]:
    """Merges as BPE's definition says: the pair of neighbours of lowest rank, leftmost first."""
    parts = list(text)
    while pairs := [(rank[p], i) for i, p in enumerate(pairwise(parts)) if p in rank]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_byte_level_merges_are_those_of_the_definition(rng: random.Random) -> None:
    for _ in range(20):
        made, merges = list("abcd"), []
        while len(merges) < 40:
            pair = (rng.choice(made), rng.choice(made))
            if len(pair[0] + pair[1]) <= 8 and pair[0] + pair[1] not in made:
                merges.append(pair)
                made.append(pair[0] + pair[1])
        tokenizer = Tokenizer.from_metadata(byte_level(merges))
        rank = {pair: i for i, pair in enumerate(merges)}
        for _ in range(20):
            text = "".join(rng.choice("abcd") for _ in range(rng.randint(1, 60)))
            assert texts_of(tokenizer, tokenizer.encode(text)) == merge_by_rank(text, rank), text


def test_sentencepiece_merges_are_those_of_the_definition(rng: random.Random) -> None:
    for _ in range(20):
        score = {piece: -float(i) for i, piece in enumerate(random_pieces(rng, 60))}
        assert_merges(rng, score, longest=60)


# --- SentencePiece


def test_space_prefix_is_put_before_text_and_taken_off_again() -> None:
    pieces = {"▁": -9.0, "h": -9.0, "i": -9.0, "hi": -2.0, "▁hi": -1.0}
    with_prefix = Tokenizer.from_metadata(sentencepiece(pieces))
    without = Tokenizer.from_metadata(sentencepiece(pieces, add_space_prefix=False))
    assert texts_of(with_prefix, with_prefix.encode("hi hi")) == ["<s>", " hi", " hi"]
    assert texts_of(without, without.encode("hi hi")) == ["<s>", "hi", " hi"]
    ids = with_prefix.encode("hi", add_bos=False)
    assert with_prefix.decode(ids) == "hi"
    assert with_prefix.decode(ids, continues=True) == " hi"
    assert with_prefix.decode(with_prefix.encode(" hi"), skip_special=True) == " hi"
    assert with_prefix.decode(with_prefix.encode("hi"), skip_special=True) == "hi"
    assert texts_of(with_prefix, with_prefix.encode("hi</s>hi", parse_special=True)) == ["<s>", " hi", "</s>", " hi"]


def test_characters_without_a_piece_fall_back_to_bytes() -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece({"▁": -1.0, "a": -2.0}))
    ids = tokenizer.encode("a🦙\n", add_bos=False)
    assert [tokenizer.token_bytes(i) for i in ids] == [b" ", b"a", b"\xf0", b"\x9f", b"\xa6", b"\x99", b"\n"]
    assert tokenizer.decode(ids) == "a🦙\n"


def test_merging_text_never_makes_a_special_token() -> None:
    # By score these pieces could merge to "</s>" and "<0x0A>"; "<pad>" is user-defined.
    pieces = {c: -9.0 - i for i, c in enumerate("</s>0xA▁")} | {"</": -1.0, "s>": -2.0, "<0x0": -3.0, "A>": -4.0}
    tokenizer = Tokenizer.from_metadata(sentencepiece(pieces, {"<A>": USER_DEFINED}, add_space_prefix=False))
    assert texts_of(tokenizer, tokenizer.encode("</s>", add_bos=False)) == ["</", "s>"]
    assert texts_of(tokenizer, tokenizer.encode("<0x0A>", add_bos=False)) == ["<", "0", "x", "0", "A>"]
    assert texts_of(tokenizer, tokenizer.encode("s<A>", add_bos=False)) == ["s", "<A>"]


def test_user_defined_runs_of_spaces_are_found_longest_first() -> None:
    runs = {" " * n: USER_DEFINED for n in (2, 3, 5)}
    tokenizer = Tokenizer.from_metadata(sentencepiece({"▁": -1.0, "▁a": -2.0, "a": -3.0}, runs, add_space_prefix=False))

    def pieces(text: str) -> list[str]:
        return texts_of(tokenizer, tokenizer.encode(text, add_bos=False))

    assert pieces("a   a") == ["a", "   ", "a"]
    assert pieces("  a" + " " * 9) == ["  ", "a", " " * 5, "   ", " "]
    assert pieces("▁ a ▁▁") == ["  ", "a", "   "]  # SentencePiece takes both for spaces
    assert tokenizer.decode(tokenizer.encode("  a   a", add_bos=False)) == "  a   a"


# --- special tokens


SPECIAL = {"<|begin|>": CONTROL, "<|im_end|>": CONTROL, "<unk>": UNKNOWN, "<tool>": USER_DEFINED, "Ġraw": USER_DEFINED}


def special_ids(*names: str) -> list[int]:
    return [256 + list(SPECIAL).index(name) for name in names]


def test_special_tokens_in_text_count_only_on_request() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(special=SPECIAL))
    text = "a<|im_end|><tool><unk>"
    begin, (tool,) = tokenizer.encode("a<|im_end|>"), special_ids("<tool>")
    assert len(begin) == len("a<|im_end|>")
    assert tokenizer.encode(text) == [*begin, tool, *tokenizer.encode("<unk>")]
    assert tokenizer.encode(text, parse_special=True) == [begin[0], *special_ids("<|im_end|>", "<tool>", "<unk>")]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True), skip_special=True) == "a<tool>"


def test_user_defined_tokens_stand_for_their_own_text() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(special=SPECIAL))
    assert tokenizer.token_bytes(special_ids("Ġraw")[0]) == "Ġraw".encode()
    assert tokenizer.encode("Ġraw") == special_ids("Ġraw")


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_begin_token_follows_the_file_unless_told(pre: str, add_bos: bool | None) -> None:
    bos, end = special_ids("<|begin|>", "<|im_end|>")
    tokenizer = Tokenizer.from_metadata(
        byte_level(special=SPECIAL, pre=pre, bos_token_id=bos, eos_token_id=end, add_bos_token=add_bos)
    )
    by_file = add_bos if add_bos is not None else pre == "llama-bpe"
    assert tokenizer.add_bos is by_file
    assert (tokenizer.encode("a")[0] == bos) is by_file
    assert tokenizer.encode("a", add_bos=True)[0] == bos
    assert tokenizer.encode("a", add_bos=False)[0] != bos
    assert tokenizer.encode("<|begin|>a", parse_special=True)[:2] == [bos, LETTERS.index("a")]  # never twice
    assert tokenizer.encode("<|begin|>", parse_special=True, add_bos=True) == [bos, bos]
    assert tokenizer.encode("", add_bos=True, add_eos=True) == [bos, end]


def test_end_token_follows_the_file_unless_told() -> None:
    end = special_ids("<|im_end|>")[0]
    tokenizer = Tokenizer.from_metadata(byte_level(special=SPECIAL, eos_token_id=end, add_eos_token=True))
    assert tokenizer.encode("a")[-1] == end
    assert end not in tokenizer.encode("a", add_eos=False)


def test_asking_for_a_begin_token_that_is_not_there_is_an_error() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(pre="llama-bpe"))
    assert tokenizer.bos_id is None
    assert tokenizer.encode("a") == [LETTERS.index("a")]
    with pytest.raises(TokenizerError, match="bos_token_id"):
        tokenizer.encode("a", add_bos=True)


def test_generation_ends_at_every_token_that_means_an_end() -> None:
    special = {"<|im_end|>": CONTROL, "<|endoftext|>": NORMAL, "</s>": NORMAL, "<turn>": CONTROL, "odd": NORMAL}
    ids = {name: 256 + i for i, name in enumerate(special)}
    typed = Tokenizer.from_metadata(byte_level(special=special, eos_token_id=ids["odd"], eot_token_id=ids["<turn>"]))
    # "</s>" of type normal is text; "<|endoftext|>" of type normal is a mistake of the file.
    assert typed.eog_ids == {ids["<|im_end|>"], ids["<|endoftext|>"], ids["<turn>"], ids["odd"]}
    assert typed.encode("<|endoftext|>", parse_special=True) == [ids["<|endoftext|>"]]
    html = Tokenizer.from_metadata(byte_level(special=special | {"</s>": USER_DEFINED}, eos_token_id=ids["odd"]))
    assert ids["</s>"] not in html.eog_ids
    untyped = Tokenizer.from_metadata(byte_level(special=special, eos_token_id=ids["odd"], token_type=None))
    assert untyped.eog_ids == {ids["<|im_end|>"], ids["<|endoftext|>"], ids["</s>"], ids["odd"]}
    assert untyped.encode("</s>odd", parse_special=True) == [ids["</s>"], ids["odd"]]


# --- decoding


def test_stream_holds_back_a_character_until_it_is_whole() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level())
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("é🦙!")] == ["", "é", "", "", "", "🦙", "!"]
    assert stream.finish() == ""
    stream.push(tokenizer.encode("é")[0])
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("make", [byte_level, lambda: sentencepiece({"▁": -1.0, "▁a": -2.0, "日": -3.0, "a": -4.0})])
def test_stream_joins_to_what_decode_gives(make: Callable[[], dict[str, Any]], rng: random.Random) -> None:
    tokenizer = Tokenizer.from_metadata(make())
    for _ in range(300):
        some = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 12))]
        ids = some + tokenizer.encode(rng.choice(["é🦙", "日a a", "\u0000\U0010ffff"])) + some[:3]
        for options in ({}, {"skip_special": True}, {"continues": True}):
            kept = [i for i in ids if not (options.get("skip_special") and tokenizer.is_special(i))]
            stream = tokenizer.stream(**options)
            streamed = "".join([*map(stream.push, np.array(ids, np.int32)), stream.finish()])
            exact = b"".join(map(tokenizer.token_bytes, kept))
            if make is not byte_level and not options.get("continues"):
                exact = exact.removeprefix(b" ")
            assert streamed == tokenizer.decode(ids, **options) == exact.decode("utf-8", "replace")


@pytest.mark.parametrize("token", [-1, 256, 2**40, "a", 1.0, None])
def test_ids_outside_the_vocabulary_are_refused(token: Any) -> None:
    tokenizer = Tokenizer.from_metadata(byte_level())
    for use in (tokenizer.token_bytes, tokenizer.is_special, tokenizer.stream().push, lambda t: tokenizer.decode([t])):
        with pytest.raises(UsageError, match="token id"):
            use(token)


# --- metadata that means harm


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", None),
        ("model", 5),
        ("model", "wordpiece"),
        ("pre", "no-such-model"),
        ("pre", ["gpt-2"]),
        ("tokens", None),
        ("tokens", []),
        ("tokens", "abc"),
        ("tokens", 7),
        ("tokens", [*LETTERS, b"bytes"]),
        ("tokens", np.arange(300)),
        ("token_type", np.ones(9, np.int32)),
        ("token_type", [1] * 255 + ["1"]),
        ("token_type", np.ones((16, 16), np.int32)),
        ("merges", None),
        ("merges", 3),
        ("merges", ["a"]),
        ("merges", ["a b"]),
        ("merges", ["a é"]),
        ("merges", [" a"]),
        ("merges", ["a b c"]),
        ("merges", ["a\ud800 b"]),
        ("merges", [1]),
        ("eos_token_id", True),
        ("eos_token_id", "2"),
        ("eos_token_id", 1.5),
        ("add_eos_token", "yes"),
        ("add_bos_token", 2),
        ("eom_token_id", ["1"]),
        ("token_type", [1] * 255 + [1.5]),
    ],
)
def test_wrong_metadata_is_an_error_that_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(TokenizerError, match=f"tokenizer.ggml.{key}"):
        Tokenizer.from_metadata(byte_level(**{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scores", np.zeros(3, np.float32)),
        ("scores", [0.0] * 259 + [float("nan")]),
        ("scores", ["0"] * 260),
        ("add_space_prefix", "no"),
    ],
)
def test_wrong_sentencepiece_metadata_is_an_error_that_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(TokenizerError, match=f"tokenizer.ggml.{key}"):
        Tokenizer.from_metadata(sentencepiece({"a": 0.0}, token_type=None, **{key: value}))


def test_unknown_pre_tokenizer_error_lists_the_known() -> None:
    with pytest.raises(TokenizerError, match=r"'mystery'.*llama-bpe.*qwen35.*smollm"):
        Tokenizer.from_metadata(byte_level(pre="mystery"))


def test_vocabulary_without_bytes_decodes_but_does_not_encode() -> None:
    meta = {f"tokenizer.ggml.{k}": v for k, v in {"model": "gpt2", "tokens": ["t0", "t1"], "merges": ["t 1"]}.items()}
    tokenizer = Tokenizer.from_metadata(meta)
    assert tokenizer.decode([1, 0]) == "t1t0"
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.tokens"):
        tokenizer.encode("t1")


def test_empty_tokens_keep_ids_in_step() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(tokens=[*LETTERS, "", "", "zz"], token_type=None, merges=["z z"]))
    assert tokenizer.encode("zz") == [258]


# --- text that means harm


def test_lone_surrogates_become_replacement_characters() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level())
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83e\udd99")) == "🦙"


@pytest.mark.parametrize("unit", ["a", " ", "\n", "\0", "'", " a", "🦙", "\u0301", "<|im_end|>"])
def test_long_monotonous_text_is_encoded(unit: str) -> None:
    text = unit * (60_000 // len(unit))
    merges = [("a", "a"), ("aa", "aa"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ")]
    for meta in (byte_level(merges, SPECIAL, pre="llama-bpe"), sentencepiece({"▁": -9.0, "a": -8.0, "aa": -1.0})):
        tokenizer = Tokenizer.from_metadata(meta)
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text


def test_importing_the_module_does_not_import_tokenizers() -> None:
    code = "import sys, zincmetal.text.tokenizer; sys.exit('tokenizers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_a_tokenizer_is_shown_in_one_line() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(eos_token_ids=[1, 2]))
    assert repr(tokenizer) == f"<Tokenizer: {tokenizer.vocab_size} tokens, 2 of them end tokens>"
    assert repr(Tokenizer.for_ids({})) == "<Tokenizer: 0 tokens, 0 of them end tokens>"
