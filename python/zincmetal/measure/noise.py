"""Noise of runs. It imports nothing, as the command's help needs."""

from __future__ import annotations

from collections.abc import Sequence


def spread(values: Sequence[float]) -> float:
    """Return half the distance from the least value to the largest: the noise of runs."""
    return (max(values) - min(values)) / 2
