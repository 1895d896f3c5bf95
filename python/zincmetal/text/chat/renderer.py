"""Starts, asks, watches and ends the sandbox: the process that renders chat templates.

The process is a Python that runs ``sandbox.py``. A frozen application, such as PyInstaller makes, has no Python to
start. Its ``sys.executable`` is the application, which would start itself again. There the process is a fork.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from ...errors import ChatTemplateError
from ...settings import PYTHON
from . import sandbox
from .resident import resident

START_LIMIT = 20.0  # seconds until the process must say hello, and then until it has imported jinja2
BUSY = 10  # times its limit, by the clock, that a process has on a busy machine before the parent kills it
SOON = 0.005  # seconds that an ordinary template takes; only then the parent starts to watch
PULSE = 0.001  # seconds between two looks at the memory of the process
MOST_FILES = 1 << 16  # open files of a parent, at most
WATCHED = 5 / 8  # share of the memory limit that ends the process; the rest is for its growth between two looks


class Ended(Exception):
    """Raised for a process that has ended. The message continues the words "the chat template"."""


class Forked:
    """Child made by fork, with the methods of ``subprocess.Popen`` that are needed here."""

    def __init__(self, settings: dict[str, Any]) -> None:
        requests, self_requests = os.pipe()
        self_answers, answers = os.pipe()
        self.returncode: int | None = None
        self.beside = 0  # resident bytes at its start; most of them belong to the parent
        self.pid = os.fork()
        if self.pid == 0:
            _serve_forked(requests, answers, settings)
        os.close(requests)
        os.close(answers)
        self.stdin: IO[bytes] = os.fdopen(self_requests, "wb")
        self.stdout: IO[bytes] = os.fdopen(self_answers, "rb")

    def poll(self) -> int | None:
        """Return the exit status, or None before the end."""
        return self._waited(os.WNOHANG)

    def wait(self) -> int | None:
        """Wait for the end, and return the exit status."""
        return self._waited(0)

    def kill(self) -> None:
        """End the child."""
        os.kill(self.pid, signal.SIGKILL)

    def _waited(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # other code has already waited for it
                pid, status = self.pid, 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _serve_forked(requests: int, answers: int, settings: dict[str, Any]) -> None:
    """Serve requests in the forked child, to its end. It uses no object of the parent, whose locks may be held."""
    status = 1
    try:
        os.setsid()  # Ctrl-C must reach the caller alone
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(requests, 0)
        os.dup2(answers, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.closerange(3, MOST_FILES)
        sandbox.serve(os.fdopen(0, "rb"), os.fdopen(1, "wb"), settings)
        status = 0
    finally:
        os._exit(status)


Child = subprocess.Popen[bytes] | Forked


class Renderer:
    """Sandbox process and its pipe. One process serves all templates, and starts when it is needed."""

    def __init__(self) -> None:
        self._no_python: str | None = None  # an executable that was tried and is no Python
        self.reset()
        os.register_at_fork(after_in_child=self.reset)  # the pipe belongs to the parent alone
        atexit.register(self.stop)

    def reset(self) -> None:
        """Forget the process: after a fork, it belongs to the parent."""
        self._lock = threading.Lock()
        self.child: Child | None = None

    def ask(self, request: dict[str, Any], memory: int) -> Any:
        """Answer a request. Raises ChatTemplateError if the process ends before its answer."""
        with self._lock:
            try:
                if self.child is None:
                    self.child = self._start(memory)
                    _wait_until_ready(self.child, memory)
                return _exchange(self.child, request, memory)
            except Ended as end:
                self.stop()
                raise ChatTemplateError(f"the chat template {end}") from None
            except BaseException:  # such as Ctrl-C: nobody would read the answer that comes later
                self.stop()
                raise

    def _start(self, memory: int) -> Child:
        settings = {"path": [p for p in sys.path if isinstance(p, str)], "memory": memory, "forked": False}
        python = _python()
        if python is not None and python != self._no_python:
            self.child = spawn(python, settings)
            if _says_hello(self.child):
                return self.child
            self.stop()
            self._no_python = python  # it may be an application, which must not start twice
            if PYTHON.value:
                raise ChatTemplateError(f"{PYTHON.name}={python} is not a Python of version 3.10 or later")
        self.child = child = Forked(settings | {"forked": True})
        if not _says_hello(child):
            raise ChatTemplateError(
                f"chat templates run in a Python process of their own, and none starts: "
                f"set {PYTHON.name} to the path of one"
            )
        child.beside = resident(child.pid) or 0
        return child

    def stop(self) -> None:
        """End the process, if there is one. The next request starts another."""
        child, self.child = self.child, None
        if child is not None:
            for pipe in (child.stdin, child.stdout):
                _close(pipe)
            if child.poll() is None:
                child.kill()
            child.wait()


def _python() -> str | None:
    """Find the Python to start. None if no executable is surely a Python."""
    if named := PYTHON.value:
        return named
    is_python = Path(sys.executable or "").name.lower().startswith(("python", "pypy"))
    return sys.executable if is_python and not getattr(sys, "frozen", False) else None


def spawn(python: str, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start ``sandbox.py`` in an isolated Python. Raises ChatTemplateError if the system cannot."""
    try:
        return subprocess.Popen(
            [python, "-I", "-S", str(Path(sandbox.__file__)), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must reach the caller alone
        )
    except OSError as error:
        raise ChatTemplateError(f"chat templates run in a Python process of their own: {error}") from error


def _says_hello(child: Child) -> bool:
    assert child.stdout is not None
    n = sandbox.LENGTH.size + len(json.dumps(sandbox.HELLO))
    deadline, said = time.monotonic() + START_LIMIT, b""
    while len(said) < n and _readable(child, deadline - time.monotonic()):
        piece = os.read(child.stdout.fileno(), n - len(said))
        if not piece:
            break
        said += piece
    return said[sandbox.LENGTH.size :] == json.dumps(sandbox.HELLO).encode()


def _readable(child: Child, seconds: float) -> bool:
    assert child.stdout is not None
    poll = select.poll()
    poll.register(child.stdout.fileno(), select.POLLIN)
    return bool(poll.poll(max(seconds, 0) * 1000))


def _wait_until_ready(child: Child, memory: int) -> None:
    """Wait until the process has imported jinja2, which is not the time of a template. Raises Ended if it cannot."""
    assert child.stdout is not None
    if not _readable(child, START_LIMIT):
        raise Ended(f"needs jinja2, whose import takes more than {START_LIMIT:g} seconds")
    if sandbox.read_message(child.stdout) != sandbox.READY:
        raise Ended(_cause(child.wait(), START_LIMIT, memory))


def _exchange(child: Child, request: dict[str, Any], memory: int) -> Any:
    """Send a request and read the answer."""
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        sandbox.write_message(child.stdin, request)
        if not _readable(child, SOON):
            _watch(child, request["seconds"], memory)
        reply = sandbox.read_message(child.stdout)
    except OSError:
        reply = None
    if reply is None:
        raise Ended(_cause(child.wait(), request["seconds"], memory))
    return reply


def _watch(child: Child, seconds: float, memory: int) -> None:
    """Wait for an answer. Kills a process that takes too much time or memory."""
    deadline = time.monotonic() + BUSY * seconds
    limit = int(memory * WATCHED) + getattr(child, "beside", 0)
    while not _readable(child, PULSE):
        if (resident(child.pid) or 0) > limit:
            child.kill()
            raise Ended(_too_much(memory))
        if time.monotonic() > deadline:
            child.kill()
            raise Ended(_too_long(seconds))


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except OSError:  # unsent bytes for a process that has ended
        pass


def _too_long(seconds: float) -> str:
    return f"takes more than {seconds:g} seconds"


def _too_much(memory: int) -> str:
    return f"needs more than {memory >> 20} MiB of memory"


def _cause(status: int | None, seconds: float, memory: int) -> str:
    """Explain the end of the process, by its exit status."""
    if status == -signal.SIGPROF:
        return _too_long(seconds)
    if status == sandbox.NO_JINJA:
        return "needs jinja2, which is not installed: pip install jinja2"
    if status == sandbox.OLD_JINJA:
        oldest = ".".join(map(str, sandbox.OLDEST_JINJA))
        return (
            f"needs jinja2 {oldest} or later, because older versions let a template out of its sandbox: "
            f"pip install 'jinja2>={oldest}'"
        )
    if status == sandbox.OUT_OF_MEMORY:
        return _too_much(memory)
    return f"ended its process with status {status}"
