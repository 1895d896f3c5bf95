"""Chat request that is measured, and prompts of a wanted length without a tokenizer."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .client import HttpFailure, Json, Target, asked
from .measures import Sample

IDLE_SECONDS = 300.0  # without a byte a request counts as failed: agents give up then, too
WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system"),
    *("program", "question", "work", "night", "point", "home", "water", "room", "mother", "area", "money", "story"),
    *("fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue", "side", "kind"),
    *("head", "house", "service", "friend", "father", "power", "hour", "game", "line", "end", "member", "law", "car"),
)


@dataclass(frozen=True)
class Ask:
    """Chat to be sent. ``leaves``: the client hangs up after so many events with tokens; 0: before the first."""

    messages: Sequence[Json]
    max_tokens: int
    leaves: int | None = None
    extra: Json | None = None


async def chat(target: Target, ask: Ask, seen: Callable[[Sample], None] | None = None) -> Sample:
    """Send a chat and measure its stream. What goes wrong is in the sample. ``seen`` is called at each token."""
    sample = Sample(sent=time.perf_counter())
    try:
        await _stream(target, ask, sample, seen)
    except HttpFailure as error:
        sample.error = str(error)
    except (TimeoutError, asyncio.TimeoutError):
        sample.error = f"no byte came for {IDLE_SECONDS:g} s"
    except (OSError, EOFError, ValueError) as error:
        sample.error = f"the stream ended: {type(error).__name__}"
    sample.ended = time.perf_counter()
    return sample


async def _stream(target: Target, ask: Ask, sample: Sample, seen: Callable[[Sample], None] | None) -> None:
    body: Json = {
        "model": target.model,
        "messages": list(ask.messages),
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "ignore_eos": True,  # llama.cpp's field: answers then have the same length, whatever a model would say
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.extra,
        **(ask.extra or {}),
    }
    async with asked(target, "POST", "/v1/chat/completions", body) as reply:
        if reply.status != 200:
            raise HttpFailure(reply.status, _reason(reply.status, await reply.body()))
        if ask.leaves == 0:
            sample.left = True
            return
        events, whole = reply.events(), False
        while True:
            try:
                data, now = await asyncio.wait_for(anext(events), IDLE_SECONDS)
            except StopAsyncIteration:
                break
            if data == b"[DONE]":
                whole = True
                break
            _take(json.loads(data), now, sample)
            if sample.stamps and sample.stamps[-1] == now and seen is not None:
                seen(sample)
            if ask.leaves is not None and len(sample.stamps) >= ask.leaves:
                sample.left = True
                return
        if not whole:
            raise HttpFailure(0, "the stream ended without [DONE]")


def _take(event: Any, now: float, sample: Sample) -> None:
    """Note what one event says."""
    if not isinstance(event, dict):
        raise ValueError("an event is an object")
    if error := event.get("error"):
        message = error.get("message", "") if isinstance(error, dict) else str(error)
        raise HttpFailure(0, f"error in the stream: {message[:200]}")
    usage = event.get("usage")
    if usage:
        sample.prompt, sample.made = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        sample.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        text = delta.get("content") or ""
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        if text or thought or delta.get("tool_calls"):
            sample.stamps.append(now)
            if text and not sample.first_text:
                sample.first_text = now
            sample.text += text
        sample.reason = choice.get("finish_reason") or sample.reason


def _reason(status: int, body: bytes) -> str:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = body[:200].decode("utf-8", "replace")
    return f"status {status}: {message[:200]}"


# ---- prompts -------------------------------------------------------------------------------------------------------


class Prompts:
    """Prompts of words in a fixed order. No two begin alike, so that none is in a cache. ``per_word``: tokens."""

    def __init__(self, seed: int | str, per_word: float = 1.0) -> None:
        self._chance = random.Random(seed)
        self.per_word = per_word

    def text(self, tokens: int) -> str:
        """Return a text of about so many tokens."""
        words = self._chance.choices(WORDS, k=max(1, round(tokens / self.per_word)))
        return " ".join(words)

    def messages(self, tokens: int) -> list[Json]:
        """Return a chat of about so many tokens, which asks for a long answer."""
        return [{"role": "user", "content": f"{self.text(tokens)}\n\nTell a long story with these words."}]


async def calibrated(target: Target, seed: int) -> Prompts:
    """Return prompts whose length is right for a server's tokenizer. Raises HttpFailure."""
    prompts, words = Prompts(seed), 400
    short, long = [await chat(target, Ask(prompts.messages(n), 1)) for n in (1, words)]
    for sample in (short, long):
        if sample.error:
            raise HttpFailure(0, f"{target.url}: {sample.error}")
    if long.prompt > short.prompt:
        prompts.per_word = (long.prompt - short.prompt) / (words - 1)
    return prompts


__all__ = ["Ask", "Prompts", "calibrated", "chat"]
