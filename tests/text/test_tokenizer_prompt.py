"""Tokens before and after a prompt, special tokens inside it, and the decoded text."""

from __future__ import annotations

import random
from typing import Any

import pytest

from support.vocab_builder import CONTROL, LETTERS, NORMAL, USER_DEFINED, byte_level, id_of, sentencepiece
from zincmetal.errors import UsageError
from zincmetal.text.chat.marks import Marker
from zincmetal.text.stream import TextStream
from zincmetal.text.tokenizer import MARK, Tokenizer

SPECIAL = {"<|bos|>": CONTROL, "<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED}
BOS, START, END, THINK = range(258, 262)  # two merged tokens stand before them
PIECES = {c: -9.0 - i for i, c in enumerate("▁abimnstdrkgoe_<|>ſ\n")} | {
    "▁a": -1.0,
    "<|": -2.0,
    "im": -3.0,
    "▁<|": -1.5,
}
SP_SPECIAL = {"<|im_end|>": CONTROL, "<think>": USER_DEFINED}


def prompting(**keys: Any) -> Tokenizer:
    return Tokenizer.from_metadata(byte_level([("i", "m"), ("<", "|")], SPECIAL, bos_token_id=BOS, **keys))


@pytest.mark.parametrize("add_eos", [True, False])
def test_exactly_one_begin_token_and_never_an_end(add_eos: bool) -> None:
    tokenizer = prompting(add_bos_token=True, add_eos_token=add_eos, eos_token_id=END)
    a = LETTERS.index("a")
    assert tokenizer.prompt("a") == [BOS, a]
    assert tokenizer.prompt("") == [BOS]
    assert tokenizer.prompt("<|bos|>a", parse_special=True) == [BOS, a]
    assert tokenizer.prompt("<|bos|><|bos|>a", parse_special=True) == [BOS, a]
    assert tokenizer.prompt("\n<|bos|>a", parse_special=True).count(BOS) == 1
    assert tokenizer.prompt("a<|bos|>", parse_special=True) == [BOS, a, BOS]  # inside the text the token is the user's
    assert tokenizer.prompt("a<|im_end|>", parse_special=True) == [BOS, a, END]
    plain = tokenizer.prompt("<|bos|>a")
    assert (plain[0], plain.count(BOS), tokenizer.decode(plain[1:])) == (BOS, 1, "<|bos|>a")


def test_no_begin_token_where_the_file_asks_for_none() -> None:
    tokenizer = prompting(add_bos_token=False)
    assert BOS not in tokenizer.prompt("a")
    assert tokenizer.prompt("<|bos|>a", parse_special=True) == [BOS, LETTERS.index("a")]
    for value in (0, 1):
        for width in (int, bool):
            assert prompting(add_bos_token=width(value)).add_bos is bool(value)


def test_a_begin_token_that_is_typed_as_text_is_not_doubled() -> None:
    meta = byte_level(special={"BEGIN": NORMAL}, bos_token_id=256, add_bos_token=True)
    tokenizer = Tokenizer.from_metadata(meta)
    assert tokenizer.prompt("BEGINa", parse_special=True) == [256, LETTERS.index("a")]
    assert tokenizer.prompt("BEGINa")[:2] == [256, LETTERS.index("B")]


def test_the_begin_token_of_sentencepiece() -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece(PIECES, SP_SPECIAL, add_eos_token=True))
    assert tokenizer.prompt("<s>a", parse_special=True) == tokenizer.prompt("a")
    assert tokenizer.prompt("a").count(1) == 1
    assert tokenizer.prompt("a")[-1] != 2
    assert tokenizer.encode("a")[-1] == 2


# --- marks


@pytest.mark.parametrize("prefix", [None, True, False])
def test_marked_text_is_tokenized_as_plain_text(prefix: bool | None) -> None:
    meta = byte_level([("i", "m"), ("<", "|"), ("Ġ", "<|"), ("|", ">")], SPECIAL)
    if prefix is not None:
        meta = sentencepiece(PIECES, SP_SPECIAL, add_space_prefix=prefix, add_bos_token=False)
    tokenizer = Tokenizer.from_metadata(meta)
    assert "<think>" not in tokenizer.control_texts
    assert "<|im_end|>" in tokenizer.control_texts
    rng = random.Random(7)
    parts = [*tokenizer.control_texts, "<think>", "a", " ", "\n", "<", "|", ">", "im", "_", "é", "  "]
    for _ in range(300):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 12)))
        marked = text
        for control in tokenizer.control_texts:
            marked = marked.replace(control, control[0] + MARK + control[1:])
        assert tokenizer.encode(marked, parse_special=True) == tokenizer.encode(text), text
        by_marker = Marker(tokenizer.control_texts).mark(text)
        assert tokenizer.encode(by_marker, parse_special=True) == tokenizer.encode(text), text
        outer = tokenizer.encode(f"<|im_end|>{marked}<|im_end|>", parse_special=True)
        end = id_of(meta, "<|im_end|>")
        assert outer == [end, *tokenizer.encode(text), end]


def test_what_is_marked_is_text_also_where_control_tokens_overlap_or_have_one_character() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(special=dict.fromkeys(["<|a|>", "|><", "<|a|><b>", "✂"], CONTROL)))
    marker = Marker(tokenizer.control_texts)
    for text in ("<|a|><b>", "<|a|>|><✂", f"{MARK}✂", "✂✂", ""):
        assert tokenizer.encode(marker.mark(text), parse_special=True) == tokenizer.encode(text)


def test_a_mark_of_ones_own_is_harmless() -> None:
    tokenizer = prompting()
    assert tokenizer.encode(f"a{MARK}b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode(f"a{MARK}b", parse_special=True) == tokenizer.encode("ab")
    assert tokenizer.encode(f"{MARK}{MARK}", parse_special=True) == []
    assert tokenizer.encode(f"<|im{MARK}<|im_end|>", parse_special=True) == [*tokenizer.encode("<|im"), END]


def test_a_control_token_of_one_character_is_marked_behind_it() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(special={"✂": CONTROL, "✂✂": CONTROL}))
    assert tokenizer.encode("a✂✂✂", parse_special=True)[1:] == [257, 256]
    for text in ("a✂b", "✂✂", "✂✂✂"):
        marked = text.replace("✂", "✂" + MARK)
        assert tokenizer.encode(marked, parse_special=True) == tokenizer.encode(text)


def test_of_tokens_that_overlap_the_longest_at_the_leftmost_place_counts() -> None:
    special = {"<|a|>": CONTROL, "<|a|><": CONTROL, "<b>": CONTROL, "|><b": USER_DEFINED}
    tokenizer = Tokenizer.from_metadata(byte_level(special=special))
    assert tokenizer.encode("<|a|><b>", parse_special=True) == [257, *tokenizer.encode("b>")]
    assert tokenizer.encode("<|a|>.<b>", parse_special=True) == [256, LETTERS.index("."), 258]
    # A control token inside a user-defined token that begins before it is not recognised.
    assert tokenizer.encode("x|><b>", parse_special=True) == [LETTERS.index("x"), 259, LETTERS.index(">")]
    assert tokenizer.encode("x|><b>") == [LETTERS.index("x"), 259, LETTERS.index(">")]


@pytest.mark.parametrize("text", [b"abc", None, 5, ["a"], 1.5, bytearray(b"x")])
def test_only_text_is_encoded(text: Any) -> None:
    tokenizer = prompting()
    for use in (tokenizer.encode, tokenizer.prompt):
        with pytest.raises(UsageError, match="a text is needed"):
            use(text)
        with pytest.raises(UsageError, match="a text is needed"):
            use(text, parse_special=True)


# --- text out


def test_a_decoder_starts_anew_after_its_end() -> None:
    tokenizer = Tokenizer.from_metadata(sentencepiece({"▁": -1.0, "a": -2.0, "▁a": -0.5}))
    ids = tokenizer.encode("a", add_bos=False)
    for skip_special in (False, True):
        stream = tokenizer.stream(skip_special)
        assert [stream.push(ids[0]) + stream.finish() for _ in range(3)] == ["a", "a", "a"]
        stream.push(tokenizer.encode("é", add_bos=False)[-1])
        stream.finish()
        assert stream.push(ids[0]) == "a"


def streamed(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...], skip_special: bool = False
) -> tuple[str, bool]:
    stream, text = TextStream(tokenizer, stop, skip_special), ""
    for i in ids:
        text += stream.push(i)
        if stream.stopped:
            return text, True
    text += stream.finish()
    return text, stream.stopped


def test_stop_strings_end_a_text_where_the_first_of_them_begins() -> None:
    rng = random.Random(11)
    words = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 5))) for _ in range(40)]
    meta = byte_level(special=dict.fromkeys(words, NORMAL))
    tokenizer = Tokenizer.from_metadata(meta)
    for _ in range(1500):
        stop = tuple("".join(rng.choice("abc") for _ in range(rng.randint(2, 5))) for _ in range(rng.randint(1, 3)))
        pieces = [rng.choice(words) for _ in range(rng.randint(1, 8))]
        text = "".join(pieces)
        begins = [at for at in map(text.find, stop) if at >= 0]
        expected = (text[: min(begins)], True) if begins else (text, False)
        as_words = [id_of(meta, piece) for piece in pieces]
        for ids in (as_words, [LETTERS.index(c) for c in text]):
            assert streamed(tokenizer, ids, stop) == expected, (text, stop)


def test_overlapping_stop_strings_as_one_token_and_as_five() -> None:
    tokenizer = Tokenizer.from_metadata(byte_level(special={"xabcd": NORMAL}))
    for ids in ([256], tokenizer.encode("xabcd")):
        assert streamed(tokenizer, ids, ("abcd", "bc")) == ("x", True)
    assert streamed(tokenizer, tokenizer.encode("xabc"), ("abcd", "bc")) == ("xa", True)
    assert streamed(tokenizer, tokenizer.encode("xabce"), ("abcd", "bc")) == ("xa", True)


def test_control_tokens_are_hidden_on_request() -> None:
    tokenizer = prompting()
    ids = [START, *tokenizer.encode("hé"), THINK, END, *tokenizer.encode("x")]
    for _ in range(2):  # the second time the cached tables serve
        assert streamed(tokenizer, ids, ()) == ("<|im_start|>hé<think><|im_end|>x", False)
        assert streamed(tokenizer, ids, (), skip_special=True) == ("hé<think>x", False)
        assert streamed(tokenizer, ids, (">x",), skip_special=True) == ("hé<think", True)
