"""Figures of a turn in the forms that clients read: usage, timings, the fingerprint of a model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..api.result import CacheUse, Result
from .backend import ModelCard
from .turn import Turn
from .wire import Json


@lru_cache(64)
def _fingerprint(*facts: Any) -> str:
    try:
        build = version("zincmetal")
    except PackageNotFoundError:
        build = "0"
    return f"zm-{build}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"


def fingerprint(card: ModelCard) -> str:
    """Return a text that changes with the program and with the model's file."""
    return _fingerprint(card.id, card.arch, card.quantization, card.n_ctx, card.n_params, card.nbytes)


def usage(*turns: Turn) -> Json:
    """Return the tokens of a reply, as OpenAI's ``usage``. ``cache`` is ours: what the prefix cache gave, and why."""
    prompt = sum(len(turn.ready.asked.ids) for turn in turns)
    made = sum(len(ended.result.tokens) for turn in turns for ended in turn.ended)
    cached = sum(turn.matched.cached if turn.matched else 0 for turn in turns)
    reasoning = sum(ended.reasoning for turn in turns for ended in turn.ended)
    use = next((e.result.cache for turn in turns for e in turn.ended if e.choice == 0), CacheUse())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
        "cache": {"reused": cached, "source": use.source, "why": reason_of(use.why)},
    }


def reason_of(miss: str) -> str:
    """Return why a prompt took no more from the cache, without what the cache has: that is of another client, maybe."""
    differs, theirs, rest = miss.partition(": the cache has ")
    return f"{differs}: the prompt has {rest.rpartition(' and the prompt ')[2]}" if theirs else miss


def timings(result: Result) -> Json:
    """Return llama-server's ``timings`` of an answer. The time of the first token is the prompt's."""
    computed, later = result.prompt_tokens - result.cache.reused, max(0, len(result.tokens) - 1)
    return {
        "cache_n": result.cache.reused,
        **_timings("prompt", computed, result.prefill_seconds),
        **_timings("predicted", len(result.tokens), result.decode_seconds, later),
        "queue_ms": _ms(result.queue_seconds),
        **({"draft_n": result.drafted, "draft_n_accepted": result.accepted} if result.drafted else {}),
    }


def timings_so_far(turn: Turn, made: int) -> Json:
    """Return ``timings`` in the middle of an answer."""
    prompt, cached = (turn.matched.prompt, turn.matched.cached) if turn.matched else (0, 0)
    now = time.monotonic()
    first = now if turn.first_at is None else turn.first_at
    return {
        "cache_n": cached,
        **_timings("prompt", prompt - cached, first - turn.began_at),
        **_timings("predicted", made, now - first, max(0, made - 1)),
    }


def _timings(name: str, n: int, seconds: float, counted: int | None = None) -> Json:
    """Return the figures of ``n`` tokens, of which ``counted`` took these seconds."""
    counted = n if counted is None else counted
    return {
        f"{name}_n": n,
        f"{name}_ms": _ms(seconds),
        f"{name}_per_token_ms": _ms(seconds / counted) if counted else 0.0,
        f"{name}_per_second": round(counted / seconds, 3) if seconds > 0 else 0.0,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def server_timing(results: Sequence[Result]) -> str:
    """Return the value of a Server-Timing header: the longest of each span, in milliseconds."""
    spans = {
        "queue": max((r.queue_seconds for r in results), default=0.0),
        "prefill": max((r.prefill_seconds for r in results), default=0.0),
        "decode": max((r.decode_seconds for r in results), default=0.0),
    }
    return ", ".join(f"{name};dur={_ms(seconds):g}" for name, seconds in spans.items())
