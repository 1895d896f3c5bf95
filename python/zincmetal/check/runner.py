"""Runs the worker, and goes on in another one where a check took the process or the device down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any

from .results import FAIL, PASS, WARN, Outcome, Result

WORKER = (sys.executable, "-m", "zincmetal.check.worker")
TIMEOUT = 600.0  # seconds without a word: compiling all kernels takes less, and so do a large model's first tokens
MAX_WORKERS = 40  # a device that fails at everything need not fail at every kernel
LAST_WORDS = 4000  # characters of what a check printed


def run(
    request: Mapping[str, Any],
    command: Sequence[str] = WORKER,
    timeout: float = TIMEOUT,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Result | list[str]]:
    """The results of all checks in order, and the names of those planned once they are known.

    ``request`` has "device", "file" and "only", as the worker takes them. A check that ends its process, or says
    nothing for ``timeout`` seconds, has failed. ``environment`` is set for the workers beside what is there.
    """
    done: list[str] = []
    planned: list[str] = []
    why = f"{MAX_WORKERS} processes failed"
    for _ in range(MAX_WORKERS):
        worker = Worker(command, {**request, "done": done}, timeout, environment or {})
        for event in worker.events():
            if "plan" in event:
                if not planned:
                    planned = event["plan"]
                    yield planned
            elif event["name"] not in done:
                done.append(event["name"])
                yield worker.result(event)
            elif event["status"] == FAIL:  # the device's, which every worker says
                why = f"the device cannot be opened again: {event['message']}"
        if worker.ended:
            break
        if not worker.again:
            name, death = worker.running or "worker", worker.death()
            if name in done:
                why = death
                break
            done.append(name)
            yield Result(name, Outcome(FAIL, death))
            if name in ("device", "worker"):
                why = "see above"
                break
    yield from (Result(name, Outcome(FAIL, f"not run: {why}")) for name in planned if name not in done)


class Worker:
    """A process that runs checks until all have ``ended``, another is to go on (``again``), or one is its last."""

    def __init__(
        self, command: Sequence[str], request: Mapping[str, Any], timeout: float, environment: Mapping[str, str]
    ) -> None:
        self.ended = self.again = False
        self.running: str | None = None
        self._command, self._request, self._timeout = command, request, timeout
        self._environment = {**os.environ, **environment}
        self._printed = TemporaryFile()  # noqa: SIM115
        self._timed_out = False
        self._status = 0
        self._read = 0  # bytes of what was printed

    def events(self) -> Iterator[dict[str, Any]]:
        """The plan and the results, as the worker says them."""
        with subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            text=True,
            env=self._environment,
        ) as process:
            try:
                assert process.stdin
                with suppress(BrokenPipeError), process.stdin:
                    json.dump(self._request, process.stdin)
                while line := self._line(process):
                    with suppress(json.JSONDecodeError):  # a driver that prints to standard output
                        event = json.loads(line)
                        self.running = event.get("begin")
                        self.ended, self.again = "end" in event, "again" in event
                        if "plan" in event or "name" in event:
                            yield event
            finally:
                process.kill()
        self._status = process.returncode

    def _line(self, process: subprocess.Popen[str]) -> str:
        """The next line, or nothing where the process has ended, which it does when it takes too long."""
        assert process.stdout

        def end() -> None:
            self._timed_out = True
            process.kill()

        timer = threading.Timer(self._timeout, end)
        timer.start()
        try:
            return process.stdout.readline()
        finally:
            timer.cancel()

    def result(self, event: Mapping[str, Any]) -> Result:
        """A check's result. One that passed, but during which something was printed (by a validation layer), warns."""
        name, status, message, figures = (event[key] for key in ("name", "status", "message", "figures"))
        if printed := self._remarks(event.get("printed")):
            figures = {**figures, "stderr": printed}
            if name != "device" and status == PASS:  # layers announce themselves when a device opens
                status, message = WARN, f"{message}; it printed: {printed}"
        return Result(name, Outcome(status, message, figures))

    def death(self) -> str:
        """How the process ended, and its last words."""
        if self._timed_out:
            how = f"it said nothing for {self._timeout:g} seconds"
        elif self._status < 0:
            how = f"it ended the process: {signal.Signals(-self._status).name}"
        else:
            how = f"it ended the process with status {self._status}"
        printed = self._remarks()
        return f"{how}; it printed: {printed}" if printed else how

    def _remarks(self, end: int | None = None) -> str:
        """What the process has printed on standard error since this was asked last, up to byte ``end``: the end of it.

        The worker says where that is, as it may have begun the next check meanwhile.
        """
        # The worker writes with this file's own position: what is read is found by place.
        new = os.pread(self._printed.fileno(), 1 << 24 if end is None else max(0, end - self._read), self._read)
        self._read += len(new)
        return new.decode(errors="replace").strip()[-LAST_WORDS:]
