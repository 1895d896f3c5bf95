"""The vocabulary of a GGUF file: its `tokenizer.ggml.*` metadata, checked, and the bytes of each token."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from .errors import TokenizerError, abbreviate, quote

KEY = "tokenizer.ggml."
SPACE = "\u2581"  # what SentencePiece writes for a space


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Metadata:
    """Typed access to `tokenizer.ggml.*`: a value that is missing or wrong is a TokenizerError naming its key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def _get(self, name: str, kind: str) -> Any:
        value = self._values.get(KEY + name)
        if value is None:
            raise TokenizerError(f"{KEY}{name} is missing: this file cannot be tokenized without its {kind}")
        return value

    def has(self, name: str) -> bool:
        """Whether the file has the key."""
        return self._values.get(KEY + name) is not None

    def text(self, name: str) -> str:
        """A string."""
        value = self._get(name, "name")
        if not isinstance(value, str):
            raise TokenizerError(f"{KEY}{name} is {described(value)}; a string is needed")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A boolean, or `default` where the file has none."""
        if not self.has(name):
            return default
        value = self._get(name, "flag")
        if type(value).__name__ not in ("bool", "bool_"):  # without an import of NumPy, whose bool_ that is
            raise TokenizerError(f"{KEY}{name} is {described(value)}; a boolean is needed")
        return bool(value)

    def token_id(self, name: str, n_tokens: int) -> int | None:
        """An id from 0 to n_tokens - 1, or None where the file has none."""
        if not self.has(name):
            return None
        value = self._get(name, "token id")
        try:
            token = operator.index(value)
        except TypeError:
            token = -1
        if isinstance(value, bool) or not 0 <= token < n_tokens:
            raise TokenizerError(f"{KEY}{name} is {described(value)}; an id below {n_tokens} is needed")
        return token

    def strings(self, name: str) -> list[str]:
        """A list of strings."""
        values = self._list(name, "list of strings")
        if set(map(type, values)) - {str}:
            wrong = next(i for i, v in enumerate(values) if type(v) is not str)
            raise TokenizerError(f"{KEY}{name}[{wrong}] is {described(values[wrong])}; a string is needed")
        return values

    def numbers(self, name: str, n: int, kinds: tuple[type, ...]) -> list[Any]:
        """A list of `n` Python numbers whose types are all among `kinds`."""
        values = self._list(name, "list of numbers")
        if len(values) != n:
            raise TokenizerError(f"{KEY}{name} has {len(values)} entries for the {n} of {KEY}tokens")
        if not set(map(type, values)) <= set(kinds):
            wrong = next(i for i, v in enumerate(values) if type(v) not in kinds)
            raise TokenizerError(f"{KEY}{name}[{wrong}] is {described(values[wrong])}; a number is needed")
        return values

    def _list(self, name: str, kind: str) -> list[Any]:
        value = self._get(name, kind)
        if hasattr(value, "tolist"):  # a NumPy array: its own conversion gives Python numbers, and fast
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
            raise TokenizerError(f"{KEY}{name} is {described(value)}; a {kind} is needed")
        return list(value)


def described(value: object) -> str:
    """A value as error messages show it: never long."""
    kind = type(value).__name__
    return f"{abbreviate(value)} ({kind})" if isinstance(value, (bool, int, float, str)) else f"of type {kind}"


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file; a token's id is its place in `tokens`."""

    tokens: list[str]
    types: list[int]  # values of TokenType
    ids: dict[str, int]
    other: list[int]  # the ids that are not NORMAL: few, in most files

    @classmethod
    def read(cls, meta: Metadata) -> Vocabulary:
        """Read `tokens` and `token_type`. Raises TokenizerError, also where two tokens are the same."""
        tokens = meta.strings("tokens")
        if not tokens:
            raise TokenizerError(f"{KEY}tokens is empty")
        # Files pad their vocabulary with empty strings; they need names of their own to keep ids in step.
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)] if "" in tokens else tokens
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(ids) != len(tokens):
            i, token = next((i, token) for i, token in enumerate(tokens) if ids[token] != i)
            raise TokenizerError(f"{KEY}tokens[{i}] and [{ids[token]}] are both {quote(token)}")
        types = cls._read_types(meta, len(tokens))
        normal = TokenType.NORMAL.value
        return cls(tokens, types, ids, [i for i, t in enumerate(types) if t != normal])

    @staticmethod
    def _read_types(meta: Metadata, n: int) -> list[int]:
        if not meta.has("token_type"):
            return [TokenType.NORMAL.value] * n
        types = meta.numbers("token_type", n, (int,))
        known = {t.value for t in TokenType}
        if not set(types) <= known:
            wrong = next(i for i, t in enumerate(types) if t not in known)
            raise TokenizerError(f"{KEY}token_type[{wrong}] is {types[wrong]}; known are 0 to {max(known)}")
        return types

    def __len__(self) -> int:
        return len(self.tokens)

    def mark_control(self, ids: set[int]) -> None:
        """Make control tokens of `ids`, for files that give no types or wrong ones."""
        self.other[:] = sorted(ids | set(self.other))
        for i in ids:
            self.types[i] = TokenType.CONTROL.value

    def texts(self, types: frozenset[TokenType]) -> list[str]:
        """The tokens of some types other than NORMAL, by id."""
        return [self.tokens[i] for i in self.other if self.types[i] in types]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte: printable Latin-1 stands for itself, the rest follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_LETTER = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """What a token of a byte-level vocabulary stands for."""
    try:
        return bytes(map(BYTE_OF_LETTER.__getitem__, token))
    except KeyError:  # not written in the byte alphabet, so it stands for itself
        return utf8(token)


def sentencepiece_bytes(token: str) -> bytes:
    """What a token of a SentencePiece vocabulary stands for, byte tokens apart."""
    return utf8(token.replace(SPACE, " "))


def utf8(text: str) -> bytes:
    """UTF-8, for any string that Python can hold."""
    return text.encode("utf-8", "replace")


def fallback_byte(token: str) -> bytes | None:
    """The byte that a token such as "<0x0A>" stands for, or None if it is not written like that."""
    digits = token[3:5] if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else ""
    try:
        return bytes.fromhex(digits) or None
    except ValueError:
        return None
