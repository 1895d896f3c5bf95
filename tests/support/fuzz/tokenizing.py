"""Any vocabulary, text and ids: a text comes back from its ids, however they are cut, or a vocabulary is refused."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import numpy as np

from support.fuzz.reading import Reading, check_message
from support.vocab_builder import CONTROL, USER_DEFINED, byte_level, sentencepiece
from zincmetal.errors import ZincError
from zincmetal.text.tokenizer import MARK, Tokenizer

KEYS = (
    *("model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id", "eot_token_id"),
    *("unknown_token_id", "add_bos_token", "add_eos_token", "add_space_prefix", "suppress_tokens", "eog_token_ids"),
)
SPECIAL = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<tool>": USER_DEFINED}

QWEN2, SENTENCEPIECE = 2, 3  # places in the tuple below


@cache
def _good() -> tuple[Tokenizer, ...]:
    """Tokenizers of both kinds, with merges and pieces that overlap."""
    pairs = [("a", "b"), ("ab", "c"), ("Ġ", "a"), ("Ã", "©"), ("Ġa", "b")]
    pieces = {"▁": -1.0, "a": -2.0, "b": -2.5, "ab": -1.5, "▁ab": -1.2, "é": -3.0}
    return tuple(
        Tokenizer.from_metadata(meta)
        for meta in (
            byte_level(pairs, SPECIAL),
            byte_level(pairs, SPECIAL, pre="llama-bpe"),
            byte_level(pairs, SPECIAL, pre="qwen2"),
            sentencepiece(pieces, SPECIAL),
            sentencepiece(pieces, SPECIAL, add_space_prefix=False),
        )
    )


@cache
def _base(bytes_alone: bool) -> dict[str, Any]:
    """Metadata to change: a copy of its own for each run."""
    return byte_level([("a", "b")], SPECIAL) if bytes_alone else sentencepiece({"a": -1.0}, SPECIAL)


def _kept(which: int, text: str) -> str:
    """What a tokenizer keeps of a text: no MARK; Qwen2's is in form NFC; SentencePiece's letter for a space is "▁"."""
    text = text.replace(MARK, "\ufffd")
    if which == QWEN2:
        return unicodedata.normalize("NFC", text)
    return text.replace("▁", " ") if which >= SENTENCEPIECE else text


def _value(data: Reading) -> Any:
    kind = data.byte() % 8
    if kind < 2:
        return data.number(4) - (1 << 31 if kind else 0)
    if kind == 2:
        return data.text(12)
    if kind == 3:
        return bool(data.byte() & 1)
    if kind == 4:
        return [data.text(6) for _ in range(data.byte() % 40)]
    if kind == 5:
        return np.array([data.number(2) - 100 for _ in range(data.byte() % 40)], np.int32)
    if kind == 6:
        return np.array([data.number(2) for _ in range(data.byte() % 40)], np.uint16).view(np.float16).astype("<f4")
    return None


def _hostile(data: Reading) -> None:
    """Build a tokenizer from any keys, and use it if it is taken."""
    meta = dict(_base(bool(data.byte() & 1)))
    for _ in range(data.byte() % 5):
        key = f"tokenizer.ggml.{data.one(KEYS)}"
        value = _value(data)
        meta.pop(key, None)
        if value is not None:
            meta[key] = value
    try:
        tokenizer = Tokenizer.from_metadata(meta)
        ids = tokenizer.encode(data.text(40), parse_special=bool(data.byte() & 1))
    except ZincError as error:
        check_message(error)
        return
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    tokenizer.decode(ids)


def _text(data: Reading) -> None:
    """Encode a text of any kind: control tokens stay out, and decoding gives the text back."""
    which = data.byte() % len(_good())
    tokenizer = _good()[which]
    text = data.rest().decode("utf-8", "replace")
    ids = tokenizer.encode(text, add_bos=False, add_eos=False)
    assert tokenizer.decode(ids) == _kept(which, text)
    assert not any(tokenizer.token_bytes(i).decode() in SPECIAL for i in ids if tokenizer.is_special(i))


def _ids(data: Reading) -> None:
    """Decode any ids: the stream says what the whole says."""
    tokenizer = data.one(_good())
    skip = bool(data.byte() & 1)
    ids = [i * 256 % tokenizer.vocab_size + data.byte() % 256 for i in range(data.byte() % 64)]
    ids = [i % tokenizer.vocab_size for i in ids]
    stream = tokenizer.stream(skip_special=skip)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids, skip_special=skip)


def run(data: bytes) -> None:
    """Do one of the three."""
    given = Reading(data)
    given.one((_hostile, _text, _ids))(given)


def seeds() -> list[bytes]:
    """Some of each."""
    texts = ["ab abc  é\n\U0001f600 12345", "<|im_start|>user ab<|im_end|>", "don't \u3000x ▁ab Ġa"]
    made = [bytes([1, i]) + text.encode() for i in range(5) for text in texts]
    made += [bytes([2, i, 0, 40, *range(200, 240)]) for i in range(5)]
    return made + [
        bytes([0, i & 1, 2, key, 4, 3, 1, 97, 1, 98, 1, 99]) for i in range(2) for key in range(0, len(KEYS), 3)
    ]
