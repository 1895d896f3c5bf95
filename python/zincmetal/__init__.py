"""zincmetal runs large language models from GGUF files, on Apple Silicon first.

>>> import zincmetal
>>> m = zincmetal.load("model.gguf", context=4096)
>>> m.generate("The capital of France is", max_tokens=8).text
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import watchdog
from .errors import (
    ChatTemplateError,
    ContextFullError,
    DeadlineError,
    DeviceBusyError,
    DeviceError,
    DownloadError,
    FileChangedError,
    GGUFError,
    GrammarError,
    KernelError,
    ModelNotFoundError,
    OutOfMemoryError,
    QueueFullError,
    TokenizerError,
    UnsupportedModelError,
    UnsupportedSchemaError,
    UsageError,
    ZincError,
)

if TYPE_CHECKING:
    from .api.load import load
    from .api.model import CacheUse, Call, Chunk, Generation, Logprob, Model, Result

__all__ = [
    "CacheUse",
    "Call",
    "ChatTemplateError",
    "Chunk",
    "ContextFullError",
    "DeadlineError",
    "DeviceBusyError",
    "DeviceError",
    "DownloadError",
    "FileChangedError",
    "GGUFError",
    "Generation",
    "GrammarError",
    "KernelError",
    "Logprob",
    "Model",
    "ModelNotFoundError",
    "OutOfMemoryError",
    "QueueFullError",
    "Result",
    "TokenizerError",
    "UnsupportedModelError",
    "UnsupportedSchemaError",
    "UsageError",
    "ZincError",
    "__version__",
    "load",
]

watchdog.relax()
# Loggers are "zincmetal.<room>"; an application that wants them adds a handler.
logging.getLogger(__name__).addHandler(logging.NullHandler())

# Imported at first use, so that `import zincmetal` costs next to nothing.
_LAZY = {"CacheUse", "Call", "Chunk", "Generation", "Logprob", "Model", "Result", "load"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            return getattr(import_module(".api.load" if name == "load" else ".api.model", __name__), name)
        except MemoryError as error:
            raise OutOfMemoryError("the host has no memory to import zincmetal; close other programs") from error
    if name == "__version__":
        from importlib.metadata import version

        return version("zincmetal")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
