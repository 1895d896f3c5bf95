"""Times what each kernel costs within a step: the step as it is, and with all dispatches of one kernel made twice.

    python bench/costs_in_step.py MODEL.gguf --device cuda --sequences 1,4 --position 160

In a step, kernels overlap with their neighbours' launches. So the differences add up to about the step, which the times
of dispatches that run alone (bench/step_costs.py) do not.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter

from step_costs import Step, steps
from zincmetal.device.core import BoundDispatch

ONCE = "begin_step"  # steps what it writes


def time_us(step: Step, dispatches: list[BoundDispatch], rounds: int) -> float:
    """Return the median microseconds of the device for the step as these dispatches."""
    core, queue, (rows, outs, *_) = step.engine.core, step.engine.steps, step.described
    plan = core.Plan(step.engine.device, dispatches, len(rows), len(outs))
    times = []
    for _ in range(rounds):
        before = queue.counters["gpu_seconds"]
        core.decode_step(queue, plan, *step.described)
        core.collect_step(queue)
        times.append((queue.counters["gpu_seconds"] - before) * 1e6)
    return statistics.median(times[rounds // 4 :])


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
    for step in steps(args.model, args.device, [int(n) for n in args.sequences.split(",")], args.position):
        if args.whole:
            us = time_us(step, step.dispatches, args.rounds)
            print(f"{step.n} sequences: {len(step.dispatches)} dispatches, {us:.0f} us", flush=True)
        else:
            _report(step, args.rounds)


def _report(step: Step, rounds: int) -> None:
    names = [f"{d.launch.kernel} {d.launch.grid}" for d in step.plan.dispatches]
    whole = time_us(step, step.dispatches, rounds)
    costs = {}
    for name in dict.fromkeys(names):
        if not name.startswith(ONCE):
            twice: list[BoundDispatch] = []
            for own, d in zip(names, step.dispatches, strict=True):
                twice += [d, d._replace(barrier=True)] if own == name else [d]
            costs[name] = time_us(step, twice, rounds) - whole
    count, again = Counter(names), time_us(step, step.dispatches, rounds)
    print(f"== {step.n} sequences: {len(names)} dispatches, {whole:.0f} us; {again:.0f} us again")
    for name, us in sorted(costs.items(), key=lambda item: -item[1]):
        print(f"  {us:9.1f} us  {count[name]:4d} x {us / count[name]:8.2f}  {name}")
    print(f"  {sum(costs.values()):9.1f} us  in all", flush=True)


if __name__ == "__main__":
    main()
