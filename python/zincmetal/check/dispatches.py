"""Measures the dispatches of a decode step, each many times in one command buffer. For information."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ..api.load import load
from ..api.model import Model
from ..errors import UsageError
from .results import PASS, WARN, Outcome

CONTEXT, POSITION = 512, 256
COPIES = 16
SHOWN = 5  # kernels, the slowest first


def decode_step(path: Path, device: str) -> Outcome:
    """Measure the microseconds of every kernel in a decode step, in the middle of a context."""
    with load(path, context=CONTEXT, device=device) as model:
        return timed(model, min(POSITION, model.config.n_ctx - 1))


def timed(model: Model, position: int) -> Outcome:
    """Measure the microseconds of every kernel in a decode step of a loaded model."""
    try:
        found = model.time_dispatches([0], position, COPIES)
    except UsageError as error:  # a model whose experts the host routes has no step on the device alone
        return Outcome(WARN, str(error))
    micros: dict[str, float] = {}
    for dispatch, seconds in found:
        micros[dispatch.launch.kernel] = micros.get(dispatch.launch.kernel, 0.0) + seconds * 1e6
    counts = Counter(dispatch.launch.kernel for dispatch, _ in found)
    total = sum(micros.values())
    first = sorted(micros, key=micros.__getitem__, reverse=True)[:SHOWN]
    most = ", ".join(f"{counts[kernel]} {kernel} {micros[kernel]:,.0f}" for kernel in first)
    figures = {kernel: {"count": counts[kernel], "microseconds": us} for kernel, us in micros.items()}
    return Outcome(PASS, f"{len(found)} dispatches, {total:,.0f} us one after the other: {most}", figures)
