"""What may happen while a draft is verified: an end from outside, an error, no room. Nothing is lost, others go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.mixtures import Member, Mixture, engine
from support.paths import DATA
from zincmetal.engine.batch import Batch, accepted_of, id_of
from zincmetal.engine.engine import Engine
from zincmetal.engine.governor import Always
from zincmetal.engine.prefix_cache import NoCache, PrefixCache
from zincmetal.engine.scheduler import Scheduler
from zincmetal.errors import DeadlineError, DeviceError, UsageError
from zincmetal.sampling.params import SamplingParams

FILES = [DATA / "llama-q4_k_m.gguf", DATA / "qwen35-q4_k_m.gguf"]
SAMPLED = SamplingParams(temperature=1.0, seed=7, repeat_penalty=1.1)
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


class Lab:
    """Scheduler over an engine. ``during`` is called while each step that verifies a draft is in flight."""

    def __init__(
        self, opened: Engine, monkeypatch: pytest.MonkeyPatch, during: Callable[[int], None], cached: bool = True
    ) -> None:
        self.engine, self.now = opened, 0.0
        full = PrefixCache(opened.pages, opened.slots, opened.page, opened.recurrent)
        self.cache = full if cached else NoCache()
        pools: dict[str, Any] = {"pages": opened.pages, "slots": opened.slots, "seats": opened.free_seats}
        self.scheduler = Scheduler(opened, self.cache, governor=Always(), clock=lambda: self.now, **pools)
        self.free = self.what_is_free()
        self.verified, collect, submit = 0, opened.collect, opened.submit
        in_flight = list[Batch]()

        def submitted(batch: Batch) -> None:
            submit(batch)
            in_flight.append(batch)

        def collected() -> Any:
            batch = in_flight.pop(0)
            if any(len(run.drawings) > 1 for run in batch.runs):
                self.verified += 1
                during(self.verified)
            choices = collect()
            check_accepted(batch, choices)
            return choices

        monkeypatch.setattr(opened, "submit", submitted)
        monkeypatch.setattr(opened, "collect", collected)

    def what_is_free(self) -> tuple[int, int, int]:
        opened = self.engine
        return opened.pages.size - opened.pages.free, opened.slots.size - opened.slots.free, opened.free_seats.free

    def run(self, *members: Member) -> None:
        for member in members:
            self.scheduler.submit(member.ask())
        while self.scheduler.step():
            pass

    def check_nothing_is_lost(self) -> None:
        self.cache.clear()
        assert self.what_is_free() == self.free


def check_accepted(batch: Batch, choices: Sequence[Any]) -> None:
    """Fails unless the device has accepted what a comparison of the drafts with the drawn tokens accepts."""
    at = 0
    for run in batch.runs:
        drawn = [id_of(choice) for choice in choices[at : at + len(run.drawings)]]
        drafts = run.tokens[len(run.tokens) - len(run.drawings) + 1 :]
        for i in range(len(drawn) if run.drawings else 0):
            wrong = [j for j, token in enumerate(drafts[i:]) if token != drawn[i + j]]
            assert accepted_of(choices[at + i]) == (wrong[0] if wrong else len(drafts) - i)
        at += len(run.drawings)


def members(opened: Engine) -> list[Member]:
    """Makes three members with drafts, and the texts that they have alone."""
    made = []
    for i, params in enumerate((SamplingParams(), SAMPLED, SamplingParams())):
        for first in range(5, 200, 11):  # until one has no near tie soon
            ids = [first, 6 + i, 7]
            want = Mixture(opened, 0, (1, 1, 1)).alone(ids, params, None, frozenset(), 30)
            if len(want) > 20:
                break
        made.append(Member(ids, params, want, drafts=0.7))
    return made


@every_file
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_request_that_ends_while_its_draft_is_verified(path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(path, "f32", threads=1) as opened:
        first, *others = members(opened)

        def end(verified: int) -> None:
            if verified != 4:
                return
            if how == "deadline":
                lab.now = 2.0
            else:
                assert first.request
                lab.scheduler.cancel(first.request)
            lab.scheduler._take_messages()  # noqa: SLF001 - in the middle of a step
            lab.scheduler._check_deadlines()  # noqa: SLF001

        lab = Lab(opened, monkeypatch, end)
        if how == "deadline":
            ask = first.ask

            def ask_for_a_second() -> Any:
                request = ask()
                request.deadline = 1.0
                return request

            monkeypatch.setattr(first, "ask", ask_for_a_second)
        lab.run(first, *others)
        assert lab.verified > 4
        assert isinstance(first.ended, DeadlineError) if how == "deadline" else first.ended == "cancelled"
        assert 0 < len(first.tokens) < len(first.want)
        assert first.tokens == first.want[: len(first.tokens)]
        for member in others:
            assert member.tokens == member.want
        known = [*first.ids, *first.tokens]
        again = Member(known, first.params, first.want[len(first.tokens) :], drafts=0.7)
        if first.params.greedy:  # it goes on from what is cached of it
            lab.run(again)
            assert again.tokens == again.want
        lab.check_nothing_is_lost()


@every_file
@pytest.mark.parametrize("error", [DeviceError("it is gone"), UsageError("it is closed"), MemoryError()])
def test_an_error_while_drafts_are_verified_leaves_nothing(
    path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next requests have their texts."""
    with engine(path, "f32", threads=1) as opened:
        asked, failed = members(opened), list[int]()

        def fail(verified: int) -> None:
            if verified == 3 and not failed:
                failed.append(verified)
                raise error

        lab = Lab(opened, monkeypatch, fail)
        lab.run(*asked)
        assert all(isinstance(member.ended, BaseException) for member in asked)
        lab.check_nothing_is_lost()
        again = [Member(member.ids, member.params, member.want, drafts=0.7) for member in asked]
        lab.run(*again)
        assert all(member.tokens == member.want for member in again)
        lab.check_nothing_is_lost()


@every_file
def test_an_error_while_verified_tokens_are_taken_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of one job are taken when those of another, which was verified in the same step, are not yet."""
    with engine(path, "f32", threads=1) as opened:
        asked = members(opened)
        lab = Lab(opened, monkeypatch, lambda verified: None)
        taken, take = [0], lab.scheduler._take  # noqa: SLF001

        def failing(*args: Any) -> None:
            taken[0] += 1
            if taken[0] == 20:
                raise MemoryError
            take(*args)

        monkeypatch.setattr(lab.scheduler, "_take", failing)
        lab.run(*asked)
        assert any(isinstance(member.ended, BaseException) for member in asked)
        lab.check_nothing_is_lost()


@every_file
def test_drafts_where_no_page_or_slot_is_left_are_left_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All others are taken while a draft is verified. Steps go on up to the end of the last page, and no further."""
    with engine(path, "f32", threads=1, context=256) as opened:
        held, slots, room = list[int](), list[int](), 15
        for first in range(5, 200, 11):  # until one has no near tie soon
            ids = [first, *range(50, 50 + opened.page - room)]
            want = Mixture(opened, 0, (1, 1, 1)).alone(ids, SAMPLED, None, frozenset(), 30)
            if len(want) > 20:
                break
        member = Member(ids, SAMPLED, want, drafts=1.0)

        def take_all(verified: int) -> None:
            if verified == 1:
                opened.pages_most, opened.slots_most = opened.pages_now, opened.slots_now
                held.extend(opened.pages.take() for _ in range(opened.pages.free))
                slots.extend(opened.slots.take() for _ in range(opened.slots.free))

        lab = Lab(opened, monkeypatch, take_all, cached=False)
        lab.run(member)
        assert member.tokens == want[:room]
        assert member.ended == "length"
        opened.pages.release_all(held)
        opened.slots.release_all(slots)
        lab.check_nothing_is_lost()
