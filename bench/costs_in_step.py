"""Times what each kernel costs within a step: the step as it is, and with all dispatches of one kernel made twice.

    python bench/costs_in_step.py MODEL.gguf --device cuda --sequences 1,4 --position 160

In a step, kernels overlap with their neighbours' launches. So the differences add up to about the step, which the times
of dispatches that run alone (bench/step_costs.py) do not.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from step_costs import pretended
from zincmetal import gguf
from zincmetal.device.buffers import bound
from zincmetal.engine.batch import Builder
from zincmetal.engine.engine import Engine, shape_of
from zincmetal.engine.loaded import Loaded
from zincmetal.engine.session import GREEDY

ONCE = ("begin_step", "end_step")  # kernels that step what they write


class Timer:
    """Steps of one described batch, on plans that differ."""

    def __init__(self, engine: Engine, described: tuple[Any, ...], rounds: int) -> None:
        self.engine, self.described, self.rounds = engine, described, rounds

    def us(self, dispatches: list[Any]) -> float:
        """Median microseconds of the device for a step of these dispatches."""
        core, steps = self.engine.core, self.engine.steps
        rows, outs = self.described[0], self.described[1]
        plan = core.Plan(self.engine.device, dispatches, len(rows), len(outs))
        times = []
        for _ in range(self.rounds):
            before = steps.counters["gpu_seconds"]
            core.decode_step(steps, plan, *self.described)
            core.collect_step(steps)
            times.append((steps.counters["gpu_seconds"] - before) * 1e6)
        return statistics.median(times[self.rounds // 4 :])


def main() -> None:
    """Print a table for each number of sequences."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--device")
    p.add_argument("--sequences", default="1,4")
    p.add_argument("--position", type=int, default=160)
    p.add_argument("--whole", action="store_true", help="time the step alone")
    p.add_argument("--rounds", type=int, default=40)
    args = p.parse_args()
    numbers = [int(n) for n in args.sequences.split(",")]
    engine = Engine(Loaded(gguf.open(args.model), context=4096, device=args.device, max_sequences=32))
    needed = max(numbers) * engine.pages.needed(args.position + 1)
    engine.grow(max(engine.pages_now, needed), max(engine.slots_now, max(numbers)))
    sequences = [pretended(engine, args.position) for _ in range(max(numbers))]
    rng = np.random.default_rng(3)
    for n in numbers:
        builder = Builder(engine, engine.pages, engine.slots)
        for sequence in sequences[:n]:
            builder.add(sequence, [int(rng.integers(1, engine.config.n_vocab))], GREEDY)
        batch = builder.batch()
        plan = engine.program(shape_of(batch), args.position).plan
        timer = Timer(engine, engine.describe(batch), args.rounds)
        all_bound = [bound(d, engine.buffers.buffer) for d in plan.dispatches]
        if args.whole:
            print(f"{n} sequences: {len(all_bound)} dispatches, {timer.us(all_bound):.0f} us", flush=True)
        else:
            _report(n, timer, plan.dispatches, all_bound)
        for sequence in sequences:
            sequence.submitted = sequence.computed = args.position


def _report(n: int, timer: Timer, dispatches: Sequence[Any], all_bound: list[Any]) -> None:
    names = [f"{d.launch.kernel} {d.launch.grid}" for d in dispatches]
    whole = timer.us(all_bound)
    costs = {}
    for name in dict.fromkeys(names):
        if not name.startswith(ONCE):
            twice = [
                again
                for own, d in zip(names, all_bound, strict=True)
                for again in ([d, d._replace(barrier=True)] if own == name else [d])
            ]
            costs[name] = timer.us(twice) - whole
    count = Counter(names)
    print(f"== {n} sequences: {len(names)} dispatches, {whole:.0f} us; {timer.us(all_bound):.0f} us again")
    for name, us in sorted(costs.items(), key=lambda item: -item[1]):
        print(f"  {us:9.1f} us  {count[name]:4d} x {us / count[name]:8.2f}  {name}")
    print(f"  {sum(costs.values()):9.1f} us  in all", flush=True)


if __name__ == "__main__":
    main()
