"""The architectures. Each is a short module with ``build(g)``: a step's operations up to the last hidden state."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UnsupportedModelError, quote
from ..graph.builder import Graph
from ..graph.ops import Value
from . import gemma3, llama, qwen2, qwen3, qwen3moe, qwen35, qwen35moe

Build = Callable[[Graph], Value]

ARCHITECTURES: dict[str, Build] = {
    "gemma3": gemma3.build,
    "llama": llama.build,
    "qwen2": qwen2.build,
    "qwen3": qwen3.build,
    "qwen3moe": qwen3moe.build,
    "qwen35": qwen35.build,
    "qwen35moe": qwen35moe.build,
}


def get(name: str) -> Build:
    """The builder of an architecture by its name in ``general.architecture``. Raises UnsupportedModelError."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"architecture {quote(name)} is not supported; supported: {known}") from None
