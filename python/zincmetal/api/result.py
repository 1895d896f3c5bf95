"""Results of a generation: the chunks of a stream, and the whole."""

from __future__ import annotations

import html
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import quote

if TYPE_CHECKING:
    from .handle import Answer


class Logprob(NamedTuple):
    """Log-probabilities of a token that was chosen, and of the ``top`` tokens in its place, (id, log-probability) each.

    They are of the model's distribution, before penalties, biases, filters and temperature.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Call(NamedTuple):
    """Call of a tool, as an answer has it. ``result`` or ``error``: of a function that was called."""

    name: str
    arguments: dict[str, Any]
    result: Any = None
    error: str = ""


@dataclass(frozen=True)
class CacheUse:
    """What a prompt took from the prefix cache: ``reused`` tokens, from ``source``, and ``why`` no more of them.

    ``source`` is "memory", "host" or "disk", and "" if nothing was reused. ``why`` is "" if all of
    the prompt that could be reused was.
    """

    reused: int = 0
    source: str = ""
    why: str = ""

    def __str__(self) -> str:
        taken = f"{self.reused} tokens reused" + (f" from {self.source}" if self.source else "")
        return f"{taken}; {self.why}" if self.why else taken


@dataclass(frozen=True, repr=False)
class Result:
    """Result of a generation.

    ``text`` and ``tokens`` (ids) of the answer; ``finish_reason`` "stop" (an end token or a stop string), "length"
    or "cancelled"; tokens per second of prompt and of generation; ``peak_memory`` bytes resident in this
    process. ``stop_token`` is the end token, ``stop_string`` the stop string that ended the text, if one did.
    ``cache`` says what the prefix cache gave, and why no more. The seconds are of waiting in the queue, of reading the
    prompt, and of the tokens after the first. ``logprobs`` has an entry for each token, if they were asked for.
    ``parsed`` is the value of an answer with a form, None if it ended too early. ``calls`` are the calls of tools in a
    chat. If functions were called, ``messages`` is the conversation with their results, up to the answer.
    ``drafts`` has (drafted, accepted) tokens by their place in a draft: the first pair is of the first tokens. Accepted
    are those that the answer has: what a draft has behind its end is not counted.
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
    cache: CacheUse = CacheUse()
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    logprobs: tuple[Logprob, ...] | None = None
    parsed: Any = None
    calls: tuple[Call, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    drafts: tuple[tuple[int, int], ...] = ()

    @property
    def drafted(self) -> int:
        """Tokens of drafts that were verified."""
        return sum(drafted for drafted, _ in self.drafts)

    @property
    def accepted(self) -> int:
        """Tokens of the answer that were drafted."""
        return sum(accepted for _, accepted in self.drafts)

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
    logprob: Logprob | None = None


def result_of(answer: Answer) -> Result:
    """Make the result of an answer that has ended."""
    chunks: Sequence[Chunk] = answer.chunks
    last, stats = (chunks[-1] if chunks else None), answer.stats
    assert stats is not None, "the answer has ended"
    return Result(
        text="".join(c.text for c in chunks),
        tokens=[c.token for c in chunks],
        finish_reason=(last.finish_reason if last else None) or answer.reason,
        prompt_tokens=stats.prompt,
        prompt_tps=(stats.prompt - stats.reused) / (stats.prefill or 1e-9),
        generation_tps=last.generation_tps if last else 0.0,
        peak_memory=peak_memory(),
        stop_token=last.stop_token if last else None,
        stop_string=last.stop_string if last else None,
        cache=answer.cache or CacheUse(),
        queue_seconds=stats.queue,
        prefill_seconds=stats.prefill,
        decode_seconds=stats.decode,
        logprobs=None if answer.logprobs is None else tuple(answer.logprobs),
        drafts=tuple(stats.drafts),
    )


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
