"""Measures Python's cost of a token: stream_generate beside a bare loop over one session, in one process.

    python bench/overhead.py [FILE.gguf] [--threads 2] [--rounds 15] [--tokens 96] [--json]

Without a file it runs the demo model. The two loops take turns over the same tokens, and run equally far ahead. It
prints two figures. Each is the median over the rounds of the difference between the loops, in microseconds a token:

python_us   of wall time. It is small beside a step, so the machine must be quiet. The quartiles show how quiet it was.
between_us  of the median time from a step's return to the next call. It bears other load. It is the higher figure if
            the device works on the next step at the same time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any, cast

import zincmetal
from zincmetal.device.core import Core
from zincmetal.hub import demo_model

PROMPT = "Once upon a time there was"


class TimedCore:
    """Core that notes the times of calls and returns of collect_step, which waits for a step."""

    def __init__(self, core: Any) -> None:
        self._core, self.called, self.returned = core, list[float](), list[float]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def collect_step(self, steps: Any) -> Any:
        self.called.append(time.perf_counter())
        results = self._core.collect_step(steps)
        self.returned.append(time.perf_counter())
        return results


def bare(model: zincmetal.Model, ids: list[int], n: int, ahead: bool) -> None:
    """Makes the first n tokens after the prompt by a session alone."""
    with model.session() as session:
        token = session.prefill(ids)
        for left in range(n, 0, -1):
            token = session.decode(token, ahead and left > 1)


def streamed(model: zincmetal.Model, ids: list[int], n: int) -> None:
    """Makes the same tokens by stream_generate."""
    for _ in model.stream_generate(ids, max_tokens=n + 1):
        pass


def timed(model: zincmetal.Model, run: Callable[[], None]) -> tuple[float, float]:
    """Returns the wall time of a token, and the median time between two steps, in microseconds."""
    model.reset()
    engine = model.engine
    core, steps = engine.core, TimedCore(engine.core)
    engine.core = cast(Core, steps)
    run()
    engine.core = core
    wall = (steps.returned[-1] - steps.returned[0]) / (len(steps.returned) - 1)
    between = median(call - back for back, call in zip(steps.returned, steps.called[1:], strict=False))
    return wall * 1e6, between * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with zincmetal.load(args.file or demo_model(), context=args.tokens + 64, threads=args.threads) as model:
        model.tokenizer.eog_ids = frozenset()  # both run the same number of steps
        ids, ahead, n = model.tokenize(PROMPT), bool(model.device.info["asynchronous"]), args.tokens
        ways = (lambda: streamed(model, ids, n), lambda: bare(model, ids, n, ahead))
        ways[0]()  # to make the plans and touch the pages
        rounds = []
        for i in range(args.rounds):
            first = i % 2
            times = {way: timed(model, ways[way]) for way in (first, 1 - first)}
            rounds.append((*times[0], *times[1]))
        device = model.device.info["name"]
    extra = [streamed - bare for streamed, _, bare, _ in rounds]
    low, _, high = quantiles(extra, n=4)
    result = {
        "device": device,
        "step_us": round(median(bare for _, _, bare, _ in rounds), 1),
        "python_us": round(median(extra), 1),
        "quartiles_us": [round(low, 1), round(high, 1)],
        "between_us": round(median(streamed - bare for _, streamed, _, bare in rounds), 1),
    }
    print(json.dumps(result) if args.json else "\n".join(f"{key:14s}{value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
