"""A command on a terminal of its own, as a person uses it: keys in, screen out."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
ZINCMETAL = (sys.executable, "-m", "zincmetal")
PATIENCE = 60.0  # seconds; a test that waits so long fails


def _own_terminal() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests may ignore it
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """Runs ``python -m zincmetal ARGS`` or another program on a terminal of 80 columns; ``stdout`` may be elsewhere."""

    def __init__(self, args: Sequence[str], program: Sequence[str] = ZINCMETAL, stdout: int | None = None) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.screen = ""
        self._seen = 0
        self.process = subprocess.Popen(
            [*program, *args],
            stdin=theirs,
            stdout=theirs if stdout is None else stdout,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_own_terminal,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def wait_for(self, text: str, patience: float = PATIENCE) -> str:
        """Wait until the screen shows a text after everything waited for before; the screen up to it."""
        deadline = time.monotonic() + patience
        while (at := self.screen.find(text, self._seen)) < 0:
            assert self._read(deadline), f"{text!r} is not on the screen: {self.screen[self._seen :]!r}"
        before, self._seen = self.screen[self._seen : at], at + len(text)
        return before

    def interrupt(self, until: str) -> str:
        """Press Ctrl-C until the screen shows a text; as wait_for.

        Python drops an interrupt that meets a finaliser, and one just before its line editor waits for a key.
        """
        for _ in range(10):
            self.type(CTRL_C)
            with suppress(AssertionError):
                return self.wait_for(until, PATIENCE / 10)
        raise AssertionError(f"Ctrl-C does not lead to {until!r}: {self.screen[self._seen :]!r}")

    def status(self) -> int:
        """Wait for the end; the exit status."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(PATIENCE)

    def _read(self, deadline: float) -> bool:
        """Read more of the screen; False at the end, or after the deadline."""
        if not select.select([self._ours], [], [], max(deadline - time.monotonic(), 0))[0]:
            return False
        try:
            shown = os.read(self._ours, 1 << 16)
        except OSError:  # the error of a terminal whose other end is closed
            return False
        self.screen += shown.decode("utf-8", "replace")
        return bool(shown)
