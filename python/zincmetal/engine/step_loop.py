"""Step loop: the thread that calls ``Scheduler.step``. It starts with the first request and sleeps without work.

There is no lock, since an interrupt could leave it held. The inbox of the scheduler is a ``SimpleQueue``, whose calls
are atomic. While the thread sleeps it holds no reference to the loop, so a loop that nobody uses ends by itself.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from ..errors import CLOSED, FORKED, DeviceError, UsageError, ZincError, no_thread
from .readings import Reading
from .request import CANCELLED, Request
from .scheduler import Scheduler
from .sequence import Sequence

AT_EXIT = 10.0  # seconds
FROM_A_SINK = "this call waits for the step thread, and cannot come from a callback on it"
IN_A_SESSION = "this thread has the engine for a session: end the session first"
_LOOPS: weakref.WeakSet[StepLoop] = weakref.WeakSet()
_log = logging.getLogger("zincmetal.engine")
T = TypeVar("T")
Inbox = SimpleQueue[Callable[[], None] | None]


class _Hold:
    """The engine in the hands of one thread. Its end is noticed."""

    def __init__(self) -> None:
        self.thread, self.over = threading.get_ident(), False


class StepLoop:
    """Thread of a scheduler. Its methods are for any thread.

    ``at_end`` is called once, when the loop is closed and no step runs any more.
    """

    def __init__(self, scheduler: Scheduler, at_end: Callable[[], None] = lambda: None) -> None:
        self.scheduler, self._at_end = scheduler, at_end
        self._unusable: tuple[type[ZincError], str] | None = None
        self._starts = deque([None])  # the thread that pops it starts the step thread
        self._thread: threading.Thread | None = None
        self._holder: Callable[[], _Hold | None] = lambda: None  # who has the engine alone
        self._finished = False  # the step thread takes no more messages
        self._ends = deque([None])  # who pops it calls at_end
        self._finishing = threading.Lock()
        # A None in the inbox wakes the thread, which finds that the loop is gone.
        self._end = weakref.finalize(self, scheduler.inbox.put, None)
        self._end.atexit = False
        _LOOPS.add(self)

    def submit(self, request: Request) -> None:
        """Put a request into the queue. See ``Scheduler.submit``."""
        self._check_thread()
        self._start()
        self.scheduler.submit(request)
        self._answer_late()

    def cancel(self, request: Request, reason: str = CANCELLED) -> None:
        """End a request before the next step. If it has ended, nothing happens."""
        if self._unusable is None:
            self.scheduler.cancel(request, reason)

    def release(self, sequence: Sequence) -> None:
        """Give back a sequence of a request with ``keep``."""
        if self._unusable is None:
            self.scheduler.release(sequence)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function on the step thread, while nothing is in flight. Return its result, or raise its error."""
        self._check_thread()
        self._start()
        answer: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()

        def run() -> None:
            try:
                answer.put((function(), None))
            except BaseException as error:
                answer.put((None, error))

        self.scheduler.call(run)
        self._answer_late()
        result, error = answer.get()
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def read(self, reading: Reading[T]) -> T:
        """Run a reading in slices, between which requests have steps. Return its result, or raise its error."""
        self._check_thread()
        self._start()
        try:
            self.scheduler.read(reading)
            self._answer_late()
            while True:
                with suppress(Empty):
                    return reading.result(timeout=0.05)
                self.check_usable()  # a session may have the engine, and others close the loop
        except BaseException:  # such as an interrupt
            reading.give_up()
            raise

    @contextmanager
    def exclusive(self, at_end: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Give the caller the engine alone: nothing is in flight, and the step thread waits.

        ``at_end`` is called after the block, on the step thread, where no interrupt reaches it.
        """
        self._check_thread()
        self._start()
        ready, over = SimpleQueue[None](), SimpleQueue[Any]()
        mine = _Hold()
        holder = weakref.ref(mine, over.put)  # an interrupt may come at any moment, even in the `finally`

        def hold() -> None:
            if holder() is None or not over.empty():
                return
            self._holder = holder
            ready.put(None)
            over.get()
            try:
                at_end()
            except Exception:
                _log.exception("the end of a session failed")

        try:
            self.scheduler.call(hold)
            self._answer_late()
            while True:
                self.check_usable()
                with suppress(Empty):
                    ready.get(timeout=0.05)
                    break
            self.check_usable()
            yield
        finally:
            mine.over = True
            over.put(None)

    def _is_held(self) -> bool:
        """Return True if this thread has the engine alone."""
        hold = self._holder()
        return hold is not None and hold.thread == threading.get_ident() and not hold.over

    def _check_thread(self) -> None:
        """Raise UsageError for a loop that is closed, or for a call that would wait for its own thread."""
        self.check_usable()
        self.refuse_own_thread()

    def refuse_own_thread(self) -> None:
        """Raise UsageError on the step thread, and on the thread that has the engine: neither can wait for a step."""
        if threading.current_thread() is self._thread:
            raise UsageError(FROM_A_SINK)
        if self._is_held():
            raise UsageError(IN_A_SESSION)

    def close(self, timeout: float | None = None) -> None:
        """End the thread. Requests that have not ended get UsageError. Closing twice is fine.

        ``timeout``: seconds to wait for the step that runs; None: until it ends. On the step thread, and on the thread
        that has the engine, it does not wait: the loop ends after the step, or after the block.
        """
        if self._unusable is None:
            self._unusable = (UsageError, CLOSED)
        if self._unusable[0] is DeviceError:  # in the child of a fork there is no thread
            return
        self.scheduler.inbox.put(None)
        if self._may_start():
            self.finish()
            return
        while not self._finished and (self._thread is None or self._thread.ident is None):
            time.sleep(0.001)  # another thread is about to start it
        mine = threading.current_thread() is self._thread or self._is_held()
        if self._thread is not None and not mine:
            self._thread.join(timeout)

    def check_usable(self) -> None:
        """Raise UsageError if the loop is closed, DeviceError in the child of a fork."""
        if self._unusable is not None:
            kind, why = self._unusable
            raise kind(why)

    @property
    def closed(self) -> bool:
        """Whether nothing can be submitted any more."""
        return self._unusable is not None

    def left_by_fork(self) -> None:
        """Mark this loop as the copy in a forked child: every later call raises DeviceError."""
        self._unusable, self._thread = (DeviceError, FORKED), None
        self._end.detach()

    def finish(self) -> None:
        """End all requests. Messages that come later are answered by the thread that sent them."""
        self._finished = True
        with self._finishing:
            self.scheduler.end_all(UsageError(CLOSED))
        with suppress(IndexError):
            self._ends.pop()
            self._at_end()

    def _may_start(self) -> bool:
        """Return True to one caller, once."""
        try:
            self._starts.pop()
        except IndexError:
            return False
        return True

    def _start(self) -> None:
        """Start the thread, once, before there is a message for it. Raises DeviceError if the system starts none."""
        if not self._may_start():
            return
        thread = threading.Thread(
            target=_run, args=(weakref.ref(self), self.scheduler.inbox), name="zincmetal-steps", daemon=True
        )
        self._thread = thread  # before it runs: a sink on it may ask whose thread this is
        try:
            thread.start()
        except BaseException as error:
            self._thread = None
            self._starts.append(None)
            if isinstance(error, RuntimeError):
                raise no_thread(error) from error
            raise

    def _answer_late(self) -> None:
        """Answer a message that came after the thread had ended."""
        if self._finished:
            self.finish()


def _run(of: weakref.ref[StepLoop], inbox: Inbox) -> None:
    """Step as long as there is work; sleep until a message comes; end when the loop is closed or gone."""
    while True:
        message = inbox.get()
        loop = of()
        if loop is None:
            return
        while not loop.closed:
            busy, message = _step(loop.scheduler, message), None
            if not busy:
                break
            message = loop.scheduler.rest()
        if loop.closed:
            inbox.put(message)  # that came right before the close: its sender waits for an answer
            loop.finish()
            return
        del loop, message


def _step(scheduler: Scheduler, message: Callable[[], None] | None) -> bool:
    """Step. The thread outlives whatever a callback raises, even SystemExit: the scheduler has ended all requests."""
    try:
        return scheduler.step(message)
    except BaseException:
        _log.exception("a step failed; all requests have ended")
        return scheduler.busy


def _close_all() -> None:
    """Close all loops before the interpreter ends: then no thread is inside a step."""
    for loop in list(_LOOPS):
        loop.close(AT_EXIT)


def _forget_all() -> None:
    """Mark all loops as unusable in the child of a fork."""
    for loop in list(_LOOPS):
        loop.left_by_fork()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
