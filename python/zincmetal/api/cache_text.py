"""Explains in words what a prompt took from the prefix cache, and why no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..engine.prefix_cache import Miss
from ..errors import quote
from .result import CacheUse

AROUND = 8  # tokens of either text that are shown from the first that differs on


def cache_use(reused: int, source: str, miss: Miss | None, text_of: Callable[[Sequence[int]], str]) -> CacheUse:
    """Make the report of a result. ``text_of`` makes text of ids."""
    return CacheUse(reused, source if reused else "", _why(reused, miss, text_of))


def _why(reused: int, miss: Miss | None, text_of: Callable[[Sequence[int]], str]) -> str:
    if miss is None:
        return ""
    if miss.kind == "off":
        return "there is no prefix cache"
    if miss.kind == "empty":
        return "nothing is cached yet"
    if miss.kind == "damaged":
        return "what was cached was damaged: its logits were not finite, and all was computed anew"
    if miss.kind == "evicted":
        return f"what followed token {miss.at:,} was evicted"
    if miss.kind == "checkpoint":
        return f"no checkpoint before token {miss.at:,}" + (f" but the one at {reused:,}" if reused else "")
    cached, asked = (quote(text_of(ids[:AROUND]), 40) for ids in (miss.cached, miss.asked))
    return f"token {miss.at:,} differs: the cache has {cached} and the prompt {asked}"
