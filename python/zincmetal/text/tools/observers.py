"""Observers of a JSON text: what ``JsonText`` writes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Observer(Protocol):
    """Takes what is written. ``value`` comes before a value, with the character that begins it, and ``ended`` after."""

    @property
    def write(self) -> Callable[[str], None]:
        """Function that takes more of the JSON text."""

    def key(self, name: str) -> None:
        """Take the name of the member whose value comes next."""

    def value(self, first: str) -> None:
        """See a value begin."""

    def ended(self) -> None:
        """See a value end."""


class Passing:
    """Observer that passes the text on, and nothing else."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write

    def key(self, name: str) -> None:
        """Ignore the name of a member."""

    def value(self, first: str) -> None:
        """Ignore the beginning of a value."""

    def ended(self) -> None:
        """Ignore the end of a value."""
