"""Session: one sequence that its caller steps. For notebooks, tests, benches and copies of a sequence.

A session has the engine alone while it is open: ``with model.session() as session``. The steps of other callers wait.

States of a step that runs ahead:

    idle       decode(t)           ->  idle        the step has run
    idle       decode(t, ahead)    ->  in flight   t's step has run, the step of its token is submitted
    in flight  decode(that token)  ->  idle        the step in flight was taken over (with ahead: in flight again)
    in flight  settle()            ->  idle        waits; the token in flight is in the sequence now
    idle       rewind(n)           ->  idle        the tokens from n on are forgotten
    in flight  anything else       ->  UsageError  settle first

A step that fails or is interrupted leaves recurrent states in between two tokens: then the sequence is forgotten.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as AnySequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import arguments
from ..errors import ContextFullError, DeviceError, OutOfMemoryError, UsageError, ZincError, typed_errors
from ..plan.chunks import LOGITS_ROWS, StepShape, chunk_shape, decode_shape, prompt_shapes
from ..sampling.params import SamplingParams
from .batch import AllLogits, Batch, Builder, Drawing
from .engine import SESSION_SEATS, Engine
from .pages import PoolEmptyError
from .prefix_cache import Mark, Match, PrefixCache
from .scores import following_logprobs
from .sequence import Sequence, common
from .snapshot import Snapshot

if TYPE_CHECKING:
    from types import TracebackType

    from ..device.buffers import Progress
    from ..device.programs import Program
    from ..sampling.sampler import Sampler

T = TypeVar("T")
GREEDY = Drawing(SamplingParams())
BY_HOST = Drawing(SamplingParams(), host=True)
OF_OUTPUT = {"argmax": GREEDY, "draw": Drawing(SamplingParams(temperature=1.0)), "none": None}


class Synced(NamedTuple):
    """Result of reading a prompt: the arg max after it (-1 if there is none), its computed tokens, its seconds."""

    best: int
    computed: int
    seconds: float


class Session:
    """One sequence, and the engine that runs its steps. ``cache``, if any, gives and takes prefixes."""

    def __init__(self, engine: Engine, cache: PrefixCache | None = None) -> None:
        self.engine, self._cache = engine, cache
        self.sequence = Sequence()
        self._in_flight: deque[Batch] = deque()
        self._ahead: int | None = None  # the token whose step is in flight
        self._forks: set[Session] = set()  # all that are not closed; they share it
        self._over = False  # the step thread has the engine again

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def ids(self) -> list[int]:
        """Tokens whose state is there."""
        return self.sequence.ids

    @property
    def length(self) -> int:
        """Number of tokens whose state is there."""
        return self.sequence.computed

    # ---- single steps ------------------------------------------------------------------------------------------

    @typed_errors
    def sync(self, ids: list[int], output: str = "argmax", progress: Progress | None = None) -> Synced:
        """Make ``ids``, the whole prompt, the sequence. Tokens that it begins with, or the cache has, are not computed.

        ``progress(done, total)`` counts the tokens to compute. The time of making programs does not count. Raises
        UsageError for an empty prompt or a wrong id, ContextFullError for too many ids.
        """
        self._check_open()
        self.engine.check_prompt(ids)
        self.take_prefix(ids)
        left = ids[self.length :]
        for shape in {*prompt_shapes(len(left), output, self.engine.max_rows)}:
            self.engine.program(shape, len(ids) - 1)
        began = time.perf_counter()
        best = self.prefill(left, output, progress)
        return Synced(best, len(left), time.perf_counter() - began)

    def take_prefix(self, ids: AnySequence[int]) -> None:
        """Make the longest prefix of ``ids`` that is computed the sequence: of this sequence, or of the cache."""
        kept = self.reusable(ids)
        found = self._cache.match(ids[: len(ids) - 1]) if self._cache else None
        if found and found.length > kept:
            self._take(ids, found)
            return
        if found:
            found.release(self.engine.pages, self.engine.slots)
        self.rewind(kept)

    def _take(self, ids: AnySequence[int], found: Match) -> None:
        """Make what the cache has of ``ids`` the sequence."""
        self._forget()
        sequence = self.sequence
        sequence.ids, sequence.pages, sequence.slot = list(ids[: found.length]), found.pages, found.slot
        sequence.computed = sequence.submitted = found.length

    def reusable(self, ids: AnySequence[int]) -> int:
        """Return the number of a prompt's first tokens whose state this sequence holds. The last never counts."""
        mine = self.sequence.ids
        kept = min(common(mine, ids), len(ids) - 1)
        return 0 if self.engine.recurrent and kept < len(mine) else kept

    @typed_errors
    def prefill(self, ids: AnySequence[int], output: str = "argmax", progress: Progress | None = None) -> int:
        """Append ids in steps of many tokens, the last token alone. Return its arg max, or -1 for another output."""
        ids, done, best = list(ids), 0, -1
        while done < len(ids):
            if progress:
                progress(done, len(ids))
            n = min(len(ids) - 1 - done, self.engine.max_rows) or 1
            last = done + n == len(ids)
            best, done = self.step(ids[done : done + n], output if last else "none"), done + n
        if progress:
            progress(done, len(ids))
        return best

    def step(self, ids: AnySequence[int], output: str = "argmax") -> int:
        """Append ids in one step. Return the arg max after the last if it is a single one, else -1."""
        self._refuse_in_flight()
        self._check_ids(ids)
        self._submit(ids, output if len(ids) == 1 else "none")
        return self._collect(ids)

    def decode(self, token: int, ahead: bool = False, output: str = "argmax") -> int:
        """Append a token. Return the arg max after it, or -1 for another output.

        ``ahead``: also submit the next step, which takes this step's token. Only the output "argmax" can.
        """
        self._recover()
        if self._ahead is None:
            self._check_ids([token])
            self._submit([token], output)
        elif token != self._ahead or output != "argmax":
            self._refuse_in_flight()
        self._ahead = None
        ahead = ahead and self.engine.runs_ahead and self.sequence.submitted < self.engine.n_ctx
        if ahead:
            ahead = self._submit_ahead(output)
        best = self._collect([token])
        if ahead:
            self._ahead = best
        return best

    def sample(self, sampler: Sampler) -> int:
        """Draw the next token, by the host, from the logits of the last step."""
        try:
            return sampler.sample(self.last_logits(), self.ids)
        except DeviceError as error:
            raise self.engine.not_finite(self.sequence.pages, str(error)) from error

    def last_logits(self) -> NDArray[np.float32]:
        """Return the logits after the last token, float32 [vocab]. Copy them: the next step may overwrite them."""
        return self.engine.host_logits(0)

    def rewind(self, length: int) -> None:
        """Shorten the sequence to its first ``length`` tokens. With recurrent layers ``length`` can only be 0."""
        self._refuse_in_flight()
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot rewind to {length}: the sequence has {self.length} tokens")
        if length == self.length:
            return
        if length == 0:
            self._forget()
            return
        if self.engine.recurrent:
            raise UsageError(f"the states of {self.length} tokens cannot be rewound to {length}, only to 0")
        pages = self.sequence.pages
        kept = self.engine.pages.needed(length)
        self.engine.pages.release_all(pages[kept:])
        del pages[kept:], self.sequence.ids[length:]
        self.sequence.computed = self.sequence.submitted = length
        self.sequence.tabled = min(self.sequence.tabled, kept)

    def settle(self) -> None:
        """End the steps in flight. The token of a step that ran ahead joins the sequence."""
        self._recover()
        if self._ahead is None:
            return
        token, self._ahead = self._ahead, None
        try:
            self._collect([token])
        except DeviceError:  # the device keeps a failure, and the next step tells it
            self._drop()

    def close(self) -> None:
        """Give the sequence's memory back. What is computed goes to the cache."""
        if self._over:
            return
        with suppress(DeviceError):
            self.settle()
        if self._cache and not self.engine.closed:
            self._keep()
        self._forget()
        self._forks.discard(self)

    def end(self) -> None:
        """Close, on the thread that steps, whatever an interrupt or the caller has left in flight or open.

        No later call can step.
        """
        for each in (self, *self._forks):
            try:
                each.settle()
            except ZincError:
                each._drop()  # noqa: SLF001  # a fork is a session, too
            each.close()
            each._over = True  # noqa: SLF001
        self.engine.drop()
        self.engine.session_seats.reset()

    def _keep(self) -> None:
        """Store the sequence in the cache, with its states."""
        sequence, cache = self.sequence, self._cache
        assert cache
        if not sequence.computed:
            return
        cache.store(sequence.ids, sequence.pages, sequence.computed)
        if sequence.slot is not None:
            cache.checkpoint(sequence.ids, sequence.slot, Mark.TURN)

    # ---- the whole ------------------------------------------------------------------------------------------

    @typed_errors
    def logits(self, ids: AnySequence[int]) -> NDArray[np.float32]:
        """Return the logits after every position of ``ids``: float32 [len(ids), vocab], from an empty sequence."""
        ids = arguments.token_ids(ids)
        out = np.empty((len(ids), self.engine.config.n_vocab), np.float32)
        for at, logits in self._all_logits(ids):
            out[at : at + len(logits)] = logits
        return out

    def _all_logits(self, ids: list[int]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the logits after every id, from an empty sequence: (row, float32 [up to LOGITS_ROWS, vocab])."""
        engine = self.engine
        engine.check_prompt(ids)
        self.settle()
        self.rewind(0)
        n = min(LOGITS_ROWS, len(ids))
        many = n > 1 and engine.program(chunk_shape(n, 0, n, "all")).plan.shape.rows >= n
        rows = n if many else 1
        for at in range(0, len(ids), rows):
            chunk = ids[at : at + rows]
            if len(chunk) == 1:
                self.step(chunk)
            else:
                self._submit(chunk, "all")
                self._collect(chunk)
            logits = engine.logits(len(chunk))
            if not np.isfinite(logits).all():
                raise engine.not_finite(self.sequence.pages)
            yield at, logits

    def extend(self, ids: AnySequence[int]) -> None:
        """Make ``ids`` the sequence, all of them computed."""
        found = self._cache.match(ids) if self._cache else None
        if found and found.length > 0:
            self._take(ids, found)
        self.prefill(ids[self.length :], "none")

    @typed_errors
    def prompt_logprobs(self, ids: AnySequence[int]) -> list[float]:
        """Return the log-probability of each id but the first, given those before it."""
        ids = arguments.token_ids(ids)
        found = list[float]()
        for at, logits in self._all_logits(ids):
            found += following_logprobs(ids, at, logits)
        return found

    @typed_errors
    def save(self) -> Snapshot:
        """Copy the sequence and its state to host memory, for :meth:`restore`."""
        self.settle()
        sequence, engine = self.sequence, self.engine
        pages = tuple(engine.read_page(page) for page in sequence.pages[: engine.pages.needed(sequence.computed)])
        state = engine.read_slot(sequence.slot) if sequence.slot is not None and sequence.computed else b""
        return Snapshot(tuple(sequence.ids), pages, state, engine.loaded.kv)

    @typed_errors
    def restore(self, saved: Snapshot) -> None:
        """Make a saved sequence the sequence. It is of this model, or of one with the same file and K/V type.

        Raises UsageError if it has other sizes, ContextFullError if it is too long. Then the sequence is unchanged.
        """
        engine = self.engine
        if not isinstance(saved, Snapshot):
            arguments.refuse("saved", "a snapshot of save()", saved)
        if len(saved.tokens) > engine.n_ctx:
            raise ContextFullError(
                f"the snapshot has {len(saved.tokens)} tokens and the context {engine.n_ctx}; "
                f"load the model with a larger context"
            )
        saved.check(engine)
        self.settle()
        self._forget()
        sequence = self.sequence
        for data in saved.pages:
            page = self._with_room(engine.pages.take)
            sequence.pages.append(page)
            engine.write_page(page, data)
        if saved.state:
            sequence.slot = self._with_room(engine.slots.take)
            engine.write_slot(sequence.slot, saved.state)
        sequence.ids = list(saved.tokens)
        sequence.computed = sequence.submitted = len(saved.tokens)

    def fork(self) -> Session:
        """Return another session of the same engine, which shares pages and states with this one."""
        self.settle()
        twin = Session(self.engine, self._cache)
        twin._forks = self._forks
        twin._forks.add(twin)
        twin.sequence = self.sequence.fork(self.engine.pages, self.engine.slots)
        return twin

    def pretend(self, length: int) -> None:
        """Begin a sequence of ``length`` tokens whose state is whatever memory holds. For timing."""
        self.settle()
        self._forget()
        self._cache = None  # what memory holds is of no use to others
        sequence = self.sequence
        self._sit()
        while len(sequence.pages) < self.engine.pages.needed(length):
            sequence.pages.append(self._with_room(self.engine.pages.take))
        if self.engine.recurrent:
            sequence.slot = self._with_room(self.engine.slots.take)
        sequence.ids = [0] * length
        sequence.computed = sequence.submitted = length

    def program(self, shape: StepShape | None = None) -> Program:
        """Return the program for steps of a shape (default: one row) at the end of the sequence."""
        self._check_open()
        return self.engine.program(shape or decode_shape(1), self.length)

    # ---- one step ---------------------------------------------------------------------------------------------

    def _submit(self, ids: AnySequence[int], output: str) -> None:
        self._check_open()
        if self.sequence.seat is None:
            self._sit()
        self._start(self._with_room(lambda: self.built(ids, output)))

    def _check_open(self) -> None:
        """Raise UsageError for a model that is closed, or a session that has ended."""
        self.engine.check_usable()
        self._refuse_over()

    def _refuse_over(self) -> None:
        if self._over:
            self.engine.check_usable()
            raise UsageError("the session has ended, and others have the engine: open another with model.session()")

    def _sit(self) -> None:
        """Take a seat. Raises UsageError if too many forks have one."""
        try:
            self.sequence.sit(self.engine.session_seats.take())
        except PoolEmptyError:
            raise UsageError(f"{SESSION_SEATS} sequences of this session have steps: close a fork first") from None

    def _submit_ahead(self, output: str) -> bool:
        """Submit the step that takes the token of the step in flight. Return False if pools must grow first."""
        try:
            self._start(self.built([-1], output))
        except PoolEmptyError:
            return False
        return True

    def _start(self, batch: Batch) -> None:
        self._in_flight.append(batch)
        try:
            self.engine.submit(batch)
        except BaseException:
            self._drop()
            raise

    def built(self, ids: AnySequence[int], output: str) -> Batch:
        """Make the batch of the next step. Raises PoolEmptyError."""
        builder = Builder(self.engine, self.engine.pages, self.engine.slots)
        drawing = OF_OUTPUT[output] if len(ids) == 1 else None
        try:
            builder.add(self.sequence, ids, *([drawing] if drawing else []))
        except PoolEmptyError:
            self._release(builder.batch())
            raise
        batch = builder.batch()
        if output == "all":
            return AllLogits(batch.runs, batch.page_writes, batch.table, batch.pages, batch.slots)
        return batch

    def _collect(self, ids: AnySequence[int]) -> int:
        """Wait for the oldest step, whose tokens are ``ids``. Return its arg max, or -1."""
        try:
            choices = self.engine.collect()
        except BaseException:
            self._drop()
            raise
        batch = self._in_flight.popleft()
        self._release(batch)
        self.sequence.computed = batch.runs[0].end
        self.sequence.ids += ids
        return int(choices[0]["id"]) if len(choices) and batch.output == "argmax" else -1

    def _with_room(self, take: Callable[[], T]) -> T:
        """Call ``take``; if a pool is empty, let it grow or evict from the cache, and call again."""
        engine = self.engine
        while True:
            try:
                return take()
            except PoolEmptyError:
                lacking = engine.lacking()
                self.settle()
                if not engine.make_room(*lacking, self._cache):
                    raise OutOfMemoryError(
                        f"the {engine.pages_now} pages of K/V and {engine.slots_now} state slots that the device's "
                        f"memory allows are in use; end other generations, or load the model with a smaller context"
                    ) from None

    def _check_ids(self, ids: AnySequence[int]) -> None:
        """Raise UsageError for no ids or wrong ids, ContextFullError if they do not fit."""
        if not ids:
            raise UsageError("a step needs at least one token")
        n_vocab, n_ctx, used = self.engine.config.n_vocab, self.engine.n_ctx, self.sequence.submitted
        for token in ids:
            if not 0 <= token < n_vocab:
                raise UsageError(f"token id {token} is outside the vocabulary of {n_vocab}")
        if len(ids) > n_ctx - used:
            raise ContextFullError(
                f"the context of {n_ctx} tokens is full ({used} used, {len(ids)} more asked for); "
                f"load the model with a larger context"
            )

    def _recover(self) -> None:
        """Forget the steps that an interrupt has left in flight."""
        self._refuse_over()
        expected = int(self._ahead is not None)
        if not len(self._in_flight) == self.engine.in_flight == expected or len(self.ids) != self.length:
            self._drop()

    def _refuse_in_flight(self) -> None:
        self._recover()
        if self._ahead is not None:
            raise UsageError(f"a step of token {self._ahead} is in flight; call settle() first")

    def _release(self, batch: Batch) -> None:
        self.engine.pages.release_all(batch.pages)
        self.engine.slots.release_all(batch.slots)

    def _drop(self) -> None:
        """Forget the steps in flight, and with recurrent layers the sequence: its states may have changed."""
        self.engine.drop()
        self._ahead = None
        while self._in_flight:
            self._release(self._in_flight.popleft())
        sequence = self.sequence
        sequence.computed = sequence.submitted = min(len(sequence.ids), sequence.computed)
        del sequence.ids[sequence.computed :]
        sequence.tabled = 0
        if self.engine.recurrent:
            self._forget()

    def _forget(self) -> None:
        """Forget the sequence, and give its memory back."""
        sequence = self.sequence
        sequence.submitted = sequence.computed
        sequence.release(self.engine.pages, self.engine.slots)
        sequence.ids = []
        if sequence.seat is not None:
            self.engine.session_seats.release(sequence.seat)
            sequence.seat = None


__all__ = ["Session", "Synced"]
