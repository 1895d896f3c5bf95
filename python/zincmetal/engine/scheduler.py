"""Scheduler: which rows of which requests each step has, and what becomes of the results.

The life of a request:

1. ``submit``, on any thread, puts a message into the inbox. The step thread takes it at the beginning of a step.
2. It waits. Requests are admitted in the order of their arrival, when there is a seat and there are pages for it. The
   prefix cache gives pages and states for the beginning of its prompt. If they are in files, another thread reads them.
3. Its prompt is computed in slices, beside the decode rows of others (``pace.py``). The last token is a row of its own.
4. It decodes: a row in every step, or in turns if there are more decoders than a step takes. With drafts it may have
   several rows (``speculate.py``).
5. It ends: by an end token, its length, its sink, a cancel, its deadline or an error. Each has one last event.

Steps run ahead: while a step runs, the next one is described and submitted. A row whose token the step in flight
chooses refers to that output. If the token then ends the request, its row in the next step is one too many: the output
is ignored, and the pages have their owner until that step is collected. Nothing runs ahead of a token that the host
chooses, nor of a draft, but the next draft. A request with a mask runs ahead where the mask allows every token. If the
token in flight then begins a part where it does not, the row that ran ahead is submitted once more, with the mask.

If pages or slots run out, steps in flight are collected, and then the pools grow. If they cannot, the cache evicts. If
it cannot, the youngest request is moved out and waits again. The oldest one is never moved out, so all requests end.
"""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from ..errors import ContextFullError, DeadlineError, DeviceError, QueueFullError, UsageError, ZincError, as_typed
from ..sampling.sampler import FORBIDDEN
from .batch import Builder, Drawing, Executor, id_of, is_finite
from .cache_reader import PATIENCE
from .cache_tier import Transfer
from .flight import Flight, State, drawn
from .pace import Pace, load, shares
from .pages import PagePool, PoolEmptyError, Seats, StateSlots
from .pools import DISK_SECONDS, Clock, Pools, Wait
from .prefix_cache import Cache, NoCache
from .readings import Reading, Readings
from .request import CANCELLED, LENGTH, NO_ROOM, STOP, Job, Request
from .sequence import Sequence
from .speculate import Chooser, Speculation, Verify

QUEUE_LIMIT = 256
GAP_SECONDS = 0.5
SAVE_STEPS = 16  # between two pauses in which ended turns are copied to the lower tier of the cache
MOST_STUCK = 1000  # steps in a row that may do nothing but make room
NOT_FINITE = "the model's logits are not finite: the file is damaged, or the device failed"
_log = logging.getLogger("zincmetal.engine")


class Scheduler:
    """Requests over one executor. ``submit``, ``cancel``, ``release`` and ``call`` are for any thread.

    One thread calls ``step``. Events of requests come from within it.
    """

    def __init__(
        self,
        executor: Executor,
        cache: Cache | None = None,
        *,
        tier: Transfer | None = None,
        pages: PagePool | None = None,
        slots: StateSlots | None = None,
        seats: Seats | None = None,
        queue_limit: int = QUEUE_LIMIT,
        gap_seconds: float = GAP_SECONDS,
        clock: Clock = time.perf_counter,
        not_finite: Callable[[Sequence], ZincError] | None = None,
        governor: Chooser | None = None,
    ) -> None:
        pages = PagePool(executor.pages_now) if pages is None else pages
        slots = StateSlots(executor.slots_now) if slots is None else slots
        self._executor, self._clock = executor, clock
        self.pools = Pools(executor, cache or NoCache(), pages, slots, seats or Seats(executor.seats), clock, tier)
        self.pace = Pace(gap_seconds, executor.max_rows)
        self._readings = Readings(gap_seconds, clock)
        self.speculation = Speculation(executor, self.pools, governor)
        self._not_finite = not_finite or (lambda sequence: DeviceError(NOT_FINITE))
        self.inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._queue_limit = queue_limit
        self._places = deque([None] * queue_limit)  # of the queue: pop and append are atomic, a lock is not needed
        self._jobs: dict[Request, Job] = {}
        self._waiting: list[Job] = []  # by order
        self._running: list[Job] = []  # by order
        self._ending: list[Job] = []  # ended, but with rows in flight
        self._flights: deque[Flight] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._short: Job | None = None  # for this one there was no page or slot
        self._drain = False  # a job is to be written back, which needs an idle device
        self._fetching = False  # files are read for the first waiting job, as this step has found
        self._arrivals = self._turns = self.steps = self._saved_at = 0
        self._stuck = 0  # steps in a row that did nothing
        self._waited = False  # the next step could have run ahead, and waits for a draft
        self._collected = clock()

    # ---- any thread ----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Put a request into the queue. Raises QueueFullError, UsageError or ContextFullError; then no event comes."""
        request.check(self._executor)
        job = Job(request, -1, self._clock(), self._executor)  # here, where an error of it reaches the caller
        try:
            self._places.pop()
        except IndexError:
            raise QueueFullError(
                f"{self._queue_limit} requests are waiting already; ask again when some have ended"
            ) from None
        self.inbox.put(lambda: self._arrive(job))

    def cancel(self, request: Request, reason: str = CANCELLED) -> None:
        """End a request before the next step. If it has ended, nothing happens."""
        self.inbox.put(lambda: self._cancel(request, reason))

    def release(self, sequence: Sequence) -> None:
        """Give back a sequence of a request with ``keep``. Requests that were submitted before may start from it."""
        self.inbox.put(lambda: self.pools.retire(sequence, store=False))

    def call(self, function: Callable[[], None]) -> None:
        """Call a function on the step thread, while nothing is in flight. It must not raise."""
        self.inbox.put(lambda: self._calls.append(function))

    def read(self, reading: Reading[Any]) -> None:
        """Run a reading in slices, between the steps of requests."""
        self.inbox.put(lambda: self._readings.add(reading))

    def figures(self) -> dict[str, Any]:
        """Return the requests, pages and slots of about this moment. The step thread does not wait for the caller."""
        return {
            "running": [job.figures() for job in list(self._running)],
            "waiting": len(self._waiting) + self.inbox.qsize(),
            "steps": self.steps,
            **self.pools.figures(),
        }

    # ---- the step thread -----------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """True if there is work for ``step``."""
        jobs = self._running or self._waiting or self._ending
        work = self._flights or jobs or self._calls or self._readings or self.pools.saving
        return bool(work) or not self.inbox.empty()

    def state(self) -> State:
        """Return what the scheduler has. For its own thread, between two steps."""
        return State.of(self._running, self._waiting, self._ending, self._flights, self.speculation.block.held)

    def step(self, message: Callable[[], None] | None = None) -> bool:
        """Take messages, submit a step, and collect the oldest one if no other can be submitted. Return ``busy``.

        ``message`` is one that the caller has taken from the inbox.
        """
        self._fetching = False  # until this step has looked, after its messages: the reader's may be one of them
        try:
            if message is not None:
                message()
            self._take_messages()
            self._check_deadlines()
            depth = 2 if self._executor.runs_ahead else 1
            launched = self._launch()
            went_on = launched or bool(self._flights) or bool(self._readings)
            if self._flights and (not launched or len(self._flights) >= depth):
                self._collect()
            self._stuck = 0 if went_on or not self._running else self._stuck + 1
            if self._stuck > MOST_STUCK:
                raise DeviceError("the scheduler is stuck: no request can go on; please report this")
        except BaseException as error:
            self.end_all(as_typed(error))
            if not isinstance(error, Exception):
                raise
        return self.busy

    @property
    def resting(self) -> bool:
        """True if the last step has found that there is nothing to do but to wait for files, read or written."""
        jobs = self._flights or self._running or self._ending
        idle = not (jobs or self._calls or self._readings or self.pools.may_save)
        return idle and (self._fetching or (self.pools.saving and not self._waiting))

    def rest(self) -> Callable[[], None] | None:
        """Sleep if it is ``resting``, until a message or a deadline comes. Return the message, for ``step``."""
        waits = [job.deadline - self._clock() for job in self._waiting if job.deadline is not None]
        waits += [DISK_SECONDS] * self.pools.saving + [PATIENCE] * self._fetching
        with suppress(Empty):
            if self.resting:
                return self.inbox.get(timeout=max(0.0, min(waits)) if waits else None)
        return None

    def end_all(self, error: BaseException) -> None:
        """End all requests with an error. Nothing is in flight after it, and the prefix cache is empty."""
        self._executor.drop()
        self.speculation.block.forget()
        while self._flights:
            self._flights.popleft().release(self.pools.pages, self.pools.slots)
        self._take_messages()
        self._short, self._drain, self._fetching = None, False, False
        while self._ending:
            job = self._ending.pop()
            job.sequence.submitted = job.sequence.computed
            job.failure = error
            self._retire(job)
        for job in [*self._running, *self._waiting]:
            job.sequence.submitted = job.sequence.computed
            self._end(job, "", error)
        if isinstance(error, UsageError):  # the model is closed, and its device is well
            self.pools.save_all()
        self.pools.forget_cache()
        self._readings.end_all(error)
        while self._calls:
            self._calls.popleft()()

    def _take_messages(self) -> None:
        while True:
            try:
                message = self.inbox.get_nowait()
            except Empty:
                return
            if message is not None:
                message()

    def _arrive(self, job: Job) -> None:
        request = job.request
        job.order, job.queued = self._arrivals, True
        self._arrivals += 1
        self._jobs[request] = job
        self._waiting.append(job)
        try:
            if request.start is not None:
                job.begin = request.start.fork(self.pools.pages, self.pools.slots)
        except AssertionError:
            self._end(job, "", UsageError("the sequence to start from was released; keep it until the request ends"))

    def _cancel(self, request: Request, reason: str) -> None:
        job = self._jobs.get(request)
        if job is not None:
            self._end(job, reason)

    def _check_deadlines(self) -> None:
        for job in [job for job in self._jobs.values() if job.deadline is not None and self._clock() > job.deadline]:
            self._end(job, "", job.too_late())

    # ---- a step begins -------------------------------------------------------------------------------------------

    def _launch(self) -> bool:
        """Submit a step if one can run now. Return False if none can."""
        read = False
        if self._flights:
            if not self._executor.runs_ahead or self._must_wait():
                self._begin_drafts()
                return False
        elif self._needs_idle() or self._waiting or not self.speculation.block.begun:
            self._settle()
            read = self._do_idle_work()
        self._admit()
        flight = self._build(with_prompts=not read)
        if not flight.batch.runs:
            flight.release(self.pools.pages, self.pools.slots)
            return False
        self._flights.append(flight)
        began = self._clock()
        self._executor.submit(flight.batch)
        # A device that runs ahead returns at once, unless it had to make a plan first, which is not the step's time.
        flight.began = self._clock() if self._executor.runs_ahead else began
        flight.number_outputs()
        self.steps += 1
        return True

    def _build(self, with_prompts: bool) -> Flight:
        """Return the next step, not yet submitted. Without a run there is nothing to do.

        Decoders that have waited for a slice of a reading have no rows of prompts beside them.
        """
        builder = Builder(self._executor, self.pools.pages, self.pools.slots)
        flight = Flight(builder.batch(), {}, {}, 0.0, waited=self._waited)
        self._waited = False
        try:
            self._add_decoders(builder, flight)
            if with_prompts or not len(builder):
                self._add_slices(builder, flight)
        except BaseException:
            flight.release(self.pools.pages, self.pools.slots)
            raise
        builder.batch()
        return flight

    def _must_wait(self) -> bool:
        """Return True if no step may be submitted before the one in flight has been collected."""
        if self._needs_idle() or any((job.waits and not job.left) or job.verifying for job in self._running):
            return True
        if self._may_draft(ready := self._decoders()) and self.speculation.wanted(ready):
            self._waited = True
        return self._waited

    def _needs_idle(self) -> bool:
        """Return True if something is to be done while nothing is in flight."""
        saves = self.pools.may_save and self.steps - self._saved_at >= SAVE_STEPS
        return bool(self._calls or self._readings or self._short or self._drain or saves)

    def _begin_drafts(self) -> None:
        """Begin the next drafts behind the step in flight, unless something else is to come before them."""
        flight, others = self._flights[-1], self._waiting or self._needs_idle() or not self._executor.runs_ahead
        jobs = [job for job in flight.outputs if not job.ended]
        if others or len(self._flights) > 1 or flight.guessed or flight.batch.by_host:
            return  # the host needs the logits where it draws
        if len(jobs) == len(flight.jobs) and self._may_draft(jobs):
            begun = self.speculation.begin(flight.outputs, flight.verifies, flight.batch.n_rows)
            self._waited = begun or self._waited

    def _settle(self) -> None:
        """Wait for a draft that has begun and is not wanted any more. Its sequences may have ended."""
        self.speculation.block.settle()
        self._retire_ended()

    def _decoders(self) -> list[Job]:
        """Return the jobs that may have a row of a decode step, those that had none for longest first. Empty: none."""
        ready = [job for job in self._running if job.decodes]
        return sorted(ready, key=lambda job: (job.last_turn, job.order))

    def _do_idle_work(self) -> bool:
        """Do what needs an idle device: calls, a slice of a reading, and making room. Return True for a slice."""
        self._drain = False
        while self._calls:
            self._calls.popleft()()
        self.pools.save()
        self._saved_at = self.steps
        job, self._short = self._short, None
        if job is None or job.ended:
            return self._readings.go_on(self._running, self._executor.max_singles)
        end = job.sequence.submitted + (max(1, job.left) if job.decodes else 1)
        while not self.pools.make_room(job.sequence, end):
            if self._readings.finish():
                continue
            youngest = self._running[-1]
            if len(self._running) == 1:
                if job.made:
                    self._end(job, LENGTH)
                else:
                    self._end(job, "", ContextFullError(f"{job.stats.prompt} tokens of a prompt do not fit: {NO_ROOM}"))
                break
            self.pools.move_out(youngest, self.pace)
            self._running.pop()
            insort(self._waiting, youngest, key=lambda job: job.order)
            if youngest is job:
                break
        return False

    def _admit(self) -> None:
        """Let waiting jobs run, in the order of their arrival, as long as there is room.

        A sequence that has ended goes to the cache before a job that goes on from it is admitted. While files are read
        for the first job, those behind it wait, too.
        """
        while self._waiting and self.pools.seats.free:
            job = self._waiting[0]
            if any(job.goes_on_from(other) for other in self._ending):
                return
            waits = self.pools.admit(job, self._running, not self._flights, partial(self.inbox.put, None))
            self._fetching, self._drain = waits is Wait.FILES, waits is Wait.IDLE
            if waits is Wait.ROOM and not self._running and not self._readings:
                self._end(job, "", ContextFullError(NO_ROOM))
                continue
            if waits is not None:
                return
            self._waiting.pop(0)
            insort(self._running, job, key=lambda job: job.order)
            self._leave_queue(job)
            if job.admitted is None:
                job.admitted = self._clock()
                self._tell_progress(job)

    def _leave_queue(self, job: Job) -> None:
        if job.queued:
            job.queued = False
            self._places.append(None)

    def _add_decoders(self, builder: Builder, flight: Flight) -> None:
        """Add a row for each job with one known token, or with a token that the step in flight chooses."""
        outputs = self._flights[-1].outputs if self._flights else {}
        ready = self._decoders()
        drafts = self.speculation.choose(ready) if self._may_draft(ready) and not self._flights else {}
        self._settle()
        for job in ready:
            if not builder.singles_left:
                return
            at = job.sequence.submitted
            if job.left:
                tokens = job.sequence.ids[at:]
            elif job.wants_output and job in outputs:
                tokens = [-1 - outputs[job]]
            else:
                continue
            if job in drafts and (verify := self.speculation.add(builder, job, tokens, drafts[job])):
                flight.verifies[job] = verify
                self._note_turn(flight, job)
                continue
            drawings = []
            if job.last:
                try:
                    drawings = job.drawings()
                except Exception as error:  # of the mask: it ends this request alone
                    self._end(job, "", error)
                    continue
            added = self._add(builder, flight, job, tokens, *drawings)
            if added and tokens[0] < 0 and job.request.mask is not None:
                flight.guessed[job] = at

    def _may_draft(self, ready: list[Job]) -> bool:
        """Return True if a step of these jobs has no rows of prompts, and room for all."""
        return len(self._running) == len(ready) <= self._executor.max_singles

    def _add_slices(self, builder: Builder, flight: Flight) -> None:
        """Fill the step with slices of prompts."""
        prompts = [job for job in self._running if not job.decodes]
        if not prompts or self._short:
            return
        rows = min(self.pace.rows(*load(self._running, self._executor.max_singles)), builder.rows_left)
        for job, share in shares(prompts, rows):
            sequence, n = job.sequence, job.slice(share)
            at = sequence.submitted
            if n > 0 and self._add(builder, flight, job, sequence.ids[at : at + n]):
                flight.has_slice = True

    def _add(self, builder: Builder, flight: Flight, job: Job, tokens: list[int], *drawings: Drawing) -> bool:
        """Add a run of a job. Without room the cache evicts, or the run is shorter, or the job is ``_short``."""
        sequence, added = job.sequence, False
        for tried in range(3):
            try:
                added = builder.add(sequence, tokens, *drawings)
                break
            except PoolEmptyError:
                if tried == 0 and self.pools.evict(sequence, sequence.submitted + len(tokens)):
                    continue
                fit = len(sequence.pages) * PagePool.PAGE - sequence.submitted  # it has taken what there was
                if drawings or tried == 2 or not 0 < fit < len(tokens):
                    self._short = self._short or job
                    return False
                tokens = tokens[:fit]
        if added:
            self._note_turn(flight, job)
            mark = job.marks.get(sequence.submitted)
            if sequence.slot is not None and mark is not None and self.pools.may_hold(mark):
                flight.held.append((job, sequence.submitted, self.pools.slots.retain(sequence.slot)))
        return added

    def _note_turn(self, flight: Flight, job: Job) -> None:
        flight.jobs[job.sequence] = job
        job.last_turn = self._turns
        self._turns += 1

    # ---- a step ends ---------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Wait for the oldest step, and give its results to the jobs."""
        flight = self._flights[0]
        choices = self._executor.collect()
        self._flights.popleft()
        now = self._clock()
        if flight.has_slice:
            self.pace.measured(flight.batch.n_rows, now - max(flight.began, self._collected))
        seconds = None if flight.has_slice or len(flight.outputs) < len(flight.jobs) else now - self._collected
        self._collected = now
        verifies, flight.verifies = flight.verifies, {}
        made = dict.fromkeys(flight.outputs, 1)
        for run in flight.batch.runs:
            run.sequence.computed = run.end
            if not run.drawings and not flight.jobs[run.sequence].ended:
                self._tell_progress(flight.jobs[run.sequence])
        try:
            for job, length, slot in flight.held:
                if not job.ended:
                    self.pools.checkpoint(job.sequence, length, slot, job.marks[length])
        finally:
            flight.release(self.pools.pages, self.pools.slots)
        try:
            for job, output in flight.outputs.items():
                job.expected -= 1
                if job in verifies:
                    made[job] = self._take_verified(job, output, verifies[job], choices)
                elif not job.ended and self._confirmed(job, flight):
                    self._take(job, output, choices[output])
        finally:
            self.pools.slots.release_all(verify.left for verify in verifies.values() if verify.left is not None)
        self.speculation.measured(made, flight.batch.n_rows, flight.batch.verifies, seconds, flight.waited)
        for job in [job for job in flight.jobs.values() if not job.last and not job.left and not job.ended]:
            self._end(job, LENGTH)
        self._retire_ended()

    def _take_verified(self, job: Job, output: int, verify: Verify, choices: AnySequence[Any]) -> int:
        """Take the tokens that were drawn up to the first that was not drafted. Return their number."""
        n = self.speculation.accepted(job, verify, choices[output])
        verify.rewind(job, 0)
        for i in range(n + 1):
            if job.ended:  # by another call, or by the token before
                break
            verify.rewind(job, i)
            if i < n:
                job.stats.accept(i)
            self._take(job, output + i, choices[output + i])
        return n + 1

    def _confirmed(self, job: Job, flight: Flight) -> bool:
        """Return True if the token of an output is one that the job's mask allows."""
        try:
            return job not in flight.guessed or job.confirms(flight.guessed[job])
        except Exception as error:  # of the mask: it ends this request alone
            self._end(job, "", error)
            return False

    def _take(self, job: Job, output: int, choice: Any) -> None:
        """Take the token of an output: append it, tell the sink, and end the job if it is the last one."""
        if job.sampler is not None:
            logits = self._executor.host_logits(output)
            try:
                choice = drawn(job, logits)
            except Exception as error:
                self._end(job, "", error)
                return
        token, started = id_of(choice), False
        if token < 0:
            if is_finite(choice):
                self._end(job, "", UsageError(FORBIDDEN))
            else:
                self._end_not_finite(job)
            return
        job.sequence.ids.append(token)
        job.made += 1
        if job.first is None:
            job.first = self._clock()
            job.finish(job.first)
            self.pools.share_prompt(job)
            started = True
        try:
            if started:
                job.request.sink.started(job.stats)
            reason = job.request.sink.token(token, choice)
        except Exception:
            _log.exception("a receiver of tokens failed; its request is cancelled")
            self._end(job, CANCELLED)
            return
        if token in job.request.eog_ids:
            reason = STOP
        if reason or job.made == job.last:
            self._end(job, reason or LENGTH)

    def _end_not_finite(self, job: Job) -> None:
        """End a job whose logits are not finite. If it reused what others had computed, its request begins anew, once.

        Their numbers may be damaged. A prompt that ended before its first token has not shown that its own are finite.
        """
        again = job.begin_anew(self._executor)
        self._end(job, "", self._not_finite(self.pools.forget(job.sequence)))
        if again is not None:
            self._jobs[job.request] = again
            insort(self._waiting, again, key=lambda job: job.order)

    def _tell_progress(self, job: Job) -> None:
        try:
            job.tell_progress()
        except Exception:
            _log.exception("a receiver of progress failed; its request is cancelled")
            self._end(job, CANCELLED)

    # ---- a job ends ----------------------------------------------------------------------------------------------

    def _end(self, job: Job, reason: str, error: BaseException | None = None) -> None:
        """End a job, by a reason or an error. What it has is released now, or when its last row has been collected.

        The last event comes now. Only a request with ``keep`` waits for it until its last row has been collected.
        """
        job.ended, job.reason, job.failure = True, reason, error
        (self._running if job in self._running else self._waiting).remove(job)
        del self._jobs[job.request]
        self._leave_queue(job)
        self.pools.forget_copies_for(job)
        if job.begin is not None:
            job.begin.release(self.pools.pages, self.pools.slots)
        job.finish(self._clock())
        job.close_drafter()
        if job.sequence.in_flight:
            self._ending.append(job)
        if not job.request.keep:
            job.tell_end()
        if not job.sequence.in_flight:
            self._retire(job)

    def _retire_ended(self) -> None:
        for job in [job for job in self._ending if not job.sequence.in_flight]:
            self._ending.remove(job)
            self._retire(job)

    def _retire(self, job: Job) -> None:
        """Release all that a job has, or with ``keep`` give it to the sink."""
        damaged = job.failure is not None and not isinstance(job.failure, DeadlineError)
        if not job.request.keep:
            self.pools.retire(job.sequence, store=not damaged)
            return
        if job.failure is None:
            self.pools.leave_seat(job.sequence)
            job.stats.sequence = job.sequence
        else:
            self.pools.retire(job.sequence, store=not damaged)
        job.tell_end()
