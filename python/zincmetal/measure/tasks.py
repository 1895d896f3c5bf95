"""Tasks of a bench: what is timed, at which depth, for how many sequences, by which sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..errors import UsageError
from ..sampling.params import SamplingParams
from .choices import GREEDY, SAMPLED
from .noise import spread

#: Sampling of a bench. The numbers are those that makers of models advise most.
SAMPLING: dict[str, dict[str, Any]] = {GREEDY: {}, SAMPLED: {"temperature": 0.7, "top_k": 20, "top_p": 0.8}}
MOST_SEQUENCES = 32


@dataclass(frozen=True)
class Task:
    """Work that is timed: a prompt of ``n_prompt`` tokens or ``n_gen`` tokens of an answer, after ``depth`` tokens.

    ``sequences`` do it at once, each after tokens of its own.
    """

    n_prompt: int = 0
    n_gen: int = 0
    depth: int = 0
    sequences: int = 1
    sampling: str = GREEDY

    @property
    def name(self) -> str:
        """Name of the task, as llama-bench forms it: "pp512", "tg128 @ d4096", "tg64 x8, sampled"."""
        work = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        where = f" @ d{self.depth}" if self.depth else ""
        many = f" x{self.sequences}" if self.sequences > 1 else ""
        return work + where + many + (f", {self.sampling}" if self.sampling != GREEDY else "")

    @property
    def context(self) -> int:
        """Tokens of context that each sequence needs. A token is drawn before the clock starts, one is its prompt."""
        return self.depth + self.n_prompt + self.n_gen + 2

    def params(self, number: int) -> SamplingParams:
        """Return the sampling of sequence ``number``. Every run draws the same tokens."""
        return SamplingParams(**SAMPLING[self.sampling], seed=number + 1)


@dataclass(frozen=True)
class Timed:
    """Runs of a task: the tokens and the seconds of each run, and a digest of the tokens that all of them made."""

    task: Task
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    digest: str = ""

    @property
    def speeds(self) -> tuple[float, ...]:
        """Tokens a second of each run, of all sequences together."""
        return tuple(n / seconds for n, seconds in zip(self.tokens, self.seconds, strict=True))

    def facts(self) -> dict[str, Any]:
        """Return the figures as JSON has them. Names are llama-bench's where it has the same figure."""
        speeds = self.speeds
        return {
            "test": self.task.name,
            "n_prompt": self.task.n_prompt,
            "n_gen": self.task.n_gen,
            "n_depth": self.task.depth,
            "n_sequences": self.task.sequences,
            "sampling": self.task.sampling,
            "median_ts": median(speeds),
            "spread_ts": spread(speeds),
            "avg_ts": sum(speeds) / len(speeds),
            "samples_ns": [round(s * 1e9) for s in self.seconds],
            "samples_ts": list(speeds),
            "samples_tokens": list(self.tokens),
            "digest": self.digest,
        }


def tasks(
    prompts: Sequence[int],
    answers: Sequence[int],
    depths: Sequence[int],
    sequences: Sequence[int],
    sampling: Sequence[str],
) -> list[Task]:
    """Make all combinations. Prompts are of one sequence. A prompt or an answer of 0 tokens is left out.

    Raises UsageError if nothing is left, or for more sequences than a step takes.
    """
    if any(not 1 <= n <= MOST_SEQUENCES for n in sequences):
        raise UsageError(f"--sequences must be from 1 to {MOST_SEQUENCES}")
    if any(n < 0 for n in (*prompts, *answers, *depths)):
        raise UsageError("--prompt, --tokens and --depth must be 0 or more")
    found = [Task(n_prompt=p, depth=d) for d in depths for p in prompts if p]
    found += [
        Task(n_gen=n, depth=d, sequences=s, sampling=by)
        for d in depths
        for n in answers
        if n
        for s in sequences
        for by in sampling
    ]
    if not found:
        raise UsageError("nothing is to be measured: --prompt and --tokens are both 0")
    return list(dict.fromkeys(found))
