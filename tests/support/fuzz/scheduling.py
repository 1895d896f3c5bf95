"""Any order of calls and failures: each request ends once with its own tokens, and no page or slot is lost."""

from __future__ import annotations

from support.fake_executor import VOCAB, FakeExecutor
from support.fuzz.reading import Reading
from support.scheduler_lab import EOG_HEAVY, SEEDED, Lab, sink_of
from zincmetal.engine.request import Request
from zincmetal.errors import ContextFullError, DeadlineError, DeviceError, QueueFullError
from zincmetal.sampling.params import SamplingParams

MOST = 40  # calls
STEMS = [[(7 * i + 13 * k) % VOCAB for i in range(260)] for k in range(2)]


class _Run:
    """A scheduler, and what was asked of it."""

    def __init__(self, data: Reading) -> None:
        self.data = data
        executor = FakeExecutor(
            n_ctx=data.one((256, 512)),
            pages=3 + data.byte() % 6,
            pages_most=data.one((8, 10, 12, 30)),
            slots=1 + data.byte() % 4,
            slots_most=4 + data.byte() % 5,
            seats=1 + data.byte() % 6,
            max_rows=data.one((8, 32, 100)),
            max_singles=1 + data.byte() % 4,
            recurrent=bool(data.byte() & 1),
            runs_ahead=bool(data.byte() & 1),
        )
        self.lab = Lab(executor, bool(data.byte() & 1), queue_limit=2 + data.byte() % 10)
        self.requests: list[Request] = []
        self.failures = 0

    def submit(self) -> None:
        """Ask for tokens after the beginning of a stem and a tail."""
        data = self.data
        ids = [*STEMS[data.byte() & 1][: data.byte()], data.byte(), data.byte()]
        eog = EOG_HEAVY if data.byte() & 1 else frozenset[int]()
        params = data.one((SamplingParams(), SEEDED))
        options = {"deadline": 1.5} if data.byte() % 8 == 7 else {}
        marks = [1 + data.byte() for _ in range(data.byte() % 3)]
        request = self.lab.request(ids, data.byte() % 41, marks=marks, params=params, eog_ids=eog, **options)
        try:
            self.lab.scheduler.submit(request)
        except (QueueFullError, ContextFullError):
            assert not sink_of(request).ends
            return
        self.requests.append(request)

    def cancel(self) -> None:
        """Cancel one of the requests, ended or not."""
        if self.requests:
            self.lab.scheduler.cancel(self.data.one(self.requests))

    def fail(self) -> None:
        """Make the next call of a kind fail."""
        self.lab.executor.fail = self.data.one(("submit", "collect", "copy_page", "read_page", "grow"))
        self.failures += 1

    def step(self) -> None:
        """Step some times."""
        for _ in range(1 + self.data.byte() % 60):
            if not self.lab.scheduler.step():
                return

    def end(self) -> None:
        """Let everything end, and check that nothing is lost."""
        self.lab.executor.fail = ""
        self.lab.run(40 * sum(len(request.ids) + 300 for request in self.requests) + 10)
        assert not self.lab.scheduler.step(), "a request does not end"
        for request in self.requests:
            sink = sink_of(request)
            assert sink.ends == 1
            wanted = self.lab.expected(request)
            assert sink.tokens == wanted[: len(sink.tokens)]
            assert sink.error is None or isinstance(sink.error, (DeviceError, DeadlineError, ContextFullError))
            assert not isinstance(sink.error, DeviceError) or self.failures
        self.lab.check_owners()


def run(data: bytes) -> None:
    """Make the calls that these bytes say."""
    made = _Run(Reading(data))
    for _ in range(MOST):
        if not made.data:
            break
        made.data.one((made.submit, made.step, made.submit, made.cancel, made.step, made.fail))()
    made.end()


def seeds() -> list[bytes]:
    """Some requests at once, steps between, a cancel and a failure."""
    settings = bytes([1, 3, 2, 1, 2, 4, 1, 2, 0, 1, 1, 5])
    ask = bytes([0, 0, 200, 5, 6, 0, 0, 0, 0, 20])
    recurrent = bytes([*settings[:8], 1, *settings[9:]])
    return [
        s + ask * 3 + bytes([1, 30]) + ask + bytes([3, 1, 5, w, 4, 50]) for s in (settings, recurrent) for w in range(5)
    ]
