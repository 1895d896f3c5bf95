"""Drafts that begin behind the step in flight: the device decides where they go on, and they write nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from support.fake_executor import FakeExecutor
from support.scheduler_lab import EOG_HEAVY, SEEDED, Lab, sink_of
from zincmetal.engine.batch import Batch
from zincmetal.engine.block_drafts import BlockDrafter
from zincmetal.engine.governor import Always
from zincmetal.engine.request import Request
from zincmetal.errors import DeviceError

KINDS = pytest.mark.parametrize("recurrent", [False, True], ids=["attention", "recurrent"])


class Watched(FakeExecutor):
    """Executor that notes of each step that was collected: its batch, and whether another one ran behind it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.collected: list[tuple[Batch, bool]] = []

    def collect(self) -> list[Any]:
        batch = self.batches[len(self.batches) - self.in_flight]
        self.collected.append((batch, self.in_flight > 1))
        return super().collect()

    @property
    def verified(self) -> list[bool]:
        """Of each step with drafts: whether another one ran behind it."""
        return [ahead for batch, ahead in self.collected if any(len(run.drawings) > 1 for run in batch.runs)]


def drafting(lab: Lab, ids: Iterable[int], n: int, **options: Any) -> Request:
    """Submits a request whose drafts the block makes."""
    return lab.submit(ids, n, drafter=BlockDrafter(), **options)


def counts(request: Request) -> tuple[int, int]:
    stats = sink_of(request).stats
    assert stats
    return sum(tried for tried, _ in stats.drafts), sum(right for _, right in stats.drafts)


@KINDS
@pytest.mark.parametrize("spoils", [0.0, 0.4, 1.0])
def test_the_next_draft_begins_behind_each_verified_one(recurrent: bool, spoils: float) -> None:
    """Also beside a request without drafts. All drafts of an exact block are right: each row was where it had to be."""
    lab = Lab(Watched(recurrent=recurrent, spoils=spoils, max_singles=16), governor=Always())
    requests = [drafting(lab, range(i, 50 + 30 * i), 60, draft_tokens=2 + i) for i in range(3)]
    plain = lab.submit(range(500, 530), 20)
    lab.run()
    lab.check_ended(*requests, plain)
    for request in requests:
        tried, right = counts(request)
        assert tried > 20
        assert right == {0.0: tried, 1.0: 0}.get(spoils, right)
        assert right or spoils == 1.0
    ahead = lab.executor.verified
    assert len(ahead) > 10
    assert sum(ahead) > 0.7 * len(ahead), "but for the last ones of each request"
    lab.check_owners()


@KINDS
def test_nothing_begins_where_steps_do_not_run_ahead(recurrent: bool) -> None:
    for executor in (Watched(recurrent=recurrent, runs_ahead=False), Watched(recurrent=recurrent)):
        executor.ran_at_once = True
        lab = Lab(executor, governor=Always())
        request = drafting(lab, range(60), 40)
        lab.run()
        lab.check_ended(request)
        assert counts(request)[1] > 20
        assert not any(executor.verified)
        lab.check_owners()


@KINDS
@pytest.mark.parametrize("how", ["cancel", "stop", "sink", "length"])
def test_a_request_that_ends_has_its_pages_until_the_draft_was_collected(recurrent: bool, how: str) -> None:
    """Nobody else writes or reads them meanwhile. Others go on, also from what was cached of it."""
    begun = 0
    for turn in range(4, 16):
        lab = Lab(Watched(recurrent=recurrent, spoils=0.3, pages=6, pages_most=6), governor=Always())
        eog = EOG_HEAVY if how == "stop" else frozenset[int]()
        ending = drafting(lab, range(62), turn if how == "length" else 60, eog_ids=eog)
        other = drafting(lab, range(100, 130), 40)
        if how == "sink":
            sink_of(ending).stop_at = turn
        for _ in range(turn if how == "cancel" else 200):
            lab.scheduler.step()
            begun += lab.scheduler.speculation.block.begun and bool(sink_of(ending).ends)
        lab.scheduler.cancel(ending)
        known = [*ending.ids, *sink_of(ending).tokens]
        after = [lab.submit(known[: 60 + i], 12) for i in range(2)]
        lab.run()
        lab.check_ended(other, *after)
        assert sink_of(ending).ends == 1
        wanted = lab.expected(lab.request(ending.ids, 60, eog_ids=eog))
        assert sink_of(ending).tokens == wanted[: len(sink_of(ending).tokens)]
        lab.check_owners()
    assert begun or how in ("cancel", "length"), "the device had begun with what nobody wants any more"


@KINDS
@pytest.mark.parametrize("room", [0, 1, 2, 3, 5])
def test_no_row_lies_beyond_the_context_or_the_last_token(recurrent: bool, room: int) -> None:
    """Whatever is accepted: a row at the end of the context would be in the page table of another sequence."""
    for most in (-1, 9 + room):
        executor = Watched(recurrent=recurrent, n_ctx=128, spoils=0.2)
        lab = Lab(executor, governor=Always())
        ids = range(128 - 40 - room)
        request = drafting(lab, ids, most, draft_tokens=7)
        lab.run()
        last = len(ids) + len(sink_of(request).tokens) - 1
        assert last == (128 if most < 0 else len(ids) + most - 1)
        assert sink_of(request).tokens == lab.expected(lab.request(ids, last - len(ids) + 1))
        assert any(executor.verified) or most > 0
        assert max(batch.last_position for batch, _ in executor.collected) < last
        lab.check_owners()


@KINDS
def test_a_request_that_arrives_is_not_kept_waiting_by_a_draft(recurrent: bool) -> None:
    """The draft that has begun is settled first, and its request goes on."""
    lab = Lab(Watched(recurrent=recurrent, spoils=0.3), governor=Always())
    requests, block = [drafting(lab, range(40), 90)], lab.scheduler.speculation.block
    for i in range(60):
        lab.scheduler.step()
        if block.begun and len(requests) < 5:
            requests.append(drafting(lab, range(200 + i, 230 + i), 20, params=SEEDED if i % 2 else requests[0].params))
            lab.scheduler.step()
            assert requests[-1] in lab.scheduler.state().running, "it was admitted at once"
    lab.run()
    assert len(requests) > 2
    lab.check_ended(*requests)
    lab.check_owners()


@KINDS
@pytest.mark.parametrize("where", ["submit", "collect"])
def test_an_error_leaves_nothing_in_flight(recurrent: bool, where: str) -> None:
    for turn in range(3, 12):
        lab = Lab(Watched(recurrent=recurrent, spoils=0.3), governor=Always())
        request = drafting(lab, range(60), 50)
        for _ in range(turn):
            lab.scheduler.step()
        lab.executor.fail = where
        lab.run()
        assert isinstance(sink_of(request).error, DeviceError)
        again = drafting(lab, range(60), 50)
        lab.run()
        lab.check_ended(again)
        lab.check_owners()
