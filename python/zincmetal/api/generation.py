"""Options of a generation, and the request that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict

from ..device.buffers import Progress
from ..engine.drafters import Drafter
from ..engine.prefix_cache import Mark
from ..engine.request import Mask, Request, Stats
from ..errors import UsageError, did_you_mean, quote
from ..sampling.constrain.budget import Budget
from ..sampling.constrain.grammar import Grammar
from ..sampling.params import LogitsProcessor, SamplingParams
from .cache_text import cache_use
from .drafting import NO_DRAFTS, Drafting, DraftOptions
from .handle import Answer
from .result import Logprob

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

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


class MoreOptions(SamplingOptions, DraftOptions, total=False):
    """Options of sampling and of drafts."""


class GenerateOptions(MoreOptions, total=False):
    """Keywords of :meth:`Model.submit`, for the calls that pass them on."""

    parse_special: bool | None
    hide_special: bool | None
    stop: str | Sequence[str] | None
    progress: Progress | None
    logprobs: int | None
    deadline: float | None
    schema: Any
    regex: str | None
    choices: Sequence[str] | None
    grammar: str | Grammar | None


@dataclass(frozen=True)
class Asked:
    """Arguments of a generation. ``max_tokens`` -1: until the context is full. ``marks``: see ``Request``.

    ``grammar``: what the answer may be, None for anything. ``reasoning``: how many tokens of reasoning it may have.
    """

    ids: list[int]
    max_tokens: int
    params: SamplingParams
    stop: tuple[str, ...] = ()
    hide_special: bool = False
    progress: Progress | None = None
    n_logprobs: int | None = None
    deadline: float | None = None
    marks: Mapping[int, Mark] | None = None
    grammar: Grammar | None = None
    reasoning: Budget | None = None
    drafting: Drafting = NO_DRAFTS


def sampling_params(call: str, options: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> SamplingParams:
    """Check the options of a ``call``. ``defaults`` count if no option chooses the sampling. Raises UsageError."""
    refuse_unknown(call, [name for name in options if name not in SAMPLING], GenerateOptions.__annotations__)
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


def request_of(
    asked: Asked,
    tokenizer: Tokenizer,
    n_ctx: int,
    n_vocab: int,
    mask: Mask | None = None,
    drafter: Drafter | None = None,
) -> tuple[Request, Answer]:
    """Make the request of a call, and the answer that takes its events. ``mask``: what ``asked`` allows."""
    params = _forbidding(asked.params, [t for t in tokenizer.suppressed if t < n_vocab])
    room = n_ctx - len(asked.ids) + 1
    answer = Answer(
        tokenizer,
        asked.stop,
        asked.hide_special,
        n_prompt=len(asked.ids),
        max_tokens=room if asked.max_tokens < 0 else min(asked.max_tokens, room),
        with_progress=asked.progress is not None,
        explain=_explained(tokenizer),
        logprob=None if asked.n_logprobs is None else _logprob(asked.n_logprobs),
    )
    request = Request(
        asked.ids,
        asked.max_tokens,
        answer,
        params,
        eog_ids=tokenizer.eog_ids,
        deadline=asked.deadline,
        marks=asked.marks or {},
        mask=mask,
        n_logprobs=0 if asked.n_logprobs is None else max(1, asked.n_logprobs),
        drafter=drafter,
        draft_tokens=asked.drafting.tokens,
    )
    return request, answer


def listed(prompt: Any) -> tuple[Any, bool]:
    """Return a prompt, or a list of prompts and True. What can be read only once comes back as a list."""
    if isinstance(prompt, (str, bytes, bytearray, Mapping, Set)) or not isinstance(prompt, Iterable):
        return prompt, False
    found = list(prompt)
    several = bool(found) and all(isinstance(p, (str, Sequence)) or getattr(p, "ndim", 0) == 1 for p in found)
    return (found if several or isinstance(prompt, Iterator) else prompt), several


def _explained(tokenizer: Tokenizer) -> Callable[[Stats], Any]:
    def explain(stats: Stats) -> Any:
        return cache_use(stats.reused, stats.source, stats.miss, tokenizer.decode)

    return explain


def _logprob(n_top: int) -> Callable[[Any], Logprob]:
    """Return the function that makes the log-probabilities of a token, with ``n_top`` others, of a choice."""

    def logprob(choice: Any) -> Logprob:
        return Logprob(int(choice.id), float(choice.logprob), tuple(choice.top[:n_top]))

    return logprob


def _forbidding(params: SamplingParams, tokens: Sequence[int]) -> SamplingParams:
    """Options that never draw these tokens. The tokens' own biases lose."""
    if not tokens:
        return params
    return replace(params, logit_bias={**params.logit_bias, **dict.fromkeys(tokens, -math.inf)})
