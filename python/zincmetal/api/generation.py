"""Generating text: what is asked for, the loop over tokens, and what it gives."""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from ..device.buffers import Progress
from ..engine.engine import prompt_rows
from ..engine.turn import Turn
from ..errors import UsageError, quote, typed_errors
from ..sampling.sampler import LogitsProcessor, Sampler, SamplingParams
from ..text.stream import TextStream

if TYPE_CHECKING:
    from .model import Model

SAMPLING = tuple(f.name for f in fields(SamplingParams))
# These do not say how to choose: a chat that is given no others has the sampling that the model's makers advise.
BESIDE = ("seed", "logit_bias", "logits_processors")


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams, as keywords of the calls that generate; None stands for the default."""

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
class Result:
    """What a generation gave.

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


class Chunk(NamedTuple):
    """A piece of a streamed generation: new text (may be empty), its token, and the result so far."""

    text: str
    token: int
    finish_reason: str | None
    prompt_tokens: int
    prompt_tps: float
    generation_tps: float
    stop_token: int | None = None
    stop_string: str | None = None


class PromptRead(NamedTuple):
    """What a stream returns at its end: the tokens of the prompt, and how fast they were read."""

    tokens: int
    tps: float


@dataclass(frozen=True)
class Request:
    """What a generation is asked for; ``max_tokens`` -1 is until the context is full."""

    ids: list[int]
    max_tokens: int
    params: SamplingParams
    stop: tuple[str, ...]
    hide_special: bool
    progress: Progress | None


def sampling_params(call: str, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> SamplingParams:
    """The options of a ``call``; ``defaults`` where none of them says how to choose. Raises UsageError."""
    refuse_unknown(call, options, SAMPLING)
    given = {name: value for name, value in options.items() if value is not None}
    if defaults and not given.keys() - set(BESIDE):
        given = {**defaults, **given}
    return SamplingParams(**given)


def refuse_unknown(call: str, given: Iterable[str], known: Iterable[str], why: str = "is no option of it") -> None:
    """Raises UsageError that names the first keyword that is not known, and one that is like it."""
    known = sorted(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise UsageError(f"{call}: {quote(name)} {why}" + (f"; did you mean {near[0]}?" if near else ""))


def stream(model: Model, turn: Turn, asked: Request) -> Generator[Chunk, None, PromptRead]:
    """A chunk per token; returns what reading the prompt cost."""
    with typed_errors, turn:
        ids, tokenizer = asked.ids, model.id_tokenizer
        params = _forbidding(asked.params, [t for t in tokenizer.suppressed if t < model.config.n_vocab])
        text, sampler = TextStream(tokenizer, asked.stop, asked.hide_special), Sampler(params)
        output = "argmax" if params.greedy else "candidates"
        room = model.config.n_ctx - len(ids) + 1
        last = room if asked.max_tokens < 0 else min(asked.max_tokens, room)
        last_ahead = last - 2 if params.greedy and model._ahead else 0
        best, n_prompt, prompt_tps = _read_prompt(model, asked, output)
        # A step sweeps the caches, so that every object that is touched after it costs: locals, and few calls.
        greedy, eog_ids, push = params.greedy, tokenizer.eog_ids, text.push
        rest, go_on = turn.rest.append, turn.rest.pop
        clock, new_tuple = time.perf_counter, tuple.__new__
        began = clock()
        for n in range(1, last + 1):
            token = best if greedy else model._sample(sampler)
            if token < 0:
                raise model.not_finite()
            ended = token in eog_ids
            piece = "" if ended else push(token)
            reason = "stop" if ended or text.stop_string is not None else "length" if n == last else None
            if reason and text.stop_string is None:
                piece += text.finish()
                reason = "stop" if text.stop_string is not None else reason  # what was held back was one
            tps = (n - 1) / (clock() - began or 1e-9)  # the first token came with the prompt
            stop_token = token if ended else None
            rest(None)
            yield new_tuple(Chunk, (piece, token, reason, n_prompt, prompt_tps, tps, stop_token, text.stop_string))
            try:
                go_on()
            except IndexError:
                raise UsageError(f"this stream was ended by {turn.ended or 'another call'}") from None
            if reason:
                break
            best = model._decode(token, n <= last_ahead, output)
        return PromptRead(n_prompt, prompt_tps)


def _forbidding(params: SamplingParams, tokens: Sequence[int]) -> SamplingParams:
    """The same, but for tokens that are never drawn, whatever their bias."""
    if not tokens:
        return params
    return replace(params, logit_bias={**params.logit_bias, **dict.fromkeys(tokens, -math.inf)})


def _read_prompt(model: Model, asked: Request, output: str) -> tuple[int, int, float]:
    """Run the prompt, but for what the sequence already has: the arg max after it, its tokens, tokens per second."""
    ids = asked.ids
    kept = model._keep_common(ids)
    for rows in {*prompt_rows(len(ids) - kept)}:
        model._recorded(rows, output)
    model._recorded(1, output, len(ids))
    began = time.perf_counter()
    best = model._prefill(ids[kept:], asked.progress, output)
    return best, len(ids), (len(ids) - kept) / (time.perf_counter() - began)


def collect(chunks: Generator[Chunk, None, PromptRead], show: Callable[[Chunk], None] | None = None) -> Result:
    """All of a stream; ``show`` is called with each chunk as it comes."""
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
    """The result that chunks make up."""
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


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes
