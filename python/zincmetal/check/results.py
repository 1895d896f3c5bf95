"""Result of a check, as the worker reports it and the command shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"


@dataclass(frozen=True)
class Outcome:
    """End of a check: PASS, WARN or FAIL, a message, and figures by name."""

    status: str
    message: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Name of a check, "group" or "group/subject", and its outcome."""

    name: str
    outcome: Outcome

    @property
    def group(self) -> str:
        """Group of checks, such as "pipeline" or "kernel"."""
        return self.name.partition("/")[0]

    @property
    def kind(self) -> str:
        """Group without the way in which it ran again: "kernel" of "kernel (validated)"."""
        return self.group.partition(" (")[0]

    @property
    def subject(self) -> str:
        """Subject that was checked: a kernel, a shape."""
        return self.name.partition("/")[2]
