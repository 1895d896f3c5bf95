"""Cost of a model in a process of its own: tokens a second and gaps between tokens, beside the same model in this one.

    python bench/model_process.py MODEL.gguf [--clients 1 4] [--tokens 64] [--rounds 3]

Both are read by one asyncio loop, as a server does; the rounds take turns. ``--busy`` makes the loop do so many
microseconds of other work for each token, as HTTP and parsers do.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import zincmetal
from zincmetal import gguf
from zincmetal.api.generation import Asked
from zincmetal.api.result import Chunk
from zincmetal.api.text import ModelText
from zincmetal.sampling.params import SamplingParams
from zincmetal.serve.backend import Backend, ModelCard
from zincmetal.serve.channel import Load, LoadOptions
from zincmetal.serve.local import LocalBackend
from zincmetal.serve.remote import RemoteModel

CONTEXT = 4096


async def remote(path: Path) -> RemoteModel:
    """Loads the model in a process of its own."""
    model = RemoteModel(path.stem, ModelText(gguf.open(path)), lambda error: None)
    planned = await model.open(LoadOptions(str(path)))
    await model.load(Load(CONTEXT, 16, planned.budget), planned.facts, lambda done, total: None)
    return model


async def client(backend: Backend, number: int, tokens: int, work: Callable[[], None]) -> list[float]:
    """Reads one answer. Returns when its tokens came."""
    ids = backend.text.tokenizer.prompt(f"{number}: once upon a time there was", parse_special=False)
    bias = dict.fromkeys(backend.text.tokenizer.eog_ids, float("-inf"))
    answer = await backend.start(Asked(ids, tokens, SamplingParams(logit_bias=bias)))
    came = []
    async for event in answer.events():
        if isinstance(event, Chunk):
            came.append(time.perf_counter())
            work()
    await answer.result()
    return came


async def measure(backend: Backend, clients: int, tokens: int, work: Callable[[], None]) -> tuple[float, list[float]]:
    """Returns the tokens a second of all clients, and the gaps between tokens in milliseconds."""
    await backend.clear_cache()
    came = await asyncio.gather(*(client(backend, n, tokens, work) for n in range(clients)))
    gaps = [1e3 * (b - a) for times in came for a, b in pairwise(times)]
    first, last = min(times[0] for times in came), max(times[-1] for times in came)
    return sum(len(times) - 1 for times in came) / (last - first), gaps


def busy(microseconds: float) -> Callable[[], None]:
    """Returns work of so many microseconds that holds the interpreter."""

    def work() -> None:
        until = time.perf_counter() + microseconds * 1e-6
        while time.perf_counter() < until:
            pass

    return work


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=float, default=0.0, metavar="MICROSECONDS")
    args = parser.parse_args()
    work = busy(args.busy)
    with zincmetal.load(args.model, context=CONTEXT) as model:
        apart = await remote(args.model)
        here = LocalBackend(model, ModelCard("here", n_ctx=CONTEXT))
        backends: dict[str, Backend] = {"in this process": here, "in its own": apart}
        for clients in args.clients:
            speeds: dict[str, list[float]] = {name: [] for name in backends}
            gaps: dict[str, list[float]] = {name: [] for name in backends}
            for turn in range(args.rounds):
                for name in list(backends)[:: 1 if turn % 2 else -1]:
                    speed, found = await measure(backends[name], clients, args.tokens, work)
                    speeds[name].append(speed)
                    gaps[name] += found
            for name in backends:
                cuts = statistics.quantiles(gaps[name], n=100)
                each = ", ".join(f"{s:.1f}" for s in speeds[name])
                print(
                    f"{clients} clients, {name:15}: {statistics.median(speeds[name]):6.1f} tokens/s ({each}); "
                    f"gaps p50 {cuts[49]:.1f} p99 {cuts[98]:.1f} max {max(gaps[name]):.1f} ms"
                )
        await apart.close()


if __name__ == "__main__":
    asyncio.run(main())
