"""Times many sequences at once, as llama.cpp's llama-batched-bench does: decode tokens/s in all, after the prompts.

    python bench/batched.py MODEL.gguf --device cuda --sequences 1,2,4,8,16,32 --prompt 128 --tokens 64

Sequences have different random prompts, and nothing ends them early. The clock runs from the step in which the last
sequence got its first token to the step in which the first one got its last. ``--sampling`` runs one sequence by each
of the six settings that a device must draw as fast as it takes the most probable token, in turns with greedy.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from statistics import median
from typing import Any

import numpy as np

from zincmetal import gguf
from zincmetal.engine.engine import Engine
from zincmetal.engine.loaded import Loaded
from zincmetal.engine.request import Request
from zincmetal.engine.running import Running
from zincmetal.sampling.params import SamplingParams

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "0.8, min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "0.8, top-k 40": {"temperature": 0.8, "top_k": 40},
    "0.7, top-k 20, top-p 0.8, presence 1.5": {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "presence_penalty": 1.5,
    },
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "temperature 1": {"temperature": 1.0},
    "typical 0.9": {"temperature": 1.0, "typical_p": 0.9},
}


class Clock:
    """Sink of a request that notes the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def progress(self, done: int, total: int) -> None:
        """Take the progress of the prompt."""

    def started(self, stats: Any) -> None:
        """Take the cost of the prompt."""

    def token(self, token: int, choice: Any) -> None:
        """Take a token."""
        self.times.append(time.perf_counter())

    def done(self, reason: str, stats: Any) -> None:
        """Take the end."""
        self.ended.set()

    def failed(self, error: BaseException) -> None:
        """Take the error that ended the request."""
        self.error = error
        self.ended.set()


def together(running: Running, prompts: list[list[int]], n_tokens: int, params: SamplingParams) -> float:
    """Run all prompts at once. Return decode tokens/s in all."""
    clocks = [Clock() for _ in prompts]
    for ids, clock in zip(prompts, clocks, strict=True):
        running.loop.submit(Request(ids, n_tokens, clock, params))
    for clock in clocks:
        clock.ended.wait()
        if clock.error:
            raise clock.error
    begin = max(clock.times[0] for clock in clocks)
    end = min(clock.times[-1] for clock in clocks)
    made = sum(begin < t <= end for clock in clocks for t in clock.times)
    return made / (end - begin)


def main() -> None:
    """Print a table, and write the figures as JSON if asked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--device")
    p.add_argument("--sequences", default="1,2,4,8,16,32")
    p.add_argument("--prompt", type=int, default=128)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--context", type=int, default=4096)
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--sampling", action="store_true")
    p.add_argument("--json")
    args = p.parse_args()
    numbers = [int(n) for n in args.sequences.split(",")]
    file = gguf.open(args.model)
    loaded = Loaded(file, context=args.context, device=args.device, threads=args.threads, max_sequences=max(numbers))
    running = Running(Engine(loaded), with_cache=False)
    rng, found = np.random.default_rng(5), dict[str, list[float]]()
    n_vocab = loaded.planner.config.n_vocab

    def prompts(n: int) -> list[list[int]]:
        return [rng.integers(1, n_vocab, args.prompt).tolist() for _ in range(n)]

    greedy = SamplingParams()
    for repeat in range(args.repeats + 1):
        for n in numbers:
            figure = together(running, prompts(n), args.tokens, greedy)
            if repeat:  # the first makes the plans
                found.setdefault(f"{n} sequences", []).append(figure)
        for name, options in SETTINGS.items() if args.sampling else ():
            figure = together(running, prompts(1), 2 * args.tokens, SamplingParams(**options, seed=repeat))
            if repeat:
                found.setdefault(name, []).append(figure)
    for name, figures in found.items():
        print(f"{name:42s} {median(figures):9.1f} tokens/s   {min(figures):9.1f} to {max(figures):9.1f}")
    if args.json:
        with open(args.json, "w") as out:
            json.dump(found, out)
    running.close()


if __name__ == "__main__":
    main()
