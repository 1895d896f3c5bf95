"""Batch: the rows of one step, of many sequences. ``Builder`` makes it, an ``Executor`` runs it.

Two rules keep sequences apart that share pages and states:

1. Nobody writes to a page or a slot with several owners. A run that would takes a page of its own, into which the old
   one is copied, or a slot of its own: it reads the states from the old slot and leaves them in the new one.
2. A page or slot that a run has left is released when the step has been collected, and no earlier.

So no step in flight reads what another sequence writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..plan.choices import DRAFT
from ..sampling.draws import draw_records, draw_values
from ..sampling.params import SamplingParams
from .pages import PagePool, StateSlots
from .sequence import Sequence

ARG_MAX = SamplingParams()


class Choice(NamedTuple):
    """Result of one output: ``Choice`` of ``kernels/params.h``. A record of that dtype has the same names but ``top``.

    ``top`` has the most probable tokens, (id, log-probability) each, if the drawing wants them.
    """

    id: int
    n_not_finite: int = 0
    logprob: float = 0.0
    flags: int = 0
    accepted: int = 0
    top: tuple[tuple[int, float], ...] = ()


def _field(choice: Any, name: str) -> int:
    """Return a field of a ``Choice`` as a record or as a tuple."""
    return int(choice[name] if hasattr(choice, "dtype") else getattr(choice, name))


def id_of(choice: Any) -> int:
    """Return the id of a ``Choice``, as a record or as a tuple."""
    return _field(choice, "id")


def accepted_of(choice: Any) -> int:
    """Return how many rows after an output's have the tokens that were drawn in their places, of a ``Choice``."""
    return _field(choice, "accepted")


def is_finite(choice: Any) -> bool:
    """Return True if all logits were finite, of a ``Choice`` as a record or as a tuple."""
    return not _field(choice, "n_not_finite")


class Executor(Protocol):
    """Device as the scheduler sees it: steps, pools and copies. One thread calls it.

    ``copy_page`` and ``copy_slot`` take effect after the steps that were submitted before, and before later ones. The
    scheduler reads and writes pages and slots, and lets the pools grow, only while nothing is in flight.
    """

    n_ctx: int  # most tokens of a sequence
    n_vocab: int
    page: int  # positions of a page
    max_rows: int  # of a step
    max_singles: int  # runs of one row, of a step
    max_outs: int  # outputs of a step
    max_page_writes: int  # of a step; at least the pages of a context
    max_biases: int  # of an output
    recurrent: bool  # sequences have states
    seats: int  # page tables on the device
    runs_ahead: bool  # two steps may be in flight, and the second takes tokens of the first
    draws: bool  # the device draws tokens; otherwise the host does unless the token is the arg max
    pages_now: int
    pages_most: int
    slots_now: int
    slots_most: int

    @property
    def ran_at_once(self) -> bool:
        """True if the step that was submitted last has run in pieces: no other can take its tokens."""

    def submit(self, batch: Batch) -> None:
        """Start a step. At most two are in flight."""

    def collect(self) -> AnySequence[Any]:
        """Wait for the oldest step in flight. Return a ``Choice`` for each of its outputs, in their order."""

    def drop(self) -> None:
        """Wait for all steps in flight and forget their results. Raises nothing."""

    def host_logits(self, output: int) -> NDArray[np.float32]:
        """Return the logits of an output of the step that was collected last, [n_vocab]. Nothing is in flight."""

    def copy_page(self, source: int, to: int) -> None:
        """Copy keys, values and ids of a page."""

    def copy_slot(self, source: int, to: int) -> None:
        """Copy recurrent states."""

    def read_page(self, page: int) -> bytes:
        """Return the contents of a page."""

    def write_page(self, page: int, data: bytes) -> None:
        """Set the contents of a page."""

    def read_slot(self, slot: int) -> bytes:
        """Return the contents of a slot."""

    def write_slot(self, slot: int, data: bytes) -> None:
        """Set the contents of a slot."""

    def grow(self, pages: int, slots: int) -> bool:
        """Let the pools grow to these sizes, or to less. Return False if there is no memory. Sets ``*_now``."""


@dataclass(frozen=True)
class Drawing:
    """How the token after a row is chosen.

    ``key`` is that of the draw's noise. ``mask`` has a bit for each token that is allowed, uint32. ``host``: the host
    chooses, from the logits. ``n_logprobs``: ranked tokens whose log-probabilities are wanted.
    """

    params: SamplingParams
    key: int = 0
    mask: NDArray[np.uint32] | None = None
    n_logprobs: int = 0
    host: bool = False

    @property
    def argmax(self) -> bool:
        """True if the arg max of the logits is enough."""
        return self.host or (self.params.greedy and self.mask is None and not self.n_logprobs)


@dataclass(frozen=True)
class Run:
    """Rows of one sequence at consecutive positions.

    A token is an id, or -1 - i: the id that output i of the step before chooses. The last rows are outputs, one for
    each of the ``drawings``. ``slot`` and ``slot_out``: where its states are read, and where they are left.

    ``drafted``: tokens of the draft after that output i, which the step before verifies. The row comes as many
    positions later as are accepted, and takes the token that is drawn after them.
    """

    sequence: Sequence
    begin: int
    tokens: AnySequence[int]
    slot: int
    slot_out: int
    drawings: tuple[Drawing, ...] = ()
    drafted: int = 0

    @property
    def end(self) -> int:
        """Position after the last row, if nothing of a draft before it is accepted."""
        return self.begin + len(self.tokens)


@dataclass
class Batch:
    """Rows of one step, and what its end sets free.

    Runs of one row come first, those with an output before the others. The last token of a prompt is a run of its own.
    Only a sequence with drafts has a longer run with outputs. Outputs stand in the order of their rows.
    """

    runs: list[Run]
    page_writes: list[tuple[int, int]]  # (entry of the buffer ``pages``, page)
    table: int  # entries of a page table
    pages: list[int] = field(default_factory=list)  # to release when the step has been collected
    slots: list[int] = field(default_factory=list)
    drafts: bool = False  # a step of the block that drafts, in place of the model's

    @property
    def n_rows(self) -> int:
        """Rows of the step."""
        return sum(len(run.tokens) for run in self.runs)

    @property
    def n_single(self) -> int:
        """Runs of one row."""
        return sum(len(run.tokens) == 1 for run in self.runs)

    @property
    def drawings(self) -> list[Drawing]:
        """How the tokens of the outputs are chosen, in their order."""
        return [drawing for run in self.runs for drawing in run.drawings]

    @property
    def drawn_from(self) -> list[tuple[Run, int]]:
        """The run and the position of each output."""
        return [(run, at) for run in self.runs for at in range(run.end - len(run.drawings), run.end)]

    @property
    def verifies(self) -> bool:
        """True if a longer run has outputs."""
        return any(run.drawings and len(run.tokens) > 1 for run in self.runs)

    @property
    def output(self) -> str:
        """Output that the plan must have: "none", "argmax", "draw" or "draft"."""
        if self.drafts:
            return DRAFT
        drawings = self.drawings
        if not drawings:
            return "none"
        return "argmax" if all(drawing.argmax for drawing in drawings) else "draw"

    @property
    def by_host(self) -> bool:
        """True if the host chooses a token: no step can run ahead of this one."""
        return any(drawing.host for drawing in self.drawings)

    @property
    def last_position(self) -> int:
        """The largest position that a row may have."""
        return max(run.end + run.drafted for run in self.runs) - 1


class AllLogits(Batch):
    """Batch whose rows are all outputs, and whose logits are all wanted."""

    @property
    def output(self) -> str:
        """Output that the plan must have."""
        return "all"


class HiddenRows(Batch):
    """Batch without outputs, whose rows after the final norm are wanted."""

    @property
    def output(self) -> str:
        """Output that the plan must have."""
        return "hidden"


class Builder:
    """Makes a batch, run by run, and gives every run its pages and its slots."""

    def __init__(self, executor: Executor, pages: PagePool, slots: StateSlots) -> None:
        self._executor, self._pages, self._slots = executor, pages, slots
        self._outputs: list[Run] = []
        self._others: list[Run] = []
        self._chunks: list[Run] = []
        self._batch = Batch([], [], pages.needed(executor.n_ctx))
        self.rows_left, self.singles_left, self.outs_left = executor.max_rows, executor.max_singles, executor.max_outs

    def __len__(self) -> int:
        return len(self._outputs) + len(self._others) + len(self._chunks)

    def add(self, sequence: Sequence, tokens: AnySequence[int], *drawings: Drawing, keep_states: bool = False) -> bool:
        """Add a run after the tokens that were submitted. Return False if it has no room in this step.

        The last rows are outputs, one for each of the ``drawings``. With ``keep_states`` the run leaves the states in
        another slot than the sequence's, and the caller becomes the owner of that old slot. The sequence has a seat.
        Raises PoolEmptyError if a page or a slot is missing; then there is no run, and the sequence is as it was but
        for pages that it may have taken already.
        """
        n = len(tokens)
        if n > self.rows_left or (n == 1 and not self.singles_left) or len(drawings) > self.outs_left:
            return False
        begin, end = sequence.submitted, sequence.submitted + n
        self._own_pages(sequence, begin, end)
        if not self._has_table(sequence):
            return False
        slot, slot_out = self._own_slot(sequence, keep_states)
        sequence.submitted = end
        self._take(Run(sequence, begin, tokens, slot, slot_out, drawings))
        return True

    def add_draft(self, sequence: Sequence, position: int, token: int, drafted: int = 0) -> bool:
        """Add a row of the block that drafts, beyond what is computed. Return False if it has no room in this step.

        ``drafted``: as in ``Run``. All runs of the step are such rows. What the sequence says of itself stays as it is,
        and so do its states. Raises PoolEmptyError if a page is missing.
        """
        if not self.outs_left:
            return False
        self._own_pages(sequence, position, position + drafted + 1)
        if not self._has_table(sequence):
            return False
        self._batch.drafts = True
        self._take(Run(sequence, position, [token], 0, 0, (Drawing(ARG_MAX),), drafted))
        return True

    def batch(self) -> Batch:
        """Return the batch of all runs."""
        self._batch.runs = [*self._outputs, *self._others, *self._chunks]
        return self._batch

    def _has_table(self, sequence: Sequence) -> bool:
        """Return True if the step has room for what the sequence's page table lacks."""
        missing = len(sequence.pages) - sequence.tabled
        return len(self._batch.page_writes) + missing <= self._executor.max_page_writes

    def _take(self, run: Run) -> None:
        """Take a run into the step, and complete the page table of its sequence."""
        sequence, batch, n = run.sequence, self._batch, len(run.tokens)
        assert sequence.seat is not None
        at = sequence.seat * batch.table
        batch.page_writes += [(at + i, sequence.pages[i]) for i in range(sequence.tabled, len(sequence.pages))]
        sequence.tabled = len(sequence.pages)
        (self._chunks if n > 1 else self._outputs if run.drawings else self._others).append(run)
        self.rows_left -= n
        self.singles_left -= n == 1
        self.outs_left -= len(run.drawings)

    def _own_pages(self, sequence: Sequence, begin: int, end: int) -> None:
        """Give the sequence pages for positions up to ``end`` that it may write from ``begin`` on."""
        pool, pages = self._pages, sequence.pages
        for i in range(begin // pool.PAGE, len(pages)):
            if pool.shared(pages[i]):
                own = pool.take()
                try:
                    if i * pool.PAGE < begin:
                        self._executor.copy_page(pages[i], own)
                except BaseException:
                    pool.release(own)
                    raise
                self._batch.pages.append(pages[i])
                pages[i] = own
                sequence.tabled = min(sequence.tabled, i)
        while len(pages) * pool.PAGE < end:
            pages.append(pool.take())

    def _own_slot(self, sequence: Sequence, keep: bool) -> tuple[int, int]:
        """Return the slot to read and the slot to write, which the sequence owns alone."""
        if not self._executor.recurrent:
            return 0, 0
        old = sequence.slot
        if old is not None and not keep and not self._slots.shared(old):
            return old, old
        sequence.slot = new = self._slots.take()
        if old is None:
            assert sequence.submitted == 0, "the states before this position are lost"
            return new, new
        if not keep:
            self._batch.slots.append(old)
        return old, new


class Described(NamedTuple):
    """A batch as ``decode_step`` takes it: records of ``kernels/params.h``."""

    rows: NDArray[np.void]
    outs: NDArray[np.uint32]
    page_writes: NDArray[np.void]
    draws: NDArray[np.void] | None
    n_single: int


#: Writes biases and mask of output i into their buffers; returns where they stand: (bias_at, mask_at or None).
Place = Callable[[int, Drawing], tuple[int, int | None]]


def describe(batch: Batch, dtypes: Mapping[str, np.dtype[Any]], place: Place | None = None) -> Described:
    """Write a batch down. ``dtypes`` has those of Row, PageWrite and, for the output "draw", Draw."""
    rows = np.zeros(batch.n_rows, dtypes["Row"])
    at = 0
    n_single = batch.n_single
    singles = batch.runs[:n_single]
    if singles:
        head = rows[:n_single]
        head["pos"] = [run.begin for run in singles]
        head["begin"] = range(n_single)
        head["end"] = range(1, n_single + 1)
        head["pages"] = [run.sequence.seat * batch.table for run in singles]  # type: ignore[operator]
        head["slot"] = [run.slot for run in singles]
        head["slot_out"] = [run.slot_out for run in singles]
        head["token"] = [run.tokens[0] for run in singles]
        head["drafted"] = [run.drafted for run in singles]
        at = n_single
    for run in batch.runs[n_single:]:
        end = at + len(run.tokens)
        part = rows[at:end]
        part["pos"] = np.arange(run.begin, run.end)
        part["begin"], part["end"] = at, end
        part["pages"] = (run.sequence.seat or 0) * batch.table
        part["slot"], part["slot_out"] = run.slot, run.slot_out
        part["token"] = run.tokens
        at = end
    draws = _draws(batch, dtypes["Draw"], place) if batch.output == "draw" else None
    writes = np.array(batch.page_writes, dtypes["PageWrite"])
    return Described(rows, _outs(batch), writes, draws, n_single)


def _outs(batch: Batch) -> NDArray[np.uint32]:
    """Return the rows that are outputs."""
    found, end = list[int](), 0
    for run in batch.runs:
        end += len(run.tokens)
        found += range(end - len(run.drawings), end)
    return np.array(found, np.uint32)


def _draws(batch: Batch, dtype: np.dtype[Any], place: Place | None) -> NDArray[np.void]:
    """Write down how tokens are chosen. A token that the host chooses is drawn as an arg max."""
    draws = []
    for i, (drawing, (run, position)) in enumerate(zip(batch.drawings, batch.drawn_from, strict=True)):
        pages = (run.sequence.seat or 0) * batch.table
        if drawing.host:
            draws.append(draw_values(ARG_MAX, position, 0, pages=pages))
            continue
        bias_at, mask_at = place(i, drawing) if place else (0, None)
        at = {"pages": pages, "bias_at": bias_at, "n_logprobs": drawing.n_logprobs}
        draws.append(draw_values(drawing.params, position, drawing.key, mask_at=mask_at, **at))
    return draw_records(dtype, draws)
