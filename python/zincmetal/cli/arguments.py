"""The arguments of the commands: what a shell passes is a number or said to be none, in one line."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UsageError, quote


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say it, and end with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def integer(text: str) -> int:
    """An integer in digits."""
    try:
        return int(text)
    except ValueError:  # also of thousands of digits
        raise _wrong(text, "an integer") from None


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _wrong(text, "a finite number")
    return value


def positive(text: str) -> float:
    """A number above 0 whose products with sizes are numbers too."""
    value = number(text)
    if not 0 < value <= 1e100:
        raise _wrong(text, "a number above 0")
    return value


def bias(text: str) -> tuple[int, float]:
    """ID:X as a token id and a number."""
    token, _, value = text.partition(":")
    try:
        return int(token), float(value)
    except ValueError:
        raise _wrong(text, "a token id and a number, as in 42:-1.5 or 42:-inf") from None


def template_arg(text: str) -> tuple[str, Any]:
    """KEY=JSON as a name and a value."""
    name, equals, value = text.partition("=")
    try:
        if name.isidentifier() and equals:
            return name, json.loads(value)
    except (ValueError, RecursionError):
        pass
    raise _wrong(text, "a name and JSON, as in enable_thinking=false")


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UsageError where it holds none."""
    try:
        return json.loads(path.read_bytes())  # in UTF-8, -16 or -32
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _wrong(text: str, wanted: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{quote(text)} is not {wanted}")
