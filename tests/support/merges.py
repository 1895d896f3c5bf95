"""Defines SentencePiece's merges in plain Python, and makes pieces to try them on."""

from __future__ import annotations

import random
from itertools import pairwise

from support.vocab_builder import sentencepiece, texts_of
from zincmetal.text.tokenizer import Tokenizer


def merge_by_score(text: str, score: dict[str, float]) -> list[str]:
    """Merges as SentencePiece's definition says: the neighbours whose union has the best score, leftmost first."""
    parts = list(text)
    while unions := [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in score]:
        _, i = min(unions)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def random_pieces(rng: random.Random, n: int) -> list[str]:
    """Makes ``n`` pieces of the letters "▁abc", each of two earlier ones, as training does."""
    pieces = list("▁abc")
    while len(pieces) < n:
        piece = rng.choice(pieces) + rng.choice(pieces)
        if len(piece) <= 8 and piece not in pieces:
            pieces.append(piece)
    return pieces


def assert_merges(rng: random.Random, score: dict[str, float], longest: int) -> None:
    """Fails unless a tokenizer of these pieces merges random texts as defined. ``longest``: letters of a text."""
    tokenizer = Tokenizer.from_metadata(sentencepiece(score, add_space_prefix=False))
    for _ in range(20):
        text = "".join(rng.choice(" abc") for _ in range(rng.randint(1, longest)))
        expected = [p.replace("▁", " ") for p in merge_by_score(text.replace(" ", "▁"), score)]
        assert texts_of(tokenizer, tokenizer.encode(text, add_bos=False)) == expected, text
