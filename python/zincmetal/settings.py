"""Environment variables of zincmetal: one table of all of them. Python reads zincmetal's own through it alone.

The compiled core reads some of them by itself, and ``watchdog.py`` sets two of Apple's. They have rows too. The page
``docs/environment.md`` explains them; ``zincmetal info`` shows which are set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError, quote


@dataclass(frozen=True)
class Variable:
    """One environment variable. ``type``, ``default`` and ``meaning`` are words for people.

    ``reader`` is "python", "core" (the compiled core) or "driver" (Apple's). ``own`` marks a variable that
    zincmetal sets for itself, ``secret`` one whose text is not shown.
    """

    name: str
    type: str
    default: str
    meaning: str
    reader: str = "python"
    own: bool = False
    secret: bool = False

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
EXACT = Variable("ZINCMETAL_EXACT", "0 or 1", "0", "1: GPUs multiply prompts in floats, slowly, if a call does not say")
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
HOST_CACHE = Variable(
    "ZINCMETAL_HOST_CACHE", "bytes", "1 GiB", "the most host memory for prompts that the device's pools gave up"
)
DISK_CACHE = Variable("ZINCMETAL_DISK_CACHE", "bytes", "16 GiB", "the most that a folder of cached prompts may take")
API_KEY = Variable("ZINCMETAL_API_KEY", "a text", "not set", "the key that a server's clients must send", secret=True)
MODELS = Variable(
    "ZINCMETAL_MODELS", "a folder", "~/.cache/zincmetal/models", "the folder that `zincmetal pull` writes to"
)
OFFLINE = Variable("ZINCMETAL_OFFLINE", "0 or 1", "0", "1: nothing of zincmetal asks the network")
HF_OFFLINE = Variable("HF_HUB_OFFLINE", "0 or 1", "0", "Hugging Face's: as ZINCMETAL_OFFLINE")
HF_CACHE = Variable("HF_HUB_CACHE", "a folder", "$HF_HOME/hub", "Hugging Face's: its cache of models")
HF_HOME = Variable("HF_HOME", "a folder", "~/.cache/huggingface", "Hugging Face's: the folder of all its files")
HF_ENDPOINT = Variable(
    "HF_ENDPOINT", "an address", "https://huggingface.co", "Hugging Face's: the hub that `zincmetal pull` asks"
)
OLLAMA_MODELS = Variable("OLLAMA_MODELS", "a folder", "~/.ollama/models", "Ollama's: its models")
XDG_CACHE = Variable("XDG_CACHE_HOME", "a folder", "~/.cache", "the system's: the folder of all caches")
XDG_RUNTIME = Variable(
    "XDG_RUNTIME_DIR", "a folder", "a folder of the user in /tmp", "the system's: the folder of locks"
)
CUDA_DEVICES = Variable(
    "CUDA_VISIBLE_DEVICES",
    "numbers of GPUs",
    "all",
    "CUDA's: the GPUs that a process may use; zincmetal takes the first",
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
    EXACT,
    PYTHON,
    CACHE,
    HOST_CACHE,
    DISK_CACHE,
    API_KEY,
    MODELS,
    OFFLINE,
    HF_OFFLINE,
    HF_CACHE,
    HF_HOME,
    HF_ENDPOINT,
    OLLAMA_MODELS,
    XDG_CACHE,
    XDG_RUNTIME,
    CUDA_DEVICES,
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


def exact() -> bool:
    """Return True if the environment asks for exact products."""
    return EXACT.value == "1"


def native() -> bool:
    """Return True if the CPU may use its native kernels."""
    return NATIVE.value != "0"


def memory_limit() -> int | None:
    """Return the limit of a model's memory in bytes, or None. Raises UsageError if the text is no number of bytes."""
    return _bytes(MEMORY_LIMIT)


def host_cache() -> int:
    """Return the bytes of host memory for cached prompts. Raises UsageError as ``memory_limit`` does."""
    found = _bytes(HOST_CACHE)
    return 1 << 30 if found is None else found


def disk_cache() -> int:
    """Return the bytes for cached prompts in a folder. Raises UsageError as ``memory_limit`` does."""
    found = _bytes(DISK_CACHE)
    return 16 << 30 if found is None else found


def models_folder() -> Path:
    """Return zincmetal's own folder of models. Raises UsageError if the variable is no absolute path."""
    if MODELS.value and _folder(MODELS) is None:
        raise UsageError(f"{MODELS.name} must be an absolute path, not {quote(MODELS.value)}")
    return _folder(MODELS) or _caches() / "zincmetal" / "models"


def prompts_folder() -> Path:
    """Return the folder where servers keep what they have computed of prompts."""
    return _caches() / "zincmetal" / "prompts"


def hugging_face_cache() -> Path:
    """Return the folder of Hugging Face's cache of models."""
    return _folder(HF_CACHE) or (_folder(HF_HOME) or _caches() / "huggingface") / "hub"


def ollama_folder() -> Path:
    """Return the folder of Ollama's models."""
    return _folder(OLLAMA_MODELS) or Path.home() / ".ollama" / "models"


def runtime_folder() -> Path | None:
    """Return the folder of this user's files that end with the session, or None if the system has none."""
    return _folder(XDG_RUNTIME)


def offline_by() -> str:
    """Return the name of the variable that forbids the network, or ""."""
    return next((v.name for v in (OFFLINE, HF_OFFLINE) if v.value.upper() in _TRUE), "")


_TRUE = ("1", "TRUE", "YES", "ON")


def _caches() -> Path:
    return _folder(XDG_CACHE) or Path.home() / ".cache"


def _folder(variable: Variable) -> Path | None:
    """Return the folder that a variable names, or None if it names no absolute path."""
    found = os.path.expanduser(variable.value)
    return Path(found) if os.path.isabs(found) else None


def _bytes(variable: Variable) -> int | None:
    text = variable.value
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise UsageError(f"{variable.name} must be a number of bytes below 2^63, not {quote(text)}")
    return int(text)


def in_force() -> dict[str, str]:
    """Return the variables that are set, with their text. A secret one is only said to be set."""
    return {v.name: "(set)" if v.secret else v.value for v in ALL if v.name in os.environ}


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
