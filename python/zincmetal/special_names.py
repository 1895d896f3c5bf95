"""The special tokens that a chat template may name, and those that no message may say."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .vocabulary import KEY, TokenType

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

# What templates call a token, and the keys under which a file has its id (the misspelt one is the usual one).
_NAMES = {
    "pad_token": ("padding_token_id",),
    "unk_token": ("unknown_token_id",),
    "sep_token": ("seperator_token_id", "separator_token_id"),
    "cls_token": ("cls_token_id",),
    "mask_token": ("mask_token_id",),
}


def special_tokens(meta: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The texts of a file's special tokens by their names in templates.

    `additional_special_tokens` are its control tokens without such a name.
    """
    return _of_file(meta) | dict(getattr(tokenizer, "special_texts", {}))


def _of_file(meta: Mapping[str, Any]) -> dict[str, Any]:
    tokens = meta.get(KEY + "tokens")
    if tokens is None:
        return {}
    found = {}
    for name, keys in _NAMES.items():
        ids = (_id(meta.get(KEY + key), len(tokens)) for key in keys)
        if (token := next((i for i in ids if i is not None), None)) is not None:
            found[name] = str(tokens[token])
    types = meta.get(KEY + "token_type")
    named = {*found.values()} | {tokens[i] for n in ("bos", "eos") if (i := _named(meta, n, len(tokens))) is not None}
    if types is not None:
        control = [str(t) for t, kind in zip(tokens, types, strict=False) if kind == TokenType.CONTROL.value]
        others = [text for text in control if text and text not in named]
        if others:
            return found | {"additional_special_tokens": others}
    return found


def _named(meta: Mapping[str, Any], name: str, n: int) -> int | None:
    return _id(meta.get(f"{KEY}{name}_token_id"), n)


def _id(value: Any, n: int) -> int | None:
    """A token id, or None for what is none: templates can do without."""
    try:
        token = operator.index(value)
    except TypeError:
        return None
    return token if 0 <= token < n and not isinstance(value, bool) else None


def control_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The texts of the tokens that are no text."""
    texts = getattr(tokenizer, "control_texts", None)
    if texts is None:
        texts = tokenizer._vocab.texts(frozenset({TokenType.UNKNOWN, TokenType.CONTROL}))
    return tuple(texts)
