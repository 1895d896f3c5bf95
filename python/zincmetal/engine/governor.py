"""Governor: how many tokens of each draft a step verifies, so that drafts do not cost more than they win.

It measures what a step costs by its number of rows, on this machine, and which drafts are accepted, by request. Of all
numbers of rows it takes the one with the most tokens per second that can be expected.

What can be expected may not happen. So each request has credit, in plain steps. A step that takes longer than plain
steps for the same tokens is paid from it. Drafts are verified only if the credit covers a step of which no draft is
accepted. Credit begins at ``MOST_CREDIT``, which it never exceeds, and a token earns ``EARNED``. So any ``WINDOW``
tokens take at most ``LOSS`` longer than plain decoding does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..plan.chunks import DECODE_ROWS, VERIFY_ROWS

WINDOW, LOSS = 256, 0.02
MOST_CREDIT = LOSS * WINDOW / 2  # plain steps; the other half is earned in the window
EARNED = LOSS / 2  # plain steps for each token
WEIGHT = 0.1  # of a new measurement
OUTLIER = 2.0  # times the average: what counts of a measurement at most
WARMING = 1  # first steps of a kind that do not count: they make the plan
OLD = 512  # steps after which a measurement that was not renewed is forgotten
MEMORY = 0.97  # of earlier drafts, when another one has been verified
CLASSES = ((16, 0.9), (6, 0.75), (0, 0.5))  # drafts by the least match, and the share that is expected at first
TRUST = 3.0  # drafts that the share at first counts for


class Kind(NamedTuple):
    """Kind of a step, whose cost is measured: class of its rows, whether it has drafts, output of its plan.

    ``costly``: a drafter took its time for it. Or, without drafts: it did not run ahead, since a draft was to come.
    """

    rows: int
    verifies: bool
    output: str
    costly: bool = False


def kind_of(rows: int, verifies: bool, output: str, costly: bool = False) -> Kind | None:
    """Return the kind of a step, None for one that is too large."""
    classes = VERIFY_ROWS if verifies else DECODE_ROWS
    fitting = next((n for n in classes if rows <= n), None)
    return None if fitting is None else Kind(fitting, verifies, output, costly)


class Costs:
    """Seconds of steps, by kind: moving averages."""

    def __init__(self) -> None:
        self._seconds: dict[Kind, float] = {}
        self._seen: dict[Kind, int] = {}
        self._renewed: dict[Kind, int] = {}
        self._now = 0

    def measured(self, kind: Kind, seconds: float) -> None:
        """Learn from a step."""
        self._now += 1
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if self._seen[kind] <= WARMING:
            return
        known, self._renewed[kind] = self.of(kind), self._now
        if known is None:
            self._seconds[kind] = seconds
        else:
            self._seconds[kind] = known + WEIGHT * (min(seconds, OUTLIER * known) - known)

    def of(self, kind: Kind) -> float | None:
        """Return the seconds of a step, None if they are not known."""
        if self._now - self._renewed.get(kind, self._now) > OLD:
            return None
        return self._seconds.get(kind)

    def at_most(self, rows: int, plain: Kind, costly: bool = False) -> float:
        """Return the most seconds that a step with drafts can be expected to take. The plain step's are known.

        If it was not measured: a step of twice the rows takes at most twice the time, that of two steps.
        """
        known = self._smaller(rows, plain.output, costly)
        if rows in known:
            return known[rows]
        bounds = [seconds * rows / n for n, seconds in known.items()]
        return min([*bounds, self._seconds[plain] * max(2, rows / plain.rows)])

    def likely(self, rows: int, plain: Kind, costly: bool = False) -> float:
        """Return the seconds to expect: measured, or else no more than fewer rows take, so that they are measured."""
        return max([self._seconds[plain], *self._smaller(rows, plain.output, costly).values()])

    def _smaller(self, rows: int, output: str, costly: bool) -> dict[int, float]:
        """Return the seconds of steps with drafts of up to so many rows, as far as they are known."""
        found = {n: self.of(Kind(n, True, output, costly)) for n in VERIFY_ROWS if n <= rows}
        return {n: seconds for n, seconds in found.items() if seconds is not None}


class Account:
    """What drafts have brought to one request: its credit, and the shares of drafted tokens that were accepted."""

    def __init__(self) -> None:
        self.credit = MOST_CREDIT
        self._tried = [TRUST for _ in CLASSES]
        self._hit = [TRUST * share for _, share in CLASSES]

    def share(self, match: int) -> float:
        """Return the probability that the next token of a draft is accepted, if those before it are."""
        i = _class_of(match)
        return self._hit[i] / self._tried[i]

    def learn(self, match: int, drafted: int, accepted: int) -> None:
        """Learn from a draft: all of it was accepted, or the token after the accepted ones was not."""
        i, share = _class_of(match), CLASSES[_class_of(match)][1]
        tried = accepted + (accepted < drafted)
        self._tried[i] = TRUST + MEMORY**tried * (self._tried[i] - TRUST) + tried
        self._hit[i] = TRUST * share + MEMORY**tried * (self._hit[i] - TRUST * share) + accepted

    def pay(self, cost: float, tokens: int) -> None:
        """Take account of a step that cost so many plain steps and made so many tokens."""
        self.credit = min(MOST_CREDIT, self.credit + tokens - cost + EARNED * tokens)


def _class_of(match: int) -> int:
    return next(i for i, (least, _) in enumerate(CLASSES) if match >= least)


class Bid(NamedTuple):
    """Sequence that could be in the next step: its known tokens, and the draft that may follow them.

    A ``costly`` draft is not made yet.
    """

    account: Account
    known: int
    drafted: int
    match: int
    costly: bool = False


class Governor:
    """Chooses how many drafted tokens a step verifies. ``replays``: known tokens are computed again after a rejection.

    That is so with recurrent states, which stay before the step unless all of its drafts are accepted.
    """

    def __init__(self, replays: bool) -> None:
        self._replays, self.costs = replays, Costs()

    def lengths(self, bids: Sequence[Bid], output: str) -> list[int]:
        """Return the number of tokens of each bid's draft that the next step verifies. All 0: a plain step."""
        nothing = [0] * len(bids)
        kind, costs = kind_of(len(bids), False, output), self.costs
        plain = costs.of(kind) if kind else None
        if kind is None or plain is None or not any(bid.drafted for bid in bids):
            return nothing
        best, most = nothing, 1.0
        again = max(costs.likely(VERIFY_ROWS[0], kind, c) for c in (False, True)) - plain if self._replays else 0.0
        for rows in VERIFY_ROWS:
            lengths, expected, all_of_it = _dealt(bids, rows - sum(bid.known for bid in bids))
            if not any(lengths):
                continue
            costly = any(bid.costly and n for bid, n in zip(bids, lengths, strict=True))
            worst = self._worst(rows, kind, costly)
            if any(bid.account.credit < worst for bid in bids):
                continue
            cost = (costs.likely(rows, kind, costly) + (1 - all_of_it) * again) / plain
            gain = (len(bids) + expected) / len(bids) / cost
            if gain > most:
                best, most = lengths, gain
        return best

    def goes_on(self, bids: Sequence[Bid], output: str, verifying: int) -> bool:
        """Return True if drafts may begin behind a step in flight, before it is known what that one accepts.

        It has ``verifying`` rows, or 0 without drafts. It is expected to leave the credit as it is, and the step after
        it to verify drafts. If none of its own is accepted, and no more is wanted, the credit covers what has begun.
        """
        plain, now = kind_of(len(bids), False, output), kind_of(verifying, True, output, True)
        base = self.costs.of(plain) if plain else None
        if plain is None or now is None or base is None:
            return False
        worst = self.costs.at_most(VERIFY_ROWS[0], plain, True) / base - 1  # of the first step of a draft, and more
        worst += self._worst(now.rows, plain, True) if verifying else 0.0
        return all(bid.account.credit >= worst for bid in bids) and any(self.lengths(bids, output))

    def _worst(self, rows: int, plain: Kind, costly: bool) -> float:
        """Return the plain steps by which a step with drafts may be too long. How long a plain one takes is known.

        After a rejection rows may be computed once more. A step of them takes no longer than one with drafts as well.
        """
        base, costs = self.costs.of(plain), self.costs
        assert base is not None
        again = min(costs.at_most(VERIFY_ROWS[0], plain, c) for c in (False, True)) - base if self._replays else 0.0
        return (costs.at_most(rows, plain, costly) - base + again) / base

    def measured(self, accounts: Sequence[tuple[Account, int]], kind: Kind, seconds: float) -> None:
        """Learn from a step. ``accounts``: that of each sequence, and the tokens that the step made for it."""
        plain = kind_of(len(accounts), False, kind.output)
        self.costs.measured(kind, seconds)
        base = self.costs.of(plain) if plain else None
        cost = 1.0
        if plain and base and kind != plain:
            known = self.costs.at_most(kind.rows, plain, kind.costly) if kind.verifies else self.costs.of(kind)
            cost = (known or base) / base
        for account, tokens in accounts:
            account.pay(cost, tokens)


def _dealt(bids: Sequence[Bid], spare: int) -> tuple[list[int], float, float]:
    """Deal rows to drafts, each to the token that is most likely accepted.

    Returns the rows of each bid, the number of tokens that can be expected to be accepted, and the probability that
    all are.
    """
    lengths, expected, whole = [0] * len(bids), 0.0, 1.0
    shares = [bid.account.share(bid.match) for bid in bids]
    for _ in range(spare):
        open_ = [i for i, bid in enumerate(bids) if lengths[i] < bid.drafted]
        if not open_:
            break
        best = max(open_, key=lambda i: shares[i] ** (lengths[i] + 1))
        lengths[best] += 1
        expected += shares[best] ** lengths[best]
        whole *= shares[best]
    return lengths, expected, whole


class Always:
    """Governor that verifies the whole of every draft that fits. For tests and for measuring."""

    def lengths(self, bids: Sequence[Bid], output: str) -> list[int]:
        """Return the number of tokens of each draft: all that fit into the largest step."""
        return _dealt(bids, VERIFY_ROWS[-1] - sum(bid.known for bid in bids))[0]

    def goes_on(self, bids: Sequence[Bid], output: str, verifying: int) -> bool:
        """Return True: drafts begin behind each step in flight."""
        return True

    def measured(self, accounts: Sequence[tuple[Account, int]], kind: Kind, seconds: float) -> None:
        """Learn nothing."""
