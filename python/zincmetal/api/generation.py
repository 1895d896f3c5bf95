"""Generation: the options of a call, and the loop over tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict

from ..device.buffers import Progress
from ..engine.engine import Engine
from ..engine.turn import Turn
from ..errors import UsageError, did_you_mean, quote, typed_errors
from ..sampling.params import LogitsProcessor, SamplingParams
from ..sampling.sampler import Sampler
from ..text.stream import TextStream
from .result import Chunk, PromptRead, Result, peak_memory

if TYPE_CHECKING:
    from .text import ModelText

SAMPLING = tuple(f.name for f in fields(SamplingParams))
# These options do not choose tokens. A chat without any other option has the sampling that the makers advise.
BESIDE = ("seed", "logit_bias", "logits_processors")


class SamplingOptions(TypedDict, total=False):
    """Fields of SamplingParams, as keywords of the calls that generate; None stands for the default."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repeat_penalty: float | None
    repeat_last_n: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    logits_processors: Sequence[LogitsProcessor] | None


@dataclass(frozen=True)
class Request:
    """Arguments of a generation. ``max_tokens`` -1: until the context is full."""

    ids: list[int]
    max_tokens: int
    params: SamplingParams
    stop: tuple[str, ...]
    hide_special: bool
    progress: Progress | None


def sampling_params(call: str, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> SamplingParams:
    """Check the options of a ``call``. ``defaults`` count if no option chooses the sampling. Raises UsageError."""
    refuse_unknown(call, options, SAMPLING)
    given = {name: value for name, value in options.items() if value is not None}
    if defaults and not given.keys() - set(BESIDE):
        given = {**defaults, **given}
    return SamplingParams(**given)


def refuse_unknown(call: str, given: Iterable[str], known: Iterable[str], why: str = "is no option of it") -> None:
    """Raise UsageError that names the first unknown keyword, and a known one like it."""
    known = sorted(known)
    for name in given:
        if name not in known:
            raise UsageError(f"{call}: {quote(name)} {why}{did_you_mean(name, known)}")


def stream(engine: Engine, text: ModelText, turn: Turn, asked: Request) -> Generator[Chunk, None, PromptRead]:
    """Yield a chunk per token; return the cost of reading the prompt."""
    with typed_errors, turn:
        tokenizer = text.id_tokenizer
        params = _forbidding(asked.params, [t for t in tokenizer.suppressed if t < engine.config.n_vocab])
        made, sampler = TextStream(tokenizer, asked.stop, asked.hide_special), Sampler(params)
        output = "argmax" if params.greedy else "candidates"
        room = engine.config.n_ctx - len(asked.ids) + 1
        last = room if asked.max_tokens < 0 else min(asked.max_tokens, room)
        last_ahead = last - 2 if params.greedy and engine.runs_ahead else 0
        best, computed, seconds = engine.sync(asked.ids, output, asked.progress)
        n_prompt, prompt_tps = len(asked.ids), computed / seconds
        # A step sweeps the CPU's caches, so each object that is touched between two steps costs a miss. Hence locals,
        # few calls, and tuple.__new__ instead of Chunk(...): 40 to 51 us a token in all (bench/overhead.py).
        greedy, eog_ids, push = params.greedy, tokenizer.eog_ids, made.push
        decode, rest, go_on = engine.decode, turn.rest.append, turn.rest.pop
        clock, new_tuple = time.perf_counter, tuple.__new__
        began = clock()
        for n in range(1, last + 1):
            token = best if greedy else engine.sample(sampler)
            if token < 0:
                raise engine.not_finite()
            ended = token in eog_ids
            piece = "" if ended else push(token)
            reason = "stop" if ended or made.stop_string is not None else "length" if n == last else None
            if reason and made.stop_string is None:
                piece += made.finish()
                reason = "stop" if made.stop_string is not None else reason  # the text held back was a stop string
            tps = (n - 1) / (clock() - began or 1e-9)  # the first token came with the prompt
            stop_token = token if ended else None
            rest(None)
            yield new_tuple(Chunk, (piece, token, reason, n_prompt, prompt_tps, tps, stop_token, made.stop_string))
            try:
                go_on()
            except IndexError:
                raise UsageError(f"this stream was ended by {turn.ended or 'another call'}") from None
            if reason:
                break
            best = decode(token, n <= last_ahead, output)
        return PromptRead(n_prompt, prompt_tps)


def _forbidding(params: SamplingParams, tokens: Sequence[int]) -> SamplingParams:
    """Options that never draw these tokens. The tokens' own biases lose."""
    if not tokens:
        return params
    return replace(params, logit_bias={**params.logit_bias, **dict.fromkeys(tokens, -math.inf)})


def collect(chunks: Generator[Chunk, None, PromptRead], show: Callable[[Chunk], None] | None = None) -> Result:
    """Collect a stream into one result. ``show`` is called with each chunk as it comes."""
    made: list[Chunk] = []
    prompt = PromptRead(0, 0.0)
    while True:
        try:
            chunk = next(chunks)
        except StopIteration as end:
            prompt = end.value or prompt
            break
        made.append(chunk)
        if show:
            show(chunk)
    return result_of(made, prompt)


def result_of(made: Sequence[Chunk], prompt: PromptRead) -> Result:
    """Return the result that chunks make up."""
    last = made[-1] if made else None
    return Result(
        text="".join(c.text for c in made),
        tokens=[c.token for c in made],
        finish_reason=last.finish_reason or "length" if last else "length",
        prompt_tokens=last.prompt_tokens if last else prompt.tokens,
        prompt_tps=last.prompt_tps if last else prompt.tps,
        generation_tps=last.generation_tps if last else 0.0,
        peak_memory=peak_memory(),
        stop_token=last.stop_token if last else None,
        stop_string=last.stop_string if last else None,
    )
