"""Every exception that zincmetal raises on purpose. All derive from :class:`ZincError`.

Each message names the thing that is wrong (a key, a tensor, an argument) and, where there is one, the remedy.
"""

from __future__ import annotations

import errno
from contextlib import ContextDecorator
from itertools import islice
from types import TracebackType
from typing import Any


class ZincError(Exception):
    """Base class of all zincmetal errors."""


class GGUFError(ZincError, ValueError):
    """A file is not a well-formed GGUF, or asks for something that its own bytes cannot back."""


class FileChangedError(GGUFError):
    """A file is not what it was when it was opened: it was cut short, or written to, or cannot be read any more."""


class UnsupportedModelError(ZincError, ValueError):
    """A well-formed file holds an architecture, tensor type or option that zincmetal does not run."""


class TokenizerError(ZincError, ValueError):
    """The tokenizer metadata of a file is missing, inconsistent or of an unknown kind."""


class ChatTemplateError(ZincError, ValueError):
    """A chat template is missing, fails, or exceeds its time or memory bound."""


class DeviceError(ZincError, RuntimeError):
    """The device is absent, refused an allocation, or failed while running a command buffer."""


class KernelError(DeviceError):
    """The device cannot make a kernel (``kernels``: their names) that no other can stand in for."""

    def __init__(self, message: str, kernels: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.kernels = kernels


class OutOfMemoryError(DeviceError):
    """A model needs more memory than the device can give. Raised before anything is allocated."""


class ContextFullError(ZincError, RuntimeError):
    """The sequence has no room left for the tokens that were asked for."""


class UsageError(ZincError, ValueError):
    """A call that cannot be carried out as asked: a bad token id, a closed model, two threads at once."""


#: How libraries say it: the loader of shared objects, the C library, Rust's and Oniguruma's allocators.
_WORDS = ("cannot allocate memory", "failed to map segment", "fail to memory allocation", "out of memory", "bad_alloc")


class TypedErrors(ContextDecorator):
    """Makes OutOfMemoryError of every error that says that the host's memory has ended; lets all others through."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None and not isinstance(error, ZincError) and memory_ended(error):
            raise _words_for(error) from error


typed_errors = TypedErrors()
REMEDY = "close other models or programs, or load the model with a smaller context"
_WITHOUT_WORDS = OutOfMemoryError(f"the host's memory has ended; {REMEDY}")  # made while there is memory


def _words_for(error: BaseException) -> OutOfMemoryError:
    """The error to raise instead; where there is no memory for its words either, one that was made before."""
    try:
        said = f": {error}" if str(error) else ""
        return OutOfMemoryError(f"the host's memory has ended ({type(error).__name__}{said}); {REMEDY}")
    except MemoryError:
        return _WITHOUT_WORDS


def memory_ended(error: BaseException) -> bool:
    """Whether an error, of whatever type, is how something says that it got no memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, SystemError):  # of C code that returned nothing, as it does where it could not even say so
        return True
    by_library = isinstance(error, (ImportError, OSError, RuntimeError)) or type(error) is Exception
    return by_library and any(words in str(error).lower() for words in _WORDS)


def quote(text: str, limit: int = 80) -> str:
    """``text`` in quotes on one line, without control characters, cut to about ``limit`` characters."""
    shown = str.__getitem__(text, slice(limit + 1))  # of whatever subclass: a plain string
    return repr(shown if len(shown) <= limit else shown[:limit] + "…")


def abbreviate(value: Any, limit: int = 60, depth: int = 3) -> str:
    """Any value on one line of about ``limit`` characters; of arrays the first few elements. Never raises.

    Metadata and arguments are shown so. Of hostile ones, integers have more digits than Python converts, ``repr``
    raises, and lists hold themselves: below ``depth`` there is only "…".
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
    """All digits of an integer, or how many there are."""
    bits = int.bit_length(value)
    if bits <= 3 * limit:
        return int.__repr__(value)
    return f"an integer of about {int(bits * 0.30103) + 1} digits"
