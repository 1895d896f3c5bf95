"""Encodes text like SentencePiece's BPE: again and again, it joins the two neighbours whose union scores best."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from heapq import heapify, heappop, heappush

from ..errors import TokenizerError
from .special_text import Matcher
from .tokenizer_keys import KEY, TokenizerKeys, warn
from .vocabulary import SPACE, TokenType, Vocabulary, fallback_byte, utf8

_ADDED = -1000.0  # the score that converters give to tokens that Hugging Face added to SentencePiece's
_LONGEST_KEPT = 32  # characters of the longest word that is remembered
_MOST_KEPT = 1 << 15  # words

_MERGEABLE = frozenset({TokenType.NORMAL, TokenType.UNDEFINED, TokenType.UNUSED})


class SentencePiece:
    """Encodes text without control tokens. Among equal scores, the leftmost pair merges first.

    Memory is in proportion to the number of pieces.
    """

    def __init__(self, scores: list[float], vocab: Vocabulary, prefix: bool, unknown: int | None) -> None:
        self._cost = [-score for score in scores]
        self._ids = {text: i for text, i in vocab.ids.items() if vocab.types[i] in _MERGEABLE}
        self._prefix = SPACE if prefix else ""
        defined = vocab.of_types(TokenType.USER_DEFINED)
        added = {text for text, i in defined.items() if scores[i] <= _ADDED}
        self._added, self._own = (
            Matcher({text.replace(" ", SPACE): i for text, i in defined.items() if (text in added) is which})
            for which in (True, False)
        )
        self._bytes = _byte_ids(vocab)
        self._unknown = next(iter(vocab.of_types(TokenType.UNKNOWN).values()), None) if unknown is None else unknown
        self._fuses = self._unknown is not None and not self._bytes
        self._unused = frozenset(i for i in self._ids.values() if vocab.types[i] == TokenType.UNUSED)
        self._whole = any(map(self._is_union, (vocab.tokens[i] for i in self._unused)))
        self._inside = {pair for piece in self._ids for pair in map(operator.add, piece, piece[1:])}
        self._known: dict[str, list[int]] = {}

    def _is_union(self, piece: str) -> bool:
        return any(piece[:i] in self._ids and piece[i:] in self._ids for i in range(1, len(piece)))

    def encode(self, text: str) -> list[int]:
        """Encode ``text`` to ids."""
        ids: list[int] = []
        for part in self._added.split(text.replace(" ", SPACE)):
            if isinstance(part, int):
                ids.append(part)
                continue
            for piece in self._own.split(self._prefix + part):
                if isinstance(piece, int):
                    ids.append(piece)
                else:
                    self._encode_merged(piece, ids)
        return ids

    def _encode_merged(self, text: str, ids: list[int]) -> None:
        if self._whole:  # the pieces of an unused piece depend on earlier merges anywhere in the text
            ids += self._merged_ids(text)
            return
        # No piece has both characters of a pair outside ``_inside``. So no merge ever crosses that pair.
        pairs = map(operator.add, text, text[1:])
        cuts = [0, *(i for i, pair in enumerate(pairs, 1) if pair not in self._inside), len(text)]
        known = self._known
        for word in map(text.__getitem__, map(slice, cuts, cuts[1:])):
            found = known.get(word)
            if found is None:
                found = self._merged_ids(word)
                if len(word) <= _LONGEST_KEPT:
                    if len(known) >= _MOST_KEPT:
                        known.clear()
                    known[word] = found
            # Neighbouring characters without a piece become one unknown token together.
            ids += found[1:] if self._fuses and found[:1] == ids[-1:] == [self._unknown] else found

    def _merged_ids(self, text: str) -> list[int]:
        split: dict[str, tuple[str, str]] = {}  # the two pieces that make each unused piece
        ids: list[int] = []
        for part in self._merge(text, split):
            self._emit(part, split, ids)
        return ids

    def _merge(self, text: str, split: dict[str, tuple[str, str]]) -> list[str]:
        """Merge the characters of ``text`` into pieces."""
        parts, n = list(text), len(text)
        before, after = list(range(-1, n - 1)), list(range(1, n + 1))
        heap: list[tuple[float, int, int, int]] = []  # cost, left piece, right piece and length of each union

        def union(left: int, right: int) -> tuple[float, int, int, int] | None:
            piece = parts[left] + parts[right]
            if (i := self._ids.get(piece)) is None:
                return None
            if i in self._unused:
                split[piece] = (parts[left], parts[right])
            return self._cost[i], left, right, len(piece)

        heap += filter(None, map(union, range(n - 1), range(1, n)))
        heapify(heap)
        while heap:
            _, left, right, length = heappop(heap)
            if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != length:
                continue  # another union has taken one of the two pieces
            parts[left] += parts[right]
            parts[right] = ""
            after[left] = following = after[right]
            if following < n:
                before[following] = left
                if made := union(left, following):
                    heappush(heap, made)
            if (preceding := before[left]) >= 0 and (made := union(preceding, left)):
                heappush(heap, made)
        return [part for part in parts if part]

    def _emit(self, part: str, split: Mapping[str, tuple[str, str]], ids: list[int]) -> None:
        waiting = [part]
        while waiting:
            part = waiting.pop()
            i = self._ids.get(part)
            if part in split:
                waiting += reversed(split[part])
            elif i is not None and i not in self._unused:
                ids.append(i)
            elif self._bytes:
                ids += map(self._bytes.__getitem__, utf8(part))
            elif self._unknown is not None and ids[-1:] != [self._unknown]:
                ids.append(self._unknown)


def _byte_ids(vocab: Vocabulary) -> list[int]:
    """Find the ids of "<0x00>" to "<0xFF>". The list is empty if one of them is missing."""
    ids = [vocab.ids.get(f"<0x{byte:02X}>") for byte in range(256)]
    return [] if None in ids else [i for i in ids if i is not None]


def set_byte_types(vocab: Vocabulary) -> None:
    """Set the types of byte tokens and of the unknown token, for a file without types."""
    if _byte_ids(vocab):
        of_bytes = (i for i, text in enumerate(vocab.tokens) if fallback_byte(text) is not None)
        vocab.set_type(of_bytes, TokenType.BYTE)
    vocab.set_type(vocab.all_ids("<unk>"), TokenType.UNKNOWN)


def read_scores(meta: TokenizerKeys, vocab: Vocabulary) -> list[float]:
    """Read the scores of the file. A file without scores gets them from the order of its merges or of its tokens."""
    if meta.has("scores"):
        scores: list[float] = meta.numbers_per_token("scores", len(vocab))
        nan = next((i for i, score in enumerate(scores) if score != score), None)
        if nan is not None:
            raise TokenizerError(f"{KEY}scores[{nan}] is not a number")
        return scores
    if meta.has("merges"):
        warn("%sscores is missing: pieces merge in the order of %smerges", KEY, KEY)
        made: dict[str, float] = {}
        for rank, merge in enumerate(meta.strings("merges")):
            made.setdefault("".join(merge.split(" ")), -rank)
        least = -float(len(made) + 1)
        return [made.get(text, least) for text in vocab.tokens]
    warn("%sscores is missing: pieces merge in the order of their ids", KEY)
    return [-float(i) for i in range(len(vocab))]
