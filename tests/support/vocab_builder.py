"""Makes the metadata of small vocabularies, byte-level and SentencePiece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from zincmetal.text.tokenizer import Tokenizer

NO_TOKENS: Mapping[str, int] = MappingProxyType({})
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# GPT-2's letters: a byte that prints in Latin-1 is itself; the others are numbered from U+0100.
PRINTS = {b for b in range(256) if 0x21 <= b <= 0x7E or (b >= 0xA1 and b != 0xAD)}
LETTERS = [chr(b) if b in PRINTS else chr(0x100 + sum(o not in PRINTS for o in range(b))) for b in range(256)]


def letters(text: str | bytes) -> str:
    """Writes text as a byte-level vocabulary does."""
    return "".join(LETTERS[b] for b in (text.encode() if isinstance(text, str) else text))


def byte_level(
    pairs: Sequence[tuple[str, str]] = (), special: Mapping[str, int] = NO_TOKENS, **keys: Any
) -> dict[str, Any]:
    """Makes metadata: the 256 bytes, then the merged pairs, then special tokens by type."""
    made = [a + b for a, b in pairs]
    tokens = list(dict.fromkeys([*LETTERS, *made, *special]))
    types = [special.get(token, NORMAL) for token in tokens]
    meta = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "merges": [f"{a} {b}" for a, b in pairs],
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (meta | keys).items() if v is not None}


def sentencepiece(pieces: Mapping[str, float], special: Mapping[str, int] = NO_TOKENS, **keys: Any) -> dict[str, Any]:
    """Makes metadata: unknown, begin, end, 256 byte tokens, then pieces by score, then special tokens by type."""
    head = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL} | {f"<0x{b:02X}>": BYTE for b in range(256)}
    tokens = [*head, *pieces, *special]
    scores = [0.0] * len(head) + list(pieces.values()) + [0.0] * len(special)
    meta = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array([{**head, **special}.get(t, NORMAL) for t in tokens], np.int32),
        "scores": np.array(scores, np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (meta | keys).items() if v is not None}


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Returns the text of each id."""
    return [tokenizer.token_bytes(i).decode("utf-8", "backslashreplace") for i in ids]


def id_of(meta: Mapping[str, Any], text: str) -> int:
    """Returns the id of a token."""
    return list(meta["tokenizer.ggml.tokens"]).index(text)
