"""Sampled tokens with drafts have the model's distribution: a chi-square test, of each drafter.

Each token is placed in the cumulative distribution of its position, which begins with the drafted token, and at random
within its own share. If tokens are drawn as the model says, the places are uniform. A rule that takes drafted tokens
too often puts too many of them at the beginning.

``ZINCMETAL_DRAWN=100000`` draws so many tokens with each drafter (``make test-draws``).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from support.block_files import NAMES, draft_model_of, with_good_drafts
from support.mixtures import Member, engine
from support.paths import DATA
from zincmetal.engine.block_drafts import BlockDrafter
from zincmetal.engine.draft_model import DraftModel
from zincmetal.engine.drafters import Draft, Drafter, Lookup
from zincmetal.engine.engine import Engine
from zincmetal.engine.governor import Always
from zincmetal.engine.request import Job, Request
from zincmetal.engine.scheduler import Scheduler
from zincmetal.engine.session import Session
from zincmetal.engine.speculate import Speculation
from zincmetal.sampling.params import SamplingParams

DRAWN = int(os.environ.get("ZINCMETAL_DRAWN", "4000"))
BINS = 50
Bias = dict[int, float]
#: Tokens that are far more likely than others, so that drafts have a chance.
BIAS = dict.fromkeys([20, 40, 60, 80, 100, 120], 30.0)
TOP_K = 4
TOKENS = 160  # of an answer
TOGETHER = 8
LIMIT = BINS - 1 + 5 * (2 * (BINS - 1)) ** 0.5  # five standard deviations above the mean of chi-square


class Likely(Drafter):
    """Drafter that proposes tokens of the whole text so far, which says little: most are rejected."""

    def __init__(self) -> None:
        self._rng = random.Random(5)

    def propose(self, ids: Sequence[int], n: int) -> Draft:
        return Draft([self._rng.choice(ids) for _ in range(n)])


class Recorded(Drafter):
    """Drafter that remembers the last token that another one proposed for each position."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.costly = drafter.costly
        self.drafted: dict[int, int] = {}

    def propose(self, ids: Sequence[int], n: int) -> Draft:
        draft = self._drafter.propose(ids, n)
        self.drafted.update(enumerate(draft.tokens, len(ids)))
        return draft

    def close(self) -> None:
        self._drafter.close()


class RecordedBlock(BlockDrafter):
    """The model's own block, of which the same is remembered."""

    def __init__(self) -> None:
        self.drafted: dict[int, int] = {}


class Drawn(Member):
    """Sequence that draws with drafts."""

    drafter: Recorded | RecordedBlock

    def ask(self) -> Request:
        self.request = Request(list(self.ids), TOKENS, self, self.params, drafter=self.drafter)
        return self.request


def note_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets drafts of blocks be remembered."""
    draft = Speculation.draft_by_block

    def noted(self: Speculation, wanted: Mapping[Job, int]) -> None:
        draft(self, wanted)
        for job in wanted:
            assert isinstance(job.drafter, RecordedBlock)
            job.drafter.drafted.update(enumerate(job.draft.tokens, len(job.sequence.ids)))

    monkeypatch.setattr(Speculation, "draft_by_block", noted)


def drawn(opened: Engine, make: Callable[[], Recorded | RecordedBlock], bias: Bias, first_seed: int) -> list[Drawn]:
    """Draws some answers together."""
    scheduler = Scheduler(opened, pages=opened.pages, slots=opened.slots, seats=opened.free_seats, governor=Always())
    members = []
    for i in range(TOGETHER):
        params = SamplingParams(temperature=1.0, top_k=TOP_K, seed=first_seed + i, logit_bias=bias)
        member = Drawn([20, 40, 60 + 20 * (i % 3)], params, [])
        member.drafter = make()
        members.append(member)
        scheduler.submit(member.ask())
    while scheduler.step():
        pass
    assert all(len(member.tokens) == TOKENS for member in members)
    return members


def places(
    logits: NDArray[np.float32], member: Drawn, bias: Bias, rng: np.random.Generator, taken: float
) -> list[float]:
    """Returns the place of each token. ``taken``: the share of drafted tokens that a wrong rule would take unseen."""
    found, n = [], len(member.ids)
    for i, drawn_token in enumerate(member.tokens):
        row = logits[n - 1 + i].astype(np.float64)
        row[list(bias)] += list(bias.values())
        kept = np.lexsort((np.arange(row.size), -row))[:TOP_K]
        p = np.exp(row[kept] - row[kept].max())
        p /= p.sum()
        token, drafted = drawn_token, member.drafter.drafted.get(n + i)
        if drafted in kept:
            order = [drafted, *(t for t in sorted(kept.tolist()) if t != drafted)]
            token = drafted if rng.random() < taken else token
        else:
            order = sorted(kept.tolist())
        share = dict(zip(kept.tolist(), p.tolist(), strict=True))
        if token not in share:  # a near tie of the last rank
            continue
        below = sum(share[t] for t in order[: order.index(token)])
        found.append(below + rng.random() * share[token])
    return found


def chi_square(values: Sequence[float]) -> float:
    counts = np.histogram(values, BINS, (0.0, 1.0))[0]
    return float(((counts - len(values) / BINS) ** 2).sum() / (len(values) / BINS))


@pytest.mark.parametrize("make", [Lookup, Likely], ids=["lookup", "any"])
@pytest.mark.parametrize("name", ["llama-q4_k_m", "qwen35-q4_k_m"])
def test_tokens_have_the_distribution_of_the_model(name: str, make: Callable[[], Drafter]) -> None:
    with engine(DATA / f"{name}.gguf", "f32", threads=2) as opened:
        check_distribution(opened, lambda: Recorded(make()), BIAS)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_with_drafts_of_the_block_do_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note_blocks(monkeypatch)
    with engine(with_good_drafts(name, tmp_path), "f32", threads=2) as opened:
        opened.load_block()
        check_distribution(opened, RecordedBlock, {})


@pytest.mark.parametrize("hybrid", [False, True], ids=["llama", "hybrid"])
def test_tokens_with_drafts_of_a_draft_model_do_too(hybrid: bool, tmp_path: Path) -> None:
    """The model itself drafts, or for a hybrid another one that knows it. Both propose their most probable tokens."""
    path = draft = DATA / "llama-q4_k_m.gguf"
    if hybrid:
        path = with_good_drafts("qwen35-mtp", tmp_path)
        draft = draft_model_of(path, tmp_path)
    with engine(path, "f32", threads=1) as opened:
        model = DraftModel(draft, opened)
        seats = model.engine.free_seats.free
        check_distribution(opened, lambda: Recorded(model.drafter()), {})
        assert (model.engine.free_seats.free, model.engine.pages.free) == (seats, model.engine.pages.size)
        model.free()


def check_distribution(opened: Engine, make: Callable[[], Recorded | RecordedBlock], bias: Bias) -> None:
    """Fails unless the places of many tokens are uniform, and those that a wrong rule would have are not."""
    rng, wrong_rng = np.random.default_rng(1), np.random.default_rng(2)
    found: list[float] = []
    wrong: list[float] = []
    accepted = rejected = seed = 0
    while len(found) < DRAWN:
        members = drawn(opened, make, bias, 1000 * seed)
        seed += 1
        for member in members:
            with Session(opened) as session:
                logits = session.logits([*member.ids, *member.tokens[:-1]])
            found += places(logits, member, bias, rng, 0.0)
            wrong += places(logits, member, bias, wrong_rng, 0.25)
            counts = member.stats.drafts if member.stats else []
            accepted += sum(right for _, right in counts)
            rejected += sum(tried - right for tried, right in counts)
    print(f"{len(found)} tokens, {accepted} accepted, {rejected} rejected, chi-square {chi_square(found):.1f}")
    assert accepted > DRAWN / 100
    assert rejected > DRAWN / 100
    assert len(found) > 0.999 * seed * TOGETHER * TOKENS
    assert chi_square(found) < LIMIT
    assert chi_square(wrong) > LIMIT, "the test would not see a wrong rule"
