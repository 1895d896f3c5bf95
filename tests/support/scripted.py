"""Server's models without an engine: a script says what each answer is, piece by piece.

The tokenizer and the chat template are real: they are those of a small file that is made here. So prompts and tokens
are what a model would see.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from support.text_model import TURNS, save
from zincmetal import gguf
from zincmetal.api.generation import Asked
from zincmetal.api.result import CacheUse, Chunk, Logprob, Result
from zincmetal.api.text import ModelText
from zincmetal.errors import ContextFullError, ModelNotFoundError
from zincmetal.serve.backend import ModelCard, Reading, Vectors
from zincmetal.text.chat.template import CHATML


@dataclass
class Reply:
    """Answer of a script. ``text`` is what the model writes before its end token.

    ``reused``: tokens of the prompt from the cache. ``error`` is raised after ``error_after`` tokens. ``delay``:
    seconds before each token. ``reading``: seconds of the prompt. ``reason``: "length" for an answer without an end.
    ``end``: text of the end token, "" for any.
    """

    text: str = ""
    reused: int = 0
    why: str = ""
    error: BaseException | None = None
    error_after: int = 0
    delay: float = 0.0
    reading: float = 0.0
    reason: str = "stop"
    end: str = ""


#: Gets the prompt's text and the arguments; returns the reply.
Script = Callable[[str, Asked], Reply | str]


class ScriptedAnswer:
    """Generation that follows a reply. It obeys ``max_tokens``, ``stop`` and ``cancel`` as a model's does."""

    def __init__(self, backend: ScriptedBackend, asked: Asked, reply: Reply) -> None:
        self._backend, self.asked, self._reply = backend, asked, reply
        self.cancelled = asyncio.Event()
        self._chunks: list[Chunk] = []
        self._reason = ""

    async def events(self) -> AsyncGenerator[Reading | Chunk, None]:
        backend, asked, reply = self._backend, self.asked, self._reply
        total = len(asked.ids) - reply.reused
        backend.running.append(self)
        try:
            yield Reading(0, total)
            await self._sleep(reply.reading)
            yield Reading(total, total)
            async for chunk in self._tokens():
                self._chunks.append(chunk)
                yield chunk
        finally:
            backend.running.remove(self)
            backend.ended.append(self)

    async def _sleep(self, seconds: float) -> None:
        if seconds:
            try:
                await asyncio.wait_for(self.cancelled.wait(), seconds)
            except TimeoutError:
                pass
            except asyncio.TimeoutError:
                pass

    async def _tokens(self) -> AsyncIterator[Chunk]:
        asked, reply, tokenizer = self.asked, self._reply, self._backend.text.tokenizer
        room = self._backend.card.n_ctx - len(asked.ids) + 1
        most = room if asked.max_tokens < 0 else min(asked.max_tokens, room)
        if not most:
            self._reason = "length"
            return
        ids = tokenizer.encode(reply.text, False, True, add_eos=False)
        if reply.reason == "stop":
            ends = tokenizer.encode(reply.end, False, True, add_eos=False) if reply.end else [min(tokenizer.eog_ids)]
            ids = [*ids, *ends]
        from zincmetal.text.stream import TextStream

        stream = TextStream(tokenizer, asked.stop, asked.hide_special)
        for n, token in enumerate(ids, 1):
            if self.cancelled.is_set():
                self._reason = "cancelled"
                return
            if reply.error is not None and n > reply.error_after:
                raise reply.error
            await self._sleep(reply.delay)
            ended = token in tokenizer.eog_ids and n == len(ids) and reply.reason == "stop"
            piece = "" if ended else stream.push(token)
            reason = (
                "stop" if ended or stream.stop_string is not None else "length" if n >= most or n == len(ids) else None
            )
            if reason and stream.stop_string is None:
                piece += stream.finish()
                reason = "stop" if stream.stop_string is not None else reason
            logprob = None if asked.n_logprobs is None else Logprob(token, -0.5, ((token, -0.5),) * asked.n_logprobs)
            yield Chunk(
                piece, token, reason, len(asked.ids), 100.0, 50.0, token if ended else None, stream.stop_string, logprob
            )
            if reason:
                self._reason = reason
                return
        if reply.error is not None:
            raise reply.error

    @property
    def tokens(self) -> list[int]:
        """Tokens so far, the end token among them."""
        return [chunk.token for chunk in self._chunks]

    async def result(self) -> Result:
        last = self._chunks[-1] if self._chunks else None
        return Result(
            text="".join(c.text for c in self._chunks),
            tokens=[c.token for c in self._chunks],
            finish_reason=self._reason or "cancelled",
            prompt_tokens=len(self.asked.ids),
            prompt_tps=100.0,
            generation_tps=50.0,
            peak_memory=0,
            stop_token=last.stop_token if last else None,
            stop_string=last.stop_string if last else None,
            cache=CacheUse(self._reply.reused, "memory" if self._reply.reused else "", self._reply.why),
            queue_seconds=0.0,
            prefill_seconds=0.01,
            decode_seconds=0.02,
            logprobs=tuple(c.logprob for c in self._chunks if c.logprob) if self.asked.n_logprobs is not None else None,
        )

    def cancel(self) -> None:
        self.cancelled.set()


class ScriptedBackend:
    """Backend whose answers a script makes. ``asked`` has the arguments of all requests, ``prompts`` their texts."""

    def __init__(self, file: gguf.File, script: Script, card: ModelCard) -> None:
        self.text, self.card, self.script = ModelText(file), card, script
        self.asked: list[Asked] = []
        self.prompts: list[str] = []
        self.running: list[ScriptedAnswer] = []
        self.ended: list[ScriptedAnswer] = []
        self.refusal: BaseException | None = None  #: raised by ``start``
        self.cache_cleared = 0
        self.scored: list[list[int]] = []

    async def start(self, asked: Asked) -> ScriptedAnswer:
        if self.refusal is not None:
            raise self.refusal
        if len(asked.ids) > self.card.n_ctx:
            raise ContextFullError(f"the prompt has {len(asked.ids)} tokens and the context {self.card.n_ctx}")
        prompt = self.text.tokenizer.decode(asked.ids)
        self.asked.append(asked)
        self.prompts.append(prompt)
        reply = self.script(prompt, asked)
        return ScriptedAnswer(self, asked, Reply(reply) if isinstance(reply, str) else reply)

    async def score(self, ids: Sequence[int], n_top: int) -> list[Logprob]:
        """Every token has log-probability -1, and the tokens after it in the vocabulary less and less."""
        self.scored.append(list(ids))
        return [Logprob(t, -1.0, tuple((t + i, -1.0 - i) for i in range(n_top))) for t in ids[1:]]

    async def embed(self, texts: Sequence[str | Sequence[int]], normalize: bool, dimensions: int | None) -> Vectors:
        """The vector of a text is its number of tokens, its place, and 0.5; half of it if it is not normalised."""
        encode = self.text.tokenizer.encode
        lengths = [len(encode(text) if isinstance(text, str) else text) for text in texts]
        rows = np.array([[n, i, 0.5] for i, n in enumerate(lengths)], "<f4") * (1 if normalize else 0.5)
        rows = rows[:, :dimensions]
        return Vectors(rows.tobytes(), rows.shape[1], sum(lengths))

    async def rerank(self, query: str, documents: Sequence[str], instruction: str | None) -> Vectors:
        """The score of a document counts the query in it."""
        scores = np.array([text.count(query) for text in documents], "<f4")
        return Vectors(scores.tobytes(), 1, sum(map(len, documents)))

    async def figures(self) -> dict[str, Any]:
        running = [
            {"id": i, "prompt": len(a.asked.ids), "reused": 0, "position": 0, "made": 0}
            for i, a in enumerate(self.running)
        ]
        pool = {"all": 8, "free": 8, "most": 8}
        return {"running": running, "waiting": 0, "steps": 0, "pages": pool, "slots": pool}

    async def clear_cache(self) -> None:
        self.cache_cleared += 1


@dataclass
class ScriptedModels:
    """Models of a server, all scripted and loaded. ``leases`` counts those that are held."""

    backends: Sequence[ScriptedBackend]
    leases: int = 0
    kept: float | None = None  #: how long the last lease asked for
    closed: bool = field(default=False)

    def cards(self) -> list[ModelCard]:
        return [backend.card for backend in self.backends]

    def resolve(self, name: str) -> str:
        for card in self.cards():
            if name in ("", card.id, *card.aliases):
                return card.id
        raise ModelNotFoundError(f"there is no model {name!r}; known: {', '.join(c.id for c in self.cards())}")

    @asynccontextmanager
    async def lease(self, name: str, keep: float | None = None) -> AsyncIterator[ScriptedBackend]:
        known = self.resolve(name)
        self.kept = keep
        self.leases += 1
        try:
            yield next(backend for backend in self.backends if backend.card.id == known)
        finally:
            self.leases -= 1

    async def text_of(self, name: str) -> ModelText:
        known = self.resolve(name)
        return next(backend.text for backend in self.backends if backend.card.id == known)

    async def close(self) -> None:
        self.closed = True


def scripted(
    folder: Path, script: Script, name: str = "scripted", n_ctx: int = 4096, template: str = CHATML, **keys: Any
) -> ScriptedBackend:
    """Makes a backend with the tokens of bytes and of turns. ``special``: texts of more control tokens."""
    special = {**TURNS, **keys.pop("special", {})}
    general = {"tokenizer.ggml.eos_token_id": 258, **keys.pop("general", {})}
    path = save(folder / f"{name}.gguf", special, template, general=general, **keys)
    file = gguf.open(path)
    n_vocab = len(file.metadata["tokenizer.ggml.tokens"])
    card = ModelCard(name, n_ctx=n_ctx, n_ctx_train=n_ctx, n_vocab=n_vocab, arch="llama", sequences=4)
    return ScriptedBackend(file, script, card)
