"""What becomes of each `tokenizer.*` key: none passes unread. docs/tokenizer-keys.md says the same to people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum

from .vocabulary import Metadata, warn


class Handling(Enum):
    """What becomes of a key."""

    READ = "read"
    CHAT = "read by the chat template"
    OFF = "no effect while false, 0 or empty; else named in a warning, because it is not applied"
    IRRELEVANT = "no effect on text or ids here"


# The keys that converters write, after "tokenizer.". Where one is read by some vocabularies only, the others ignore it.
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
    """What becomes of the key "tokenizer." + `name`, or None where it is not known."""
    return KEYS.get(_NAMED_TEMPLATE.sub("chat_template.NAME", name))


def report_unread(meta: Metadata) -> None:
    """Name in a warning what the file asks for and nothing has read."""
    for key in meta.key_names():
        if key in meta.read:
            continue
        known = handling(key.removeprefix("tokenizer."))
        if known in (Handling.OFF, Handling.READ) and not meta.is_off(key):  # or read by vocabularies of another kind
            warn("%s is %s, which is not applied: text may become other ids than the model knows", key, meta.shown(key))
        elif known is None:
            warn("%s is not known and not read: if text becomes other ids than the model knows, this is why", key)
