"""The process that renders chat templates, as its parent sees it: started, asked, watched, ended.

It is a Python that runs ``sandbox.py``. A frozen application (PyInstaller and its like) has none to start:
`sys.executable` is the application, which would start itself again. There the process is a fork.
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

START_LIMIT = 20.0  # seconds until the process says that it is there
GRACE = 0.25  # seconds that the process's own alarm has before the parent kills
SOON = 0.005  # seconds in which an ordinary template is done, before anybody watches
PULSE = 0.001  # seconds between two looks at its memory
MOST_FILES = 1 << 16  # that a parent has open
WATCHED = 5 / 8  # of the limit: what it allocates between two looks, on a busy machine, must fit into the rest


class Ended(Exception):
    """The process ended or was ended; the message says why, as what "the chat template" did."""


class Forked:
    """A child made by fork, as much like `subprocess.Popen` as is needed here."""

    def __init__(self, settings: dict[str, Any]) -> None:
        requests, self_requests = os.pipe()
        self_answers, answers = os.pipe()
        self.returncode: int | None = None
        self.beside = 0  # bytes that are resident at its start: much of that is the parent's
        self.pid = os.fork()
        if self.pid == 0:
            _serve_forked(requests, answers, settings)
        os.close(requests)
        os.close(answers)
        self.stdin: IO[bytes] = os.fdopen(self_requests, "wb")
        self.stdout: IO[bytes] = os.fdopen(self_answers, "rb")

    def poll(self) -> int | None:
        """The exit status, if it has ended."""
        return self._waited(os.WNOHANG)

    def wait(self) -> int | None:
        """The exit status, once it has ended."""
        return self._waited(0)

    def kill(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)

    def _waited(self, options: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # somebody else has waited for it
                pid, status = self.pid, 0
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _serve_forked(requests: int, answers: int, settings: dict[str, Any]) -> None:
    """What the forked child does, to its end. Nothing of the parent's may be touched: its locks may be held."""
    status = 1
    try:
        os.setsid()  # Ctrl-C is for the caller
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
    """The rendering process and its pipe: one for all templates, started when it is needed."""

    def __init__(self) -> None:
        self._no_python: str | None = None  # an executable that was tried and is none
        self.reset()
        os.register_at_fork(after_in_child=self.reset)  # the pipe stays the parent's
        atexit.register(self._stop)

    def reset(self) -> None:
        """Forget the process, which is somebody else's."""
        self._lock = threading.Lock()
        self._child: Child | None = None

    def ask(self, request: dict[str, Any], memory: int) -> Any:
        """The answer to a request. Raises ChatTemplateError where the process does not live to give it."""
        with self._lock:
            try:
                child = self._child = self._child or self._start(memory)
                return _exchange(child, request, memory)
            except Ended as end:
                self._stop()
                raise ChatTemplateError(f"the chat template {end}") from None
            except BaseException:  # such as Ctrl-C: what the process answers later belongs to nobody
                self._stop()
                raise

    def _start(self, memory: int) -> Child:
        settings = {"path": [p for p in sys.path if isinstance(p, str)], "memory": memory, "forked": False}
        python = _python()
        if python is not None and python != self._no_python:
            self._child = _spawn(python, settings)
            if _says_hello(self._child):
                return self._child
            self._stop()
            self._no_python = python  # it may be an application: never start it twice
            if PYTHON.value:
                raise ChatTemplateError(f"{PYTHON.name}={python} is not a Python of version 3.10 or later")
        self._child = child = Forked(settings | {"forked": True})
        if not _says_hello(child):
            raise ChatTemplateError(
                f"chat templates run in a Python process of their own, and none starts: "
                f"set {PYTHON.name} to the path of one"
            )
        child.beside = resident(child.pid) or 0
        return child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            for pipe in (child.stdin, child.stdout):
                _close(pipe)
            if child.poll() is None:
                child.kill()
            child.wait()


def _python() -> str | None:
    """The Python to start, or None where there is none to be sure of."""
    if named := PYTHON.value:
        return named
    is_python = Path(sys.executable or "").name.lower().startswith(("python", "pypy"))
    return sys.executable if is_python and not getattr(sys, "frozen", False) else None


def _spawn(python: str, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [python, "-I", "-S", str(Path(sandbox.__file__)), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the caller
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


def _exchange(child: Child, request: dict[str, Any], memory: int) -> Any:
    """The answer to a request."""
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
    """Return when there is an answer. Kills the process that takes too long or too much."""
    deadline = time.monotonic() + seconds + GRACE - SOON
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
    except OSError:  # unsent bytes for a process that is gone
        pass


def _too_long(seconds: float) -> str:
    return f"takes more than {seconds:g} seconds"


def _too_much(memory: int) -> str:
    return f"needs more than {memory >> 20} MiB of memory"


def _cause(status: int | None, seconds: float, memory: int) -> str:
    """Why the process ended, from its exit status."""
    if status == -signal.SIGALRM:
        return _too_long(seconds)
    if status == sandbox.NO_JINJA:
        return "needs jinja2, which is not installed: pip install jinja2"
    if status == sandbox.OLD_JINJA:
        oldest = ".".join(map(str, sandbox.OLDEST_JINJA))
        return (
            f"needs jinja2 {oldest} or later, as older ones let a template out of its sandbox: "
            f"pip install 'jinja2>={oldest}'"
        )
    if status == sandbox.OUT_OF_MEMORY:
        return _too_much(memory)
    return f"ended its process with status {status}"
