"""What is measured: the times of one request, and the numbers that many of them make."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

#: Words of the reports. ``docs/bench-serve.md`` has the same.
DEFINITIONS: Mapping[str, str] = {
    "TTFT": "seconds from the request to the first token of reasoning or text; a chunk that only has a role is none",
    "TTFO": "seconds from the request to the first token of text",
    "ITL": "seconds between two events with tokens of one answer",
    "TPOT": "seconds for each token after the first: (end to end - TTFT) / (tokens - 1)",
    "end to end": "seconds from the request to the end of the stream",
    "tokens/s": "tokens of all answers in the seconds from the first request to the last end",
    "prefill": "tokens of a prompt that were computed, for each second until the first token",
    "goodput": "requests a second whose TTFT and TPOT both meet their goals",
    "cached": "share of the prompts' tokens that the server says it took from its cache",
    "coalesced": "share of the events with tokens that came together with the one before: they make ITL look better",
}


@dataclass
class Sample:
    """One request. Times are of ``time.perf_counter``; 0 for what did not happen.

    ``stamps``: when events with tokens came. ``made``, ``prompt`` and ``cached`` are tokens by the server's word.
    """

    sent: float = 0.0
    stamps: list[float] = field(default_factory=list)
    first_text: float = 0.0
    ended: float = 0.0
    prompt: int = 0
    cached: int = 0
    made: int = 0
    reason: str = ""
    error: str = ""
    text: str = field(default="", repr=False)
    left: bool = False  # the client hung up on purpose

    @property
    def ok(self) -> bool:
        """True for a whole answer."""
        return not self.error and not self.left and bool(self.stamps)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.stamps[0] - self.sent if self.stamps else math.nan

    @property
    def ttfo(self) -> float:
        """Seconds to the first token of text."""
        return self.first_text - self.sent if self.first_text else math.nan

    @property
    def e2e(self) -> float:
        """Seconds to the end."""
        return self.ended - self.sent

    @property
    def tokens(self) -> int:
        """Tokens of the answer: by the server's word, else the events."""
        return self.made or len(self.stamps)

    @property
    def tpot(self) -> float:
        """Seconds for each token after the first."""
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 else math.nan

    @property
    def gaps(self) -> list[float]:
        """Seconds between two events with tokens."""
        return [after - before for before, after in zip(self.stamps, self.stamps[1:], strict=False)]

    @property
    def prefill(self) -> float:
        """Tokens of the prompt that were computed, a second."""
        return (self.prompt - self.cached) / self.ttft if self.prompt > self.cached else math.nan


@dataclass(frozen=True)
class Goals:
    """Times that a good reply meets, in seconds."""

    ttft: float = 2.0
    tpot: float = 0.1

    def met(self, sample: Sample) -> bool:
        """Return True if a sample meets both. An answer of one token has no TPOT."""
        return sample.ok and sample.ttft <= self.ttft and not sample.tpot > self.tpot


@dataclass(frozen=True)
class Spread:
    """Median, 95th percentile and largest of some numbers. NaN if there are none."""

    median: float
    p95: float
    worst: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Take the numbers, without NaN."""
        found = sorted(value for value in values if not math.isnan(value))
        return cls(percentile(found, 50), percentile(found, 95), found[-1] if found else math.nan, len(found))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the number below which ``percent`` of the numbers lie, between two of them by their distance."""
    if not ordered:
        return math.nan
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


@dataclass(frozen=True)
class Summary:
    """Numbers of a scenario at one server."""

    requests: int
    failed: int
    left: int
    errors: Mapping[str, int]
    ttft: Spread
    ttfo: Spread
    itl: Spread
    tpot: Spread
    e2e: Spread
    prefill: Spread
    tokens: int
    tokens_per_second: float
    goodput: float
    prompt_tokens: int
    cached: float
    coalesced: float


def summary(samples: Sequence[Sample], goals: Goals, seconds: float | None = None) -> Summary:
    """Put the samples of a scenario together. ``seconds``: of its rounds, if they did not run at one go."""
    good = [s for s in samples if s.ok]
    errors: dict[str, int] = {}
    for s in samples:
        if s.error:
            errors[s.error] = errors.get(s.error, 0) + 1
    began, ended = min((s.sent for s in samples), default=0.0), max((s.ended for s in samples), default=0.0)
    spent = (ended - began if seconds is None else seconds) or math.nan
    prompt, tokens = sum(s.prompt for s in good), sum(s.tokens for s in good)
    gaps = [gap for s in good for gap in s.gaps]
    return Summary(
        requests=len(samples),
        failed=sum(bool(s.error) for s in samples),
        left=sum(s.left for s in samples),
        errors=errors,
        ttft=Spread.of(s.ttft for s in good),
        ttfo=Spread.of(s.ttfo for s in good),
        itl=Spread.of(gaps),
        tpot=Spread.of(s.tpot for s in good),
        e2e=Spread.of(s.e2e for s in good),
        prefill=Spread.of(s.prefill for s in good),
        tokens=tokens,
        tokens_per_second=tokens / spent,
        goodput=sum(map(goals.met, good)) / spent,
        prompt_tokens=prompt,
        cached=sum(s.cached for s in good) / prompt if prompt else 0.0,
        coalesced=sum(gap == 0 for gap in gaps) / len(gaps) if gaps else 0.0,
    )


__all__ = ["DEFINITIONS", "Goals", "Sample", "Spread", "Summary", "percentile", "summary"]
