"""Streams and exit status of a command.

Pipes that nobody reads, full disks, closed streams and encodings without Unicode end in one line and a status.
Warnings, errors and a model's text are printed here too.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import OutOfMemoryError, ZincError, memory_ended
from .progress import hidden_bar

FAILED, INTERRUPTED = 1, 130  # the package's docstring has the whole convention
PREFIX = "zincmetal: "  # of every message
#: Control characters, which a terminal obeys, as escapes. Line ends and tabs stay.
_VISIBLE = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if c not in (9, 10)}


def command(run: Callable[[], int], reader_gone: int = FAILED) -> int:
    """Run a command, show its warnings, and return its exit status.

    ``reader_gone`` is the status if the reader of standard output has gone away.
    """
    _open_closed_streams()
    try:
        with _warnings_shown():
            status = _status_of(run)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return reader_gone
    except KeyboardInterrupt:
        return _flushed(INTERRUPTED)
    except ZincError as error:
        complain(error)
        return _flushed(FAILED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EBADF):
            raise
        _discard_output()
        complain(f"the output cannot be written: {error.strerror}")
        return FAILED
    except Exception as error:
        if not memory_ended(error):
            raise
        complain(OutOfMemoryError("this machine has no memory left"))
        return _flushed(FAILED)
    return status


def _status_of(run: Callable[[], int]) -> int:
    """Return the status that a command returns, or exits with, as after --help."""
    try:
        return run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else FAILED


def say(text: str) -> None:
    """Print a line on standard error, if there is one."""
    with suppress(OSError, ValueError), hidden_bar():
        print(text, file=sys.stderr, flush=True)


def complain(problem: object) -> None:
    """Print an error on standard error, with the prefix of the command."""
    say(f"{PREFIX}{problem}")


def print_piece(text: str) -> None:
    """Print a piece of a model's text at once. A terminal gets its control characters as escapes."""
    print(text.translate(_VISIBLE) if sys.stdout.isatty() else text, end="", flush=True)


class _Warnings(logging.Handler):
    """Shows the messages that zincmetal logs at level WARNING and above, and others with their time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message on standard error, as one line."""
        if record.levelno < logging.WARNING:
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
            say(f"{at} {record.getMessage()}")
        else:
            say(f"{PREFIX}{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def shown_too(name: str) -> Iterator[None]:
    """Show what a logger of the package logs at level INFO, while the block runs."""
    logger = logging.getLogger(name)
    handlers = [h for h in logging.getLogger("zincmetal").handlers if isinstance(h, _Warnings)]
    before = logger.level
    logger.setLevel(logging.INFO)
    for handler in handlers:
        handler.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        for handler in handlers:
            handler.setLevel(logging.WARNING)


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show the warnings of the package while the block runs. Nested commands show each once."""
    logger = logging.getLogger("zincmetal")
    if any(isinstance(h, _Warnings) for h in logger.handlers):
        yield
        return
    handler = _Warnings(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def print_json(value: Any) -> None:
    """Print one line of JSON. Characters outside the encoding of standard output are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    print(as_json(value, ascii_only=not encoding.lower().replace("-", "").startswith("utf8")))


def as_json(value: Any, ascii_only: bool = False, indent: int | None = None) -> str:
    """Make JSON that every reader takes: numbers that are not finite are null, lone surrogates are escaped."""
    text = json.dumps(_finite(value), ensure_ascii=ascii_only, indent=indent, allow_nan=False)
    return "".join(json.dumps(c)[1:-1] if "\ud800" <= c <= "\udfff" else c for c in text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flushed(status: int) -> int:
    """Flush standard output, or discard it if that fails, and return the status."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _discard_output()
    return status


def _open_closed_streams() -> None:
    """Replace streams that were closed before the start. Show escapes if the encoding has no Unicode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Keep the interpreter's last flush from complaining about text that cannot be written."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
