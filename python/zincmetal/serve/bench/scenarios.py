"""What the clients do. A scenario runs once in each round, for one server at a time, with the same seed for all."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

from .chat import Ask, Prompts, chat
from .client import HttpFailure, Json, Target, get
from .measures import Sample, Spread
from .memory import Slope

READY = 8  # tokens that a decoder has made before the long prompt arrives
IDLE_WAIT = 10.0  # seconds for a server to end what nobody wants any more
SOAK_CLIENTS = 4
SOAK_LEAVES = 0.2  # share of the clients that hang up


@dataclass(frozen=True)
class Load:
    """How much the clients do. Lengths are in tokens, times in seconds."""

    seed: int = 1
    rounds: int = 3
    answer: int = 64
    prompts: tuple[int, ...] = (128, 1024)
    repeats: int = 3  # of each prompt length, one after another
    clients: tuple[int, ...] = (1, 4, 8)
    each: int = 3  # requests of each client
    think: float = 0.1  # mean time between two requests of a client; the times are a Poisson process
    decoders: int = 4
    long: int = 2048  # the prompt that arrives while others decode
    system: int = 1000  # of an agent
    turns: int = 5
    storm: int = 100
    churn: int = 30
    soak: float = 60.0
    pid: int | None = None  # of the server's process, for its memory


@dataclass
class Outcome:
    """Samples of one run of a scenario, the time that it took, and numbers of its own."""

    samples: list[Sample]
    seconds: float
    notes: dict[str, float] = field(default_factory=dict)


Scenario = Callable[[Target, Load, Prompts, int], Awaitable[Outcome]]


async def _timed(work: Awaitable[list[Sample]]) -> Outcome:
    began = time.perf_counter()
    samples = await work
    return Outcome(samples, time.perf_counter() - began)


def single(tokens: int) -> Scenario:
    """Return the scenario of one client with prompts of one length."""

    async def run(target: Target, load: Load, prompts: Prompts, number: int) -> Outcome:
        async def all_of_them() -> list[Sample]:
            asks = [Ask(prompts.messages(tokens), load.answer) for _ in range(load.repeats)]
            return [await chat(target, ask) for ask in asks]

        return await _timed(all_of_them())

    return run


def concurrent(clients: int, tokens: int = 128) -> Scenario:
    """Return the scenario of some clients at once, each with one request after another."""

    async def run(target: Target, load: Load, prompts: Prompts, number: int) -> Outcome:
        chance = random.Random(f"{load.seed} {number} {clients}")
        waits = [[chance.expovariate(1 / load.think) for _ in range(load.each)] for _ in range(clients)]
        asks = [[Ask(prompts.messages(tokens), load.answer) for _ in range(load.each)] for _ in range(clients)]

        async def client(i: int) -> list[Sample]:
            samples = []
            for wait, ask in zip(waits[i], asks[i], strict=True):
                await asyncio.sleep(wait)
                samples.append(await chat(target, ask))
            return samples

        async def all_of_them() -> list[Sample]:
            return list(chain(*await asyncio.gather(*map(client, range(clients)))))

        return await _timed(all_of_them())

    return run


async def agents(target: Target, load: Load, prompts: Prompts, number: int) -> Outcome:
    """Replay a session of an agent: a long system prompt, turns that grow, and a side request beside the second turn.

    ``excess``: the most tokens of a later turn that were computed although they were not new.
    """
    shared = Prompts(load.seed, prompts.per_word)  # the same system prompt in each session
    history: list[Json] = [{"role": "system", "content": shared.text(load.system)}]
    samples: list[Sample] = []
    began, side = time.perf_counter(), None
    for turn in range(load.turns):
        history.append({"role": "user", "content": prompts.text(60)})
        if turn == 1:
            title = [{"role": "system", "content": "Make a title of three words."}, *prompts.messages(40)]
            side = asyncio.create_task(chat(target, Ask(title, 8)))
        samples.append(await chat(target, Ask(list(history), load.answer)))
        if samples[-1].error:
            break
        history.append({"role": "assistant", "content": samples[-1].text})
    others = [await side] if side else []
    return Outcome([*samples, *others], time.perf_counter() - began, _agent_notes(samples))


def _agent_notes(turns: Sequence[Sample]) -> dict[str, float]:
    whole = [turn for turn in turns if turn.ok and turn.prompt]
    excess = [
        (after.prompt - after.cached) - (after.prompt - before.prompt - before.tokens)
        for before, after in pairwise(whole)
    ]
    first = whole[0] if whole else None
    return {
        "first turn cached": first.cached / first.prompt if first else math.nan,
        "excess": float(max(excess, default=math.nan)),
        "later TTFT": Spread.of(turn.ttft for turn in whole[1:]).median,
    }


async def mixed(target: Target, load: Load, prompts: Prompts, number: int) -> Outcome:
    """Let a long prompt arrive while others decode. ``worst gap``: of the decoders, until its first token."""
    began, ready = time.perf_counter(), asyncio.Event()
    decoding: dict[int, Sample] = {}

    def seen(sample: Sample) -> None:
        decoding[id(sample)] = sample
        if len(decoding) == load.decoders and all(len(s.stamps) >= READY for s in decoding.values()):
            ready.set()

    asks = [Ask(prompts.messages(64), max(512, 8 * load.answer)) for _ in range(load.decoders)]
    tasks = [asyncio.create_task(chat(target, ask, seen)) for ask in asks]
    waiting = asyncio.create_task(ready.wait())
    try:
        await asyncio.wait({waiting, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        long = await chat(target, Ask(prompts.messages(load.long), 4))
        ended = [task.result() for task in tasks if task.done()]
    finally:
        for task in (waiting, *tasks):
            task.cancel()
        await asyncio.gather(waiting, *tasks, return_exceptions=True)
    for sample in decoding.values():
        if not sample.ended:
            sample.left, sample.ended = True, time.perf_counter()
    failed = [sample for sample in ended if sample.error]
    notes = _gap_notes(long, list(decoding.values()))
    return Outcome([long, *decoding.values(), *failed], time.perf_counter() - began, notes)


def _gap_notes(long: Sample, decoders: Sequence[Sample]) -> dict[str, float]:
    """Return the gaps of the decoders that lie, at least in part, between a long prompt and its first token."""
    if not long.stamps:
        return {"worst gap": math.nan, "median gap": math.nan}
    gaps = [
        after - before
        for sample in decoders
        for before, after in pairwise(sample.stamps)
        if after > long.sent and before < long.stamps[0]
    ]
    spread = Spread.of(gaps)
    return {"worst gap": spread.worst, "median gap": spread.median, "long TTFT": long.ttft}


async def storm(target: Target, load: Load, prompts: Prompts, number: int) -> Outcome:
    """Let clients hang up at random. ``idle after``: seconds until the server has ended what nobody wants."""
    chance = random.Random(f"{load.seed} {number} storm")
    asks = [
        Ask(prompts.messages(chance.randint(20, 200)), 256, chance.choice((0, 0, 1, 2, 5, 20)))
        for _ in range(load.storm)
    ]
    few, began = asyncio.Semaphore(8), time.perf_counter()

    async def client(ask: Ask) -> Sample:
        async with few:
            return await chat(target, ask)

    samples = list(await asyncio.gather(*map(client, asks)))
    idle = await _until_idle(target)
    after = await chat(target, Ask(prompts.messages(20), 8))
    notes = {"idle after": idle, "TTFT after": after.ttft}
    return Outcome([*samples, after], time.perf_counter() - began, notes)


async def _until_idle(target: Target) -> float:
    """Return the seconds until no sequence of a server runs, NaN if it does not say."""
    began = time.perf_counter()
    while time.perf_counter() - began < IDLE_WAIT:
        try:
            slots = json.loads(await get(target, "/slots"))
            if not any(slot["is_processing"] for slot in slots):
                return time.perf_counter() - began
        except (HttpFailure, ValueError, LookupError, TypeError):
            return math.nan
        await asyncio.sleep(0.02)
    return math.inf


async def churn(target: Target, load: Load, prompts: Prompts, number: int) -> Outcome:
    """Ask all models of a server in a random order, two clients at once: it loads what it has not, and others go.

    ``models``: how many there are. ``TTFT of another``: of requests for another model than the one before.
    """
    listed = json.loads(await get(target, "/v1/models"))
    names = [str(model["id"]) for model in listed["data"]]
    chance = random.Random(f"{load.seed} {number} churn")
    order = [chance.choice(names) for _ in range(load.churn)]
    two, began = asyncio.Semaphore(2), time.perf_counter()

    async def client(name: str) -> Sample:
        async with two:
            return await chat(target, Ask(prompts.messages(30), 8, extra={"model": name}))

    samples = list(await asyncio.gather(*map(client, order)))
    others = (after.ttft for (a, b), after in zip(pairwise(order), samples[1:], strict=True) if a != b)
    spread = Spread.of(others)
    notes = {"models": float(len(names)), "TTFT of another": spread.median, "worst of another": spread.worst}
    return Outcome(samples, time.perf_counter() - began, notes)


async def soak(target: Target, load: Load, prompts: Prompts, number: int) -> Outcome:
    """Ask for a long time. ``bytes/min``: how the server's memory grows, without the first quarter."""
    began = time.perf_counter()
    slope = Slope(target, load.pid)
    watching = asyncio.create_task(slope.watch())

    async def client(i: int) -> list[Sample]:
        chance, samples = random.Random(f"{load.seed} {number} {i}"), list[Sample]()
        while time.perf_counter() - began < load.soak:
            leaves = chance.randint(0, 20) if chance.random() < SOAK_LEAVES else None
            sample = await chat(target, Ask(prompts.messages(chance.randint(20, 300)), load.answer, leaves))
            sample.text = ""
            samples.append(sample)
            if sample.error:
                await asyncio.sleep(0.5)
        return samples

    try:
        samples = list(chain(*await asyncio.gather(*map(client, range(SOAK_CLIENTS)))))
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    return Outcome(samples, time.perf_counter() - began, {"bytes/min": slope.per_minute(), "bytes": slope.last})


def chosen(load: Load, names: Sequence[str]) -> dict[str, Scenario]:
    """Return the scenarios of a run by the names of their reports. ``names``: kinds of scenarios."""
    kinds: dict[str, dict[str, Scenario]] = {
        "single": {f"single {n}": single(n) for n in load.prompts},
        "clients": {f"clients {n}": concurrent(n) for n in load.clients},
        "agents": {"agents": agents},
        "mixed": {"mixed": mixed},
        "storm": {"storm": storm},
        "churn": {"churn": churn},
        "soak": {"soak": soak},
    }
    return {name: scenario for kind in names for name, scenario in kinds[kind].items()}


KINDS = ("single", "clients", "agents", "mixed", "storm", "churn", "soak")
USUAL = KINDS[:-2]  # without the one for several models, and the long one

__all__ = ["KINDS", "USUAL", "Load", "Outcome", "Scenario", "chosen"]
