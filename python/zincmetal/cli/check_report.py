"""Report of ``zincmetal check``: lines for people, and an object for ``--json``."""

from __future__ import annotations

import functools
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..check import machine
from ..check.results import FAIL, PASS, WARN, Outcome, Result
from .info import mac_model, memory_bytes, version

ALL_THREADS, WORST = 1024, 10  # of a threadgroup; how many pipelines are named
OLDEST_MACOS = (14, 0)  # the Metal Shading Language 3.1


def host(file: str | None = None) -> Result:
    """Describe the machine, with a warning if its macOS is too old. ``file`` is the path of the model."""
    memory = memory_bytes()
    figures = {
        "system": platform.system(),
        "release": platform.mac_ver()[0] or platform.release(),
        "machine": platform.machine(),
        "model": mac_model(),
        "memory": memory,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "zincmetal": version(),
        **machine.facts(file),
    }
    name = f"macOS {figures['release']}" if sys.platform == "darwin" else platform.platform()
    model = f", {figures['model']}" if figures["model"] else ""
    message = f"{name}{model}, {figures['machine']}, {memory / 2**30:.0f} GiB, Python {figures['python']}"
    if sys.platform == "darwin" and _numbers(platform.mac_ver()[0]) < OLDEST_MACOS:
        return Result("host", Outcome(WARN, f"{message}; the Metal kernels need macOS 14", figures))
    return Result("host", Outcome(PASS, message, figures))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))


def lines(results: Sequence[Result], verbose: bool) -> Iterator[str]:
    """Yield the lines of the table. Without ``verbose`` the kernels of a family that passed share a line."""
    families: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        families.setdefault((r.group, r.subject if verbose else _family(r)), []).append(r)
    for (group, family), found in families.items():
        passed = [r for r in found if r.outcome.status == PASS]
        if len(passed) > 1:
            yield _row(PASS, group, f"{family} ({len(passed)})" if family else "", _together(passed))
        yield from (line(r) for r in found if len(passed) == 1 or r.outcome.status != PASS)


def line(result: Result) -> str:
    """Return a check as a line. A compiler's message may add lines."""
    return _row(result.outcome.status, result.group, result.subject, result.outcome.message)


def summary(results: Iterable[Result]) -> dict[str, int]:
    """Count the checks by status."""
    counts = Counter(r.outcome.status for r in results)
    return {status: counts[status] for status in (PASS, WARN, FAIL)}


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """Return the object for ``--json``. Its keys do not change from version to version."""
    about = {r.name: dict(r.outcome.figures) for r in results if r.name in ("host", "device")}
    checks = [
        {
            "name": r.name,
            "status": r.outcome.status,
            "message": r.outcome.message,
            "figures": {} if r.name in about else dict(r.outcome.figures),
        }
        for r in results
    ]
    return {
        "zincmetal": version(),
        "host": about.get("host", {}),
        "device": about.get("device", {}),
        "checks": checks,
        "summary": summary(results),
    }


def occupancy(results: Iterable[Result]) -> Result | None:
    """List the pipelines that take the fewest threads: they need the most registers. None if all take the most."""
    few = {r.subject: dict(r.outcome.figures) for r in results if r.group == "pipeline" and _threads(r) < ALL_THREADS}
    if not few:
        return None
    lines = [f"{len(few)} kernels take fewer than {ALL_THREADS} threads; the kernels with the fewest:"]
    for name in sorted(few, key=lambda name: int(few[name]["max_threads"]))[:WORST]:
        f = few[name]
        lines.append(f"{name}: {f['max_threads']} threads, {f['threadgroup_bytes']} bytes of threadgroup memory")
    return Result("hint/occupancy", Outcome(PASS, "\n    ".join(lines), few))


def _threads(pipeline: Result) -> int:
    return int(pipeline.outcome.figures.get("max_threads", ALL_THREADS))


def _row(status: str, group: str, subject: str, message: str) -> str:
    return f"{status}  {group:<9} {subject:<34} {message}".rstrip()


def _family(result: Result) -> str:
    """Return a kernel's name without types and sizes. Pipelines are one family."""
    if result.kind == "kernel":
        return _variant().sub("", result.subject)
    return "" if result.kind == "pipeline" else result.subject


@functools.cache
def _variant() -> re.Pattern[str]:
    from ..gguf import quants  # brings NumPy, which a help text does not need

    return re.compile(rf"_({'|'.join(t.name for t in quants.SUPPORTED)}|\d+)(?=_|$)")


def _together(passed: Sequence[Result]) -> str:
    if passed[0].kind == "pipeline":
        seconds = [r.outcome.figures["seconds"] for r in passed]
        took = f"{sum(seconds):.2f} s, the slowest {max(seconds):.2f} s"
        return f"{len(passed)} kernels build, and take the threads that plans launch; {took}"
    return f"up to {max(r.outcome.figures['error'] for r in passed):.2f} of the allowed error"
