"""Environment variables of zincmetal: one table of all of them. Python reads zincmetal's own through it alone.

The compiled core reads some of them by itself, and ``watchdog.py`` sets two of Apple's. They have rows too. The page
``docs/environment.md`` explains them; ``zincmetal info`` shows which are set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .errors import UsageError, quote


@dataclass(frozen=True)
class Variable:
    """One environment variable. ``type``, ``default`` and ``meaning`` are words for people.

    ``reader`` is "python", "core" (the compiled core) or "driver" (Apple's). ``own`` marks a variable that
    zincmetal sets for itself.
    """

    name: str
    type: str
    default: str
    meaning: str
    reader: str = "python"
    own: bool = False

    @property
    def value(self) -> str:
        """Text that the environment has, or "" if the variable is not set."""
        return os.environ.get(self.name, "")


DEVICE = Variable(
    "ZINCMETAL_DEVICE", "metal, cuda or cpu", "the best that was built", "the device, if a call names none"
)
MEMORY_LIMIT = Variable(
    "ZINCMETAL_MEMORY_LIMIT", "bytes", "the memory that the device grants", "the most memory that a model may take"
)
PYTHON = Variable(
    "ZINCMETAL_PYTHON", "path of a Python 3.10 or later", "this Python", "the Python that renders chat templates"
)
NATIVE = Variable("ZINCMETAL_NATIVE", "0 or 1", "1", "0: the CPU runs every kernel from its Metal source, slowly")
RELAXED = Variable(
    "ZINCMETAL_RELAXED",
    "1",
    "not set",
    "a mark that zincmetal, not the user, has set the driver's variable",
    "core",
    True,
)
ISA = Variable(
    "ZINCMETAL_ISA", "plain, neon, avx2 or avx512", "the best of the CPU", "the most that native kernels use", "core"
)
CACHE = Variable(
    "ZINCMETAL_CACHE", "a folder, or 0", "~/Library/Caches/zincmetal", "the folder of compiled Metal kernels", "core"
)
KERNELS = Variable("ZINCMETAL_KERNELS", "a folder", "the package's", "other kernel sources for Metal", "core")
METALLIB = Variable("ZINCMETAL_METALLIB", "0", "not set", "0: compile Metal kernels from text", "core")
METAL_DEBUG = Variable(
    "ZINCMETAL_METAL_DEBUG", "anything", "not set", "a fault of the GPU names the kernels that were running", "core"
)
METAL_TIMEOUT = Variable(
    "ZINCMETAL_METAL_TIMEOUT",
    "seconds",
    "120",
    "without a completed command buffer the GPU then counts as lost",
    "core",
)
METAL_KEEP_WIRED = Variable(
    "ZINCMETAL_METAL_KEEP_WIRED", "seconds", "180", "memory stays wired for so long after the last work", "core"
)
DRIVER_TIMEOUT = Variable(
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT",
    "0 or 1",
    "1, set by zincmetal",
    "1: GPU work may keep the display waiting for longer",
    "driver",
)

ALL = (
    DEVICE,
    MEMORY_LIMIT,
    PYTHON,
    CACHE,
    METAL_DEBUG,
    METAL_TIMEOUT,
    METAL_KEEP_WIRED,
    METALLIB,
    KERNELS,
    DRIVER_TIMEOUT,
    RELAXED,
    NATIVE,
    ISA,
)


def device() -> str | None:
    """Return the name of the device that the environment chooses, or None."""
    return DEVICE.value or None


def native() -> bool:
    """Return True if the CPU may use its native kernels."""
    return NATIVE.value != "0"


def memory_limit() -> int | None:
    """Return the limit of a model's memory in bytes, or None. Raises UsageError if the text is no number of bytes."""
    limit = MEMORY_LIMIT.value
    if not limit:
        return None
    if not (limit.isascii() and limit.isdigit() and len(limit) < 20):
        raise UsageError(f"{MEMORY_LIMIT.name} must be a number of bytes below 2^63, not {quote(limit)}")
    return int(limit)


def in_force() -> dict[str, str]:
    """Return the variables that are set, with their text."""
    return {v.name: v.value for v in ALL if v.name in os.environ}


@contextmanager
def override(variable: Variable, value: str) -> Iterator[None]:
    """Set a variable while the block runs, then put the old value back."""
    before = os.environ.get(variable.name)
    os.environ[variable.name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable.name]
        else:
            os.environ[variable.name] = before
