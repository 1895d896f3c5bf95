"""Process of one model: it loads the model and answers the server through a socket. No HTTP is imported here.

So a device that is lost, or a fault of a driver, ends one model and not the server; and the thread that steps shares no
interpreter with the sockets of clients. Three threads meet: this module's main thread reads orders, the engine's
thread steps, and the *outbox* sends what has become ready. A step makes a chunk for each sequence. While the engine's
thread waits for the device, the outbox sends all of them in one frame.

The process ends when the socket does. The signals of a terminal are the server's.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from math import prod
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from ..errors import CLOSED, DeviceError, OutOfMemoryError, UsageError, typed_errors
from . import channel
from .channel import (
    Answered,
    Call,
    Cancel,
    Close,
    Embed,
    Ended,
    Facts,
    Failed,
    Frames,
    Load,
    Loading,
    LoadOptions,
    Lost,
    Open,
    Pieces,
    Planned,
    Reading,
    Ready,
    Rerank,
    Start,
    Started,
    asked_of_data,
    problem_of,
)

if TYPE_CHECKING:
    from ..api.handle import Generation
    from ..api.model import Model

LAST_SECONDS = 10.0  # for the close of a model: a lost device may never let go
CPU_SHARE = 0.75  # of the machine's memory, which all programs share; GPUs say themselves what they grant
OTHER_VERSION = 3  # exit status
PROGRESS_STEPS = 200  # of a load, at most
#: Program that starts this module with the import path of the server: see ``remote.command``.
BOOT = "import sys; sys.path[:] = sys.argv[4:]; from zincmetal.serve.worker import main; main()"

_log = logging.getLogger("zincmetal.serve")


def main() -> None:
    """Serve one model. Arguments: the socket's number, the protocol, and the name for messages."""
    fd, protocol, name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(each, signal.SIG_IGN)  # the server drains, and then ends this process
    with suppress(OSError):
        os.dup2(2, 1)  # what a driver prints is no output of the server
    logging.basicConfig(format=f"zincmetal[{name}]: %(levelname)s: %(message)s", level=logging.WARNING)
    if protocol != channel.PROTOCOL:
        _log.error("the package was changed while the server runs: start the server again")
        sys.exit(OTHER_VERSION)
    with socket.socket(fileno=fd) as connection:
        Worker(connection).run()


class Outbox:
    """Sends reports on a thread of its own: whatever is ready goes in one frame."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._ready: SimpleQueue[Callable[[], list[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="zincmetal-outbox", daemon=True)
        self._thread.start()

    def send(self, report: Any) -> None:
        """Send a report."""
        self._ready.put(lambda: [report])

    def when_sent(self, take: Callable[[], list[Any]]) -> None:
        """Send the reports that ``take`` returns at the time of sending."""
        self._ready.put(take)

    def end(self) -> None:
        """Send what there is, and end the thread."""
        self._ready.put(None)
        self._thread.join(LAST_SECONDS)

    def _run(self) -> None:
        ended = False
        while not ended:
            takes = [self._ready.get()]
            with suppress(Empty):
                while True:
                    takes.append(self._ready.get_nowait())
            ended = None in takes
            reports = [report for take in takes if take is not None for report in take()]
            if not reports:
                continue
            try:
                self._connection.sendall(channel.frame_of(reports))
            except OSError:  # the server has gone; the thread that reads ends the process
                return


class Stream:
    """Generation on its way to the server."""

    def __init__(self, id: int, generation: Generation, outbox: Outbox, at_end: Callable[[int, Any], None]) -> None:
        self.id, self.generation, self._outbox, self._at_end = id, generation, outbox, at_end

    def watch(self) -> None:
        """Send what happens, from now on."""
        self.generation.when_ready(lambda: self._outbox.when_sent(self._take))

    def _take(self) -> list[Any]:
        """Return the reports of what is ready, and ask to be called again."""
        from ..api.result import Chunk

        reports: list[Any] = []
        chunks: list[Chunk] = []
        events, ended = self.generation.take_ready()
        for event in events:
            if isinstance(event, Chunk):
                chunks.append(event)
            else:
                reports.append(Reading(self.id, *event))
        if chunks:
            reports.append(Pieces(self.id, chunks))
        if not ended:
            self.watch()
            return reports
        error: BaseException | None = None
        try:
            reports.append(Ended(self.id, self.generation.result()))
        except Exception as caught:
            error = caught
            reports.append(Failed(self.id, problem_of(error)))
        self._at_end(self.id, error)
        return reports


class _Lane:
    """Thread that does one piece of work after another."""

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.put = self._work.put
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._work.get()()


class Worker:
    """Model of this process, and the orders that it takes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._outbox = connection, Outbox(connection)
        self._options = LoadOptions("")
        self._model: Model | None = None
        self._streams: dict[int, Stream] = {}
        self._starting: dict[int, bool] = {}  # starts of which the lane has not heard the end; True: cancelled
        self._lock = threading.Lock()  # of the two above
        self._calls, self._grammars = _Lane("zincmetal-calls"), _Lane("zincmetal-grammars")
        self._texts = _Lane("zincmetal-texts")  # a long list of them does not hold up other calls

    def run(self) -> None:
        """Take orders until the socket ends or the server says so. Then close the model and end the process."""
        frames = Frames()
        with suppress(OSError, _End):
            while data := self._connection.recv(1 << 20):
                for body in frames.feed(data):
                    for order in channel.orders.decode(body):
                        self._take(order)
        self._end(0)

    def _end(self, status: int) -> None:
        """Close the model and end the process, within ``LAST_SECONDS`` in any case."""
        timer = threading.Timer(LAST_SECONDS, lambda: os._exit(status))
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:  # the system starts no thread now
            signal.alarm(int(LAST_SECONDS))
        with suppress(Exception):
            if self._model is not None:
                self._model.close()
        self._outbox.end()
        os._exit(status)  # a load that runs, or a thread in a driver, does not hold it up

    def _take(self, order: channel.Order) -> None:
        if isinstance(order, Start):
            self._starting[order.id] = False
            if order.asked.get("grammar") is None and order.asked.get("reasoning") is None:
                self._start(order)
            else:  # compiling a grammar takes a while; others do not wait for it
                self._grammars.put(lambda: self._start(order))
        elif isinstance(order, Cancel):
            self._cancel(order.id)
        elif isinstance(order, Call):
            self._call(order)
        elif isinstance(order, Embed | Rerank):
            self._later(order.id, lambda: self._read_texts(order), self._texts)
        elif isinstance(order, Open):
            self._options = order.options
            self._later(0, lambda: self._outbox.send(planned(order.options)))
        elif isinstance(order, Load):
            self._later(0, lambda: self._load(order))
        elif isinstance(order, Close):
            raise _End

    # ---- slow work: loading, and calls that wait for a step -----------------------------------------------------

    def _later(self, id: int, work: Callable[[], None], lane: _Lane | None = None) -> None:
        """Do work on another thread, so that orders are read meanwhile. Its error goes to the server."""

        def run() -> None:
            try:
                with typed_errors:
                    work()
            except Exception as error:
                self._fail(id, error)

        (lane or self._calls).put(run)

    def _load(self, order: Load) -> None:
        from .. import settings
        from ..api.load import load

        o = self._options
        os.environ[settings.MEMORY_LIMIT.name] = str(order.limit)  # pools grow up to it
        model = load(
            o.path,
            context=order.context,
            device=o.device,
            kv=o.kv,
            threads=o.threads,
            max_sequences=order.parallel,
            queue_limit=o.queue,
            cache=o.cache,
            cache_dir=o.cache_dir,
            progress=self._progress(),
        )
        self._model = model
        self._outbox.send(Ready(model.config.n_ctx, order.parallel))

    def _progress(self) -> Callable[[int, int], None]:
        told = -1

        def progress(done: int, total: int) -> None:
            nonlocal told
            step = done * PROGRESS_STEPS // max(1, total)
            if step != told:
                told = step
                self._outbox.send(Loading(done, total))

        return progress

    # ---- generations and calls -----------------------------------------------------------------------------------

    def _loaded(self) -> Model:
        if self._model is None:
            raise UsageError(CLOSED)
        return self._model

    def _start(self, order: Start) -> None:
        try:
            with typed_errors:
                model = self._loaded()
                asked = asked_of_data(order.asked, _unread)
                asked.params.check_vocabulary(model.config.n_vocab)
                generation = model.start(asked)
        except Exception as error:
            self._starting.pop(order.id, None)
            self._fail(order.id, error)
            return
        self._outbox.send(Started(order.id))
        with self._lock:
            stream = self._streams[order.id] = Stream(order.id, generation, self._outbox, self._ended)
            cancelled = self._starting.pop(order.id)
        stream.watch()
        if cancelled:
            generation.cancel()

    def _cancel(self, id: int) -> None:
        with self._lock:
            stream = self._streams.get(id)
            if id in self._starting:
                self._starting[id] = True
        if stream is not None:
            stream.generation.cancel()

    def _ended(self, id: int, error: BaseException | None) -> None:
        """Forget a generation that has ended. Find out whether an error of the device is one of all to come."""
        self._streams.pop(id, None)
        if type(error) is DeviceError:
            self._later(0, self._try_device)

    def _try_device(self) -> None:
        """End the process if the device fails again, with one token. The server then starts another."""
        from ..api.generation import Asked
        from ..sampling.params import SamplingParams

        try:
            model = self._loaded()
            if model.config.causal:
                model.start(Asked([0], 1, SamplingParams())).result()
            else:
                model.embed([0])
        except OutOfMemoryError:
            pass
        except DeviceError as error:
            self._outbox.send(Lost(problem_of(error)))
            self._end(1)
        except Exception as error:
            _log.error("the device was not tried: %s", _place_of(error))

    def _call(self, order: Call) -> None:
        model = self._model
        calls: dict[str, Callable[[Model], Any]] = {
            "figures": lambda model: model.figures(),
            "clear_cache": lambda model: model.clear_cache(),
            "score": lambda model: model.prompt_scores(order.ids, order.n_top),
        }
        if model is None or order.what not in calls:
            self._fail(order.id, UsageError(CLOSED if model is None else f"no call is named {order.what}"))
            return

        def call() -> None:
            self._outbox.send(Answered(order.id, calls[order.what](model)))

        if order.what == "figures":  # it does not wait for a step
            call()
        else:
            self._later(order.id, call)

    def _read_texts(self, order: Embed | Rerank) -> None:
        """Make vectors of texts, or scores of documents."""
        from .texts import embedded, reranked

        model = self._loaded()
        try:
            if isinstance(order, Embed):
                found = embedded(model, order.texts, order.normalize, order.dimensions)
            else:
                found = reranked(model, order.query, order.documents, order.instruction)
        except DeviceError:
            self._later(0, self._try_device)
            raise
        self._outbox.send(Answered(order.id, list(found)))

    def _fail(self, id: int, error: BaseException) -> None:
        problem = problem_of(error)
        if channel.is_bug(problem):
            _log.error("an error that nobody expected: %s", _place_of(error))
        self._outbox.send(Failed(id, problem))


def _place_of(error: BaseException) -> str:
    """Return the type of an error, and the lines of code that it came through. Its message may quote a prompt."""
    return f"{type(error).__name__} at\n{''.join(traceback.format_tb(error.__traceback__))}"


class _End(Exception):
    """The server has asked for the end."""


def _unread(done: int, total: int) -> None:
    """Ask for progress, which ``take_ready`` returns."""


def planned(options: LoadOptions) -> Planned:
    """Read a file, open its device, and estimate the memory of the model. Nothing is allocated."""
    from .. import config, gguf, models, settings
    from ..api.naming import model_name
    from ..device import backend
    from ..plan.estimate import device_budget
    from ..plan.planner import Planner
    from ..plan.target import Target

    with gguf.open(options.path) as file:
        core, device = backend.open_device(options.device, options.threads)
        family = models.get(file.require("general.architecture", str))
        trained = config.from_file(file, family.traits).n_ctx_train
        # The arena of the longest context is the largest, so that any context is safe with this estimate.
        planner = Planner(file, Target.of(core, device.info), options.context or trained, options.kv)
        found = planner.config
        name = model_name(file, found)
        facts = Facts(
            name=name,
            arch=found.arch,
            quantization=name.rpartition(" ")[2],
            n_ctx_train=found.n_ctx_train,
            n_vocab=found.n_vocab,
            n_params=sum(prod(tensor.shape) for tensor in file.tensors.values()),
            nbytes=sum(tensor.nbytes for tensor in file.tensors.values()),
            device=str(device.info["name"]),
        )
        budget = device_budget(device.info["working_set_bytes"])
        if device.info["backend"] == "cpu" and settings.memory_limit() is None:
            budget = int(budget * CPU_SHARE)
        return Planned(facts, planner.memory(), budget)
