"""Flights: steps that were submitted and not collected, with the jobs whose rows they have."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..sampling.draws import top_log_probabilities
from .batch import Batch, Choice
from .request import Job, Request
from .sequence import Sequence
from .speculate import Verify


class State(NamedTuple):
    """What a scheduler has at a moment: its requests, and a page or slot once for each time that it owns it."""

    running: list[Request]
    waiting: list[Request]  # in their order; some may have been moved out
    pages: list[int]
    slots: list[int]
    seats: list[int]


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


def drawn(job: Job, logits: NDArray[np.float32]) -> Choice:
    """Draw a token by the host. Processors and masks may raise anything."""
    assert job.sampler
    began = perf_counter()
    token, n = job.sampler.sample(logits, job.sequence.ids), job.request.n_logprobs
    logprob, top = top_log_probabilities(logits, token, n) if n else (0.0, ())
    job.stats.sampling += perf_counter() - began
    return Choice(token, logprob=logprob, top=top)
