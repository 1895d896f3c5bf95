"""Times every dispatch of decode steps of several sequences, each alone, and sums the times by kernel.

    python bench/step_costs.py MODEL.gguf --device cuda --sequences 1,2,8,32 --position 160

The sums are longer than a step: here no two kernels overlap, and each has the cost of two events around it.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict

import numpy as np

from zincmetal import gguf
from zincmetal.device.buffers import bound
from zincmetal.engine.batch import Builder
from zincmetal.engine.engine import Engine, shape_of
from zincmetal.engine.loaded import Loaded
from zincmetal.engine.sequence import Sequence
from zincmetal.engine.session import GREEDY


def pretended(engine: Engine, length: int) -> Sequence:
    """Make a sequence of ``length`` tokens whose state is whatever memory holds."""
    pages = [engine.pages.take() for _ in range(engine.pages.needed(length))]
    slot = engine.slots.take() if engine.recurrent else None
    sequence = Sequence([0] * length, pages, slot, computed=length, submitted=length)
    sequence.sit(engine.free_seats.take())
    return sequence


def main() -> None:
    """Print a table for each number of sequences."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--device")
    p.add_argument("--sequences", default="1,2,4,8,16,32")
    p.add_argument("--position", type=int, default=160)
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args()
    numbers = [int(n) for n in args.sequences.split(",")]
    engine = Engine(Loaded(gguf.open(args.model), context=4096, device=args.device, max_sequences=32))
    needed = max(numbers) * engine.pages.needed(args.position + 1)
    engine.grow(max(engine.pages_now, needed), max(engine.slots_now, max(numbers)))
    rng = np.random.default_rng(3)
    sequences = []
    for _ in range(max(numbers)):
        sequences.append(pretended(engine, args.position))
    for n in numbers:
        builder = Builder(engine, engine.pages, engine.slots)
        for sequence in sequences[:n]:
            builder.add(sequence, [int(rng.integers(1, engine.config.n_vocab))], GREEDY)
        batch = builder.batch()
        plan = engine.program(shape_of(batch), args.position).plan
        dispatches = [bound(d, engine.buffers.buffer) for d in plan.dispatches]
        described = engine.describe(batch)
        best: list[float] = []
        for _ in range(args.repeats):
            engine.core.describe(engine.steps, *described)
            seconds = engine.device.time_each(dispatches)
            engine.steps.drop()
            best = [min(pair) for pair in zip(best or seconds, seconds, strict=True)]
        total, count = defaultdict[str, float](float), Counter[str]()
        for d, s in zip(plan.dispatches, best, strict=True):
            name = f"{d.launch.kernel} {d.launch.grid}"
            total[name] += s * 1e6
            count[name] += 1
        print(f"== {n} sequences: {len(dispatches)} dispatches, {plan.n_barriers} barriers, {sum(best) * 1e3:.3f} ms")
        for name, us in sorted(total.items(), key=lambda item: -item[1]):
            print(f"  {us:9.1f} us  {count[name]:4d} x {us / count[name]:8.2f}  {name}")
        for sequence in sequences:
            sequence.submitted = sequence.computed = args.position


if __name__ == "__main__":
    main()
