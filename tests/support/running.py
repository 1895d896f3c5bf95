"""Looks below a model, between its steps."""

from __future__ import annotations

from zincmetal.api.model import Model
from zincmetal.engine.running import Running


def running_of(model: Model) -> Running:
    """Returns the engine of a model, with its scheduler, its prefix cache and the thread that steps."""
    running = model.running
    return running
