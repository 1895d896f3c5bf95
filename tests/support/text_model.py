"""Makes a small random model for text and chats: its tokens are the 256 bytes and some special ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.tiny_dense import Tiny
from support.vocab_builder import CONTROL, byte_level

TURNS: Mapping[str, int] = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL}
START, END = 257, 258  # ids of the special tokens: they follow the bytes and "he"
HELLO = [{"role": "user", "content": "hi"}]


def save(path: Path, special: Mapping[str, int] = TURNS, template: str | None = None, **keys: Any) -> Path:
    """Writes the file. ``keys`` are the tokenizer's; ``general`` maps names to other keys."""
    others = keys.pop("general", {}) | ({"tokenizer.chat_template": template} if template else {})
    vocabulary = byte_level([("h", "e")], special, **keys)
    n_vocab = len(vocabulary["tokenizer.ggml.tokens"])
    return Tiny("llama", n_vocab=n_vocab, keys={"context_length": 256, **vocabulary, **others}).save(path)
