"""The governor: on a clock of its own, drafts never cost more than they may, and pay where they can."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from zincmetal.engine.governor import LOSS, OLD, WINDOW, Account, Bid, Governor, kind_of

Cost = Callable[[int], float]
STEEP: Cost = lambda rows: 1.0 * rows  # noqa: E731
FLAT: Cost = lambda rows: 1.0 + 0.02 * (rows - 1)  # noqa: E731
REAL: Cost = lambda rows: {1: 1.0, 2: 1.25, 4: 1.65, 8: 2.57, 16: 5.1, 32: 10.0}[rows]  # noqa: E731
COSTS = {"steep": STEEP, "flat": FLAT, "real": REAL}


class Run:
    """Sequences that decode, with drafts that are right with a probability. Counts the time of each token of one."""

    def __init__(self, cost: Cost, right: float, n: int = 1, drafting: int = 1, replays: bool = False) -> None:
        self.cost, self.right, self.drafting = cost, right, drafting
        self.governor, self.accounts = Governor(replays), [Account() for _ in range(n)]
        self.replays, self.behind = replays, [0] * n
        self.times: list[list[float]] = [[] for _ in range(n)]  # of the tokens of each sequence
        self.now, self.rng, self.rows_seen = 0.0, random.Random(1), set[int]()

    def step(self) -> None:
        bids = [
            Bid(account, 1 + behind, 7 if i < self.drafting and self.rng.random() < 0.9 else 0, 3)
            for i, (account, behind) in enumerate(zip(self.accounts, self.behind, strict=True))
        ]
        lengths = self.governor.lengths(bids, "argmax")
        made = []
        for i, (bid, n) in enumerate(zip(bids, lengths, strict=True)):
            accepted = next((k for k in range(n) if self.rng.random() >= self.right), n)
            if n:
                self.accounts[i].learn(3, n, accepted)
            made.append(accepted + 1)
            self.behind[i] = bid.known + accepted if self.replays and accepted < n else 0
        rows = sum(bid.known for bid in bids) + sum(lengths)
        kind = kind_of(rows, rows > len(bids), "argmax")
        assert kind
        self.rows_seen.add(rows)
        seconds = self.cost(kind.rows)
        self.now += seconds
        for times, n in zip(self.times, made, strict=True):
            times += [self.now] * n
        self.governor.measured(list(zip(self.accounts, made, strict=True)), kind, seconds)

    def worst_loss(self, i: int = 0) -> float:
        """The most plain steps that any window took longer, of the tokens of one sequence."""
        times, plain = [0.0, *self.times[i]], self.cost(kind_of(len(self.accounts), False, "argmax").rows)  # type: ignore[union-attr]
        steps = len(times) - 1
        return max(times[k + WINDOW] - times[k] - WINDOW * plain for k in range(steps - WINDOW)) / plain


@pytest.mark.parametrize("replays", [False, True], ids=["attention", "recurrent"])
@pytest.mark.parametrize("right", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("cost", COSTS)
def test_no_window_loses_more_than_it_may(cost: str, right: float, replays: bool) -> None:
    run = Run(COSTS[cost], right, replays=replays)
    for _ in range(3000):
        run.step()
    # A step may end inside a window: then the tokens that it made count for the next one.
    assert run.worst_loss() <= LOSS * WINDOW + 1e-9


def test_drafts_that_are_right_pay_where_rows_are_cheap() -> None:
    for cost, right, least in ((FLAT, 1.0, 5.0), (REAL, 1.0, 2.4), (REAL, 0.9, 1.5), (FLAT, 0.5, 1.6)):
        run = Run(cost, right)
        for _ in range(2000):
            run.step()
        assert len(run.times[0]) / run.now * cost(1) > least


def test_drafts_are_off_where_rows_cost_as_much_as_steps() -> None:
    run = Run(STEEP, 0.9)
    for _ in range(2000):
        run.step()
    plain = len(run.times[0]) - 2000
    assert plain < 20
    run = Run(REAL, 0.05)
    for _ in range(3000):
        run.step()
    assert len(run.times[0]) / run.now > 0.985


def test_a_sequence_without_drafts_does_not_pay_for_others() -> None:
    run = Run(REAL, 1.0, n=2, drafting=1)
    for _ in range(3000):
        run.step()
    assert run.worst_loss(1) <= LOSS * WINDOW + 1e-9
    assert len(run.times[0]) > len(run.times[1])


def test_rows_of_a_plan_that_are_empty_are_taken() -> None:
    """Three sequences run in a plan of four rows: a draft of one token is free."""
    run = Run(REAL, 0.3, n=3, drafting=3)
    for _ in range(600):
        run.step()
    assert 4 in run.rows_seen


def test_a_step_that_waited_for_a_draft_is_paid_for() -> None:
    governor, account = Governor(replays=False), Account()
    plain, waited = (kind_of(1, False, "argmax", costly) for costly in (False, True))
    assert plain
    assert waited
    for seconds in (5.0, 1.0):
        governor.measured([(account, 1)], plain, seconds)
    for _ in range(3):
        governor.measured([(account, 1)], waited, 1.5)
    assert governor.costs.of(plain) == 1.0
    assert account.credit == pytest.approx(LOSS * WINDOW / 2 - 2 * 0.5 + 2 * 0.01)


def test_costs_forget_and_bound() -> None:
    governor = Governor(replays=False)
    costs = governor.costs
    kind = kind_of(2, True, "draw")
    assert kind
    plain = kind_of(1, False, "draw")
    assert plain
    for seconds in (7.0, 1.0):
        costs.measured(plain, seconds)
    assert (costs.at_most(2, plain), costs.likely(2, plain)) == (2.0, 1.0)
    for seconds in (9.0, 1.2, 1.2):
        costs.measured(kind, seconds)
    assert costs.of(kind) == 1.2, "the first step makes the plan"
    assert (costs.at_most(2, plain), costs.at_most(8, plain), costs.likely(8, plain)) == (1.2, 4.8, 1.2)
    for _ in range(OLD + 1):
        costs.measured(plain, 1.0)
    assert costs.of(kind) is None


class BlockRun(Run):
    """Sequences whose drafts a block makes, in a step of ``block`` seconds for each token.

    The first of these steps may begin behind the step in flight, before it is known what that one accepts. If then no
    draft is wanted, it was for nothing. ``right_now()`` is the probability of the moment that a token is right.
    """

    def __init__(self, cost: Cost, block: float, right_now: Callable[[], float], **options: Any) -> None:
        super().__init__(cost, 0.0, **options)
        self.block, self.right_now = block, right_now
        self.begun = self.for_nothing = self.ahead = self.drafted = 0

    def step(self) -> None:
        bids = [Bid(account, 1 + n, 7, 0, True) for account, n in zip(self.accounts, self.behind, strict=True)]
        lengths = self.governor.lengths(bids, "argmax")
        rows, drafts, begun = sum(bid.known for bid in bids) + sum(lengths), any(lengths), self.begun
        self.drafted += drafts
        self.ahead += drafts and begun
        self.for_nothing += begun and not drafts
        next_bids = [bid._replace(known=1) for bid in bids]
        self.begun = int(self.governor.goes_on(next_bids, "argmax", rows if drafts else 0))
        made = []
        for i, (bid, n) in enumerate(zip(bids, lengths, strict=True)):
            accepted = next((k for k in range(n) if self.rng.random() >= self.right_now()), n)
            if n:
                self.accounts[i].learn(0, n, accepted)
            made.append(accepted + 1)
            self.behind[i] = bid.known + accepted if self.replays and accepted < n else 0
        kind = kind_of(rows, rows > len(bids), "argmax", costly=rows > len(bids) or bool(begun))
        assert kind
        seconds = self.cost(kind.rows) + self.block * max([begun, *lengths])
        self.now += seconds
        for times, n in zip(self.times, made, strict=True):
            times += [self.now] * n
        self.governor.measured(list(zip(self.accounts, made, strict=True)), kind, seconds)


@pytest.mark.parametrize("replays", [False, True], ids=["attention", "recurrent"])
@pytest.mark.parametrize("right", [0.0, 0.5, 0.9, None])
@pytest.mark.parametrize("block", [0.05, 0.3])
@pytest.mark.parametrize("cost", COSTS)
def test_what_begins_for_nothing_is_paid_for(cost: str, block: float, right: float | None, replays: bool) -> None:
    """Also where texts change: drafts are right for a while, and then they are not."""
    run = BlockRun(COSTS[cost], block, lambda: float(run.now // 70 % 2) if right is None else right, replays=replays)
    for _ in range(1000):
        run.step()
    # The first step of a kind does not count, and one that was begun for nothing makes a kind.
    assert run.worst_loss() <= LOSS * WINDOW + block + 1e-9


@pytest.mark.parametrize("replays", [False, True], ids=["attention", "recurrent"])
def test_drafts_that_are_right_begin_behind_the_step_in_flight(replays: bool) -> None:
    """And there are drafts, although nothing says at first what a rejection costs where rows are computed again."""
    run = BlockRun(REAL, 0.05, lambda: 0.9, replays=replays)
    for _ in range(1000):
        run.step()
    assert len(run.times[0]) / run.now > (1.2 if replays else 1.6)
    assert run.ahead > 0.8 * run.drafted > 200
    assert run.for_nothing < 0.2 * run.ahead


def test_nothing_begins_that_the_credit_does_not_cover() -> None:
    """The step in flight may be all wrong. What is left then must cover a draft that has begun for nothing."""
    governor, account, plain = Governor(replays=False), Account(), kind_of(1, False, "argmax")
    bid = Bid(account, 1, 7, 0, True)
    assert plain
    assert not governor.goes_on([bid], "argmax", 0), "nothing is known of a plain step"
    for kind, seconds in ((plain, 1.0), (kind_of(2, True, "argmax", True), 1.25)):
        assert kind
        governor.costs.measured(kind, 9.0)
        governor.costs.measured(kind, seconds)
    for credit, alone, behind in ((0.6, True, True), (0.4, True, False), (0.2, False, False)):  # a quarter each
        account.credit = credit
        assert governor.goes_on([bid], "argmax", 0) == alone
        assert governor.goes_on([bid], "argmax", 2) == behind
