"""Times every dispatch of decode steps of several sequences, each alone, and sums the times by kernel.

    python bench/step_costs.py MODEL.gguf --device cuda --sequences 1,2,8,32 --position 160

The sums are longer than a step: here no two kernels overlap, and each has the cost of two events around it.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from zincmetal import gguf
from zincmetal.device.buffers import bound
from zincmetal.device.core import BoundDispatch
from zincmetal.engine.batch import Builder
from zincmetal.engine.engine import Engine, shape_of
from zincmetal.engine.loaded import Loaded
from zincmetal.engine.sequence import Sequence
from zincmetal.engine.session import GREEDY
from zincmetal.plan.plan import Plan


def _pretended(engine: Engine, length: int) -> Sequence:
    """Make a sequence of ``length`` tokens whose state is whatever memory holds."""
    pages = [engine.pages.take() for _ in range(engine.pages.needed(length))]
    slot = engine.slots.take() if engine.recurrent else None
    sequence = Sequence([0] * length, pages, slot, computed=length, submitted=length)
    sequence.sit(engine.free_seats.take())
    return sequence


class Step(NamedTuple):
    """Decode step of ``n`` sequences, which was described and can be submitted again and again."""

    n: int
    engine: Engine
    plan: Plan
    dispatches: list[BoundDispatch]
    described: tuple[Any, ...]


def steps(model: str, device: str | None, numbers: list[int], position: int) -> Iterator[Step]:
    """Yield a step for each number of sequences, whose next token stands at ``position``. They have one engine."""
    engine = Engine(Loaded(gguf.open(model), context=4096, device=device, max_sequences=32))
    needed = max(numbers) * engine.pages.needed(position + 1)
    engine.grow(max(engine.pages_now, needed), max(engine.slots_now, max(numbers)))
    rng = np.random.default_rng(3)
    sequences = [_pretended(engine, position) for _ in range(max(numbers))]
    for n in numbers:
        builder = Builder(engine, engine.pages, engine.slots)
        for sequence in sequences[:n]:
            builder.add(sequence, [int(rng.integers(1, engine.config.n_vocab))], GREEDY)
        batch = builder.batch()
        plan = engine.program(shape_of(batch), position).plan
        yield Step(n, engine, plan, [bound(d, engine.buffers.buffer) for d in plan.dispatches], engine.describe(batch))
        for sequence in sequences:
            sequence.submitted = sequence.computed = position


def main() -> None:
    """Print a table for each number of sequences."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--device")
    p.add_argument("--sequences", default="1,2,4,8,16,32")
    p.add_argument("--position", type=int, default=160)
    p.add_argument("--repeats", type=int, default=3)
    args = p.parse_args()
    for step in steps(args.model, args.device, [int(n) for n in args.sequences.split(",")], args.position):
        engine, plan = step.engine, step.plan
        best: list[float] = []
        for _ in range(args.repeats):
            engine.core.describe(engine.steps, *step.described)
            seconds = engine.device.time_each(step.dispatches)
            engine.steps.drop()
            best = [min(pair) for pair in zip(best or seconds, seconds, strict=True)]
        total, count = defaultdict[str, float](float), Counter[str]()
        for d, s in zip(plan.dispatches, best, strict=True):
            name = f"{d.launch.kernel} {d.launch.grid}"
            total[name] += s * 1e6
            count[name] += 1
        sizes = f"{len(step.dispatches)} dispatches, {plan.n_barriers} barriers"
        print(f"== {step.n} sequences: {sizes}, {sum(best) * 1e3:.3f} ms")
        for name, us in sorted(total.items(), key=lambda item: -item[1]):
            print(f"  {us:9.1f} us  {count[name]:4d} x {us / count[name]:8.2f}  {name}")


if __name__ == "__main__":
    main()
