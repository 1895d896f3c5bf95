"""Input of a conversation: a terminal with editing and history, or the lines of a pipe."""

from __future__ import annotations

import io
import sys
from contextlib import suppress

PROMPT, MORE = "> ", ". "
BLOCK = '"""'


class Lines:
    """Reads messages, which may have several lines, from standard input."""

    def __init__(self) -> None:
        self.terminal = sys.stdin is not None and sys.stdin.isatty()
        self._ended = sys.stdin is None
        if self.terminal:
            with suppress(ImportError):
                import readline  # noqa: F401 - gives input() editing and history
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding=None if self.terminal else "utf-8", errors="replace")

    def message(self) -> str:
        """Return the next message or command, without the signs that join its lines.

        It may be empty. Raises EOFError at the end of the input.
        """
        line = self._line(PROMPT)
        if line.lstrip().startswith(BLOCK):
            return " " + self._block(line.lstrip().removeprefix(BLOCK))
        lines = []
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = self._next_line() or ""
        text = "\n".join([*lines, line])
        return text if text.strip() else ""

    def _block(self, line: str) -> str:
        """Return the lines up to the sign that ends the block, or to the end of the input."""
        lines = []
        while not line.rstrip().endswith(BLOCK):
            lines.append(line)
            further = self._next_line()
            if further is None:
                break
            line = further
        else:
            lines.append(line.rstrip().removesuffix(BLOCK))
        return "\n".join(lines).strip("\n")

    def _next_line(self) -> str | None:
        """Return a further line of a message, or None at the end of the input."""
        try:
            return self._line(MORE)
        except EOFError:
            return None

    def _line(self, prompt: str) -> str:
        """Return a line without its end. Raises EOFError at the end of the input."""
        if self._ended:
            raise EOFError
        if self.terminal and sys.stdout.isatty():
            return input(prompt)
        if self.terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        self._ended = not line and not self.terminal
        if not line:
            raise EOFError
        return line.rstrip("\r\n")
