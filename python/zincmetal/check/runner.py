"""Runs the checks in a worker process. If a check ends the process or loses the device, a new process continues."""

from __future__ import annotations

import json
import logging
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
TIMEOUT = 600.0  # seconds for one check: compiling all kernels takes less, and so do a large model's first tokens
MAX_WORKERS = 40  # a device that fails every check is not tried with every kernel
LAST_WORDS = 4000  # characters of a check's output that a message keeps

_log = logging.getLogger("zincmetal.check")


def run(
    request: Mapping[str, Any],
    command: Sequence[str] = WORKER,
    timeout: float = TIMEOUT,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Result | list[str]]:
    """Yield the names of the planned checks once they are known, and the result of every check in order.

    ``request`` is the worker's, without "done". A check fails if it ends its process or takes more than ``timeout``
    seconds. ``environment`` is added to the workers' own.
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
            elif event["status"] == FAIL:  # of the device, which every worker reports again
                why = f"the device cannot be opened again: {event['message']}"
        if worker.ended:
            break
        if not worker.again:
            name, death = worker.running or "worker", worker.death()
            _log.info("the worker ended during %s: %s", name, death)
            if name in done:
                why = death
                break
            done.append(name)
            yield Result(name, Outcome(FAIL, death))
            if name in ("device", "worker"):
                why = f"{name} failed"
                break
    yield from (Result(name, Outcome(FAIL, f"not run: {why}")) for name in planned if name not in done)


class Worker:
    """Process that runs checks.

    It stops when all checks have ``ended``, or when the device is lost and another process must continue (``again``).
    It also stops when a check ends it; ``running`` is the name of that check.
    """

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
        self._read = 0  # bytes of its output so far

    def events(self) -> Iterator[dict[str, Any]]:
        """Start the process; yield the plan and the results that it reports."""
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
                    with suppress(json.JSONDecodeError):  # a driver may print to standard output
                        event = json.loads(line)
                        self.running = event.get("begin")
                        self.ended, self.again = "end" in event, "again" in event
                        if "plan" in event or "name" in event:
                            yield event
            finally:
                process.kill()
        self._status = process.returncode

    def _line(self, process: subprocess.Popen[str]) -> str:
        """Read the next line; empty if the process has ended. A process that takes too long is ended."""
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
        """Make the result of a check. If a validation layer or a driver printed something, a pass becomes a warning."""
        name, status, message, figures = (event[key] for key in ("name", "status", "message", "figures"))
        if printed := self._remarks(event.get("printed")):
            figures = {**figures, "stderr": printed}
            if name != "device" and status == PASS:  # layers print a greeting when a device opens
                status, message = WARN, f"{message}; it printed: {printed}"
        return Result(name, Outcome(status, message, figures))

    def death(self) -> str:
        """Say how the process ended, and the last of its output."""
        if self._timed_out:
            how = f"it did not end within {self._timeout:g} seconds"
        elif self._status < 0:
            how = f"it ended the process: {signal.Signals(-self._status).name}"
        else:
            how = f"it ended the process with status {self._status}"
        printed = self._remarks()
        return f"{how}; it printed: {printed}" if printed else how

    def _remarks(self, end: int | None = None) -> str:
        """Return the last of the new output on standard error, up to byte ``end``.

        The worker reports ``end`` with each result, because it may already have begun the next check.
        """
        # The worker writes at this file's position, so the file is read by offset.
        new = os.pread(self._printed.fileno(), 1 << 24 if end is None else max(0, end - self._read), self._read)
        self._read += len(new)
        return new.decode(errors="replace").strip()[-LAST_WORDS:]
