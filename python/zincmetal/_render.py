"""The process that renders chat templates: a program that :mod:`zincmetal.chat` starts, not a module to import.

A template comes with a model file and is a program that nobody has read. No check inside an interpreter bounds it:
one multiplication, one sort, one `ljust` is a single call that allocates or computes for as long as it likes. Here
the kernel holds both bounds, an alarm that ends the process and a limit on its memory, whatever the template does.

Requests come on standard input and answers leave on standard output, each eight bytes of length and that much JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

LENGTH = struct.Struct("<Q")
OUT_OF_MEMORY = 77  # exit statuses
NO_JINJA = 78


class TooLong(Exception):
    """The text is longer than the caller allows."""


def read_message(stream: IO[bytes]) -> Any | None:
    """The next message, or None at the end of the stream."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (n,) = LENGTH.unpack(header)
    body = stream.read(n)
    return json.loads(body) if len(body) == n else None


def write_message(stream: IO[bytes], message: Any) -> None:
    """Send one message."""
    body = json.dumps(message).encode("ascii")
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: Hugging Face's environment of options, functions and filters."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the model wrote, for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 - how jinja2 declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def render(template: Template, variables: dict[str, Any], longest: int) -> str:
    """The text of a template, built from its pieces so that one without end is noticed early."""
    pieces: list[str] = []
    n = 0
    for piece in template.generate(variables):
        pieces.append(piece)
        n += len(piece)
        if n > longest:
            raise TooLong
    return "".join(pieces)


def answer(compiled: Callable[[str], Template], request: dict[str, Any]) -> dict[str, str]:
    """`text`, or `error` with what went wrong."""
    try:
        template = compiled(request["source"])
        return {"text": render(template, request["variables"], request["longest"])}
    except TooLong:
        return {"error": f"makes more than {request['longest']} characters of text"}
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:
        return {"error": f"fails: {type(error).__name__}: {error}"[:2000]}


def peak_memory() -> int:
    """The most memory that was ever resident, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def limit_memory(n_bytes: int) -> None:
    """Bound this process: by the kernel, and by a thread that watches, as macOS takes the limit but ignores it."""
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))
    before = peak_memory()  # may be the parent's: Linux carries it over

    def watch() -> None:
        while peak_memory() - before < n_bytes:
            time.sleep(0.005)
        os._exit(OUT_OF_MEMORY)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Answer requests until standard input ends."""
    settings = json.loads(sys.argv[1])
    sys.path[:] = settings["path"]
    limit_memory(settings["memory"])
    try:
        env = environment()
    except ImportError:
        os._exit(NO_JINJA)
    # A parent may ignore or block the alarm, and both are inherited.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    compiled = lru_cache(maxsize=8)(env.from_string)
    while (request := read_message(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])  # its default is to end the process
        reply = answer(compiled, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        write_message(sys.stdout.buffer, reply)


if __name__ == "__main__":
    main()
