"""Times of the host's work on steps. The device's time is counted by the compiled core."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter


@dataclass
class HostTimes:
    """Seconds of the thread that steps, summed since the model was loaded, and the number of its waits.

    ``record``: writing steps down. ``plan``: finding or making their programs. ``submit``: handing them to the device;
    a step that the host must accompany runs within it. ``wait``: until a step in flight has ended.
    """

    record: float = 0.0
    plan: float = 0.0
    submit: float = 0.0
    wait: float = 0.0
    waits: int = 0

    def add(self, name: str, since: float) -> float:
        """Count the time since a moment, and return this one."""
        now = perf_counter()
        setattr(self, name, getattr(self, name) + now - since)
        return now

    def facts(self) -> dict[str, float]:
        """Return the counts as a profile has them."""
        return {
            "record_seconds": self.record,
            "plan_seconds": self.plan,
            "submit_seconds": self.submit,
            "wait_seconds": self.wait,
            "waits": self.waits,
        }
