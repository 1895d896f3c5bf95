"""Walks through grammars: tokens drawn at random from the masks, over a real vocabulary or one of single bytes."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from datetime import datetime, time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from numpy.typing import NDArray

from zincmetal import gguf
from zincmetal.api.text import vocabulary
from zincmetal.sampling.constrain.budget import Budget, Mask
from zincmetal.sampling.constrain.grammar import Grammar
from zincmetal.sampling.constrain.masks import Masks
from zincmetal.sampling.constrain.vocabulary import Vocabulary
from zincmetal.sampling.draws import unpacked
from zincmetal.text.tokenizer import Tokenizer

END = 256  # of the vocabulary of bytes
PROMPT = [5, 3, 5]
#: Texts that end what is open, in the order in which a walk that has become long takes them.
CLOSERS = (b'"', b"@", b":", b"x", b"}", b"]", b"Z", b"0", b"e", b",", b" ", b"{")
CHECKED_FORMATS = jsonschema.FormatChecker(["date", "ipv4", "ipv6", "uuid", "email"])


def _is_moment(value: object) -> bool:
    return not isinstance(value, str) or bool(datetime.fromisoformat(_as_iso(value)))


def _is_time(value: object) -> bool:
    return not isinstance(value, str) or time.fromisoformat(_as_iso(value)) is not None


CHECKED_FORMATS.checks("date-time", raises=ValueError)(_is_moment)
CHECKED_FORMATS.checks("time", raises=ValueError)(_is_time)


def _as_iso(value: str) -> str:
    """Writes a time as Python 3.10 reads it."""
    assert re.search(r"(Z|[+-]\d\d:\d\d)$", value), value
    return re.sub(r"\.\d+", "", value).replace("Z", "+00:00")


def bytes_vocabulary(*control: str, n_vocab: int | None = None) -> Vocabulary:
    """Makes a vocabulary of the 256 bytes, an end token, and control tokens."""
    tokens = [bytes([i]) for i in range(256)] + [text.encode() for text in ("<end>", *control)]
    names = {text: 257 + i for i, text in enumerate(control)}

    def encode(text: str, special: bool) -> list[int]:
        """Makes ids as tokenizers do: the parts between control tokens are bytes."""
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if special and names else [text]
        return [id for part in parts for id in ([names[part]] if special and part in names else part.encode())]

    return Vocabulary(tokens, range(256, len(tokens)), [END], encode, n_vocab)


def file_vocabulary(path: Path) -> Vocabulary:
    """Reads the vocabulary of a model file."""
    with gguf.open(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    return vocabulary(tokenizer, tokenizer.vocab_size)


class Walker:
    """Draws answers at random, from what the masks allow."""

    def __init__(self, vocab: Vocabulary, seed: int = 0) -> None:
        self.vocab, self.masks, self.random = vocab, Masks(vocab), random.Random(seed)
        self._closers = [i for text in CLOSERS if (i := _find(vocab, text)) is not None]
        self._ends = sorted(vocab.ends)

    def mask(self, grammar: Grammar | None, budget: Budget | None = None) -> Mask:
        made = self.masks.of(grammar, budget, len(PROMPT))
        assert made is not None
        return made

    def walk(self, grammar: Grammar, length: int = 60, most: int = 4000) -> bytes:
        """Draws an answer up to an end token. After ``length`` tokens it takes what ends it soonest."""
        mask, ids = self.mask(grammar), list(PROMPT)
        while len(ids) < most:
            token = self._drawn(mask(ids), closing=len(ids) > length)
            if token in self.vocab.ends:
                return self.text(ids)
            ids.append(token)
        raise AssertionError(f"the answer did not end: {self.text(ids)[-300:]!r}")

    def text(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.vocab.tokens[i] for i in ids[len(PROMPT) :])

    def _drawn(self, words: NDArray[np.uint32] | None, closing: bool) -> int:
        if words is None:
            return self._ends[0] if closing or self.random.random() < 0.1 else self.random.randrange(len(self.vocab))
        allowed = np.flatnonzero(unpacked(words, len(self.vocab)))
        ends = [i for i in self._ends if words[i >> 5] >> (i & 31) & 1]
        if ends and (closing or self.random.random() < 0.5):
            return ends[0]
        if closing:
            shortest = [i for i in self._closers if words[i >> 5] >> (i & 31) & 1]
            if shortest and self.random.random() < 0.8:
                return shortest[0]
        return int(self.random.choice(allowed))


def allowed_texts(vocab: Vocabulary, words: NDArray[np.uint32] | None) -> set[bytes]:
    """Returns the bytes of the tokens that a mask allows."""
    assert words is not None
    return {vocab.tokens[i] for i in np.flatnonzero(unpacked(words, len(vocab)))}


def accepts(vocab: Vocabulary, grammar: Grammar, text: bytes, masks: Masks | None = None) -> bool:
    """Returns True if a grammar takes a text, byte by byte, and may end after it. For a vocabulary of bytes."""
    mask = (masks or Masks(vocab)).of(grammar, None, 0)
    assert mask is not None
    ids = list[int]()
    for byte in [*text, END]:
        words = mask(ids)
        if words is not None and not words[byte >> 5] >> (byte & 31) & 1:
            return False
        ids.append(byte)
    return True


def valid(schema: Any, answer: bytes) -> Any:
    """Returns the value of an answer, which must be JSON that an independent validator takes."""
    value = json.loads(answer.decode("utf-8"))
    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        cls(schema, format_checker=CHECKED_FORMATS).validate(value)
    except jsonschema.ValidationError as error:
        raise AssertionError(f"{answer!r}\n is not as {json.dumps(schema)[:2000]}\n{error.message[:500]}") from None
    return value


def _find(vocab: Vocabulary, text: bytes) -> int | None:
    return next((i for i, token in enumerate(vocab.tokens) if token == text and i not in vocab.special), None)
