"""Pace of steps: how many rows of prompts a step may have, and which prompts get them."""

from __future__ import annotations

import sys
from collections.abc import Sequence as AnySequence

from .request import Job

FIRST_ROWS = 64  # beside decoders, before anything was measured
LEAST_ROWS = 8  # beside decoders: prompts go on even where a row takes longer than the gap
SHARE = 0.8  # of the gap: a step takes longer than the average
WEIGHT = 0.25  # of a new measurement
MOST = 4.0  # times the average: what counts of a measurement that is an outlier
GRAIN = 32  # rows: slices that end elsewhere leave rows of a plan empty


class Pace:
    """Measures the seconds that a row of a step takes, as a moving average, and keeps steps shorter than the gap."""

    def __init__(self, gap_seconds: float, max_rows: int) -> None:
        self.gap_seconds, self.max_rows = gap_seconds, max_rows
        self.seconds_per_row: float | None = None

    def measured(self, rows: int, seconds: float) -> None:
        """Learn from a step that had a slice of a prompt."""
        sample, known = seconds / rows, self.seconds_per_row
        if known is None:
            self.seconds_per_row = sample
        else:
            self.seconds_per_row = known + WEIGHT * (min(sample, MOST * known) - known)

    def rows(self, decoders: int, rounds: int) -> int:
        """Return the most rows of a step with so many decoders, each of which is in one of ``rounds`` steps."""
        if not decoders:
            return self.max_rows
        if not self.seconds_per_row:
            return min(FIRST_ROWS, self.max_rows)
        rows = int(SHARE * self.gap_seconds / rounds / self.seconds_per_row) - decoders
        rows -= rows % GRAIN if rows > GRAIN else 0
        return min(max(rows, LEAST_ROWS), self.max_rows)

    def copies(self, seconds: float) -> int:
        """Return how many copies of so many seconds each fit between two steps."""
        return int(min(SHARE * self.gap_seconds / seconds, sys.maxsize)) if seconds > 0 else sys.maxsize


def load(running: AnySequence[Job], max_singles: int) -> tuple[int, int]:
    """Return the number of jobs that decode, and of steps until each of them had a row, if a step has so many."""
    decoders = sum(job.decodes for job in running)
    return decoders, -(-decoders // max_singles)


def shares(prompts: AnySequence[Job], rows: int) -> list[tuple[Job, int]]:
    """Divide the rows of a step among prompts, which stand in the order of their arrival.

    The oldest prompt gets half of the rows. The other half goes to the prompts with the fewest tokens left, and what
    they do not need goes to the oldest. So a short prompt waits for shorter ones alone. A long prompt gets at least
    half of all rows once those before it are done, and no later prompt takes them away.
    """
    if not prompts:
        return []
    oldest, *others = prompts
    half = rows if not others else (rows + 1) // 2
    rest = rows - min(half, oldest.left)
    given = []
    for job in sorted(others, key=lambda job: (job.left, job.order)):
        if rest:
            n = min(job.left, rest)
            given.append((job, n))
            rest -= n
    return [(oldest, min(half, oldest.left) + rest), *given]
