"""Turn: a request on its way through a model, as events that all APIs write in their own form."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..api.generation import Asked
from ..api.result import Chunk, Logprob, Result
from ..errors import DeadlineError
from ..text.tools.events import CallEnd, Event, Reasoning, Text
from .ask import Ask
from .backend import Answering, Backend, Reading
from .echo import Told
from .errors import HttpError
from .prepare import Prepared, prepared

if TYPE_CHECKING:
    from .serving import Serving

T = TypeVar("T")


class Matched(NamedTuple):
    """Tokens of the prompt, and how many of them are not computed again. The first event, and once."""

    prompt: int
    cached: int


class Progress(NamedTuple):
    """Tokens of the prompt that are known, reused ones among them, after so many seconds."""

    done: int
    total: int
    cached: int
    seconds: float


class Delta(NamedTuple):
    """More of an answer. ``logprobs`` are those of the tokens that it came from, ``made`` counts all so far."""

    choice: int
    event: Event
    logprobs: tuple[Logprob, ...] = ()
    made: int = 0


class Ended(NamedTuple):
    """End of an answer: "stop", "length", "tool_calls" or "cancelled". ``reasoning`` counts its tokens.

    ``calls`` counts tool calls: "ok", "repaired", or "text" for what began as one and was none.
    """

    choice: int
    reason: str
    result: Result
    reasoning: int = 0
    calls: Mapping[str, int] = MappingProxyType({})


TurnEvent = Matched | Progress | Delta | Ended


class Turn:
    """Request that runs. Leaving ``events`` early, or cancelling its task, ends the generation within one step.

    ``patience``: seconds until the first token; then DeadlineError ends the turn. ``ended`` has the answers that are
    complete, ``error`` what ended the turn, and ``first_at`` when its first token came (``time.monotonic``). ``id`` is
    that of its request.
    """

    def __init__(
        self, ask: Ask, backend: Backend, ready: Prepared, patience: float | None = None, id: str = ""
    ) -> None:
        self.ask, self.backend, self.ready, self.id = ask, backend, ready, id
        self.began_at = time.monotonic()
        self.first_at: float | None = None
        self.matched: Matched | None = None
        self.ended: list[Ended] = []
        self.error: BaseException | None = None
        self.cancelled = False
        self.on_token: Callable[[], None] | None = None
        self._patience, self._expired = patience, False
        self._watch: asyncio.TimerHandle | None = None
        self._running: list[Answering] = []
        self._read = asyncio.Event()  # the prompt, by the first answer: now the others can share its pages

    @classmethod
    async def begin(cls, ask: Ask, backend: Backend, patience: float | None = None) -> Turn:
        """Prepare a turn and start it. What is wrong with the request is raised here, before anything is sent."""
        turn = cls(ask, backend, await prepared(ask, backend), patience)
        await turn.start()
        return turn

    async def start(self) -> None:
        """Begin the generation. A turn that was not started starts with its ``events``."""
        self._running.append(await self.backend.start(self._asked(0)))

    def _asked(self, choice: int) -> Asked:
        """Return the arguments of an answer. Each has a seed of its own: equal seeds would give equal answers."""
        asked = self.ready.asked
        if not choice or asked.params.seed is None:
            return asked
        return replace(asked, params=replace(asked.params, seed=asked.params.seed + choice))

    def cancel(self) -> None:
        """End the generation within one step; ``events`` then end."""
        self.cancelled = True
        self._read.set()
        for answering in self._running:
            answering.cancel()

    async def events(self) -> AsyncGenerator[TurnEvent, None]:
        """Yield what happens. Raises the typed error that ended the generation."""
        if not self._running:
            await self.start()
        choices = [self._choice(0, self._running[0]), *(self._later_choice(i) for i in range(1, self.ask.n))]
        if self._patience is not None:
            self._watch = asyncio.get_running_loop().call_later(self._patience, self._expire)
        try:
            async with aclosing(merged(choices)) as events:
                async for _, event in events:
                    yield event
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._stop_watch()
            self.cancel()

    def _expire(self) -> None:
        self._expired = True
        self.cancel()

    def _stop_watch(self) -> None:
        if self._watch:
            self._watch.cancel()
            self._watch = None

    async def _later_choice(self, index: int) -> AsyncGenerator[TurnEvent, None]:
        """Yield the events of one more answer. It starts when the first has read the prompt, and shares its pages."""
        await self._read.wait()
        if self.cancelled:
            return
        answering = await self.backend.start(self._asked(index))
        self._running.append(answering)
        async with aclosing(self._choice(index, answering)) as events:
            async for event in events:
                yield event

    async def _choice(self, index: int, answering: Answering) -> AsyncGenerator[TurnEvent, None]:
        reader, n_prompt = _Reader(self, index), len(self.ready.asked.ids)
        try:
            async with aclosing(answering.events()) as events:
                async for event in events:
                    if isinstance(event, Chunk):
                        self._note_token()
                        for delta in reader.deltas(event):
                            yield delta
                        continue
                    if event.done >= event.total:
                        self._read.set()
                    if index == 0:
                        for told in self._prompt_events(event, n_prompt):
                            yield told
        finally:
            self._read.set()
        result = await answering.result()
        if self._expired:
            raise DeadlineError(
                f"no token came within {self._patience:g} seconds; ask again when there are fewer requests"
            )
        ended = reader.ended(result)
        if result.stop_token is not None and not self.ask.continue_final:
            self.ready.prompt.remember(self.backend.text, reader.told.ids, reader.told.message())
        self.ended.append(ended)
        yield ended

    def _note_token(self) -> None:
        if self.on_token is not None:
            self.on_token()
        if self.first_at is None:
            self.first_at = time.monotonic()
            self._stop_watch()
            self._read.set()

    def _prompt_events(self, reading: Reading, n_prompt: int) -> list[TurnEvent]:
        cached = n_prompt - reading.total
        progress = Progress(cached + reading.done, n_prompt, cached, time.monotonic() - self.began_at)
        if self.matched:
            return [progress]
        self.matched = Matched(n_prompt, cached)
        return [self.matched, progress]


class _Reader:
    """Makes deltas of the chunks of one answer."""

    def __init__(self, turn: Turn, choice: int) -> None:
        self._choice = choice
        self._parser = turn.ready.parser()
        self._plain = turn.ask.prompt is not None
        self._hidden = turn.backend.text.id_tokenizer.control_ids
        self._made = self._reasoning = self._undecided = 0
        self._calls: Counter[str] = Counter()
        self.told = Told()
        self._reason = ""
        self._pieces: list[tuple[str, Logprob]] = []  # tokens whose log-probabilities no delta has

    def deltas(self, chunk: Chunk) -> list[Delta]:
        """Take a token; return what is certain now."""
        self._made += 1
        if chunk.logprob:
            self._pieces.append((chunk.text, chunk.logprob))
        events = list(self._parser.push(chunk.text)) if chunk.text else []
        if chunk.finish_reason:
            self._reason = chunk.finish_reason
            events += self._parser.finish()
            if self._plain and self._pieces and not events:
                events.append(Text(""))  # log-probabilities of an end token
        self.told.add(chunk.token, events)
        self._count_reasoning(events)
        last = len(events) - 1
        return [
            Delta(self._choice, event, self._logprobs(event) if i == last else (), self._made)
            for i, event in enumerate(events)
        ]

    def _count_reasoning(self, events: Sequence[Event]) -> None:
        """Count tokens. One that leads to no event belongs to the next event."""
        self._undecided += 1
        if events:
            if any(type(event) is Reasoning for event in events):
                self._reasoning += self._undecided
            self._undecided = 0
            self._calls.update("repaired" if e.repaired else "ok" for e in events if isinstance(e, CallEnd))

    def _logprobs(self, event: Event) -> tuple[Logprob, ...]:
        """Return those of the tokens that an event's text came from: the last ones, but for markers before it."""
        pieces = self._pieces
        if not pieces:
            return ()
        self._pieces = []
        if self._plain:
            return tuple(logprob for _, logprob in pieces)
        if type(event) is not Text:
            return ()
        at, length = len(pieces), len(event.text)
        while at and length > 0:
            at -= 1
            length -= len(pieces[at][0])
        while at and not pieces[at - 1][0] and pieces[at - 1][1].token not in self._hidden:
            at -= 1  # a fraction of a character
        return tuple(logprob for _, logprob in pieces[at:] if logprob.token not in self._hidden)

    def ended(self, result: Result) -> Ended:
        """Return the end of the answer."""
        reason = self._reason or result.finish_reason
        reason = "tool_calls" if self._calls and reason == "stop" else reason
        if refused := self._parser.refused:
            self._calls["text"] += refused
        return Ended(self._choice, reason, result, self._reasoning, self._calls)


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield the items of several generators as they come, each with the number of its generator."""
    if len(streams) == 1:  # no tasks
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T | None, BaseException | None]] = asyncio.Queue()
    tasks = [asyncio.ensure_future(_feed(i, stream, queue)) for i, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            i, found, error = await queue.get()
            if error is not None:
                raise error
            if found is None:
                left -= 1
            else:
                yield i, found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _feed(number: int, stream: AsyncGenerator[T, None], queue: asyncio.Queue[Any]) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                queue.put_nowait((number, item, None))
        queue.put_nowait((number, None, None))
    except Exception as error:
        queue.put_nowait((number, None, error))


@asynccontextmanager
async def opened(serving: Serving, asks: Sequence[Ask], *names: str, start: bool = True) -> AsyncIterator[list[Turn]]:
    """Lease the model, prepare a turn for each request, and keep them under ``names``, so that they can be cancelled.

    All requests are for one model. ``start``: the first turn is started. At the end everything is
    cancelled and given back.
    """
    if serving.draining:
        raise HttpError("draining", "the server is shutting down")
    async with serving.models.lease(asks[0].model, asks[0].keep_alive) as backend:
        turns: list[Turn] = []
        for name in names:
            serving.turns[name] = turns
        try:
            for ask in (_bounded(ask, serving.limits.answer) for ask in asks):
                ready = await prepared(ask, backend)
                turns.append(Turn(ask, backend, ready, serving.limits.queue, names[0] if names else ""))
                serving.metrics.began(turns[-1])
            if start:
                await turns[0].start()
            yield turns
        finally:
            for name in names:
                if serving.turns.get(name) is turns:
                    del serving.turns[name]
            for turn in turns:
                turn.cancel()
                for observe in serving.observers:
                    observe(turn)


def _bounded(ask: Ask, most: int | None) -> Ask:
    """Return a request for at most so many tokens."""
    if most is None:
        return ask
    return replace(ask, max_tokens=most if ask.max_tokens is None else min(ask.max_tokens, most))


async def run(ask: Ask, backend: Backend) -> list[TurnEvent]:
    """Run a request to its end and return all events: a plain reply is a stream that is collected."""
    turn = await Turn.begin(ask, backend)
    async with aclosing(turn.events()) as events:
        return [event async for event in events]


__all__ = ["Delta", "Ended", "Matched", "Progress", "Turn", "TurnEvent", "merged", "opened", "run"]
