"""Readings: texts that are only read, for the logits or the rows of all their tokens, beside requests that decode.

A reading is cut into slices. The step thread runs one slice of the first reading, then a step of the requests. So no
sequence that decodes waits for a whole text. Slices have a pace of their own kind (``pace.py``): the logits of a row
cost more than the row. Beside prompts a slice comes in every second step, and no rows of prompts in those steps.

The readings behind the first one wait, so one reading at a time holds pages. If a request has no page, the reading that
holds some runs to its end at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as AnySequence
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from .pace import Pace, load
from .request import Job

T = TypeVar("T")
#: Takes the most rows of its next slice, and gives (the rows that the last slice had, the tokens that are left). It
#: does nothing before its first ``yield``. Its return value is the result.
Slices = Generator[tuple[int, int], int, T]


class Reading(Generic[T]):
    """Work in slices, whose result one thread waits for. ``kind``: what it costs. ``most``: rows of a slice."""

    def __init__(self, kind: str, most: int, slices: Slices[T]) -> None:
        self.kind, self.most = kind, most
        self.begun = self.over = False
        self._slices, self._given_up = slices, False
        self._answer: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        next(slices)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result, or raise the error. Raises ``queue.Empty`` after ``timeout`` seconds."""
        value, error = self._answer.get(timeout=timeout)
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def give_up(self) -> None:
        """Run no further slice: nobody waits for the result any more. For any thread."""
        self._given_up = True

    def run(self, rows: int) -> int:
        """Run a slice of at most so many rows, on the step thread. Return its rows, 0 if there is none any more."""
        n, self.begun = 0, True
        if self._given_up:
            self._end(None)
            return 0
        try:
            n, left = self._slices.send(rows)
            if not left:
                next(self._slices)
        except StopIteration as end:
            self._end(end.value)
        except BaseException as error:
            self.fail(error)
        return n

    def fail(self, error: BaseException) -> None:
        """End it by an error."""
        self._end(None, error)

    def _end(self, value: T | None, error: BaseException | None = None) -> None:
        self.over = True
        self._slices.close()
        self._answer.put((value, error))


class Readings:
    """Readings that wait, and the pace of their slices. For the step thread, while nothing is in flight."""

    def __init__(self, gap_seconds: float, clock: Callable[[], float]) -> None:
        self._gap_seconds, self._clock = gap_seconds, clock
        self._waiting: deque[Reading[Any]] = deque()
        self._paces: dict[str, Pace] = {}
        self._had_turn = False

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, reading: Reading[Any]) -> None:
        """Let a reading wait for its turn."""
        self._waiting.append(reading)

    def go_on(self, running: AnySequence[Job], max_singles: int) -> bool:
        """Run a slice of the first reading. Return False if there is none, or if the step is that of the prompts.

        The running jobs wait meanwhile. A step has at most ``max_singles`` of those that decode.
        """
        decoders, rounds = load(running, max_singles)
        two_in_a_row = self._had_turn and 0 < decoders < len(running)
        self._had_turn = bool(self._waiting) and not two_in_a_row
        if self._had_turn:
            self._run_slice(decoders, rounds)
        return self._had_turn

    def finish(self) -> bool:
        """Run the reading that holds pages to its end. Return False if there is none."""
        if not self._waiting or not self._waiting[0].begun:
            return False
        reading = self._waiting[0]
        while not reading.over:
            self._run_slice(0, 1)
        return True

    def end_all(self, error: BaseException) -> None:
        """End all by an error."""
        while self._waiting:
            self._waiting.popleft().fail(error)

    def _run_slice(self, decoders: int, rounds: int) -> None:
        reading = self._waiting[0]
        pace = self._paces.setdefault(reading.kind, Pace(self._gap_seconds, reading.most))
        began = self._clock()
        n = reading.run(pace.rows(decoders, rounds))
        if n:
            pace.measured(n, self._clock() - began)
        if reading.over:
            self._waiting.popleft()
