"""Generating text: the loop over tokens, and what it gives."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from .errors import DeviceError, UsageError
from .memory import Progress
from .runtime import chunk_rows
from .sampling import Sampler, SamplingParams
from .streaming import TextStream
from .turn import Turn

if TYPE_CHECKING:
    from .engine import Model

NOT_FINITE = "the model's logits are no numbers: the file is damaged, or the device failed"


@dataclass(frozen=True)
class Result:
    """What a generation gave.

    ``text`` and ``tokens`` (ids) of the answer; ``finish_reason`` "stop" (an end token or a stop string) or
    "length"; tokens per second of prompt and of generation; ``peak_memory`` bytes resident in this process.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    prompt_tps: float
    generation_tps: float
    peak_memory: int


class Chunk(NamedTuple):
    """A piece of a streamed generation: new text (may be empty), its token, and the result so far."""

    text: str
    token: int
    finish_reason: str | None
    prompt_tokens: int
    prompt_tps: float
    generation_tps: float


def stream(
    model: Model,
    turn: Turn,
    ids: list[int],
    max_tokens: int,
    params: SamplingParams,
    stop: tuple[str, ...],
    progress: Progress | None,
) -> Generator[Chunk, None, None]:
    with turn:
        text, sampler = TextStream(model.tokenizer, stop), Sampler(params)
        head = "argmax" if params.greedy else "candidates"
        last = min(max_tokens, model.config.n_ctx - len(ids) + 1)
        last_ahead = last - 2 if params.greedy and model._ahead else 0
        kept = model._keep_common(ids)
        for rows in {*chunk_rows(len(ids) - kept)}:
            model._recorded(rows, head)
        model._recorded(1, head, len(ids))
        began = time.perf_counter()
        best = model._prefill(ids[kept:], progress, head)
        prompt_tps = (len(ids) - kept) / (time.perf_counter() - began)
        # A step sweeps the caches, so that every object that is touched after it costs: locals, and few calls.
        greedy, eog_ids, push = params.greedy, model.tokenizer.eog_ids, text.push
        rest, go_on = turn.rest.append, turn.rest.pop
        clock, new_tuple = time.perf_counter, tuple.__new__
        n_prompt, began = len(ids), clock()
        for n in range(1, last + 1):
            token = best if greedy else model._sample(sampler)
            if token < 0:
                raise DeviceError(NOT_FINITE)
            ended = token in eog_ids
            piece = "" if ended else push(token)
            reason = "stop" if ended or text.stopped else "length" if n == last else None
            if reason and not text.stopped:
                piece += text.finish()
            tps = (n - 1) / (clock() - began or 1e-9)  # the first token came with the prompt
            rest(None)
            yield new_tuple(Chunk, (piece, token, reason, n_prompt, prompt_tps, tps))
            try:
                go_on()
            except IndexError:
                raise UsageError(f"this stream was ended by {turn.ended or 'another call'}") from None
            if reason:
                return
            best = model._decode(token, n <= last_ahead, head)


def collect(chunks: Iterator[Chunk]) -> Result:
    text, tokens, last = [], [], None
    for chunk in chunks:
        text.append(chunk.text)
        tokens.append(chunk.token)
        last = chunk
    if last is None:
        return Result("", [], "length", 0, 0.0, 0.0, peak_memory())
    return Result(
        "".join(text),
        tokens,
        last.finish_reason or "length",
        last.prompt_tokens,
        last.prompt_tps,
        last.generation_tps,
        peak_memory(),
    )


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
