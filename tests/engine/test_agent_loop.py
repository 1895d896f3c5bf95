"""An agent's loop, recorded: each turn computes what is new in it, and answers as without a cache.

Twelve turns with tools, two conversations in turns, reasoning that the history leaves out, an edit of an old message,
and a restart. ``ZINCMETAL_AGENT_TOKENS`` makes the answers longer.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

import zincmetal
from support.paths import DATA
from support.replay import Sink
from zincmetal import gguf
from zincmetal.engine.engine import Engine
from zincmetal.engine.loaded import Loaded
from zincmetal.engine.prefix_cache import Mark
from zincmetal.engine.request import Request
from zincmetal.engine.running import Running
from zincmetal.engine.sequence import common
from zincmetal.text.chat.turns import turn_starts

TURNS = 12
TOKENS = int(os.environ.get("ZINCMETAL_AGENT_TOKENS", "6"))
MOST_EXTRA = 64  # tokens of a turn that are computed although they were before
RESTART, EDIT = 9, 7  # before these turns


@dataclass
class Reply:
    """Tokens of an answer, and how many tokens of the prompt came from the cache, and from where."""

    ids: list[int]
    tokens: list[int]
    reused: int
    source: str


class Talker(Protocol):
    """A loaded model that answers a conversation."""

    def answer(self, talk: Any) -> Reply:
        """Answers, and puts the answer into the conversation."""

    def close(self) -> None: ...


# ---- ids by hand, for models without a tokenizer -------------------------------------------------------------------

OPEN, CLOSE, LINE = 500, 501, 502  # <|im_start|>, <|im_end|>, a line break
SYSTEM, USER, MODEL, TOOL = 503, 504, 505, 506
THINK, THOUGHT = 507, 508


@dataclass
class Turn:
    role: int
    text: list[int]
    thoughts: list[int] = field(default_factory=list)


def prompt_of(talk: list[Turn]) -> list[int]:
    """Ids as a template makes them: the thoughts of earlier answers are gone once another user message follows."""
    asked = max((i for i, turn in enumerate(talk) if turn.role == USER), default=0)
    ids = list[int]()
    for i, turn in enumerate(talk):
        ids += [OPEN, turn.role, LINE]
        if turn.role == MODEL and i > asked:
            ids += [THINK, *turn.thoughts, THOUGHT]
        ids += [*turn.text, CLOSE, LINE]
    return [*ids, OPEN, MODEL, LINE, THINK]


class HybridTalker:
    """Fixture with random weights: its answers are the thoughts and words of an agent."""

    def __init__(self, path: Path, cached: bool, folder: Path | None) -> None:
        loaded = Loaded(gguf.open(path), context=2048, device="cpu")
        self.running = Running(Engine(loaded), cached, folder)
        self.leave = self.running.use()

    def answer(self, talk: list[Turn]) -> Reply:
        ids = prompt_of(talk)
        starts = [at for at in turn_starts(ids, {OPEN}, None) if at]
        marks = {**dict.fromkeys(starts[-4:], Mark.TURN), starts[0]: Mark.SYSTEM}
        sink = Sink()
        self.running.loop.submit(Request(ids, 2 * TOKENS, sink, marks=marks))
        while sink.stats is None and sink.error is None:
            self.running.loop.call(lambda: None)
        assert sink.stats is not None, sink.error
        words = [token % 500 for token in sink.tokens]
        talk.append(Turn(MODEL, words[TOKENS:], words[:TOKENS]))
        return Reply(ids, sink.tokens, sink.stats.reused, sink.stats.source)

    def close(self) -> None:
        self.leave()


def hybrid_script(seed: int) -> Iterator[Callable[[list[Turn]], None]]:
    """Yields what happens before each turn."""
    rng = random.Random(seed)

    def words(n: int) -> list[int]:
        return [rng.randrange(500) for _ in range(n)]

    yield lambda talk: talk.extend([Turn(SYSTEM, words(150)), Turn(USER, words(20))])
    for turn in range(1, TURNS):
        if turn == EDIT:

            def edit(talk: list[Turn]) -> None:
                at = [i for i, t in enumerate(talk) if t.role == USER][1]
                talk[at:] = [Turn(USER, words(25))]

            yield edit
        elif turn % 3:
            yield lambda talk: talk.append(Turn(TOOL, words(30)))
        else:
            yield lambda talk: talk.append(Turn(USER, words(15)))


# ---- a chat template -----------------------------------------------------------------------------------------------


class ChatTalker:
    """SmolLM2, by its template."""

    def __init__(self, path: Path, cached: bool, folder: Path | None) -> None:
        self.model = zincmetal.load(path, device="cpu", context=2048, cache=cached, cache_dir=folder)

    def answer(self, talk: list[dict[str, str]]) -> Reply:
        result = self.model.chat(talk, max_tokens=TOKENS, temperature=0)
        text = self.model.text
        ids = text.chat_ids(talk, None, None, True, False, {})
        talk.append({"role": "assistant", "content": result.text})
        return Reply(ids, result.tokens, result.cache.reused, result.cache.source)

    def close(self) -> None:
        self.model.close()


def chat_script(seed: int) -> Iterator[Callable[[list[dict[str, str]]], None]]:
    """Yields what happens before each turn. Calls of tools and their results are messages."""
    rng = random.Random(seed)
    names = ("tides", "ships", "maps", "bread", "clocks", "winds")

    def say(role: str, words: str) -> dict[str, str]:
        return {"role": role, "content": words + " " + " ".join(rng.choices(names, k=6))}

    yield lambda talk: talk.extend([say("system", f"Agent {seed}. Tools: look(place), read(page)."), say("user", "Go")])
    for turn in range(1, TURNS):
        if turn == EDIT:

            def edit(talk: list[dict[str, str]]) -> None:
                at = [i for i, m in enumerate(talk) if m["role"] == "user"][1]
                talk[at:] = [say("user", "No, first tell me of")]

            yield edit
        else:
            role = "look() gave:" if turn % 3 else "Then go on with"
            yield lambda talk, role=role: talk.append(say("user", role))  # type: ignore[misc]


# ---- the loop ------------------------------------------------------------------------------------------------------


def run_loop(
    load: Callable[[bool, Path | None], Talker], script: Callable[[int], Iterator[Callable[[Any], None]]], folder: Path
) -> None:
    """Runs two conversations in turns, with a cache and without."""
    plain, cached = load(False, None), load(True, folder)
    try:
        seen: list[list[int]] = []
        talks: list[tuple[list[Any], list[Any]]] = [([], []), ([], [])]
        scripts = [(script(seed), script(seed)) for seed in range(2)]
        for turn in range(TURNS):
            if turn == RESTART:
                cached.close()
                cached = load(True, folder)
            for which, (talk, plain_talk) in enumerate(talks):
                next(scripts[which][0])(talk)
                next(scripts[which][1])(plain_talk)
                wanted, reply = plain.answer(plain_talk), cached.answer(talk)
                assert reply.ids == wanted.ids
                assert reply.tokens == wanted.tokens, (turn, which)
                known = max((common(ids, reply.ids) for ids in seen), default=0)
                computed, new = len(reply.ids) - reply.reused, len(reply.ids) - known
                assert computed <= new + MOST_EXTRA, (turn, which, computed, new)
                if turn == RESTART:
                    assert reply.source == "disk"
                seen.append([*reply.ids, *reply.tokens])
    finally:
        plain.close()
        cached.close()


@pytest.mark.parametrize("name", ["qwen35-q4_k_m", "qwen35moe-q4k-q5k-q8"])
def test_a_hybrid_computes_only_what_is_new(tmp_path: Path, name: str):
    run_loop(
        lambda cached, folder: HybridTalker(DATA / f"{name}.gguf", cached, folder),
        hybrid_script,
        tmp_path,
    )


def test_a_chat_computes_only_what_is_new(tmp_path: Path, smollm2: Path):
    run_loop(lambda cached, folder: ChatTalker(smollm2, cached, folder), chat_script, tmp_path)
