"""Runs the tasks of a bench on a loaded model, as its users do: by requests to the scheduler."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..engine.request import Request, Stats
from ..engine.running import Running
from ..engine.sequence import Sequence as Kept
from ..engine.session import Session
from ..errors import OutOfMemoryError
from .tasks import Task, Timed

Clock = Callable[[], float]
REFERENCE_TOKENS = 64  # of the prompt whose log-probabilities a report holds


class Ran(NamedTuple):
    """One run of a task: its tokens, its seconds, and the ids that the sequences made."""

    tokens: int
    seconds: float
    ids: list[list[int]]


class Sink:
    """Receiver of a request that notes the times of its tokens."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.times: list[float] = []
        self.ids: list[int] = []
        self.stats = Stats()
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def progress(self, done: int, total: int) -> None:
        """Take the progress of the prompt."""

    def started(self, stats: Stats) -> None:
        """Take the cost of the prompt."""

    def token(self, id: int, choice: Any) -> None:
        """Take a token."""
        self.times.append(self._clock())
        self.ids.append(id)

    def done(self, reason: str, stats: Stats) -> None:
        """Take the end."""
        self.stats = stats
        self._ended.set()

    def failed(self, error: BaseException) -> None:
        """Take the error that ended the request."""
        self._error = error
        self._ended.set()

    def wait(self) -> Sink:
        """Wait for the end. Raises the error of the request, and OutOfMemoryError if it had to leave its memory."""
        self._ended.wait()
        if self._error:
            raise self._error
        if self.stats.moved_out:
            raise OutOfMemoryError("the sequences do not fit into the device's memory together: measure fewer, or less")
        return self


class Bench:
    """Loaded model without a prefix cache, on which tasks run one after the other.

    Tokens of prompts are random, but the same for every run and every process. The tokens before a task (its depth)
    are computed once and kept, one sequence for each that runs at once.
    """

    def __init__(self, running: Running, clock: Clock = time.perf_counter) -> None:
        self._running, self._clock = running, clock
        self._kept: dict[int, list[Kept]] = {}

    def measure(self, task: Task, repetitions: int, warmup: int = 1) -> Timed:
        """Run a task ``warmup`` times uncounted, then ``repetitions`` times."""
        for _ in range(warmup):
            self.run(task)
        runs = [self.run(task) for _ in range(repetitions)]
        digests = {digest_of(run.ids) for run in runs}
        tokens, seconds = tuple(run.tokens for run in runs), tuple(run.seconds for run in runs)
        return Timed(task, tokens, seconds, digests.pop() if len(digests) == 1 else "varies")

    def run(self, task: Task) -> Ran:
        """Run a task once.

        The time of a prompt ends with the first token. That of an answer begins when the last sequence has its first
        token, and ends when the first one has its last.
        """
        starts = self._sequences(task.depth, task.sequences)
        sinks = [Sink(self._clock) for _ in range(task.sequences)]
        requests = [self._request(task, n, sink, starts[n] if starts else None) for n, sink in enumerate(sinks)]
        began = self._clock()
        self._submit(requests)
        for sink in sinks:
            sink.wait()
        made_ids = [sink.ids for sink in sinks]
        if not task.n_gen:
            return Ran(task.n_prompt * task.sequences, max(sink.times[0] for sink in sinks) - began, made_ids)
        first, last = max(sink.times[0] for sink in sinks), min(sink.times[-1] for sink in sinks)
        return Ran(sum(first < t <= last for sink in sinks for t in sink.times), last - first, made_ids)

    def ids(self, n: int, number: int, kind: int = 0) -> list[int]:
        """Return ``n`` token ids of sequence ``number``, none of them 0. ``kind`` tells parts of a prompt apart."""
        n_vocab = self._running.engine.config.n_vocab
        found: list[int] = np.random.default_rng((7, number, kind)).integers(1, n_vocab, n).tolist()
        return found

    def reference(self) -> list[float]:
        """Return the log-probabilities of the tokens of a fixed prompt: what another build must reproduce."""
        engine = self._running.engine
        ids = self.ids(min(REFERENCE_TOKENS, engine.n_ctx), 0)
        session = Session(engine)
        with self._running.loop.exclusive(session.end):
            return session.prompt_logprobs(ids)

    def forget(self) -> None:
        """Release the sequences that are kept."""
        for sequence in (sequence for kept in self._kept.values() for sequence in kept):
            self._running.loop.release(sequence)
        self._kept.clear()

    def _request(self, task: Task, number: int, sink: Sink, start: Kept | None) -> Request:
        ids = [*self.ids(task.depth, number), *self.ids(task.n_prompt or 1, number, task.depth + 1)]
        return Request(ids, task.n_gen + 1 if task.n_gen else 1, sink, task.params(number), start=start)

    def _submit(self, requests: Sequence[Request]) -> None:
        """Submit requests between two steps, so that all of them are in the next one."""
        scheduler = self._running.scheduler

        def submit() -> None:
            for request in requests:
                scheduler.submit(request)

        self._running.loop.call(submit)

    def _sequences(self, depth: int, n: int) -> list[Kept]:
        """Return ``n`` sequences of ``depth`` tokens. Those of another depth are released."""
        if depth not in self._kept:
            self.forget()
        kept = self._kept.setdefault(depth, [])
        while depth and len(kept) < n:
            sink = Sink(self._clock)
            self._running.loop.submit(Request(self.ids(depth, len(kept)), 0, sink, keep=True))
            sequence = sink.wait().stats.sequence
            assert sequence is not None, "the request kept it"
            kept.append(sequence)
        return kept


def digest_of(ids: Sequence[Sequence[int]]) -> str:
    """Return a short digest of token ids."""
    text = ";".join(",".join(map(str, of)) for of in ids)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
