"""Vocabulary: the bytes of all tokens of a model, as grammars and the budget of reasoning need them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from .grammar import control_term

SPECIAL = b"\xff"  # no UTF-8 text has this byte, so that no rule for text matches a token that begins so


class Vocabulary:
    """Tokens of a model. Made once per model, and for any thread.

    - ``tokens``: the bytes of each token; those of a control token are its text.
    - ``special``: the ids of tokens that only their name in a grammar allows.
    - ``ends``: the ids that end an answer.
    - ``encode(text, special)``: makes ids of a text. With ``special`` the texts of control tokens in it count.
    - ``n_vocab``: the number of logits. Tokens beyond it cannot be drawn; ids without a token have no bytes.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Iterable[int],
        ends: Iterable[int],
        encode: Callable[[str, bool], list[int]],
        n_vocab: int | None = None,
    ) -> None:
        n = len(tokens) if n_vocab is None else n_vocab
        self.tokens = [*tokens[:n], *[b""] * (n - len(tokens))]
        self.ends = frozenset(t for t in ends if 0 <= t < n)
        self.special = frozenset(t for t in special if 0 <= t < n) | self.ends
        self._encode = encode
        self._by_bytes: dict[bytes, int] = {}  # made when it is needed
        self._longest = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def n_words(self) -> int:
        """Words of a mask: uint32, a bit for each token."""
        return -(-len(self.tokens) // 32)

    def only(self, tokens: Iterable[int]) -> NDArray[np.uint32]:
        """Return the mask that allows some tokens alone."""
        words = np.zeros(self.n_words, np.uint32)
        for token in tokens:
            words[token >> 5] |= np.uint32(1 << (token & 31))
        return words

    def named(self) -> list[bytes]:
        """Return the bytes of all tokens, those of special ones as their mark and the name that grammars use."""
        named = list(self.tokens)
        for token in self.special:
            named[token] = SPECIAL + control_term(named[token].decode("utf-8", "replace")).encode()
        return named

    def exact(self, text: bytes, special: bool = False) -> list[int]:
        """Encode a text so that the bytes of its tokens join to it, also where the tokenizer adds a space.

        With ``special`` the texts of control tokens in it become those tokens.
        """
        try:
            ids = self._encode(text.decode(), special)
        except Exception:  # no UTF-8, or a tokenizer that has no token for a byte; the compiler takes no errors
            return self._greedy(text)
        known = all(i < len(self.tokens) and (special or i not in self.special) for i in ids)
        if known and b"".join([self.tokens[i] for i in ids]) == text:
            return ids
        return self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        """Encode by the longest token at each place. A byte without a token is left out."""
        if not self._by_bytes:
            self._by_bytes = {t: i for i, t in enumerate(self.tokens) if t and i not in self.special}
            self._longest = max(map(len, self._by_bytes), default=1)
        ids, at = list[int](), 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self._by_bytes), None)
            if end is not None:
                ids.append(self._by_bytes[text[at:end]])
            at = end or at + 1
        return ids
