"""The vocabulary of a GGUF file: its `tokenizer.ggml.*` metadata, checked, and the bytes of each token."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from ..errors import FileChangedError, GGUFError, TokenizerError, UsageError, ZincError, abbreviate, quote

KEY = "tokenizer.ggml."
SPACE = "\u2581"  # what SentencePiece writes for a space
MARK = "\ufdd0"  # a noncharacter: where a chat prompt has it, the text around it is no special token
_LISTS = frozenset({"tokens", "token_type", "scores", "merges"})  # decoded when read, and some never are

warn = logging.getLogger("zincmetal").warning


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
    """Typed access to `tokenizer.*`, which remembers what was read.

    A value that is missing or of the wrong type is a TokenizerError that names its key; what files are known to
    get wrong harmlessly (an id out of range, a flag of another width) is a warning that says what is assumed.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self.read: set[str] = set()  # full names of the keys that something has asked for, or will when it is needed
        self._token_ids: dict[str, list[int]] = {}

    def key_names(self) -> list[str]:
        """The full names of all `tokenizer.*` keys that have a value."""
        return [key for key in self._values if key.startswith("tokenizer.")]

    def is_off(self, key: str) -> bool:
        """Whether a value, by its full name, is false, 0 or empty."""
        value = self._value(key)
        return len(value) == 0 if hasattr(value, "__len__") else not value

    def shown(self, key: str) -> str:
        """A value, by its full name, as messages show it."""
        return abbreviate(self._value(key))

    def general(self, name: str) -> str:
        """A string of `general.*`, or an empty one."""
        value = self._values.get("general." + name)
        return value if isinstance(value, str) else ""

    def template(self) -> str:
        """The source of the chat template and of its named variants, or an empty string."""
        names = [key for key in self.key_names() if key.startswith("tokenizer.chat_template")]
        self.read.update(names)
        return "\n".join(value for name in names if isinstance(value := self._values[name], str))

    def _value(self, key: str) -> Any:
        try:
            return self._values.get(key)
        except FileChangedError:
            raise
        except GGUFError as error:  # of a list that is not what its type says
            raise TokenizerError(str(error)) from error
        except ZincError:
            raise
        except ValueError as error:  # what a map says that was closed while it was read
            raise UsageError(f"the file was closed while {key} was read: {error}") from error

    def _get(self, name: str, kind: str) -> Any:
        self.read.add(KEY + name)
        value = self._value(KEY + name)
        if value is None:
            raise TokenizerError(f"{KEY}{name} is missing: this file cannot be tokenized without its {kind}")
        return value

    def has(self, name: str) -> bool:
        """Whether the file has the key (which reads no list)."""
        self.read.add(KEY + name)
        return KEY + name in self._values and (name in _LISTS or self._value(KEY + name) is not None)

    def text(self, name: str) -> str:
        """A string."""
        value = self._get(name, "name")
        if not isinstance(value, str):
            raise TokenizerError(f"{KEY}{name} is {described(value)}; a string is needed")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A boolean, or an integer of any width that is 0 or 1; `default` where the file has none."""
        if not self.has(name):
            return default
        value = self._get(name, "flag")
        if type(value).__name__ in ("bool", "bool_"):  # without an import of NumPy, whose bool_ that is
            return bool(value)
        if (number := as_integer(value)) in (0, 1):
            return bool(number)
        raise TokenizerError(f"{KEY}{name} is {described(value)}; a boolean is needed")

    def token_id(self, name: str, n_tokens: int) -> int | None:
        """An id from 0 to n_tokens - 1, or None where the file has none or one that is no token's."""
        ids = self.token_ids(name, n_tokens)
        return ids[0] if ids else None

    def token_ids(self, name: str, n_tokens: int) -> list[int]:
        """The ids of a key that holds one or a list; ids out of range are named in a warning and left out."""
        if name not in self._token_ids:
            self._token_ids[name] = self._read_token_ids(name, n_tokens)
        return self._token_ids[name]

    def _read_token_ids(self, name: str, n_tokens: int) -> list[int]:
        if not self.has(name):
            return []
        value = self._get(name, "token id")
        several = hasattr(value, "__len__") and not isinstance(value, (str, bytes))
        numbers = [as_integer(v) for v in (self._list(name, "list of token ids") if several else [value])]
        if None in numbers:
            raise TokenizerError(f"{KEY}{name} is {described(value)}; an id below {n_tokens} is needed")
        ids = [i for i in numbers if i is not None and 0 <= i < n_tokens]
        for outside in (i for i in numbers if i not in ids):
            shown = described(outside).removesuffix(" (int)")
            warn("%s%s is %s, and the file has %d tokens: taken as not set", KEY, name, shown, n_tokens)
        return ids

    def strings(self, name: str) -> list[str]:
        """A list of strings."""
        values = self._list(name, "list of strings")
        if set(map(type, values)) - {str}:
            wrong = next(i for i, v in enumerate(values) if type(v) is not str)
            raise TokenizerError(f"{KEY}{name}[{wrong}] is {described(values[wrong])}; a string is needed")
        return values

    def integers(self, name: str, n: int) -> list[int]:
        """A list of at least `n` integers, of any type that holds them, cut to `n`."""
        values = self.numbers(name, n)
        if set(map(type, values)) <= {int}:
            return values
        whole = [as_integer(int(v) if isinstance(v, float) and v.is_integer() else v) for v in values]
        if None in whole:
            raise TokenizerError(f"{KEY}{name}[{whole.index(None)}] is not an integer")
        return [v for v in whole if v is not None]

    def numbers(self, name: str, n: int) -> list[Any]:
        """A list of at least `n` Python numbers, cut to `n`."""
        values = self._list(name, "list of numbers")
        if len(values) < n:
            raise TokenizerError(f"{KEY}{name} has {len(values)} entries for the {n} of {KEY}tokens")
        if len(values) > n:
            warn("%s%s has %d entries for %d tokens: those past the end are ignored", KEY, name, len(values), n)
            values = values[:n]
        if not set(map(type, values)) <= {int, float}:
            wrong = next(i for i, v in enumerate(values) if type(v) not in (int, float))
            raise TokenizerError(f"{KEY}{name}[{wrong}] is {described(values[wrong])}; a number is needed")
        return values

    def _list(self, name: str, kind: str) -> list[Any]:
        value = self._get(name, kind)
        if hasattr(value, "tolist"):  # a NumPy array: its own conversion gives Python numbers, and fast
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
            raise TokenizerError(f"{KEY}{name} is {described(value)}; a {kind} is needed")
        return list(value)


def as_integer(value: object) -> int | None:
    """An integer of any type but bool, or None."""
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except Exception:  # TypeError, or what an __index__ of somebody's raises
        return None


def described(value: object) -> str:
    """A value as error messages show it: never long."""
    kind = type(value).__name__
    if isinstance(value, int) and value.bit_length() > 128:  # Python prints no thousands of digits
        return f"an integer of {value.bit_length()} bits"
    return f"{abbreviate(value)} ({kind})" if isinstance(value, (bool, int, float, str)) else f"of type {kind}"


SPECIAL = frozenset({TokenType.UNKNOWN, TokenType.CONTROL})  # text matches these only with parse_special
_NORMAL = TokenType.NORMAL.value


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file; a token's id is its place in `tokens`."""

    tokens: list[str]
    types: list[int]  # values of TokenType
    ids: dict[str, int]  # of tokens that occur twice a special one, else the first
    other: set[int]  # the ids that are not NORMAL: few, in most files
    twins: dict[str, list[int]]  # all ids of tokens that occur twice
    typed: bool  # whether the file says what its tokens are

    @classmethod
    def read(cls, meta: Metadata) -> Vocabulary:
        """Read `tokens` and `token_type`."""
        tokens = meta.strings("tokens")
        if not tokens:
            raise TokenizerError(f"{KEY}tokens is empty")
        # Files pad their vocabulary with empty strings; they need names of their own to keep ids in step.
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)] if "" in tokens else tokens
        types = cls._read_types(meta, len(tokens))
        ids = dict(zip(tokens, range(len(tokens)), strict=True))
        twins = _twins(tokens, types, ids) if len(ids) != len(tokens) else {}
        other = {i for i, t in enumerate(types) if t != _NORMAL}
        return cls(tokens, types, ids, other, twins, meta.has("token_type"))

    @staticmethod
    def _read_types(meta: Metadata, n: int) -> list[int]:
        if not meta.has("token_type"):
            return [_NORMAL] * n
        types = meta.integers("token_type", n)
        known = {t.value for t in TokenType}
        if strange := set(types) - known:
            warn("%stoken_type holds %s; known are 0 to %d: taken as normal", KEY, min(strange), max(known))
            types = [t if t in known else _NORMAL for t in types]
        return types

    def __len__(self) -> int:
        return len(self.tokens)

    def all_ids(self, text: str) -> list[int]:
        """Every id whose token is `text`."""
        if text in self.twins:
            return self.twins[text]
        return [self.ids[text]] if text in self.ids else []

    def set_type(self, ids: Iterable[int], kind: TokenType) -> None:
        """Correct the type of some tokens, for files that give none or wrong ones."""
        for i in ids:
            self.types[i] = kind.value
            self.other.add(i)

    def of_types(self, *types: TokenType) -> dict[str, int]:
        """The tokens of some types other than NORMAL, in order, and their ids."""
        found = (i for i in sorted(self.other) if self.types[i] in types)
        return {self.tokens[i]: i for i in found if self.ids[self.tokens[i]] == i}


def _twins(tokens: list[str], types: list[int], ids: dict[str, int]) -> dict[str, list[int]]:
    """Tokens that occur twice; `ids` is made to hold the one that text stands for."""
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
