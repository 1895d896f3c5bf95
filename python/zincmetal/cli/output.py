"""What a command does where its output ends: pipes that nobody reads, full disks, closed streams, other encodings."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..errors import OutOfMemoryError, ZincError, memory_ended

FAILED, INTERRUPTED = 1, 130


def command(run: Callable[[], int], prefix: str = "zincmetal: ", reader_gone: int = FAILED) -> int:
    """Run a command; its exit status: 1 after an error, said on standard error, 130 after Ctrl-C.

    ``reader_gone`` is the status, without a word, where whoever read standard output has seen enough.
    """
    _open_closed_streams()
    try:
        status = _status_of(run)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return reader_gone
    except KeyboardInterrupt:
        return _flushed(INTERRUPTED)
    except ZincError as error:
        say(f"{prefix}{error}")
        return _flushed(FAILED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EBADF):
            raise
        _discard_output()
        say(f"{prefix}the output cannot be written: {error.strerror}")
        return FAILED
    except Exception as error:
        if not memory_ended(error):
            raise
        say(f"{prefix}{OutOfMemoryError('the memory of this machine has ended')}")
        return _flushed(FAILED)
    return status


def _status_of(run: Callable[[], int]) -> int:
    """What a command returns, or exits with: as after --help, whose text may have no reader either."""
    try:
        return run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else FAILED


def say(text: str) -> None:
    """A line on standard error, as far as there is one."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One line of JSON, in whatever encoding standard output has: what that cannot hold is escaped as JSON does."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    print(as_json(value, ascii_only=not encoding.lower().replace("-", "").startswith("utf8")))


def as_json(value: Any, ascii_only: bool = False, indent: int | None = None) -> str:
    """A value as JSON that every reader takes: numbers that are not finite are null, lone surrogates are escaped."""
    text = json.dumps(_finite(value), ensure_ascii=ascii_only, indent=indent, allow_nan=False)
    return "".join(json.dumps(c)[1:-1] if "\ud800" <= c <= "\udfff" else c for c in text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flushed(status: int) -> int:
    """The status, once what was printed before is out, or cannot be any more."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _discard_output()
    return status


def _open_closed_streams() -> None:
    """A stream that was closed before the start takes everything in; one without Unicode shows escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Keep the interpreter's last flush from complaining about what cannot be written."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
