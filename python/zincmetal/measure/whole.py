"""Measures a model file: loads it for a set of tasks, runs them, and makes the parts of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import gguf
from ..engine.engine import Engine
from ..engine.loaded import Loaded
from ..engine.running import Running
from ..engine.session import Session
from ..plan.chunks import USUAL_ROWS
from .profile import Profile, Subject, measured
from .running import REFERENCE_TOKENS, Bench
from .tasks import Task
from .tuned import Rows, tune


@dataclass(frozen=True)
class Asked:
    """What is to be measured of a model, and how it is loaded."""

    tasks: tuple[Task, ...]
    repetitions: int = 5
    warmup: int = 1
    kv: str = "f16"
    device: str | None = None
    threads: int = 0
    rows: Rows = field(default_factory=Rows)
    profile: bool = False

    @property
    def context(self) -> int:
        """Context that the longest task needs, and the profile of a whole step."""
        least = (USUAL_ROWS + 1 if self.profile else 0), REFERENCE_TOKENS
        return max(*least, *(task.context for task in self.tasks))


@contextmanager
def loaded(path: Path, asked: Asked) -> Iterator[Running]:
    """Load a file for tasks, without a prefix cache; give its memory back at the end.

    The context is that of the tasks, even if the model was trained for less: its speed does not depend on that.
    """
    file = gguf.open(path)
    try:
        most = max(task.sequences for task in asked.tasks)
        made = Loaded(
            file, context=asked.context, device=asked.device, kv=asked.kv, threads=asked.threads, max_sequences=most
        )
        if asked.rows:
            tune(made, asked.rows)
        running = Running(Engine(made), with_cache=False)
    except BaseException:
        file.close()
        raise
    leave = running.use()
    try:
        yield running
    finally:
        leave()


def measure(running: Running, asked: Asked, name: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run the tasks in their order; return the parts of a report that a model has."""
    engine = running.engine
    bench, found = Bench(running), list[dict[str, Any]]()
    for task in asked.tasks:
        tell(task.name)
        found.append(bench.measure(task, asked.repetitions, asked.warmup).facts())
    bench.forget()
    parts: dict[str, Any] = {
        "model": {"name": name, "file": str(engine.file.path), "bytes": sum(part.size for part in engine.file.parts)},
        "tests": found,
        "logprobs": bench.reference(),
    }
    if asked.profile:
        tell("profile")
        subject = Subject(name, engine.config, lambda: _alone(running))
        counts = dict(Profile(engine.profile(), subject))
        deepest = max(task.depth for task in asked.tasks)
        parts["profile"] = {**measured(subject, deepest), "counts": counts}
    return parts


@contextmanager
def _alone(running: Running) -> Iterator[Session]:
    session = Session(running.engine)
    with running.loop.exclusive(session.end):
        yield session
