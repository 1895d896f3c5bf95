"""Writes answers by grammars: tokens drawn at random, over a vocabulary with the markers of a format."""

from __future__ import annotations

import random
import re

import numpy as np
from numpy.typing import NDArray

from zincmetal.sampling.constrain.grammar import Grammar
from zincmetal.sampling.constrain.masks import Masks
from zincmetal.sampling.constrain.vocabulary import Vocabulary
from zincmetal.sampling.draws import unpacked
from zincmetal.text.tools.format import Format

END = 256


class Writer:
    """Writes answers by a grammar: its vocabulary has all bytes, the markers of a format, and its control tokens."""

    def __init__(self, made: Format, seed: int = 0) -> None:
        control = sorted(made.control)
        self.words = [text for text in _markers(made) if not any(one in text for one in control)]
        texts = [bytes([i]) for i in range(256)] + [text.encode() for text in ("<end>", *control, *self.words)]
        self.control = {text: END + 1 + i for i, text in enumerate(control)}
        self._split = re.compile("|".join(map(re.escape, sorted(control, key=len)[::-1])) or "(?!)")
        self.vocabulary = Vocabulary(texts, range(END, END + 1 + len(control)), [END], self.ids)
        self._masks, self._random = Masks(self.vocabulary), random.Random(seed)
        self._closers = [ord(char) for char in "\"}])'x0e,"] + list(range(END + 1 + len(control), len(texts)))

    def ids(self, text: str, special: bool = True) -> list[int]:
        if not special:
            return list(text.encode())
        ids, at = list[int](), 0
        for found in self._split.finditer(text):
            ids += [*text[at : found.start()].encode(), self.control[found[0]]]
            at = found.end()
        return [*ids, *text[at:].encode()]

    def refused(self, grammar: Grammar, text: str) -> int | None:
        """Returns the place of the first token of a text, with its end, that a grammar does not allow."""
        mask, ids = self._masks.of(grammar, None, 0), list[int]()
        assert mask is not None
        for token in [*self.ids(text), END]:
            words = mask(ids)
            if words is not None and not words[token >> 5] >> (token & 31) & 1:
                return len(ids)
            ids.append(token)
        return None

    def write(self, grammar: Grammar, length: int = 60, most: int = 4000) -> str:
        """Draws an answer. After ``length`` tokens it prefers what may end it."""
        mask, ids = self._masks.of(grammar, None, 0), list[int]()
        assert mask is not None
        while len(ids) < most:
            token = self._drawn(mask(ids), len(ids) > length)
            if token == END:
                return b"".join(self.vocabulary.tokens[i] for i in ids).decode("utf-8", "replace")
            ids.append(token)
        raise AssertionError("the answer does not end")

    def _drawn(self, words: NDArray[np.uint32] | None, closing: bool) -> int:
        rng = self._random
        if words is None:
            words = np.full(self.vocabulary.n_words, 0xFFFFFFFF, np.uint32)
        allowed = set(np.flatnonzero(unpacked(words, len(self.vocabulary))).tolist())
        if END in allowed and (closing or rng.random() < 0.3 or len(allowed) == 1):
            return END
        marks, plain = [i for i in allowed if i > END], [i for i in allowed if 32 <= i < 127]
        closers = [i for i in self._closers if i in allowed]
        for some, share in ((marks, 0.7 if closing else 0.1), (closers, 0.7 if closing else 0.0), (plain, 0.9)):
            if some and rng.random() < share:
                return int(rng.choice(sorted(some)))
        return int(rng.choice(sorted(allowed - {END})))


def _markers(made: Format) -> list[str]:
    texts = {*made.shape.think, *made.shape.think_end, "</"}
    for one in made.shape.calls[:1]:
        texts |= {one.open, one.close, one.item, one.item_end, one.tail, one.quote}
        if tags := one.tags:
            texts |= {tags.name_end, tags.key, tags.key_end, tags.value, tags.value_end, "\n" + tags.value_end}
            texts |= {tags.text_value, tags.json_value, tags.text_end}
    return sorted(text for text in texts if len(text) > 1)
