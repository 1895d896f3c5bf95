"""Verdict on a change: keep or revert, by one rule from the figures of both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..errors import UsageError
from .noise import spread

KEEP, REVERT = "keep", "revert"
WIN, LOSS, SAME = "win", "loss", "within the noise"
LEAST_RUNS = 3
LEAST_GAIN = 0.005  # of the figure: runs that agree by luck decide nothing
#: The rule, for people. The help of the command and the page print it.
RULE = (
    "A is the usual side, B the changed one. The noise of a side is half the distance from its slowest run to its "
    "fastest. B wins a figure if its median is better than A's by more than the noise of both together, and by 0.5% "
    "at least; it loses one in the same way. The verdict is keep if (1) each figure has three runs or more of both "
    "sides; (2) B's outputs are A's, or their log-probabilities differ by no more than --error; (3) where exact shapes "
    "were measured, B wins one and loses none; (4) then, of the whole model, B wins one figure and loses none. "
    "Otherwise it is revert."
)


@dataclass(frozen=True)
class Figure:
    """One figure of both sides: its runs, of A and of B. ``higher`` is better, or lower is."""

    name: str
    a: tuple[float, ...]
    b: tuple[float, ...]
    higher: bool = True

    @property
    def gain(self) -> float:
        """B's median against A's, as a share: 0.03 is 3% better."""
        one, other = median(self.a), median(self.b)
        return other / one - 1 if self.higher else one / other - 1

    @property
    def noise(self) -> float:
        """Noise of both sides together, in the unit of the figure."""
        return spread(self.a) + spread(self.b)

    @property
    def judged(self) -> str:
        """Result of the figure: win, loss, or within the noise."""
        one, other = median(self.a), median(self.b)
        least = max(self.noise, LEAST_GAIN * max(one, other))
        better = other - one if self.higher else one - other
        return WIN if better > least else LOSS if -better > least else SAME


@dataclass(frozen=True)
class Outputs:
    """Difference of the outputs of two sides: nats of log-probability at most; 0 and ``identical`` are not the same.

    ``nats`` is infinite if the log-probabilities cannot be compared.
    """

    identical: bool
    nats: float = 0.0

    def agree(self, error: float) -> bool:
        """Return True if the outputs are identical, or close enough where an error is allowed."""
        return self.identical or (error > 0 and self.nats <= error)


@dataclass(frozen=True)
class Verdict:
    """Verdict with its reason in words."""

    keep: bool
    why: str

    @property
    def word(self) -> str:
        """The verdict in one word."""
        return KEEP if self.keep else REVERT


def decide(shapes: Sequence[Figure], whole: Sequence[Figure], outputs: Outputs, error: float = 0.0) -> Verdict:
    """Decide by RULE. ``shapes`` are figures of exact shapes, ``whole`` of the whole model.

    Raises UsageError if a figure has too few runs, or if there is none of the whole model.
    """
    if not whole:
        raise UsageError("the two sides share no figure of the whole model: measure one with both, such as pp512")
    for figure in (*shapes, *whole):
        if (n := min(len(figure.a), len(figure.b))) < LEAST_RUNS:
            raise UsageError(f"{figure.name} has {n} runs of a side: a verdict needs {LEAST_RUNS}; use --runs or -r")
    if not outputs.agree(error):
        apart = "differ" if outputs.nats == float("inf") else f"differ by {outputs.nats:.2g} nats"
        return Verdict(False, f"the outputs {apart}, and {f'{error:g} nats' if error else 'no error'} may be")
    for what, figures in (("exact shapes", shapes), ("the whole model", whole)):
        if figures and (failed := _fails(figures)):
            return Verdict(False, f"{what}: {failed}")
    wins = [figure for figure in whole if figure.judged == WIN]
    return Verdict(True, "; ".join(f"{figure.name} {figure.gain:+.1%}" for figure in wins))


def _fails(figures: Sequence[Figure]) -> str:
    """Return why figures do not speak for B, "" if they do."""
    lost = [f"{figure.name} {figure.gain:+.1%}" for figure in figures if figure.judged == LOSS]
    if lost:
        return f"B loses {', '.join(lost)}"
    return "" if any(figure.judged == WIN for figure in figures) else "no win beyond the noise"


# ---- from reports -----------------------------------------------------------------------------------------------


def figures(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[Figure], list[Figure], Outputs]:
    """Take what :func:`decide` needs from two reports as JSON has them: only what both have."""
    exact = [Figure(name, *runs, higher=False) for name, runs in _shared(a, b, "cases", _case_name, "samples_us")]
    whole = [Figure(name, *runs) for name, runs in _shared(a, b, "tests", _test_name, "samples_ts")]
    return exact, whole, outputs(a, b)


def outputs(a: Mapping[str, Any], b: Mapping[str, Any]) -> Outputs:
    """Compare the tokens that both sides made, and the log-probabilities of their fixed prompt."""
    one, other = ({_test_name(t): t["digest"] for t in of["tests"]} for of in (a, b))
    refused = any(not case["allowed"] for of in (a, b) for case in of["cases"])
    same_tokens = all(one[name] == other[name] != "varies" for name in one.keys() & other.keys())
    theirs = [of["logprobs"] for of in (a, b)]
    if refused or not theirs[0] or len(theirs[0]) != len(theirs[1]):
        return Outputs(False, float("inf"))
    nats = max(abs(x - y) for x, y in zip(*theirs, strict=True))
    return Outputs(same_tokens and theirs[0] == theirs[1], nats)


def _shared(a: Any, b: Any, part: str, name: Any, runs: str) -> list[tuple[str, tuple[Any, Any]]]:
    one, other = ({name(row): tuple(row[runs]) for row in of[part]} for of in (a, b))
    return [(key, (one[key], other[key])) for key in one if key in other]


def _test_name(row: Mapping[str, Any]) -> str:
    return str(row["test"])


def _case_name(row: Mapping[str, Any]) -> str:
    of = f", {row['kernel']} by {row['threads']}" if row["swept"] else ""
    return f"{row['case']} {row['variant']}{of}"
