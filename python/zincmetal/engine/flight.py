"""Flights: steps that were submitted and not collected, with the jobs whose rows they have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceError
from ..sampling.draws import top_log_probabilities
from .batch import Batch, Choice
from .pages import PagePool, StateSlots
from .request import Job, Request
from .sequence import Sequence
from .speculate import Verify


@dataclass
class Flight:
    """Step in flight. ``held`` slots become checkpoints when it has been collected: (job, tokens, slot).

    ``guessed``: the positions of rows whose masks were taken to allow every token, before they were known. ``outputs``
    has the first output of each job, ``verifies`` the drafts. ``waited``: for a draft, where it could have run ahead.
    """

    batch: Batch
    jobs: dict[Sequence, Job]
    outputs: dict[Job, int]
    began: float
    held: list[tuple[Job, int, int]] = field(default_factory=list)
    guessed: dict[Job, int] = field(default_factory=dict)
    verifies: dict[Job, Verify] = field(default_factory=dict)
    has_slice: bool = False
    waited: bool = False

    def number_outputs(self) -> None:
        """Note where the outputs of each job begin, in the order of the runs; each job expects its own."""
        output = 0
        for run in self.batch.runs:
            if run.drawings:
                job = self.jobs[run.sequence]
                self.outputs[job] = output
                job.expected += 1
                output += len(run.drawings)

    def release(self, pages: PagePool, slots: StateSlots) -> None:
        """Release what the runs have left, and the slots that were held for checkpoints."""
        pages.release_all(self.batch.pages)
        slots.release_all(self.batch.slots)
        slots.release_all(slot for _, _, slot in self.held)
        slots.release_all(v.before for v in self.verifies.values() if v.before is not None)


class State(NamedTuple):
    """What a scheduler has at a moment: its requests, and a page or slot once for each time that it owns it."""

    running: list[Request]
    waiting: list[Request]  # in their order; some may have been moved out
    pages: list[int]
    slots: list[int]
    seats: list[int]

    @classmethod
    def of(
        cls, running: list[Job], waiting: list[Job], ending: list[Job], flights: Iterable[Flight], held: list[int]
    ) -> State:
        """Collect what jobs and flights own, and the pages that are ``held`` beside."""
        jobs = [*running, *waiting, *ending]
        owners = [job.sequence for job in jobs] + [job.begin for job in jobs if job.begin is not None and not job.ended]
        pages, slots = (
            [*held, *(page for s in owners for page in s.pages)],
            [s.slot for s in owners if s.slot is not None],
        )
        for flight in flights:
            pages += flight.batch.pages
            slots += [*flight.batch.slots, *(slot for _, _, slot in flight.held)]
            slots += [v.before for v in flight.verifies.values() if v.before is not None]
        seats = [s.seat for s in owners if s.seat is not None]
        return cls([job.request for job in running], [job.request for job in waiting], pages, slots, seats)


def drawn(job: Job, logits: NDArray[np.float32]) -> Choice:
    """Draw a token by the host: -1 if the logits are not finite. Processors and masks may raise anything."""
    assert job.sampler
    began, n = perf_counter(), job.request.n_logprobs
    try:
        token = job.sampler.sample(logits, job.sequence.ids)
    except DeviceError:
        return Choice(-1, n_not_finite=1)
    logprob, top = top_log_probabilities(logits, token, n) if n else (0.0, ())
    job.stats.sampling += perf_counter() - began
    return Choice(token, logprob=logprob, top=top)
