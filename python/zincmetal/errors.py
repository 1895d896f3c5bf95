"""Exceptions that zincmetal raises on purpose. All derive from ``ZincError``.

Each message names the thing that is wrong: a key, a tensor, an argument. It also names the remedy, if one is known.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import ContextDecorator
from itertools import islice
from types import TracebackType
from typing import Any


class ZincError(Exception):
    """Base class of all zincmetal errors."""


class GGUFError(ZincError, ValueError):
    """Raised for a file that is no well-formed GGUF, or whose values contradict its own bytes."""


class FileChangedError(GGUFError):
    """Raised for an open file that was cut short or written to, or that has become unreadable."""


class UnsupportedModelError(ZincError, ValueError):
    """Raised for a well-formed file with an architecture, quant type or option that zincmetal does not run."""


class TokenizerError(ZincError, ValueError):
    """Raised for tokenizer metadata that is missing, inconsistent or of an unknown kind."""


class ChatTemplateError(ZincError, ValueError):
    """Raised for a chat template that is missing, fails, or exceeds its bound of time or memory."""


class DeviceError(ZincError, RuntimeError):
    """Raised for a device that is absent, refuses an allocation, or fails while it runs a command buffer."""


class KernelError(DeviceError):
    """Raised for kernels that the device cannot build and that have no replacement. ``kernels`` has their names."""

    def __init__(self, message: str, kernels: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.kernels = kernels


class DeviceBusyError(DeviceError):
    """Raised for a device that another process has locked. ``pid`` is that process, or 0 if it is not known."""

    def __init__(self, message: str, pid: int = 0) -> None:
        super().__init__(message)
        self.pid = pid


class OutOfMemoryError(DeviceError):
    """Raised for a model that needs more memory than the device can give, before anything is allocated."""


class ContextFullError(ZincError, RuntimeError):
    """Raised for a sequence without room for the tokens that were asked for."""


class QueueFullError(ZincError, RuntimeError):
    """Raised for a request while the queue is full of waiting ones. Ask again when some have ended."""


class DeadlineError(ZincError, TimeoutError):
    """Raised for a request that did not end within the seconds that it was given."""


class DownloadError(ZincError, OSError):
    """Raised for a download that failed. What has arrived stays, and the next one goes on from there."""


class ModelNotFoundError(ZincError, LookupError):
    """Raised for the name of a model that is neither a file nor known by that name."""


class UsageError(ZincError, ValueError):
    """Raised for a call that cannot be carried out: a bad token id, a closed model, one that would wait for itself."""


class UnsupportedSchemaError(UsageError):
    """Raised for a JSON schema with a ``keyword``, at the JSON pointer ``path``, that no answer can be held to."""

    def __init__(self, keyword: str, path: str, why: str = "") -> None:
        what = f"{why} ({keyword})" if why else f"the keyword {quote(keyword, 40)}"
        super().__init__(
            f"the JSON schema has, at {quote(path, 200)}, {what}, which no answer can be held to: remove it"
        )
        self.keyword, self.path, self.why = keyword, path, why

    def __reduce__(self) -> Any:
        return UnsupportedSchemaError, (self.keyword, self.path, self.why)


class GrammarError(ZincError, RuntimeError):
    """Raised for an answer that its grammar does not let go on: it became too complex, or allows no token."""


# Why a model, or the thread that steps, takes no more calls.
CLOSED = "the model is closed; load it again"
FORKED = (
    "the model was loaded before a fork, and its device is the parent's: load it in the child, or with Metal start "
    "processes by multiprocessing's spawn"
)

#: Messages of libraries without memory: the loader of shared objects, the C library, Rust, Oniguruma.
_WORDS = ("cannot allocate memory", "failed to map segment", "fail to memory allocation", "out of memory", "bad_alloc")


class TypedErrors(ContextDecorator):
    """Context that turns every error about exhausted host memory into OutOfMemoryError. Others pass through."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None and not isinstance(error, ZincError) and memory_ended(error):
            raise _words_for(error) from error


typed_errors = TypedErrors()


def as_typed(error: BaseException) -> BaseException:
    """Return the error of a step as one of zincmetal's."""
    try:
        with typed_errors:
            raise error
    except ZincError as typed:
        return typed
    except BaseException as other:
        wrapped = DeviceError(f"a step failed: {type(other).__name__}: {other}")
        wrapped.__cause__ = other
        return wrapped


def no_thread(error: RuntimeError) -> DeviceError:
    """Make the error for a thread that the system did not start."""
    return DeviceError(f"{error}: end other programs, or raise the limit of threads")


REMEDY = "close other models or programs, or load the model with a smaller context"
_WITHOUT_WORDS = OutOfMemoryError(f"the host is out of memory; {REMEDY}")  # made while there is memory


def _words_for(error: BaseException) -> OutOfMemoryError:
    """Make the error to raise instead. Without memory for its message, it is one that was made before."""
    try:
        said = f": {error}" if str(error) else ""
        return OutOfMemoryError(f"the host is out of memory ({type(error).__name__}{said}); {REMEDY}")
    except MemoryError:
        return _WITHOUT_WORDS


def memory_ended(error: BaseException) -> bool:
    """Return True for an error, of any type, that reports exhausted host memory."""
    if isinstance(error, (MemoryError, OutOfMemoryError)):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, SystemError):  # C code failed without an exception: it had no memory to make one
        return True
    if isinstance(error, BufferError):  # of a memoryview, in the place of the error that the core had raised
        return error.__cause__ is not None and memory_ended(error.__cause__)
    by_library = isinstance(error, (ImportError, OSError, RuntimeError)) or type(error) is Exception
    return by_library and any(words in str(error).lower() for words in _WORDS)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown word: the known word most like it, or nothing."""
    from difflib import get_close_matches  # late: an import of the package costs next to nothing

    names = {name.lstrip("-"): name for name in known}  # dashes make all options alike
    near = get_close_matches(word.lstrip("-"), names, 1)
    return f"; did you mean {names[near[0]]}?" if near else ""


def quote(text: str, limit: int = 80) -> str:
    """Quote ``text`` on one line, without control characters, cut to about ``limit`` characters."""
    shown = str.__getitem__(text, slice(limit + 1))  # a plain string, also from a subclass of str
    return repr(shown if len(shown) <= limit else shown[:limit] + "…")


def abbreviate(value: Any, limit: int = 60, depth: int = 3) -> str:
    """Show any value on one line of about ``limit`` characters, an array by its first elements. Never raises.

    Messages show metadata and arguments so. Hostile values are integers with more digits than Python converts,
    objects whose ``repr`` raises, and lists that contain themselves. Below ``depth`` levels the result is "…".
    """
    try:
        return _shown(value, limit, depth)
    except Exception:
        return f"an object of type {type(value).__name__}"


def _shown(value: Any, limit: int, depth: int) -> str:
    if isinstance(value, str):
        return quote(value, limit)
    if isinstance(value, (bytes, bytearray)):
        return repr(bytes(value[:limit])) + ("…" if len(value) > limit else "")
    if isinstance(value, int) and not isinstance(value, bool):
        return _digits(value, limit)
    if depth == 0:
        return "…"
    if isinstance(value, dict):
        first = islice(value.items(), 5)
        shown = [f"{abbreviate(k, 16, depth - 1)}: {abbreviate(v, 16, depth - 1)}" for k, v in first]
        return f"{{{', '.join(shown)}{', …' if len(value) > 5 else ''}}}"
    if hasattr(value, "__len__") and hasattr(value, "__getitem__") and getattr(value, "shape", None) != ():
        shown = [abbreviate(v, 16, depth - 1) for v in value[:5]]
        return f"[{', '.join(shown)}{', …' if len(value) > 5 else ''}]"
    text = str(value)
    return quote(text, limit) if len(text) > limit or not text.isprintable() else text


def _digits(value: int, limit: int) -> str:
    """Show the digits of an integer, or only their number if they are many."""
    bits = int.bit_length(value)
    if bits <= 3 * limit:
        return int.__repr__(value)
    return f"an integer of about {int(bits * 0.30103) + 1} digits"
