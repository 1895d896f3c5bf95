"""Streams text from tokens: only whole characters, and an end at a stop string."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


class TextStream:
    """Feeds tokens to the tokenizer's stream decoder and watches for stop strings.

    Text that could begin a stop string is held back until that is decided. If stop strings overlap, the one that
    begins first ends the text. The cuts between tokens do not matter. With ``skip_special``, control tokens have no
    text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], skip_special: bool = False) -> None:
        hiding = {"skip_special": True} if skip_special else {}
        self._decoder = tokenizer.stream(**hiding, continues=True)  # the answer follows the prompt
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        #: The stop string that ended the text, or None before.
        self.stop_string: str | None = None
        #: push(token) returns the text that this token decided. After a stop string, ``stopped`` is true.
        self.push: Callable[[int], str] = self._push if self._stop else self._decoder.push

    @property
    def stopped(self) -> bool:
        """True if a stop string has ended the text."""
        return self.stop_string is not None

    def _push(self, token: int) -> str:
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """Return the held text, at the end of the stream."""
        return self._release(self._decoder.finish(), ended=True)

    def _release(self, new: str, ended: bool = False) -> str:
        text = self._held + new
        whole = min((at for at in (text.find(s) for s in self._stop) if at >= 0), default=len(text))
        begun = len(text) if ended else min((_begins(text, s) for s in self._stop), default=len(text))
        if not self.stopped and whole < min(begun, len(text)):  # else an earlier stop string may still become whole
            self.stop_string = min((s for s in self._stop if text.startswith(s, whole)), key=len)
        certain = min(whole, begun)
        self._held = "" if self.stopped else text[certain:]
        return text[:certain]


def _begins(text: str, stop: str) -> int:
    """Find the start of the longest end of ``text`` that begins ``stop``. It is ``len(text)`` if no end does."""
    first = max(0, len(text) - len(stop) + 1)
    return next((at for at in range(first, len(text)) if stop.startswith(text[at:])), len(text))
