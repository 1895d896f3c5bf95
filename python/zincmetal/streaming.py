"""Text out of a stream of tokens: whole characters only, and an end at a stop string."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


class TextStream:
    """Feeds tokens to the tokenizer's stream decoder and watches for stop strings.

    Text that could be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._decoder = tokenizer.stream(continues=True)  # the answer follows the prompt
        self._stop = tuple(s for s in stop if s)
        self._held = ""
        self.stopped = False
        #: push(token) is the text that this token made certain. After a stop string, ``stopped`` is set.
        self.push: Callable[[int], str] = self._push if self._stop else self._decoder.push

    def _push(self, token: int) -> str:
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """What was held back, at the end of the stream."""
        text = self._release(self._decoder.finish())
        text, self._held = text + ("" if self.stopped else self._held), ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_partial(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _partial(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
