"""Results of a generation: the chunks of a stream, and the whole."""

from __future__ import annotations

import html
import resource
import sys
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import quote


@dataclass(frozen=True, repr=False)
class Result:
    """Result of a generation.

    ``text`` and ``tokens`` (ids) of the answer; ``finish_reason`` "stop" (an end token or a stop string) or
    "length"; tokens per second of prompt and of generation; ``peak_memory`` bytes resident in this process.
    ``stop_token`` is the end token, ``stop_string`` the stop string that ended the text, if one did.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    prompt_tps: float
    generation_tps: float
    peak_memory: int
    stop_token: int | None = None
    stop_string: str | None = None

    def __repr__(self) -> str:
        return f"<Result {quote(self.text, 60)}: {self._figures()}>"

    def _repr_html_(self) -> str:
        """Return the text with its line breaks, and a line of figures, for a notebook."""
        return (
            f'<div style="white-space: pre-wrap">{html.escape(self.text)}</div>'
            f'<div style="color: gray; font-size: smaller">{html.escape(self._figures())}</div>'
        )

    def _figures(self) -> str:
        ended = self.finish_reason
        if self.stop_string is not None:
            ended += f" at {quote(self.stop_string, 20)}"
        return f"{len(self.tokens)} tokens, {self.generation_tps:.1f} tokens/s, {ended}"


class Chunk(NamedTuple):
    """Piece of a streamed generation: new text (may be empty), its token, and the result so far."""

    text: str
    token: int
    finish_reason: str | None
    prompt_tokens: int
    prompt_tps: float
    generation_tps: float
    stop_token: int | None = None
    stop_string: str | None = None


class PromptRead(NamedTuple):
    """Return value of a stream: the tokens of the prompt, and the tokens per second of reading it."""

    tokens: int
    tps: float


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
