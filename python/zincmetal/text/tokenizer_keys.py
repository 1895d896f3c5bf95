"""Reads the ``tokenizer.*`` keys of a file, and treats each by a rule (``docs/tokenizer-keys.md``)."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any, cast

from ..errors import TokenizerError, abbreviate
from ..gguf.metadata import MetadataReader, as_integer

KEY = "tokenizer.ggml."
_LISTS = frozenset({"tokens", "token_type", "scores", "merges"})  # arrays, which are decoded on the first read

warn = logging.getLogger("zincmetal.text").warning


class Handling(Enum):
    """Treatment of a key."""

    READ = "read"
    CHAT = "read by the chat template"
    OFF = "no effect while false, 0 or empty; else named in a warning, because it is not applied"
    IRRELEVANT = "no effect on text or ids here"


# The keys that converters write, after "tokenizer.". A vocabulary ignores a key that only other kinds read.
KEYS: Mapping[str, Handling] = {
    "ggml.model": Handling.READ,
    "ggml.pre": Handling.READ,
    "ggml.tokens": Handling.READ,
    "ggml.token_type": Handling.READ,
    "ggml.scores": Handling.READ,
    "ggml.merges": Handling.READ,
    "ggml.bos_token_id": Handling.READ,
    "ggml.eos_token_id": Handling.READ,
    "ggml.eot_token_id": Handling.READ,
    "ggml.eom_token_id": Handling.READ,
    "ggml.eos_token_ids": Handling.READ,
    "ggml.unknown_token_id": Handling.READ,
    "ggml.seperator_token_id": Handling.READ,
    "ggml.padding_token_id": Handling.READ,
    "ggml.mask_token_id": Handling.READ,
    "ggml.cls_token_id": Handling.READ,
    "ggml.fim_pre_token_id": Handling.READ,
    "ggml.fim_suf_token_id": Handling.READ,
    "ggml.fim_mid_token_id": Handling.READ,
    "ggml.fim_pad_token_id": Handling.READ,
    "ggml.fim_rep_token_id": Handling.READ,
    "ggml.fim_sep_token_id": Handling.READ,
    "ggml.prefix_token_id": Handling.READ,
    "ggml.suffix_token_id": Handling.READ,
    "ggml.middle_token_id": Handling.READ,
    "ggml.suppress_tokens": Handling.READ,
    "ggml.add_bos_token": Handling.READ,
    "ggml.add_eos_token": Handling.READ,
    "ggml.add_space_prefix": Handling.READ,
    "ggml.add_sep_token": Handling.OFF,
    "ggml.add_cls_token": Handling.OFF,
    "ggml.remove_extra_whitespaces": Handling.OFF,
    "ggml.precompiled_charsmap": Handling.OFF,
    "ggml.normalizer.lowercase": Handling.OFF,
    "ggml.normalizer.strip_accents": Handling.OFF,
    "ggml.add_seperator_token": Handling.OFF,
    "ggml.add_unk_token": Handling.IRRELEVANT,
    "ggml.add_unknown_token": Handling.IRRELEVANT,
    "ggml.add_pad_token": Handling.IRRELEVANT,
    "ggml.add_padding_token": Handling.IRRELEVANT,
    "ggml.add_mask_token": Handling.IRRELEVANT,
    "ggml.token_type_count": Handling.IRRELEVANT,
    "chat_template": Handling.CHAT,
    "chat_template.NAME": Handling.CHAT,
    "chat_templates": Handling.CHAT,
    "huggingface.json": Handling.IRRELEVANT,
    "rwkv.world": Handling.IRRELEVANT,
}
_NAMED_TEMPLATE = re.compile(r"chat_template\..+")


def handling(name: str) -> Handling | None:
    """Find the treatment of the key "tokenizer." + ``name``, or None for an unknown key."""
    return KEYS.get(_NAMED_TEMPLATE.sub("chat_template.NAME", name))


class TokenizerKeys(MetadataReader):
    """Reads ``tokenizer.ggml.<name>``. A value that is missing or of the wrong type is a TokenizerError.

    Some faults of files are harmless, such as an id out of range or an array that is too long. They are warnings,
    which name the assumption.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values, KEY, error=TokenizerError)
        self._token_ids: dict[str, list[int]] = {}

    def key_names(self) -> list[str]:
        """List the full names of all ``tokenizer.*`` keys."""
        return [key for key in self.values if key.startswith("tokenizer.")]

    def has(self, name: str) -> bool:
        """Return True if the file has the key. Counts as reading it, but decodes no array."""
        self.note(name)
        key = KEY + name
        return key in self.values and (name in _LISTS or self.value(key) is not None)

    def missing(self, name: str) -> TokenizerError:
        """Make the error for a key that the file lacks."""
        return TokenizerError(f"key '{KEY}{name}' is missing: this file cannot be tokenized without it")

    def general(self, name: str) -> str:
        """Read a string of ``general.*``, or an empty string."""
        value = self.values.get("general." + name)
        return value if isinstance(value, str) else ""

    def template(self) -> str:
        """Join the sources of the chat template and of its named variants. Empty for a file without templates."""
        names = [key for key in self.key_names() if key.startswith("tokenizer.chat_template")]
        self.read.update(names)
        return "\n".join(value for name in names if isinstance(value := self.values[name], str))

    def token_id(self, name: str, n_tokens: int) -> int | None:
        """Read an id from 0 to ``n_tokens`` - 1, or None if the file lacks it."""
        ids = self.token_ids(name, n_tokens)
        return ids[0] if ids else None

    def token_ids(self, name: str, n_tokens: int) -> list[int]:
        """Read the ids of a key with one id or a list. A warning names the ids out of range, which are left out."""
        if name not in self._token_ids:
            self._token_ids[name] = self._read_token_ids(name, n_tokens)
        return self._token_ids[name]

    def _read_token_ids(self, name: str, n_tokens: int) -> list[int]:
        if not self.has(name):
            return []
        value = self.get(name)
        several = hasattr(value, "__len__") and not isinstance(value, (str, bytes))
        numbers = [as_integer(v) for v in (self.items(name, "list of token ids") if several else [value])]
        if None in numbers:
            raise self.expected(name, f"an id below {n_tokens}", value)
        ids = [i for i in numbers if i is not None and 0 <= i < n_tokens]
        for outside in (i for i in numbers if i not in ids):
            what = "%s%s is %s, and the file has %d tokens: taken as not set"
            warn(what, KEY, name, abbreviate(outside), n_tokens)
        return ids

    def integers_per_token(self, name: str, n: int) -> list[int]:
        """Read an array of at least ``n`` integers, cut to ``n``. Floats with integral values also count."""
        values = self.numbers_per_token(name, n)
        if set(map(type, values)) <= {int}:  # the usual case, fast
            return cast(list[int], values)
        whole = [as_integer(int(v) if isinstance(v, float) and v.is_integer() else v) for v in values]
        if None in whole:
            wrong = whole.index(None)
            raise self.expected(name, "an integer", values[wrong], wrong)
        return [v for v in whole if v is not None]

    def numbers_per_token(self, name: str, n: int) -> list[int | float]:
        """Read an array of at least ``n`` numbers, cut to ``n``."""
        values = self.numbers(name)
        if len(values) < n:
            raise self.bad(name, f"it has {len(values)} entries for the {n} of {KEY}tokens")
        if len(values) > n:
            warn("%s%s has %d entries for %d tokens: the rest is ignored", KEY, name, len(values), n)
        return values[:n]

    def account(self) -> None:
        """Name in a warning every key that asks for something and that nothing has read."""
        for key in self.key_names():
            if key in self.read:
                continue
            known = handling(key.removeprefix("tokenizer."))
            # A READ key that was not read belongs to vocabularies of another kind.
            if known in (Handling.OFF, Handling.READ) and not self._is_off(key):
                shown = abbreviate(self.value(key))
                warn("%s is %s, which is not applied: text may get other ids than in training", key, shown)
            elif known is None:
                warn("%s is an unknown key, which is not read: text may get other ids than in training", key)

    def _is_off(self, key: str) -> bool:
        """Return True if the value of a full key is false, 0 or empty."""
        value = self.value(key)
        return len(value) == 0 if hasattr(value, "__len__") else not value
