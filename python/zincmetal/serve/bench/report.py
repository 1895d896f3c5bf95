"""Reports of a measurement: a table for people, and plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .client import Target
from .measures import Goals, Spread, Summary, summary
from .scenarios import Load, Outcome


@dataclass
class Report:
    """Outcomes of all scenarios at all servers, by scenario and then by the server's name. ``cut``: time was over."""

    load: Load
    goals: Goals
    targets: Sequence[Target]
    outcomes: dict[str, dict[str, list[Outcome]]] = field(default_factory=dict)
    cut: bool = False

    def add(self, scenario: str, target: Target, outcome: Outcome) -> None:
        """Take an outcome."""
        self.outcomes.setdefault(scenario, {}).setdefault(target.name, []).append(outcome)

    def summary(self, scenario: str, target: str) -> Summary:
        """Return the numbers of a scenario at a server."""
        found = self.outcomes[scenario][target]
        samples = [sample for outcome in found for sample in outcome.samples]
        return summary(samples, self.goals, sum(outcome.seconds for outcome in found))

    def notes(self, scenario: str, target: str) -> dict[str, Spread]:
        """Return the numbers of a scenario's own over its rounds."""
        found = self.outcomes[scenario][target]
        return {name: Spread.of(outcome.notes[name] for outcome in found) for name in found[0].notes}

    @property
    def failed(self) -> int:
        """Requests that failed."""
        return sum(self.summary(s, t).failed for s, by_target in self.outcomes.items() for t in by_target)

    def facts(self) -> dict[str, Any]:
        """Return everything as plain data. What is not known is None."""
        rows = [
            {
                "scenario": scenario,
                "server": name,
                "rounds": len(found),
                **asdict(self.summary(scenario, name)),
                "notes": {note: asdict(spread) for note, spread in self.notes(scenario, name).items()},
            }
            for scenario, by_target in self.outcomes.items()
            for name, found in by_target.items()
        ]
        servers = [{"name": t.name, "url": t.url, "model": t.model} for t in self.targets]
        whole = {"load": asdict(self.load), "goals": asdict(self.goals), "servers": servers, "results": rows}
        return {**_finite(whole), "cut": self.cut}

    def lines(self) -> Iterator[str]:
        """Yield the table."""
        width = max([len(t.name) for t in self.targets] + [6])
        columns = ("TTFT s", "ITL ms", "TPOT ms", "end s")
        head = f"{'':{width}}  {'tok/s':>7}" + "".join(f"  {name:^19}" for name in columns) + "  good/s  cached  failed"
        yield "median / p95 / worst".rjust(len(head))
        yield head
        for scenario, by_target in self.outcomes.items():
            yield scenario
            for name in by_target:
                yield self._line(scenario, name, width)
                notes = self.notes(scenario, name)
                if notes:
                    shown = ", ".join(f"{note} {_number(spread.median)}" for note, spread in notes.items())
                    yield f"{'':{width}}  {shown}"
                for error, count in self.summary(scenario, name).errors.items():
                    yield f"{'':{width}}  {count} x {error}"
        if self.cut:
            yield "The time was over before all rounds: take --limit for more."

    def _line(self, scenario: str, name: str, width: int) -> str:
        s = self.summary(scenario, name)
        spreads = (_spread(s.ttft, 1), _spread(s.itl, 1000), _spread(s.tpot, 1000), _spread(s.e2e, 1))
        times = "".join(f"  {shown:>19}" for shown in spreads)
        cached = f"{s.cached:.0%}" if s.prompt_tokens else "-"
        failed = str(s.failed) if s.failed else ""
        return (
            f"{name:{width}}  {_number(s.tokens_per_second):>7}{times}  {_number(s.goodput):>6}  {cached:>6}  {failed}"
        )


def _spread(spread: Spread, scale: float) -> str:
    return "/".join(_number(value * scale) for value in (spread.median, spread.p95, spread.worst))


def _number(value: float) -> str:
    """Show three digits that count."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "never"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.1f}M"
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{decimals}f}"


def _finite(value: Any) -> Any:
    """Return data with None in place of what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


__all__ = ["Report"]
