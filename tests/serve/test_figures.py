"""Figures that clients read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zincmetal.api.cache_text import cache_use
from zincmetal.api.result import CacheUse, Result
from zincmetal.engine.prefix_cache import Miss
from zincmetal.serve.backend import ModelCard
from zincmetal.serve.figures import fingerprint, reason_of, server_timing, timings

RESULT = Result(
    "abc", [1, 2, 3, 4], "stop", 100, 1.0, 1.0, 0, cache=CacheUse(60, "memory"), queue_seconds=0.5, prefill_seconds=2.0,
    decode_seconds=1.5,
)  # fmt: skip


def test_timings_are_llama_servers() -> None:
    assert timings(RESULT) == {
        "cache_n": 60,
        "prompt_n": 40,
        "prompt_ms": 2000.0,
        "prompt_per_token_ms": 50.0,
        "prompt_per_second": 20.0,
        "predicted_n": 4,
        "predicted_ms": 1500.0,
        "predicted_per_token_ms": 500.0,  # the first token came with the prompt
        "predicted_per_second": 2.0,
        "queue_ms": 500.0,
    }


def test_timings_have_the_drafts() -> None:
    found = timings(replace(RESULT, drafts=((3, 2), (3, 1))))
    assert (found["draft_n"], found["draft_n_accepted"]) == (6, 3)


@pytest.mark.parametrize("tokens", [[], [1]])
def test_no_figure_is_infinite(tokens: list[int]) -> None:
    found = timings(replace(RESULT, tokens=tokens, prefill_seconds=0.0, decode_seconds=0.0))
    assert (found["predicted_per_second"], found["prompt_per_second"], found["predicted_per_token_ms"]) == (
        0.0,
        0.0,
        0.0,
    )


def test_server_timing() -> None:
    slow = replace(RESULT, queue_seconds=0.7)
    assert server_timing([RESULT, slow]) == "queue;dur=700, prefill;dur=2000, decode;dur=1500"
    assert server_timing([]) == "queue;dur=0, prefill;dur=0, decode;dur=0"


def test_a_fingerprint_changes_with_the_file() -> None:
    card = ModelCard("m", arch="llama", nbytes=10)
    assert fingerprint(card) == fingerprint(replace(card, state="loading"))
    assert len({fingerprint(card), fingerprint(replace(card, nbytes=11)), fingerprint(replace(card, id="n"))}) == 3


@pytest.mark.parametrize("theirs", ["secret", "secret and the prompt 'x'", "a: the cache has b"])
@pytest.mark.parametrize("mine", ["mine", "mine: the cache has it", "mine and the prompt"])
def test_nobody_reads_what_others_asked(theirs: str, mine: str) -> None:
    texts = {1: theirs, 2: mine}
    miss = Miss("differs", 7, (1,), (2,))
    why = cache_use(7, "memory", miss, lambda ids: texts[ids[0]]).why
    assert theirs in why
    shown = reason_of(why)
    assert shown.startswith("token 7 differs: the prompt has ")
    assert "secret" not in shown
    assert theirs not in shown


@pytest.mark.parametrize("why", ["", "nothing is cached yet", "what followed token 9 was evicted"])
def test_other_reasons_stay(why: str) -> None:
    assert reason_of(why) == why
