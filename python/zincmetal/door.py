"""The door of the public calls: where memory ends, libraries raise what they like, and one typed error comes out."""

from __future__ import annotations

import errno
from contextlib import ContextDecorator
from types import TracebackType

from .errors import OutOfMemoryError, ZincError

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
