"""The thread that steps: it starts late, survives sinks, ends once, and is not inherited by a child."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any

import pytest

from support.fake_executor import FakeExecutor, expected
from zincmetal.engine.request import Request, Stats
from zincmetal.engine.scheduler import Scheduler
from zincmetal.engine.step_loop import StepLoop
from zincmetal.errors import DeviceError, UsageError
from zincmetal.sampling.params import SamplingParams

TIMEOUT = 60  # seconds after which a test has failed


class Waited:
    """Sink whose end can be waited for. ``on_token`` is called on the step thread."""

    def __init__(self, on_token: Any = None) -> None:
        self.tokens: list[int] = []
        self.ends: SimpleQueue[str | BaseException] = SimpleQueue()
        self.on_token = on_token

    def progress(self, done: int, total: int) -> None:
        pass

    def started(self, stats: Stats) -> None:
        pass

    def token(self, id: int, choice: Any) -> str | None:
        self.tokens.append(id)
        if self.on_token:
            self.on_token()
        return None

    def done(self, reason: str, stats: Stats) -> None:
        self.ends.put(reason)

    def failed(self, error: BaseException) -> None:
        self.ends.put(error)

    def end(self) -> str | BaseException:
        return self.ends.get(timeout=TIMEOUT)


class SlowExecutor(FakeExecutor):
    """Fake executor that stops before it collects a step, while ``go`` is not set."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.go = threading.Event()
        self.reached = threading.Event()

    def collect(self) -> Any:
        self.reached.set()
        assert self.go.wait(TIMEOUT)
        return super().collect()


def loop_over(executor: FakeExecutor | None = None) -> StepLoop:
    return StepLoop(Scheduler(executor or FakeExecutor()))


def submitted(loop: StepLoop, ids: Iterable[int], max_tokens: int = 6, on_token: Any = None, **options: Any) -> Request:
    request = Request(list(ids), max_tokens, Waited(on_token), **options)
    loop.submit(request)
    return request


def go_on_when_closed(executor: SlowExecutor, loop: StepLoop) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not loop.closed and time.monotonic() < deadline:
        time.sleep(0.001)
    executor.go.set()


def sink_of(request: Request) -> Waited:
    assert isinstance(request.sink, Waited)
    return request.sink


def stepping() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "zincmetal-steps"]


def test_a_thread_starts_with_the_first_request_and_ends_with_close() -> None:
    before = len(stepping())
    loop = loop_over()
    assert len(stepping()) == before
    request = submitted(loop, range(30))
    assert sink_of(request).end() == "length"
    assert len(stepping()) == before + 1
    loop.close()
    loop.close()
    assert len(stepping()) == before
    with pytest.raises(UsageError, match="closed"):
        submitted(loop, [1])


def test_a_loop_that_never_ran_is_closed() -> None:
    loop = loop_over()
    loop.close()
    with pytest.raises(UsageError, match="closed"):
        loop.call(lambda: None)


class ClosingInbox(SimpleQueue[Any]):
    """Inbox during whose first message the loop is closed."""

    loop: StepLoop | None = None

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        message = super().get(block, timeout)
        loop, self.loop = self.loop, None
        if loop is not None:
            loop.close()
        return message


def test_a_message_that_comes_right_before_the_close_is_answered() -> None:
    scheduler = Scheduler(FakeExecutor())
    scheduler.inbox = inbox = ClosingInbox()
    loop = inbox.loop = StepLoop(scheduler)
    answers = SimpleQueue[int]()
    threading.Thread(target=lambda: answers.put(loop.call(lambda: 5)), daemon=True).start()
    assert answers.get(timeout=TIMEOUT) == 5


def test_requests_of_many_threads_have_their_own_tokens() -> None:
    loop = loop_over()
    wrong: list[Any] = []

    def caller(k: int) -> None:
        for i in range(5):
            request = submitted(loop, [k, i, *range(20)], 5)
            end = sink_of(request).end()
            if (end, sink_of(request).tokens) != ("length", expected(request.ids, 5, request.params, False)):
                wrong.append((k, i, end))

    threads = [threading.Thread(target=caller, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert wrong == []
    loop.close()


def test_close_ends_requests_with_an_error() -> None:
    executor = SlowExecutor(seats=1)
    loop = loop_over(executor)
    requests = [submitted(loop, range(40), 100) for _ in range(3)]
    assert executor.reached.wait(TIMEOUT)
    threading.Thread(target=go_on_when_closed, args=(executor, loop), daemon=True).start()
    loop.close()
    for request in requests:
        assert isinstance(sink_of(request).end(), UsageError)
        assert sink_of(request).ends.empty()


def test_a_sink_may_cancel_and_does_not_wait_for_its_own_thread() -> None:
    loop = loop_over()
    refused: list[BaseException] = []

    def on_token() -> None:
        try:
            loop.call(lambda: None)
        except UsageError as error:
            refused.append(error)
        loop.cancel(first)

    first = Request(list(range(20)), 50, Waited(on_token))
    loop.submit(first)
    assert sink_of(first).end() == "cancelled"
    assert len(sink_of(first).tokens) == len(refused) == 1
    loop.close()


def test_a_sink_may_close_the_loop() -> None:
    loop = loop_over()
    request = submitted(loop, range(20), 50, loop.close)
    assert isinstance(sink_of(request).end(), UsageError)
    with pytest.raises(UsageError):
        submitted(loop, [1])


def test_a_call_runs_while_nothing_is_in_flight() -> None:
    executor = FakeExecutor()
    loop = loop_over(executor)
    request = submitted(loop, range(20), 400)
    seen = [loop.call(lambda: (executor.in_flight, threading.current_thread().name)) for _ in range(20)]
    assert set(seen) == {(0, "zincmetal-steps")}
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 // 0)
    assert sink_of(request).end() == "length"
    loop.close()


def test_a_lost_device_ends_all_and_the_thread_lives() -> None:
    executor = SlowExecutor()
    loop = loop_over(executor)
    requests = [submitted(loop, range(20 + i), 400) for i in range(3)]
    assert executor.reached.wait(TIMEOUT)
    executor.fail = "submit"
    executor.go.set()
    assert all(isinstance(sink_of(request).end(), DeviceError) for request in requests)
    assert sink_of(submitted(loop, range(9))).end() == "length"
    loop.close()


def test_an_error_of_the_scheduler_itself_is_typed() -> None:
    executor = FakeExecutor()
    executor.submit = lambda batch: 1 // 0  # type: ignore[method-assign,assignment,return-value]
    loop = loop_over(executor)
    error = sink_of(submitted(loop, range(9))).end()
    assert isinstance(error, DeviceError)
    assert isinstance(error.__cause__, ZeroDivisionError)
    loop.close()


def test_the_thread_outlives_what_a_callback_raises(caplog: pytest.LogCaptureFixture) -> None:
    def leaves(ids: Any, logits: Any) -> Any:
        raise SystemExit(3)

    loop = loop_over()
    params = SamplingParams(logits_processors=[leaves])
    error = sink_of(submitted(loop, range(9), params=params)).end()
    assert isinstance(error, DeviceError)
    assert isinstance(error.__cause__, SystemExit)
    assert sink_of(submitted(loop, range(9))).end() == "length"
    loop.close()


def test_the_end_comes_once_and_on_no_thread_that_steps_still() -> None:
    ends: list[threading.Thread] = []
    never = StepLoop(Scheduler(FakeExecutor()), lambda: ends.append(threading.current_thread()))
    never.close()
    never.close()
    assert ends == [threading.current_thread()]
    ends.clear()
    loop = StepLoop(Scheduler(FakeExecutor()), lambda: ends.append(threading.current_thread()))
    request = submitted(loop, range(30), 50, on_token=loop.close)
    assert isinstance(sink_of(request).end(), UsageError)
    loop.close()
    assert [thread.name for thread in ends] == ["zincmetal-steps"]
    assert len(sink_of(request).tokens) < 50


def test_a_holder_of_the_engine_closes_without_waiting_for_itself() -> None:
    ends: list[int] = []
    loop = StepLoop(Scheduler(FakeExecutor()), lambda: ends.append(1))
    with loop.exclusive():
        loop.close()
        assert ends == []
    loop.close()
    assert ends == [1]


def test_a_loop_that_nobody_has_ends_its_thread() -> None:
    before = len(stepping())
    loop = loop_over()
    assert sink_of(submitted(loop, range(30))).end() == "length"
    gone = weakref.ref(loop)
    del loop
    deadline = time.monotonic() + TIMEOUT
    while (gone() is not None or len(stepping()) > before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.001)
    assert gone() is None
    assert len(stepping()) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_child_of_a_fork_is_told() -> None:
    loop = loop_over()
    assert sink_of(submitted(loop, range(30))).end() == "length"
    read, write = os.pipe()
    child = os.fork()
    if not child:
        told = []
        for call in (lambda: submitted(loop, [1]), lambda: loop.call(lambda: None)):
            try:
                call()
                told.append("nothing")
            except DeviceError as error:
                told.append("fork" if "fork" in str(error) else "other")
        loop.close()
        loop.cancel(Request([1], 1, Waited()))
        os.write(write, " ".join(told).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        assert answer.read() == "fork fork"
    os.waitpid(child, 0)
    assert sink_of(submitted(loop, range(9))).end() == "length"
    loop.close()
