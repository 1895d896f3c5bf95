"""Reads the vocabulary of a GGUF file: its tokens, their types, and the bytes of each token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from ..errors import TokenizerError, abbreviate, quote
from .tokenizer_keys import KEY, TokenizerKeys, warn

SPACE = "\u2581"  # SentencePiece's letter for a space


class TokenType(IntEnum):
    """Values of ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def described(value: object) -> str:
    """Describe a value and its type for an error message, never at length."""
    kind = type(value).__name__
    return f"{abbreviate(value)} ({kind})" if isinstance(value, (bool, int, float, str)) else f"of type {kind}"


SPECIAL = frozenset({TokenType.UNKNOWN, TokenType.CONTROL})  # text matches these only with parse_special
_NORMAL = TokenType.NORMAL.value


@dataclass(frozen=True, repr=False)
class Vocabulary:
    """Tokens of a file. The id of a token is its index in ``tokens``."""

    tokens: list[str]
    types: list[int]  # values of TokenType
    ids: dict[str, int]  # for a token that occurs twice: the special one, else the first
    other: set[int]  # the ids whose type is not NORMAL; few, in most files
    twins: dict[str, list[int]]  # all ids of tokens that occur twice
    typed: bool  # whether the file gives types

    @classmethod
    def read(cls, meta: TokenizerKeys) -> Vocabulary:
        """Read ``tokens`` and ``token_type``. Raises TokenizerError if one of them is malformed."""
        tokens = meta.strings("tokens")
        if not tokens:
            raise TokenizerError(f"{KEY}tokens is empty")
        # Files pad their vocabulary with empty strings. Each gets a name of its own, so that ids stay in step.
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)] if "" in tokens else tokens
        types = cls._read_types(meta, len(tokens))
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        twins = _twins(tokens, types, ids) if len(ids) != len(tokens) else {}
        other = {i for i, t in enumerate(types) if t != _NORMAL}
        return cls(tokens, types, ids, other, twins, meta.has("token_type"))

    @staticmethod
    def _read_types(meta: TokenizerKeys, n: int) -> list[int]:
        if not meta.has("token_type"):
            return [_NORMAL] * n
        types = meta.integers_per_token("token_type", n)
        known = {t.value for t in TokenType}
        if strange := set(types) - known:
            warn("%stoken_type holds %s; known are 0 to %d: taken as normal", KEY, min(strange), max(known))
            types = [t if t in known else _NORMAL for t in types]
        return types

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"<Vocabulary: {len(self.tokens)} tokens, {len(self.other)} of them not normal>"

    def all_ids(self, text: str) -> list[int]:
        """Find every id whose token is ``text``."""
        if text in self.twins:
            return self.twins[text]
        return [self.ids[text]] if text in self.ids else []

    def set_type(self, ids: Iterable[int], kind: TokenType) -> None:
        """Correct the type of some tokens, for files that give no types or wrong types."""
        for i in ids:
            self.types[i] = kind.value
            self.other.add(i)

    def of_types(self, *types: TokenType) -> dict[str, int]:
        """Map the tokens of some types other than NORMAL to their ids, in ascending order of ids."""
        found = (i for i in sorted(self.other) if self.types[i] in types)
        return {self.tokens[i]: i for i in found if self.ids[self.tokens[i]] == i}


def _twins(tokens: list[str], types: list[int], ids: dict[str, int]) -> dict[str, list[int]]:
    """Find the tokens that occur twice, with all their ids, and put into ``ids`` the id that text becomes."""
    places: dict[str, list[int]] = {}
    for i, token in enumerate(tokens):
        if ids[token] != i:
            places.setdefault(token, []).append(i)
    for token, before in places.items():
        twins = [*before, ids[token]]
        ids[token] = next((i for i in twins if types[i] in SPECIAL), twins[0])
        places[token] = twins
    token, first = next(iter(places.items()))
    more = f" and {len(places) - 1} more pairs" if len(places) > 1 else ""
    message = "%stokens[%d] and [%d] are both %s%s: text becomes the first, or the one of control type"
    warn(message, KEY, first[0], first[1], quote(token), more)
    return places


def _byte_alphabet() -> dict[str, int]:
    """Map GPT-2's letters to bytes. Printable Latin-1 letters stand for themselves; the rest starts at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_LETTER = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """Bytes of a token of a byte-level vocabulary."""
    try:
        return bytes(map(BYTE_OF_LETTER.__getitem__, token))
    except KeyError:  # the token is not written in the byte alphabet, so it stands for itself
        return utf8(token)


def sentencepiece_bytes(token: str) -> bytes:
    """Bytes of a token of a SentencePiece vocabulary, unless it is a byte token."""
    return utf8(token.replace(SPACE, " "))


def utf8(text: str) -> bytes:
    """Encode any string that Python can hold as UTF-8. A lone surrogate becomes "?"."""
    return text.encode("utf-8", "replace")


def fallback_byte(token: str) -> bytes | None:
    """Read the byte of a token such as "<0x0A>", or None for a token of another form."""
    digits = token[3:5] if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else ""
    try:
        return bytes.fromhex(digits) or None
    except ValueError:
        return None
