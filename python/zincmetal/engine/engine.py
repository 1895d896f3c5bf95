"""Runs batches of rows on a device: ids in, chosen tokens out. Knows no text and no queue.

The life of a decode step:

1. ``submit(batch)`` takes the program whose shape holds the batch (``device/programs.py``).
2. ``core.decode_step`` writes the description of the step, one place of a ring in memory that host and device share,
   and submits the program, one command buffer.
3. The first kernel, ``begin_step``, copies the description to the buffers that the other kernels read. A row may name
   an output of the step before instead of a token: so a step is described before the step before it has ended.
4. The device computes embedding, layers and logits. Keys and values go to pages, recurrent states to slots.
5. The last kernel chooses a token for each output. It writes the token where the next step finds it, and the result
   where the host reads it. If rows are drafts, another one counts those that are right, to the same places.
6. ``collect()`` waits for the oldest step and returns its results.

Two steps may be in flight. One thread steps: the thread of :mod:`zincmetal.engine.step_loop`, or the one that took the
engine by ``exclusive``.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as AnySequence
from contextlib import suppress
from dataclasses import asdict
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..device.buffers import Buffers
from ..device.host_routed import HostRoutedPlan
from ..device.programs import Program, Programs
from ..errors import (
    CLOSED,
    FORKED,
    ContextFullError,
    DeviceError,
    OutOfMemoryError,
    UsageError,
    ZincError,
    abbreviate,
)
from ..graph.ops import HIDDEN, KV_CACHES, LOGPROBS, NEXT, PAGED, RECURRENT, RESULTS, STEP, State
from ..plan.addresses import Room
from ..plan.chunks import LOGITS_ROWS, MAX_SINGLES, VERIFY_ROWS, StepShape, chunk_shape, decode_shape, verify_shape
from ..plan.planner import Planner
from .batch import Batch, Choice, Described, describe, id_of
from .host_times import HostTimes
from .loaded import Loaded
from .pages import PagePool, Seats, StateSlots
from .places import Places
from .prefix_cache import PrefixCache

NOT_FINITE = (
    "the model's logits are not finite: the file is damaged, or the device failed; check the file, and load it again"
)
LARGEST_HALF = 65504
SESSION_SEATS = 8  # page tables for sessions, beside those of requests
TEXT_SEATS = 24  # page tables for the texts of a step that makes vectors
_log = logging.getLogger("zincmetal.engine")
_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """Loaded model with the memory of all its sequences. It is the executor of a scheduler: see ``batch.Executor``.

    ``pages`` and ``slots`` are the pools of K/V pages and of recurrent states, ``free_seats`` the page tables. The
    pools grow up to what the device's memory allows.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.core, self.device, self.file, self.planner = loaded.core, loaded.device, loaded.file, loaded.planner
        self.config = loaded.planner.config
        self._most = loaded.most_room()
        first, n = self.planner.first_room(), loaded.max_sequences
        seats = n + SESSION_SEATS + TEXT_SEATS
        first = Room(min(first.pages, self._most.pages), min(first.slots, self._most.slots), seats)
        self.planner.resize(first)
        self.buffers = Buffers(self.device, loaded.weights, self.planner.addresses)
        self.programs = Programs(self.core, self.device, self.planner, self.buffers, loaded.fallbacks)
        room = self.planner.addresses.room
        self.pages, self.slots = PagePool(room.pages), StateSlots(room.slots)
        self.free_seats, self.session_seats = Seats(n), Seats(SESSION_SEATS, first=n)
        self.text_seats = Seats(TEXT_SEATS, first=n + SESSION_SEATS)
        self._structs = {name: self.core.params_dtype(name) for name in ("Row", "PageWrite", "Draw")}
        self._places = Places(self.buffers, self.core, self.config.n_vocab)
        ranked = self.buffers.records(LOGPROBS.name, self.core.params_dtype("Logprobs"))
        self._logprobs = ranked.reshape(self.core.shapes()["STEP_RING"], -1)
        self._submitted = 0
        self.host_times = HostTimes()
        self._rows_alone: list[NDArray[np.float32]] = []  # the hidden rows of a step that ran row by row
        self._ready: deque[_Submitted] = deque()
        self._unusable: tuple[type[ZincError], str] | None = None
        self._freed = self._forked = False
        self._set_facts()
        step, *described, results = (self.buffers.buffer(state.name) for state in (STEP, *NEXT, RESULTS))
        rows, outs, pages, draws = described[1:]
        entries = self.buffers.buffer("pages").nbytes // 4
        self.steps = self.core.Steps(
            self.device, step, described[0], rows, outs, pages, draws, results, self.config.n_vocab, entries
        )
        _ENGINES.add(self)
        self.draws = self.programs.draws
        self._why_host_routed = self.programs.get(decode_shape(1), 0).why_host_routed
        self.runs_ahead = bool(self.device.info["asynchronous"]) and not self._why_host_routed
        if self._why_host_routed:
            _log.warning("%s: its experts are routed by the host, which is slow", self._why_host_routed)

    def _set_facts(self) -> None:
        """Set the facts that a scheduler asks for."""
        target, room = self.planner.target, self.planner.addresses.room
        self.n_ctx, self.n_vocab, self.page = self.config.n_ctx, self.config.n_vocab, target.page
        self.max_rows, self.max_singles, self.max_outs = self.planner.max_rows, MAX_SINGLES, MAX_SINGLES
        self.max_page_writes = target.max_page_writes(self.n_ctx)
        self.max_biases = self._places.biases_each(self.max_outs)
        self.recurrent = self.config.recurrent
        self.seats = self.loaded.max_sequences
        self.pages_now, self.pages_most = room.pages, max(room.pages, self._most.pages)
        self.slots_now, self.slots_most = room.slots, max(room.slots, self._most.slots)

    # ---- steps -------------------------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> None:
        """Start a step. Raises UsageError if two are in flight, DeviceError if the device fails."""
        self.check_usable()
        self._rows_alone = []
        at = perf_counter()
        described = self.describe(batch)
        at = self.host_times.add("record", at)
        program = self.program(shape_of(batch), batch.last_position)
        at = self.host_times.add("plan", at)
        n_top = [drawing.n_logprobs for drawing in batch.drawings]
        n_top = n_top if any(n_top) else []
        if isinstance(program.compiled, HostRoutedPlan) or program.plan.shape.rows < batch.n_rows:
            self._ready.append(self._run_now(program, described, n_top))
        else:
            number = self.core.decode_step(self.steps, program.compiled, *described)
            self._ready.append(_Submitted(number, n_top))
        self.host_times.add("submit", at)

    def describe(self, batch: Batch) -> Described:
        """Write a batch down as ``decode_step`` takes it, with its biases and masks in shared memory."""
        described = describe(batch, self._structs, self._places.of(self._submitted))
        self._submitted += 1
        if batch.output == "all":
            return described._replace(outs=np.arange(batch.n_rows, dtype=np.uint32))
        return described

    def collect(self) -> AnySequence[Any]:
        """Wait for the oldest step in flight. Return a ``Choice`` for each of its outputs: a record, or the tuple.

        If the step fails, all steps in flight are dropped. An interrupt leaves the step in flight.
        """
        if not self._ready:
            raise UsageError("no step is in flight")
        submitted = self._ready[0]
        results = submitted.results
        if results is None:
            try:
                at = perf_counter()
                found = self.core.collect_step(self.steps)
                self.host_times.add("wait", at)
                self.host_times.waits += 1
                results = self._with_top(found, submitted)
            except ZincError:
                self._ready.clear()
                raise
        self._ready.popleft()
        return results

    def _with_top(self, results: NDArray[np.void], submitted: _Submitted) -> AnySequence[Any]:
        """Add the most probable tokens to results, where they are wanted, from the place that the step wrote to."""
        if not submitted.n_top:
            return list(results)
        place = submitted.number % self._logprobs.shape[0]
        choices = [Choice(*result.item()) for result in results]
        for i, n in enumerate(submitted.n_top):
            if n:
                choices[i] = choices[i]._replace(top=_top(self._logprobs[place, i]))
        return choices

    def drop(self) -> None:
        """Wait for all steps in flight and forget their results. Raises nothing."""
        self._ready.clear()
        if not (self._freed or self._forked):
            with suppress(DeviceError):  # the device keeps a failure, and the next step tells it
                self.steps.drop()

    @property
    def ran_at_once(self) -> bool:
        """True if the step that was submitted last has run in pieces: its choices are no longer on the device."""
        return bool(self._ready) and self._ready[-1].results is not None

    @property
    def in_flight(self) -> int:
        """Steps that were submitted and not collected."""
        return len(self._ready)

    def program(self, shape: StepShape, position: int = 0) -> Program:
        """Return the program for steps of a shape whose rows lie at up to ``position``."""
        return self.programs.get(shape, position)

    def logits(self, n: int = 1) -> NDArray[np.float32]:
        """Return the logits of the last step's first ``n`` outputs, float32 [n, vocab], before another is submitted."""
        return self.buffers.floats("logits", n * self.config.n_vocab).reshape(n, self.config.n_vocab)

    @property
    def hidden_width(self) -> int:
        """Floats of a row after the final norm and the projections behind it."""
        return self.planner.hidden_bytes(1) // 4

    def hidden(self, n: int) -> NDArray[np.float32]:
        """Return the last step's first ``n`` rows after the final norm, float32 [n, width]. Its output was "hidden"."""
        if self._rows_alone:
            return np.stack(self._rows_alone)
        return self.buffers.floats(HIDDEN.name, n * self.hidden_width).reshape(n, self.hidden_width)

    def host_logits(self, output: int) -> NDArray[np.float32]:
        """Return the logits of an output of the step that was collected last, float32 [vocab]. Nothing is in flight."""
        found: NDArray[np.float32] = self.logits(output + 1)[output]
        return found

    def _run_now(self, program: Program, d: Described, n_top: list[int]) -> _Submitted:
        """Run a step whose experts the host routes, or row by row where the device has no kernels for many rows."""
        if program.plan.shape.rows >= d.rows.size:
            return _Submitted(0, n_top, self._run_one(program, d, n_top))
        if not self.config.causal:
            raise DeviceError(
                "this device cannot make kernels for many rows, and this model needs all of a text at once"
            )
        found, out_of = dict[int, Any](), {int(row): output for output, row in enumerate(d.outs)}
        for i, one in enumerate(_row_by_row(d, out_of, program.plan.shape.outs)):
            wanted = n_top[out_of[i] : out_of[i] + 1] if i in out_of else []
            found.update(enumerate(self._run_one(program, one, wanted), i))
            if program.plan.shape.output == "hidden":
                self._rows_alone.append(self.buffers.floats(HIDDEN.name, self.hidden_width).copy())
        return _Submitted(0, n_top, _accepting(d, [found[int(row)] for row in d.outs]))

    def _run_one(self, program: Program, d: Described, n_top: list[int]) -> AnySequence[Any]:
        if isinstance(program.compiled, HostRoutedPlan):
            number, results = program.compiled.step(self.steps, *d)
        else:
            number = self.core.decode_step(self.steps, program.compiled, *d)
            results = self.core.collect_step(self.steps)
        return self._with_top(results, _Submitted(number, n_top))

    # ---- pages and slots ---------------------------------------------------------------------------------------

    def lacking(self) -> tuple[int, int]:
        """Return (pages, slots): 1 for a pool that has none left, else 0."""
        return int(not self.pages.free), int(self.recurrent and not self.slots.free)

    @property
    def can_draft(self) -> bool:
        """True if the file has a block that drafts."""
        return self.planner.can_draft

    def load_block(self) -> None:
        """Let steps prepare and run the block that drafts, from now on. Nothing may be in flight.

        Pages have more contents then: what was read of them before does not fit, and what they hold lacks the block's
        keys and values. Raises UsageError without such a block, OutOfMemoryError if it does not fit beside the pools.
        """
        if self.config.drafts:
            return
        before, room = self.planner, self.planner.addresses.room
        planner = self.loaded.with_block()
        planner.resize(room)
        self._plan_by(planner)
        try:
            if room.pages > self._most.pages:
                raise OutOfMemoryError(
                    f"draft: the pools have {room.pages} pages already, and with the block that drafts the memory has "
                    f"room for {self._most.pages}; load the model again and ask for it first, or choose 'lookup'"
                )
            for state in self._pools():
                self.buffers.buffer(state.name)
        except BaseException:
            self._plan_by(before)
            raise

    def _plan_by(self, planner: Planner) -> None:
        """Make programs by another planner of the file."""
        self.planner = self.loaded.planner = planner
        self.config = planner.config
        self.buffers.place_by(planner.addresses)
        self.programs.plan_by(planner)
        self._most = self.loaded.most_room()
        self._set_facts()

    def make_room(self, pages: int, slots: int, cache: PrefixCache | None) -> bool:
        """Let the pools that lack something grow, or evict so much from the cache. Return False if neither can be."""
        if self.grow(2 * self.pages_now if pages else 0, 2 * self.slots_now if slots else 0):
            return True
        return cache is not None and cache.evict(pages, slots)

    def grow(self, pages: int, slots: int) -> bool:
        """Let the pools grow to these sizes, or to less. Return False if there is no memory."""
        room = self.planner.addresses.room
        wanted = Room(
            max(room.pages, min(pages, self.pages_most)), max(room.slots, min(slots, self.slots_most)), room.seats
        )
        if wanted == room:
            return False
        self.programs.clear()
        self.planner.resize(wanted)
        try:
            for state in self._pools():
                self.buffers.grow(state.name, self.planner.addresses.sizes()[state.name])
        except BaseException as error:
            self.planner.resize(room)  # what has grown already is larger than it needs to be
            if isinstance(error, DeviceError):
                return False
            raise
        self._set_facts()
        self.pages.grow(wanted.pages)
        self.slots.grow(wanted.slots)
        return True

    def copy_page(self, source: int, to: int) -> None:
        """Copy keys, values and ids of a page."""
        self._copy(self._of_page(), source, to)

    def copy_slot(self, source: int, to: int) -> None:
        """Copy recurrent states."""
        self._copy(self._of_slot(), source, to)

    def read_page(self, page: int) -> bytes:
        """Return the contents of a page."""
        return self._read(self._of_page(), page)

    def write_page(self, page: int, data: bytes) -> None:
        """Set the contents of a page."""
        self._write(self._of_page(), page, data)

    def read_slot(self, slot: int) -> bytes:
        """Return the contents of a slot."""
        return self._read(self._of_slot(), slot)

    def write_slot(self, slot: int, data: bytes) -> None:
        """Set the contents of a slot."""
        self._write(self._of_slot(), slot, data)

    @property
    def page_bytes(self) -> int:
        """Bytes of the contents of a page."""
        return sum(nbytes for _, nbytes in self._of_page())

    @property
    def slot_bytes(self) -> int:
        """Bytes of the contents of a slot."""
        return sum(nbytes for _, nbytes in self._of_slot())

    def _copy(self, pieces: AnySequence[tuple[str, int]], source: int, to: int) -> None:
        """Copy all pieces at once: Metal does so in one command buffer."""
        buffers = ((self.buffers.buffer(name), nbytes) for name, nbytes in pieces)
        self.device.copy([(of, to * nbytes, of, source * nbytes, nbytes) for of, nbytes in buffers])

    def _read(self, pieces: AnySequence[tuple[str, int]], i: int) -> bytes:
        return b"".join(self.buffers.buffer(name).read(i * nbytes, nbytes).tobytes() for name, nbytes in pieces)

    def _write(self, pieces: AnySequence[tuple[str, int]], i: int, data: bytes) -> None:
        view, at = memoryview(data), 0
        for name, nbytes in pieces:
            self.buffers.buffer(name).write(np.frombuffer(view[at : at + nbytes], np.uint8), i * nbytes)
            at += nbytes

    def _pools(self) -> list[State]:
        """Return the states that pages and slots hold, in the order of their contents."""
        return [state for state in self.planner.addresses.states if state.kind in (*PAGED, *RECURRENT)]

    def _of_page(self) -> list[tuple[str, int]]:
        """Return (buffer, bytes of a page) of all that a page holds."""
        sizes, n = self.planner.addresses.states, self.planner.addresses.room.pages
        return [(s.name, sizes[s] // n) for s in self._pools() if s.kind not in RECURRENT]

    def _of_slot(self) -> list[tuple[str, int]]:
        """Return (buffer, bytes of a slot) of all that a slot holds."""
        sizes, n = self.planner.addresses.states, self.planner.addresses.room.slots
        return [(s.name, sizes[s] // n) for s in self._pools() if s.kind in RECURRENT]

    # ---- life --------------------------------------------------------------------------------------------------

    def profile(self) -> dict[str, Any]:
        """Return the cost of running so far: steps, tokens, command buffers, dispatches, barriers, device seconds.

        The host's seconds and waits are those of :class:`HostTimes`. ``host_routed`` counts the steps whose experts the
        host routed, ``host_routed_why`` names the reason.
        ``replaced`` has the kernels that the device could not make, with the reason and the replacements.
        """
        replaced = self.loaded.fallbacks.profile()
        return {**self.counts(), "host_routed_why": self._why_host_routed, "replaced": replaced}

    def counts(self) -> dict[str, Any]:
        """Return the numbers of :meth:`profile` alone. Any thread may ask at any moment."""
        return {
            **self.steps.counters,
            **self.host_times.facts(),
            "host_routed": asdict(self.programs.counters),
        }

    def free(self) -> None:
        """Give the device memory and the file back. Nothing may be in flight. Freeing twice is fine."""
        self._unusable = self._unusable or (UsageError, CLOSED)
        if self._freed or self._forked:
            return
        self._freed = True
        self.steps.close()
        self.programs.clear()
        self.buffers.close()
        self.loaded.free()

    def refuse(self) -> None:
        """Let every later call raise UsageError: the model is being closed."""
        self._unusable = self._unusable or (UsageError, CLOSED)

    @property
    def closed(self) -> bool:
        """Whether the engine was closed."""
        return self._unusable == (UsageError, CLOSED)

    def left_by_fork(self) -> None:
        """Mark this engine as the copy in a forked child: every later call raises DeviceError."""
        self._forked = True
        self._unusable = self._unusable or (DeviceError, FORKED)

    def check_usable(self) -> None:
        """Raise UsageError if the model is closed, DeviceError in the child of a fork."""
        if self._unusable is not None:
            kind, why = self._unusable
            raise kind(why)

    def check_file(self) -> None:
        """Raise FileChangedError if the mapped file is no longer what was loaded."""
        if not self._freed:
            self.file.check()

    def check_prompt(self, ids: AnySequence[int]) -> None:
        """Raise UsageError if there are no ids or wrong ids, ContextFullError if there are too many."""
        if not ids:
            raise UsageError("the prompt has no tokens; pass some text, or a BOS token")
        n_vocab = self.config.n_vocab
        wrong = next((t for t in ids if not 0 <= t < n_vocab), None)
        if wrong is not None:
            raise UsageError(f"token id {abbreviate(wrong)} is outside the vocabulary of {n_vocab}")
        if len(ids) > self.config.n_ctx:
            raise ContextFullError(
                f"the prompt has {len(ids)} tokens and the context {self.config.n_ctx}; "
                f"load the model with a larger context"
            )

    def not_finite(self, pages: AnySequence[int] = (), words: str = NOT_FINITE) -> DeviceError:
        """Make the error for logits that are not finite, with the remedy if the sequence's ``pages`` show one."""
        layer = self._overflowed(pages)
        if layer is None:
            return DeviceError(words)
        return DeviceError(
            f"{words}; keys or values of layer {layer} are beyond the range of kv={self.loaded.kv!r}: "
            f"load the model with kv='f32', which holds them"
        )

    def _overflowed(self, pages: AnySequence[int]) -> int | None:
        """Return the first layer whose keys or values are beyond the range of halves, in a type smaller than float32.

        Blocks of q8_0 may hold such numbers, but prompts multiply them as halves.
        """
        kv, sizes = self.loaded.kv, dict(self._of_page())
        if kv == "f32":
            return None
        for state in self._pools():
            if state.kind not in KV_CACHES:
                continue
            nbytes = sizes[state.name]
            for page in pages:
                held = self.buffers.buffer(state.name).read(page * nbytes, nbytes)
                halves = held.view(np.float16) if kv == "f16" else held.reshape(-1, 34)[:, :2].copy().view(np.float16)
                if (np.abs(halves.astype(np.float32)) > LARGEST_HALF / (1 if kv == "f16" else 127)).any():
                    return state.layer
        return None


class _Submitted(NamedTuple):
    """Step in flight. ``n_top``: the ranked tokens that its outputs want, or nothing. ``results`` if it ran at once."""

    number: int
    n_top: AnySequence[int]
    results: AnySequence[Any] | None = None


def _top(found: np.void) -> tuple[tuple[int, float], ...]:
    """Return the most probable tokens of a ``Logprobs``, (id, log-probability) each."""
    n = int(found["n"])
    return tuple(zip(found["id"][:n].tolist(), found["logprob"][:n].tolist(), strict=True))


def shape_of(batch: Batch) -> StepShape:
    """Return the smallest shape that holds a batch."""
    n, n_out = batch.n_rows, len(batch.drawings)
    if batch.output == "all":
        return chunk_shape(n, 0, n, "all")
    if batch.n_single == n and n_out in (0, n):
        return decode_shape(n, batch.output)
    if batch.verifies and n <= VERIFY_ROWS[-1]:
        return verify_shape(n, batch.output)
    return chunk_shape(n, batch.n_single, n_out, batch.output)


def _row_by_row(d: Described, out_of: Mapping[int, int], n_out: int) -> list[Described]:
    """Cut a step into steps of one row, with ``n_out`` outputs each. ``out_of``: the output of a row that is one."""
    steps = []
    for i in range(d.rows.size):
        row = d.rows[i : i + 1].copy()
        if row["begin"][0] < i:  # the row before has left the states where it goes on
            row["slot"] = row["slot_out"]
        row["begin"], row["end"] = 0, 1
        draws = None if d.draws is None else d.draws[out_of.get(i, 0) :][:1]
        steps.append(Described(row, np.zeros(n_out, np.uint32), d.page_writes[: None if i == 0 else 0], draws, 1))
    return steps


def _accepting(d: Described, choices: list[Any]) -> list[Any]:
    """Count what the kernel ``accept_drafts`` counts, for outputs whose rows were steps of their own."""
    n = 0
    for i, row in reversed(list(enumerate(d.outs.tolist()))):
        right = row + 1 < d.rows["end"][row] and d.rows["token"][row + 1] == id_of(choices[i])
        n = n + 1 if right else 0
        if isinstance(choices[i], Choice):
            choices[i] = choices[i]._replace(accepted=n)
        else:
            choices[i]["accepted"] = n
    return choices


def _forget_all() -> None:
    """Mark all engines as unusable in the child of a fork: their devices' threads and connections are the parent's."""
    for engine in list(_ENGINES):
        engine.left_by_fork()


os.register_at_fork(after_in_child=_forget_all)

__all__ = ["LOGITS_ROWS", "NOT_FINITE", "Engine", "shape_of"]
