"""Runs the scenarios at all servers, in turns, within a bound of time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from ...errors import UsageError
from .chat import Prompts, calibrated
from .client import HttpFailure, Target, check_url, first_model
from .measures import Goals
from .report import Report
from .scenarios import Load, Outcome, Scenario, chosen

Say = Callable[[str], None]


async def measure(
    targets: Sequence[Target], load: Load, goals: Goals, kinds: Sequence[str], limit: float, say: Say
) -> Report:
    """Measure servers. Each round of a scenario asks all of them, and begins with another one.

    Raises UsageError for a server that does not answer.
    """
    end = time.perf_counter() + limit
    try:
        known = [await _prepared(target, load.seed) for target in targets]
    except HttpFailure as error:
        raise UsageError(str(error)) from None
    report = Report(load, goals, [target for target, _ in known])
    for name, scenario in chosen(load, kinds).items():
        for number in range(1 if name == "soak" else load.rounds):
            turn = number % len(known)
            for target, per_word in [*known[turn:], *known[:turn]]:
                say(f"{name}, round {number + 1}, {target.name}")
                # The same for all servers, and others in each round, so that nothing is cached.
                prompts = Prompts(f"{load.seed} {name} {number}", per_word)
                outcome = await _within(end, scenario(target, load, prompts, number))
                if outcome is None:
                    report.cut = True
                    return report
                report.add(name, target, outcome)
    return report


async def _prepared(target: Target, seed: int) -> tuple[Target, float]:
    """Return a server with its model, and how many tokens a word has there."""
    if not target.model:
        target = replace(target, model=str((await first_model(target)).get("id", "")))
    return target, (await calibrated(target, seed)).per_word


async def _within(end: float, work: object) -> Outcome | None:
    left = end - time.perf_counter()
    task = asyncio.ensure_future(work)  # type: ignore[call-overload]
    try:
        done: Outcome = await asyncio.wait_for(task, max(left, 0.0))
        return done
    except (TimeoutError, asyncio.TimeoutError):
        return None


def named(urls: Sequence[str], names: Sequence[str], remote: bool, key: str) -> list[Target]:
    """Make the servers of a measurement. Raises UsageError for one elsewhere, unless ``remote``."""
    if names and len(names) != len(urls):
        raise UsageError(f"there are {len(urls)} servers and {len(names)} names: give each a name, or none")
    targets = [Target(check_url(url), key=key) for url in urls]
    for target in targets:
        if not target.is_local and not remote:
            raise UsageError(f"{target.host} is not this machine: a measurement is a load on it; allow it by --remote")
    own = [f"{target.host}:{target.url.rpartition(':')[2].partition('/')[0]}" for target in targets]
    return [replace(target, name=name) for target, name in zip(targets, names or own, strict=True)]


__all__ = ["Scenario", "measure", "named"]
