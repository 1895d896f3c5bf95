"""Checks of the arguments of public calls. Every argument follows the same rules.

- An integer is Python's, NumPy's, or any object with ``__index__``.
- A number is an integer, a float, a ``Fraction`` or a ``Decimal``. Booleans and strings are not numbers.
- An array without dimensions stands for its only element.
- None stands for the default, if there is one.

Any other value is a UsageError. It names the argument, the values that it takes, and the value that it got.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from .errors import UsageError, abbreviate

T = TypeVar("T")

INF = math.inf


def refuse(name: str, wanted: str, value: Any, cause: BaseException | None = None) -> NoReturn:
    """Raise UsageError for a value that the argument does not take."""
    raise UsageError(f"{name} must be {wanted}, not {abbreviate(value)}") from cause


def integer(
    name: str, value: Any, low: int | None = None, high: int | None = None, default: int | None = None, note: str = ""
) -> int:
    """Read an int from ``low`` to ``high``. ``note`` explains special values in the error."""
    if value is None and default is not None:
        return default
    wanted = "an integer" + _range(low, high) + (f" ({note})" if note else "")
    found, cause = _index(value)
    if found is None or (low is not None and found < low) or (high is not None and found > high):
        refuse(name, wanted, value, cause)
    return found


def number(
    name: str,
    value: Any,
    low: float = -INF,
    high: float = INF,
    default: float | None = None,
    note: str = "",
    *,
    above: bool = False,
    finite: bool = True,
) -> float:
    """Read a float from ``low`` to ``high``, never NaN. ``above`` excludes ``low`` itself."""
    if value is None and default is not None:
        return default
    kind = "a finite number" if finite and low == -INF and high == INF else "a number"
    wanted = kind + _range(low, high, above) + (f" ({note})" if note else "")
    found, cause = _float(value)
    inside = found is not None and (low < found if above else low <= found) and found <= high
    if found is None or not inside or (finite and math.isinf(found)):
        refuse(name, wanted, value, cause)
    return found


def flag(name: str, value: Any, default: bool | None = None) -> bool:
    """Read a bool. 0 and 1 are not booleans."""
    if value is None and default is not None:
        return default
    found = _scalar(value)
    if not isinstance(found, (bool, np.bool_)):
        refuse(name, "True or False", value)
    return bool(found)


def choice(name: str, value: Any, options: Iterable[str], default: str | None = None) -> str:
    """Read one of the strings ``options``."""
    if value is None and default is not None:
        return default
    known = tuple(options)
    if not isinstance(value, str) or value not in known:
        refuse(name, f"one of {', '.join(known)}", value)
    return str(value)


def text(name: str, value: Any) -> str:
    """Read a string."""
    if not isinstance(value, str):
        refuse(name, "a string", value)
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Read strings: a sequence of them, one string alone, or None for an empty sequence."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    found = _items(name, "a string or a sequence of strings", value)
    for i, item in enumerate(found):
        text(f"{name}[{i}]", item)
    return tuple(found)


def token_ids(value: Any, name: str = "prompt", n_vocab: int | None = None) -> list[int]:
    """Read a sequence of token ids. With ``n_vocab``, each must be below it."""
    wanted = "text or a sequence of token ids" if name == "prompt" else "a sequence of token ids"
    if isinstance(value, str):
        refuse(name, wanted, value)
    items = value.tolist() if _is_ids(value) else _items(name, wanted, value)
    ids = [t if type(t) is int else integer(f"{name}[{i}]", t) for i, t in enumerate(items)]
    if n_vocab is not None:
        for i, t in enumerate(ids):
            if not 0 <= t < n_vocab:
                raise UsageError(f"{name}[{i}]: token id {abbreviate(t)} is outside the vocabulary of {n_vocab}")
    return ids


def path(value: Any, name: str = "path") -> Path:
    """Read a path: a string or an ``os.PathLike`` that can name a file."""
    wanted = "a path (a string or os.PathLike)"
    if not isinstance(value, (str, os.PathLike)):
        refuse(name, wanted, value)
    try:
        found = os.fspath(value)
        if isinstance(found, str) and "\0" not in found:
            os.fsencode(found)
            return Path(found)
    except Exception as error:
        refuse(name, wanted, value, error)
    refuse(name, wanted, value)


def callback(name: str, value: T) -> T:
    """Read a callable, or None."""
    if value is not None and not callable(value):
        refuse(name, "a function or None", value)
    return value


# ---- conversions ----------------------------------------------------------------------------------------------


def _scalar(value: Any) -> Any:
    """Take the element out of an array without dimensions. Returns any other value unchanged."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _index(value: Any) -> tuple[int | None, Exception | None]:
    """Convert a value to an integer. Returns None for other values, with the exception of the conversion, if any."""
    value = _scalar(value)
    if isinstance(value, (bool, np.bool_, np.timedelta64)) or not hasattr(type(value), "__index__"):
        return None, None
    try:
        return operator.index(value), None
    except Exception as error:
        return None, error


def _float(value: Any) -> tuple[float | None, Exception | None]:
    """Convert a value to a float. Returns None for other values, with the exception of the conversion, if any."""
    value = _scalar(value)
    found, cause = _index(value)
    if found is None and (
        not isinstance(value, (numbers.Real, Decimal)) or isinstance(value, (bool, np.bool_, np.timedelta64))
    ):
        return None, cause
    try:
        return float(value if found is None else found), None
    except Exception as error:
        return None, error


def _is_ids(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu"


def _items(name: str, wanted: str, value: Any) -> list[Any]:
    """List the elements of an ordered iterable that is neither bytes nor a mapping nor a set."""
    if isinstance(value, (bytes, bytearray, memoryview, Mapping, Set)) or not isinstance(value, Iterable):
        refuse(name, wanted, value)
    try:
        return list(value)
    except Exception as error:
        refuse(name, wanted, value, error)


def _range(low: float | None, high: float | None, above: bool = False) -> str:
    """Put the limits of a number into words. None and infinity are no limits."""
    has_low, has_high = low is not None and low != -INF, high is not None and high != INF
    if above and has_low:
        return f" above {low:g}" + (f" and at most {high:g}" if has_high else "")
    if has_low and has_high:
        return f" from {_plain(low)} to {_plain(high)}"
    return f" of at least {_plain(low)}" if has_low else f" of at most {_plain(high)}" if has_high else ""


def _plain(limit: float | None) -> str:
    return f"{limit:g}" if isinstance(limit, float) else str(limit)
