"""Renders chat templates in a process of their own: a program that ``renderer.py`` starts, not a module to import.

A template comes with a model file and is a program that nobody has read. No check inside an interpreter can bound it.
One sort, one ``join`` or one product of large numbers is a single call of any duration and size. Three limits hold:

- A signal ends this process after its time on the processor.
- The operating system limits its memory. macOS does not, so there the parent watches.
- A value that is known to be huge before it exists (``'a' * 10 ** 10``) is not made.

Requests come on standard input, and answers leave on standard output. Each is eight bytes of length and then JSON.
The first message is a greeting: it shows that this is a Python which speaks this protocol. The second one comes when
jinja2 is imported: only from then on does a template take its time.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

LENGTH = struct.Struct("<Q")
OUT_OF_MEMORY = 77  # exit statuses
NO_JINJA = 78
OLD_JINJA = 79
OLDEST_JINJA = (3, 1, 6)  # before it, ``|attr('format')`` walks out of the sandbox
LARGEST = 1 << 25  # characters or elements of one value
HELLO, READY = "zincmetal renders", "ready"


class TooLong(Exception):
    """Raised for a text that is longer than the caller allows."""


def read_message(stream: IO[bytes]) -> Any | None:
    """Read the next message, or None at the end of the stream."""
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


# --- sizes that are known before a value exists


def check_size(n: int) -> None:
    """Raise MemoryError for a value of more than LARGEST characters or elements."""
    if n > LARGEST:
        raise MemoryError


def is_large(value: object) -> bool:
    """Return True for a number that is too large for any width, count or indentation."""
    return isinstance(value, int) and value > LARGEST


def check_product(left: Any, right: Any) -> None:
    """Check the size of ``left * right``. One of the two may be a sequence. Raises MemoryError."""
    for sequence, n in ((left, right), (right, left)):
        if isinstance(n, int) and isinstance(sequence, (str, bytes, list, tuple)):
            check_size(len(sequence) * n)


def check_pattern(pattern: str, arguments: Any = ()) -> None:
    """Check the widths that a pattern of ``%`` or ``format`` has, itself or by its arguments. Raises MemoryError."""
    for digits in re.findall(r"[0-9]{8,}", pattern):
        check_size(LARGEST + 1 if len(digits) > 9 else int(digits))
    values = arguments if isinstance(arguments, (tuple, list)) else (arguments,)
    if re.search(r"\*|\{[^}]*\{", pattern) and any(map(is_large, values)):  # ``%*d``, ``{:{}}``
        raise MemoryError


def check_call(name: str, value: Any, arguments: tuple[Any, ...]) -> None:
    """Check the size of the result of a string method, or of the filter with its name. Raises MemoryError."""
    if any(map(is_large, arguments)):
        raise MemoryError
    if not isinstance(value, str):
        return
    if name == "replace" and len(arguments) > 1 and all(isinstance(a, str) for a in arguments[:2]):
        check_size(len(value) + value.count(arguments[0]) * len(arguments[1]))
    elif name == "join" and arguments and isinstance(arguments[0], (list, tuple)):
        check_size(len(value) * len(arguments[0]))
    elif name == "expandtabs":
        check_size(value.count("\t") * (arguments[0] if arguments and isinstance(arguments[0], int) else 8))
    elif name == "format":
        check_pattern(value, arguments)


# --- the environment


class Dictionary:
    """Stands for ``dict`` in templates. With the class itself, they could change variables: ``dict.update(d, …)``."""

    def __call__(self, *values: Any, **items: Any) -> dict[Any, Any]:
        """Make a dict, like ``dict``."""
        return dict(*values, **items)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        """Make a dict, like ``dict.fromkeys``."""
        return dict.fromkeys(keys, value)


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter in a check of the size of its result."""

    @functools.wraps(function)  # also copies the attributes that tell jinja2 which arguments to pass
    def checked(*arguments: Any, **options: Any) -> Any:
        values = arguments[1:] if hasattr(function, "jinja_pass_arg") else arguments
        check_call(name, values[0] if values else None, (*values[1:], *options.values()))
        return function(*arguments, **options)

    return checked


@functools.cache
def sandbox() -> type[ImmutableSandboxedEnvironment]:
    """Define the class of environments. It is made late, so that importing this file does not import jinja2."""
    from jinja2.runtime import Context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "%"})

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            # Templates for other engines keep lists of their own. The messages, too, are lists of this render alone.
            grows = type(obj) is list and attr in ("append", "pop")
            return grows or (not isinstance(obj, type) and super().is_safe_attribute(obj, attr, value))

        def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                check_product(left, right)
            elif isinstance(left, str):
                check_pattern(left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
            owner = getattr(method, "__self__", None)
            if isinstance(owner, (str, bytes, int)):
                name = "format" if method.__name__ == "format_map" else method.__name__
                check_call(name, owner, (*args, *kwargs.values()))
            return super().call(__context, __obj, *args, **kwargs)

    return Sandbox


def environment() -> ImmutableSandboxedEnvironment:
    """Build the environment that chat templates expect: Hugging Face's options, functions and filters."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.utils import Namespace

    class Generation(Extension):
        """Tag ``{% generation %}``, which marks the model's own text for training. Here it is only a scope."""

        tags = {"generation"}  # noqa: RUF012 - how jinja2 declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class PublicNamespace(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:  # without self, like jinja2's: an attribute may have that name
            for name in dict(*args[1:], **kwargs):
                check_name(name)
            Namespace.__init__(*args, **kwargs)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            Namespace.__setitem__(self, name, value)

    def check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace may not have the attribute {name!r}")

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

    env = sandbox()(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    for name, function in env.filters.items():
        env.filters[name] = bounded(name, function)
    env.globals.update(raise_exception=raise_exception, dict=Dictionary(), namespace=PublicNamespace)
    set_clock(env, None)
    return env


def set_clock(env: ImmutableSandboxedEnvironment, now: float | None) -> None:
    """Set what templates take for the present, in seconds since 1970. None: the present, whenever they ask."""

    def strftime_now(pattern: str) -> str:
        return (datetime.now() if now is None else datetime.fromtimestamp(now)).strftime(pattern)

    env.globals["strftime_now"] = strftime_now


# --- requests


def render(template: Template, variables: dict[str, Any], longest: int) -> str:
    """Render a template piece by piece, so that a text without end is noticed early. Raises TooLong."""
    pieces: list[str] = []
    n = 0
    for piece in template.generate(variables):
        pieces.append(piece)
        n += len(piece)
        if n > longest:
            raise TooLong
    return "".join(pieces)


def attempt(make: Callable[[], Any], longest: int) -> dict[str, Any]:
    """Call ``make``. Returns its value as ``result``, or a message as ``error``."""
    try:
        return {"result": make()}
    except TooLong:
        return {"error": f"makes more than {longest} characters of text"}
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:
        return {"error": f"fails: {type(error).__name__}: {error}"[:2000]}


def names_read(env: ImmutableSandboxedEnvironment, source: str) -> list[str]:
    """List the variables that a template expects."""
    from jinja2.meta import find_undeclared_variables

    return sorted(find_undeclared_variables(env.parse(source)) - env.globals.keys())


def answer(env: ImmutableSandboxedEnvironment, compiled: Callable[[str], Template], request: dict[str, Any]) -> Any:
    """Answer a request: one attempt for each of its ``variables``. Without them, the names that the template reads."""
    source, longest = request["source"], request["longest"]
    set_clock(env, request.get("now"))

    def rendered(variables: dict[str, Any]) -> str:
        return render(compiled(source), variables, longest)

    if "variables" not in request:
        return attempt(lambda: names_read(env, source), longest)
    return [attempt(functools.partial(rendered, v), longest) for v in request["variables"]]


def address_space() -> int:
    """Read the number of bytes that this process maps, on Linux. 0 elsewhere."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def limit_memory(n_bytes: int) -> None:
    """Bound the address space. macOS takes the limit but ignores it."""
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))


def made_environment() -> ImmutableSandboxedEnvironment:
    """Build the environment. Without a usable jinja2, end the process with a status that tells the cause."""
    try:
        import jinja2
    except ImportError:
        os._exit(NO_JINJA)
    if tuple(int(n) for n in re.findall(r"\d+", jinja2.__version__)[:3]) < OLDEST_JINJA:
        os._exit(OLD_JINJA)
    return environment()


def serve(requests: IO[bytes], answers: IO[bytes], settings: dict[str, Any]) -> None:
    """Answer requests until they end."""
    sys.path[:] = settings["path"]
    write_message(answers, HELLO)
    env = made_environment()
    limit_memory(settings["memory"] + (address_space() if settings["forked"] else 0))
    # The time of the processor counts: on a busy machine a good template takes long by the clock. A parent may ignore
    # or block the signal, and this process inherits both.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    compiled = functools.lru_cache(maxsize=8)(env.from_string)
    write_message(answers, READY)
    try:
        while (request := read_message(requests)) is not None:
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # by default, its signal ends the process
            reply = answer(env, compiled, request)
            signal.setitimer(signal.ITIMER_PROF, 0)
            write_message(answers, reply)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, json.loads(sys.argv[1]))
