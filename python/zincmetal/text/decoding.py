"""Decodes ids to text, one at a time."""

from __future__ import annotations

import codecs
import operator
from typing import TYPE_CHECKING, SupportsIndex

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


class StreamDecoder:
    """Turns ids into text as they come. It holds back the bytes of a character until the character is whole."""

    def __init__(self, tokenizer: Tokenizer, texts: dict[int, str], skip_special: bool, drop_space: bool) -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._skip_special = skip_special
        self._drops_space = drop_space
        self._start()

    def _start(self) -> None:
        self._held = b""  # the first bytes of a character
        self._drop_space = self._drops_space
        self._plain = not self._drop_space  # the text of a token depends on the token alone

    def push(self, token: SupportsIndex) -> str:
        """Return the text that ``token`` completes, maybe empty. Raises UsageError for an id outside the vocabulary."""
        # CPU caches are cold between two steps of a model. So most tokens need only one look into one table.
        if self._plain and type(token) is int and (known := self._texts.get(token)) is not None:
            return known
        return self._push(token)

    def _push(self, token: SupportsIndex) -> str:
        piece, was_plain = self._tokenizer.token_bytes(token), self._plain
        if self._skip_special and self._tokenizer.is_special(token):
            return ""
        if self._drop_space and piece:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        piece = self._held + piece
        text, used = codecs.utf_8_decode(piece, "replace", False)
        self._held = piece[used:]
        self._plain = not (self._held or self._drop_space)
        if was_plain and self._plain:
            self._texts[operator.index(token)] = text
        return text

    def finish(self) -> str:
        """Return the held text: U+FFFD if the ids end inside a character. The decoder then starts on new ids."""
        text = self._held.decode("utf-8", "replace")
        self._start()
        return text
