"""What a check found, as the worker says it and the report shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PASS, WARN, FAIL = "PASS", "WARN", "FAIL"


@dataclass(frozen=True)
class Outcome:
    """How a check ended: PASS, WARN or FAIL, in words, and in numbers by name."""

    status: str
    message: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A check, "group" or "group/subject", and its outcome."""

    name: str
    outcome: Outcome

    @property
    def group(self) -> str:
        """What kind of check it is: "pipeline", "kernel", ..."""
        return self.name.partition("/")[0]

    @property
    def kind(self) -> str:
        """The group without the way that it ran another time: "kernel" of "kernel (validated)"."""
        return self.group.partition(" (")[0]

    @property
    def subject(self) -> str:
        """What was checked: a kernel, a shape."""
        return self.name.partition("/")[2]
