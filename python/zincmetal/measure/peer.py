"""The peer in the same run: llama.cpp's ``llama-bench``, on the same file, with the same tests."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import UsageError, quote
from .choices import GREEDY
from .noise import spread
from .tasks import Task

PROGRAM = "llama-bench"
PATIENCE = 3600.0  # seconds
ALL_LAYERS = 999


def find(named: str | None) -> str:
    """Return the path of llama-bench: as named, or on PATH. Raises UsageError."""
    found = shutil.which(named or PROGRAM)
    if not found:
        where = quote(named) if named else "PATH"
        raise UsageError(f"{where} has no {PROGRAM}: build llama.cpp and name it with --llama-bench FILE")
    return found


def comparable(tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks that llama-bench has too: those of one sequence that takes the best token."""
    return [task for task in tasks if task.sequences == 1 and task.sampling == GREEDY]


def command(program: str, file: Path, tasks: Sequence[Task], settings: Mapping[str, Any]) -> list[str]:
    """Return the command line of llama-bench for tasks. Its tests are all lengths at all depths."""
    words = [program, "-m", str(file), "-o", "json", "-fa", "1", "-r", str(settings["repetitions"])]
    words += ["-p", _list(task.n_prompt for task in tasks), "-n", _list(task.n_gen for task in tasks)]
    words += ["-d", ",".join(str(n) for n in dict.fromkeys(task.depth for task in tasks))]
    words += ["-ctk", settings["kv"], "-ctv", settings["kv"]]
    words += ["-ngl", "0" if settings["backend"] == "cpu" else str(ALL_LAYERS)]
    return words + (["-t", str(settings["threads"])] if settings["threads"] else [])


def measure(program: str, file: Path, tasks: Sequence[Task], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run llama-bench and return its figures, named as ours. Raises UsageError with its last words if it fails."""
    shared = comparable(tasks)
    if not shared:
        raise UsageError(f"{PROGRAM} has none of these tests: it runs one greedy sequence")
    try:
        done = subprocess.run(
            command(program, file, shared, settings), capture_output=True, text=True, timeout=PATIENCE
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"{program} did not run: {error}") from None
    if done.returncode:
        last = " ".join(done.stderr.split())[-200:]
        raise UsageError(f"{program} ended with {done.returncode}: {last or 'it said nothing'}")
    return read(done.stdout, shared, program)


def read(text: str, tasks: Sequence[Task], program: str) -> list[dict[str, Any]]:
    """Read llama-bench's JSON: a row for each of the tasks. Raises UsageError for another text."""
    try:
        found = [_row(entry) for entry in json.loads(text)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"the output of {program} is not as llama-bench writes it: {error!r}") from None
    wanted = {task.name for task in tasks}
    return [row for row in found if row["test"] in wanted]


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    task = Task(int(entry["n_prompt"]), int(entry["n_gen"]), int(entry.get("n_depth", 0)))
    speeds = [float(value) for value in entry["samples_ts"]]
    return {
        "build": f"llama.cpp {entry['build_commit']}",
        "test": task.name,
        "n_prompt": task.n_prompt,
        "n_gen": task.n_gen,
        "n_depth": task.depth,
        "n_sequences": 1,
        "sampling": GREEDY,
        "median_ts": median(speeds),
        "spread_ts": spread(speeds),
        "avg_ts": sum(speeds) / len(speeds),
        "samples_ns": list(entry["samples_ns"]),
        "samples_ts": speeds,
    }


def _list(lengths: Any) -> str:
    return ",".join(str(n) for n in dict.fromkeys(n for n in lengths if n)) or "0"
