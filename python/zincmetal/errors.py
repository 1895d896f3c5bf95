"""Every exception that zincmetal raises on purpose. All derive from :class:`ZincError`.

Each message names the thing that is wrong (a key, a tensor, an argument) and, where there is one, the remedy.
"""

from __future__ import annotations

from typing import Any


class ZincError(Exception):
    """Base class of all zincmetal errors."""


class GGUFError(ZincError, ValueError):
    """A file is not a well-formed GGUF, or asks for something that its own bytes cannot back."""


class UnsupportedModelError(ZincError, ValueError):
    """A well-formed file holds an architecture, tensor type or option that zincmetal does not run."""


class TokenizerError(ZincError, ValueError):
    """The tokenizer metadata of a file is missing, inconsistent or of an unknown kind."""


class ChatTemplateError(ZincError, ValueError):
    """A chat template is missing, fails, or exceeds its time or memory bound."""


class DeviceError(ZincError, RuntimeError):
    """The device is absent, refused an allocation, or failed while running a command buffer."""


class KernelError(DeviceError):
    """The device cannot make a kernel (``kernels``: their names) that no other can stand in for."""

    def __init__(self, message: str, kernels: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.kernels = kernels


class OutOfMemoryError(DeviceError):
    """A model needs more memory than the device can give. Raised before anything is allocated."""


class ContextFullError(ZincError, RuntimeError):
    """The sequence has no room left for the tokens that were asked for."""


class UsageError(ZincError, ValueError):
    """A call that cannot be carried out as asked: a bad token id, a closed model, two threads at once."""


def quote(text: str, limit: int = 80) -> str:
    """``text`` in quotes on one line, without control characters, cut to about ``limit`` characters."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


def abbreviate(value: Any, limit: int = 60) -> str:
    """A metadata value on one line; of arrays the first few elements."""
    if isinstance(value, str):
        return quote(value, limit)
    if not hasattr(value, "__len__"):
        return str(value)
    shown = [abbreviate(v, 16) for v in value[:5]]
    return f"[{', '.join(shown)}{', …' if len(value) > 5 else ''}]"
