"""POST /v1/completions, of OpenAI's older API: goes on with texts, without a chat template. Harnesses score by it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..api.result import Logprob, Result
from ..errors import abbreviate
from ..text.tools.events import Text
from . import options
from .ask import Ask
from .chat import REASONS
from .errors import BadRequest, Unsupported
from .figures import fingerprint, timings, timings_so_far, usage
from .reply import Reply
from .serving import Limits, Serving
from .tokens import Offsets, legacy_logprobs
from .turn import Delta, Ended, Progress, Turn, TurnEvent, merged, opened
from .wire import Fields, Json, log_once, read_object

DEFAULT_TOKENS = 16
MOST_PROMPTS = 2048
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class CompletionRequest:
    """Request for texts to go on, and how they are to be written."""

    asks: Sequence[Ask]  # one for each prompt
    echo: bool = False
    stream: bool = False
    usage: bool = False  # a last chunk with it
    progress: bool = False
    timings: bool = False  # in every chunk


def completion_request(request: Request, body: Json, limits: Limits) -> CompletionRequest:
    """Read a body. Raises BadRequest that names the field which is wrong."""
    fields = Fields(body)
    options.refuse_unsupported(fields)
    echo, suffix = fields.flag("echo"), fields.text("suffix")
    if echo and suffix:
        raise Unsupported("suffix", "suffix: an echo of the prompt is only supported without it")
    n = fields.integer("n", "n_cmpl", low=1, high=limits.choices) or 1
    if fields.integer("best_of", low=1, high=limits.choices) not in (None, n):
        raise Unsupported("best_of", "best_of: only the same number as n is supported")
    ask = Ask(
        model=fields.text("model"),
        prompt="",
        suffix=suffix,
        format=options.answer_format(fields),
        sampling=options.sampling(fields),
        max_tokens=options.max_tokens(fields, DEFAULT_TOKENS),
        stop=options.stop(fields),
        n=n,
        logprobs=_logprobs(fields),
        affinity=options.affinity(request, fields),
        deadline=options.deadline(fields),
        keep_alive=options.keep_alive(fields),
    )
    streamed = fields.inner("stream_options")
    read = CompletionRequest(
        [replace(ask, prompt=prompt) for prompt in read_prompts(fields)],
        echo,
        fields.flag("stream"),
        streamed is not None and streamed.flag("include_usage"),
        fields.flag("return_progress"),
        fields.flag("timings_per_token"),
    )
    log_once("completions", fields.unknown())
    return read


def _logprobs(fields: Fields) -> int | None:
    value = fields.given("logprobs", "n_probs")
    if isinstance(value, bool):
        return 1 if value else None
    return fields.integer("logprobs", "n_probs", low=0, high=MOST_LOGPROBS)


def read_prompts(fields: Fields) -> list[str | list[int]]:
    """Read the prompts: a text, a list of token ids, or a list of these."""
    value = fields.given("prompt")
    if value is None:
        raise BadRequest("prompt is missing", "prompt", "missing_required_parameter")
    if isinstance(value, list) and value and all(type(item) is not int for item in value):
        if len(value) > MOST_PROMPTS:
            raise BadRequest(f"prompt has more than {MOST_PROMPTS} prompts", "prompt")
        return [_prompt(item, f"prompt[{i}]") for i, item in enumerate(value)]
    return [_prompt(value, "prompt")]


def _prompt(value: Any, path: str) -> str | list[int]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{path} must be a text or token ids, not {abbreviate(value)}", path, "invalid_type")
    for i, token in enumerate(value):
        if type(token) is not int:
            raise BadRequest(f"{path}[{i}] must be a token id, not {abbreviate(token)}", f"{path}[{i}]", "invalid_type")
    return value


async def completions(request: Request) -> Response:
    """Go on with texts."""
    serving: Serving = request.app.state.serving
    asked = completion_request(request, await read_object(request, serving.limits.depth), serving.limits)
    return await _Reply(request, serving, asked).answer(request, asked.stream)


class _Reply(Reply):
    """Reply to one request, whose prompts may be many."""

    def __init__(self, request: Request, serving: Serving, asked: CompletionRequest) -> None:
        super().__init__(request, serving, "cmpl")
        self._asked = asked
        self._base: Json = {}
        self._extra: Json = {"usage": None} if asked.usage else {}

    async def whole(self) -> Json:
        """Return the reply as one object."""
        whole: Json = {}
        choices: dict[int, Json] = {}
        async with aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                whole.update((k, v) for k, v in chunk.items() if k not in ("choices", "prompt_progress"))
                for part in chunk.get("choices", ()):
                    _join(choices.setdefault(part["index"], {**part, "text": "", "logprobs": None}), part)
        return {**whole, "choices": [choices[i] for i in sorted(choices)]}

    async def chunks(self) -> AsyncGenerator[Json, None]:
        """Yield the chunks of the stream, after an empty one."""
        names = (self.request_id, self.id)
        async with opened(self.serving, self._asked.asks, *names, start=not self._asked.echo) as turns:
            yield {}
            card = turns[0].backend.card
            self._base = {
                "id": self.id,
                "object": "text_completion",
                "created": int(time.time()),
                "model": card.id,
                "system_fingerprint": fingerprint(card),
            }
            together = asyncio.Semaphore(max(1, card.sequences))  # a long list must not fill the engine's queue
            writers = [_Writer(self._asked, turn) for turn in turns]
            answers = [writer.events(together) for writer in writers]
            async with aclosing(merged(answers)) as found:
                async for i, event in found:
                    if isinstance(event, Ended):
                        self.ended.append(event)
                    for fields in writers[i].parts(event):
                        for choice in fields.get("choices", ()):
                            choice["index"] += i * turns[i].ask.n
                        yield {**self._base, **fields, **self._extra}
            if self._asked.usage or not self._asked.stream:
                yield {**self._base, "choices": [], "usage": usage(*turns)}


@dataclass(frozen=True)
class Echo:
    """Text of a prompt, and the log-probabilities of its tokens but the first."""

    text: str
    scores: Sequence[Logprob] | None


class _Writer:
    """Writes the events of one prompt's turn as parts of chunks."""

    def __init__(self, asked: CompletionRequest, turn: Turn) -> None:
        self._asked, self._turn = asked, turn
        self._tokenizer = turn.backend.text.id_tokenizer
        self._offsets = [Offsets(self._tokenizer) for _ in range(turn.ask.n)]
        self._echo: Echo | None = None

    async def events(self, together: asyncio.Semaphore) -> AsyncGenerator[TurnEvent, None]:
        """Score the prompt if need be, and yield the turn's events."""
        async with together:
            if self._asked.echo:
                self._echo = await self._scored()
            if self._echo and self._echo.scores is not None and self._turn.ask.max_tokens == 0:
                for ended in self._only_scored():
                    yield ended
                return
            async with aclosing(self._turn.events()) as events:
                async for event in events:
                    yield event

    async def _scored(self) -> Echo:
        ids, ask = self._turn.ready.asked.ids, self._turn.ask
        text = ask.prompt if isinstance(ask.prompt, str) else self._tokenizer.decode(ids)
        if ask.logprobs is None:
            return Echo(text, None)
        return Echo(text, await self._turn.backend.score(ids, ask.logprobs))

    def _only_scored(self) -> list[Ended]:
        """Return the ends of answers without tokens, for which nothing is left to be computed."""
        result = Result("", [], "length", len(self._turn.ready.asked.ids), 0.0, 0.0, 0)
        self._turn.ended += [Ended(i, "length", result) for i in range(self._turn.ask.n)]
        return self._turn.ended

    def parts(self, event: TurnEvent) -> list[Json]:
        """Return the parts of chunks for an event."""
        if isinstance(event, Delta) and isinstance(event.event, Text):
            opening = self._opening(event.choice)
            fields = self._choice(event.choice, event.event.text, event.logprobs)
            if self._asked.timings:
                fields["timings"] = timings_so_far(self._turn, event.made)
            return [*opening, fields]
        if isinstance(event, Ended):
            opening = self._opening(event.choice)
            end = self._choice(event.choice, "", (), REASONS.get(event.reason, event.reason))
            return [*opening, {**end, "timings": timings(event.result)}]
        if isinstance(event, Progress) and self._asked.progress:
            told = {"total": event.total, "cache": event.cached, "processed": event.done}
            return [{"choices": [], "prompt_progress": {**told, "time_ms": round(event.seconds * 1000)}}]
        return []

    def _opening(self, choice: int) -> list[Json]:
        """Return the prompt, once for each answer, if it is wanted."""
        offsets = self._offsets[choice]
        if self._echo is None or offsets.begun:
            return []
        scores = self._echo.scores
        logprobs = None
        if scores is not None:
            first = self._turn.ready.asked.ids[0]
            logprobs = legacy_logprobs(
                [Logprob(first, 0.0), *scores], self._tokenizer, offsets, self._turn.ask.logprobs
            )
            logprobs["token_logprobs"][0] = logprobs["top_logprobs"][0] = None  # nothing stands before it
        offsets.begin(len(self._echo.text))
        return [{"choices": [{"index": choice, "text": self._echo.text, "logprobs": logprobs, "finish_reason": None}]}]

    def _choice(self, index: int, text: str, logprobs: Sequence[Logprob], reason: str | None = None) -> Json:
        told = None
        if self._turn.ask.logprobs is not None and logprobs:
            told = legacy_logprobs(logprobs, self._tokenizer, self._offsets[index], self._turn.ask.logprobs)
        return {"choices": [{"index": index, "text": text, "logprobs": told, "finish_reason": reason}]}


def _join(choice: Json, part: Json) -> None:
    """Add a part of a choice to it."""
    choice["text"] += part["text"]
    choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
    if part["logprobs"]:
        if choice["logprobs"] is None:
            choice["logprobs"] = {name: [] for name in part["logprobs"]}
        for name, values in part["logprobs"].items():
            choice["logprobs"][name] += values


routes = [Route("/v1/completions", completions, methods=["POST"])]
